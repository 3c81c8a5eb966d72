//! Visits to previews, and the tokens that open private ones.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;

use super::{Previews, is_over};
use crate::access::{Access, Caller};
use crate::deadlines::Sleeper;
use crate::model::{Binding, Preview, PreviewKind, PreviewState, SessionState, UnixMs};
use crate::open::PreviewConnection;
use crate::ports::Change;
use crate::requests::{OpenPreview, PreviewTarget};
use crate::validate;

/// Visits are written down when the last one that was is older than this, or than a quarter of what keeps a private
/// preview open.
const VISIT_NOTED_MS: u64 = 60_000;

impl Previews {
    pub(crate) async fn enter(
        self: &Arc<Self>,
        label: &str,
        viewer_token: Option<&str>,
    ) -> Result<PreviewConnection, Error> {
        self.shared.tasks.check()?;
        let now = self.shared.clock.now();
        let preview = self.table.labelled(label).filter(|of| of.state == PreviewState::Live);
        let preview = preview.ok_or(Code::PreviewNotFound)?;
        if is_over(&preview, now) {
            let named = preview.kind == PreviewKind::Named;
            return Err(if named { Code::PreviewUnbound } else { Code::PreviewNotFound }.into());
        }
        let open_until = match preview.kind {
            PreviewKind::Private => Some(self.check_viewer(&preview, viewer_token, now)?),
            PreviewKind::Exposed | PreviewKind::Named => None,
        };
        let binding = preview.binding.ok_or(Code::PreviewUnbound)?;
        let live = self.registry.live.get(binding.session_id).ok_or(Code::SessionTerminated)?;
        // Named ones may be bound to it nevertheless.
        if !live.published.borrow().inbound {
            return Err(Code::InboundDisabled.into());
        }
        let (activity, guest) = self.registry.reach(&live).await.map_err(|error| asleep(error, live.state()))?;
        self.note_visit(&preview, open_until, now);
        let Binding { session_id, port } = binding;
        Ok(PreviewConnection { preview_id: preview.id, session_id, port, guest, _activity: activity })
    }

    pub(crate) async fn open(
        self: &Arc<Self>,
        caller: &Caller,
        id: SessionId,
        port: u16,
        expires_at: Option<UnixMs>,
    ) -> Result<OpenPreview, Error> {
        validate::port(port)?;
        validate::expires_at(expires_at, self.shared.clock.now())?;
        self.find_inbound(caller, id).await?;
        let (previews, caller) = (self.clone(), *caller);
        let binding = Binding { session_id: id, port };
        self.shared
            .detached(async move {
                let _quiet = previews.quiet().await;
                let now = previews.shared.clock.now();
                let longest = now.saturating_add(previews.shared.config.viewer_token_ttl_max_ms);
                let token_ends_at = expires_at.unwrap_or(longest).min(longest);
                let ends_at = expires_at.map_or(previews.idle_end(token_ends_at, now), |_| token_ends_at);
                let mut preview = previews.unnamed(&caller, PreviewKind::Private, binding);
                // Tokens given before stay good.
                preview.expires_at = Some(preview.expires_at.map_or(ends_at, |at| at.max(ends_at)));
                preview.binding = Some(binding);
                let made = previews.put(preview).await?;
                let viewer_token = previews.shared.access.viewer_token(made.preview.id, token_ends_at);
                Ok(OpenPreview { preview: made.preview, url: made.url, viewer_token, expires_at: ends_at })
            })
            .await
    }

    pub(crate) async fn touch(self: &Arc<Self>, caller: &Caller, token: &str) -> Result<UnixMs, Error> {
        let (preview, open_until) = self.find_by_token(caller, token)?;
        let now = self.shared.clock.now();
        if let Some(live) = preview.binding.and_then(|binding| self.registry.live.get(binding.session_id)) {
            live.touch(now);
        }
        let previews = self.clone();
        self.shared.detached(async move { previews.record_visit(preview, open_until, now).await }).await?;
        Ok(now)
    }

