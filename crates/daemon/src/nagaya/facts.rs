//! What happened to sessions, and why they are as they are.

use std::collections::BTreeMap;

use connectrpc::{RequestContext, Response, ServiceResult, ServiceStream};
use nagaya_api::error::Error;
use nagaya_api::nagaya::v1 as own;
use nagaya_engine::Finding;
use nagaya_engine::model::Event;

use super::service::Nagaya;
use crate::rpc::convert;
use crate::rpc::parse::{invalid, page_size};
use crate::rpc::service::caller;

impl Nagaya {
    pub(super) async fn list_session_events(
        &self,
        context: &RequestContext,
        request: own::ListSessionEventsRequest,
    ) -> Result<own::ListSessionEventsResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let (after, size) = (sequence(request.after)?, page_size(request.page_size)?);
        let (events, next) = self.engine.events(&caller, id, after, size).await?;
        Ok(own::ListSessionEventsResponse { events: events.into_iter().map(event).collect(), next_after: count(next) })
    }

    pub(super) async fn explain_session(
        &self,
        context: &RequestContext,
        request: own::ExplainSessionRequest,
    ) -> Result<own::ExplainSessionResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let findings = self.engine.explain(&caller, id).await?;
        let session = self.engine.session(&caller, id).await?;
        Ok(own::ExplainSessionResponse {
            findings: findings.into_iter().map(finding).collect(),
            driver: session.driver,
            isolation: session.isolation.map(|isolation| isolation.name().to_owned()).unwrap_or_default(),
            root_image: session.machine.root.to_string(),
            wake_on_visit: session.wake_on_visit.unwrap_or(self.engine.config().wake_on_visit).name().to_owned(),
        })
    }

    pub(super) async fn watch_session_events(
        &self,
        context: &RequestContext,
        request: own::WatchSessionEventsRequest,
    ) -> ServiceResult<ServiceStream<own::WatchSessionEventsResponse>> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let follower = self.engine.follow_events(&caller, id, sequence(request.after)?).await?;
        Response::stream_ok(futures::stream::unfold(follower, |mut follower| async move {
            let told = follower.next().await?;
            let message = told.map(|told| own::WatchSessionEventsResponse { event: event(told).into() });
            Some((message.map_err(Into::into), follower))
        }))
    }
}

fn sequence(after: i64) -> Result<u64, Error> {
    u64::try_from(after).map_err(|_| invalid("after must not be negative"))
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn event(event: Event) -> own::SessionEvent {
    let mut details = particulars(&event);
    own::SessionEvent {
        sequence: count(event.sequence),
        at: convert::timestamp(event.at).into(),
        kind: details.remove("kind").unwrap_or_default(),
        summary: event.fact.summary(),
        details,
        execution_id: event.execution_id.map(|id| id.to_string()).unwrap_or_default(),
    }
}

/// What is stored of a fact, its kind among it, as texts.
fn particulars(event: &Event) -> BTreeMap<String, String> {
    let fact = serde_json::to_value(&event.fact).expect("facts have no keys that are not texts");
    let fields = fact.as_object().cloned().unwrap_or_default();
    let text = |value: serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    fields.into_iter().map(|(name, value)| (name, text(value))).collect()
}

fn finding(finding: Finding) -> own::Finding {
    own::Finding {
        code: finding.code.name().to_owned(),
        title: finding.code.title().to_owned(),
        detail: finding.detail,
        remedy: finding.code.remedy().to_owned(),
        at: finding.at.map(convert::timestamp).into(),
    }
}
