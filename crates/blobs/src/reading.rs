//! An image as a stream.

use std::sync::Arc;

use bytes::Bytes;
use nagaya_engine::ports::{BlobError, ImageReader};
use tokio::sync::mpsc;

use crate::store::Shared;
use crate::{BLOCK_BYTES, CHUNK_BYTES, Chunk, Manifest};

/// Pieces are at most this long, so that a slow reader holds little.
const PIECE_BYTES: u64 = 1 << 20;

/// Begins to read an image. At most two chunks of it are in memory, however slow the reader is.
pub(crate) fn read(shared: Arc<Shared>, manifest: Manifest) -> ImageReader {
    let total_size = manifest.image_size;
    let (sender, chunks) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut image = Stream { sender, sent: 0, total_size, zeros: Bytes::from(vec![0; PIECE_BYTES as usize]) };
        if let Err(error) = image.send_all(&shared, &manifest).await {
            // A reader that went away has no use for the error.
            let _ = image.sender.send(Err(error)).await;
        }
    });
    ImageReader { total_size, chunks }
}

struct Stream {
    sender: mpsc::Sender<Result<Bytes, BlobError>>,
    sent: u64,
    total_size: u64,
    zeros: Bytes,
}

impl Stream {
    async fn send_all(&mut self, shared: &Arc<Shared>, manifest: &Manifest) -> Result<(), BlobError> {
        for chunk in &manifest.chunks {
            let blob = shared.read_chunk(chunk).await?;
            if !self.send_chunk(chunk, blob).await {
                return Ok(());
            }
        }
        self.send_zeros(self.total_size).await;
        Ok(())
    }

    /// False when nobody reads any more.
    async fn send_chunk(&mut self, chunk: &Chunk, mut blob: Bytes) -> bool {
        for run in chunk.blocks.runs() {
            let mut data = blob.split_to(run.len() * BLOCK_BYTES as usize);
            if !self.send_zeros(chunk.offset() + run.start as u64 * BLOCK_BYTES).await {
                return false;
            }
            data.truncate((self.total_size - self.sent) as usize);
            while !data.is_empty() {
                let piece = data.split_to(data.len().min(PIECE_BYTES as usize));
                if !self.send(piece).await {
                    return false;
                }
            }
        }
        debug_assert!(self.sent <= chunk.offset() + CHUNK_BYTES);
        true
    }

    async fn send_zeros(&mut self, until: u64) -> bool {
        while self.sent < until {
            let piece = self.zeros.slice(..(until - self.sent).min(PIECE_BYTES) as usize);
            if !self.send(piece).await {
                return false;
            }
        }
        true
    }

    async fn send(&mut self, piece: Bytes) -> bool {
        self.sent += piece.len() as u64;
        self.sender.send(Ok(piece)).await.is_ok()
    }
}
