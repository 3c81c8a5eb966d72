//! What every part of the engine works with: what the operator decided, the ports, and the engine's tasks.

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use tokio::sync::oneshot;

use crate::access::Access;
use crate::backoff::Backoff;
use crate::config::EngineConfig;
use crate::deadlines::Deadlines;
use crate::errors::store_error;
use crate::model::Session;
use crate::ports::{Change, Clock, Driver, Drivers, Entropy, Host, Store};
use crate::tasks::{Running, Tasks};

/// Setting in which the store keeps the key that signs session certificates.
const CERTIFICATE_KEY: &str = "session_certificate_key";

pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) drivers: Drivers,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) entropy: Arc<dyn Entropy>,
    pub(crate) access: Access,
    pub(crate) deadlines: Deadlines,
    pub(crate) tasks: Tasks,
}

impl Shared {
    pub(crate) fn backoff(&self) -> Backoff {
        Backoff::new(&self.config)
    }

    pub(crate) async fn write(&self, changes: Vec<Change>) -> Result<(), Error> {
        self.store.commit(changes).await.map_err(store_error)
    }

    pub(crate) fn random<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.entropy.fill(&mut bytes);
        bytes
    }

    /// The driver that a session's sandbox runs on.
    pub(crate) fn driver_of(&self, session: &Session) -> Arc<dyn Driver> {
        self.drivers.of(&session.driver)
    }

    /// Does something that belongs to nobody's future: a caller that goes away does not stop it half-way.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let running = self.tasks.enter()?;
        let (reply, answer) = oneshot::channel();
        tokio::spawn(async move {
            let result = work.await;
            drop(running);
            let _ = reply.send(result);
        });
        answer.await.unwrap_or_else(|_| Err(Code::Draining.into()))
    }

    /// Starts something that nobody waits for, unless the engine stops.
    pub(crate) fn background(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Ok(running) = self.tasks.enter() {
            spawn_running(running, work);
        }
    }

    /// Repeats a step until it succeeds. False when the engine stops instead; the next start goes on with it.
    pub(crate) async fn insist<E: Display, F: Future<Output = Result<(), E>>>(
        &self,
        what: &str,
        mut step: impl FnMut() -> F,
    ) -> bool {
        let mut backoff = self.backoff();
        loop {
            match step().await {
                Ok(()) => return true,
                Err(error) => tracing::warn!(%error, "{what}; trying again"),
            }
            if !self.pause(backoff.next_ms()).await {
                return false;
            }
        }
    }

    /// False when the engine stops meanwhile.
    pub(crate) async fn pause(&self, pause_ms: u64) -> bool {
        let wake = self.clock.sleep_until(self.clock.now() + pause_ms);
        tokio::select! {
            biased;
            () = self.tasks.stopping() => false,
            () = wake => true,
        }
    }
}

pub(crate) fn spawn_running(running: Running, work: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(async move {
        work.await;
        drop(running);
    });
}

pub(crate) async fn certificate_key(store: &dyn Store, entropy: &dyn Entropy) -> Result<[u8; 32], Error> {
    lasting_secret(store, entropy, CERTIFICATE_KEY).await
}

/// A secret of the server that is made when it is first asked for.
pub(crate) async fn lasting_secret(store: &dyn Store, entropy: &dyn Entropy, name: &str) -> Result<[u8; 32], Error> {
    let stored = store.setting(name).await.map_err(store_error)?;
    if let Some(stored) = stored {
        return stored.try_into().map_err(|_| Error::new(Code::Internal, format!("the stored {name} is damaged")));
    }
    let mut key = [0; 32];
    entropy.fill(&mut key);
    let change = Change::Setting { name: name.to_owned(), value: key.to_vec() };
    store.commit(vec![change]).await.map_err(store_error)?;
    Ok(key)
}
