//! What clients do with previews, and visitors who come to them.

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{PreviewId, SessionId};
use nagaya_engine::fake::Rng;
use nagaya_engine::model::{Binding, PreviewKind};
use nagaya_engine::ports::Clock;
use nagaya_engine::{Engine, ListPreviews, NewExposure, NewPreview};

use crate::clients::{Failure, Outcome, UNUSABLE, allow, must};
use crate::world::World;

#[derive(Debug, Clone)]
pub enum Viewing {
    /// Until the session's end, or for this long.
    Expose(SessionId, usize, u16, Option<u64>),
    Unexpose(SessionId, usize, u16),
    Create(usize, String),
    Bind(PreviewId, usize, SessionId, u16),
    /// The same by exposing the port under its slug.
    BindBySlug(PreviewId, usize, SessionId, u16),
    Unbind(PreviewId, usize),
    Delete(PreviewId, usize),
    OpenPrivate(SessionId, usize, u16),
    /// Some preview of some session, for this long.
    SshSession(u64, u64),
}

impl Viewing {
    pub fn choose(world: &World, rng: &mut Rng, id: SessionId, tenant: usize) -> Self {
        let model = world.model.borrow();
        let mine: Vec<PreviewId> = model.named.iter().filter(|(_, (of, _))| *of == tenant).map(|(id, _)| *id).collect();
        let named = mine.get(rng.below(mine.len() as u64) as usize).copied();
        let port = 1 + rng.below(3) as u16;
        match (rng.below(100), named) {
            (0..20, _) => Self::Expose(id, tenant, port, rng.per_mille(300).then(|| 1 + rng.below(5_000))),
            (20..28, _) => Self::Unexpose(id, tenant, port),
            (28..36, _) => Self::Create(tenant, format!("slug-{}", rng.below(4))),
            (36..44, Some(named)) => Self::Bind(named, tenant, id, port),
            (44..50, Some(named)) => Self::BindBySlug(named, tenant, id, port),
            (50..54, Some(named)) => Self::Unbind(named, tenant),
            (54..58, Some(named)) => Self::Delete(named, tenant),
            (58..66, _) => Self::OpenPrivate(id, tenant, port),
            _ => Self::SshSession(rng.next(), rng.below(300)),
        }
    }
}

pub async fn view(world: &World, engine: &Engine, viewing: Viewing) -> Outcome {
    match viewing {
        Viewing::Expose(id, tenant, port, for_ms) => expose(world, engine, id, tenant, port, for_ms).await,
        Viewing::Unexpose(id, tenant, port) => unexpose(world, engine, id, tenant, port).await,
        Viewing::Create(tenant, slug) => create(world, engine, tenant, slug).await,
        Viewing::Bind(id, tenant, session_id, port) => {
            let binding = Binding { session_id, port };
            let caller = world.tenants[tenant];
            let bind = async { engine.bind_preview(&caller, id, binding, None).await.map(drop) };
            change(world, id, tenant, Some(binding), bind).await
        }
        Viewing::BindBySlug(id, tenant, session_id, port) => {
            let caller = world.tenants[tenant];
            let known = world.fakes.store.previews_now().into_iter().find(|of| of.id == id);
            let Some(slug) = known.map(|of| of.label) else { return Ok(()) };
            let new = NewExposure { port, expires_at: None, slug: Some(slug) };
            let bind = async { engine.expose_port(&caller, session_id, new).await.map(drop) };
            change(world, id, tenant, Some(Binding { session_id, port }), bind).await
        }
        Viewing::Unbind(id, tenant) => {
            let caller = world.tenants[tenant];
            let unbind = async { engine.unbind_preview(&caller, id).await.map(drop) };
            change(world, id, tenant, None, unbind).await
        }
        Viewing::Delete(id, tenant) => {
            world.model.borrow_mut().named.remove(&id);
            let answer = engine.delete_preview(&world.tenants[tenant], id).await;
            let gone = !world.fakes.store.previews_now().iter().any(|of| of.id == id);
            must!(answer.is_err() || gone, "a deleted preview is still recorded");
            allow(answer, &[Code::PreviewNotFound])
        }
        Viewing::OpenPrivate(id, tenant, port) => open_private(world, engine, id, tenant, port).await,
        Viewing::SshSession(which, for_ms) => visit(world, engine, which, for_ms).await,
    }
}

/// Takes for granted what a session that has ended or an ingress that fails make of a request.
fn allow_failing(world: &World, answer: Result<(), Error>, always: &[Code]) -> Outcome {
    let mut codes = [always, &[Code::SessionTerminated]].concat();
    if world.failures_possible.get() {
        codes.push(Code::PreviewFailed);
    }
    allow(answer, &codes)
}

async fn expose(
    world: &World,
    engine: &Engine,
    id: SessionId,
    tenant: usize,
    port: u16,
    for_ms: Option<u64>,
) -> Outcome {
    if !world.model.borrow_mut().exposing.insert((id, port)) {
        return Ok(());
    }
    // Until it is answered, nobody knows whether the old or the new one counts.
    let before = world.model.borrow_mut().exposed.remove(&(id, port));
    let expires_at = for_ms.map(|ms| world.fakes.clock.now() + ms);
    let answer = engine.expose_port(&world.tenants[tenant], id, NewExposure { port, expires_at, slug: None }).await;
    let mut model = world.model.borrow_mut();
    model.exposing.remove(&(id, port));
    match answer {
        Ok(exposed) => {
            let same = before.is_none_or(|before| before == exposed.preview.id);
            must!(same, "port {port} of {id} was exposed twice");
            must!(exposed.url.ends_with(&exposed.preview.ingress_port.to_string()), "{exposed:?}");
            must!(exposed.preview.kind == PreviewKind::Exposed, "{exposed:?}");
            if for_ms.is_none() {
                model.exposed.insert((id, port), exposed.preview.id);
            }
            Ok(())
        }
        Err(error) => allow_failing(world, Err(error), &[]),
    }
}

