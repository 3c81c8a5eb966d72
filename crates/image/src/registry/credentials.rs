//! Logins as Docker keeps them: in its `config.json`, or with helper programs that it names.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::ImageError;
use crate::reference::DOCKER_HUB;

/// What Docker calls its Hub in files.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
const FILE_BYTES_MAX: usize = 4 << 20;
const HELPER_BYTES_MAX: u64 = 64 << 10;
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// What proves to a registry who asks. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// To be exchanged for a token at the registry's token service.
    IdentityToken(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: HashMap<String, Auth>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// The login for a registry, if there is one.
pub(crate) async fn find(config: Option<&Path>, registry: &str) -> Result<Option<Credentials>, ImageError> {
    let refused = |problem: String| ImageError::Credentials { registry: registry.into(), problem };
    let path = match config {
        Some(path) => path.to_owned(),
        None => match std::env::var_os("HOME") {
            Some(home) => PathBuf::from(home).join(".docker/config.json"),
            None => return Ok(None),
        },
    };
    let bytes = match tokio::fs::read(&path).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && config.is_none() => return Ok(None),
        Err(error) => return Err(refused(format!("{} cannot be read: {error}", path.display()))),
    };
    if bytes.len() > FILE_BYTES_MAX {
        return Err(refused(format!("{} has more than {FILE_BYTES_MAX} bytes", path.display())));
    }
    // What a parser says of a secret file may quote it; the place is enough.
    let config: DockerConfig = serde_json::from_slice(&bytes).map_err(|error| {
        refused(format!("{} is no configuration of Docker, at line {}", path.display(), error.line()))
    })?;
    let key = if registry == DOCKER_HUB { DOCKER_HUB_KEY } else { registry };
    let helper = config.cred_helpers.get(key).or(config.cred_helpers.get(registry)).or(config.creds_store.as_ref());
    if let Some(helper) = helper.filter(|helper| !helper.is_empty())
        && let Some(found) = ask(helper, key).await.map_err(refused)?
    {
        return Ok(Some(found));
    }
    let named = config.auths.iter().find(|(name, _)| *name == key || host(name) == registry);
    let Some((_, auth)) = named else { return Ok(None) };
    if let Some(token) = auth.identitytoken.as_ref().filter(|token| !token.is_empty()) {
        return Ok(Some(Credentials::IdentityToken(token.clone())));
    }
    if let Some(encoded) = auth.auth.as_ref().filter(|encoded| !encoded.is_empty()) {
        let decoded = STANDARD.decode(encoded).or_else(|_| STANDARD_NO_PAD.decode(encoded)).ok();
        let text = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = text.as_deref().and_then(|text| text.split_once(':'));
        let (user, password) = pair.ok_or_else(|| refused(format!("what {} has for it is damaged", path.display())))?;
        return Ok(Some(Credentials::Password { user: user.into(), password: password.trim_end_matches('\0').into() }));
    }
    match (&auth.username, &auth.password) {
        (Some(user), Some(password)) => {
            Ok(Some(Credentials::Password { user: user.clone(), password: password.clone() }))
        }
        _ => Ok(None),
    }
}

/// Older files have URLs where newer ones have hosts.
fn host(name: &str) -> &str {
    let name = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    name.split('/').next().unwrap_or(name)
}

/// Asks a helper program; it answers in JSON, or that it knows nothing.
async fn ask(helper: &str, key: &str) -> Result<Option<Credentials>, String> {
    if !helper.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')) {
        return Err(format!("{helper:?} is no name of a credential helper"));
    }
    let program = format!("docker-credential-{helper}");
    let failed = |problem: String| format!("the credential helper {program} {problem}");
    let run = async {
        let mut command = tokio::process::Command::new(&program);
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| failed(format!("cannot be started: {error}")))?;
        if let Some(mut input) = child.stdin.take() {
            // One that does not read its input says why in its answer.
            let _ = input.write_all(key.as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(output) = child.stdout.take() {
            let read = output.take(HELPER_BYTES_MAX).read_to_end(&mut said).await;
            read.map_err(|error| failed(format!("cannot be read: {error}")))?;
        }
        let status = child.wait().await.map_err(|error| failed(format!("cannot be waited for: {error}")))?;
        Ok::<_, String>((status, said))
    };
    let (status, said) = tokio::time::timeout(HELPER_TIMEOUT, run)
        .await
        .map_err(|_| failed(format!("did not answer in {} s", HELPER_TIMEOUT.as_secs())))??;
    if !status.success() {
        let text = String::from_utf8_lossy(&said).to_lowercase();
        return match text.contains("credentials not found") {
            true => Ok(None),
            false => Err(failed(format!("failed ({status}); run it by hand: echo {key} | {program} get"))),
        };
    }
    let found: Helped =
        serde_json::from_slice(&said).map_err(|_| failed("gave an answer that is no credential".into()))?;
    Ok(Some(match found.username.as_str() {
        "<token>" => Credentials::IdentityToken(found.secret),
        _ => Credentials::Password { user: found.username, password: found.secret },
    }))
}
