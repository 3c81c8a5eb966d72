//! Blobs in an S3 bucket: the durable place behind the directory. Keys are `<prefix>/<kind>/<digest>`.

use std::collections::HashSet;
use std::fmt;
use std::path::Path as FilePath;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use nagaya_engine::ports::BlobError;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use tokio::sync::OnceCell;

use crate::config::S3Config;
use crate::digest::Digest;
use crate::directory::Kind;

/// A blob is 4 MiB at most; a slower line than this needs cannot keep up with snapshots anyway.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Short, because the engine tries a failed upload again with patience of its own.
const RETRIES_MAX: usize = 3;
const REMOVALS_AT_ONCE: usize = 8;
/// Names the server that a prefix belongs to.
const OWNER_KEY: &str = "owner";

/// An access key with its secret, which is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Credentials {
    access_key_id: String,
    secret_access_key: String,
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("S3Credentials(hidden)")
    }
}

impl S3Credentials {
    pub fn new(access_key_id: String, secret_access_key: String) -> Result<Self, BlobError> {
        let fits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !fits(&access_key_id) || !fits(&secret_access_key) {
            return Err(BlobError::Failed(
                "the S3 access key and its secret must be given, without spaces or line breaks in them".into(),
            ));
        }
        Ok(Self { access_key_id, secret_access_key })
    }

    /// From a file with the access key on its first line and the secret on its second.
    pub fn from_file(path: &FilePath) -> Result<Self, BlobError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| BlobError::Failed(format!("read the S3 credentials in {}: {error}", path.display())))?;
        let mut lines = text.lines().map(str::trim);
        let (first, second) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        Self::new(first.to_owned(), second.to_owned())
    }
}

/// The bucket, as one server sees it.
#[derive(Debug)]
pub(crate) struct Remote {
    bucket: AmazonS3,
    prefix: Path,
    /// For error texts.
    place: String,
    /// Who this server is.
    owner: String,
    /// The prefix is known to be this server's.
    claimed: OnceCell<()>,
}

impl Remote {
    /// Nothing is sent yet: a server starts while its bucket cannot be reached.
    pub fn new(config: &S3Config, credentials: &S3Credentials, owner: String) -> Result<Self, BlobError> {
        let unusable = |reason: String| BlobError::Failed(format!("the S3 configuration cannot be used: {reason}"));
        config.validate().map_err(|error| unusable(error.to_string()))?;
        let prefix = config.path().map_err(|error| unusable(error.to_string()))?;
        let options = ClientOptions::new()
            .with_allow_http(config.allow_http)
            .with_timeout(REQUEST_TIMEOUT)
            .with_connect_timeout(CONNECT_TIMEOUT);
        let retries =
            RetryConfig { max_retries: RETRIES_MAX, retry_timeout: REQUEST_TIMEOUT, backoff: BackoffConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&config.bucket)
            .with_region(&config.region)
            .with_access_key_id(&credentials.access_key_id)
            .with_secret_access_key(&credentials.secret_access_key)
            // Not every store that speaks S3 can remove many keys in one request.
            .with_disable_bulk_delete(true)
            .with_client_options(options)
            .with_retry(retries);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let bucket = builder.build().map_err(|error| unusable(error.to_string()))?;
        let place = match &config.endpoint {
            Some(endpoint) => format!("bucket {} at {endpoint}", config.bucket),
            None => format!("bucket {} in {}", config.bucket, config.region),
        };
        Ok(Self { bucket, prefix, place, owner, claimed: OnceCell::new() })
    }

    /// Makes sure that no other server uses this prefix: each would remove the other's blobs.
    pub async fn claim(&self) -> Result<(), BlobError> {
        self.claimed.get_or_try_init(|| self.claim_once()).await.map(|_| ())
    }

    async fn claim_once(&self) -> Result<(), BlobError> {
        let key = self.prefix.clone().join(OWNER_KEY);
        match self.get_key(&key, self.owner.len() as u64).await? {
            Some(owner) if owner == self.owner.as_bytes() => Ok(()),
            Some(_) => Err(BlobError::Failed(format!(
                "the prefix {:?} of {} belongs to another server's data; choose another prefix, or remove the key {key} \
                 if that server is gone for good",
                self.prefix.as_ref(),
                self.place
            ))),
            None => self.put_key(&key, Bytes::from(self.owner.clone())).await,
        }
    }

