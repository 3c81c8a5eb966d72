//! The control plane: reads a request, asks the engine, writes the answer.

use std::time::{Duration, Instant};

use connectrpc::RequestContext;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, SnapshotId};
use nagaya_api::tenki::limits::TERMINATE_BATCH_MAX;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::{Session, SessionState, WakeOnVisit};
use nagaya_engine::{Caller, ListSessions, NewExecution, NewSession, SessionUpdate};

use super::messages;
use super::ranges;
use super::resources;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse;
use crate::rpc::parse::{invalid, milliseconds, workspace};
use crate::rpc::service::caller;
use crate::waiting;

/// What the clients write for "whoever I am".
const OWNER_SELF: &str = "self";

impl TenkiService {
    pub(super) async fn who_am_i(
        &self,
        context: &RequestContext,
        _: wire::WhoAmIRequest,
    ) -> Result<wire::WhoAmIResponse, Error> {
        let caller = &caller(context)?;
        let workspace = self.engine.workspace(caller);
        let id = workspace.id.to_string();
        Ok(wire::WhoAmIResponse {
            owner_type: convert::OWNER_TYPE.into(),
            owner_id: caller.key_id.to_string(),
            workspaces: vec![wire::WhoAmIWorkspace {
                workspace_id: id.clone(),
                name: workspace.name,
                projects: vec![wire::WhoAmIProject { project_id: id, name: "default".into() }],
            }],
        })
    }

    pub(super) async fn create_session(
        &self,
        context: &RequestContext,
        request: wire::CreateSessionRequest,
    ) -> Result<wire::CreateSessionResponse, Error> {
        let started = Instant::now();
        let caller = caller(context)?;
        let hold = if request.wait_ready || request.wait_for_runtime {
            self.time_to_answer(context)
        } else {
            Some(self.create_hold)
        };
        let session = self.engine.create_session(&caller, new_session(request)?).await?;
        let session = waiting::created(&self.engine, &caller, session.id, hold).await?;
        if let Some(error) = refused_for_capacity(&session) {
            return Err(error);
        }
        if session.state == SessionState::Running {
            self.metrics.session_created(started.elapsed());
        }
        let route = self.route(self.endpoint(context), &caller, session).await;
        Ok(wire::CreateSessionResponse {
            session: route.session.into(),
            data_plane_endpoint: route.endpoint,
            credential: route.credential.into(),
            route_status: route.status.into(),
        })
    }

    pub(super) fn time_to_answer(&self, context: &RequestContext) -> Option<Duration> {
        waiting::time_to_answer(context.time_remaining(), self.deadline_margin)
    }

    pub(super) async fn create_session_credential(
        &self,
        context: &RequestContext,
        request: wire::CreateSessionCredentialRequest,
    ) -> Result<wire::CreateSessionCredentialResponse, Error> {
        let id = convert::id(&request.session_id, "session_id")?;
        let (certificate, _) = self.engine.certificate(&caller(context)?, id).await?;
        Ok(wire::CreateSessionCredentialResponse {
            credential: messages::credential(certificate).into(),
            data_plane_endpoint: self.endpoint(context),
            route_status: wire::DataPlaneRouteStatus::Verified.into(),
        })
    }

