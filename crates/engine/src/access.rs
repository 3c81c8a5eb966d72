//! Who may do what: API keys, callers, and the certificates of the data plane.

use std::collections::HashMap;
use std::sync::RwLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{KeyId, PreviewId, SessionId, WorkspaceId};
use uuid::Uuid;

use crate::model::{ApiKey, UnixMs, Workspace, WorkspaceSettings};
use crate::ports::Entropy;

/// Somebody who showed a known API key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub key_id: KeyId,
    pub workspace_id: WorkspaceId,
}

/// Certificates start with this, so that one found in a log can be told from other secrets.
const CERTIFICATE_PREFIX: &str = "nsc1.";
/// The same for the tokens of those who may look at a private preview.
const VIEWER_TOKEN_PREFIX: &str = "nvt1.";
/// An id and an expiry.
const PAYLOAD_BYTES: usize = 24;

/// The keys in memory: looked up on every call, changed almost never.
pub(crate) struct Access {
    known: RwLock<Known>,
    certificate_key: [u8; 32],
    /// Another key, so that neither kind of signature can pass for the other.
    viewer_key: [u8; 32],
}

#[derive(Default)]
struct Known {
    workspaces: HashMap<WorkspaceId, Workspace>,
    keys: HashMap<[u8; 32], ApiKey>,
}

impl Access {
    pub(crate) fn new(workspaces: Vec<Workspace>, keys: Vec<ApiKey>, certificate_key: [u8; 32]) -> Self {
        let mut known = Known::default();
        known.workspaces.extend(workspaces.into_iter().map(|workspace| (workspace.id, workspace)));
        // A key without its workspace would be a caller without quota; it opens nothing.
        let keys = keys.into_iter().filter(|key| known.workspaces.contains_key(&key.workspace_id));
        known.keys.extend(keys.map(|key| (key.secret_hash, key)));
        let viewer_key = blake3::derive_key("nagaya 2026-11 viewer tokens of previews", &certificate_key);
        Self { known: RwLock::new(known), certificate_key, viewer_key }
    }

    pub(crate) fn authenticate(&self, token: &str) -> Result<Caller, Error> {
        // The table is searched by the token's hash, so timing tells nothing about stored secrets.
        let hash = blake3::hash(token.as_bytes());
        let known = self.known.read().expect("no holder of this lock panics");
        match known.keys.get(hash.as_bytes()) {
            Some(key) if hash == key.secret_hash => Ok(Caller { key_id: key.id, workspace_id: key.workspace_id }),
            _ => Err(Code::Unauthenticated.into()),
        }
    }

    /// The caller's own workspace. `asked`, where given, must be that one.
    pub(crate) fn workspace(&self, caller: &Caller, asked: Option<WorkspaceId>) -> Result<Workspace, Error> {
        if asked.is_some_and(|asked| asked != caller.workspace_id) {
            return Err(Code::WorkspaceNotFound.into());
        }
        let known = self.known.read().expect("no holder of this lock panics");
        known.workspaces.get(&caller.workspace_id).cloned().ok_or_else(|| Code::WorkspaceNotFound.into())
    }

    /// What a workspace may use; nothing is known of one that does not exist.
    pub(crate) fn settings(&self, id: WorkspaceId) -> WorkspaceSettings {
        let known = self.known.read().expect("no holder of this lock panics");
        known.workspaces.get(&id).map(|workspace| workspace.settings.clone()).unwrap_or_default()
    }

    /// Replaces what is known of a workspace.
    pub(crate) fn update(&self, workspace: Workspace) {
        self.known.write().expect("no holder of this lock panics").workspaces.insert(workspace.id, workspace);
    }

    /// The workspace that new keys belong to, if there is any.
    pub(crate) fn oldest_workspace(&self) -> Option<Workspace> {
        let known = self.known.read().expect("no holder of this lock panics");
        known.workspaces.values().min_by_key(|workspace| (workspace.created_at, workspace.id)).cloned()
    }

    pub(crate) fn has_keys(&self) -> bool {
        !self.known.read().expect("no holder of this lock panics").keys.is_empty()
    }

