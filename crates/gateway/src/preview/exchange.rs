//! One request to a service, and its answer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper::body::{Body, Incoming};
use nagaya_api::error::{Code, Error};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::body::{Gate, Progress, Upload};
use super::connection::{Answer, Connection, TooLate};
use super::pool::{Entered, Lease};
use crate::config::PreviewsConfig;

/// Sends the request, on a kept connection if there is one, and waits for the answer's header.
pub(super) async fn exchange(
    entered: Entered,
    parts: Parts,
    body: Incoming,
    config: &PreviewsConfig,
) -> Result<(Response<Incoming>, Lease), Error> {
    // What changes nothing may be sent twice; a body cannot, since nobody keeps what was sent of it.
    let again = (is_idempotent(&parts.method) && body.is_end_stream()).then(|| parts.clone());
    let (mut request, upload) = request(parts, body);
    let wants_upgrade = request.headers().contains_key(header::UPGRADE);

    if !wants_upgrade && let Some(mut kept) = entered.kept() {
        match answer(&mut kept, request, config, upload.as_deref()).await? {
            Ok(response) => return Ok((response, Lease::new(kept, entered, upload))),
            // The service may close a kept connection at any time, also just now.
            Err(mut failed) => {
                request = match (failed.take_message(), again) {
                    (Some(unsent), _) => unsent,
                    (None, Some(parts)) if failed.error().is_incomplete_message() || is_reset(failed.error()) => {
                        Request::from_parts(parts, Upload::Nothing)
                    }
                    (None, _) => return Err(broken(failed.error())),
                };
            }
        }
    }
    let mut fresh = entered.connect(config.connect_timeout()).await?;
    match answer(&mut fresh, request, config, upload.as_deref()).await? {
        Ok(response) => Ok((response, Lease::new(fresh, entered, upload))),
        Err(failed) => Err(broken(failed.error())),
    }
}

fn request(parts: Parts, incoming: Incoming) -> (Request<Upload>, Option<Arc<Progress>>) {
    if incoming.is_end_stream() {
        return (Request::from_parts(parts, Upload::Nothing), None);
    }
    let progress = Progress::new();
    let (gate, wanted) = match expects_continue(&parts.headers) {
        true => {
            let (open, opened) = oneshot::channel();
            (Some(Gate::new(opened)), Some(open))
        }
        false => (None, None),
    };
    let body = Upload::Body { incoming, progress: Arc::clone(&progress), gate };
    let mut request = Request::from_parts(parts, body);
    if let Some(wanted) = wanted {
        let wanted = Mutex::new(Some(wanted));
        hyper::ext::on_informational(&mut request, move |response| {
            let wanted = wanted.lock().ok().and_then(|mut wanted| wanted.take());
            if let (Some(wanted), StatusCode::CONTINUE) = (wanted, response.status()) {
                // Nobody listens when the service was slow and the body is on its way already.
                let _ = wanted.send(());
            }
        });
    }
    (request, Some(progress))
}

pub(super) fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Waits while something happens: an upload may take as long as it takes.
async fn answer(
    connection: &mut Connection,
    request: Request<Upload>,
    config: &PreviewsConfig,
    upload: Option<&Progress>,
) -> Result<Answer, Error> {
    let patience = config.answer_timeout();
    let begun = Instant::now();
    let last = || upload.map_or(begun, |upload| Instant::from_std(upload.last()));
    let answered = connection.send(request, begun + patience, || last() + patience).await;
    answered.map_err(|TooLate| too_slow(patience))
}

fn too_slow(timeout: Duration) -> Error {
    Error::new(Code::ServiceTimedOut, format!("previews.answer_timeout_ms is {}", timeout.as_millis()))
}

fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

/// Whether the connection was reset, which services do with connections that they had closed already.
fn is_reset(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|error| {
        use std::io::ErrorKind as Kind;
        matches!(error.kind(), Kind::ConnectionReset | Kind::BrokenPipe | Kind::ConnectionAborted)
    })
}

fn broken(error: &hyper::Error) -> Error {
    tracing::debug!(%error, "a service in a sandbox gave no valid answer");
    if error.is_user() {
        return Error::new(Code::InvalidArgument, "the request's body broke off");
    }
    let detail = match () {
        () if error.is_parse_too_large() => "the header of its answer is too large",
        () if error.is_parse() => "what it answered is not HTTP/1.1",
        () if error.is_incomplete_message() => "it closed the connection before its answer was complete",
        () => "the connection to it broke",
    };
    Error::new(Code::ServiceBroken, detail)
}
