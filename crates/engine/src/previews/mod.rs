//! Previews: names under which ports of sandboxes are reached from outside.
//!
//! ```text
//!   recorded as MAKING ─── the ingress publishes it ──▶ recorded as LIVE ─── answered
//!        └── it cannot ──▶ forgotten                  │   ▲
//!                               bind, unbind, expiry ─┴───┘ (named ones)
//!                               unexpose, expiry, end of the session, delete ──▶ forgotten ──▶ withdrawn
//! ```
//!
//! Rows are written first and the ingress is asked afterwards, so that what is published is what is recorded: what is not
//! forgotten is published again by the next start, under the port it had. Sessions know nothing of their previews; a visit
//! looks at the session when it comes. A named preview stays bound to a session that has ended, and says so to visitors,
//! until it is bound elsewhere.

mod access;
mod table;

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{PreviewId, SessionId};
use tokio::sync::{Mutex, MutexGuard};

use crate::access::Caller;
use crate::deadlines::Sleeper;
use crate::errors::store_error;
use crate::model::{Binding, Preview, PreviewKind, PreviewState, UnixMs};
use crate::ports::{Change, Ingress, PreviewQuery};
use crate::registry::{Found, Registry};
use crate::requests::{ListPreviews, NewExposure, NewPreview, PreviewUrl};
use crate::session::Request;
use crate::shared::Shared;
use crate::{query, validate};

use table::PreviewTable;

/// The previews of the server.
pub(crate) struct Previews {
    shared: Arc<Shared>,
    registry: Arc<Registry>,
    ingress: Arc<dyn Ingress>,
    table: PreviewTable,
    quiet: Mutex<()>,
}

impl Previews {
    /// With what was recorded before the start.
    pub(crate) fn new(
        shared: Arc<Shared>,
        registry: Arc<Registry>,
        ingress: Arc<dyn Ingress>,
        previews: &[Preview],
    ) -> Self {
        Self { shared, registry, ingress, table: PreviewTable::load(previews), quiet: Mutex::default() }
    }

    pub(crate) async fn expose(
        self: &Arc<Self>,
        caller: &Caller,
        id: SessionId,
        new: NewExposure,
    ) -> Result<PreviewUrl, Error> {
        validate::port(new.port)?;
        validate::expires_at(new.expires_at, self.shared.clock.now())?;
        new.slug.as_deref().map_or(Ok(()), validate::slug)?;
        self.find_inbound(caller, id).await?;
        let (previews, caller) = (self.clone(), *caller);
        let binding = Binding { session_id: id, port: new.port };
        self.shared
            .detached(async move {
                let _quiet = previews.quiet().await;
                let preview = match &new.slug {
                    Some(slug) => previews.named(&caller, slug)?,
                    None => previews.unnamed(&caller, PreviewKind::Exposed, binding),
                };
                previews.put(Preview { binding: Some(binding), expires_at: new.expires_at, ..preview }).await
            })
            .await
    }

    pub(crate) async fn unexpose(self: &Arc<Self>, caller: &Caller, id: SessionId, port: u16) -> Result<(), Error> {
        validate::port(port)?;
        self.registry.find(caller, id).await?;
        let previews = self.clone();
        self.shared
            .detached(async move {
                let _quiet = previews.quiet().await;
                let leads_there = |of: &Preview| of.binding == Some(Binding { session_id: id, port });
                previews.release(previews.table.filter(|of| leads_there(of) && of.kind != PreviewKind::Private)).await
            })
            .await
    }