    pub(super) async fn get_session(
        &self,
        context: &RequestContext,
        request: wire::GetSessionRequest,
    ) -> Result<wire::GetSessionResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let session = self.engine.session(caller, id).await?;
        Ok(wire::GetSessionResponse { session: convert::session(session).into() })
    }

    pub(super) async fn list_sessions(
        &self,
        context: &RequestContext,
        request: wire::ListSessionsRequest,
    ) -> Result<wire::ListSessionsResponse, Error> {
        let list = List {
            owner_id: request.owner_id,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.sessions_page(&caller(context)?, list).await?;
        Ok(wire::ListSessionsResponse { sessions, next_page_token })
    }

    pub(super) async fn list_workspace_sandboxes(
        &self,
        context: &RequestContext,
        request: wire::ListWorkspaceSandboxesRequest,
    ) -> Result<wire::ListWorkspaceSandboxesResponse, Error> {
        let list = List {
            workspace_id: convert::or_none(&request.workspace_id).map(str::to_owned),
            state: request.state,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.sessions_page(&caller(context)?, list).await?;
        Ok(wire::ListWorkspaceSandboxesResponse { sessions, next_page_token })
    }

    pub(super) async fn list_project_sandboxes(
        &self,
        context: &RequestContext,
        request: wire::ListProjectSandboxesRequest,
    ) -> Result<wire::ListProjectSandboxesResponse, Error> {
        let list = List {
            workspace_id: request.workspace_id,
            project_id: Some(request.project_id),
            state: request.state,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.sessions_page(&caller(context)?, list).await?;
        Ok(wire::ListProjectSandboxesResponse { sessions, next_page_token })
    }

    /// One page for all three list rpcs, which differ in little but their names.
    async fn sessions_page(&self, caller: &Caller, list: List) -> Result<(Vec<wire::SandboxSession>, String), Error> {
        let owner_id = match list.owner_id.as_str() {
            "" => None,
            OWNER_SELF => Some(caller.key_id.to_string()),
            other => Some(other.to_owned()),
        };
        let page_size = ranges::page_size(list.page_size)?;
        let list = ListSessions {
            workspace_id: workspace(list.workspace_id.as_deref(), list.project_id.as_deref())?,
            owner_id,
            state: convert::state_filter(list.state)?,
            tags: list.tags,
            sticky: list.sticky,
            include_terminated: list.include_terminated,
            page_size,
            page_token: list.page_token,
        };
        let (sessions, next_page_token) = self.engine.list_sessions(caller, list).await?;
        Ok((sessions.into_iter().map(convert::session).collect(), next_page_token))
    }

    pub(super) async fn update_session(
        &self,
        context: &RequestContext,
        request: wire::UpdateSessionRequest,
    ) -> Result<wire::UpdateSessionResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let update = SessionUpdate {
            tags: ranges::updated_tags(request.tags, request.clear_tags)?,
            name: request.name.map(ranges::name).transpose()?,
            sticky: request.sticky,
            max_duration_ms: milliseconds(request.max_duration.as_option(), "max_duration")?,
            ..SessionUpdate::default()
        };
        let session = self.engine.update_session(caller, id, update).await?;
        Ok(wire::UpdateSessionResponse { session: convert::session(session).into() })
    }

    pub(super) async fn extend_session(
        &self,
        context: &RequestContext,
        request: wire::ExtendSessionRequest,
    ) -> Result<wire::ExtendSessionResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let additional_ms = milliseconds(request.additional_duration.as_option(), "additional_duration")?;
        let Some(additional_ms) = additional_ms.filter(|additional_ms| *additional_ms > 0) else {
            return Err(invalid("additional_duration must be given and longer than zero"));
        };
        let session = self.engine.extend_session(caller, id, additional_ms).await?;
        Ok(wire::ExtendSessionResponse { session: convert::session(session).into() })
    }

    pub(super) async fn terminate_session(
        &self,
        context: &RequestContext,
        request: wire::TerminateSessionRequest,
    ) -> Result<wire::TerminateSessionResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let session = self.engine.terminate_session(caller, id).await?;
        Ok(wire::TerminateSessionResponse { session: convert::session(session).into() })
    }

    /// Ends sessions side by side. A failure of one is told in the answer and stops no other.
    pub(super) async fn terminate_sessions(
        &self,
        context: &RequestContext,
        request: wire::TerminateSessionsRequest,
    ) -> Result<wire::TerminateSessionsResponse, Error> {
        let caller = &caller(context)?;
        if !(1..=TERMINATE_BATCH_MAX).contains(&request.session_ids.len()) {
            return Err(invalid("session_ids must hold 1 to 100 ids"));
        }
        let ids: Vec<SessionId> =
            request.session_ids.iter().map(|id| convert::id(id, "session_ids")).collect::<Result<_, _>>()?;
        let ends = ids.into_iter().map(|id| async move { (id, self.engine.terminate_session(caller, id).await) });
        let mut response = wire::TerminateSessionsResponse::default();
        for (id, end) in futures::future::join_all(ends).await {
            match end {
                Ok(session) => response.sessions.push(convert::session(session)),
                Err(error) => response
                    .failures
                    .push(wire::TerminateSessionFailure { session_id: id.to_string(), message: error.to_string() }),
            }
        }
        Ok(response)
    }

    pub(super) async fn pause_session(
        &self,
        context: &RequestContext,
        request: wire::PauseSessionRequest,
    ) -> Result<wire::PauseSessionResponse, Error> {
        let (caller, id) = (caller(context)?, convert::id(&request.session_id, "session_id")?);
        let session = self.reached(context, &caller, id, self.engine.pause_session(&caller, id)).await?;
        Ok(wire::PauseSessionResponse { session: session.into() })
    }

    /// A resume that fails is answered with the session, PAUSED again: it tells why in
    /// `last_resume_error`, which is where clients look for it.
    pub(super) async fn resume_session(
        &self,
        context: &RequestContext,
        request: wire::ResumeSessionRequest,
    ) -> Result<wire::ResumeSessionResponse, Error> {
        let (caller, id) = (caller(context)?, convert::id(&request.session_id, "session_id")?);
        let resume = async {
            match self.engine.resume_session(&caller, id).await {
                Err(error) if error.code == Code::ResumeFailed => self.engine.session(&caller, id).await,
                resumed => resumed,
            }
        };
        let session = self.reached(context, &caller, id, resume).await?;
        Ok(wire::ResumeSessionResponse { session: session.into() })
    }

    /// What a change of state came to or, where it takes longer than the caller waits, how far it is.
    async fn reached(
        &self,
        context: &RequestContext,
        caller: &Caller,
        id: SessionId,
        change: impl Future<Output = Result<Session, Error>>,
    ) -> Result<wire::SandboxSession, Error> {
        let at_most = self.time_to_answer(context);
        let session = waiting::changed(&self.engine, caller, id, change, at_most).await?;
        Ok(convert::session(session))
    }

    pub(super) async fn report_session_activity(
        &self,
        context: &RequestContext,
        request: wire::ReportSessionActivityRequest,
    ) -> Result<wire::ReportSessionActivityResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let at = self.engine.report_activity(caller, id).await?;
        Ok(wire::ReportSessionActivityResponse { last_activity_at: convert::timestamp(at).into() })
    }

    pub(super) async fn get_workspace_sandbox_usage(
        &self,
        context: &RequestContext,
        request: wire::GetWorkspaceSandboxUsageRequest,
    ) -> Result<wire::GetWorkspaceSandboxUsageResponse, Error> {
        let caller = &caller(context)?;
        let asked = workspace(convert::or_none(&request.workspace_id), request.project_id.as_deref())?;
        let usage = self.engine.usage(caller, asked).await?;
        let limit =
            |key: &str, label: &str, unit: wire::SandboxUsageUnit, current: u64, max: Option<u64>, help: &str| {
                wire::WorkspaceSandboxUsageLimit {
                    key: key.into(),
                    label: label.into(),
                    unit: unit.into(),
                    current: convert::saturating(current),
                    max: max.map(convert::saturating),
                    help_text: help.into(),
                }
            };
        use wire::SandboxUsageUnit::{SANDBOX_USAGE_UNIT_BYTES as BYTES, SANDBOX_USAGE_UNIT_COUNT as COUNT};
        let limits = vec![
            limit(
                "active_sessions",
                "Active sessions",
                COUNT,
                usage.active_sessions,
                usage.sessions_max,
                "Sessions that are neither paused nor ended.",
            ),
            limit(
                "cpu_cores",
                "Cores",
                COUNT,
                usage.cpu_millis.div_ceil(1_000),
                None,
                "Cores of the active sessions together.",
            ),
            limit("memory_bytes", "Memory", BYTES, usage.memory_bytes, None, "Memory of the active sessions together."),
            limit(
                "disk_bytes",
                "Disk",
                BYTES,
                usage.disk_bytes,
                None,
                "Disks of the active sessions together, at their full size.",
            ),
        ];
        Ok(wire::GetWorkspaceSandboxUsageResponse { limits })
    }

    pub(super) async fn execute_command(
        &self,
        context: &RequestContext,
        request: wire::ExecuteCommandRequest,
    ) -> Result<wire::ExecuteCommandResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        if request.command.is_empty() {
            return Err(Error::new(Code::InvalidCommand, "command must not be empty"));
        }
        let new = NewExecution {
            command: request.command,
            args: request.args,
            env: request.env,
            timeout_ms: milliseconds(request.timeout.as_option(), "timeout")?.unwrap_or(0),
        };
        let execution = self.engine.execute(caller, id, new, !request.stream_output).await?;
        Ok(wire::ExecuteCommandResponse { execution: messages::execution(execution).into() })
    }
}

