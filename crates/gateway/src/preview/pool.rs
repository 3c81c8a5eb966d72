//! Connections to services in sandboxes, kept open between requests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::{Address, Guest, GuestError};
use tokio::sync::Notify;

use super::Visit;
use super::body::Progress;
use super::connection::{Connection, Frames};
use crate::config::PreviewsConfig;
use crate::traffic::Traffic;

/// Services that close many kept connections have them all looked after at once, and not more often.
const SWEEP_PAUSE: Duration = Duration::from_millis(100);
const ECONNREFUSED: i32 = 111;

/// All services that were reached lately, by the labels of their previews.
pub(super) struct Services {
    by_label: Mutex<HashMap<String, Arc<Service>>>,
    traffic: Arc<Traffic>,
    /// Notified when something happens on a kept connection.
    sweeper: Arc<Notify>,
}

/// One port of one running sandbox. A sandbox that was started again, or another one under the same label, is
/// another service.
pub(super) struct Service {
    guest: Weak<dyn Guest>,
    port: u16,
    idle: Mutex<Vec<Idle>>,
    idle_max: usize,
    /// Exchanges and tunnels under way.
    busy: AtomicUsize,
    traffic: Arc<Traffic>,
    sweeper: Arc<Notify>,
}

impl Service {
    fn is_of(&self, visit: &Visit) -> bool {
        // What a weak reference names is not used again for another while the reference is there.
        self.port == visit.port && std::ptr::addr_eq(self.guest.as_ptr(), Arc::as_ptr(&visit.guest))
    }
}

struct Idle {
    connection: Connection,
    since: Instant,
}

impl Services {
    /// Begins to close what stays idle, or was closed by its service. Needs a Tokio runtime.
    pub(super) fn start(idle_timeout: Duration) -> Arc<Self> {
        let sweeper = Arc::new(Notify::new());
        let services =
            Arc::new(Self { by_label: Mutex::default(), traffic: Arc::default(), sweeper: Arc::clone(&sweeper) });
        let weak = Arc::downgrade(&services);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(idle_timeout / 2) => {}
                    () = sweeper.notified() => tokio::time::sleep(SWEEP_PAUSE).await,
                }
                let Some(services) = weak.upgrade() else { return };
                services.sweep(idle_timeout);
            }
        });
        services
    }

    /// Of all connections to services.
    pub(super) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Room for one more exchange with the service that a visit leads to.
    pub(super) fn enter(&self, label: &str, visit: Visit, config: &PreviewsConfig) -> Result<Entered, Error> {
        let service = {
            let mut by_label = lock(&self.by_label);
            match by_label.get(label) {
                Some(known) if known.is_of(&visit) => Arc::clone(known),
                _ => {
                    let service = Arc::new(Service {
                        guest: Arc::downgrade(&visit.guest),
                        port: visit.port,
                        idle: Mutex::default(),
                        idle_max: config.idle_connections_max,
                        busy: AtomicUsize::new(0),
                        traffic: Arc::clone(&self.traffic),
                        sweeper: Arc::clone(&self.sweeper),
                    });
                    by_label.insert(label.to_owned(), Arc::clone(&service));
                    service
                }
            }
        };
        if service.busy.fetch_add(1, Ordering::Relaxed) >= config.exchanges_max {
            service.busy.fetch_sub(1, Ordering::Relaxed);
            let detail = format!("previews.exchanges_max of one preview is {}", config.exchanges_max);
            return Err(Error::new(Code::CapacityUnavailable, detail));
        }
        Ok(Entered { service, visit })
    }

    fn sweep(&self, idle_timeout: Duration) {
        lock(&self.by_label).retain(|_, service| {
            let mut idle = lock(&service.idle);
            idle.retain_mut(|idle| idle.connection.is_open() && idle.since.elapsed() < idle_timeout);
            !idle.is_empty() || service.busy.load(Ordering::Relaxed) > 0
        });
    }
}

/// A visit that counts among its service's.
pub(super) struct Entered {
    service: Arc<Service>,
    visit: Visit,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.service.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Entered {
    /// A connection that was used before and is still open, as far as one can know.
    pub(super) fn kept(&self) -> Option<Connection> {
        let mut idle = lock(&self.service.idle);
        std::iter::from_fn(|| idle.pop()).map(|idle| idle.connection).find(Connection::is_ready)
    }

    pub(super) async fn connect(&self, at_most: Duration) -> Result<Connection, Error> {
        let address = Address::Tcp { port: self.visit.port };
        let stream = match tokio::time::timeout(at_most, self.visit.guest.connect(&address)).await {
            Ok(connected) => connected.map_err(|error| self.refused(error))?,
            Err(_) => return Err(Error::new(Code::ServiceTimedOut, "it did not accept the connection")),
        };
        let opened = Connection::open(stream, &self.service.traffic, &self.service.sweeper).await;
        opened.map_err(|error| Error::new(Code::ServiceBroken, error.to_string()))
    }

    fn refused(&self, error: GuestError) -> Error {
        match error.errno {
            ECONNREFUSED => Error::new(Code::ServiceNotListening, format!("port {}", self.visit.port)),
            _ => Error::new(error.code, error.detail),
        }
    }
}

/// A connection in use.
pub(super) struct Lease {
    connection: Connection,
    entered: Entered,
    upload: Option<Arc<Progress>>,
}

impl Lease {
    pub(super) fn new(mut connection: Connection, entered: Entered, upload: Option<Arc<Progress>>) -> Self {
        // What is still to be sent does not wait for a viewer who is slow to take the answer.
        if upload.as_ref().is_some_and(|upload| !upload.is_complete()) {
            connection.drive_elsewhere();
        }
        Self { connection, entered, upload }
    }

    /// The answer was another protocol: what is left is the visit.
    pub(super) fn into_entered(self) -> Entered {
        self.connection.leave();
        self.entered
    }

    /// The next part of the answer.
    pub(super) fn poll_frame(&mut self, incoming: &mut Incoming, context: &mut Context<'_>) -> Poll<Frames> {
        self.connection.poll_frame(incoming, context)
    }

    /// The answer is over. If it was read to its end the connection may be used again, unless a part of its request
    /// was not sent: then neither side may believe that it was.
    pub(super) fn finish(mut self, read_to_end: bool) {
        let sent = self.upload.as_ref().is_none_or(|upload| upload.is_complete());
        if !(sent && read_to_end && self.connection.rest()) {
            return;
        }
        let mut idle = lock(&self.entered.service.idle);
        if idle.len() < self.entered.service.idle_max {
            idle.push(Idle { connection: self.connection, since: Instant::now() });
        }
    }
}

/// What is behind these locks is whole after every statement, so that a panic elsewhere does not matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