    pub(crate) async fn exposed(&self, caller: &Caller, id: SessionId) -> Result<Vec<PreviewUrl>, Error> {
        if let Found::Ended(_) = self.registry.find(caller, id).await? {
            return Ok(Vec::new());
        }
        let mut exposed = self.table.bound_to(id);
        // What is over lets nobody in any more, also while that is not recorded yet.
        let now = self.shared.clock.now();
        let is_exposed = |of: &Preview| of.kind != PreviewKind::Private && of.state == PreviewState::Live;
        exposed.retain(|of| is_exposed(of) && !is_over(of, now));
        exposed.sort_by_key(|of| (of.binding.map(|binding| binding.port), of.created_at, of.id));
        Ok(exposed.into_iter().map(|preview| self.with_url(preview)).collect())
    }

    pub(crate) async fn create(self: &Arc<Self>, caller: &Caller, new: NewPreview) -> Result<PreviewUrl, Error> {
        self.shared.access.workspace(caller, new.workspace_id)?;
        validate::slug(&new.slug)?;
        validate::expires_at(new.expires_at, self.shared.clock.now())?;
        if let Some(binding) = new.binding {
            validate::port(binding.port)?;
            self.registry.find_live(caller, binding.session_id, Request::Change).await?;
        }
        let (previews, caller) = (self.clone(), *caller);
        self.shared
            .detached(async move {
                let _quiet = previews.quiet().await;
                if previews.table.labelled(&new.slug).is_some() {
                    return Err(Code::SlugTaken.into());
                }
                let preview = previews.new_preview(&caller, PreviewKind::Named, new.slug);
                previews.put(Preview { binding: new.binding, expires_at: new.expires_at, ..preview }).await
            })
            .await
    }

    pub(crate) fn get(&self, caller: &Caller, id: PreviewId) -> Result<PreviewUrl, Error> {
        self.find_named(caller, self.table.get(id)).map(|preview| self.with_url(preview))
    }

    pub(crate) fn get_by_slug(&self, caller: &Caller, slug: &str) -> Result<PreviewUrl, Error> {
        self.find_named(caller, self.table.labelled(slug)).map(|preview| self.with_url(preview))
    }

    pub(crate) async fn list(&self, caller: &Caller, list: ListPreviews) -> Result<(Vec<PreviewUrl>, String), Error> {
        let workspace = self.shared.access.workspace(caller, list.workspace_id)?;
        let size = query::page_size(list.page_size)?;
        let query = PreviewQuery {
            workspace_id: Some(workspace.id),
            kind: Some(PreviewKind::Named),
            session_id: list.session_id,
            before: query::parse_page_token(&list.page_token)?.map(|(at, id)| (at, PreviewId::from_uuid(id))),
            limit: size + 1,
        };
        let mut previews = self.shared.store.previews(query).await.map_err(store_error)?;
        let next = query::page(&mut previews, size, |last| (last.created_at, *last.id.as_uuid()));
        // One that is being made may still come to nothing.
        previews.retain(|of| of.state == PreviewState::Live);
        Ok((previews.into_iter().map(|preview| self.with_url(preview)).collect(), next))
    }

    pub(crate) async fn bind(
        self: &Arc<Self>,
        caller: &Caller,
        id: PreviewId,
        binding: Binding,
        expires_at: Option<UnixMs>,
    ) -> Result<PreviewUrl, Error> {
        validate::port(binding.port)?;
        validate::expires_at(expires_at, self.shared.clock.now())?;
        self.find_named(caller, self.table.get(id))?;
        self.registry.find_live(caller, binding.session_id, Request::Change).await?;
        self.change(caller, id, move |preview| {
            preview.binding = Some(binding);
            preview.expires_at = expires_at;
        })
        .await
    }

    pub(crate) async fn unbind(self: &Arc<Self>, caller: &Caller, id: PreviewId) -> Result<PreviewUrl, Error> {
        self.change(caller, id, |preview| (preview.binding, preview.expires_at) = (None, None)).await
    }

