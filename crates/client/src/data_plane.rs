//! The way to a session's data plane: its endpoint, a certificate that is kept fresh, and what is tried again.
//!
//! A certificate is minted at the first use, or taken from an answer that came with one. It is renewed in the
//! background at half of its life for as long as a handle on the session exists. Streams that run are not touched by
//! that: certificates are looked at when a call begins.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use buffa::EnumValue;
use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::tenki::v1;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::client::DataClient;
use crate::error::is_refused_stream;
use crate::{Client, Error, RefusalKind, Result, Status, wire};

/// The pause after each attempt grows by this, up to the maximum.
const RETRY_STEP: Duration = Duration::from_millis(50);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(750);
/// How often a call that was not begun is repeated, and the pause that grows with each.
const REFUSED_RETRIES: u32 = 3;
const REFUSED_STEP: Duration = Duration::from_millis(150);
/// A certificate with less life than this is as good as expired.
const EXPIRY_MARGIN: Duration = Duration::from_millis(10);
const RENEWAL_PAUSE_MIN: Duration = Duration::from_secs(1);
/// Where every sandbox has a directory.
const PROBED_PATH: &str = "/home/tenki";

pub(crate) struct DataPlane {
    client: Client,
    session_id: String,
    /// Held while a certificate is minted, so that callers who come meanwhile use the same one.
    route: Mutex<Option<Route>>,
}

struct Route {
    data: DataClient,
    endpoint: String,
    /// Which minting this came from; a later one has a greater number.
    generation: u64,
    expires: Option<Instant>,
    renewal: AbortHandle,
}

impl Drop for Route {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// A client of the data plane that can be used now.
#[derive(Clone)]
pub(crate) struct Open {
    pub(crate) data: DataClient,
    generation: u64,
}

impl DataPlane {
    pub(crate) fn new(client: Client, session_id: String) -> Arc<Self> {
        Arc::new(Self { client, session_id, route: Mutex::new(None) })
    }

    /// The data plane, with a certificate that is valid as far as this side can tell.
    pub(crate) async fn open(self: &Arc<Self>) -> Result<Open> {
        let mut route = self.route.lock().await;
        let usable = |route: &&Route| route.expires.is_none_or(|at| at > Instant::now() + EXPIRY_MARGIN);
        if let Some(route) = route.as_ref().filter(usable) {
            return Ok(Open { data: route.data.clone(), generation: route.generation });
        }
        self.mint_until_ready(&mut route).await
    }

    /// A new certificate in place of one that was refused, unless there is a newer one already.
    async fn reopen(self: &Arc<Self>, refused: &Open) -> Result<Open> {
        let mut route = self.route.lock().await;
        match route.as_ref().filter(|route| route.generation > refused.generation) {
            Some(route) => Ok(Open { data: route.data.clone(), generation: route.generation }),
            None => self.mint_until_ready(&mut route).await,
        }
    }