    pub(crate) fn add(&self, workspace: Option<Workspace>, key: ApiKey) {
        let mut known = self.known.write().expect("no holder of this lock panics");
        known.workspaces.extend(workspace.map(|workspace| (workspace.id, workspace)));
        known.keys.insert(key.secret_hash, key);
    }

    pub(crate) fn certify(&self, id: SessionId, expires_at: UnixMs) -> String {
        sign(CERTIFICATE_PREFIX, &self.certificate_key, id.as_uuid(), expires_at)
    }

    /// A token that opens a private preview until then.
    pub(crate) fn viewer_token(&self, id: PreviewId, expires_at: UnixMs) -> String {
        sign(VIEWER_TOKEN_PREFIX, &self.viewer_key, id.as_uuid(), expires_at)
    }

    /// The preview that a viewer token of this server opens and until when, unless it has expired.
    pub(crate) fn viewed(&self, token: &str, now: UnixMs) -> Result<(PreviewId, UnixMs), Error> {
        match read_signed(VIEWER_TOKEN_PREFIX, &self.viewer_key, token) {
            Some((id, expires_at)) if expires_at > now => Ok((PreviewId::from_uuid(id), expires_at)),
            _ => Err(Code::PreviewPrivate.into()),
        }
    }

    pub(crate) fn is_viewer_token(token: &str) -> bool {
        token.starts_with(VIEWER_TOKEN_PREFIX)
    }

    /// Whether the certificate is ours, for this session, and still good.
    pub(crate) fn verify(&self, certificate: &str, id: SessionId, now: UnixMs) -> Result<(), Error> {
        if self.certified(certificate, now)? != id {
            return Err(Code::InvalidCertificate.into());
        }
        Ok(())
    }

    /// The session that a certificate of this server opens, unless it has expired.
    pub(crate) fn certified(&self, certificate: &str, now: UnixMs) -> Result<SessionId, Error> {
        match read_signed(CERTIFICATE_PREFIX, &self.certificate_key, certificate) {
            Some((id, expires_at)) if expires_at > now => Ok(SessionId::from_uuid(id)),
            _ => Err(Code::InvalidCertificate.into()),
        }
    }
}

/// Prefix, payload and signature, as text that fits into headers, cookies and URLs.
fn sign(prefix: &str, key: &[u8; 32], id: &Uuid, expires_at: UnixMs) -> String {
    let mut payload = [0; PAYLOAD_BYTES];
    payload[..16].copy_from_slice(id.as_bytes());
    payload[16..].copy_from_slice(&expires_at.to_be_bytes());
    let signature = blake3::keyed_hash(key, &payload);
    format!("{prefix}{}.{}", URL_SAFE_NO_PAD.encode(payload), URL_SAFE_NO_PAD.encode(signature.as_bytes()))
}

fn read_signed(prefix: &str, key: &[u8; 32], text: &str) -> Option<(Uuid, UnixMs)> {
    let (payload, signature) = text.strip_prefix(prefix)?.split_once('.')?;
    let mut bytes = [0; PAYLOAD_BYTES];
    if URL_SAFE_NO_PAD.decode_slice(payload, &mut bytes) != Ok(PAYLOAD_BYTES) {
        return None;
    }
    let mut signed = [0; 32];
    if URL_SAFE_NO_PAD.decode_slice(signature, &mut signed) != Ok(32) {
        return None;
    }
    // Comparing with `blake3::Hash` takes the same time for every signature.
    if blake3::keyed_hash(key, &bytes) != signed {
        return None;
    }
    let (id, expires_at) = bytes.split_at(16);
    Some((Uuid::from_slice(id).ok()?, UnixMs::from_be_bytes(expires_at.try_into().ok()?)))
}

/// A new secret: `tk_` and 256 random bits in hexadecimal.
pub(crate) fn new_secret(entropy: &dyn Entropy) -> String {
    let mut random = [0; 32];
    entropy.fill(&mut random);
    format!("tk_{}", blake3::Hash::from_bytes(random).to_hex())
}

pub(crate) fn hash_secret(secret: &str) -> [u8; 32] {
    *blake3::hash(secret.as_bytes()).as_bytes()
}

