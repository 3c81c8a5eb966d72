//! What an operator may set about the place of snapshots.

use std::path::PathBuf;

use nagaya_engine::SettingError;
use nagaya_engine::ports::BlobError;
use object_store::path::Path;
use serde::Deserialize;

use crate::remote::S3Credentials;

/// The variables that an access key and its secret are taken from.
const ACCESS_KEY_ID: &str = "NAGAYA_S3_ACCESS_KEY_ID";
const SECRET_ACCESS_KEY: &str = "NAGAYA_S3_SECRET_ACCESS_KEY";

/// Where snapshots are kept: in `blobs` of the data directory, and behind that where it is told.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Config {
    pub s3: Option<S3Config>,
}

/// A bucket of any store that speaks S3 as the durable place of snapshots; `blobs` of the data directory then holds what this
/// machine has of it. The access key and its secret come from `credentials_file`, else from the environment variables
/// `NAGAYA_S3_ACCESS_KEY_ID` and `NAGAYA_S3_SECRET_ACCESS_KEY`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct S3Config {
    /// The bucket's name.
    pub bucket: String,
    /// Stands before every key. No two servers may share one. Default: none.
    #[serde(default)]
    pub prefix: String,
    /// Where the bucket lies.
    #[serde(default = "default_region")]
    pub region: String,
    /// For stores other than Amazon's, e.g. `https://s3.example.org`. Default: Amazon's of the region.
    pub endpoint: Option<String>,
    /// Lets the endpoint be `http://`: everything can be read on the way then.
    #[serde(default)]
    pub allow_http: bool,
    /// A file with the access key on its first line and the secret on its second. Default: none.
    pub credentials_file: Option<PathBuf>,
}

fn default_region() -> String {
    "us-east-1".into()
}

impl Config {
    /// Refuses what names no bucket, and what would be readable on its way without having been allowed to.
    pub fn validate(&self) -> Result<(), SettingError> {
        self.s3.as_ref().map_or(Ok(()), S3Config::validate)
    }
}

impl S3Config {
    pub(crate) fn validate(&self) -> Result<(), SettingError> {
        if self.bucket.is_empty() {
            return Err(SettingError::new("blobs.s3.bucket", "must not be empty"));
        }
        if !self.allow_http && self.endpoint.as_ref().is_some_and(|endpoint| !endpoint.starts_with("https://")) {
            return Err(SettingError::new("blobs.s3.endpoint", "must be https:// unless blobs.s3.allow_http is set"));
        }
        let refused =
            |error| SettingError::new("blobs.s3.prefix", format!("must be names with a / between two: {error}"));
        self.path().map(drop).map_err(refused)
    }

    /// What stands before every key.
    pub(crate) fn path(&self) -> Result<Path, object_store::path::Error> {
        Path::parse(self.prefix.trim_matches('/'))
    }

    /// The key that opens the bucket.
    pub fn credentials(&self) -> Result<S3Credentials, BlobError> {
        if let Some(file) = &self.credentials_file {
            return S3Credentials::from_file(file);
        }
        let variable = |name| std::env::var(name).unwrap_or_default();
        S3Credentials::new(variable(ACCESS_KEY_ID), variable(SECRET_ACCESS_KEY)).map_err(|error| {
            BlobError::Failed(format!(
                "set blobs.s3.credentials_file, or {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}: {error}"
            ))
        })
    }
}
