//! The task that writes frames: many per system call, payloads without a copy.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

use crate::frame::{Frame, HEADER_BYTES, Kind};
use crate::mux::{Shared, room_for};

/// Frames that go into one system call at most.
const BATCH_FRAMES: usize = 32;
/// How long a farewell may take, when the connection is closed for a reason.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);

pub(crate) async fn write<W: AsyncWrite + Unpin>(
    mut writer: W,
    shared: Arc<Shared>,
    mut queue: mpsc::UnboundedReceiver<Frame>,
    mut closed: watch::Receiver<Option<Arc<str>>>,
) {
    let mut batch = Vec::with_capacity(BATCH_FRAMES);
    loop {
        tokio::select! {
            // What is queued goes first, so that outcomes are not lost to a farewell.
            biased;
            _ = queue.recv_many(&mut batch, BATCH_FRAMES) => {}
            () = ended(&mut closed) => break,
        }
        let written = {
            let write = write_batch(&mut writer, &batch);
            tokio::pin!(write);
            tokio::select! {
                biased;
                written = &mut write => written,
                () = ended(&mut closed) => match tokio::time::timeout(FAREWELL_TIMEOUT, write).await {
                    Ok(written) => written,
                    // In the middle of a frame there is no way to say farewell.
                    Err(_) => return,
                },
            }
        };
        if let Err(error) = written {
            shared.close(&format!("write: {error}"));
            return;
        }
        let room: usize =
            batch.iter().filter(|frame| takes_room(frame)).map(|frame| room_for(frame.payload.len()) as usize).sum();
        shared.room.add_permits(room);
        batch.clear();
    }
    let reason = closed.borrow().clone().unwrap_or_default();
    let mut farewell = bytes::BytesMut::new();
    let payload = Bytes::from(reason.chars().take(200).collect::<String>());
    Frame { kind: Kind::Goodbye, stream: 0, payload }.encode(&mut farewell);
    let _ = tokio::time::timeout(FAREWELL_TIMEOUT, async {
        writer.write_all(&farewell).await?;
        writer.shutdown().await
    })
    .await;
}

fn takes_room(frame: &Frame) -> bool {
    matches!(frame.kind, Kind::Open | Kind::Message | Kind::Data | Kind::ErrorData)
}

async fn write_batch<W: AsyncWrite + Unpin>(writer: &mut W, frames: &[Frame]) -> std::io::Result<()> {
    let mut headers = [[0; HEADER_BYTES]; BATCH_FRAMES];
    for (header, frame) in headers.iter_mut().zip(frames) {
        *header = frame.header();
    }
    let mut slices = [IoSlice::new(&[]); 2 * BATCH_FRAMES];
    let mut count = 0;
    for (header, frame) in headers.iter().zip(frames) {
        slices[count] = IoSlice::new(header);
        slices[count + 1] = IoSlice::new(&frame.payload);
        count += 2;
    }
    let mut rest = &mut slices[..count];
    while !rest.is_empty() {
        let written = writer.write_vectored(rest).await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut rest, written);
    }
    Ok(())
}

/// Completes when the connection has been closed.
pub(crate) async fn ended(closed: &mut watch::Receiver<Option<Arc<str>>>) {
    let _ = closed.wait_for(Option::is_some).await;
}