async fn unexpose(world: &World, engine: &Engine, id: SessionId, tenant: usize, port: u16) -> Outcome {
    if !world.model.borrow_mut().exposing.insert((id, port)) {
        return Ok(());
    }
    let binding = Some(Binding { session_id: id, port });
    {
        let mut model = world.model.borrow_mut();
        model.exposed.remove(&(id, port));
        // It also unbinds.
        model.named.values_mut().filter(|(_, of)| *of == Some(binding)).for_each(|(_, of)| *of = None);
    }
    let answer = engine.unexpose_port(&world.tenants[tenant], id, port).await;
    world.model.borrow_mut().exposing.remove(&(id, port));
    if answer.is_ok() {
        let left = world.fakes.store.previews_now();
        let still = left.iter().find(|of| of.binding == binding && of.kind == PreviewKind::Exposed);
        must!(still.is_none(), "port {port} of {id} is still exposed: {still:?}");
    }
    allow_failing(world, answer, &[])
}

async fn create(world: &World, engine: &Engine, tenant: usize, slug: String) -> Outcome {
    match engine.create_preview(&world.tenants[tenant], NewPreview { slug, ..NewPreview::default() }).await {
        Ok(made) => {
            must!(!made.url.is_empty() && made.preview.binding.is_none(), "a new preview is {made:?}");
            // Somebody may have bound it by its slug already.
            world.model.borrow_mut().named.insert(made.preview.id, (tenant, None));
        }
        Err(error) => return allow_failing(world, Err(error), &[Code::SlugTaken]),
    }
    let found = engine.list_previews(&world.tenants[1 - tenant], ListPreviews::default()).await?.0;
    let foreign = found.iter().find(|of| of.preview.workspace_id == world.tenants[tenant].workspace_id);
    must!(foreign.is_none(), "another workspace sees {foreign:?}");
    Ok(())
}

/// Changes where a named preview leads.
async fn change(
    world: &World,
    id: PreviewId,
    tenant: usize,
    binding: Option<Binding>,
    changing: impl Future<Output = Result<(), Error>>,
) -> Outcome {
    if !world.model.borrow_mut().binding.insert(id) {
        return Ok(());
    }
    let answer = changing.await;
    let mut model = world.model.borrow_mut();
    model.binding.remove(&id);
    // Taking the port off the outside unbinds it as well; whether before or after is not known.
    let port_changes = binding.is_some_and(|of| model.exposing.contains(&(of.session_id, of.port)));
    if let Some((of, known)) = model.named.get_mut(&id) {
        must!(*of == tenant, "a preview changed hands");
        *known = (answer.is_ok() && !port_changes).then_some(binding);
    }
    drop(model);
    allow_failing(world, answer, &[Code::PreviewNotFound, Code::SlugTaken])
}

async fn open_private(world: &World, engine: &Engine, id: SessionId, tenant: usize, port: u16) -> Outcome {
    let opened = match engine.open_preview(&world.tenants[tenant], id, port, None).await {
        Ok(opened) => opened,
        Err(error) => return allow_failing(world, Err(error), &[]),
    };
    let label = &opened.preview.label;
    let gone = [Code::PreviewNotFound, Code::SessionTerminated];
    match engine.enter_preview(label, None).await {
        Err(error) => allow(Err(error), &[&gone[..], &[Code::PreviewPrivate]].concat())?,
        Ok(_) => return Err(Failure::Broken("a private preview let somebody in without a token".into())),
    }
    entered(world, engine.enter_preview(label, Some(&opened.viewer_token)).await.map(|visit| visit.port == port))
}

/// Somebody got in, or the session or preview was not there for them.
fn entered(world: &World, answer: Result<bool, Error>) -> Outcome {
    let answer = match answer {
        Ok(right) => {
            must!(right, "a visitor got elsewhere");
            world.model.borrow_mut().visited = true;
            Ok(())
        }
        Err(error) => Err(error),
    };
    let absent = [Code::PreviewNotFound, Code::PreviewUnbound, Code::InboundDisabled];
    // Visitors wake sessions, and then the driver may have no room.
    let asleep = [Code::PreviewPaused, Code::ResumeFailed, Code::CapacityUnavailable];
    allow(answer, &[&absent[..], &asleep, &UNUSABLE].concat())
}

async fn visit(world: &World, engine: &Engine, which: u64, for_ms: u64) -> Outcome {
    let previews = world.fakes.store.previews_now();
    let Some(preview) = previews.get((which % previews.len().max(1) as u64) as usize).cloned() else { return Ok(()) };
    let ended = |id: SessionId| world.model.borrow().ended.contains(&id);
    let ended_before = preview.binding.is_some_and(|binding| ended(binding.session_id));
    match engine.enter_preview(&preview.label, None).await {
        Err(error) if preview.kind == PreviewKind::Private => {
            allow(Err(error), &[Code::PreviewPrivate, Code::PreviewNotFound, Code::SessionTerminated])
        }
        Ok(visit) => {
            must!(preview.kind != PreviewKind::Private, "a private preview let somebody in without a token");
            let same = preview.binding == Some(Binding { session_id: visit.session_id, port: visit.port });
            must!(!(same && ended_before), "somebody got into a session that has ended");
            world.sleep(for_ms).await;
            drop(visit);
            entered(world, Ok(true))
        }
        Err(error) => entered(world, Err(error)),
    }
}
