//! What passes between viewer and service beside the bodies, and what is said about the viewer.

use std::net::IpAddr;

use bytes::Bytes;
use http::header::{self, HeaderName, InvalidHeaderValue};
use http::request::Parts;
use http::{HeaderMap, HeaderValue};

use super::host::Host;

/// Fields that belong to one connection (RFC 9110, section 7.6.1), and what old programs put there. `Trailer` is not
/// among them: without it no trailer would be sent on.
const OF_A_CONNECTION: [HeaderName; 7] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::TE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Fields that tell of the viewer.
const FORWARDED_COUNT: usize = 4;

/// What is said about a viewer, on every request.
pub(super) struct Claims {
    address: HeaderValue,
    scheme: &'static str,
    /// `Forwarded` up to the host (RFC 7239).
    forwarded: String,
}

impl Claims {
    pub(super) fn of(peer: IpAddr, secure: bool) -> Self {
        let peer = peer.to_canonical();
        let node = if peer.is_ipv6() { format!("\"[{peer}]\"") } else { peer.to_string() };
        let address = HeaderValue::try_from(peer.to_string()).expect("an address can stand in a header");
        Self { address, scheme: if secure { "https" } else { "http" }, forwarded: format!("for={node};host=\"") }
    }

    fn forwarded(&self, host: &HeaderValue) -> Result<HeaderValue, InvalidHeaderValue> {
        let pieces = [self.forwarded.as_bytes(), host.as_bytes(), b"\";proto=", self.scheme.as_bytes()];
        HeaderValue::from_maybe_shared(Bytes::from(pieces.concat()))
    }
}

/// Makes a viewer's header one for the service. `upgrade` is the protocol that the viewer wants instead.
pub(super) fn to_service(parts: &mut Parts, host: &Host, claims: &Claims, upgrade: Option<&HeaderValue>) {
    let headers = &mut parts.headers;
    let trailers = has_token(headers, header::TE, "trailers");
    strip(headers);
    strip_claims(headers);
    // We answer the expectation ourselves, by asking the service.
    join_cookies(headers);
    headers.reserve(FORWARDED_COUNT);
    headers.insert(header::HOST, host.value.clone());
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
    headers.insert(FORWARDED_FOR, claims.address.clone());
    headers.insert(FORWARDED_HOST, host.value.clone());
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(claims.scheme));
    if let Ok(value) = claims.forwarded(&host.value) {
        headers.insert(header::FORWARDED, value);
    }
}

/// Makes a service's header one for the viewer.
pub(super) fn to_viewer(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    strip(headers);
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
}

/// Leaves a service's answer one length at most: with two nobody knows where it ends, and what comes then.
pub(super) fn one_length(headers: &mut HeaderMap, no_body: bool) -> Result<(), &'static str> {
    if !no_body && headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH) {
        return Err("its answer has both Content-Length and Transfer-Encoding, and only one of them may be there");
    }
    let values = headers.get_all(header::CONTENT_LENGTH).iter().filter_map(|value| value.to_str().ok());
    let lengths: Vec<Option<u64>> =
        values.flat_map(|value| value.split(',')).map(|length| length.trim().parse().ok()).collect();
    let given = headers.get_all(header::CONTENT_LENGTH).iter().count();
    match lengths.split_first() {
        Some((Some(length), same)) if same.iter().all(|other| *other == Some(*length)) => {
            if given > 1 || !same.is_empty() {
                headers.insert(header::CONTENT_LENGTH, HeaderValue::from(*length));
            }
        }
        _ if given == 0 => {}
        // Of a body that does not come nothing depends on it.
        _ if no_body => {
            headers.remove(header::CONTENT_LENGTH);
        }
        _ => return Err("the Content-Length of its answer is not one number"),
    }
    Ok(())
}

/// Whether a list in these fields has this token, in any case.
pub(super) fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    tokens(headers, &name).any(|found| found.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(token))
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

/// Removes what belongs to the connection, and what `Connection` names.
fn strip(headers: &mut HeaderMap) {
    let usual = |name: &str| {
        name.eq_ignore_ascii_case("close") || OF_A_CONNECTION.iter().any(|of| name.eq_ignore_ascii_case(of.as_str()))
    };
    let named = tokens(headers, &header::CONNECTION).filter(|name| !usual(name)).filter_map(|name| name.parse().ok());
    for name in named.collect::<Vec<HeaderName>>() {
        headers.remove(name);
    }
    remove_all(headers, |name| OF_A_CONNECTION.contains(name));
}

/// Removes what the viewer claims about itself and its way here. Underscores count as hyphens, since services that
/// see their header as environment variables cannot tell them apart.
fn strip_claims(headers: &mut HeaderMap) {
    remove_all(headers, |name| {
        let name = name.as_str();
        let like = |wanted: &str| {
            name.len() >= wanted.len()
                && name
                    .bytes()
                    .zip(wanted.bytes())
                    .all(|(byte, wanted)| byte == wanted || (byte == b'_' && wanted == b'-'))
        };
        like("x-forwarded-") || name == "forwarded" || (name.len() == 9 && like("x-real-ip"))
    });
}

/// Looking is cheap, and mostly there is nothing to remove.
fn remove_all(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    while let Some(name) = headers.keys().find(|name| unwanted(name)).cloned() {
        headers.remove(name);
    }
}

/// HTTP/2 viewers may send each cookie in a field of its own; HTTP/1.1 knows one field only (RFC 9113, section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let values: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&values.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn forwarded(fields: &[(&str, &str)]) -> HeaderMap {
        let mut request = Request::get("/");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.header("host", "web.p.example:81").body(()).unwrap().into_parts();
        let host = Host::of(&parts).unwrap();
        let peer = "::ffff:192.0.2.7".parse().unwrap();
        to_service(&mut parts, &host, &Claims::of(peer, true), None);
        parts.headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    const OWN: [&str; 5] = ["forwarded", "host", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];

    #[test]
    fn the_service_hears_who_asks_and_only_from_us() {
        let headers = forwarded(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("X-Forwarded-Proto", "gopher"),
            ("x-forwarded-port", "1"),
            ("x_forwarded_for", "1.2.3.4"),
            ("x_real-ip", "1.2.3.4"),
            ("forwarded", "for=1.2.3.4"),
        ]);
        assert_eq!(names(&headers), OWN);
        assert_eq!(headers["x-forwarded-for"], "192.0.2.7");
        assert_eq!(headers["x-forwarded-host"], "web.p.example:81");
        assert_eq!(headers["x-forwarded-proto"], "https");
        assert_eq!(headers["forwarded"], "for=192.0.2.7;host=\"web.p.example:81\";proto=https");
        assert_eq!(headers["host"], "web.p.example:81");
    }

    #[test]
    fn what_belongs_to_the_connection_goes_no_further() {
        let headers = forwarded(&[
            ("connection", "close, X-Private , host"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("upgrade", "h2c"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic eA=="),
            ("te", "gzip, trailers;q=1"),
            ("accept", "text/html"),
        ]);
        let mut expected = OWN.to_vec();
        expected.extend(["accept", "te"]);
        expected.sort_unstable();
        assert_eq!(names(&headers), expected);
        assert_eq!(headers["te"], "trailers");
    }

    #[test]
    fn cookies_in_several_fields_become_one() {
        let headers = forwarded(&[("cookie", "a=1"), ("cookie", "b=2; c=3")]);
        assert_eq!(headers.get_all("cookie").iter().count(), 1);
        assert_eq!(headers["cookie"], "a=1; b=2; c=3");
    }
}