    async fn change(
        self: &Arc<Self>,
        caller: &Caller,
        id: PreviewId,
        change: impl FnOnce(&mut Preview) + Send + 'static,
    ) -> Result<PreviewUrl, Error> {
        let (previews, caller) = (self.clone(), *caller);
        self.shared
            .detached(async move {
                let _quiet = previews.quiet().await;
                let mut preview = previews.find_named(&caller, previews.table.get(id))?;
                change(&mut preview);
                previews.put(preview).await
            })
            .await
    }

    pub(crate) async fn delete(self: &Arc<Self>, caller: &Caller, id: PreviewId) -> Result<(), Error> {
        let (previews, caller) = (self.clone(), *caller);
        self.shared
            .detached(async move {
                let _quiet = previews.quiet().await;
                let preview = previews.find_named(&caller, previews.table.get(id))?;
                previews.forget(&preview).await
            })
            .await
    }

    /// A session that has not ended, and lets itself be reached from outside.
    async fn find_inbound(&self, caller: &Caller, id: SessionId) -> Result<(), Error> {
        let live = self.registry.find_live(caller, id, Request::Change).await?;
        let inbound = live.published.borrow().inbound;
        if inbound { Ok(()) } else { Err(Code::InboundDisabled.into()) }
    }

    fn with_url(&self, preview: Preview) -> PreviewUrl {
        PreviewUrl { url: self.table.url(preview.id), preview }
    }

    /// The one place where a caller's right to a named preview is checked.
    fn find_named(&self, caller: &Caller, preview: Option<Preview>) -> Result<Preview, Error> {
        let mine = |of: &Preview| of.workspace_id == caller.workspace_id && of.kind == PreviewKind::Named;
        preview.filter(|of| mine(of) && of.state == PreviewState::Live).ok_or_else(|| Code::PreviewNotFound.into())
    }

    fn new_preview(&self, caller: &Caller, kind: PreviewKind, label: String) -> Preview {
        let now = self.shared.clock.now();
        Preview {
            id: PreviewId::new(now, self.shared.random()),
            workspace_id: caller.workspace_id,
            owner_id: caller.key_id,
            kind,
            state: PreviewState::Making,
            label,
            binding: None,
            expires_at: None,
            ingress_port: 0,
            created_at: now,
            updated_at: now,
            last_accessed_at: None,
        }
    }

    /// The preview with this slug, or a new one.
    fn named(&self, caller: &Caller, slug: &str) -> Result<Preview, Error> {
        match self.table.labelled(slug) {
            // Whose it is, is nobody else's business.
            Some(preview) => self.find_named(caller, Some(preview)).map_err(|_| Code::SlugTaken.into()),
            None => Ok(self.new_preview(caller, PreviewKind::Named, slug.to_owned())),
        }
    }

    /// The session's preview of this kind and port, or a new one.
    fn unnamed(&self, caller: &Caller, kind: PreviewKind, binding: Binding) -> Preview {
        let is_live = |of: &Preview| of.state == PreviewState::Live;
        let existing = self.table.filter(|of| of.kind == kind && of.binding == Some(binding) && is_live(of));
        existing.into_iter().next().unwrap_or_else(|| {
            // 128 random bits: nobody guesses it, and no slug is the same.
            let label = format!("p{:032x}", u128::from_be_bytes(self.shared.random()));
            self.new_preview(caller, kind, label)
        })
    }

