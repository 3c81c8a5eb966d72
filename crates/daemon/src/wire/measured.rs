//! The body of a stream of messages, each of which takes its memory from the budget before it comes in.
//!
//! The rpc layer hands a message on when it is complete. A small one is nothing; for a large one there must be room
//! first, and until then its sender waits. What a message took it gives back when the next one begins.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use nagaya_api::error::Error;

use crate::budget::{Budget, Held, SMALL_BYTES_MAX};

/// A request's body cannot be read to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    NoRoom(Error),
}

/// Flags and length in front of every message.
const ENVELOPE_BYTES: usize = 5;

type Waiting = Pin<Box<dyn Future<Output = Result<Held, Error>> + Send>>;

pub(crate) struct Measured<B> {
    body: B,
    budget: Arc<Budget>,
    caller: u8,
    /// What has come and was not handed on yet.
    pending: Bytes,
    /// The envelope of the next message, as far as it has come.
    envelope: [u8; ENVELOPE_BYTES],
    envelope_filled: usize,
    /// Bytes of the current message that are still to come.
    rest: usize,
    waiting: Option<Waiting>,
    held: Option<Held>,
}

impl<B> Measured<B> {
    pub(crate) fn new(body: B, budget: &Arc<Budget>, caller: u8) -> Self {
        Self {
            body,
            budget: Arc::clone(budget),
            caller,
            pending: Bytes::new(),
            envelope: [0; ENVELOPE_BYTES],
            envelope_filled: 0,
            rest: 0,
            waiting: None,
            held: None,
        }
    }

    /// What can be handed on: all up to and with the envelope of a message that has to wait.
    fn next_piece(&mut self) -> Bytes {
        let mut at = 0;
        while at < self.pending.len() && self.waiting.is_none() {
            let left = self.pending.len() - at;
            if self.rest > 0 {
                let taken = self.rest.min(left);
                self.rest -= taken;
                at += taken;
                continue;
            }
            let taken = (ENVELOPE_BYTES - self.envelope_filled).min(left);
            self.envelope[self.envelope_filled..self.envelope_filled + taken]
                .copy_from_slice(&self.pending[at..at + taken]);
            self.envelope_filled += taken;
            at += taken;
            if self.envelope_filled == ENVELOPE_BYTES {
                self.begin_message();
            }
        }
        self.pending.split_to(at)
    }

    fn begin_message(&mut self) {
        let [_, a, b, c, d] = self.envelope;
        self.envelope_filled = 0;
        self.rest = u32::from_be_bytes([a, b, c, d]) as usize;
        self.held = None;
        if self.rest > SMALL_BYTES_MAX {
            let (held, bytes) = (self.budget.hold(self.caller), self.rest);
            self.waiting = Some(Box::pin(async move { held.reserve(bytes).await.map(|()| held) }));
        }
    }
}

impl<B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Body for Measured<B> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = &mut *self;
        loop {
            if let Some(waiting) = &mut me.waiting {
                let held = ready!(waiting.as_mut().poll(context));
                me.waiting = None;
                match held {
                    Ok(held) => me.held = Some(held),
                    Err(error) => return Poll::Ready(Some(Err(BodyError::NoRoom(error)))),
                }
            }
            if !me.pending.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(me.next_piece()))));
            }
            match ready!(Pin::new(&mut me.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => me.pending = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pending.is_empty() && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use std::time::Duration;

    use super::*;

    struct Pieces(std::collections::VecDeque<Bytes>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = hyper::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
            Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
        }
    }

    fn messages(lengths: &[usize]) -> Vec<u8> {
        let message = |length: &usize| [&[0][..], &(*length as u32).to_be_bytes(), &vec![7; *length]].concat();
        lengths.iter().flat_map(message).collect()
    }

    fn measured(bytes: &[u8], piece: usize, budget: &Arc<Budget>) -> Measured<Pieces> {
        Measured::new(Pieces(bytes.chunks(piece).map(Bytes::copy_from_slice).collect()), budget, 0)
    }

    fn budget(bytes_max: usize) -> Arc<Budget> {
        Budget::new(bytes_max, Duration::from_millis(50), None)
    }

    #[tokio::test]
    async fn a_large_message_waits_for_room_and_one_after_another_gives_it_back() {
        let budget = budget(8 << 20);
        let bytes = messages(&[10, 6 << 20, 6 << 20, 20]);
        let all = measured(&bytes, 100_000, &budget).collect().await.unwrap().to_bytes();
        assert_eq!(all, bytes);
        let other = budget.hold(0);
        other.reserve(5 << 20).await.unwrap();
        let mut body = measured(&bytes, 100_000, &budget);
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(first.len(), 20, "up to the large message's length");
        let refused = body.frame().await.unwrap().unwrap_err();
        assert!(refused.to_string().contains("limits.bytes_under_way_max"), "{refused}");
    }

    proptest! {
        #[test]
        fn bytes_pass_as_they_are_however_they_are_cut(
            lengths in prop::collection::vec(0usize..200_000, 0..6), piece in 1usize..70_000, cut in 0usize..10,
        ) {
            let mut bytes = messages(&lengths);
            bytes.truncate(bytes.len().saturating_sub(cut));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let budget = budget(8 << 20);
            let all = runtime.block_on(measured(&bytes, piece, &budget).collect()).unwrap().to_bytes();
            prop_assert_eq!(all, bytes);
        }
    }
}
