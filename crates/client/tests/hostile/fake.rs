//! A server that says what a test wants it to say.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use connectrpc::{ConnectError, ConnectRpcService, RequestContext, Response, Router, ServiceResult, ServiceStream};
use nagaya_api::tenki::v1;
use nagaya_client::{Client, ClientOptions, Session};
use tokio::net::TcpListener;
use tokio::sync::watch;
use v1::run_response::Payload;

pub const ID: &str = "0190a000-0000-7000-8000-000000000000";

/// What the server does.
pub struct Script {
    /// As many of the first certificates are refused by the data plane.
    pub certificates_refused: u32,
    pub certificate_life: Duration,
    /// As many of the first calls of the data plane meet a proxy that knows no such path.
    pub lost_calls: AtomicU32,
    /// What CreateSession and then each GetSession say; the last one goes on.
    pub states: Vec<v1::SessionState>,
    /// What WaitSession tells before it ends; `None`: there is no such rpc.
    pub told: Option<Vec<v1::SessionState>>,
    /// What Run answers before it ends.
    pub run: Vec<Payload>,
    /// The session that answers are about.
    pub answers_about: String,
    /// What the data plane is said to be; the server itself when empty.
    pub endpoint: String,
    /// The next page, of each page.
    pub next_page: fn(&str) -> &'static str,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            certificates_refused: 0,
            certificate_life: Duration::from_secs(600),
            lost_calls: AtomicU32::new(0),
            states: vec![v1::SessionState::Running],
            told: None,
            run: Vec::new(),
            answers_about: ID.into(),
            endpoint: String::new(),
            next_page: |_| "",
        }
    }
}

struct Fake {
    script: Script,
    endpoint: String,
    asked: AtomicU32,
    minted: watch::Sender<u32>,
    calls: Arc<AtomicU32>,
}

/// The server, and what it was asked so far.
pub struct Served {
    pub client: Client,
    pub minted: watch::Receiver<u32>,
    /// Calls of the data plane.
    pub calls: Arc<AtomicU32>,
}

impl Served {
    pub fn session(&self) -> Session {
        self.client.session(ID)
    }
}

pub async fn serve(script: Script) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (minted, watched) = watch::channel(0);
    let calls = Arc::<AtomicU32>::default();
    let fake = Arc::new(Fake {
        script,
        endpoint: endpoint.clone(),
        asked: AtomicU32::new(0),
        minted,
        calls: Arc::clone(&calls),
    });
    let router = v1::SandboxService::register(Arc::clone(&fake), Router::new());
    let router = v1::SandboxSessionDataPlaneService::register(Arc::clone(&fake), router);
    let lose = axum::middleware::from_fn(move |request: axum::extract::Request, next: axum::middleware::Next| {
        let lost = request.uri().path().contains("DataPlane") && fake.loses_call();
        async move {
            match lost {
                true => axum::response::IntoResponse::into_response(axum::http::StatusCode::NOT_FOUND),
                false => next.run(request).await,
            }
        }
    });
    let app = axum::Router::new().fallback_service(ConnectRpcService::new(router)).layer(lose);
    tokio::spawn(async move { axum::serve(listener, app).await });
    Served { client: client(&endpoint), minted: watched, calls }
}

pub fn client(endpoint: &str) -> Client {
    let options = ClientOptions::default()
        .token(Some("tk_test".into()))
        .endpoint(Some(endpoint.to_owned()))
        .data_plane_ready_timeout(Duration::from_millis(400))
        .connect_timeout(Duration::from_secs(5));
    Client::new(options).unwrap()
}

impl Fake {
    fn loses_call(&self) -> bool {
        let lost = &self.script.lost_calls;
        lost.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn session(&self) -> v1::SandboxSession {
        let states = &self.script.states;
        let asked = self.asked.fetch_add(1, Ordering::Relaxed) as usize;
        self.in_state(states[asked.min(states.len() - 1)])
    }

    fn in_state(&self, state: v1::SessionState) -> v1::SandboxSession {
        v1::SandboxSession {
            id: self.script.answers_about.clone(),
            state: state.into(),
            terminal_error: "the disk was lost".into(),
            ..Default::default()
        }
    }

    /// Looks at the certificate of a call, as a data plane does.
    fn admit(&self, context: &RequestContext) -> Result<(), ConnectError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let number = context.header("x-tenki-session-cert").and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
        match number {
            Some(number) if number > self.script.certificates_refused => Ok(()),
            _ => Err(ConnectError::unauthenticated("missing, expired or foreign session certificate")),
        }
    }
}

