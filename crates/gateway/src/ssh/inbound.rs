//! What clients send on channels, on its way to whoever reads it.
//!
//! The SSH library grants a client more to send as soon as something arrives, not when it was read, and takes nothing
//! else from the connection while a channel's reader is busy: a program that stops reading would stall the whole
//! connection, also the window adjustments that it may be waiting for itself. So everything is taken in here at once,
//! and a channel with too much waiting is throttled by granting a few bytes at a time until its reader catches up.
//! That slows the other channels of the same connection for as long as it lasts, but stalls none for good.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use nagaya_engine::ports::{Signal, TerminalSize};
use tokio::sync::{Notify, mpsc, oneshot};

/// What a client may send ahead on one channel, bytes.
pub const WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// The least that the library grants at once: below two it would grant nothing ever again.
const TRICKLE_BYTES: u32 = 2;
/// Waiting bytes from which on a channel is throttled.
const BACKLOG_BYTES_HIGH: usize = 1024 * 1024;
/// Waiting bytes of one connection that no client reaches which keeps to what it was granted.
const BACKLOG_BYTES_MAX: usize = 64 * 1024 * 1024;
/// What every item costs beside its bytes.
const ITEM_BYTES: usize = 64;
/// How long a throttled client is kept waiting for each grant.
const PAUSE: Duration = Duration::from_millis(20);
/// How long what was sent on a channel that is closed may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Something a client sent.
#[derive(Debug)]
pub enum Item {
    Data(Bytes),
    EndOfFile,
    Signal(Signal),
    Resize(TerminalSize),
}

impl Item {
    fn cost(&self) -> usize {
        ITEM_BYTES + if let Self::Data(data) = self { data.len() } else { 0 }
    }
}

/// Bytes that wait, of one channel and of its whole connection.
#[derive(Debug)]
struct Backlog {
    of_channel: AtomicUsize,
    of_connection: Arc<AtomicUsize>,
    caught_up: Notify,
}

/// The end that is fed. Dropping it tells the reader that the channel was closed.
#[derive(Debug)]
pub struct ChannelWriter {
    items: mpsc::UnboundedSender<Item>,
    backlog: Arc<Backlog>,
    _open: oneshot::Sender<Infallible>,
}

/// The end that is read.
#[derive(Debug)]
pub struct ChannelReader {
    items: mpsc::UnboundedReceiver<Item>,
    /// The cost of the item that was taken last: it counts until the next one is asked for.
    taken: usize,
    backlog: Arc<Backlog>,
    open: Option<oneshot::Receiver<Infallible>>,
}

/// More waits than a client could have sent that keeps to the protocol.
#[derive(Debug, PartialEq, Eq)]
pub struct TooMuch;

pub fn channel(of_connection: &Arc<AtomicUsize>) -> (ChannelWriter, ChannelReader) {
    let (sender, items) = mpsc::unbounded_channel();
    let of_connection = Arc::clone(of_connection);
    let backlog = Arc::new(Backlog { of_channel: AtomicUsize::new(0), of_connection, caught_up: Notify::new() });
    let (closing, open) = oneshot::channel();
    let feeder = ChannelWriter { items: sender, backlog: Arc::clone(&backlog), _open: closing };
    (feeder, ChannelReader { items, taken: 0, backlog, open: Some(open) })
}

impl ChannelWriter {
    pub fn push(&self, item: Item) -> Result<(), TooMuch> {
        let Backlog { of_channel, of_connection, .. } = &*self.backlog;
        let cost = item.cost();
        // Counted first: the reader may have it, and take it off again, before this goes on.
        of_channel.fetch_add(cost, Ordering::Relaxed);
        let waiting = of_connection.fetch_add(cost, Ordering::Relaxed) + cost;
        if self.items.send(item).is_err() {
            // Nobody reads it any more; the client hears of that soon.
            of_channel.fetch_sub(cost, Ordering::Relaxed);
            of_connection.fetch_sub(cost, Ordering::Relaxed);
            return Ok(());
        }
        if waiting > BACKLOG_BYTES_MAX { Err(TooMuch) } else { Ok(()) }
    }