    /// One call with an answer. It is repeated when the server did not begin with it, with a new certificate when the
    /// old one was refused, and while there is no route.
    pub(crate) async fn call<T, F>(self: &Arc<Self>, call: impl Fn(DataClient) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, ConnectError>>,
    {
        let deadline = Instant::now() + self.client.ready_timeout();
        let mut open = self.open().await?;
        let (mut refused, mut unready, mut reminted) = (0, 0, false);
        loop {
            let error = match call(open.data.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if error.code == ErrorCode::Unauthenticated && !reminted {
                reminted = true;
                open = self.reopen(&open).await?;
            } else if is_refused_stream(&error) && refused < REFUSED_RETRIES {
                refused += 1;
                tokio::time::sleep(jittered(REFUSED_STEP * refused)).await;
            } else {
                match Error::of_rpc(error) {
                    Error::Refused { kind: RefusalKind::DataPlaneNotReady, .. } if Instant::now() < deadline => {
                        retry_pause(&mut unready).await
                    }
                    other => return Err(other),
                }
            }
        }
    }

    /// Takes a route that came with another answer, where it is complete and proven.
    pub(crate) async fn offer(
        self: &Arc<Self>,
        endpoint: String,
        credential: Option<v1::SessionCredential>,
        status: EnumValue<v1::DataPlaneRouteStatus>,
    ) {
        let Some(credential) = credential.filter(|credential| !credential.credential.is_empty()) else { return };
        if !endpoint.is_empty() && status.as_known() == Some(v1::DataPlaneRouteStatus::Verified) {
            let mut route = self.route.lock().await;
            // One that is no use is not worth an error: the first use asks for another.
            let _ = self.install(&mut route, endpoint, credential);
        }
    }

    /// Forgets the route: the session's sandbox went, or is another one now.
    pub(crate) async fn forget(&self) {
        *self.route.lock().await = None;
    }

    async fn mint_until_ready(self: &Arc<Self>, route: &mut Option<Route>) -> Result<Open> {
        let budget = self.client.ready_timeout();
        let deadline = Instant::now() + budget;
        let mut attempt = 0;
        loop {
            let error = match self.mint(route).await {
                Ok(open) => return Ok(open),
                Err(error) => error,
            };
            if !comes_with_time(&error) || Instant::now() >= deadline {
                return Err(error);
            }
            retry_pause(&mut attempt).await;
        }
    }

    /// One attempt at a certificate and at a route that serves.
    async fn mint(self: &Arc<Self>, route: &mut Option<Route>) -> Result<Open> {
        let request = v1::CreateSessionCredentialRequest { session_id: self.session_id.clone() };
        let answer = self.client.control().create_session_credential(request).await.map_err(Error::of_rpc)?;
        let status = answer.route_status.as_known();
        let no_route = |kind, message: &str| Error::refused(kind, Status::Unavailable, message);
        match status {
            Some(v1::DataPlaneRouteStatus::Failed) => {
                return Err(no_route(
                    RefusalKind::InvalidState,
                    "the session's data plane has no route and will not get one",
                ));
            }
            Some(v1::DataPlaneRouteStatus::NotReady) => {
                return Err(no_route(RefusalKind::DataPlaneNotReady, "its route is being made"));
            }
            _ => {}
        }
        let known = route.as_ref().map(|route| route.endpoint.clone());
        let endpoint = Some(answer.data_plane_endpoint).filter(|endpoint| !endpoint.is_empty()).or(known);
        let endpoint = endpoint.ok_or_else(|| no_route(RefusalKind::DataPlaneNotReady, "it has no endpoint yet"))?;
        let credential = answer.credential.into_option().filter(|credential| !credential.credential.is_empty());
        let credential = credential.ok_or_else(|| Error::bad_answer("it holds no certificate"))?;
        let open = self.install(route, endpoint, credential)?;
        if status != Some(v1::DataPlaneRouteStatus::Verified)
            && let Err(error) = self.probe(&open.data).await
        {
            *route = None;
            return Err(error);
        }
        Ok(open)
    }

    /// Fails only when a proxy answers in the data plane's place.
    async fn probe(&self, data: &DataClient) -> Result<()> {
        let request = v1::StatRequest { session_id: self.session_id.clone(), path: PROBED_PATH.into() };
        let request = v1::SandboxSessionDataPlaneServiceStatRequest { request: request.into() };
        match data.stat(request).await.map_err(Error::of_rpc) {
            Err(error @ Error::Refused { kind: RefusalKind::DataPlaneNotReady, .. }) => Err(error),
            _ => Ok(()),
        }
    }

    fn install(
        self: &Arc<Self>,
        route: &mut Option<Route>,
        endpoint: String,
        credential: v1::SessionCredential,
    ) -> Result<Open> {
        let data = self.client.data_plane(&endpoint, &credential.credential)?;
        let generation = route.as_ref().map_or(0, |route| route.generation) + 1;
        // By this side's clock. One that is said to have no life left is used, not replaced again and again.
        let life = wire::time(credential.expires_at).and_then(|at| at.duration_since(SystemTime::now()).ok());
        let life = life.filter(|life| *life > EXPIRY_MARGIN);
        let renewal = tokio::spawn(renew(Arc::downgrade(self), life.map(|life| life / 2))).abort_handle();
        let expires = life.and_then(|life| Instant::now().checked_add(life));
        *route = Some(Route { data: data.clone(), endpoint, generation, expires, renewal });
        Ok(Open { data, generation })
    }
}

/// Renews a certificate after this time, once for all: the new one has a renewal of its own.
async fn renew(plane: Weak<DataPlane>, after: Option<Duration>) {
    let Some(after) = after else { return };
    tokio::time::sleep(after.max(RENEWAL_PAUSE_MIN)).await;
    loop {
        let Some(plane) = plane.upgrade() else { return };
        // This task ends when its route is replaced, so the replacement is a task of its own.
        let renewed = tokio::spawn(async move {
            let mut route = plane.route.lock().await;
            plane.mint(&mut route).await.map(drop)
        });
        match renewed.await {
            Ok(Err(error)) if !is_final(&error) => tokio::time::sleep(RENEWAL_PAUSE_MIN).await,
            _ => return,
        }
    }
}

/// Whether a session that is refused so may be usable a little later, without anybody doing anything.
fn comes_with_time(error: &Error) -> bool {
    match error {
        Error::Refused { kind: RefusalKind::DataPlaneNotReady, .. } => true,
        Error::Refused { kind: RefusalKind::InvalidState, status, message, .. } => {
            *status == Status::FailedPrecondition
                && !["state=PAUSED", "state=USER_SHUTDOWN", "state=TERMINATING"]
                    .iter()
                    .any(|state| message.contains(state))
        }
        _ => false,
    }
}

/// Whether there is no use in renewing: the next call will find out and say so.
fn is_final(error: &Error) -> bool {
    match error {
        Error::Refused {
            kind:
                RefusalKind::SessionNotFound
                | RefusalKind::SessionTerminated
                | RefusalKind::SessionExpired
                | RefusalKind::Unauthorized
                | RefusalKind::PermissionDenied,
            ..
        } => true,
        Error::Refused { kind: RefusalKind::InvalidState, .. } => !comes_with_time(error),
        _ => false,
    }
}

pub(crate) async fn retry_pause(attempt: &mut u32) {
    *attempt += 1;
    tokio::time::sleep((RETRY_STEP * *attempt).min(RETRY_PAUSE_MAX)).await;
}

/// A pause that differs by up to a quarter, so that clients do not come back all at once.
pub(crate) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.75 + fastrand::f64() / 2.0)
}
