//! Whether the outcome of a call can be told on the connection that it came on.
//!
//! | | HTTP/2 | HTTP/1.1 | HTTP/1.0 |
//! |---|---|---|---|
//! | Connect, gRPC-Web | yes | yes: the outcome is in the body | yes |
//! | gRPC | yes | with `TE: trailers`: trailers are announced and sent | no |
//!
//! What cannot be told is refused before anything is done: a caller who hears of a failure must not have made something.

use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Response, Version};
use nagaya_api::error::{self, Code};

const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
/// What our trailers may hold.
const TRAILERS: HeaderValue = HeaderValue::from_static("grpc-status, grpc-message, grpc-status-details-bin");

/// Where the outcome of a call stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// In the body, or in its trailers as HTTP/2 has them.
    Carried,
    /// In trailers that are announced.
    Announced,
    /// Nowhere but in the header of an answer without a body.
    Lost,
}

impl Outcome {
    pub(crate) fn of(request: &Parts) -> Self {
        match request.version {
            _ if !is_grpc(&request.headers) => Self::Carried,
            Version::HTTP_09 | Version::HTTP_10 => Self::Lost,
            Version::HTTP_11 if takes_trailers(&request.headers) => Self::Announced,
            Version::HTTP_11 => Self::Lost,
            _ => Self::Carried,
        }
    }

    pub(crate) fn check(self) -> Result<(), error::Error> {
        if self == Self::Lost { Err(Code::TransportUnfit.into()) } else { Ok(()) }
    }

    /// Makes an answer one that its client can read to its end.
    pub(crate) fn tell<B>(self, mut response: Response<B>) -> Response<B> {
        bound(response.headers_mut());
        if self == Self::Announced {
            response.headers_mut().insert(header::TRAILER, TRAILERS);
        }
        response
    }
}

/// gRPC itself, in whatever form messages are; not gRPC-Web.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes).to_ascii_lowercase();
    kind.strip_prefix(b"application/grpc").is_some_and(|rest| !rest.starts_with(b"-"))
}

fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::TE).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case("trailers"))
}

/// Texts of our own fit into a gRPC status. Those of the rpc layer may repeat what a client sent, of any length.
pub(crate) fn bound(fields: &mut HeaderMap) {
    let Some(message) = fields.get(MESSAGE) else { return };
    let text = String::from_utf8_lossy(&percent_decoded(message.as_bytes())).into_owned();
    let Some(text) = error::bounded(&text) else { return };
    if let Ok(value) = HeaderValue::try_from(percent_encoded(&text)) {
        fields.insert(MESSAGE, value);
    }
    // It holds the same text once more.
    fields.remove(DETAILS);
}

fn percent_decoded(bytes: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, after @ ..] = rest {
        let pair = after.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
        match pair.filter(|_| *first == b'%').and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                rest = &after[2..];
            }
            None => {
                decoded.push(*first);
                rest = after;
            }
        }
    }
    decoded
}

fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn outcome(version: Version, kind: &str, te: &[&str]) -> Outcome {
        let mut request = Request::post("/").version(version).header("content-type", kind);
        for value in te {
            request = request.header("te", *value);
        }
        Outcome::of(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn only_grpc_needs_trailers_and_only_http_2_has_them_for_everybody() {
        let grpc = ["application/grpc", "application/grpc+proto", "application/grpc+json", "Application/gRPC;x=y"];
        let others = ["application/grpc-web", "application/grpc-web+json", "application/proto", "application/json"];
        for kind in grpc {
            assert_eq!(outcome(Version::HTTP_2, kind, &[]), Outcome::Carried);
            assert_eq!(outcome(Version::HTTP_11, kind, &["gzip, Trailers"]), Outcome::Announced);
            assert_eq!(outcome(Version::HTTP_11, kind, &["gzip", "trailers"]), Outcome::Announced);
            assert_eq!(outcome(Version::HTTP_11, kind, &["gzip"]), Outcome::Lost);
            assert_eq!(outcome(Version::HTTP_11, kind, &[]), Outcome::Lost);
            assert_eq!(outcome(Version::HTTP_10, kind, &["trailers"]), Outcome::Lost);
        }
        for (kind, version) in
            others.iter().flat_map(|kind| [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2].map(|of| (kind, of)))
        {
            assert_eq!(outcome(version, kind, &[]), Outcome::Carried);
        }
    }

    #[test]
    fn a_long_status_of_the_rpc_layer_is_cut() {
        for (text, cut) in [("short, 100 %, é".to_owned(), false), ("é".repeat(5_000), true), ("%".repeat(9_000), true)]
        {
            let mut fields = HeaderMap::new();
            fields.insert(MESSAGE, percent_encoded(&text).try_into().unwrap());
            fields.insert(DETAILS, "AAAA".repeat(3_000).try_into().unwrap());
            let before = fields.clone();
            bound(&mut fields);
            assert_eq!(fields != before, cut);
            if cut {
                let bytes: usize = fields.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
                assert!(2 * bytes < error::STATUS_BYTES_MAX, "{bytes}");
                let told = String::from_utf8(percent_decoded(fields[MESSAGE].as_bytes())).unwrap();
                assert!(told.contains("cut here") && text.starts_with(told.split('…').next().unwrap()), "{told}");
            }
        }
    }
}
