//! The control plane: who the caller is, and the sessions of a workspace.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::Protocol;
use connectrpc::client::ClientConfig;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use nagaya_api::nagaya::v1::NagayaServiceClient;
use nagaya_api::tenki::limits::{PAGE_SIZE_MAX, TERMINATE_BATCH_MAX};
use nagaya_api::tenki::v1::{
    self, SandboxServiceClient, SandboxSessionDataPlaneServiceClient, SshGatewayClientServiceClient,
};
use serde::Serialize;

use crate::constants::CONTROL_CALL_TIMEOUT;
use crate::settable::settable;
use crate::transport::{Connections, Transport};
use crate::{ClientOptions, CreateOptions, Error, Result, Session, SessionInfo, Wait, create, options};

/// A whole message of a server. Files come in pieces, so that only lists can become large.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// What all parts of such a message may take in memory.
const MESSAGE_MEMORY_BYTES_MAX: usize = 256 << 20;
pub(crate) const PAGE_SIZE: i32 = PAGE_SIZE_MAX as i32;

pub(crate) type DataClient = SandboxSessionDataPlaneServiceClient<Transport>;

/// A caller at a server. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: Uri,
    headers: HeaderMap,
    gateway: Option<String>,
    ready_timeout: Duration,
    connections: Connections,
    transport: Transport,
    control: SandboxServiceClient<Transport>,
    own: NagayaServiceClient<Transport>,
    gateways: SshGatewayClientServiceClient<Transport>,
}

settable! {
    /// Which sessions [`Client::list`] tells of: all that have not ended, by default.
    #[derive(Debug, Clone, Default)]
    pub struct ListOptions {
        /// Empty: the caller's own.
        pub workspace_id: String,
        /// Only those that have all of these.
        pub tags: Vec<String>,
        pub sticky: Option<bool>,
        pub include_terminated: bool,
    }
}

/// What [`Client::terminate_many`] did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TerminateMany {
    pub sessions: Vec<SessionInfo>,
    pub failures: Vec<TerminateFailure>,
}

#[derive(Debug, Clone, Serialize)]
pub struct TerminateFailure {
    pub session_id: String,
    pub message: String,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoint", &self.shared.endpoint).finish_non_exhaustive()
    }
}

impl Client {
    /// A client with these options. Connects when it is first used.
    ///
    /// Fails with [`Error::MissingToken`], [`Error::InvalidToken`] or [`Error::InvalidOptions`].
    pub fn new(options: ClientOptions) -> Result<Self> {
        let endpoint = options.origin()?;
        let headers = options.headers()?;
        let connections = Connections::new(options.root_certificates, options.connect_timeout)?;
        let transport = connections.to(&endpoint)?;
        let config = configuration(endpoint.clone(), headers.clone()).with_default_timeout(CONTROL_CALL_TIMEOUT);
        Ok(Self {
            shared: Arc::new(Shared {
                control: SandboxServiceClient::new(transport.clone(), config.clone()),
                own: NagayaServiceClient::new(transport.clone(), config.clone()),
                gateways: SshGatewayClientServiceClient::new(transport.clone(), config),
                endpoint,
                headers,
                gateway: options.gateway,
                ready_timeout: options.data_plane_ready_timeout,
                connections,
                transport,
            }),
        })
    }

    /// A client as [`ClientOptions::from_env`] describes it.
    pub fn from_env() -> Result<Self> {
        Self::new(ClientOptions::from_env())
    }

    /// Scheme, host and port of the server.
    pub fn endpoint(&self) -> String {
        self.shared.endpoint.to_string().trim_end_matches('/').to_owned()
    }

