//! Where a request carries its key. Whether the key is good is the engine's decision.

use http::{HeaderMap, header};
use nagaya_api::error::{Code, Error};

const SESSION_TOKEN_HEADER: &str = "x-session-token";
/// The name that the clients send, and the one that the vendor's documents have.
pub(crate) const COOKIE_NAMES: [&str; 2] = ["tenki_session", "ory_kratos_session"];

/// The caller's token. Clients choose the header by the token's form, so every header is
/// accepted with every token; the first one present counts.
pub(crate) fn token(headers: &HeaderMap) -> Result<&str, Error> {
    bearer(headers)
        .or_else(|| text(headers, SESSION_TOKEN_HEADER))
        .or_else(|| cookie(headers))
        .ok_or_else(|| Code::Unauthenticated.into())
}

/// A header's text, where there is some.
pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim).filter(|text| !text.is_empty())
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = text(headers, header::AUTHORIZATION.as_str())?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// HTTP/2 clients may spread cookies over several header fields.
fn cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, value)| COOKIE_NAMES.contains(name) && !value.is_empty())
        .map(|(_, value)| value.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_token_is_found_in_every_form() {
        for fields in [
            &[("authorization", "Bearer tk_1")][..],
            &[("authorization", "bearer  tk_1")],
            &[("x-session-token", "tk_1")],
            &[("cookie", "tenki_session=tk_1")],
            &[("cookie", "a=b; ory_kratos_session=tk_1; c=d")],
            &[("cookie", "a=b"), ("cookie", "tenki_session=tk_1")],
        ] {
            assert_eq!(token(&headers(fields)), Ok("tk_1"), "{fields:?}");
        }
    }

    #[test]
    fn other_headers_carry_no_token() {
        for fields in [
            &[][..],
            &[("authorization", "Basic tk_1")],
            &[("authorization", "tk_1")],
            &[("cookie", "session=tk_1")],
            &[("cookie", "tenki_session=")],
            &[("x-session-token", "")],
            &[("x-tenki-session-cert", "tk_1")],
        ] {
            assert_eq!(token(&headers(fields)).unwrap_err().code, Code::Unauthenticated, "{fields:?}");
        }
    }
}
