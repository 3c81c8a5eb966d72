//! Images that sandboxes can stand on. Only servers of Nagaya tell and fetch them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use connectrpc::client::ServerStream;
use futures::StreamExt;
use hyper::body::Incoming;
use nagaya_api::nagaya::v1;
use nagaya_api::nagaya::v1::import_images_request::Part;
use nagaya_api::nagaya::v1::pull_image_response;
use nagaya_api::tenki::client::Whole;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::oneshot;

use crate::{Client, Error, Result, wire};

/// A piece of an archive that is imported.
const PIECE_BYTES: usize = 256 << 10;

/// An image that is wholly on the server.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Image {
    /// `sha256:…` of its manifest.
    pub digest: String,
    /// In full, such as `docker.io/library/python:3.12`.
    pub names: Vec<String>,
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub added_at: Option<SystemTime>,
    /// As the image has it; empty is root.
    pub user: String,
    /// Empty where the image does not say.
    pub workdir: String,
    pub env: BTreeMap<String, String>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// `PORT/PROTOCOL`.
    pub exposed_ports: Vec<String>,
}

/// A layer, which is on the server's disk once, whatever images have it.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ImageLayer {
    /// `sha256:…` of its uncompressed archive.
    pub diff_id: String,
    /// As its registry has it.
    pub compressed_bytes: u64,
    /// Of its files.
    pub bytes: u64,
}

/// What happens while an image is fetched.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PullEvent {
    Layer(LayerProgress),
    /// The last event: the image is there.
    Done(Box<Image>),
}

/// How far a layer is.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct LayerProgress {
    /// `sha256:…`, as its registry names it.
    pub layer: String,
    /// Which one it is, from 0, the lowest; and of how many.
    pub position: usize,
    pub layers: usize,
    /// What has arrived and was unpacked, and what there is, compressed.
    pub bytes: u64,
    pub total: u64,
    /// `waiting`, `fetching`, `present` (it was there already) or `done`. New ones may come.
    pub state: String,
}

/// What a removal freed.
#[derive(Debug, Clone, Copy, Serialize)]
#[non_exhaustive]
pub struct FreedImages {
    pub images: u64,
    pub layers: u64,
    /// Of files in those layers.
    pub bytes: u64,
}

impl Client {
    /// Fetches an image from its registry to the server. Dropping the stream ends it; what has arrived as a whole is not
    /// fetched again.
    pub async fn pull_image(&self, name: &str) -> Result<PullStream> {
        let request = v1::PullImageRequest { name: name.to_owned() };
        Ok(PullStream { stream: self.own_streams().pull_image(request).await.map_err(Error::of_rpc)? })
    }

    /// Imports images from an archive: an OCI layout in a tar, or what `docker save` writes. `name` is for an image that
    /// has none in there. Where the archive cannot be read, the error is [`io::Error`], and nothing was imported.
    pub async fn import_images(
        &self,
        archive: impl AsyncRead + Send + Unpin + 'static,
        name: &str,
    ) -> io::Result<Result<Vec<Image>>> {
        let (failed, failure) = oneshot::channel();
        let first = v1::ImportImagesRequest { part: Some(Part::Name(name.to_owned())) };
        let rest = futures::stream::unfold((archive, Some(failed)), |(mut archive, mut failed)| async move {
            match piece(&mut archive).await {
                Ok(Some(data)) => Some((v1::ImportImagesRequest { part: Some(Part::Data(data)) }, (archive, failed))),
                Ok(None) => None,
                Err(error) => {
                    // An end would look like the archive's: the call is given up instead.
                    let _ = failed.take()?.send(error);
                    std::future::pending().await
                }
            }
        });
        let requests = futures::stream::once(async move { first }).chain(rest);
        let streams = self.own_streams();
        tokio::select! {
            answer = streams.import_images(requests) => {
                Ok(answer.map_err(Error::of_rpc).map(|answer| answer.images.iter().cloned().map(Image::of_wire).collect()))
            }
            Ok(error) = failure => Err(error),
        }
    }

