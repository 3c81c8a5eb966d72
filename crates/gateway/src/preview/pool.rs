//! Connections to services in sandboxes, kept open between requests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::{Address, Guest, GuestError};

use super::body::{Progress, Upload};
use super::{Settings, Visit};
use crate::traffic::{Counted, Side, Traffic};

/// What hyper may hold of a message's header, and of a body at a time.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
const ECONNREFUSED: i32 = 111;

pub(super) type Sender = http1::SendRequest<Upload>;

/// All services that were reached lately, by the labels of their previews.
pub(super) struct Services {
    by_label: Mutex<HashMap<String, Arc<Service>>>,
    traffic: Arc<Traffic>,
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
}

struct Idle {
    sender: Sender,
    since: Instant,
}

impl Services {
    /// Begins to close what stays idle. Needs a Tokio runtime.
    pub(super) fn start(idle_timeout: Duration) -> Arc<Self> {
        let services = Arc::new(Self { by_label: Mutex::default(), traffic: Arc::default() });
        let weak = Arc::downgrade(&services);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(idle_timeout / 2).await;
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
    pub(super) fn enter(&self, label: &str, visit: Visit, settings: &Settings) -> Result<Entered, Error> {
        let guest = Arc::downgrade(&visit.guest);
        let service = {
            let mut by_label = lock(&self.by_label);
            match by_label.get(label) {
                Some(known) if known.port == visit.port && Weak::ptr_eq(&known.guest, &guest) => Arc::clone(known),
                _ => {
                    let (idle, busy) = (Mutex::default(), AtomicUsize::new(0));
                    let idle_max = settings.idle_connections_max;
                    let service = Arc::new(Service { guest, port: visit.port, idle, idle_max, busy });
                    by_label.insert(label.to_owned(), Arc::clone(&service));
                    service
                }
            }
        };
        if service.busy.fetch_add(1, Ordering::Relaxed) >= settings.exchanges_max {
            service.busy.fetch_sub(1, Ordering::Relaxed);
            let detail = format!("previews.exchanges_max of one preview is {}", settings.exchanges_max);
            return Err(Error::new(Code::CapacityUnavailable, detail));
        }
        Ok(Entered { service, visit, traffic: Arc::clone(&self.traffic) })
    }

    fn sweep(&self, idle_timeout: Duration) {
        lock(&self.by_label).retain(|_, service| {
            let mut idle = lock(&service.idle);
            idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < idle_timeout);
            !idle.is_empty() || service.busy.load(Ordering::Relaxed) > 0
        });
    }
}

/// A visit that counts among its service's.
pub(super) struct Entered {
    service: Arc<Service>,
    visit: Visit,
    traffic: Arc<Traffic>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.service.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Entered {
    /// A connection that was used before and is still open, as far as one can know.
    pub(super) async fn kept(&self) -> Option<Sender> {
        loop {
            let mut idle = lock(&self.service.idle).pop()?;
            // It may have a last step to do after the answer that was read from it.
            if !idle.sender.is_closed() && idle.sender.ready().await.is_ok() {
                return Some(idle.sender);
            }
        }
    }

    pub(super) async fn connect(&self, at_most: Duration) -> Result<Sender, Error> {
        let address = Address::Tcp { port: self.visit.port };
        let stream = match tokio::time::timeout(at_most, self.visit.guest.connect(&address)).await {
            Ok(connected) => connected.map_err(|error| self.refused(error))?,
            Err(_) => return Err(Error::new(Code::ServiceTimedOut, "it did not accept the connection")),
        };
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES_MAX)
            .handshake(TokioIo::new(Counted::new(stream, Side::Sandbox, &self.traffic)))
            .await
            .map_err(|error| Error::new(Code::ServiceBroken, error.to_string()))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to a service in a sandbox ended early");
            }
        });
        Ok(sender)
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
    sender: Sender,
    entered: Entered,
    upload: Option<Arc<Progress>>,
}

impl Lease {
    pub(super) fn new(sender: Sender, entered: Entered, upload: Option<Arc<Progress>>) -> Self {
        Self { sender, entered, upload }
    }

    /// The answer was another protocol: what is left is the visit.
    pub(super) fn into_entered(self) -> Entered {
        self.entered
    }

    /// The answer is over. If it was read to its end the connection may be used again, unless a part of its request
    /// was not sent: then neither side may believe that it was.
    pub(super) fn finish(self, read_to_end: bool) {
        if let Some(upload) = self.upload.filter(|upload| !upload.is_complete()) {
            return upload.abandon();
        }
        if !read_to_end || self.sender.is_closed() {
            return;
        }
        let mut idle = lock(&self.entered.service.idle);
        if idle.len() < self.entered.service.idle_max {
            idle.push(Idle { sender: self.sender, since: Instant::now() });
        }
    }
}

/// What is behind these locks is whole after every statement, so that a panic elsewhere does not matter.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