    /// Makes a session, and waits for it as the options say.
    ///
    /// Fails with [`Error::InvalidOptions`] or [`Error::InvalidResources`] before anything is sent, and with
    /// [`Error::WaitReadyFailed`], which names the session, when it exists but is not ready in time.
    pub async fn create(&self, options: CreateOptions) -> Result<Session> {
        let request = options.request()?;
        let budget = options.time_to_wait();
        let started = tokio::time::Instant::now();
        let answer = match options.wait {
            Wait::Runtime => self.control_within(budget).create_session(request).await.map_err(Error::of_rpc)?,
            Wait::Ready | Wait::No => self.control().create_session(request).await.map_err(Error::of_rpc)?,
        };
        let created = answer.session.into_option().ok_or_else(|| Error::bad_answer("it names no session"))?;
        let session = self.known(created)?;
        session.offer_route(answer.data_plane_endpoint, answer.credential.into_option(), answer.route_status).await;
        let ready = session.info().is_some_and(|info| info.is_ready());
        if options.wait != Wait::No && !ready {
            session.wait_ready(budget.saturating_sub(started.elapsed())).await?;
        }
        Ok(session)
    }

    /// A session that exists. Fails with [`RefusalKind::SessionNotFound`](crate::RefusalKind::SessionNotFound).
    pub async fn get(&self, id: &str) -> Result<Session> {
        let session = self.session(id);
        session.refresh().await?;
        Ok(session)
    }

    /// A handle on a session, without asking the server.
    pub fn session(&self, id: &str) -> Session {
        Session::new(self.clone(), id.to_owned())
    }

    /// All sessions that the options name, newest first.
    pub async fn list(&self, options: ListOptions) -> Result<Vec<Session>> {
        let tags = create::tags(&options.tags)?;
        let sessions = all_pages(|page_token| {
            let request = v1::ListWorkspaceSandboxesRequest {
                workspace_id: options.workspace_id.clone(),
                page_size: PAGE_SIZE,
                page_token,
                include_terminated: options.include_terminated,
                tags: tags.clone(),
                sticky: options.sticky,
                ..Default::default()
            };
            async move {
                let answer = self.control().list_workspace_sandboxes(request).await.map_err(Error::of_rpc)?;
                Ok((answer.sessions, answer.next_page_token))
            }
        });
        sessions.await?.into_iter().map(|session| self.known(session)).collect()
    }

    /// Ends any number of sessions, and tells which could not be ended.
    pub async fn terminate_many(&self, ids: &[String]) -> Result<TerminateMany> {
        let mut done = TerminateMany::default();
        for batch in ids.chunks(TERMINATE_BATCH_MAX) {
            let request = v1::TerminateSessionsRequest { session_ids: batch.to_vec() };
            let answer = self.control().terminate_sessions(request).await.map_err(Error::of_rpc)?;
            done.sessions.extend(answer.sessions.into_iter().map(SessionInfo::of_wire));
            done.failures.extend(
                answer
                    .failures
                    .into_iter()
                    .map(|failure| TerminateFailure { session_id: failure.session_id, message: failure.message }),
            );
        }
        Ok(done)
    }

    /// A session that a server has just described.
    pub(crate) fn known(&self, session: v1::SandboxSession) -> Result<Session> {
        if session.id.is_empty() {
            return Err(Error::bad_answer("a session without an id"));
        }
        let handle = self.session(&session.id);
        handle.learn(session);
        Ok(handle)
    }

    pub(crate) fn control(&self) -> &SandboxServiceClient<Transport> {
        &self.shared.control
    }

    /// The control plane for one call that may take this long, which the server is told.
    pub(crate) fn control_within(&self, limit: Duration) -> SandboxServiceClient<Transport> {
        SandboxServiceClient::new(self.shared.transport.clone(), self.unlimited().with_default_timeout(limit))
    }

    /// What Nagaya offers beyond the contract.
    pub(crate) fn own(&self) -> &NagayaServiceClient<Transport> {
        &self.shared.own
    }

    /// The same, for streams that last as long as they are wanted.
    pub(crate) fn own_streams(&self) -> NagayaServiceClient<Transport> {
        NagayaServiceClient::new(self.shared.transport.clone(), self.unlimited())
    }

