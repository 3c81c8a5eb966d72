//! Where a call of the data plane carries its certificate, its only credential.

use http::HeaderMap;
use nagaya_api::error::{Code, Error};

use crate::rpc::auth;

const HEADER: &str = "x-tenki-session-cert";

pub(super) fn shown(headers: &HeaderMap) -> Result<&str, Error> {
    auth::text(headers, HEADER)
        .ok_or_else(|| Error::new(Code::InvalidCertificate, "header x-tenki-session-cert is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_plane_looks_at_its_own_header_only() {
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(http::HeaderName::from_static(name), http::HeaderValue::from_static(value))])
        };
        assert_eq!(shown(&headers(HEADER, "c")), Ok("c"));
        assert_eq!(shown(&headers("authorization", "Bearer c")).unwrap_err().code, Code::InvalidCertificate);
    }
}
