//! What is the same for every rpc: it is counted when it ends, and long streams end when the
//! server drains.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use connectrpc::dispatcher::{Dispatcher, MethodDescriptor, RequestStream, StreamingResult, UnaryResult};
use connectrpc::payload::Payload;
use connectrpc::{CodecFormat, ConnectError, EncodedBody, EncodedStream, RequestContext};
use futures::Stream;
use nagaya_api::error::{Code, Error};

use super::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;

/// What the streams of a façade are like, by the names of their methods.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streams {
    /// Without an end of their own. Everything else is finished before the server stops.
    pub(crate) long: &'static [&'static str],
    /// Of these, the ones that say themselves why they end when the server drains.
    pub(crate) say_farewell: &'static [&'static str],
    /// Those of large messages which are as good in pieces, by `SERVICE/METHOD`.
    pub(crate) rechunked: &'static [&'static str],
}

impl Streams {
    pub(crate) fn is_long(&self, method: &str) -> bool {
        self.long.contains(&method)
    }
}

pub(crate) struct Instrumented<D> {
    pub(crate) inner: D,
    pub(crate) streams: Streams,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lifecycle: Arc<Lifecycle>,
}

impl<D> Instrumented<D> {
    fn call(&self, context: &RequestContext) -> Call {
        Call {
            metrics: Arc::clone(&self.metrics),
            rpc: context.spec().map_or("unknown", |spec| spec.method()),
            code: CANCELED,
        }
    }

    fn stream(&self, mut call: Call, starting: StreamingResult) -> StreamingResult {
        let cut = self.streams.is_long(call.rpc) && !self.streams.say_farewell.contains(&call.rpc);
        let mut ends: Ends = cut.then(|| Box::pin(self.lifecycle.reached(Phase::Draining)) as _);
        Box::pin(async move {
            let started = match &mut ends {
                None => starting.await,
                Some(draining) => tokio::select! {
                    started = starting => started,
                    () = draining => Err(Error::from(Code::Draining).into()),
                },
            };
            match started {
                Ok(response) => {
                    Ok(response
                        .map_body(|inner| -> EncodedStream { Box::pin(InstrumentedStream { inner, call, ends }) }))
                }
                Err(error) => {
                    call.end(error.code.as_str());
                    Err(error)
                }
            }
        })
    }
}

impl<D: Dispatcher> Dispatcher for Instrumented<D> {
    fn lookup(&self, path: &str) -> Option<MethodDescriptor> {
        self.inner.lookup(path)
    }

    fn call_unary(&self, path: &str, context: RequestContext, request: Payload, format: CodecFormat) -> UnaryResult {
        let call = self.call(&context);
        finish(call, self.inner.call_unary(path, context, request, format))
    }

    fn call_server_streaming(
        &self,
        path: &str,
        context: RequestContext,
        request: Bytes,
        format: CodecFormat,
    ) -> StreamingResult {
        self.stream(self.call(&context), self.inner.call_server_streaming(path, context, request, format))
    }

    fn call_client_streaming(
        &self,
        path: &str,
        context: RequestContext,
        requests: RequestStream,
        format: CodecFormat,
    ) -> UnaryResult {
        let call = self.call(&context);
        finish(call, self.inner.call_client_streaming(path, context, requests, format))
    }

    fn call_bidi_streaming(
        &self,
        path: &str,
        context: RequestContext,
        requests: RequestStream,
        format: CodecFormat,
    ) -> StreamingResult {
        self.stream(self.call(&context), self.inner.call_bidi_streaming(path, context, requests, format))
    }
}

fn finish(mut call: Call, result: UnaryResult) -> UnaryResult {
    Box::pin(async move {
        let result = result.await;
        call.end(result.as_ref().map_or_else(|error| error.code.as_str(), |_| OK));
        result
    })
}

const OK: &str = "ok";
/// The caller went away before there was an outcome.
const CANCELED: &str = "canceled";

/// One call, counted when it is dropped.
struct Call {
    metrics: Arc<Metrics>,
    rpc: &'static str,
    code: &'static str,
}

impl Call {
    fn end(&mut self, code: &'static str) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.metrics.call_ended(self.rpc, self.code);
    }
}

/// Completes when a long stream has to end; `None` for streams that end by themselves.
type Ends = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

struct InstrumentedStream {
    inner: EncodedStream,
    call: Call,
    ends: Ends,
}

impl Stream for InstrumentedStream {
    type Item = Result<EncodedBody, ConnectError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = match self.inner.as_mut().poll_next(context) {
            Poll::Ready(item) => item,
            Poll::Pending => {
                let Some(ends) = &mut self.ends else { return Poll::Pending };
                ready!(ends.as_mut().poll(context));
                self.ends = None;
                // Dropping the stream ends what it stands for, e.g. a command.
                self.inner = Box::pin(futures::stream::empty());
                Some(Err(Error::from(Code::Draining).into()))
            }
        };
        match &item {
            None if self.call.code == CANCELED => self.call.end(OK),
            Some(Err(error)) => self.call.end(error.code.as_str()),
            _ => {}
        }
        Poll::Ready(item)
    }
}
