//! Running sandboxes, opened for calls of the data plane, commands and visits.

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{ExecutionId, SessionId};
use tokio::sync::mpsc;

use super::Sessions;
use crate::access::Caller;
use crate::errors::{guest_error, store_error};
use crate::event_log::CommandLog;
use crate::handle::{InUse, Message, SessionHandle};
use crate::model::{Execution, ExecutionStatus, Session};
use crate::open::{OpenSession, SshSession};
use crate::ports::ProcessEvent;
use crate::requests::{Certificate, NewExecution};
use crate::session::{Request, check};

impl Sessions {
    pub(crate) async fn certificate(&self, caller: &Caller, id: SessionId) -> Result<(Certificate, Session), Error> {
        let live = self.registry.find_live(caller, id, Request::Use).await?;
        let now = self.shared.clock.now();
        let expires_at = now + self.shared.config.certificate_ttl_ms;
        let text = self.shared.access.certify(id, expires_at);
        Ok((Certificate { text, expires_at }, live.session(now)))
    }

    pub(crate) async fn open(&self, certificate: &str, id: SessionId) -> Result<OpenSession, Error> {
        let mut open = self.probe(certificate, id).await?;
        // The session may have ended meanwhile; then the guest says so.
        if let Some(live) = self.registry.live.get(id) {
            open._activity = Some(InUse::new(live, self.shared.clock.clone()));
        }
        Ok(open)
    }

    pub(crate) async fn open_session(&self, caller: &Caller, id: SessionId) -> Result<OpenSession, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Use).await?;
        let mut open = self.open_live(&live)?;
        open._activity = Some(InUse::new(live, self.shared.clock.clone()));
        Ok(open)
    }

    pub(crate) async fn probe(&self, certificate: &str, id: SessionId) -> Result<OpenSession, Error> {
        self.shared.tasks.check()?;
        self.shared.access.verify(certificate, id, self.shared.clock.now())?;
        let live = self.registry.find_certified(id).await?;
        self.open_live(&live)
    }

    fn open_live(&self, live: &SessionHandle) -> Result<OpenSession, Error> {
        let (env, memory_bytes) = {
            let session = live.published.borrow();
            check(session.state, Request::Use)?;
            (session.env.clone(), session.machine.resources.memory_bytes)
        };
        let guest = live.guest().ok_or(Code::GuestUnreachable)?;
        let commands = CommandLog { events: self.events.clone(), session_id: live.id, memory_bytes };
        Ok(OpenSession { guest, env, commands, _activity: None })
    }

    pub(crate) async fn execute(
        &self,
        caller: &Caller,
        id: SessionId,
        new: NewExecution,
        wait: bool,
    ) -> Result<Execution, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Use).await?;
        let _in_use = InUse::new(live.clone(), self.shared.clock.clone());
        let mut started = live.ask(|reply| Message::Execute { new, reply }).await?;
        if !wait {
            return Ok(started.execution);
        }
        let ended = started.published.wait_for(|execution| execution.status != ExecutionStatus::Running).await;
        ended.map(|execution| execution.clone()).map_err(|_| Code::Draining.into())
    }

    pub(crate) async fn execution(
        &self,
        caller: &Caller,
        id: SessionId,
        execution_id: ExecutionId,
    ) -> Result<Execution, Error> {
        self.registry.find(caller, id).await?;
        let execution = self.shared.store.execution(execution_id).await.map_err(store_error)?;
        execution.filter(|execution| execution.session_id == id).ok_or_else(|| Code::ExecutionNotFound.into())
    }

    pub(crate) async fn follow_execution(
        &self,
        caller: &Caller,
        id: SessionId,
        execution_id: ExecutionId,
    ) -> Result<mpsc::Receiver<ProcessEvent>, Error> {
        let live = self.registry.find_live(caller, id, Request::Use).await?;
        self.execution(caller, id, execution_id).await?;
        let guest = live.guest().ok_or(Code::GuestUnreachable)?;
        guest.follow(execution_id).await.map_err(guest_error)
    }

    pub(crate) async fn check_visit(&self, caller: &Caller, id: SessionId) -> Result<(), Error> {
        self.shared.tasks.check()?;
        self.registry.find_live(caller, id, Request::Activity).await.map(drop)
    }

    pub(crate) async fn visit(&self, caller: &Caller, id: SessionId) -> Result<SshSession, Error> {
        self.shared.tasks.check()?;
        self.registry.find(caller, id).await?;
        self.visit_certified(id).await
    }

    pub(crate) async fn visit_certified(&self, id: SessionId) -> Result<SshSession, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_certified(id).await?;
        let (in_use, guest) = self.registry.reach(&live).await?;
        let session = live.published.borrow().clone();
        let commands = CommandLog {
            events: self.events.clone(),
            session_id: id,
            memory_bytes: session.machine.resources.memory_bytes,
        };
        Ok(SshSession {
            session_id: id,
            open: OpenSession { guest, env: session.env, commands, _activity: Some(in_use) },
            ssh_authorized_keys: session.ssh_authorized_keys,
            published: live.published.clone(),
        })
    }
}
