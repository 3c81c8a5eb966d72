//! A connection to a service, and how it moves on without a task of its own.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
use http::{Request, Response};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use nagaya_engine::ports::BoxStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};

use super::BoxFuture;
use super::body::Upload;
use crate::strict;
use crate::traffic::{Counted, Side, Traffic};

/// What hyper may hold of a message's header, and of a body at a time.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

pub(super) type Answer = Result<Response<Incoming>, TrySendError<Request<Upload>>>;
pub(super) type Frames = Option<Result<Frame<Bytes>, hyper::Error>>;

/// No answer came in time.
pub(super) struct TooLate;

/// An HTTP/1.1 connection. Whoever waits for something on it polls it along: an exchange needs no task but its
/// viewer's, and nothing runs for a connection that is kept for the next one.
pub(super) struct Connection {
    sender: http1::SendRequest<Upload>,
    driver: Driver,
    wakes: Arc<Wakes>,
    /// Of `wakes`.
    waker: Waker,
    /// Ends waiting for an answer. One for all of them, since moving it on costs nothing.
    timer: Pin<Box<Sleep>>,
}

enum Driver {
    /// Moves on when it is polled.
    Here(BoxFuture<hyper::Result<()>>),
    /// Moves on in a task of its own, which ends with this.
    Elsewhere {
        _task: JoinSet<()>,
    },
    Over,
}

impl Connection {
    /// `sweeper` is notified when something happens on it while it is idle.
    pub(super) async fn open(stream: BoxStream, traffic: &Arc<Traffic>, sweeper: &Arc<Notify>) -> hyper::Result<Self> {
        let stream = TokioIo::new(Counted::new(stream, Side::Sandbox, traffic));
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES_MAX)
            .max_headers(strict::FIELDS_MAX)
            .handshake(stream)
            .await?;
        let wakes =
            Arc::new(Wakes { state: AtomicU8::new(MUTED), user: AtomicWaker::new(), sweeper: Arc::clone(sweeper) });
        let waker = Waker::from(Arc::clone(&wakes));
        let timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        Ok(Self { sender, driver: Driver::Here(Box::pin(connection.with_upgrades())), wakes, waker, timer })
    }

    /// Sends a request and waits for the header of its answer until `deadline`, or as much longer as `later` says then.
    pub(super) async fn send(
        &mut self,
        request: Request<Upload>,
        mut deadline: Instant,
        later: impl Fn() -> Instant,
    ) -> Result<Answer, TooLate> {
        let Self { sender, driver, wakes, waker, timer } = self;
        wakes.mute();
        timer.as_mut().reset(deadline);
        let mut answer = pin!(sender.try_send_request(request));
        std::future::poll_fn(|context| {
            wakes.mute();
            driver.advance(waker);
            // It can only come by what was just done, so that it need not wake anybody.
            let mut polled = answer.as_mut().poll(&mut Context::from_waker(Waker::noop())).map(Ok);
            while polled.is_pending() && timer.as_mut().poll(&mut Context::from_waker(waker)).is_ready() {
                match later() {
                    later if later > deadline => deadline = later,
                    _ => polled = Poll::Ready(Err(TooLate)),
                }
                timer.as_mut().reset(deadline);
            }
            wakes.unmute(context.waker());
            polled
        })
        .await
    }

    /// The next part of an answer that came on this connection.
    pub(super) fn poll_frame(&mut self, incoming: &mut Incoming, context: &mut Context<'_>) -> Poll<Frames> {
        let mut incoming = Pin::new(incoming);
        if matches!(self.driver, Driver::Elsewhere { .. }) {
            return incoming.poll_frame(context);
        }
        self.wakes.mute();
        let silent = &mut Context::from_waker(Waker::noop());
        let mut polled = incoming.as_mut().poll_frame(silent);
        // What was taken makes room for more, or was the last.
        self.wakes.mute();
        self.driver.advance(&self.waker);
        if polled.is_pending() {
            polled = incoming.as_mut().poll_frame(silent);
        }
        self.wakes.unmute(context.waker());
        polled
    }

    /// Gives it a task that moves it on until this is dropped, for when nobody may be waiting for an answer.
    pub(super) fn drive_elsewhere(&mut self) {
        self.driver = Driver::Elsewhere { _task: self.spawn() };
    }

    /// Leaves it to what is spoken on it after HTTP.
    pub(super) fn leave(mut self) {
        self.spawn().detach_all();
    }

    fn spawn(&mut self) -> JoinSet<()> {
        let mut task = JoinSet::new();
        if let Driver::Here(driver) = std::mem::replace(&mut self.driver, Driver::Over) {
            task.spawn(async { note(driver.await) });
        }
        task
    }

    /// Whether it can be kept for another request. From now on what happens on it is the sweeper's business.
    pub(super) fn rest(&mut self) -> bool {
        self.wakes.state.store(IDLE, Ordering::SeqCst);
        self.is_ready() || self.is_open()
    }

    /// Has a look at one that rests: the service may have closed it.
    pub(super) fn is_open(&mut self) -> bool {
        self.driver.advance(&self.waker);
        self.is_ready()
    }

    /// Whether it may be used again, as far as is known.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.driver, Driver::Here(_)) && self.sender.is_ready()
    }
}

impl Driver {
    fn advance(&mut self, waker: &Waker) {
        let Self::Here(driver) = self else { return };
        if let Poll::Ready(ended) = driver.as_mut().poll(&mut Context::from_waker(waker)) {
            note(ended);
            *self = Self::Over;
        }
    }
}

fn note(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to a service in a sandbox ended early");
    }
}

/// Nobody waits for anything on the connection: its sweeper is notified.
const IDLE: u8 = 0;
/// Its user is woken.
const BUSY: u8 = 1;
/// Its user is at it just now, and mostly the one who causes the wake.
const MUTED: u8 = 2;
/// As `MUTED`, and something happened.
const WOKEN: u8 = 3;

/// The one waker of a connection, whoever uses it. Passing each user's own waker on would have it woken by what it does
/// itself, several times a request.
struct Wakes {
    state: AtomicU8,
    user: AtomicWaker,
    sweeper: Arc<Notify>,
}

impl Wakes {
    /// For as long as its user looks after the connection itself. What happened before is forgotten.
    fn mute(&self) {
        self.state.store(MUTED, Ordering::SeqCst);
    }

    fn unmute(&self, user: &Waker) {
        self.user.register(user);
        if self.state.swap(BUSY, Ordering::SeqCst) == WOKEN {
            user.wake_by_ref();
        }
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        match self.state.compare_exchange(MUTED, WOKEN, Ordering::SeqCst, Ordering::SeqCst) {
            Err(IDLE) => self.sweeper.notify_one(),
            Err(BUSY) => self.user.wake(),
            _ => {}
        }
    }
}
