//! The content of files, in both directions.

use bytes::Bytes;
use nagaya_engine::ports::{FileReader, FileWriter, GuestError, WriteOptions};
use nagaya_guest::frame::{DATA_BYTES_MAX, Kind};
use nagaya_guest::messages::{ReadFile, WriteFile, event, outcome};
use nagaya_guest::mux::{Incoming, Receiver, Sender, charge};
use tokio::sync::{mpsc, oneshot};

use super::{Link, event_of, finish, unexpected, unreachable_guest};

/// Chunks that wait for their reader or for the socket, beyond what the stream's window holds.
const CHUNKS_MAX: usize = 4;
/// Window beyond the initial one for content that comes in, bytes.
const WIDER_WINDOW_BYTES: u32 = 768 * 1024;

/// Waits until the agent has opened a file; the file's size.
async fn opened(receiver: &mut Receiver) -> Result<u64, GuestError> {
    match receiver.next().await {
        Some(Incoming::Message(message)) => match event_of(&message) {
            Some(event::Kind::Opened(opened)) => Ok(opened.total_size),
            _ => Err(unexpected(Some(Incoming::Message(message)))),
        },
        Some(Incoming::End(end)) => Err(finish(&end).err().unwrap_or_else(|| unexpected(Some(Incoming::End(end))))),
        other => Err(unexpected(other)),
    }
}

pub(super) async fn read(link: &Link, request: ReadFile) -> Result<FileReader, GuestError> {
    let (sender, mut receiver) = link.open(request).await?;
    receiver.widen(WIDER_WINDOW_BYTES);
    let total_size = opened(&mut receiver).await?;
    let (chunks, reader) = mpsc::channel(CHUNKS_MAX);
    tokio::spawn(async move {
        let holder = chunks.clone();
        tokio::select! {
            // Dropping both halves of the stream resets it.
            _ = holder.closed() => {}
            _ = deliver(receiver, chunks) => {}
        }
        drop(sender);
    });
    Ok(FileReader { total_size, chunks: reader })
}

async fn deliver(mut receiver: Receiver, chunks: mpsc::Sender<Result<Bytes, GuestError>>) {
    loop {
        let failure = match receiver.next().await {
            Some(Incoming::Data(data)) => {
                let cost = charge(data.len());
                if chunks.send(Ok(data)).await.is_err() {
                    return;
                }
                receiver.release(cost);
                continue;
            }
            Some(Incoming::Message(_)) => continue,
            Some(Incoming::End(end)) => match finish(&end) {
                Ok(_) => return,
                Err(error) => error,
            },
            other => unexpected(other),
        };
        // The reader may have gone; then there is nobody to tell.
        let _ = chunks.send(Err(failure)).await;
        return;
    }
}

pub(super) async fn write(link: &Link, path: String, options: WriteOptions) -> Result<FileWriter, GuestError> {
    let WriteOptions { mode, truncate, sync } = options;
    let request = WriteFile { path, mode, truncate, sync };
    let (sender, mut receiver) = link.open(request).await?;
    opened(&mut receiver).await?;
    let (chunks, queue) = mpsc::channel(CHUNKS_MAX);
    let (writer, finished) = FileWriter::new(chunks);
    tokio::spawn(send(sender, receiver, queue, finished));
    Ok(writer)
}

/// Sends the chunks, then the end when the writer finishes. A writer that is dropped before, and an
/// error of the agent, end the stream.
async fn send(
    sender: Sender,
    mut receiver: Receiver,
    mut queue: mpsc::Receiver<Bytes>,
    finished: oneshot::Receiver<oneshot::Sender<Result<u64, GuestError>>>,
) {
    let content = async {
        while let Some(mut chunk) = queue.recv().await {
            while !chunk.is_empty() {
                let piece = chunk.split_to(chunk.len().min(DATA_BYTES_MAX));
                if sender.data(Kind::Data, piece).await.is_err() {
                    // The outcome says why.
                    return std::future::pending().await;
                }
            }
        }
    };
    let early = tokio::select! {
        biased;
        outcome = outcome(&mut receiver) => Some(outcome),
        () = content => None,
    };
    drop(queue);
    // Without a message the writer has given up, and dropping the stream resets it.
    let Ok(reply) = finished.await else { return };
    let result = match early {
        Some(early) => early,
        None => {
            sender.end_content();
            outcome(&mut receiver).await
        }
    };
    let _ = reply.send(result);
}

async fn outcome(receiver: &mut Receiver) -> Result<u64, GuestError> {
    loop {
        match receiver.next().await {
            Some(Incoming::End(end)) => {
                return match finish(&end)? {
                    Some(outcome::Kind::Written(written)) => Ok(written.bytes),
                    _ => Err(unreachable_guest()),
                };
            }
            Some(Incoming::Message(_)) => {}
            other => return Err(unexpected(other)),
        }
    }
}
