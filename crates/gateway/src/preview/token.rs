//! Viewer tokens: shown once in the URL, kept in a cookie from then on, never seen by the service.

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, Uri};

/// The query's parameter.
pub const PARAMETER: &str = "nagaya_viewer_token";
/// Cookies know no ports, so those of previews on one host are told apart by their labels. Names that start like
/// this are ours alone: services neither see nor set them.
const COOKIE_PREFIX: &str = "nagaya-viewer-";
/// Longer ones are not ours.
const TOKEN_BYTES_MAX: usize = 512;

/// What a viewer showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) token: String,
    /// It was in the URL, so that the browser has yet to learn it.
    pub(super) in_url: bool,
}

/// Takes all tokens out of a request, and the cookies that open the server itself, which a browser may send along where
/// both are below one domain. The token in the URL is the newest.
pub(super) fn take(parts: &mut Parts, label: &str, own_cookies: &[&str]) -> Option<Shown> {
    let in_cookie = take_cookies(&mut parts.headers, label, own_cookies).map(|token| Shown { token, in_url: false });
    let in_url = take_parameter(&mut parts.uri).map(|token| Shown { token, in_url: true });
    in_url.or(in_cookie).filter(|shown| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        shown.token.len() <= TOKEN_BYTES_MAX && shown.token.bytes().all(allowed)
    })
}

/// The cookie that has the browser show the token from now on.
pub(super) fn cookie(label: &str, token: &str, secure: bool) -> Option<HeaderValue> {
    let secure = if secure { "; Secure" } else { "" };
    HeaderValue::try_from(format!("{COOKIE_PREFIX}{label}={token}; Path=/; HttpOnly; SameSite=Lax{secure}")).ok()
}

/// Removes what a service sets under our names.
pub(super) fn strip_set_cookies(headers: &mut HeaderMap, own_cookies: &[&str]) {
    let ours = |value: &HeaderValue| is_ours(value.as_bytes().split(|byte| *byte == b';').next(), own_cookies);
    if !headers.get_all(header::SET_COOKIE).iter().any(ours) {
        return;
    }
    let kept: Vec<HeaderValue> =
        headers.get_all(header::SET_COOKIE).iter().filter(|value| !ours(value)).cloned().collect();
    headers.remove(header::SET_COOKIE);
    for value in kept {
        headers.append(header::SET_COOKIE, value);
    }
}

/// Whether a pair of a cookie's name and value is one of ours. A browser takes the value of one without a name for the
/// whole pair, so that `=name=value` comes back as `name=value`.
fn is_ours(pair: Option<&[u8]>, own_cookies: &[&str]) -> bool {
    let blank = |byte: &u8| *byte == b' ' || *byte == b'\t' || *byte == b'=';
    let pair = pair.unwrap_or_default();
    let pair = &pair[pair.iter().position(|byte| !blank(byte)).unwrap_or(pair.len())..];
    let name = pair.split(|byte| *byte == b'=').next().unwrap_or_default().trim_ascii_end();
    name.starts_with(COOKIE_PREFIX.as_bytes()) || own_cookies.iter().any(|own| own.as_bytes() == name)
}

/// Removes our cookies, those of other previews included; returns the one of this label.
fn take_cookies(headers: &mut HeaderMap, label: &str, own_cookies: &[&str]) -> Option<String> {
    let has_ours =
        |value: &HeaderValue| value.as_bytes().split(|byte| *byte == b';').any(|pair| is_ours(Some(pair), own_cookies));
    if !headers.get_all(header::COOKIE).iter().any(has_ours) {
        return None;
    }
    let (mut token, mut kept) = (None, Vec::new());
    for value in headers.get_all(header::COOKIE) {
        for pair in value.as_bytes().split(|byte| *byte == b';').map(<[u8]>::trim_ascii) {
            if !is_ours(Some(pair), own_cookies) {
                kept.push(pair);
            } else if let Some(rest) = pair.strip_prefix(COOKIE_PREFIX.as_bytes()) {
                let value = rest.strip_prefix(label.as_bytes()).and_then(|rest| rest.strip_prefix(b"="));
                token = value.and_then(|value| String::from_utf8(value.to_vec()).ok()).or(token);
            }
        }
    }
    // What is left was part of a value before.
    let rest = HeaderValue::from_bytes(&kept.join(&b"; "[..])).ok().filter(|rest| !rest.is_empty());
    headers.remove(header::COOKIE);
    rest.map(|rest| headers.insert(header::COOKIE, rest));
    token
}

