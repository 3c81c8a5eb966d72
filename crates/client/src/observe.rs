//! What only servers of Nagaya offer: forks, and what a session reaches.

use std::time::SystemTime;

use nagaya_api::nagaya::v1;
use serde::Serialize;

use crate::settable::settable;
use crate::{EgressPolicy, Error, Result, Session, SessionInfo, wire};

settable! {
    #[derive(Debug, Clone)]
    pub struct ForkOptions {
        /// How many; 1 by default.
        pub count: u32,
        /// The name of each; the source's with `-fork-1`, `-fork-2` and so on by default.
        pub name: Option<String>,
    }
}

impl Default for ForkOptions {
    fn default() -> Self {
        Self { count: 1, name: None }
    }
}

/// What [`Session::fork`] made.
#[derive(Debug, Clone)]
pub struct Forked {
    /// RUNNING, or CREATING where that takes longer.
    pub sessions: Vec<Session>,
    /// Whether processes and memory came along; `None` while that is not decided.
    pub memory_carried: Option<bool>,
}

/// A connection of a session to the outside, or an attempt at one.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Connection {
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub started_at: Option<SystemTime>,
    /// `ADDRESS:PORT`, an address, or nothing where only a name was asked for.
    pub destination: String,
    /// `tcp`, `udp`, `icmp`, `dns`, or the protocol's number.
    pub protocol: String,
    /// The name that the address was found by; empty where it is not known.
    pub name: String,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub allowed: bool,
    /// Why it was not allowed.
    pub reason: String,
}

impl Session {
    /// Makes sessions from this one's disk: all of them or none.
    pub async fn fork(&self, options: ForkOptions) -> Result<Forked> {
        let request = v1::ForkSessionRequest {
            session_id: self.id().to_owned(),
            count: wire::unsigned(options.count),
            name: options.name,
        };
        let answer = self.client().own().fork_session(request).await.map_err(Error::of_rpc)?;
        let sessions = answer.sessions.into_iter().map(|session| self.client().known(session));
        Ok(Forked { sessions: sessions.collect::<Result<_>>()?, memory_carried: answer.memory_carried })
    }

    /// Changes what the session reaches from now on; `None`: all that the server lets sandboxes reach.
    /// Connections to what is not allowed any more are cut.
    pub async fn set_egress(&self, policy: Option<EgressPolicy>) -> Result<SessionInfo> {
        let request = v1::UpdateSessionEgressRequest {
            session_id: self.id().to_owned(),
            egress: policy.map(EgressPolicy::into_wire).into(),
        };
        self.described(self.client().own().update_session_egress(request).await.map_err(Error::of_rpc)?.session)
    }

    /// The last connections of the session to the outside, oldest first.
    pub async fn connections(&self) -> Result<Vec<Connection>> {
        let request = v1::ListSessionConnectionsRequest { session_id: self.id().to_owned() };
        let answer = self.client().own().list_session_connections(request).await.map_err(Error::of_rpc)?;
        Ok(answer.connections.into_iter().map(Connection::of_wire).collect())
    }
}

impl Connection {
    pub(crate) fn of_wire(connection: v1::SessionConnection) -> Self {
        Self {
            started_at: wire::time(connection.started_at),
            destination: connection.destination,
            protocol: connection.protocol,
            name: connection.name,
            bytes_sent: wire::unsigned(connection.bytes_sent),
            bytes_received: wire::unsigned(connection.bytes_received),
            allowed: connection.allowed,
            reason: connection.reason,
        }
    }
}
