//! How people name images: `python:3.12`, `ghcr.io/team/app@sha256:…`, `localhost:5000/app`.
//!
//! The grammar is that of the distribution project, with Docker's short forms for its Hub.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::Digest;
use crate::error::ImageError;

/// The registry of names that say none.
pub const DOCKER_HUB: &str = "docker.io";
/// Bytes of registry and repository together; the limit of the distribution project.
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;
const DEFAULT_TAG: &str = "latest";

/// An image of a registry. Its text is the canonical form, in which nothing is left out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Host, and port where one is named.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// `latest` where neither tag nor digest were named; `None` only where a digest is.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The content that the name is pinned to.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What a registry is asked for: a digest wins over a tag.
    pub(crate) fn version(&self) -> String {
        match (self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.as_deref().unwrap_or(DEFAULT_TAG).to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|problem| ImageError::InvalidReference {
            given: text.chars().take(NAME_BYTES_MAX).collect(),
            problem,
        })
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'a> Deserialize<'a> for Reference {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

fn parse(text: &str) -> Result<Reference, String> {
    let (named, digest) = match text.split_once('@') {
        Some((named, digest)) => (named, Some(digest.parse::<Digest>().map_err(|error| error.to_string())?)),
        None => (text, None),
    };
    // A colon behind the last slash begins a tag; one before it, a port.
    let last = named.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match named[last..].split_once(':') {
        Some((_, tag)) => (&named[..named.len() - tag.len() - 1], Some(tag)),
        None => (named, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((first, rest)) if is_registry(first) => (first, rest),
        _ => (DOCKER_HUB, name),
    };
    let registry = match checked_registry(registry)? {
        alias if matches!(alias.as_str(), "index.docker.io" | "registry-1.docker.io") => DOCKER_HUB.to_owned(),
        other => other,
    };
    let repository = match path {
        short if registry == DOCKER_HUB && !short.contains('/') => format!("library/{short}"),
        whole => whole.to_owned(),
    };
    check_repository(&repository)?;
    if name.len() == 64 && Digest::from_hex(name).is_ok() {
        return Err("64 hexadecimal digits are a digest without its algorithm".into());
    }
    if registry.len() + 1 + repository.len() > NAME_BYTES_MAX {
        return Err(format!("registry and repository have more than {NAME_BYTES_MAX} bytes"));
    }
    let tag = match (tag, digest) {
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { registry, repository, tag, digest })
}

/// Whether the first part of a name is a host, not a directory of Docker Hub. Docker also takes upper-case letters for the sign of one; that would
/// make two hosts of one, or two names of one form.
fn is_registry(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':', '['])
}

fn checked_registry(registry: &str) -> Result<String, String> {
    let no_host = || format!("{registry:?} is no host with or without a port");
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']').ok_or_else(no_host)?;
            address.parse::<Ipv6Addr>().map_err(|_| no_host())?;
            let port = match rest {
                "" => None,
                rest => Some(rest.strip_prefix(':').ok_or_else(no_host)?),
            };
            (format!("[{address}]"), port)
        }
        None => {
            let (host, port) = registry.split_once(':').map_or((registry, None), |(host, port)| (host, Some(port)));
            let label = |label: &str| {
                !label.is_empty()
                    && label.len() <= 63
                    && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                    && !label.starts_with('-')
                    && !label.ends_with('-')
            };
            if !host.split('.').all(label) {
                return Err(no_host());
            }
            (host.to_ascii_lowercase(), port)
        }
    };
    match port {
        None => Ok(host),
        Some(port)
            if port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0) =>
        {
            Ok(format!("{host}:{port}"))
        }
        Some(_) => Err(no_host()),
    }
}

/// Parts of lower-case letters and digits, with `.`, `_`, `__` or any number of `-` between two of them.
fn check_repository(repository: &str) -> Result<(), String> {
    for part in repository.split('/') {
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let mut separator = String::new();
        let mut ended_with_separator = true;
        for byte in part.bytes() {
            if alphanumeric(&byte) {
                let allowed =
                    matches!(separator.as_str(), "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-');
                if !allowed || (ended_with_separator && !separator.is_empty()) {
                    return Err(format!("{part:?} has {separator:?} where it may not be"));
                }
                separator.clear();
                ended_with_separator = false;
            } else if matches!(byte, b'.' | b'_' | b'-') {
                separator.push(char::from(byte));
            } else {
                return Err(format!("{part:?} has more than lower-case letters, digits, '.', '_' and '-'"));
            }
        }
        if ended_with_separator || !separator.is_empty() {
            return Err(format!("{part:?} does not begin and end with a letter or a digit"));
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let first = tag.bytes().next().is_some_and(word);
    match first && tag.len() <= TAG_BYTES_MAX && tag.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-')) {
        true => Ok(()),
        false => Err(format!(
            "{tag:?} is no tag: up to {TAG_BYTES_MAX} letters, digits, '_', '.' and '-', not beginning with '.' or '-'"
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIN: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_and_long_names_have_one_canonical_form() {
        let pinned = format!("docker.io/library/python:3.12@{PIN}");
        for (given, canonical) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("docker.io/python", "docker.io/library/python:latest"),
            ("index.docker.io/library/python:3", "docker.io/library/python:3"),
            ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:1", "localhost:5000/app:1"),
            ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("Index.Docker.IO/python", "docker.io/library/python:latest"),
            ("Registry.Example/a__b/c---d.e_f", "registry.example/a__b/c---d.e_f:latest"),
            (&format!("python:3.12@{PIN}"), &pinned),
            (&format!("python@{PIN}"), &format!("docker.io/library/python@{PIN}")),
        ] {
            let reference: Reference = given.parse().unwrap_or_else(|error| panic!("{given}: {error}"));
            assert_eq!(reference.to_string(), canonical, "{given}");
            assert_eq!(canonical.parse::<Reference>().unwrap(), reference, "{given}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(250);
        let tag = format!("a:{}", "t".repeat(129));
        for refused in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "A",
            "Host/a",
            "python:",
            "python:-x",
            "python: x",
            "python@",
            "python@sha256:00",
            "a b",
            "ä",
            "a..b/c",
            "a/-b",
            "a/b-",
            "a/b._c",
            "a/___b/c",
            "a/b___c",
            "host:0/a",
            "host:65536/a",
            "host:/a",
            "host:+1/a",
            "-host.x/a",
            "[::1/a",
            "[x]:1/a",
            "[::1]x/a",
            "../a",
            "a/../b",
            "http://x.y/a",
            "user@host.x/a",
            "a\0",
            "a:b:c",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            &long,
            &tag,
        ] {
            let error = refused.parse::<Reference>().expect_err(refused);
            assert_eq!(error.kind(), "invalid_reference", "{refused}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_read_again_as_the_same(text in "[a-zA-Z0-9.:/@_\\-\\[\\]]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