/// What the list rpcs ask for.
#[derive(Default)]
pub(super) struct List {
    /// Absent, or an id.
    pub(super) workspace_id: Option<String>,
    pub(super) project_id: Option<String>,
    pub(super) owner_id: String,
    pub(super) state: buffa::EnumValue<wire::SessionState>,
    pub(super) tags: Vec<String>,
    pub(super) sticky: Option<bool>,
    pub(super) include_terminated: bool,
    pub(super) page_size: i32,
    pub(super) page_token: String,
}

/// Reads a create request. Flags that are absent are off (see docs/decisions/0003).
fn new_session(mut request: wire::CreateSessionRequest) -> Result<NewSession, Error> {
    if request.owner_id.is_empty() {
        return Err(invalid("owner_id must not be empty"));
    }
    if !matches!(request.owner_type.as_str(), "SERVICE" | "USER") {
        return Err(invalid("owner_type must be SERVICE or USER"));
    }
    check_source(&request)?;
    refuse_what_is_not_built(&request)?;
    let idle_timeout_minutes = request
        .idle_timeout_minutes
        .map(|minutes| u32::try_from(minutes).map_err(|_| invalid("idle_timeout_minutes must not be negative")))
        .transpose()?;
    Ok(NewSession {
        workspace_id: workspace(request.workspace_id.as_deref(), request.project_id.as_deref())?,
        max_duration_ms: milliseconds(request.max_duration.as_option(), "max_duration")?,
        pause_retention_ms: milliseconds(request.pause_retention.as_option(), "pause_retention")?,
        name: ranges::name(request.name)?,
        name_is_unique: false,
        image: request.registry_ref.filter(|image| !image.is_empty()),
        driver: request.metadata.remove(convert::DRIVER_KEY),
        wake_on_visit: request.metadata.remove(convert::WAKE_ON_VISIT_KEY).as_deref().map(wake_on_visit).transpose()?,
        cpu_millis: request.cpu_cores.map(resources::cpu_cores).transpose()?,
        memory_bytes: request.memory_mb.map(resources::memory_mb).transpose()?,
        disk_bytes: request.disk_size_gb.map(resources::disk_size_gb).transpose()?,
        default_resources: resources::DEFAULT_RESOURCES,
        env: request.env,
        metadata: request.metadata,
        tags: ranges::tags(request.tags)?,
        inbound: request.allow_inbound.unwrap_or(false),
        outbound: request.allow_outbound.unwrap_or(false),
        egress: request.egress.into_option().map(ranges::egress).transpose()?,
        ssh_authorized_keys: request.ssh_authorized_keys,
        sticky: request.sticky,
        idle_timeout_minutes,
        snapshot_id: convert::optional_id(request.snapshot_id.as_deref(), "snapshot_id")?,
        mounts: request.volumes.into_iter().map(parse::mount).collect::<Result<_, _>>()?,
    })
}