    pub(crate) fn gateways(&self) -> &SshGatewayClientServiceClient<Transport> {
        &self.shared.gateways
    }

    /// The data plane at this endpoint, for the holder of this certificate.
    pub(crate) fn data_plane(&self, endpoint: &str, certificate: &str) -> Result<DataClient> {
        let endpoint = options::origin(endpoint)
            .map_err(|_| Error::bad_answer(format!("{endpoint:?} is not the endpoint of a data plane")))?;
        let mut certificate = HeaderValue::from_str(certificate)
            .map_err(|_| Error::bad_answer("the session's certificate is not text for a header"))?;
        certificate.set_sensitive(true);
        let name = HeaderName::from_static("x-tenki-session-cert");
        let mut headers = HeaderMap::from_iter([(name, certificate)]);
        if let Some(agent) = self.shared.headers.get(http::header::USER_AGENT) {
            headers.insert(http::header::USER_AGENT, agent.clone());
        }
        let transport = self.shared.connections.to(&endpoint)?;
        Ok(DataClient::new(transport, configuration(endpoint, headers)))
    }

    pub(crate) fn endpoint_uri(&self) -> &Uri {
        &self.shared.endpoint
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.shared.headers
    }

    pub(crate) fn gateway(&self) -> Option<&str> {
        self.shared.gateway.as_deref()
    }

    pub(crate) fn connections(&self) -> &Connections {
        &self.shared.connections
    }

    pub(crate) fn ready_timeout(&self) -> Duration {
        self.shared.ready_timeout
    }

    fn unlimited(&self) -> ClientConfig {
        configuration(self.shared.endpoint.clone(), self.shared.headers.clone())
    }
}

fn configuration(endpoint: Uri, headers: HeaderMap) -> ClientConfig {
    ClientConfig::new(endpoint)
        .with_protocol(Protocol::Grpc)
        .with_default_max_message_size(MESSAGE_BYTES_MAX)
        .with_default_element_memory_limit(MESSAGE_MEMORY_BYTES_MAX)
        .with_default_headers(headers)
}

/// All items of a list that comes in pages. `page` gets the token of the page that is wanted.
pub(crate) async fn all_pages<T, F>(mut page: impl FnMut(String) -> F) -> Result<Vec<T>>
where
    F: Future<Output = Result<(Vec<T>, String)>>,
{
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    let mut token = String::new();
    loop {
        let (items, next) = page(token).await?;
        all.extend(items);
        if next.is_empty() {
            return Ok(all);
        }
        if !seen.insert(next.clone()) {
            return Err(Error::PaginationStalled { token: next });
        }
        token = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pages(next: impl Fn(&str) -> &'static str) -> Result<Vec<String>> {
        all_pages(|token| {
            let following = next(&token).to_owned();
            async move { Ok((vec![token], following)) }
        })
        .await
    }

    #[tokio::test]
    async fn all_pages_are_read_and_circles_are_noticed() {
        let read = pages(|token| match token {
            "" => "a",
            "a" => "b",
            _ => "",
        });
        assert_eq!(read.await.expect("an end"), ["", "a", "b"]);
        let same = pages(|_| "a").await;
        assert!(matches!(same, Err(Error::PaginationStalled { token }) if token == "a"));
        let circle = pages(|token| if token == "a" { "b" } else { "a" }).await;
        assert!(matches!(circle, Err(Error::PaginationStalled { token }) if token == "a"));
    }

    #[tokio::test]
    async fn options_are_checked_before_anything_happens() {
        assert!(matches!(Client::new(ClientOptions::default()), Err(Error::MissingToken)));
        let of = |endpoint: &str| {
            Client::new(ClientOptions {
                token: Some("tk_x".into()),
                endpoint: Some(endpoint.into()),
                ..Default::default()
            })
        };
        assert_eq!(of("http://a:1/").expect("valid").endpoint(), "http://a:1");
        assert!(matches!(of("a:1"), Err(Error::InvalidOptions(_))));
    }
}
