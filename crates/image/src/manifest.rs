//! Manifests and indexes, of OCI and of Docker's schema 2: what an image is made of.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::ImageError;

/// The largest manifest, index or configuration that is read, in bytes.
pub const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// More layers than any image has: what overlayfs and other engines can stack.
pub const LAYERS_MAX: usize = 127;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub(crate) const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1";

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(layer: &Descriptor) -> Result<Self, ImageError> {
        let unsupported = |problem: &str| ImageError::Unsupported {
            what: format!("the layer {}", layer.digest),
            kind: layer.media_type.clone(),
            problem: problem.into(),
        };
        match layer.media_type.as_str() {
            PLAIN_LAYER | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Self::None),
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
                Ok(Self::Gzip)
            }
            "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
                Ok(Self::Zstd)
            }
            foreign if foreign.contains("foreign") || foreign.contains("nondistributable") => {
                Err(unsupported("its layers lie outside of registries, as those of Windows do"))
            }
            _ => Err(unsupported("layers are tar archives, plain or compressed with gzip or zstd")),
        }
    }
}

/// Where content is, and how to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// What machines an image is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_deref() {
            None | Some("") => Ok(()),
            Some(variant) => write!(f, "/{variant}"),
        }
    }
}

impl Platform {
    /// Linux on this processor.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: None }
    }

    /// How well an image for `offered` runs here: less is better, `None` not at all. Variants are levels of a processor; only those
    /// that every processor of the architecture has are taken.
    fn rank(&self, offered: &Self) -> Option<u8> {
        if (&offered.os, &offered.architecture) != (&self.os, &self.architecture) {
            return None;
        }
        match (self.architecture.as_str(), offered.variant.as_deref().unwrap_or_default()) {
            ("arm64", "v8") | (_, "") => Some(0),
            ("amd64", "v1") => Some(1),
            ("amd64", "v2") => Some(2),
            _ => None,
        }
    }

    /// Whether an image whose configuration says that it is for `offered` runs here.
    pub(crate) fn runs(&self, offered: &Self) -> bool {
        self.rank(offered).is_some()
    }
}

/// A manifest of one image: its configuration and its layers, the lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<(Descriptor, Compression)>,
}

/// A list of images for several platforms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    pub manifests: Vec<Descriptor>,
}

/// What a name of a registry stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    Manifest(Manifest),
    Index(Index),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    fs_layers: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a manifest or an index. `media_type` is what it was announced as, empty where nobody said; it must agree with what it says
    /// of itself, so that no two readers take it for two things.
    pub fn parse(bytes: &[u8], media_type: &str, what: &str) -> Result<Self, ImageError> {
        let invalid = |problem: String| ImageError::invalid_image(what, problem);
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(invalid(format!("it has more than {DOCUMENT_BYTES_MAX} bytes")));
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        let announced = media_type.split(';').next().unwrap_or_default().trim();
        let own = raw.media_type.as_deref().unwrap_or_default();
        if announced.starts_with(DOCKER_SCHEMA_1) || own.starts_with(DOCKER_SCHEMA_1) || raw.fs_layers.is_some() {
            return Err(ImageError::Unsupported {
                what: what.into(),
                kind: DOCKER_SCHEMA_1.into(),
                problem: "the form of 2014 has no digests of its layers' contents; push the image anew".into(),
            });
        }
        if raw.schema_version != 2 {
            return Err(invalid(format!("its schemaVersion is {}, not 2", raw.schema_version)));
        }
        let known = |text: &str| match text {
            OCI_INDEX | DOCKER_INDEX => Some("index"),
            OCI_MANIFEST | DOCKER_MANIFEST => Some("manifest"),
            _ => None,
        };
        // Registries that know no better announce everything as JSON.
        let vague = matches!(announced, "" | "application/json" | "application/octet-stream" | "text/plain");
        for text in [if vague { "" } else { announced }, own] {
            if !text.is_empty() && known(text).is_none() {
                return Err(ImageError::Unsupported {
                    what: what.into(),
                    kind: text.into(),
                    problem: "images are OCI or Docker schema 2 manifests, or indexes of them".into(),
                });
            }
        }
        let form = match (raw.config, raw.layers, raw.manifests) {
            (Some(config), Some(layers), None) => Self::Manifest(manifest(config, layers, what)?),
            (None, None, Some(manifests)) => Self::Index(Index { manifests }),
            _ => return Err(invalid("it must have either config and layers, or manifests".into())),
        };
        let found = match form {
            Self::Manifest(_) => "manifest",
            Self::Index(_) => "index",
        };
        match [announced, own].iter().filter_map(|text| known(text)).find(|said| *said != found) {
            Some(said) => Err(invalid(format!("it says that it is a {said}, and has the parts of a {found}"))),
            None => Ok(form),
        }
    }
}

fn manifest(config: Descriptor, layers: Vec<Descriptor>, what: &str) -> Result<Manifest, ImageError> {
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG | "") {
        return Err(ImageError::Unsupported {
            what: format!("the configuration of {what}"),
            kind: config.media_type,
            problem: "it is no image that runs, but something else that registries keep".into(),
        });
    }
    if config.size > DOCUMENT_BYTES_MAX {
        return Err(ImageError::invalid_image(
            what,
            format!("its configuration has more than {DOCUMENT_BYTES_MAX} bytes"),
        ));
    }
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        return Err(ImageError::invalid_image(what, format!("it has {} layers, not 1 to {LAYERS_MAX}", layers.len())));
    }
    let layers: Result<_, _> = layers.into_iter().map(|layer| Ok((layer.clone(), Compression::of(&layer)?))).collect();
    Ok(Manifest { config, layers: layers? })
}

impl Manifest {
    /// The one form in which this crate writes a manifest.
    pub(crate) fn to_bytes(config: &Descriptor, layers: &[Descriptor]) -> Vec<u8> {
        let written =
            serde_json::json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
        written.to_string().into_bytes()
    }
}

impl Index {
    /// The manifest, or the index within, for a platform.
    pub fn choose(&self, platform: &Platform, what: &str) -> Result<&Descriptor, ImageError> {
        let offered =
            |descriptor: &&Descriptor| descriptor.platform.as_ref().map_or(Some(9), |offered| platform.rank(offered));
        let best = self.manifests.iter().filter_map(|descriptor| Some((offered(&descriptor)?, descriptor)));
        if let Some((rank, descriptor)) = best.min_by_key(|(rank, _)| *rank) {
            // Layouts on disk often say no platform; several of that kind are several images.
            let ambiguous = self.manifests.iter().filter(|descriptor| offered(descriptor) == Some(rank)).count() > 1;
            if rank == 9 && ambiguous {
                let problem = "it has several images and does not say which platforms they are for";
                return Err(ImageError::invalid_image(what, problem));
            }
            return Ok(descriptor);
        }
        let mut available: Vec<_> = self
            .manifests
            .iter()
            .filter_map(|descriptor| descriptor.platform.as_ref())
            .filter(|offered| offered.os != "unknown")
            .map(Platform::to_string)
            .collect();
        available.sort();
        available.dedup();
        let more = available.len().saturating_sub(20);
        available.truncate(20);
        let mut available = if available.is_empty() { "none".to_owned() } else { available.join(", ") };
        if more > 0 {
            available += &format!(" and {more} more");
        }
        Err(ImageError::NoPlatform { image: what.into(), wanted: platform.to_string(), available })
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