    pub(crate) fn resolve_token(&self, caller: &Caller, token: &str) -> Result<PreviewTarget, Error> {
        let (preview, _) = self.find_by_token(caller, token)?;
        let live = preview.binding.and_then(|binding| self.registry.live.get(binding.session_id));
        let is_offline = !live.is_some_and(|live| live.state() == SessionState::Running);
        Ok(PreviewTarget { preview, is_offline })
    }
}

/// A visitor knows nothing of sessions and their states.
fn asleep(error: Error, state: SessionState) -> Error {
    match (error.code, state) {
        (Code::SessionNotRunning, SessionState::Paused) => Error::new(Code::PreviewPaused, "(state=PAUSED)"),
        (Code::SessionNotRunning, SessionState::UserShutdown) => {
            Error::new(Code::PreviewPaused, "it powered itself off (state=USER_SHUTDOWN)")
        }
        _ => error,
    }
}

impl Previews {
    /// When a private preview closes that nobody looks at from now on.
    fn idle_end(&self, token_ends_at: UnixMs, now: UnixMs) -> UnixMs {
        now.saturating_add(self.shared.config.private_preview_ttl_ms).min(token_ends_at)
    }

    /// Until when a visitor's token is good.
    fn check_viewer(&self, preview: &Preview, token: Option<&str>, now: UnixMs) -> Result<UnixMs, Error> {
        match self.shared.access.viewed(token.unwrap_or_default(), now)? {
            (id, ends_at) if id == preview.id => Ok(ends_at),
            _ => Err(Code::PreviewPrivate.into()),
        }
    }

    /// A preview of the caller's workspace, and until when the token is good if that is a viewer's.
    fn find_by_token(&self, caller: &Caller, token: &str) -> Result<(Preview, Option<UnixMs>), Error> {
        let now = self.shared.clock.now();
        let (preview, open_until) = match Access::is_viewer_token(token) {
            true => {
                let (id, ends_at) =
                    self.shared.access.viewed(token, now).map_err(|_| Error::from(Code::PreviewNotFound))?;
                (self.table.get(id), Some(ends_at))
            }
            // Who knows no more than the label of a private preview does not keep it open.
            false => (self.table.labelled(token), None),
        };
        let mine = |of: &Preview| of.workspace_id == caller.workspace_id && of.state == PreviewState::Live;
        let gone = |of: &Preview| of.kind != PreviewKind::Named && is_over(of, now);
        let preview = preview.filter(|of| mine(of) && !gone(of)).ok_or(Code::PreviewNotFound)?;
        Ok((preview, open_until))
    }

    /// Writes a visit down, now and then, while the visitor goes on.
    fn note_visit(self: &Arc<Self>, preview: &Preview, open_until: Option<UnixMs>, now: UnixMs) {
        let every_ms = VISIT_NOTED_MS.min(self.shared.config.private_preview_ttl_ms / 4);
        if !self.table.note_visit(preview.id, now, every_ms) {
            return;
        }
        let (previews, preview) = (self.clone(), preview.clone());
        self.shared.background(async move {
            // Nobody waits for it; a later visit tries again.
            if let Err(error) = previews.record_visit(preview, open_until, now).await {
                tracing::warn!(%error, "a visit to a preview was not recorded");
            }
        });
    }

    /// Records a visit, and keeps a private preview open as far as the visitor's token reaches.
    async fn record_visit(&self, seen: Preview, open_until: Option<UnixMs>, now: UnixMs) -> Result<(), Error> {
        let _quiet = self.quiet().await;
        let Some(mut preview) = self.table.get(seen.id) else { return Ok(()) };
        if preview.last_accessed_at.is_some_and(|at| at >= now) {
            return Ok(());
        }
        preview.last_accessed_at = Some(now);
        if let Some(token_ends_at) = open_until {
            preview.expires_at = preview.expires_at.max(Some(self.idle_end(token_ends_at, now)));
        }
        self.shared.write(vec![Change::Preview(preview.clone())]).await?;
        self.shared.deadlines.set(Sleeper::Preview(preview.id), preview.expires_at);
        self.table.put(preview);
        Ok(())
    }
}
