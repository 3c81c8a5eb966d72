//! Host names of requests, as viewers send them.

use std::borrow::Cow;

use http::request::Parts;
use http::{HeaderValue, header};

/// Longer names do not exist in DNS.
const NAME_BYTES_MAX: usize = 253;

/// Where a request says that it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// As the viewer sent it.
    pub(super) value: HeaderValue,
    /// How much of it is the name, without port and without the dot of the root. An IPv6 address keeps its brackets.
    name_bytes: usize,
}

impl Host {
    /// `None` when the request names no host, more than one, or one that cannot be.
    pub(super) fn of(parts: &Parts) -> Option<Self> {
        // An absolute URI, as HTTP/2 always has it, wins over the field (RFC 9112, section 3.2.2).
        let value = match parts.uri.authority() {
            Some(authority) => HeaderValue::from_str(authority.as_str()).ok()?,
            None => {
                let mut values = parts.headers.get_all(header::HOST).iter();
                let value = values.next()?.clone();
                if values.next().is_some() {
                    return None;
                }
                value
            }
        };
        let name_bytes = name(value.to_str().ok()?)?.len();
        Some(Self { value, name_bytes })
    }

    /// In lower case.
    pub(super) fn name(&self) -> Cow<'_, str> {
        let name = self.value.to_str().unwrap_or_default().get(..self.name_bytes).unwrap_or_default();
        match name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            true => Cow::Owned(name.to_ascii_lowercase()),
            false => Cow::Borrowed(name),
        }
    }

    /// Whether it is the machine itself. Anything else on a loopback listener is a page of another site that had its
    /// own name lead here (DNS rebinding).
    pub(super) fn is_loopback(&self) -> bool {
        matches!(&*self.name(), "localhost" | "127.0.0.1" | "[::1]")
    }
}

/// The name in `name`, `name:port`, `[address]` or `[address]:port`, as it is written: what the text begins with.
fn name(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            address.parse::<std::net::Ipv6Addr>().ok()?;
            (&host[..address.len() + 2], port)
        }
        None => {
            let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
            let name = name.strip_suffix('.').unwrap_or(name);
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
                return None;
            }
            (name, port)
        }
    };
    match port.strip_prefix(':') {
        Some(digits) if digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit()) => {}
        None if port.is_empty() => {}
        _ => return None,
    }
    Some(name)
}

/// What a name below the previews' domain stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Below {
    Label(String),
    /// The domain itself, or a name with more than one label in front of it.
    Nothing,
}

/// `None` when the name is not the domain's.
pub(super) fn below(domain: &str, name: &str) -> Option<Below> {
    let front = name.strip_suffix(domain)?;
    match front.strip_suffix('.') {
        None if front.is_empty() => Some(Below::Nothing),
        None => None,
        Some(label) if label.is_empty() || label.contains('.') => Some(Below::Nothing),
        Some(label) => Some(Below::Label(label.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn host(values: &[&str]) -> Option<String> {
        let mut request = Request::get("/");
        for value in values {
            request = request.header("host", *value);
        }
        Host::of(&request.body(()).unwrap().into_parts().0).map(|host| host.name().into_owned())
    }

    #[test]
    fn a_host_has_one_normal_form() {
        for (value, name) in [
            ("a.example", "a.example"),
            ("A.Example:8080", "a.example"),
            ("a.example.", "a.example"),
            ("a.example.:1", "a.example"),
            ("127.0.0.1:65535", "127.0.0.1"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(host(&[value]).as_deref(), Some(name), "{value}");
        }
    }

    #[test]
    fn what_is_no_host_is_none() {
        let long = "a.".repeat(5_000);
        for value in
            ["", ":80", "a:b", "a:123456", "::1", "[::1", "[x]", "[::1]x", "a/b", "u@a", "a b", ".", "a,b", &long]
        {
            assert_eq!(host(&[value]), None, "{value}");
        }
        assert_eq!(host(&[]), None);
        assert_eq!(host(&["a", "a"]), None, "two of them");
    }

    #[test]
    fn an_absolute_uri_wins() {
        let request = Request::get("http://a.example:1/x").header("host", "b.example").body(()).unwrap();
        let host = Host::of(&request.into_parts().0).unwrap();
        assert_eq!((&*host.name(), host.value.to_str().unwrap()), ("a.example", "a.example:1"));
        let request = Request::get("http://user@a.example/").body(()).unwrap();
        assert_eq!(Host::of(&request.into_parts().0), None, "credentials in it");
    }

    #[test]
    fn only_one_label_stands_before_the_domain() {
        let of = |name| below("p.example", name);
        assert_eq!(of("web.p.example"), Some(Below::Label("web".into())));
        assert_eq!(of("p.example"), Some(Below::Nothing));
        assert_eq!(of("a.b.p.example"), Some(Below::Nothing));
        assert_eq!(of(".p.example"), Some(Below::Nothing));
        assert_eq!(of("webp.example"), None);
        assert_eq!(of("example"), None);
    }
}