/// Whether a secret the operator chose can travel in every header and is not trivially guessed.
pub fn check_secret(secret: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.~+/=".contains(&byte);
    if (16..=512).contains(&secret.len()) && secret.bytes().all(allowed) {
        return Ok(());
    }
    Err(Error::new(
        Code::InvalidArgument,
        "api_key must be 16 to 512 letters, digits or characters of _-.~+/= (such as tk_ and 64 hexadecimal digits)",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        let settings = WorkspaceSettings::default();
        let workspace = Workspace { id: WorkspaceId::new(1, [1; 10]), name: "w".into(), created_at: 1, settings };
        let key = |n, workspace_id, secret| ApiKey {
            id: KeyId::new(n, [0; 10]),
            workspace_id,
            secret_hash: hash_secret(secret),
            created_at: 1,
        };
        let keys = vec![key(1, workspace.id, "tk_good"), key(2, WorkspaceId::new(9, [9; 10]), "tk_stray")];
        Access::new(vec![workspace], keys, [7; 32])
    }

    #[test]
    fn only_a_known_key_with_a_workspace_makes_a_caller() {
        let access = access();
        assert_eq!(access.authenticate("tk_good").unwrap().key_id, KeyId::new(1, [0; 10]));
        for bad in ["", "tk_", "tk_goo", "tk_good ", "tk_stray"] {
            assert_eq!(access.authenticate(bad).unwrap_err().code, Code::Unauthenticated, "{bad}");
        }
    }

    #[test]
    fn a_certificate_opens_its_session_until_it_expires() {
        let access = access();
        let id = SessionId::new(5, [5; 10]);
        let certificate = access.certify(id, 1_000);
        assert!(certificate.starts_with("nsc1."));
        assert_eq!(access.verify(&certificate, id, 999), Ok(()));
        assert!(access.verify(&certificate, id, 1_000).is_err(), "expired");
        assert!(access.verify(&certificate, SessionId::new(6, [5; 10]), 1).is_err(), "foreign session");
    }

    #[test]
    fn no_changed_certificate_is_accepted() {
        let access = access();
        let id = SessionId::new(5, [5; 10]);
        let certificate = access.certify(id, 1_000);
        for position in 0..certificate.len() {
            let mut bytes = certificate.clone().into_bytes();
            bytes[position] = if bytes[position] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(access.verify(&changed, id, 1).is_err(), "changed at {position}");
            assert!(access.verify(&certificate[..position], id, 1).is_err(), "cut at {position}");
        }
        assert!(access.verify(&format!("{certificate}A"), id, 1).is_err());
        let other = Access::new(vec![], vec![], [8; 32]);
        assert!(other.verify(&certificate, id, 1).is_err(), "another server's key");
    }

    #[test]
    fn a_viewer_token_opens_its_preview_and_nothing_else() {
        let access = access();
        let id = PreviewId::new(5, [5; 10]);
        let token = access.viewer_token(id, 1_000);
        assert!(Access::is_viewer_token(&token));
        assert_eq!(access.viewed(&token, 999), Ok((id, 1_000)));
        assert!(access.viewed(&token, 1_000).is_err(), "expired");
        let rest = token.strip_prefix(VIEWER_TOKEN_PREFIX).unwrap();
        assert!(access.certified(&format!("{CERTIFICATE_PREFIX}{rest}"), 1).is_err(), "a token as a certificate");
        let certificate = access.certify(SessionId::from_uuid(*id.as_uuid()), 1_000);
        let rest = certificate.strip_prefix(CERTIFICATE_PREFIX).unwrap();
        assert!(access.viewed(&format!("{VIEWER_TOKEN_PREFIX}{rest}"), 1).is_err(), "a certificate as a token");
    }

    #[test]
    fn weak_and_unsendable_secrets_are_refused() {
        assert_eq!(check_secret(&format!("tk_{}", "a".repeat(64))), Ok(()));
        for bad in ["", "tk_short", "tk_with space in the middle", "tk_semi;colon;semi;colon", &"a".repeat(513)] {
            assert!(check_secret(bad).is_err(), "{bad}");
        }
    }
}
