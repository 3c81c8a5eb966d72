//! Destinations that a session may reach, changed while it lives.

use nagaya_api::error::Error;

use super::work::{Done, work};
use super::{Actor, Reply};
use crate::egress::egress_error;
use crate::model::{Egress, EventKind, Machine, Session, SessionState};
use crate::ports::DriverError;
use crate::session::{Request, check};

impl Actor {
    /// Records the destinations, then sets them where there is a sandbox; one that boots gets them then.
    pub(super) async fn restrict(&mut self, egress: Option<Egress>, reply: Reply<Session>) {
        let before = self.session.machine.egress.clone();
        let recorded = async {
            check(self.session.state, Request::Change)?;
            self.record_egress(egress).await
        };
        if let Err(error) = recorded.await {
            let _ = reply.send(Err(error));
            return;
        }
        let in_memory = self.session.pause.as_ref().is_some_and(|pause| pause.in_memory);
        if self.session.state != SessionState::Running && !in_memory {
            let _ = reply.send(Ok(self.session.clone()));
            return;
        }
        let (shared, session) = (self.shared.clone(), self.session.clone());
        self.work = Some(work(async move {
            let result = shared.host.set_egress(session.id, session.machine.egress.as_ref()).await;
            Done::Restricted { result, before, reply }
        }));
    }

    pub(super) async fn restricted(
        &mut self,
        result: Result<(), DriverError>,
        before: Option<Egress>,
        reply: Reply<Session>,
    ) {
        let answer = match result {
            // One that ended meanwhile gets them when it boots.
            Ok(()) | Err(DriverError::Gone) => Ok(self.session.clone()),
            Err(error) => Err(self.take_back(before, egress_error(error)).await),
        };
        // A caller that went away changes nothing.
        let _ = reply.send(answer);
    }

    async fn record_egress(&mut self, egress: Option<Egress>) -> Result<(), Error> {
        let fact = EventKind::egress(egress.as_ref());
        self.commit_with(with_egress(&self.session, egress), vec![fact]).await
    }

    /// Lets the record say again what holds.
    async fn take_back(&mut self, before: Option<Egress>, failure: Error) -> Error {
        if let Err(error) = self.record_egress(before).await {
            tracing::warn!(session = %self.session.id, %error, "destinations that could not be set stay recorded");
        }
        failure
    }
}

fn with_egress(session: &Session, egress: Option<Egress>) -> Session {
    Session { machine: Machine { egress, ..session.machine.clone() }, ..session.clone() }
}