    /// Whether nobody reads any more.
    pub fn is_done(&self) -> bool {
        self.items.is_closed()
    }

    pub fn is_behind(&self) -> bool {
        !self.is_done() && self.backlog.of_channel.load(Ordering::Relaxed) > BACKLOG_BYTES_HIGH
    }

    /// Waits a moment for a reader that is behind.
    pub async fn pause_if_behind(&self) {
        if self.is_behind() {
            let _ = tokio::time::timeout(PAUSE, self.backlog.caught_up.notified()).await;
        }
    }
}

/// How much is granted next, to whichever channel runs out.
pub fn next_window<'a>(mut feeders: impl Iterator<Item = &'a ChannelWriter>) -> u32 {
    if feeders.any(ChannelWriter::is_behind) { TRICKLE_BYTES } else { WINDOW_BYTES }
}

impl ChannelReader {
    /// The next item; `None` when the channel or the connection was closed. Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<Item> {
        self.release();
        let item = self.items.recv().await?;
        self.taken = item.cost();
        Some(item)
    }

    /// Completes some time after the channel was closed, also while nothing that was sent on it is read. For one caller.
    pub fn expired(&mut self) -> impl Future<Output = ()> + Send + 'static {
        let open = self.open.take();
        async move {
            match open {
                Some(open) => drop(open.await),
                None => std::future::pending().await,
            }
            tokio::time::sleep(LAST_WORDS).await;
        }
    }

    fn release(&mut self) {
        let taken = std::mem::take(&mut self.taken);
        self.backlog.of_connection.fetch_sub(taken, Ordering::Relaxed);
        let before = self.backlog.of_channel.fetch_sub(taken, Ordering::Relaxed);
        if before > BACKLOG_BYTES_HIGH && before - taken <= BACKLOG_BYTES_HIGH {
            self.backlog.caught_up.notify_one();
        }
    }
}

impl Drop for ChannelReader {
    fn drop(&mut self) {
        self.items.close();
        self.release();
        while let Ok(item) = self.items.try_recv() {
            self.taken = item.cost();
            self.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(bytes: usize) -> Item {
        Item::Data(vec![0; bytes].into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_behind_shrinks_what_is_granted() {
        let total = Arc::default();
        let (feeder, mut intake) = channel(&total);
        assert_eq!(next_window([&feeder].into_iter()), WINDOW_BYTES);
        for _ in 0..40 {
            feeder.push(data(32 * 1024)).unwrap();
        }
        assert_eq!(next_window([&feeder].into_iter()), TRICKLE_BYTES);
        let before = tokio::time::Instant::now();
        feeder.pause_if_behind().await;
        assert_eq!(before.elapsed(), PAUSE);
        for _ in 0..20 {
            intake.next().await.unwrap();
        }
        assert_eq!(next_window([&feeder].into_iter()), WINDOW_BYTES);
        drop(intake);
        assert_eq!(total.load(Ordering::Relaxed), 0, "what nobody read is not counted for ever");
        assert!(feeder.is_done());
    }

    #[tokio::test]
    async fn whoever_sends_more_than_was_granted_is_found_out() {
        let total = Arc::default();
        let (feeder, _intake) = channel(&total);
        let sent = (0..3_000).map_while(|_| feeder.push(data(32 * 1024)).ok()).count();
        assert!((2_000..2_100).contains(&sent), "{sent}");
    }

    #[tokio::test]
    async fn a_closed_channel_ends_the_reader() {
        let (feeder, mut intake) = channel(&Arc::default());
        feeder.push(Item::EndOfFile).unwrap();
        drop(feeder);
        assert!(matches!(intake.next().await, Some(Item::EndOfFile)));
        assert!(intake.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_read_after_the_close_is_not_waited_for() {
        let (feeder, mut intake) = channel(&Arc::default());
        feeder.push(data(10)).unwrap();
        let expired = intake.expired();
        drop(feeder);
        let before = tokio::time::Instant::now();
        expired.await;
        assert_eq!(before.elapsed(), LAST_WORDS);
    }
}
