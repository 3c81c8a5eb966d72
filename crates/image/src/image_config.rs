//! The configuration of an image: what it was made to run, and the digests of its layers' contents.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{DOCUMENT_BYTES_MAX, Platform};

/// What an image says about how it is run. All of it is the image's word: to be used inside of a sandbox only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// Names and values, in the image's order; what is no such pair is left out.
    pub env: Vec<(String, String)>,
    /// As the image says it, for [`crate::resolve_user`]; empty is root.
    pub user: String,
    /// Absolute.
    pub working_directory: String,
    pub labels: BTreeMap<String, String>,
    /// Such as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Such as `SIGTERM`; empty where it says none.
    pub stop_signal: String,
    /// When it was made, as the image says it, in RFC 3339.
    pub created: Option<String>,
    pub platform: Option<Platform>,
    /// Digests of the layers' uncompressed archives, the lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    config: Option<RawRun>,
    rootfs: RawRoot,
}

#[derive(Deserialize)]
struct RawRoot {
    #[serde(rename = "type")]
    kind: String,
    diff_ids: Vec<Digest>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawRun {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

impl ImageConfig {
    /// Reads the configuration that belongs to a manifest of so many layers.
    pub fn parse(bytes: &[u8], layers: usize, what: &str) -> Result<Self, ImageError> {
        let invalid = |problem: String| ImageError::invalid_image(format!("the configuration of {what}"), problem);
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(invalid(format!("it has more than {DOCUMENT_BYTES_MAX} bytes")));
        }
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if raw.rootfs.kind != "layers" {
            return Err(invalid(format!("its root file system is {:?}, not made of layers", raw.rootfs.kind)));
        }
        if raw.rootfs.diff_ids.len() != layers {
            let named = raw.rootfs.diff_ids.len();
            return Err(invalid(format!("it names {named} layers, and the manifest has {layers}")));
        }
        let run = raw.config.unwrap_or_default();
        let pair = |text: String| text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let platform = match (raw.os.unwrap_or_default(), raw.architecture.unwrap_or_default()) {
            (os, architecture) if os.is_empty() || architecture.is_empty() => None,
            (os, architecture) => Some(Platform { architecture, os, variant: raw.variant }),
        };
        let config = Self {
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env: run
                .env
                .unwrap_or_default()
                .into_iter()
                .filter_map(pair)
                .filter(|(name, _)| !name.is_empty())
                .collect(),
            user: run.user.unwrap_or_default(),
            // A relative one starts at the root, as Docker has it.
            working_directory: format!("/{}", run.working_dir.unwrap_or_default().trim_start_matches('/')),
            labels: run.labels.unwrap_or_default(),
            exposed_ports: run.exposed_ports.unwrap_or_default().into_keys().collect(),
            stop_signal: run.stop_signal.unwrap_or_default(),
            created: raw.created,
            platform,
            diff_ids: raw.rootfs.diff_ids,
        };
        let words = config.entrypoint.iter().chain(&config.cmd).chain([&config.user, &config.working_directory]);
        let mut words = words.chain(config.env.iter().flat_map(|(name, value)| [name, value]));
        if let Some(word) = words.find(|word| word.contains('\0')) {
            return Err(invalid(format!("no program can be given {word:?}, which has a byte 0")));
        }
        drop(words);
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(text: &str) -> Result<ImageConfig, ImageError> {
        ImageConfig::parse(text.replace("LAYER", LAYER).as_bytes(), 1, "it")
    }

    #[test]
    fn what_an_image_says_is_read() {
        let config = parse(
            r#"{"architecture":"amd64","os":"linux","created":"2026-01-02T03:04:05Z","config":{
                "User":"app:app","ExposedPorts":{"80/tcp":{},"53/udp":{}},"Env":["PATH=/bin","A=b=c","novalue","=x","EMPTY="],
                "Entrypoint":["/init","--"],"Cmd":["serve"],"WorkingDir":"srv/app","Labels":{"a":"b"},"StopSignal":"SIGINT",
                "Unknown":{"x":[1]}},"rootfs":{"type":"layers","diff_ids":["LAYER"]},"history":[{"empty_layer":true}]}"#,
        )
        .unwrap();
        assert_eq!(config.user, "app:app");
        assert_eq!(config.exposed_ports, ["53/udp", "80/tcp"]);
        let pairs: Vec<_> = config.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("PATH", "/bin"), ("A", "b=c"), ("EMPTY", "")]);
        assert_eq!((config.entrypoint, config.cmd), (vec!["/init".into(), "--".into()], vec!["serve".into()]));
        assert_eq!((config.working_directory.as_str(), config.stop_signal.as_str()), ("/srv/app", "SIGINT"));
        assert_eq!(config.platform.unwrap().to_string(), "linux/amd64");
        assert_eq!(config.diff_ids, [LAYER.parse().unwrap()]);
    }

    #[test]
    fn lists_that_are_null_or_absent_are_empty() {
        let text = r#"{"config":{"Env":null,"Cmd":null,"Entrypoint":null,"Labels":null,"ExposedPorts":null,"User":null},
            "rootfs":{"type":"layers","diff_ids":["LAYER"]}}"#;
        let absent = r#"{"rootfs":{"type":"layers","diff_ids":["LAYER"]}}"#;
        assert_eq!(parse(text).unwrap(), parse(absent).unwrap());
        assert_eq!(parse(absent).unwrap().working_directory, "/");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (text, problem) in [
            ("", "EOF"),
            ("[]", "invalid length"),
            ("{}", "rootfs"),
            (r#"{"rootfs":{"type":"layers","diff_ids":[]}}"#, "names 0 layers"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["LAYER","LAYER"]}}"#, "names 2 layers"),
            (r#"{"rootfs":{"type":"other","diff_ids":["LAYER"]}}"#, "not made of layers"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["sha512:00"]}}"#, "only sha256"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["LAYER"]},"config":{"Cmd":["a\u0000b"]}}"#, "byte 0"),
            (r#"{"rootfs":{"type":"layers","diff_ids":["LAYER"]},"config":{"Cmd":"sh"}}"#, "expected a sequence"),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.kind(), "invalid_image");
            assert!(error.to_string().contains(problem), "{text}: {error}");
        }
    }
}