/// Removes our parameter from the query; returns its last value.
fn take_parameter(uri: &mut Uri) -> Option<String> {
    let query = uri.query().filter(|query| query.contains(PARAMETER))?;
    let value_of = |pair: &str| Some(pair.strip_prefix(PARAMETER)?.strip_prefix('=')?.to_owned());
    let token = query.split('&').filter_map(value_of).next_back()?;
    let rest: Vec<&str> = query.split('&').filter(|pair| value_of(pair).is_none()).collect();
    let path = match rest.is_empty() {
        true => uri.path().to_owned(),
        false => format!("{}?{}", uri.path(), rest.join("&")),
    };
    let mut parts = std::mem::take(uri).into_parts();
    // It was part of a URI before.
    parts.path_and_query = PathAndQuery::try_from(path).ok();
    *uri = Uri::from_parts(parts).unwrap_or_default();
    Some(token)
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    const OWN: &[&str] = &["api_session"];

    fn taken(uri: &str, cookies: &[&str]) -> (Option<Shown>, String, Vec<String>) {
        let mut request = Request::get(uri);
        for cookie in cookies {
            request = request.header("cookie", *cookie);
        }
        let mut parts = request.body(()).unwrap().into_parts().0;
        let shown = take(&mut parts, "web", OWN);
        let left = parts.headers.get_all("cookie").iter().map(|value| value.to_str().unwrap().to_owned()).collect();
        (shown, parts.uri.to_string(), left)
    }

    #[test]
    fn a_token_is_taken_out_of_the_url() {
        for (uri, rest) in [
            ("/a?nagaya_viewer_token=t.1", "/a"),
            ("/a?x=1&nagaya_viewer_token=t.1&y", "/a?x=1&y"),
            ("http://h:1/a?nagaya_viewer_token=old&nagaya_viewer_token=t.1", "http://h:1/a"),
        ] {
            let (shown, uri, _) = taken(uri, &["nagaya-viewer-web=older"]);
            assert_eq!(shown, Some(Shown { token: "t.1".into(), in_url: true }));
            assert_eq!(uri, rest);
        }
        let (shown, uri, _) = taken("/a?nagaya_viewer_tokens=1&nagaya_viewer_token", &[]);
        assert_eq!((shown, uri.as_str()), (None, "/a?nagaya_viewer_tokens=1&nagaya_viewer_token"));
    }

    #[test]
    fn our_cookies_are_taken_out_and_the_others_stay() {
        let (shown, _, left) = taken("/", &["a=1; nagaya-viewer-web=t; nagaya-viewer-other=u", "b=2"]);
        assert_eq!(shown, Some(Shown { token: "t".into(), in_url: false }));
        assert_eq!(left, ["a=1; b=2"]);
        assert_eq!(taken("/", &["nagaya-viewer-web2=t"]), (None, "/".into(), vec![]));
        assert_eq!(taken("/", &["a=1; b=2"]).2, ["a=1; b=2"]);
        // The server's own key, however it is written, and nothing that only looks like it.
        assert_eq!(taken("/", &["api_session=k; a=1", "b=2;api_session = k"]).2, ["a=1; b=2"]);
        assert_eq!(taken("/", &["a=1; =api_session=k", "api_session"]).2, ["a=1"]);
        let others = ["api_sessions=1; my_api_session=2; a=api_session=3"];
        assert_eq!(taken("/", &others).2, others);
    }

    #[test]
    fn what_cannot_be_a_token_is_none() {
        assert_eq!(taken("/?nagaya_viewer_token=%00", &[]).0, None);
        assert_eq!(taken(&format!("/?nagaya_viewer_token={}", "a".repeat(513)), &[]).0, None);
    }

    #[test]
    fn services_cannot_set_our_cookies() {
        let mut headers = HeaderMap::new();
        for value in [
            "a=1; Path=/",
            " nagaya-viewer-web=stolen",
            "b=2",
            "api_session=forged; Domain=p.example",
            "\tapi_session\t=forged",
            "=api_session=forged",
            " = =nagaya-viewer-web=forged",
            "api_session",
            "api_session; Path=/",
        ] {
            headers.append("set-cookie", value.parse().unwrap());
        }
        strip_set_cookies(&mut headers, OWN);
        let left: Vec<_> = headers.get_all("set-cookie").iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(left, ["a=1; Path=/", "b=2"]);
    }
}
