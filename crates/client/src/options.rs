//! Where the server is, who the caller is, and what a client takes from its environment.

use std::ffi::OsStr;
use std::fmt;
use std::time::Duration;

use http::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};

use crate::constants::{DATA_PLANE_READY_TIMEOUT, DEFAULT_CONNECT_TIMEOUT};
use crate::settable::settable;
use crate::{Error, Result};

/// Where `nagaya serve` listens unless it is told otherwise.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:7070";

const TOKEN_VARIABLES: [&str; 2] = ["TENKI_AUTH_TOKEN", "TENKI_API_KEY"];
const ENDPOINT_VARIABLES: [&str; 2] = ["TENKI_API_ENDPOINT", "TENKI_API_URL"];
const GATEWAY_VARIABLE: &str = "TENKI_SANDBOX_GATEWAY_URL";

settable! {
    /// How to reach a server, and as whom.
    #[derive(Clone)]
    pub struct ClientOptions {
        /// The credential: an API key `tk_…`, a session token `ory_st_…`, or else the value of a session cookie.
        pub token: Option<String>,
        /// `http://` or `https://` and a host, with an optional port. [`DEFAULT_ENDPOINT`] when there is none.
        pub endpoint: Option<String>,
        /// Where SSH goes, as a `ws`, `wss`, `http` or `https` URL. The server is asked when there is none.
        pub gateway: Option<String>,
        /// The cookie that carries tokens of the third kind; `tenki_session` by default.
        pub cookie_name: String,
        /// Certificates in PEM that are trusted instead of the system's.
        pub root_certificates: Option<Vec<u8>>,
        /// How long a session's data plane may take until it answers; 60 s by default.
        pub data_plane_ready_timeout: Duration,
        /// How long a connection may take, the TLS handshake included; 10 s by default.
        pub connect_timeout: Duration,
        pub user_agent: String,
    }
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            token: None,
            endpoint: None,
            gateway: None,
            cookie_name: "tenki_session".to_owned(),
            root_certificates: None,
            data_plane_ready_timeout: DATA_PLANE_READY_TIMEOUT,
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            user_agent: concat!("nagaya-client-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// Leaves the token out.
impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("endpoint", &self.endpoint)
            .field("gateway", &self.gateway)
            .field("has_token", &self.token.is_some())
            .finish_non_exhaustive()
    }
}

impl ClientOptions {
    /// Options from the variables that the official SDKs read, in their order: `TENKI_AUTH_TOKEN`, then
    /// `TENKI_API_KEY`; `TENKI_API_ENDPOINT`, then `TENKI_API_URL`; and `TENKI_SANDBOX_GATEWAY_URL`.
    /// An empty variable counts as absent.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables<V: AsRef<OsStr>>(variable: impl Fn(&str) -> Option<V>) -> Self {
        let first = |names: &[&str]| {
            let texts = names.iter().filter_map(|name| Some(variable(name)?.as_ref().to_str()?.trim().to_owned()));
            texts.into_iter().find(|text| !text.is_empty())
        };
        Self {
            token: first(&TOKEN_VARIABLES),
            endpoint: first(&ENDPOINT_VARIABLES),
            gateway: first(&[GATEWAY_VARIABLE]),
            ..Self::default()
        }
    }

    /// Scheme, host and port of the server; without a path.
    pub(crate) fn origin(&self) -> Result<http::Uri> {
        origin(self.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT))
    }

    /// The headers that say who the caller is.
    pub(crate) fn headers(&self) -> Result<HeaderMap> {
        let token = self.token.as_deref().map(str::trim).filter(|token| !token.is_empty());
        let token = token.ok_or(Error::MissingToken)?;
        let (name, value) = if token.starts_with("tk_") {
            (AUTHORIZATION, format!("Bearer {token}"))
        } else if token.starts_with("ory_st_") {
            (HeaderName::from_static("x-session-token"), token.to_owned())
        } else {
            if token.contains([';', ',', ' ', '"', '\\']) || !is_cookie_name(&self.cookie_name) {
                return Err(Error::InvalidToken);
            }
            (COOKIE, format!("{}={token}", self.cookie_name))
        };
        let mut value = HeaderValue::from_str(&value).map_err(|_| Error::InvalidToken)?;
        value.set_sensitive(true);
        let user_agent = HeaderValue::from_str(&self.user_agent)
            .map_err(|_| Error::InvalidOptions("user_agent must be text that fits into a header".into()))?;
        Ok(HeaderMap::from_iter([(name, value), (USER_AGENT, user_agent)]))
    }
}