impl v1::SandboxService for Fake {
    async fn create_session(
        &self,
        _context: RequestContext,
        _request: v1::CreateSessionRequest,
    ) -> ServiceResult<v1::CreateSessionResponse> {
        Response::ok(v1::CreateSessionResponse { session: self.session().into(), ..Default::default() })
    }

    async fn get_session(
        &self,
        _context: RequestContext,
        _request: v1::GetSessionRequest,
    ) -> ServiceResult<v1::GetSessionResponse> {
        Response::ok(v1::GetSessionResponse { session: self.session().into() })
    }

    async fn wait_session(
        &self,
        _context: RequestContext,
        _request: v1::WaitSessionRequest,
    ) -> ServiceResult<ServiceStream<v1::WaitSessionResponse>> {
        let Some(told) = &self.script.told else { return Err(ConnectError::unimplemented("WaitSession")) };
        let messages: Vec<_> = told
            .iter()
            .map(|state| Ok(v1::WaitSessionResponse { session: self.in_state(*state).into(), ..Default::default() }))
            .collect();
        Ok(Response::stream(futures::stream::iter(messages)))
    }

    async fn create_session_credential(
        &self,
        _context: RequestContext,
        _request: v1::CreateSessionCredentialRequest,
    ) -> ServiceResult<v1::CreateSessionCredentialResponse> {
        let mut number = 0;
        self.minted.send_modify(|minted| {
            *minted += 1;
            number = *minted;
        });
        let expires_at =
            buffa_types::google::protobuf::Timestamp::from(SystemTime::now() + self.script.certificate_life);
        let credential = v1::SessionCredential { credential: number.to_string(), expires_at: expires_at.into() };
        let endpoint = &self.script.endpoint;
        Response::ok(v1::CreateSessionCredentialResponse {
            credential: credential.into(),
            data_plane_endpoint: if endpoint.is_empty() { self.endpoint.clone() } else { endpoint.clone() },
            route_status: v1::DataPlaneRouteStatus::Verified.into(),
        })
    }

    async fn list_workspace_sandboxes(
        &self,
        _context: RequestContext,
        request: v1::ListWorkspaceSandboxesRequest,
    ) -> ServiceResult<v1::ListWorkspaceSandboxesResponse> {
        Response::ok(v1::ListWorkspaceSandboxesResponse {
            sessions: vec![self.session()],
            next_page_token: (self.script.next_page)(&request.page_token).to_owned(),
        })
    }
}

impl v1::SandboxSessionDataPlaneService for Fake {
    async fn stat(
        &self,
        context: RequestContext,
        _request: v1::SandboxSessionDataPlaneServiceStatRequest,
    ) -> ServiceResult<v1::SandboxSessionDataPlaneServiceStatResponse> {
        self.admit(&context)?;
        let response = v1::StatResponse { exists: true, size: -5, modified_unix_ns: i64::MIN, ..Default::default() };
        Response::ok(v1::SandboxSessionDataPlaneServiceStatResponse { response: response.into() })
    }

    async fn run(
        &self,
        context: RequestContext,
        _requests: ServiceStream<v1::SandboxSessionDataPlaneServiceRunRequest>,
    ) -> ServiceResult<ServiceStream<v1::SandboxSessionDataPlaneServiceRunResponse>> {
        self.admit(&context)?;
        let frames = self.script.run.iter().cloned().map(|payload| {
            let frame = v1::RunResponse { payload: Some(payload) };
            Ok(v1::SandboxSessionDataPlaneServiceRunResponse { frame: frame.into() })
        });
        Ok(Response::stream(futures::stream::iter(frames.collect::<Vec<_>>())))
    }
}

/// A server that takes connections and says these bytes on each.
pub async fn babble(bytes: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let kept = Mutex::new(Vec::new());
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut peer, bytes).await;
            if !bytes.is_empty() {
                // Held open: what it said has to be enough to give it up.
                kept.lock().unwrap().push(peer);
            }
        }
    });
    endpoint
}
