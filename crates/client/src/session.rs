//! One session: what it is, and what can be done to it as a whole.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use buffa::EnumValue;
use nagaya_api::tenki::v1;

use crate::data_plane::DataPlane;
use crate::settable::settable;
use crate::{Client, Error, RefusalKind, Result, SessionInfo, SessionState, create, wait, wire};

/// A handle on one session. Cheap to clone; dropping it does not end the session.
#[derive(Clone)]
pub struct Session {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    id: String,
    /// As the server last described it.
    info: Mutex<Option<SessionInfo>>,
    data: Arc<DataPlane>,
}

settable! {
    /// What [`Session::update`] changes; the rest stays.
    #[derive(Debug, Clone, Default)]
    pub struct UpdateOptions {
        pub name: Option<String>,
        /// All tags from now on, which may be none.
        pub tags: Option<Vec<String>>,
        pub sticky: Option<bool>,
        pub max_duration: Option<Duration>,
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(client: Client, id: String) -> Self {
        let data = DataPlane::new(client.clone(), id.clone());
        Self { shared: Arc::new(Shared { client, id, info: Mutex::new(None), data }) }
    }

    pub fn id(&self) -> &str {
        &self.shared.id
    }

    pub fn client(&self) -> &Client {
        &self.shared.client
    }

    /// The session as the server last described it to this handle and its clones; `None` when it never did.
    pub fn info(&self) -> Option<SessionInfo> {
        self.last_seen().clone()
    }

    /// Asks the server how the session is. Fails with [`RefusalKind::SessionNotFound`](crate::RefusalKind::SessionNotFound).
    pub async fn refresh(&self) -> Result<SessionInfo> {
        let request = v1::GetSessionRequest { session_id: self.id().to_owned() };
        self.described(self.client().control().get_session(request).await.map_err(Error::of_rpc)?.session)
    }

    /// Waits until the session is RUNNING.
    ///
    /// Fails with [`RefusalKind::SessionTerminated`](crate::RefusalKind::SessionTerminated) when it ended instead, and with [`Error::WaitReadyFailed`]
    /// when the time is over or the server cannot be asked.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<SessionInfo> {
        wait::ready(self, timeout).await
    }

    /// Waits until a session that is being resumed is RUNNING again.
    ///
    /// Fails with [`Error::ResumeFailed`] when it went back to sleep, else as [`Session::wait_ready`].
    pub async fn wait_resumed(&self, timeout: Duration) -> Result<SessionInfo> {
        wait::resumed(self, timeout).await
    }

    /// Saves the sandbox and frees its machine. Pausing a paused session changes nothing.
    pub async fn pause(&self) -> Result<SessionInfo> {
        let request = v1::PauseSessionRequest { session_id: self.id().to_owned() };
        let answer = self.client().control().pause_session(request).await.map_err(Error::of_rpc)?;
        self.shared.data.forget().await;
        self.described(answer.session)
    }

    /// Brings a paused sandbox back. It is RUNNING or RESUMING afterwards; see [`Session::wait_resumed`].
    pub async fn resume(&self) -> Result<SessionInfo> {
        let request = v1::ResumeSessionRequest { session_id: self.id().to_owned() };
        let answer = self.client().control().resume_session(request).await.map_err(Error::of_rpc)?;
        self.shared.data.forget().await;
        self.described(answer.session)
    }

    /// Moves the time at which the session ends by itself; [`SessionInfo::timeout_at`] is the new one.
    pub async fn extend(&self, by: Duration) -> Result<SessionInfo> {
        let request = v1::ExtendSessionRequest {
            session_id: self.id().to_owned(),
            additional_duration: wire::duration(Some(by)),
        };
        self.described(self.client().control().extend_session(request).await.map_err(Error::of_rpc)?.session)
    }

    pub async fn update(&self, options: UpdateOptions) -> Result<SessionInfo> {
        let request = v1::UpdateSessionRequest {
            session_id: self.id().to_owned(),
            name: options.name,
            clear_tags: options.tags.as_ref().is_some_and(Vec::is_empty),
            tags: create::tags(&options.tags.unwrap_or_default())?,
            sticky: options.sticky,
            max_duration: wire::duration(options.max_duration),
        };
        self.described(self.client().control().update_session(request).await.map_err(Error::of_rpc)?.session)
    }

    /// Replaces all tags.
    pub async fn update_tags(&self, tags: Vec<String>) -> Result<SessionInfo> {
        self.update(UpdateOptions { tags: Some(tags), ..Default::default() }).await
    }

    /// Ends the session for good. Ending an ended one changes nothing.
    pub async fn close(&self) -> Result<SessionInfo> {
        let request = v1::TerminateSessionRequest { session_id: self.id().to_owned() };
        let answer = self.client().control().terminate_session(request).await.map_err(Error::of_rpc)?;
        self.shared.data.forget().await;
        self.described(answer.session)
    }

    /// Ends the session if it exists and has not ended.
    pub async fn close_if_open(&self) -> Result<()> {
        match self.close().await {
            Ok(_) | Err(Error::Refused { kind: RefusalKind::SessionNotFound | RefusalKind::SessionTerminated, .. }) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Restarts the count of idle time; answers the server's time of it.
    pub async fn report_activity(&self) -> Result<Option<SystemTime>> {
        let request = v1::ReportSessionActivityRequest { session_id: self.id().to_owned() };
        let answer = self.client().control().report_session_activity(request).await.map_err(Error::of_rpc)?;
        Ok(wire::time(answer.last_activity_at))
    }

    pub(crate) fn data(&self) -> &Arc<DataPlane> {
        &self.shared.data
    }

    /// Takes note of how the server describes the session.
    pub(crate) fn learn(&self, session: v1::SandboxSession) -> SessionInfo {
        let info = SessionInfo::of_wire(session);
        *self.last_seen() = Some(info.clone());
        info
    }

    /// The same, of an answer that must hold the description.
    pub(crate) fn described(&self, session: impl Into<Option<v1::SandboxSession>>) -> Result<SessionInfo> {
        let session = session.into().ok_or_else(|| Error::bad_answer("it names no session"))?;
        match session.id == self.shared.id {
            true => Ok(self.learn(session)),
            false => Err(Error::bad_answer("it names another session")),
        }
    }

    /// Takes the way to the data plane that came with another answer.
    pub(crate) async fn offer_route(
        &self,
        endpoint: String,
        credential: Option<v1::SessionCredential>,
        status: EnumValue<v1::DataPlaneRouteStatus>,
    ) {
        // Before it is RUNNING a route may still change.
        if self.info().is_some_and(|info| info.state == SessionState::Running) {
            self.shared.data.offer(endpoint, credential, status).await;
        }
    }

    fn last_seen(&self) -> MutexGuard<'_, Option<SessionInfo>> {
        self.shared.info.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