fn is_cookie_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// An `http` or `https` URL without anything behind its port.
pub(crate) fn origin(text: &str) -> Result<http::Uri> {
    let invalid = |why: &str| Error::InvalidOptions(format!("endpoint {text:?}: {why}"));
    let uri: http::Uri = text.trim().trim_end_matches('/').parse().map_err(|_| invalid("not a URL"))?;
    match uri.scheme_str() {
        Some("http" | "https") => {}
        _ => return Err(invalid("it must begin with http:// or https://")),
    }
    let authority = uri.authority().ok_or_else(|| invalid("it names no host"))?;
    if authority.as_str().contains('@') {
        return Err(invalid("it must not hold a user or a password"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(invalid("it must end after the host and port"));
    }
    Ok(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> ClientOptions {
        ClientOptions::from_variables(|name| {
            variables.iter().find(|(each, _)| *each == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn variables_are_read_in_the_order_of_the_sdks() {
        let both = from(&[("TENKI_API_KEY", "tk_2"), ("TENKI_AUTH_TOKEN", "tk_1"), ("TENKI_API_URL", "http://b")]);
        assert_eq!((both.token.as_deref(), both.endpoint.as_deref()), (Some("tk_1"), Some("http://b")));
        let first_is_empty =
            from(&[("TENKI_AUTH_TOKEN", " "), ("TENKI_API_KEY", " tk_2\n"), ("TENKI_API_ENDPOINT", "http://a")]);
        assert_eq!(first_is_empty.token.as_deref(), Some("tk_2"));
        assert_eq!(first_is_empty.endpoint.as_deref(), Some("http://a"));
        let none = from(&[]);
        assert_eq!((none.token, none.gateway), (None, None));
        assert_eq!(from(&[("TENKI_SANDBOX_GATEWAY_URL", "ws://g")]).gateway.as_deref(), Some("ws://g"));
    }

    #[test]
    fn the_form_of_a_token_chooses_its_header() {
        let header = |token: &str| {
            let options = ClientOptions { token: Some(token.into()), ..Default::default() };
            let headers = options.headers()?;
            let (name, value) = headers.iter().find(|(name, _)| *name != USER_AGENT).expect("a credential");
            assert!(value.is_sensitive());
            Ok::<_, Error>((name.as_str().to_owned(), value.to_str().expect("text").to_owned()))
        };
        let is = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(header("tk_abc").expect("valid"), is("authorization", "Bearer tk_abc"));
        assert_eq!(header(" tk_abc\n").expect("valid"), is("authorization", "Bearer tk_abc"));
        assert_eq!(header("ory_st_abc").expect("valid"), is("x-session-token", "ory_st_abc"));
        assert_eq!(header("abc").expect("valid"), is("cookie", "tenki_session=abc"));
        for bad in ["tk_a\nb", "a;b", "a b", "tk_\u{1}"] {
            assert!(matches!(header(bad), Err(Error::InvalidToken)), "{bad:?}");
        }
        assert!(matches!(header("  "), Err(Error::MissingToken)));
        assert!(matches!(ClientOptions::default().headers(), Err(Error::MissingToken)));
    }

    #[test]
    fn endpoints_are_origins() {
        for (text, host) in [("http://a:1", "a:1"), (" https://[::1]:2/ ", "[::1]:2"), ("http://b", "b")] {
            let uri = origin(text).expect(text);
            assert_eq!(uri.authority().expect("a host").as_str(), host);
        }
        for bad in ["", "a:1", "ftp://a", "http://", "http://u:p@a", "http://a/x", "http://a?x", "http://a b"] {
            assert!(matches!(origin(bad), Err(Error::InvalidOptions(_))), "{bad:?}");
        }
    }

    #[test]
    fn options_do_not_print_their_token() {
        let options = ClientOptions { token: Some("tk_secret".into()), ..Default::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }
}
