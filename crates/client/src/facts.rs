//! What only servers of Nagaya tell: what happened to a session, and why it is as it is.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use connectrpc::client::ServerStream;
use hyper::body::Incoming;
use nagaya_api::nagaya::v1;
use nagaya_api::tenki::client::Whole;
use serde::Serialize;

use crate::client::PAGE_SIZE;
use crate::{Error, Result, Session, wire};

/// Something that happened to a session.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SessionEvent {
    /// Counts the session's events from 1.
    pub sequence: i64,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub at: Option<SystemTime>,
    /// A stable word such as `created` or `out_of_memory`. New ones may come; `summary` is for people.
    pub kind: String,
    pub summary: String,
    pub details: BTreeMap<String, String>,
    /// The command that it happened to, if it did.
    pub execution_id: Option<String>,
}

/// One reason why a session is as it is.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// A stable word such as `out_of_memory`. New ones may come; `title` is for people.
    pub code: String,
    pub title: String,
    /// Why, with figures.
    pub detail: String,
    /// What to do; empty when there is nothing to do.
    pub remedy: String,
    /// When it happened last; `None` for what is so now.
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub at: Option<SystemTime>,
}

impl Session {
    /// What happened to the session after the event with this sequence, oldest first; 0 is from the beginning.
    /// Also of a session that has ended.
    pub async fn events(&self, after: i64) -> Result<Vec<SessionEvent>> {
        let mut events = Vec::new();
        let mut after = after;
        loop {
            let request =
                v1::ListSessionEventsRequest { session_id: self.id().to_owned(), after, page_size: PAGE_SIZE };
            let answer = self.client().own().list_session_events(request).await.map_err(Error::of_rpc)?;
            events.extend(answer.events.into_iter().map(SessionEvent::of_wire));
            match answer.next_after {
                0 => return Ok(events),
                next if next <= after => return Err(Error::PaginationStalled { token: next.to_string() }),
                next => after = next,
            }
        }
    }

    /// The same, then every further event when it happens, until the session has ended.
    pub async fn watch_events(&self, after: i64) -> Result<EventStream> {
        let request = v1::WatchSessionEventsRequest { session_id: self.id().to_owned(), after };
        Ok(EventStream {
            stream: self.client().own_streams().watch_session_events(request).await.map_err(Error::of_rpc)?,
        })
    }

    /// Why the session is as it is, the most important reason first.
    pub async fn explain(&self) -> Result<Vec<Finding>> {
        let request = v1::ExplainSessionRequest { session_id: self.id().to_owned() };
        let answer = self.client().own().explain_session(request).await.map_err(Error::of_rpc)?;
        Ok(answer.findings.into_iter().map(Finding::of_wire).collect())
    }
}

/// Events as they happen.
pub struct EventStream {
    stream: ServerStream<Incoming, Whole<v1::WatchSessionEventsResponse>>,
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}

impl EventStream {
    /// The next event; `None` after the session's last one. An error that is [retryable](Error::retryable) or
    /// [`Error::Unreachable`] is the server's end: watch again after the last sequence.
    pub async fn next(&mut self) -> Result<Option<SessionEvent>> {
        while let Some(message) = self.stream.message().await.map_err(Error::of_rpc)? {
            if let Some(event) = message.event.as_option() {
                return Ok(Some(SessionEvent::of_wire(event.clone())));
            }
        }
        Ok(None)
    }
}

impl SessionEvent {
    pub(crate) fn of_wire(event: v1::SessionEvent) -> Self {
        Self {
            sequence: event.sequence,
            at: wire::time(event.at),
            kind: event.kind,
            summary: event.summary,
            details: event.details,
            execution_id: Some(event.execution_id).filter(|id| !id.is_empty()),
        }
    }
}

impl Finding {
    pub(crate) fn of_wire(finding: v1::Finding) -> Self {
        Self {
            code: finding.code,
            title: finding.title,
            detail: finding.detail,
            remedy: finding.remedy,
            at: wire::time(finding.at),
        }
    }
}
