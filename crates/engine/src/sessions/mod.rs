//! Sessions: what callers ask of them. Making them and opening them are modules below.

mod creation;
mod opening;

use std::collections::BTreeMap;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};
use tokio::sync::watch;

use crate::access::Caller;
use crate::actor::Actors;
use crate::errors::store_error;
use crate::event_log::Events;
use crate::explain::{Finding, explain};
use crate::handle::{Job, Message};
use crate::images::RootImages;
use crate::model::{Connection, Egress, Session, SessionState, UnixMs};
use crate::ports::SessionQuery;
use crate::registry::{Found, Registry};
use crate::requests::{ListSessions, SessionUpdate, Usage};
use crate::session::Request;
use crate::shared::Shared;
use crate::snapshots::Snapshots;
use crate::volumes::Volumes;
use crate::workspaces::Workspaces;
use crate::{egress, query};

/// The sessions of the server.
pub(crate) struct Sessions {
    shared: Arc<Shared>,
    workspaces: Arc<Workspaces>,
    registry: Arc<Registry>,
    events: Arc<Events>,
    images: Arc<RootImages>,
    volumes: Arc<Volumes>,
    snapshots: Arc<Snapshots>,
    actors: Arc<Actors>,
}

impl Sessions {
    #[allow(clippy::too_many_arguments)] // one for each part that it works with
    pub(crate) fn new(
        shared: Arc<Shared>,
        workspaces: Arc<Workspaces>,
        registry: Arc<Registry>,
        events: Arc<Events>,
        images: Arc<RootImages>,
        volumes: Arc<Volumes>,
        snapshots: Arc<Snapshots>,
        actors: Arc<Actors>,
    ) -> Self {
        Self { shared, workspaces, registry, events, images, volumes, snapshots, actors }
    }

    pub(crate) async fn watch(&self, caller: &Caller, id: SessionId) -> Result<watch::Receiver<Session>, Error> {
        Ok(match self.registry.find(caller, id).await? {
            Found::Live(live) => live.published.clone(),
            Found::Ended(session) => watch::channel(session).1,
        })
    }

    pub(crate) async fn get(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        Ok(match self.registry.find(caller, id).await? {
            Found::Live(live) => live.session(self.shared.clock.now()),
            Found::Ended(session) => session,
        })
    }

    pub(crate) fn by_name(&self, caller: &Caller, name: &str) -> Result<Session, Error> {
        let live = self.registry.live.named(caller.workspace_id, name).ok_or(Code::SessionNotFound)?;
        Ok(live.session(self.shared.clock.now()))
    }

    pub(crate) async fn list(&self, caller: &Caller, list: ListSessions) -> Result<(Vec<Session>, String), Error> {
        let workspace = self.shared.access.workspace(caller, list.workspace_id)?;
        let size = query::page_size(list.page_size)?;
        let query = SessionQuery {
            workspace_id: Some(workspace.id),
            owner_id: list.owner_id,
            state: list.state,
            tags: list.tags,
            sticky: list.sticky,
            include_terminated: list.include_terminated,
            before: query::parse_page_token(&list.page_token)?.map(|(at, id)| (at, SessionId::from_uuid(id))),
            // One more than asked tells whether there is another page.
            limit: size + 1,
        };
        let mut sessions = self.shared.store.sessions(query).await.map_err(store_error)?;
        let next = query::page(&mut sessions, size, |last| (last.created_at, *last.id.as_uuid()));
        let now = self.shared.clock.now();
        for session in &mut sessions {
            if let Some(live) = self.registry.live.get(session.id) {
                session.last_activity_at = session.last_activity_at.max(live.activity.last(now));
            }
        }
        Ok((sessions, next))
    }

    pub(crate) async fn update(&self, caller: &Caller, id: SessionId, update: SessionUpdate) -> Result<Session, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Change).await?;
        let _quiet = match update.sticky {
            Some(true) => {
                let quiet = self.workspaces.quiet().await;
                self.registry.check_sticky(live.workspace_id, Some(id))?;
                Some(quiet)
            }
            _ => None,
        };
        live.ask(|reply| Message::Update { update, reply }).await
    }

    pub(crate) async fn extend(&self, caller: &Caller, id: SessionId, additional_ms: u64) -> Result<Session, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Change).await?;
        live.ask(|reply| Message::Extend { additional_ms, reply }).await
    }

    pub(crate) async fn terminate(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        let live = match self.registry.find(caller, id).await? {
            Found::Ended(session) if session.state == SessionState::Terminated => return Ok(session),
            Found::Ended(_) => return Err(Code::Draining.into()),
            Found::Live(live) => live,
        };
        self.shared.tasks.check()?;
        let result = live.ask(|reply| Message::Terminate { reply }).await;
        // Somebody else's request may have ended it first.
        let session = live.published.borrow().clone();
        match result {
            _ if session.state == SessionState::Terminated => Ok(session),
            // The engine stops before the end is reached; the next start goes on with it.
            Err(error) if error.code == Code::SessionTerminated => Err(Code::Draining.into()),
            other => other,
        }
    }

    pub(crate) async fn pause(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Pause).await?;
        live.ask_job(|reply| Job::Pause { reply }).await
    }

    pub(crate) async fn resume(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Resume).await?;
        live.ask_job(|reply| Job::Resume { reply }).await
    }

    pub(crate) async fn report_activity(&self, caller: &Caller, id: SessionId) -> Result<UnixMs, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Activity).await?;
        let now = self.shared.clock.now();
        live.touch(now);
        Ok(live.session(now).last_activity_at)
    }

    pub(crate) fn usage(&self, caller: &Caller, workspace_id: Option<WorkspaceId>) -> Result<Usage, Error> {
        let workspace = self.shared.access.workspace(caller, workspace_id)?;
        let used = self.registry.live.used(workspace.id);
        let server = u64::from(self.shared.config.sessions_max);
        Ok(Usage {
            active_sessions: u64::from(used.sessions),
            sessions_max: Some(workspace.settings.sessions_max.map_or(server, |max| server.min(u64::from(max)))),
            cpu_millis: used.cpu_millis,
            memory_bytes: used.memory_bytes,
            disk_bytes: used.disk_bytes,
        })
    }

    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts: BTreeMap<_, _> = SessionState::ALL
            .into_iter()
            .filter(|state| *state != SessionState::Terminated)
            .map(|state| (state.name(), 0))
            .collect();
        for live in self.registry.live.all() {
            *counts.entry(live.state().name()).or_default() += 1;
        }
        counts
    }

    pub(crate) async fn set_egress(
        &self,
        caller: &Caller,
        id: SessionId,
        egress: Option<Egress>,
    ) -> Result<Session, Error> {
        self.shared.tasks.check()?;
        let egress = egress.map(egress::checked).transpose()?;
        let live = self.registry.find_live(caller, id, Request::Change).await?;
        live.ask_job(|reply| Job::Restrict { egress, reply }).await
    }

    pub(crate) async fn connections(&self, caller: &Caller, id: SessionId) -> Result<Vec<Connection>, Error> {
        self.registry.find_live(caller, id, Request::Change).await?;
        self.shared.host.connections(id).await.map_err(egress::egress_error)
    }

    pub(crate) async fn explain(&self, caller: &Caller, id: SessionId) -> Result<Vec<Finding>, Error> {
        explain(&self.shared, self.get(caller, id).await?).await
    }
}
