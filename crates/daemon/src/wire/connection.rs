//! Connections, as requests on them see them.

use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use nagaya_api::error::{Code, Error};
use nagaya_gateway::places::{Active, Places, Seat};
use nagaya_gateway::preview::{Connection, Viewer};

use crate::metrics::OpenConnection;

/// How a connection was opened, which decides the URLs that are handed out on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UrlScheme {
    pub(crate) secure: bool,
}

impl UrlScheme {
    pub(crate) const HTTP: Self = Self { secure: false };
    pub(crate) const HTTPS: Self = Self { secure: true };

    pub(crate) fn scheme(self) -> Scheme {
        if self.secure { Scheme::HTTPS } else { Scheme::HTTP }
    }
}

/// What a request came on.
#[derive(Clone, Copy)]
pub(crate) struct Via<'a> {
    pub(crate) scheme: UrlScheme,
    pub(crate) viewer: &'a Viewer,
    pub(crate) open: &'a Open,
}

/// A connection that counts as open, also when another protocol than HTTP is spoken on it.
pub(crate) struct Open {
    pub(crate) seat: Arc<Seat>,
    /// Where it moves when it has shown a key, or that it is a viewer.
    pub(crate) callers: Arc<Places>,
    pub(crate) viewers: Arc<Places>,
    pub(crate) _metric: OpenConnection,
}

impl Open {
    /// Told with each request that has shown a key, a certificate or the token of a URL.
    pub(crate) fn admit(&self) -> Result<(), Error> {
        match self.seat.move_to(&self.callers) {
            true => Ok(()),
            false => Err(Error::new(Code::CapacityUnavailable, "limits.connections_max is reached")),
        }
    }

    /// `None` when the connection has to go.
    pub(crate) fn begin(&self) -> Option<Active> {
        self.seat.begin()
    }

    /// Completes when the connection has to go: it gave way, or its time to show a key is over.
    pub(crate) async fn given_up(&self, at_most: Duration) {
        let late = async {
            loop {
                tokio::time::sleep(at_most).await;
                if self.seat.has_moved() {
                    std::future::pending::<()>().await;
                }
                // A request may wait for its preview to wake up before it is known to be one.
                if self.seat.is_idle() {
                    return;
                }
            }
        };
        tokio::select! {
            () = self.seat.given_up() => {}
            () = late => {}
        }
    }
}

impl Connection for Open {
    fn admit(&self) -> bool {
        self.seat.move_to(&self.viewers)
    }
}