    /// The images of the server that came from elsewhere.
    pub async fn list_images(&self) -> Result<Vec<Image>> {
        let answer = self.own().list_images(v1::ListImagesRequest::default()).await.map_err(Error::of_rpc)?;
        Ok(answer.images.into_iter().map(Image::of_wire).collect())
    }

    /// By name, alias of the server's, digest, or the first twelve or more digits of one.
    pub async fn get_image(&self, name: &str) -> Result<Image> {
        let request = v1::GetImageRequest { name: name.to_owned() };
        let answer = self.own().get_image(request).await.map_err(Error::of_rpc)?;
        Ok(Image::of_wire(answer.image.into_option().unwrap_or_default()))
    }

    /// Takes a name away, or all names of a digest. An image without names that no session and no snapshot stands on is
    /// removed with that.
    pub async fn remove_image(&self, name: &str) -> Result<FreedImages> {
        let request = v1::RemoveImageRequest { name: name.to_owned() };
        let answer = self.own().remove_image(request).await.map_err(Error::of_rpc)?;
        Ok(FreedImages::of_wire(answer.freed.into_option().unwrap_or_default()))
    }

    /// Removes images without names that no session and no snapshot stands on.
    pub async fn prune_images(&self) -> Result<FreedImages> {
        let answer = self.own().prune_images(v1::PruneImagesRequest::default()).await.map_err(Error::of_rpc)?;
        Ok(FreedImages::of_wire(answer.freed.into_option().unwrap_or_default()))
    }
}

async fn piece(archive: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Bytes>> {
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    while piece.len() < PIECE_BYTES {
        if archive.read_buf(&mut piece).await? == 0 {
            break;
        }
    }
    Ok(Some(piece.freeze()).filter(|piece| !piece.is_empty()))
}

/// An image on its way.
pub struct PullStream {
    stream: ServerStream<Incoming, Whole<v1::PullImageResponse>>,
}

impl fmt::Debug for PullStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullStream").finish_non_exhaustive()
    }
}

impl PullStream {
    /// The next event; `None` after [`PullEvent::Done`].
    pub async fn next(&mut self) -> Result<Option<PullEvent>> {
        while let Some(message) = self.stream.message().await.map_err(Error::of_rpc)? {
            match message.event.clone() {
                Some(pull_image_response::Event::Layer(layer)) => {
                    return Ok(Some(PullEvent::Layer(LayerProgress::of_wire(*layer))));
                }
                Some(pull_image_response::Event::Image(image)) => {
                    return Ok(Some(PullEvent::Done(Box::new(Image::of_wire(*image)))));
                }
                // Of a later server.
                None => {}
            }
        }
        Ok(None)
    }
}

impl Image {
    /// Of its layers' files.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).sum()
    }

    fn of_wire(image: v1::Image) -> Self {
        Self {
            digest: image.digest,
            names: image.names,
            layers: image
                .layers
                .into_iter()
                .map(|layer| ImageLayer {
                    diff_id: layer.diff_id,
                    compressed_bytes: wire::unsigned(layer.compressed_bytes),
                    bytes: wire::unsigned(layer.bytes),
                })
                .collect(),
            added_at: wire::time(image.added_at),
            user: image.user,
            workdir: image.workdir,
            env: image.env,
            entrypoint: image.entrypoint,
            command: image.command,
            labels: image.labels,
            exposed_ports: image.exposed_ports,
        }
    }
}

impl LayerProgress {
    fn of_wire(layer: v1::LayerProgress) -> Self {
        Self {
            layer: layer.layer,
            position: wire::unsigned(layer.position),
            layers: wire::unsigned(layer.layers),
            bytes: wire::unsigned(layer.bytes),
            total: wire::unsigned(layer.total),
            state: layer.state,
        }
    }
}

impl FreedImages {
    fn of_wire(freed: v1::FreedImages) -> Self {
        Self {
            images: wire::unsigned(freed.images),
            layers: wire::unsigned(freed.layers),
            bytes: wire::unsigned(freed.bytes),
        }
    }
}
