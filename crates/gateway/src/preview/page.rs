//! Answers of our own: a page for browsers, JSON for everybody else.

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};
use http_body_util::Full;
use nagaya_api::error::{Code, Error};

/// Whoever asked, as far as it matters for the form of our answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct ErrorFormat {
    html: bool,
    head: bool,
}

impl ErrorFormat {
    pub(super) fn of(parts: &Parts) -> Self {
        Self { html: wants_html(&parts.headers), head: parts.method == Method::HEAD }
    }

    pub(super) fn is_browser(self) -> bool {
        self.html
    }

    /// The answer that tells of an error.
    pub(super) fn error(self, error: &Error) -> Response<Full<Bytes>> {
        let status = status(error.code);
        let (kind, text) = match self.html {
            true => ("text/html; charset=utf-8", html(status, error)),
            false => ("application/json", json(error)),
        };
        let length = HeaderValue::from(text.len());
        let body = if self.head { Bytes::new() } else { Bytes::from(text) };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CONTENT_LENGTH, length);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'"),
        );
        response
    }
}

/// Only clients that name HTML get it: browsers when they open a page, not the programs in it.
fn wants_html(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(header::ACCEPT).into_iter();
    accepts.filter_map(|value| value.to_str().ok()).any(|value| value.contains("text/html"))
}

/// What HTTP calls it here: a preview that cannot be shown is not the viewer's mistake as the same code is one of the
/// caller of an rpc.
fn status(code: Code) -> StatusCode {
    match code {
        Code::InboundDisabled => StatusCode::FORBIDDEN,
        Code::SessionTerminated => StatusCode::GONE,
        // It comes back under the same address; until then clients take it for what is not there.
        Code::PreviewPaused => StatusCode::NOT_FOUND,
        Code::SessionNotRunning
        | Code::PreviewUnbound
        | Code::ResumeFailed
        | Code::QuotaExceeded
        | Code::CapacityUnavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::ServiceNotListening | Code::ServiceBroken => StatusCode::BAD_GATEWAY,
        Code::ServiceTimedOut => StatusCode::GATEWAY_TIMEOUT,
        Code::HostRefused => StatusCode::MISDIRECTED_REQUEST,
        other => StatusCode::from_u16(other.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

fn json(error: &Error) -> String {
    let (code, message, remedy) = (error.code.name(), error.to_string(), error.code.remedy());
    serde_json::json!({ "code": code, "message": message, "remedy": remedy }).to_string()
}

fn html(status: StatusCode, error: &Error) -> String {
    let (code, what, remedy) = (error.code.name(), escape(&error.to_string()), escape(error.code.remedy()));
    let reason = status.canonical_reason().unwrap_or("Error");
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{status} {reason}</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:15vh auto;padding:0 1rem}}\
         code{{color:#777}}</style>\n\
         <h1>{reason}</h1>\n<p>{what}.</p>\n<p>{remedy}</p>\n<p><code>{number} {code}</code></p>\n</html>\n",
        status = status.as_u16(),
        number = status.as_u16(),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_page_is_taken_for_markup() {
        let page = html(StatusCode::BAD_GATEWAY, &Error::new(Code::ServiceBroken, "<script>\"&"));
        assert!(page.contains("&lt;script&gt;&quot;&amp;"), "{page}");
        assert!(!page.contains("<script>"));
    }
}
