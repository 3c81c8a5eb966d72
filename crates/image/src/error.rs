//! What can go wrong with an image: what happened, why, and what to do.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::digest::Digest;
use crate::reference::Reference;

/// Every error of this crate. [`ImageError::kind`] is stable; texts are for people.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A text that names no image.
    #[error(
        "{given:?} is no name of an image: {problem}; names look like python:3.12 or registry.example:5000/team/app:1"
    )]
    InvalidReference { given: String, problem: String },
    /// A registry that the operator did not allow.
    #[error("images of {registry} may not be used here; the setting images.registries_allowed names those that may")]
    RegistryNotAllowed { registry: String },
    /// Nothing may be pulled, and the image is not here.
    #[error("{reference} is not on this host, and the setting images.pull is never; pull or import it first")]
    PullForbidden { reference: Reference },
    /// No image of this host has that name or digest.
    #[error("there is no image {name:?} on this host; pull or import it first")]
    UnknownImage { name: String },
    /// The registry answered that it has no such image, or hides it.
    #[error("{registry} has no {what}, or does not show it to this account; check the name, the tag and the login")]
    NotAtRegistry { registry: String, what: String },
    /// The registry wants to know who asks, or knows and refuses.
    #[error("{registry} refused access to {what}: {problem}; log in with docker login {registry} on this host")]
    Unauthorized { registry: String, what: String, problem: String },
    /// Credentials that are configured cannot be used.
    #[error("the credentials for {registry} cannot be used: {problem}")]
    Credentials { registry: String, problem: String },
    /// No answer, or none that ended, after all attempts.
    #[error("{host} did not deliver {what} ({problem}) in {attempts} attempts; try again later")]
    Unreachable { host: String, what: String, problem: String, attempts: u32 },
    /// The registry counts requests, and there were too many.
    #[error("{registry} answers that there were too many requests; log in, or try again {when}")]
    RateLimited { registry: String, when: String },
    /// An answer that no registry gives.
    #[error("{host} gave an answer that no registry gives: {problem}")]
    InvalidAnswer { host: String, problem: String },
    /// A name from outside that leads to an address inside.
    #[error(
        "{host} has the inner address {address}, which is not connected to; if that is meant, name {host} in the setting images.private_hosts"
    )]
    RefusedAddress { host: String, address: String },
    /// A redirect that would give away more than was asked for.
    #[error("{host} sent us on to {target:?}, which was refused: {problem}")]
    RefusedRedirect { host: String, target: String, problem: String },
    /// A form that this crate does not read.
    #[error("{what} is of the kind {kind:?}, which cannot be used here: {problem}")]
    Unsupported { what: String, kind: String, problem: String },
    /// An index without an image for this machine.
    #[error("{image} has nothing for {wanted}; it has {available}")]
    NoPlatform { image: String, wanted: String, available: String },
    /// A manifest, configuration or archive that makes no sense.
    #[error("{what} is no valid image: {problem}")]
    InvalidImage { what: String, problem: String },
    /// A layer that is broken, or tries something.
    #[error("the layer {layer} was refused at {entry}: {problem}")]
    InvalidLayer { layer: Digest, entry: String, problem: String },
    /// More than the operator allows.
    #[error("{what} is beyond the limit of {limit}; the setting {setting} raises it")]
    TooLarge { what: String, limit: String, setting: &'static str },
    /// Content that is not what its digest says.
    #[error(
        "{what} arrived with the digest {found}, not {expected}; it was not kept: it was damaged on its way, or forged"
    )]
    DigestMismatch { what: String, expected: Digest, found: Digest },
    /// The file system of the images is full.
    #[error("the file system of the images is full; remove images that are not needed, or give it more space")]
    NoSpace,
    /// Another server uses the directory.
    #[error("the images in {directory} are used by another server")]
    Locked { directory: PathBuf },
    /// The host refused a step.
    #[error("failed to {doing}")]
    Io { doing: String, source: io::Error },
}

impl ImageError {
    /// A word for each kind, the same in all versions.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::InvalidReference { .. } => "invalid_reference",
            Self::RegistryNotAllowed { .. } => "registry_not_allowed",
            Self::PullForbidden { .. } => "pull_forbidden",
            Self::UnknownImage { .. } => "unknown_image",
            Self::NotAtRegistry { .. } => "not_at_registry",
            Self::Unauthorized { .. } => "unauthorized",
            Self::Credentials { .. } => "credentials",
            Self::Unreachable { .. } => "unreachable",
            Self::RateLimited { .. } => "rate_limited",
            Self::InvalidAnswer { .. } => "invalid_answer",
            Self::RefusedAddress { .. } => "refused_address",
            Self::RefusedRedirect { .. } => "refused_redirect",
            Self::Unsupported { .. } => "unsupported",
            Self::NoPlatform { .. } => "no_platform",
            Self::InvalidImage { .. } => "invalid_image",
            Self::InvalidLayer { .. } => "invalid_layer",
            Self::TooLarge { .. } => "too_large",
            Self::DigestMismatch { .. } => "digest_mismatch",
            Self::NoSpace => "no_space",
            Self::Locked { .. } => "locked",
            Self::Io { .. } => "io",
        }
    }

    /// For `map_err`: the step that the host refused, after "failed to".
    pub(crate) fn io<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        move |error| {
            let source = error.into();
            match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOSPC | Errno::DQUOT) => Self::NoSpace,
                _ => Self::Io { doing, source },
            }
        }
    }

    pub(crate) fn invalid_image(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::InvalidImage { what: what.into(), problem: problem.into() }
    }
}