    /// Whether a blob of this length is there.
    pub async fn has(&self, kind: Kind, digest: Digest, length: u64) -> Result<bool, BlobError> {
        match self.bucket.head(&self.key(kind, digest)).await {
            Ok(found) => Ok(found.size == length),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed("look up a blob", &error)),
        }
    }

    pub async fn put(&self, kind: Kind, digest: Digest, bytes: Bytes) -> Result<(), BlobError> {
        self.put_key(&self.key(kind, digest), bytes).await
    }

    /// The verified blob.
    pub async fn get(&self, kind: Kind, digest: Digest) -> Result<Bytes, BlobError> {
        match self.get_key(&self.key(kind, digest), kind.bytes_max()).await? {
            None => Err(BlobError::Missing(digest.to_string())),
            Some(bytes) if Digest::of(&bytes) == digest => Ok(bytes),
            Some(_) => Err(BlobError::Corrupt(digest.to_string())),
        }
    }

    /// Removes all blobs of a kind but these.
    pub async fn remove_others(&self, kind: Kind, kept: &HashSet<Digest>) -> Result<(), BlobError> {
        let directory = self.prefix.clone().join(kind.name());
        let mut listed = self.bucket.list(Some(&directory));
        let mut removals = Vec::new();
        while let Some(found) = listed.try_next().await.map_err(|error| self.failed("list the blobs", &error))? {
            let digest = found.location.filename().and_then(|name| name.parse::<Digest>().ok());
            if digest.is_some_and(|digest| !kept.contains(&digest)) {
                removals.push(self.remove(found.location));
            }
        }
        futures::stream::iter(removals).buffer_unordered(REMOVALS_AT_ONCE).try_collect().await
    }

    async fn remove(&self, key: Path) -> Result<(), BlobError> {
        match self.bucket.delete(&key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("remove a blob", &error)),
        }
    }

    fn key(&self, kind: Kind, digest: Digest) -> Path {
        self.prefix.clone().join(kind.name()).join(digest.to_string())
    }

    async fn put_key(&self, key: &Path, bytes: Bytes) -> Result<(), BlobError> {
        let written = self.bucket.put(key, bytes.into()).await;
        written.map(|_| ()).map_err(|error| self.failed("write a blob", &error))
    }

    /// `None` when it is not there; what is longer than `bytes_max` is cut off.
    async fn get_key(&self, key: &Path, bytes_max: u64) -> Result<Option<Bytes>, BlobError> {
        let failed = |error| self.failed("read a blob", &error);
        let found = match self.bucket.get(key).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::with_capacity(found.meta.size.min(bytes_max) as usize);
        let mut stream = found.into_stream();
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece.map_err(failed)?);
            if bytes.len() as u64 > bytes_max {
                break;
            }
        }
        Ok(Some(bytes.into()))
    }

    fn failed(&self, action: &str, error: &object_store::Error) -> BlobError {
        BlobError::Failed(format!("{action} in the {}: {error}", self.place))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(endpoint: &str, allow_http: bool, prefix: &str) -> S3Config {
        S3Config {
            bucket: "b".into(),
            prefix: prefix.into(),
            region: "eu-west-1".into(),
            endpoint: Some(endpoint.into()),
            allow_http,
            credentials_file: None,
        }
    }

    #[test]
    fn a_configuration_says_what_is_wrong_with_it_and_never_tells_the_secret() {
        let credentials = S3Credentials::new("an-id".into(), "a-secret".into()).unwrap();
        let open = |config: &S3Config| Remote::new(config, &credentials, String::new());
        let refused = open(&config("http://127.0.0.1:9", false, "")).unwrap_err();
        assert!(refused.to_string().contains("allow_http"), "{refused}");
        let refused = open(&config("http://127.0.0.1:9", true, "a//b")).unwrap_err();
        assert!(refused.to_string().contains("blobs.s3.prefix"), "{refused}");
        let config = config("http://127.0.0.1:9", true, "a/b");
        let remote = open(&config).unwrap();
        for text in [format!("{config:?}"), format!("{credentials:?}"), format!("{}", remote.bucket)] {
            assert!(!text.contains("a-secret") && !text.contains("an-id"), "{text}");
        }
    }

    #[test]
    fn credentials_come_from_two_lines_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "an-id\r\na-secret\n").unwrap();
        let expected = S3Credentials::new("an-id".into(), "a-secret".into()).unwrap();
        assert_eq!(S3Credentials::from_file(&path).unwrap(), expected);
        for bad in ["", "an-id\n", "an id\na-secret\n"] {
            std::fs::write(&path, bad).unwrap();
            let refused = S3Credentials::from_file(&path).unwrap_err().to_string();
            assert!(!refused.contains("a-secret"), "{refused}");
        }
        S3Credentials::from_file(&directory.path().join("none")).unwrap_err();
    }
}
