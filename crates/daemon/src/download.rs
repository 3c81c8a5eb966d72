//! `GET /v1/snapshots/ID/disk?token=TOKEN`: the disk of a snapshot as one raw ext4 image.
//!
//! The URL is handed out by GetSnapshotDownloadURL and is all that is needed to fetch the disk, so
//! it is good for a short time only, and for this process: after a restart a new one is asked for.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{KeyId, SnapshotId, WorkspaceId};
use nagaya_engine::model::UnixMs;
use nagaya_engine::ports::{Clock, Entropy, ImageReader};
use nagaya_engine::{Caller, Engine};
use tokio::sync::Semaphore;

use crate::host::{HostClock, HostEntropy};
use crate::wire::body::{Disk, ResponseBody};
use crate::wire::lifecycle::Lifecycle;
use crate::wire::limits::Limits;

/// Expiry, key and workspace of the caller, in front of the seal.
const CLAIM_BYTES: usize = 8 + 16 + 16;
const SEAL_BYTES: usize = 32;

/// Hands out URLs and answers them.
pub(crate) struct Downloads {
    engine: Engine,
    lifecycle: Arc<Lifecycle>,
    sealing_key: [u8; 32],
    url_ttl: Duration,
    places: Arc<Semaphore>,
}

impl Downloads {
    pub(crate) fn new(engine: Engine, lifecycle: Arc<Lifecycle>, limits: &Limits) -> Self {
        let mut sealing_key = [0; 32];
        HostEntropy.fill(&mut sealing_key);
        Self {
            engine,
            lifecycle,
            sealing_key,
            url_ttl: Duration::from_millis(limits.download_url_ttl_ms),
            places: Arc::new(Semaphore::new(limits.downloads_max)),
        }
    }

    /// A token that lets its holder read this snapshot's disk as the caller may, and until when.
    pub(crate) fn token(&self, caller: &Caller, id: SnapshotId) -> (String, UnixMs) {
        let ttl_ms = u64::try_from(self.url_ttl.as_millis()).unwrap_or(u64::MAX);
        let expires_at = HostClock.now().saturating_add(ttl_ms);
        let mut token = Vec::with_capacity(CLAIM_BYTES + SEAL_BYTES);
        token.extend_from_slice(&expires_at.to_be_bytes());
        token.extend_from_slice(caller.key_id.as_uuid().as_bytes());
        token.extend_from_slice(caller.workspace_id.as_uuid().as_bytes());
        let seal = self.seal(&token, id);
        token.extend_from_slice(seal.as_bytes());
        (URL_SAFE_NO_PAD.encode(token), expires_at)
    }

    fn seal(&self, claim: &[u8], id: SnapshotId) -> blake3::Hash {
        blake3::keyed_hash(&self.sealing_key, &[claim, id.as_uuid().as_bytes()].concat())
    }

    /// Who may read the snapshot's disk with this token.
    fn holder(&self, token: &str, id: SnapshotId) -> Result<Caller, Error> {
        let refused = || {
            let detail = "the token of the download URL is not good, or not any more; ask GetSnapshotDownloadURL again";
            Error::new(Code::Unauthenticated, detail)
        };
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| refused())?;
        let (claim, seal) = bytes.split_at_checked(CLAIM_BYTES).ok_or_else(refused)?;
        let seal = <[u8; SEAL_BYTES]>::try_from(seal).map_err(|_| refused())?;
        // This comparison takes the same time whatever differs.
        if self.seal(claim, id) != blake3::Hash::from_bytes(seal) {
            return Err(refused());
        }
        let (expires_at, ids) = claim.split_at(8);
        let expires_at = UnixMs::from_be_bytes(expires_at.try_into().map_err(|_| refused())?);
        if HostClock.now() >= expires_at {
            return Err(refused());
        }
        let id = |bytes| uuid::Uuid::from_slice(bytes).map_err(|_| refused());
        Ok(Caller { key_id: KeyId::from_uuid(id(&ids[..16])?), workspace_id: WorkspaceId::from_uuid(id(&ids[16..])?) })
    }

    /// The snapshot that a path names, where it is a path of ours.
    pub(crate) fn snapshot_of(path: &str) -> Option<&str> {
        path.strip_prefix("/v1/snapshots/")?.strip_suffix("/disk").filter(|id| !id.contains('/'))
    }

    pub(crate) async fn answer(&self, method: &Method, uri: &Uri) -> Result<Response<ResponseBody>, Error> {
        let id = Self::snapshot_of(uri.path()).unwrap_or_default();
        let id: SnapshotId = id.parse().map_err(|_| Error::new(Code::InvalidId, "snapshot"))?;
        let pairs = uri.query().unwrap_or_default().split('&');
        let token = pairs.filter_map(|pair| pair.strip_prefix("token=")).next().unwrap_or_default();
        let caller = self.holder(token, id)?;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| Error::new(Code::RateLimited, "downloads_max are under way"))?;
        let mut reader = self.engine.open_snapshot(&caller, id).await?;
        let length = reader.total_size;
        let body = match *method == Method::HEAD {
            true => ResponseBody::empty_of(length),
            false => {
                // Most of what can be wrong shows at the beginning, when it can still be told.
                let first = first_part(&mut reader).await?;
                ResponseBody::disk(Disk::new(first, reader, place), self.lifecycle.enter())
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::OK;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
        let name = format!("attachment; filename=\"{id}.ext4\"");
        if let Ok(name) = HeaderValue::from_str(&name) {
            headers.insert(header::CONTENT_DISPOSITION, name);
        }
        Ok(response)
    }
}

async fn first_part(reader: &mut ImageReader) -> Result<bytes::Bytes, Error> {
    match reader.chunks.recv().await {
        Some(Ok(part)) => Ok(part),
        None if reader.total_size == 0 => Ok(bytes::Bytes::new()),
        Some(Err(error)) => {
            tracing::error!(%error, "a snapshot's disk cannot be read");
            Err(Error::new(Code::Internal, error.to_string()))
        }
        None => Err(Error::new(Code::Internal, "the snapshot's disk ended before it began")),
    }
}
