//! How a registry wants to be asked: what it says in `WWW-Authenticate`, and the tokens of its token service.

use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use serde::Deserialize;

use super::credentials::Credentials;
use super::http::{Failure, Http, Target};
use crate::error::ImageError;

const TOKEN_BYTES_MAX: u64 = 1 << 20;

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// Reads the headers of one answer; Bearer wins.
    pub fn find(headers: &HeaderMap) -> Option<Self> {
        let found: Vec<_> = headers
            .get_all(http::header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| Self::parse(value.to_str().ok()?))
            .collect();
        let bearer = found.iter().find(|challenge| matches!(challenge, Self::Bearer { .. }));
        bearer.or(found.first()).cloned()
    }

    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            let Some((name, after)) = rest.split_once('=') else { break };
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted_value(quoted)?,
                None => {
                    let end = after.find(',').unwrap_or(after.len());
                    (after[..end].trim().to_owned(), &after[end..])
                }
            };
            rest = after;
            match name.trim().to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
        }
        Some(Self::Bearer { realm: realm?, service, scope })
    }
}

/// The value before the closing quote, and what follows that.
fn quoted_value(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

pub(crate) fn authorization(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Gets what goes into `Authorization` for pulling from a repository.
pub(crate) async fn answer(
    http: &Http,
    challenge: &Challenge,
    credentials: Option<&Credentials>,
    registry: &str,
    repository: &str,
) -> Result<HeaderValue, Failure> {
    let unauthorized = |problem: &str| {
        let (registry, what) = (registry.to_owned(), repository.to_owned());
        Failure::Final(ImageError::Unauthorized { registry, what, problem: problem.into() })
    };
    let unusable = || unauthorized("what it wants to be told cannot be put into a header");
    let Challenge::Bearer { realm, service, scope } = challenge else {
        let Some(Credentials::Password { user, password }) = credentials else {
            return Err(unauthorized("it wants a name and a password, and there are none for it"));
        };
        return authorization(&basic(user, password)).ok_or_else(unusable);
    };
    let odd = |problem: String| Failure::Final(ImageError::InvalidAnswer { host: registry.into(), problem });
    let mut target =
        Target::parse(realm).map_err(|problem| odd(format!("its token service is {realm:?}: {problem}")))?;
    if !target.https && !http.config.is_insecure(registry) {
        return Err(odd(format!("its token service is {realm:?}, where a password could be read on its way")));
    }
    let default_scope = format!("repository:{repository}:pull");
    let scope = scope.as_ref().unwrap_or(&default_scope);
    let mut fields = vec![("scope", scope.as_str())];
    fields.extend(service.as_ref().map(|service| ("service", service.as_str())));
    let mut headers = HeaderMap::new();
    let (method, body) = match credentials {
        Some(Credentials::IdentityToken(token)) => {
            fields.extend([("grant_type", "refresh_token"), ("client_id", "nagaya"), ("refresh_token", token)]);
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            (Method::POST, Bytes::from(encoded(&fields)))
        }
        other => {
            if let Some(Credentials::Password { user, password }) = other {
                fields.push(("account", user));
                headers.insert(AUTHORIZATION, authorization(&basic(user, password)).ok_or_else(unusable)?);
            }
            let separator = if target.path.contains('?') { '&' } else { '?' };
            target.path = format!("{}{separator}{}", target.path, encoded(&fields));
            (Method::GET, Bytes::new())
        }
    };
    let mut answer = http.send(method, &target, headers, body).await?;
    match answer.status {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
            return Err(unauthorized("its token service does not accept the login"));
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            return Err(Failure::Passing(format!("its token service answered {status}")));
        }
        status => return Err(odd(format!("its token service answered {status}"))),
    }
    let body = answer.body.all(TOKEN_BYTES_MAX).await.map_err(Failure::Passing)?;
    let token = body.and_then(|body| serde_json::from_slice::<Token>(&body).ok());
    let token = token.and_then(|token| token.token.or(token.access_token)).filter(|token| !token.is_empty());
    let token = token.ok_or_else(|| odd("its token service gave no token".into()))?;
    authorization(&format!("Bearer {token}")).ok_or_else(|| odd("its token service gave a token that is none".into()))
}

/// Fields as forms and queries have them.
fn encoded(fields: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        if !text.is_empty() {
            text.push('&');
        }
        text += name;
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => text.push(char::from(byte)),
                _ => drop(write!(text, "%{byte:02X}")),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        };
        for (text, read) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://a.example/token\",service=\"reg,istry\",scope=\"repository:a/b:pull,push\"",
                Some(bearer("https://a.example/token", Some("reg,istry"), Some("repository:a/b:pull,push"))),
            ),
            ("bearer realm=https://a.example/t , service = s", Some(bearer("https://a.example/t", Some("s"), None))),
            ("Bearer error=\"invalid \\\"token\\\"\", realm=\"r\"", Some(bearer("r", None, None))),
            ("Bearer service=\"s\"", None),
            ("Bearer realm=\"open", None),
            ("Digest realm=\"x\"", None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(text), read, "{text}");
        }
        let mut headers = HeaderMap::new();
        headers.append("www-authenticate", HeaderValue::from_static("Basic realm=\"x\""));
        headers.append("www-authenticate", HeaderValue::from_static("Bearer realm=\"r\""));
        assert_eq!(Challenge::find(&headers), Some(bearer("r", None, None)));
        assert_eq!(
            encoded(&[("scope", "repository:a/b:pull"), ("x", "ä&=")]),
            "scope=repository%3Aa%2Fb%3Apull&x=%C3%A4%26%3D"
        );
    }
}
