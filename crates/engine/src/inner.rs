//! What the parts of the engine share, and how they find a caller's sessions.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;
use tokio::sync::{Semaphore, mpsc};

use crate::access::{Access, Caller};
use crate::actor::store_error;
use crate::calls::NewSession;
use crate::config::EngineConfig;
use crate::deadlines::Deadlines;
use crate::live::{Live, Registry};
use crate::model::{Session, SessionState};
use crate::ports::{Change, Clock, Driver, Entropy, SandboxExit, Store};
use crate::session::{Request, check};
use crate::tasks::Tasks;
use crate::validate;

/// Setting in which the store keeps the key that signs session certificates.
const CERTIFICATE_KEY: &str = "session_certificate_key";

pub(crate) struct Inner {
    pub(crate) config: EngineConfig,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) entropy: Arc<dyn Entropy>,
    pub(crate) access: Access,
    pub(crate) registry: Arc<Registry>,
    pub(crate) deadlines: Deadlines,
    pub(crate) creates: Semaphore,
    pub(crate) tasks: Tasks,
}

/// A session the caller may see.
#[allow(clippy::large_enum_variant)] // it lives for one look
pub(crate) enum Found {
    Live(Arc<Live>),
    Ended(Session),
}

impl Inner {
    pub(crate) fn random<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.entropy.fill(&mut bytes);
        bytes
    }

    /// The one place where a caller's right to a session is checked.
    pub(crate) async fn find(&self, caller: &Caller, id: SessionId) -> Result<Found, Error> {
        let found = match self.registry.get(id) {
            Some(live) if live.workspace_id == caller.workspace_id => Some(Found::Live(live)),
            Some(_) => None,
            None => {
                let session = self.store.session(id).await.map_err(store_error)?;
                session.filter(|session| session.workspace_id == caller.workspace_id).map(Found::Ended)
            }
        };
        found.ok_or_else(|| Code::SessionNotFound.into())
    }

    /// A session that has not ended, for a request that an ended one refuses.
    pub(crate) async fn find_live(&self, caller: &Caller, id: SessionId, request: Request) -> Result<Arc<Live>, Error> {
        match self.find(caller, id).await? {
            Found::Live(live) => {
                check(live.state(), request)?;
                Ok(live)
            }
            Found::Ended(session) => {
                check(session.state, request)?;
                // Only a stopping engine has records without tasks.
                Err(Code::Draining.into())
            }
        }
    }
}

impl Inner {
    pub(crate) fn new_session(&self, caller: &Caller, new: NewSession) -> Result<Session, Error> {
        validate::name(&new.name)?;
        validate::env(&new.env, &self.config)?;
        validate::metadata(&new.metadata, &self.config)?;
        validate::ssh_authorized_keys(&new.ssh_authorized_keys, &self.config)?;
        if let Some(duration_ms) = new.max_duration_ms {
            validate::max_duration_ms(duration_ms, &self.config)?;
        }
        let now = self.clock.now();
        Ok(Session {
            id: SessionId::new(now, self.random()),
            workspace_id: caller.workspace_id,
            owner_id: caller.key_id,
            name: new.name,
            state: SessionState::Creating,
            machine: validate::machine(new.cpu_cores, new.memory_mb, new.disk_gb, new.outbound)?,
            inbound: new.inbound,
            env: new.env,
            metadata: new.metadata,
            tags: validate::tags(new.tags)?,
            ssh_authorized_keys: new.ssh_authorized_keys,
            sticky: new.sticky,
            idle_timeout_minutes: new.idle_timeout_minutes,
            pause_retention_ms: new.pause_retention_ms,
            created_at: now,
            ready_at: None,
            terminated_at: None,
            timeout_at: new.max_duration_ms.map(|duration_ms| now.saturating_add(duration_ms)),
            last_activity_at: now,
            terminal_error: String::new(),
            driver: String::new(),
        })
    }

    /// Tells sessions that their sandbox ended by itself.
    pub(crate) fn spawn_exits(self: &Arc<Self>, mut exits: mpsc::UnboundedReceiver<SandboxExit>) -> Result<(), Error> {
        let (engine, running) = (self.clone(), self.tasks.enter()?);
        tokio::spawn(async move {
            let _running = running;
            loop {
                let exit = tokio::select! {
                    biased;
                    () = engine.tasks.stopping() => return,
                    Some(exit) = exits.recv() => exit,
                };
                if let Some(live) = engine.registry.get(exit.id) {
                    // The first cause is the true one.
                    let _ = live.exit.set(exit.cause);
                    live.alarm.notify_one();
                }
            }
        });
        Ok(())
    }

    pub(crate) fn spawn_timer(self: &Arc<Self>) -> Result<(), Error> {
        let (engine, running) = (self.clone(), self.tasks.enter()?);
        tokio::spawn(async move {
            let _running = running;
            let wake = |id| {
                if let Some(live) = engine.registry.get(id) {
                    live.alarm.notify_one();
                }
            };
            engine.deadlines.run(&*engine.clock, &engine.tasks, wake).await;
        });
        Ok(())
    }
}

pub(crate) async fn certificate_key(store: &dyn Store, entropy: &dyn Entropy) -> Result<[u8; 32], Error> {
    let stored = store.setting(CERTIFICATE_KEY).await.map_err(store_error)?;
    if let Some(stored) = stored {
        return stored.try_into().map_err(|_| Error::new(Code::Internal, "the stored certificate key is damaged"));
    }
    let mut key = [0; 32];
    entropy.fill(&mut key);
    let change = Change::Setting { name: CERTIFICATE_KEY.to_owned(), value: key.to_vec() };
    store.commit(vec![change]).await.map_err(store_error)?;
    Ok(key)
}
