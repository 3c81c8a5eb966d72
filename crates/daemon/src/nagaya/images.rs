//! Images that came from elsewhere.

use std::io::{self, Read};
use std::pin::Pin;

use bytes::{Buf, Bytes};
use connectrpc::{ConnectError, RequestContext, Response, ServiceResult, ServiceStream};
use futures::{StreamExt, stream};
use nagaya_api::error::{Code, Error};
use nagaya_api::nagaya::v1 as own;
use nagaya_api::nagaya::v1::import_images_request::Part;
use nagaya_api::nagaya::v1::pull_image_response::Event;
use nagaya_engine::ports::{FreedImages, Image, ImageLayer, PullProgress};
use tokio::sync::mpsc;

use super::service::Nagaya;
use crate::rpc::convert;
use crate::rpc::service::caller;

/// Pieces of an archive that wait to be read.
const PIECES_MAX: usize = 16;

impl Nagaya {
    pub(super) async fn pull_image(
        &self,
        context: &RequestContext,
        request: own::PullImageRequest,
    ) -> ServiceResult<ServiceStream<own::PullImageResponse>> {
        caller(context)?;
        let engine = self.engine.clone();
        let (sender, progress) = mpsc::unbounded_channel();
        let watcher = std::sync::Arc::new(move |of_layer| drop(sender.send(of_layer)));
        let pulling = async move { engine.pull_image(&request.name, watcher).await };
        // One message at a time is made of what was told meanwhile, so that a slow reader does not make them pile up.
        let state = Some((Box::pin(pulling) as Pin<Box<dyn Future<Output = Result<Image, Error>> + Send>>, progress));
        Response::stream_ok(stream::unfold(state, |state| async move {
            let (mut pulling, mut progress) = state?;
            tokio::select! {
                biased;
                Some(of_layer) = progress.recv() => {
                    let newest = latest(of_layer, &mut progress);
                    Some((newest.into_iter().map(told).collect::<Vec<_>>(), Some((pulling, progress))))
                }
                pulled = &mut pulling => {
                    let mut last = Vec::new();
                    while let Ok(of_layer) = progress.try_recv() {
                        last.push(told(of_layer));
                    }
                    last.push(pulled.map(|of| own::PullImageResponse { event: Some(Event::Image(Box::new(image(of)))) })
                        .map_err(ConnectError::from));
                    Some((last, None))
                }
            }
        }).flat_map(stream::iter))
    }

    pub(super) async fn import_images(
        &self,
        context: &RequestContext,
        mut requests: ServiceStream<own::ImportImagesRequest>,
    ) -> Result<own::ImportImagesResponse, ConnectError> {
        caller(context)?;
        let protocol = |problem: &str| Error::new(Code::StreamProtocol, problem);
        let first = requests.next().await.transpose()?.and_then(|first| first.part);
        let Some(Part::Name(name)) = first else { return Err(protocol("the first message has no name").into()) };
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let reader = Pieces { pieces: receiver, piece: Bytes::new(), whole: false };
        let name = Some(name).filter(|name| !name.is_empty());
        let importing = self.engine.import_images(Box::new(reader), name.as_deref());
        let sending = async move {
            while let Some(message) = requests.next().await.transpose()? {
                let Some(Part::Data(data)) = message.part else { return Err(protocol("a second name").into()) };
                // Whoever reads has ended, and says why.
                if pieces.send(Some(data)).await.is_err() {
                    return Ok(());
                }
            }
            let _ = pieces.send(None).await;
            Ok::<_, ConnectError>(())
        };
        let (sent, imported) = tokio::join!(sending, importing);
        sent?;
        Ok(own::ImportImagesResponse { images: imported?.into_iter().map(image).collect() })
    }

    pub(super) async fn list_images(
        &self,
        context: &RequestContext,
        _request: own::ListImagesRequest,
    ) -> Result<own::ListImagesResponse, Error> {
        caller(context)?;
        Ok(own::ListImagesResponse { images: self.engine.images().await?.into_iter().map(image).collect() })
    }

    pub(super) async fn get_image(
        &self,
        context: &RequestContext,
        request: own::GetImageRequest,
    ) -> Result<own::GetImageResponse, Error> {
        caller(context)?;
        Ok(own::GetImageResponse { image: image(self.engine.image(&request.name).await?).into() })
    }

    pub(super) async fn remove_image(
        &self,
        context: &RequestContext,
        request: own::RemoveImageRequest,
    ) -> Result<own::RemoveImageResponse, Error> {
        caller(context)?;
        Ok(own::RemoveImageResponse { freed: freed(self.engine.remove_image(&request.name).await?).into() })
    }

    pub(super) async fn prune_images(
        &self,
        context: &RequestContext,
        _request: own::PruneImagesRequest,
    ) -> Result<own::PruneImagesResponse, Error> {
        caller(context)?;
        Ok(own::PruneImagesResponse { freed: freed(self.engine.prune_images().await?).into() })
    }
}

/// The last that was told of each layer until now.
fn latest(first: PullProgress, progress: &mut mpsc::UnboundedReceiver<PullProgress>) -> Vec<PullProgress> {
    let mut latest = vec![first];
    while let Ok(next) = progress.try_recv() {
        match latest.iter_mut().find(|known| known.position == next.position) {
            Some(known) => *known = next,
            None => latest.push(next),
        }
    }
    latest
}

fn told(progress: PullProgress) -> Result<own::PullImageResponse, ConnectError> {
    let layer = own::LayerProgress {
        layer: progress.layer,
        position: number(progress.position),
        layers: number(progress.layers),
        bytes: convert::saturating(progress.bytes),
        total: convert::saturating(progress.total),
        state: progress.state.name().to_owned(),
    };
    Ok(own::PullImageResponse { event: Some(Event::Layer(Box::new(layer))) })
}

fn image(image: Image) -> own::Image {
    own::Image {
        digest: image.digest.to_string(),
        names: image.names,
        layers: image.layers.into_iter().map(layer).collect(),
        added_at: convert::timestamp(image.added_at).into(),
        user: image.user,
        workdir: image.workdir,
        env: image.env,
        entrypoint: image.entrypoint,
        command: image.command,
        labels: image.labels,
        exposed_ports: image.exposed_ports,
    }
}

fn layer(layer: ImageLayer) -> own::ImageLayer {
    own::ImageLayer {
        diff_id: layer.diff_id,
        compressed_bytes: convert::saturating(layer.compressed_bytes),
        bytes: convert::saturating(layer.bytes),
    }
}

fn freed(freed: FreedImages) -> own::FreedImages {
    own::FreedImages {
        images: number(freed.images),
        layers: number(freed.layers),
        bytes: convert::saturating(freed.bytes),
    }
}

fn number(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// An archive that arrives in pieces, for whoever reads it without a runtime.
struct Pieces {
    pieces: mpsc::Receiver<Option<Bytes>>,
    piece: Bytes,
    /// Its end was announced; anything else that ends it is a break.
    whole: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.whole {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => self.piece = piece,
                Some(None) => self.whole = true,
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ended in the middle")),
            }
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