/// Which visits resume a session, as its metadata asks for it.
fn wake_on_visit(name: &str) -> Result<WakeOnVisit, Error> {
    WakeOnVisit::from_name(name).ok_or_else(|| {
        let known = WakeOnVisit::ALL.map(WakeOnVisit::name).join(", ");
        invalid(&format!("metadata {} is {name:?}, but must be one of {known}", convert::WAKE_ON_VISIT_KEY))
    })
}

/// A session begins with one thing: an image, a snapshot or a template.
fn check_source(request: &wire::CreateSessionRequest) -> Result<(), Error> {
    // Templates have no type of their own yet; an id is an id.
    convert::optional_id::<SnapshotId>(request.template_spec_id.as_deref(), "template_spec_id")?;
    let named = |source: &Option<String>| source.as_deref().is_some_and(|source| !source.is_empty());
    let sources = [&request.registry_ref, &request.snapshot_id, &request.template_spec_id];
    match sources.into_iter().filter(|source| named(source)).count() {
        0 | 1 => Ok(()),
        _ => Err(invalid("registry_ref, snapshot_id and template_spec_id exclude each other")),
    }
}

/// A field that asks for something this server cannot do yet must not be ignored.
fn refuse_what_is_not_built(request: &wire::CreateSessionRequest) -> Result<(), Error> {
    let named = |id: &Option<String>| id.as_deref().is_some_and(|id| !id.is_empty());
    let asked = [
        ("template_spec_id", named(&request.template_spec_id)),
        ("setup_env", !request.setup_env.is_empty()),
        ("setup_secrets", !request.setup_secrets.is_empty()),
        ("clone_repo_url", !request.clone_repo_url.is_empty()),
        ("enable_opencode", request.enable_opencode),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((field, _)) => Err(Error::new(Code::Unimplemented, format!("field {field} of CreateSession"))),
        None => Ok(()),
    }
}

/// A session that ended before it began because the server was full is an error of its creation.
fn refused_for_capacity(session: &Session) -> Option<Error> {
    if !session.state.is_terminal() || session.ready_at.is_some() {
        return None;
    }
    session.exhausted.map(|limit| Error::new(Code::CapacityUnavailable, limit.name()))
}