    /// Waits until nobody else changes a preview. Held from a look at the table to the ingress's answer, by whoever makes,
    /// changes or removes one.
    async fn quiet(&self) -> MutexGuard<'_, ()> {
        self.quiet.lock().await
    }

    /// Records a preview that is new or changed, and sees to it that it can be reached. For holders of the lock.
    async fn put(self: &Arc<Self>, mut preview: Preview) -> Result<PreviewUrl, Error> {
        self.check_limits(&preview)?;
        preview.updated_at = self.shared.clock.now();
        let is_new = preview.state == PreviewState::Making;
        self.shared.write(vec![Change::Preview(preview.clone())]).await?;
        self.table.put(preview.clone());
        if self.table.url(preview.id).is_empty() {
            match self.publish(preview.clone()).await {
                Ok(published) => preview = published,
                Err(error) if is_new => {
                    self.keep_forgetting(preview);
                    return Err(error);
                }
                // It was there before and is not lost: the attempts to publish it go on.
                Err(error) => tracing::warn!(preview = %preview.id, %error, "a preview cannot be reached yet"),
            }
        }
        self.shared.deadlines.set(Sleeper::Preview(preview.id), preview.expires_at);
        // Its session may have ended while this was done. Then either its task has seen the preview, or this sees its end.
        if let Some(binding) = preview.binding
            && self.registry.live.get(binding.session_id).is_none()
        {
            self.session_ended(binding.session_id);
            return Err(Code::SessionTerminated.into());
        }
        Ok(self.with_url(preview))
    }

    fn check_limits(&self, preview: &Preview) -> Result<(), Error> {
        let before = self.table.get(preview.id);
        if let Some(binding) = preview.binding.filter(|binding| {
            before.as_ref().and_then(|of| of.binding).is_none_or(|of| of.session_id != binding.session_id)
        }) {
            let max = self.shared.config.exposed_ports_max;
            if self.table.bound_to(binding.session_id).len() >= max as usize {
                return Err(Error::new(Code::PortLimit, format!("the server's exposed_ports_max is {max}")));
            }
        }
        if before.is_some() {
            return Ok(());
        }
        let max = self.shared.config.previews_max;
        if self.table.filter(|_| true).len() >= max as usize {
            return Err(Error::new(Code::CapacityUnavailable, format!("the server's previews_max is {max}")));
        }
        let Some(max) = self.shared.access.settings(preview.workspace_id).preview_urls_max else { return Ok(()) };
        let named = |of: &Preview| of.workspace_id == preview.workspace_id && of.kind == PreviewKind::Named;
        if named(preview) && self.table.filter(named).len() >= max as usize {
            return Err(Error::new(Code::QuotaExceeded, format!("the workspace's preview_urls_max is {max}")));
        }
        Ok(())
    }

    /// Makes a recorded preview reachable, and records the port that it got.
    async fn publish(&self, mut preview: Preview) -> Result<Preview, Error> {
        let published = self.ingress.publish(&preview.label, preview.ingress_port).await;
        let published = published.map_err(|reason| Error::new(Code::PreviewFailed, reason))?;
        if preview.state == PreviewState::Making || preview.ingress_port != published.port {
            (preview.state, preview.ingress_port) = (PreviewState::Live, published.port);
            // What is told must be what the next start publishes.
            self.shared.write(vec![Change::Preview(preview.clone())]).await?;
            self.table.put(preview.clone());
        }
        self.table.set_url(preview.id, published.url);
        Ok(preview)
    }

    /// Lets previews lead nowhere any more: named ones are unbound, others removed. For holders of the lock.
    async fn release(&self, previews: Vec<Preview>) -> Result<(), Error> {
        let now = self.shared.clock.now();
        let (named, others): (Vec<_>, Vec<_>) = previews.into_iter().partition(|of| of.kind == PreviewKind::Named);
        let unbound = |of: Preview| Preview { binding: None, expires_at: None, updated_at: now, ..of };
        let named: Vec<Preview> = named.into_iter().map(unbound).collect();
        if named.is_empty() && others.is_empty() {
            return Ok(());
        }
        let mut changes: Vec<Change> = named.iter().cloned().map(Change::Preview).collect();
        changes.extend(others.iter().map(|of| Change::ForgetPreview(of.id)));
        self.shared.write(changes).await?;
        for preview in named {
            self.shared.deadlines.set(Sleeper::Preview(preview.id), None);
            self.table.put(preview);
        }
        for preview in others {
            self.withdraw(&preview).await;
        }
        Ok(())
    }

    async fn forget(&self, preview: &Preview) -> Result<(), Error> {
        self.shared.write(vec![Change::ForgetPreview(preview.id)]).await?;
        self.withdraw(preview).await;
        Ok(())
    }

    /// Takes a preview that is not recorded any more off the outside.
    async fn withdraw(&self, preview: &Preview) {
        self.shared.deadlines.set(Sleeper::Preview(preview.id), None);
        self.table.remove(preview);
        self.ingress.withdraw(&preview.label).await;
    }

    /// Forgets a preview that nobody was told of, or that leads nowhere any more. Until then its label is not free.
    fn keep_forgetting(self: &Arc<Self>, preview: Preview) {
        let previews = self.clone();
        self.shared.background(async move {
            let forget = || async {
                let _quiet = previews.quiet().await;
                previews.forget(&preview).await
            };
            previews.shared.insist("a preview could not be removed", forget).await;
        });
    }

    /// Removes what led to a session that has ended, but for named previews.
    pub(crate) fn session_ended(self: &Arc<Self>, session_id: SessionId) {
        let goes_too = move |of: &Preview| {
            of.binding.is_some_and(|binding| binding.session_id == session_id) && of.kind != PreviewKind::Named
        };
        if self.table.filter(goes_too).is_empty() {
            return;
        }
        let previews = self.clone();
        self.shared.background(async move {
            let release = || async {
                let _quiet = previews.quiet().await;
                previews.release(previews.table.filter(goes_too)).await
            };
            previews.shared.insist("previews of a session that has ended could not be removed", release).await;
        });
    }

    /// Ends a preview, or a named one's binding, whose time has come.
    pub(crate) fn expire(self: &Arc<Self>, id: PreviewId) {
        let previews = self.clone();
        self.shared.background(async move {
            let expire = || async {
                let _quiet = previews.quiet().await;
                match previews.table.get(id) {
                    Some(preview) if is_over(&preview, previews.shared.clock.now()) => {
                        previews.release(vec![preview]).await
                    }
                    Some(preview) => {
                        previews.shared.deadlines.set(Sleeper::Preview(id), preview.expires_at);
                        Ok(())
                    }
                    None => Ok(()),
                }
            };
            previews.shared.insist("an expired preview could not be removed", expire).await;
        });
    }

    /// Publishes again what the last server had, and removes what it left unfinished.
    pub(crate) async fn recover(self: &Arc<Self>, previews: Vec<Preview>) {
        for id in previews.into_iter().map(|preview| preview.id) {
            let _quiet = self.quiet().await;
            // Sessions that came to their end just now have taken theirs with them.
            let Some(preview) = self.table.get(id) else { continue };
            let ended = preview.binding.is_some_and(|binding| self.registry.live.get(binding.session_id).is_none());
            let named = preview.kind == PreviewKind::Named;
            if preview.state == PreviewState::Making || (ended && !named) {
                self.keep_forgetting(preview);
                continue;
            }
            self.shared.deadlines.set(Sleeper::Preview(id), preview.expires_at);
            if is_over(&preview, self.shared.clock.now()) && !named {
                continue;
            }
            if let Err(error) = self.publish(preview).await {
                tracing::warn!(preview = %id, %error, "a preview cannot be reached yet; trying again");
                self.keep_publishing(id);
            }
        }
    }

    fn keep_publishing(self: &Arc<Self>, id: PreviewId) {
        let previews = self.clone();
        self.shared.background(async move {
            let publish = || async {
                let _quiet = previews.quiet().await;
                match previews.table.get(id) {
                    Some(preview) if previews.table.url(id).is_empty() => previews.publish(preview).await.map(|_| ()),
                    _ => Ok(()),
                }
            };
            previews.shared.insist("a preview cannot be reached yet", publish).await;
        });
    }
}

/// Whether its time has come.
fn is_over(preview: &Preview, now: UnixMs) -> bool {
    preview.expires_at.is_some_and(|at| at <= now)
}
