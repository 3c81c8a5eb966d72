//! Bodies on their way through: never held, never counted, as slow as the slower side.

use std::error::Error as StdError;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::oneshot;

use super::BoxFuture;
use super::connection::Frames;
use super::pool::Lease;

type AnyError = Box<dyn StdError + Send + Sync>;

/// How long a service may take to say `100 Continue` before the body is sent without.
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

/// A request's body on its way to the service.
pub(super) enum Upload {
    Nothing,
    Body { incoming: Incoming, progress: Arc<Progress>, gate: Option<Gate> },
}

/// Closed until the service wants the body.
pub(super) struct Gate {
    /// `None` when the service has answered without asking for it.
    opened: Option<oneshot::Receiver<()>>,
    patience: Pin<Box<tokio::time::Sleep>>,
}

impl Gate {
    pub(super) fn new(opened: oneshot::Receiver<()>) -> Self {
        Self { opened: Some(opened), patience: Box::pin(tokio::time::sleep(CONTINUE_PATIENCE)) }
    }

    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(opened) = &mut self.opened else { return Poll::Pending };
        match Pin::new(opened).poll(context) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(_)) => {
                self.opened = None;
                Poll::Pending
            }
            Poll::Pending => self.patience.as_mut().poll(context),
        }
    }
}

/// How far an upload got.
#[derive(Debug)]
pub(super) struct Progress {
    begun: Instant,
    /// When a part of it was sent last, milliseconds from its beginning.
    last_ms: AtomicU64,
    complete: AtomicBool,
}

impl Progress {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { begun: Instant::now(), last_ms: AtomicU64::new(0), complete: AtomicBool::new(false) })
    }

    pub(super) fn last(&self) -> Instant {
        self.begun + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    fn advance(&self) {
        let elapsed = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(elapsed, Ordering::Relaxed);
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = AnyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnyError>>> {
        let Self::Body { incoming, progress, gate } = self.get_mut() else { return Poll::Ready(None) };
        if let Some(closed) = gate {
            std::task::ready!(closed.poll_open(context));
            *gate = None;
        }
        let polled = Pin::new(&mut *incoming).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(_))) => progress.advance(),
            Poll::Ready(None) => progress.complete.store(true, Ordering::Release),
            _ => {}
        }
        if incoming.is_end_stream() {
            progress.complete.store(true, Ordering::Release);
        }
        polled.map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Nothing => true,
            Self::Body { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Nothing => SizeHint::with_exact(0),
            Self::Body { incoming, .. } => incoming.size_hint(),
        }
    }
}

/// What a viewer gets.
pub struct ResponseBody(Content);

enum Content {
    Own(Full<Bytes>),
    Service(Download),
}

/// A service's answer on its way to the viewer.
struct Download {
    incoming: Incoming,
    /// The connection it comes on, and the visit that it belongs to.
    lease: Option<Lease>,
    /// For streams without an end of their own.
    stopping: Option<BoxFuture<()>>,
    /// Read to its end.
    ended: bool,
    /// Its viewer has been given what came so far.
    caught_up: bool,
    /// How it broke off, until then.
    broken: Option<hyper::Error>,
}

impl ResponseBody {
    pub(super) fn own(body: Full<Bytes>) -> Self {
        Self(Content::Own(body))
    }

    pub(super) fn service(incoming: Incoming, lease: Lease, stopping: Option<BoxFuture<()>>) -> Self {
        Self(Content::Service(Download {
            incoming,
            lease: Some(lease),
            stopping,
            ended: false,
            caught_up: false,
            broken: None,
        }))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = AnyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match &mut self.get_mut().0 {
            Content::Own(body) => Pin::new(body).poll_frame(context).map_err(|never| match never {}),
            Content::Service(download) => download.poll_frame(context).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Content::Own(body) => body.is_end_stream(),
            Content::Service(download) => download.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Content::Own(body) => body.size_hint(),
            Content::Service(download) => download.incoming.size_hint(),
        }
    }
}

impl Download {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Frames> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let Some(lease) = &mut self.lease else { return Poll::Ready(None) };
        let polled = lease.poll_frame(&mut self.incoming, context);
        let caught_up = std::mem::replace(&mut self.caught_up, polled.is_pending());
        match polled {
            Poll::Pending => match &mut self.stopping {
                Some(stopping) => stopping.as_mut().poll(context).map(|()| None),
                None => Poll::Pending,
            },
            // What came before it is sent first: after an error hyper sends nothing.
            Poll::Ready(Some(Err(error))) if !caught_up => {
                self.broken = Some(error);
                context.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Ready(frame) => {
                self.ended |= frame.is_none();
                Poll::Ready(frame)
            }
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // Of an announced length nobody asks for what comes after the last byte.
        let ended = self.ended || self.incoming.is_end_stream();
        if let Some(lease) = self.lease.take() {
            lease.finish(ended);
        }
    }
}
