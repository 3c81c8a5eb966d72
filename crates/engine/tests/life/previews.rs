//! Previews: who may have which, where they lead, how long, and what becomes of them.

use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_api::ids::{KeyId, PreviewId, SessionId, WorkspaceId};
use nagaya_engine::model::{
    Binding, Preview, PreviewKind, PreviewState, SessionState, UnixMs, WakeOnVisit, Workspace, WorkspaceSettings,
};
use nagaya_engine::ports::{Change, Clock, Store};
use nagaya_engine::{
    Caller, EngineConfig, Fork, ListPreviews, NewExposure, NewPreview, NewSession, PreviewConnection, PreviewUrl,
    SessionUpdate, WorkspaceSettingsUpdate,
};

use crate::support::{World, code, idle};

const MINUTE: u64 = 60_000;

fn open() -> NewSession {
    NewSession { inbound: true, ..NewSession::default() }
}

fn port(port: u16) -> NewExposure {
    NewExposure { port, ..NewExposure::default() }
}

fn named(port: u16, slug: &str) -> NewExposure {
    NewExposure { port, slug: Some(slug.into()), ..NewExposure::default() }
}

fn slug(slug: &str) -> NewPreview {
    NewPreview { slug: slug.into(), ..NewPreview::default() }
}

fn bound(session_id: SessionId, port: u16) -> Binding {
    Binding { session_id, port }
}

impl World {
    async fn session_with_inbound(&self) -> SessionId {
        self.run(open()).await.id
    }

    async fn expose(&self, id: SessionId, new: NewExposure) -> PreviewUrl {
        self.engine.expose_port(&self.caller, id, new).await.unwrap()
    }

    async fn create(&self, name: &str) -> PreviewUrl {
        self.engine.create_preview(&self.caller, slug(name)).await.unwrap()
    }

    async fn bind(&self, id: PreviewId, binding: Binding) -> PreviewUrl {
        self.engine.bind_preview(&self.caller, id, binding, None).await.unwrap()
    }

    async fn exposed(&self, id: SessionId) -> Vec<PreviewUrl> {
        self.engine.exposed_ports(&self.caller, id).await.unwrap()
    }

    async fn visit(&self, preview: &PreviewUrl) -> PreviewConnection {
        self.engine.enter_preview(&preview.preview.label, None).await.unwrap()
    }

    async fn refusal(&self, preview: &PreviewUrl) -> Code {
        code(self.engine.enter_preview(&preview.preview.label, None).await)
    }

    fn published(&self) -> Vec<String> {
        self.fakes.ingress.published().into_keys().collect()
    }
}

fn led_to(visit: &PreviewConnection) -> (SessionId, u16) {
    (visit.session_id, visit.port)
}

#[tokio::test(start_paused = true)]
async fn an_exposed_port_can_be_visited_until_it_is_unexposed() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let web = world.expose(id, port(3_000)).await;
    assert_eq!((web.preview.kind, web.preview.binding), (PreviewKind::Exposed, Some(bound(id, 3_000))));
    assert_eq!(web.url, format!("http://127.0.0.1:{}", web.preview.ingress_port));
    assert_eq!(web.preview.label.len(), 33, "a name that nobody guesses");
    assert_eq!(led_to(&world.visit(&web).await), (id, 3_000));

    let again = world.expose(id, port(3_000)).await;
    assert_eq!((again.preview.id, &again.url), (web.preview.id, &web.url), "exposing it again changes nothing");
    let api = world.expose(id, port(8_080)).await;
    assert_ne!(api.url, web.url);
    let listed: Vec<_> = world.exposed(id).await.into_iter().map(|of| of.url).collect();
    assert_eq!(listed, [web.url.clone(), api.url.clone()]);
    assert_eq!(world.published().len(), 2);

    for _ in 0..2 {
        world.engine.unexpose_port(&world.caller, id, 3_000).await.unwrap();
        assert_eq!(world.refusal(&web).await, Code::PreviewNotFound);
        assert_eq!(world.published(), [api.preview.label.as_str()]);
    }
    assert_eq!(code(world.engine.enter_preview("no-such-label", None).await), Code::PreviewNotFound);
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_exposed_is_refused_by_its_reason() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let closed = world.running().await;
    let (engine, caller, now) = (&world.engine, &world.caller, world.fakes.clock.now());
    assert_eq!(code(engine.expose_port(caller, id, port(0)).await), Code::InvalidArgument);
    assert_eq!(code(engine.unexpose_port(caller, id, 0).await), Code::InvalidArgument);
    assert_eq!(code(engine.open_preview(caller, id, 0, None).await), Code::InvalidArgument);
    let past = NewExposure { expires_at: Some(now), ..port(80) };
    assert_eq!(code(engine.expose_port(caller, id, past).await), Code::InvalidArgument);
    assert_eq!(code(engine.open_preview(caller, id, 80, Some(now)).await), Code::InvalidArgument);
    assert_eq!(code(engine.expose_port(caller, id, named(80, "no_slug")).await), Code::InvalidArgument);
    assert_eq!(code(engine.create_preview(caller, slug("api")).await), Code::InvalidArgument);
    assert_eq!(code(engine.expose_port(caller, closed, port(80)).await), Code::InboundDisabled);
    assert_eq!(code(engine.open_preview(caller, closed, 80, None).await), Code::InboundDisabled);
    engine.terminate_session(caller, closed).await.unwrap();
    assert_eq!(code(engine.expose_port(caller, closed, port(80)).await), Code::SessionTerminated);

    let shop = world.create("shop").await;
    assert_eq!(code(engine.create_preview(caller, slug("shop")).await), Code::SlugTaken);
    let dead = engine.bind_preview(caller, shop.preview.id, bound(closed, 80), None).await;
    assert_eq!(code(dead), Code::SessionTerminated);
    let nowhere = engine.bind_preview(caller, shop.preview.id, bound(id, 0), None).await;
    assert_eq!(code(nowhere), Code::InvalidArgument);
    let unknown = engine.bind_preview(caller, shop.preview.id, bound(SessionId::new(1, [0; 10]), 80), None).await;
    assert_eq!(code(unknown), Code::SessionNotFound);
    assert_eq!(world.published(), ["shop"]);
}

#[tokio::test(start_paused = true)]
async fn another_workspace_sees_and_changes_nothing() {
    let world = World::new().await;
    let other = Caller { workspace_id: WorkspaceId::new(1, [1; 10]), key_id: KeyId::new(1, [1; 10]) };
    let settings = WorkspaceSettings::default();
    let workspace = Workspace { id: other.workspace_id, name: "other".into(), created_at: 1, settings };
    world.fakes.store.commit(vec![Change::Workspace(workspace)]).await.unwrap();
    let world = world.restart(|_| ()).await;
    let id = world.session_with_inbound().await;
    let shop = world.expose(id, named(80, "shop")).await;
    let private = world.engine.open_preview(&world.caller, id, 81, None).await.unwrap();

    let (engine, shop_id) = (&world.engine, shop.preview.id);
    let theirs = engine.create_session(&other, open()).await.unwrap().id;
    assert_eq!(code(engine.expose_port(&other, theirs, named(80, "shop")).await), Code::SlugTaken);
    assert_eq!(code(engine.create_preview(&other, slug("shop")).await), Code::SlugTaken);
    assert_eq!(code(engine.preview(&other, shop_id).await), Code::PreviewNotFound);
    assert_eq!(code(engine.preview_by_slug(&other, "shop").await), Code::PreviewNotFound);
    assert_eq!(code(engine.bind_preview(&other, shop_id, bound(theirs, 80), None).await), Code::PreviewNotFound);
    assert_eq!(code(engine.unbind_preview(&other, shop_id).await), Code::PreviewNotFound);
    assert_eq!(code(engine.delete_preview(&other, shop_id).await), Code::PreviewNotFound);
    assert_eq!(code(engine.resolve_preview_token(&other, "shop").await), Code::PreviewNotFound);
    assert_eq!(code(engine.touch_preview(&other, &private.viewer_token).await), Code::PreviewNotFound);
    assert_eq!(code(engine.expose_port(&other, id, port(80)).await), Code::SessionNotFound);
    assert_eq!(code(engine.unexpose_port(&other, id, 80).await), Code::SessionNotFound);
    assert_eq!(code(engine.exposed_ports(&other, id).await), Code::SessionNotFound);
    assert_eq!(code(engine.open_preview(&other, id, 80, None).await), Code::SessionNotFound);
    let mine = engine.create_preview(&other, slug("mine")).await.unwrap();
    assert_eq!(code(engine.bind_preview(&other, mine.preview.id, bound(id, 80), None).await), Code::SessionNotFound);
    assert_eq!(engine.list_previews(&other, ListPreviews::default()).await.unwrap().0, [mine]);
    assert_eq!(engine.list_previews(&world.caller, ListPreviews::default()).await.unwrap().0, [shop]);
}

#[tokio::test(start_paused = true)]
async fn a_named_preview_outlives_sessions_and_can_be_led_elsewhere() {
    let world = World::new().await;
    let [blue, green] = [world.session_with_inbound().await, world.session_with_inbound().await];
    let shop = world.create("shop").await;
    let id = shop.preview.id;
    assert_eq!((shop.preview.label.as_str(), shop.preview.binding), ("shop", None));
    assert_eq!(world.refusal(&shop).await, Code::PreviewUnbound);

    assert_eq!(world.bind(id, bound(blue, 80)).await.url, shop.url);
    let under_way = world.visit(&shop).await;
    assert_eq!(led_to(&under_way), (blue, 80));
    world.fakes.clock.advance(5);
    let rebound = world.bind(id, bound(green, 81)).await;
    assert!(rebound.preview.updated_at > shop.preview.updated_at && rebound.url == shop.url);
    assert_eq!(led_to(&world.visit(&shop).await), (green, 81));
    let guest = world.fakes.driver.guest(blue).unwrap();
    assert!(std::ptr::addr_eq(&*under_way.guest, &*guest), "a visit goes on where it began");

    world.engine.terminate_session(&world.caller, green).await.unwrap();
    idle().await;
    assert_eq!(world.refusal(&shop).await, Code::SessionTerminated);
    assert_eq!(world.exposed(green).await, []);
    assert_eq!(world.engine.preview(&world.caller, id).await.unwrap().preview.binding, Some(bound(green, 81)));
    let resolved = world.engine.resolve_preview_token(&world.caller, "shop").await.unwrap();
    assert!(resolved.is_offline);

    let exposed = world.expose(blue, named(82, "shop")).await;
    assert_eq!((exposed.preview.id, &exposed.url), (id, &shop.url), "exposing a port under its slug binds it");
    assert_eq!(led_to(&world.visit(&shop).await), (blue, 82));
    world.engine.unexpose_port(&world.caller, blue, 82).await.unwrap();
    assert_eq!(world.refusal(&shop).await, Code::PreviewUnbound);
    for _ in 0..2 {
        assert_eq!(world.engine.unbind_preview(&world.caller, id).await.unwrap().preview.binding, None);
    }
    assert_eq!(world.engine.preview_by_slug(&world.caller, "shop").await.unwrap().preview.id, id);
    world.engine.delete_preview(&world.caller, id).await.unwrap();
    assert_eq!(code(world.engine.delete_preview(&world.caller, id).await), Code::PreviewNotFound);
    assert_eq!(world.refusal(&shop).await, Code::PreviewNotFound);
    assert!(world.published().is_empty() && world.fakes.store.previews_now().is_empty());
    assert_ne!(world.create("shop").await.preview.id, id, "the slug is free again");
}

#[tokio::test(start_paused = true)]
async fn a_named_preview_may_lead_to_a_closed_session_but_lets_nobody_in() {
    let world = World::new().await;
    let closed = world.running().await;
    let new = NewPreview { binding: Some(bound(closed, 80)), ..slug("shop") };
    let shop = world.engine.create_preview(&world.caller, new).await.unwrap();
    assert_eq!(world.refusal(&shop).await, Code::InboundDisabled);
}

#[tokio::test(start_paused = true)]
async fn limits_are_refused_with_their_names() {
    let config = EngineConfig { exposed_ports_max: 2, previews_max: 4, ..EngineConfig::default() };
    let world = World::with(config).await;
    let [first, second] = [world.session_with_inbound().await, world.session_with_inbound().await];
    world.expose(first, port(1)).await;
    world.expose(first, named(2, "shop")).await;
    let refused = world.engine.expose_port(&world.caller, first, port(3)).await.unwrap_err();
    assert_eq!(refused.to_string(), "maximum exposed ports reached: the server's exposed_ports_max is 2");
    world.expose(first, port(1)).await;
    let shop = world.create("other").await.preview.id;
    assert_eq!(
        code(world.engine.bind_preview(&world.caller, shop, bound(first, 4), None).await),
        Code::PortLimit,
        "a bound preview counts"
    );
    let update = WorkspaceSettingsUpdate { preview_urls_max: Some(Some(2)), ..Default::default() };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let refused = world.engine.create_preview(&world.caller, slug("third")).await.unwrap_err();
    assert_eq!(refused.to_string(), "workspace quota reached: the workspace's preview_urls_max is 2");
    world.expose(second, port(1)).await;
    assert_eq!(code(world.engine.expose_port(&world.caller, second, port(2)).await), Code::CapacityUnavailable);
    assert_eq!(world.published().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn exposures_end_in_time_and_with_their_session() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let until = |minutes: UnixMs| Some(world.fakes.clock.now() + minutes * MINUTE);
    let lasting = world.expose(id, port(1)).await;
    let brief = world.expose(id, NewExposure { expires_at: until(1), ..port(2) }).await;
    let longer = world.expose(id, NewExposure { expires_at: until(1), ..port(3) }).await;
    world.expose(id, NewExposure { expires_at: until(2), ..port(3) }).await;
    let shop = world.expose(id, NewExposure { expires_at: until(1), ..named(4, "shop") }).await;
    assert_eq!(world.exposed(id).await.len(), 4);
    tokio::time::sleep(Duration::from_millis(MINUTE + 10)).await;
    assert_eq!(world.refusal(&brief).await, Code::PreviewNotFound);
    assert_eq!(world.refusal(&shop).await, Code::PreviewUnbound);
    let kept = world.engine.preview(&world.caller, shop.preview.id).await.unwrap().preview;
    assert_eq!((kept.binding, kept.expires_at), (None, None));
    world.visit(&longer).await;
    assert_eq!(world.published().len(), 3);

    world.engine.terminate_session(&world.caller, id).await.unwrap();
    assert!([Code::SessionTerminated, Code::PreviewNotFound].contains(&world.refusal(&lasting).await));
    idle().await;
    assert_eq!(world.refusal(&lasting).await, Code::PreviewNotFound);
    assert_eq!(world.published(), ["shop"]);
    assert_eq!(world.fakes.store.previews_now().len(), 1);
    world.engine.unexpose_port(&world.caller, id, 1).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn urls_are_the_same_after_a_restart() {
    let world = World::new().await;
    let [id, ends] = [world.session_with_inbound().await, world.session_with_inbound().await];
    let until = Some(world.fakes.clock.now() + MINUTE);
    let gone = world.expose(ends, port(1)).await;
    let brief = world.expose(id, NewExposure { expires_at: until, ..port(2) }).await;
    let web = world.expose(id, port(3)).await;
    let crowded = world.expose(id, port(4)).await;
    let shop = world.expose(ends, named(5, "shop")).await;
    world.engine.terminate_session(&world.caller, ends).await.unwrap();
    let world = world
        .restart(|fakes| {
            fakes.clock.advance(2 * MINUTE);
            fakes.ingress.take_port(crowded.preview.ingress_port);
        })
        .await;
    assert_eq!(world.visit(&web).await.port, 3);
    assert_eq!(world.exposed(id).await[0].url, web.url);
    for preview in [&gone, &brief] {
        assert_eq!(world.refusal(preview).await, Code::PreviewNotFound);
    }
    assert_eq!(world.refusal(&shop).await, Code::SessionTerminated);
    assert_eq!(world.engine.preview(&world.caller, shop.preview.id).await.unwrap().url, shop.url);
    // Somebody else has its port: it gets another one, which it keeps.
    let moved = world.exposed(id).await[1].clone();
    assert_ne!(moved.url, crowded.url);
    let world = world.restart(|_| ()).await;
    assert_eq!(world.exposed(id).await[1].url, moved.url);
    assert_eq!(world.published().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn what_the_edge_cannot_publish_is_not_made() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let web = world.expose(id, port(1)).await;
    world.fakes.ingress.refuse("no port is free");
    let refused = world.engine.expose_port(&world.caller, id, port(2)).await.unwrap_err();
    assert_eq!(refused.to_string(), "the server cannot make the port reachable: no port is free");
    assert_eq!(code(world.engine.create_preview(&world.caller, slug("shop")).await), Code::PreviewFailed);
    idle().await;
    assert_eq!(world.fakes.store.previews_now().len(), 1);
    // What was there before a restart is published as soon as that is possible.
    let world = world.restart(|_| ()).await;
    assert!(world.published().is_empty() && world.exposed(id).await[0].url.is_empty());
    world.fakes.ingress.refuse("");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.exposed(id).await[0].url, web.url);
    let shop = world.create("shop").await.preview;
    // One that the last server was still making was told to nobody.
    let unfinished = Preview { state: PreviewState::Making, ..shop };
    world.fakes.store.commit(vec![Change::Preview(unfinished)]).await.unwrap();
    let world = world.restart(|_| ()).await;
    assert_eq!(world.published(), [web.preview.label.as_str()]);
    world.create("shop").await;
}

#[tokio::test(start_paused = true)]
async fn lists_come_in_pages_newest_first() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    world.expose(id, port(1)).await;
    let mut expected = Vec::new();
    for n in 0..5 {
        world.fakes.clock.advance(1);
        expected.insert(0, world.create(&format!("shop-{n}")).await);
    }
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let list = ListPreviews { page_size: 2, page_token, ..ListPreviews::default() };
        let (page, next) = world.engine.list_previews(&world.caller, list).await.unwrap();
        assert!((1..=2).contains(&page.len()));
        found.extend(page);
        page_token = next;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, expected);
    let bound = world.bind(expected[3].preview.id, bound(id, 80)).await;
    let list = ListPreviews { session_id: Some(id), ..ListPreviews::default() };
    assert_eq!(world.engine.list_previews(&world.caller, list).await.unwrap().0, [bound]);
    let list = ListPreviews { page_token: "nonsense".into(), ..ListPreviews::default() };
    assert_eq!(code(world.engine.list_previews(&world.caller, list).await), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_private_preview_opens_for_its_viewers_only() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let opened = world.engine.open_preview(&world.caller, id, 80, None).await.unwrap();
    let other = world.engine.open_preview(&world.caller, id, 81, None).await.unwrap();
    let label = &opened.preview.label;
    let enter = |token: Option<String>| {
        let (engine, label) = (world.engine.clone(), label.clone());
        async move { engine.enter_preview(&label, token.as_deref()).await }
    };
    let visit = enter(Some(opened.viewer_token.clone())).await.unwrap();
    assert_eq!(led_to(&visit), (id, 80));
    for bad in [None, Some(String::new()), Some(other.viewer_token), Some(format!("{}x", opened.viewer_token))] {
        assert_eq!(code(enter(bad).await), Code::PreviewPrivate);
    }
    assert_eq!(world.exposed(id).await, [], "it is nothing that everybody can see");
    let again = world.engine.open_preview(&world.caller, id, 80, None).await.unwrap();
    assert_eq!((again.preview.id, &again.url), (opened.preview.id, &opened.url));
    world.engine.unexpose_port(&world.caller, id, 80).await.unwrap();
    enter(Some(again.viewer_token)).await.unwrap();

    let resolved = world.engine.resolve_preview_token(&world.caller, &opened.viewer_token).await.unwrap();
    assert_eq!((resolved.preview.binding, resolved.is_offline), (Some(bound(id, 80)), false));
    let refused = world.engine.resolve_preview_token(&world.caller, "nvt1.forged").await;
    assert_eq!(code(refused), Code::PreviewNotFound);
    let world = world.restart(|_| ()).await;
    world.engine.enter_preview(label, Some(&opened.viewer_token)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_private_preview_stays_open_while_somebody_looks_at_it() {
    let minutes = |n: u64| Duration::from_millis(n * MINUTE);
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let open = async |port| world.engine.open_preview(&world.caller, id, port, None).await.unwrap();
    let [touched, visited, forgotten] = [open(1).await, open(2).await, open(3).await];
    assert_eq!(touched.expires_at, world.fakes.clock.now() + 60 * MINUTE);
    let enter = async |of: &nagaya_engine::OpenPreview| {
        world.engine.enter_preview(&of.preview.label, Some(&of.viewer_token)).await.map(drop)
    };
    for _ in 0..40 {
        tokio::time::sleep(minutes(30)).await;
        let at = world.engine.touch_preview(&world.caller, &touched.viewer_token).await.unwrap();
        assert_eq!(at, world.fakes.clock.now());
        enter(&visited).await.unwrap();
    }
    idle().await;
    assert_eq!(code(enter(&forgotten).await), Code::PreviewNotFound);
    let seen = world.fakes.store.previews_now();
    let just_now = world.fakes.clock.now() - 100;
    assert!(seen.len() == 2 && seen.iter().all(|of| of.last_accessed_at > Some(just_now)), "{seen:?}");
    // The token has an end nevertheless.
    for _ in 0..9 {
        tokio::time::sleep(minutes(30)).await;
        let _ = enter(&visited).await;
        let _ = world.engine.touch_preview(&world.caller, &touched.viewer_token).await;
    }
    for preview in [&touched, &visited] {
        assert!([Code::PreviewNotFound, Code::PreviewPrivate].contains(&code(enter(preview).await)));
    }
    assert!(world.published().is_empty());
    // Whoever says when it ends is answered with that, and keeps it open no longer.
    let until = Some(world.fakes.clock.now() + 10 * MINUTE);
    let brief = world.engine.open_preview(&world.caller, id, 1, until).await.unwrap();
    assert_eq!(Some(brief.expires_at), until);
    tokio::time::sleep(minutes(9)).await;
    world.engine.touch_preview(&world.caller, &brief.viewer_token).await.unwrap();
    tokio::time::sleep(minutes(1)).await;
    assert!([Code::PreviewNotFound, Code::PreviewPrivate].contains(&code(enter(&brief).await)));
    let far = Some(world.fakes.clock.now() + 1_000_000 * MINUTE);
    let capped = world.engine.open_preview(&world.caller, id, 1, far).await.unwrap();
    assert_eq!(capped.expires_at, world.fakes.clock.now() + 24 * 60 * MINUTE);
}

#[tokio::test(start_paused = true)]
async fn what_is_over_is_not_told_of_even_before_that_is_recorded() {
    let world = World::new().await;
    let id = world.session_with_inbound().await;
    let soon = Some(world.fakes.clock.now() + MINUTE);
    let brief = world.expose(id, NewExposure { expires_at: soon, ..port(80) }).await;
    world.expose(id, NewExposure { expires_at: soon, ..named(81, "shop") }).await;
    assert_eq!(world.exposed(id).await.len(), 2);
    world.fakes.store.fail_commits(true);
    tokio::time::sleep(Duration::from_millis(MINUTE)).await;
    assert_eq!(world.refusal(&brief).await, Code::PreviewNotFound);
    assert_eq!(world.exposed(id).await, []);
    world.fakes.store.fail_commits(false);
}

/// A world whose session sleeps because nobody used it for a minute.
async fn asleep(wake_on_visit: WakeOnVisit) -> (World, SessionId, PreviewUrl) {
    let world = World::with(EngineConfig { wake_on_visit, ..EngineConfig::default() }).await;
    let id = world.run(NewSession { idle_timeout_minutes: Some(1), ..open() }).await.id;
    let web = world.expose(id, port(80)).await;
    tokio::time::sleep(Duration::from_millis(2 * MINUTE)).await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
    (world, id, web)
}

#[tokio::test(start_paused = true)]
async fn a_visit_wakes_a_session_that_fell_asleep_and_keeps_it_awake() {
    let (world, id, web) = asleep(WakeOnVisit::Idle).await;
    let resolved = world.engine.resolve_preview_token(&world.caller, &web.preview.label).await.unwrap();
    assert!(resolved.is_offline);
    let visits = futures_of(10, || world.visit(&web)).await;
    assert_eq!(world.session(id).await.state, SessionState::Running);
    tokio::time::sleep(Duration::from_millis(10 * MINUTE)).await;
    assert_eq!(world.session(id).await.state, SessionState::Running, "it is in use");
    drop(visits);
    tokio::time::sleep(Duration::from_millis(2 * MINUTE)).await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
    // Also when only its disk is left.
    world.fakes.driver.report_memory_low();
    idle().await;
    assert!(world.fakes.driver.is_only_a_disk(id));
    world.visit(&web).await;
    // And when there was a restart meanwhile.
    tokio::time::sleep(Duration::from_millis(2 * MINUTE)).await;
    let world = world.restart(|_| ()).await;
    world.visit(&web).await;
}

async fn futures_of<T, F: Future<Output = T>>(count: usize, make: impl Fn() -> F) -> Vec<T> {
    let mut pending: Vec<_> = (0..count).map(|_| Box::pin(make())).collect();
    let mut done = Vec::new();
    while !pending.is_empty() {
        let ready = std::future::poll_fn(|context| {
            let found = pending.iter_mut().enumerate().find_map(|(index, of)| match of.as_mut().poll(context) {
                std::task::Poll::Ready(value) => Some((index, value)),
                std::task::Poll::Pending => None,
            });
            found.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        });
        let (index, value) = ready.await;
        drop(pending.swap_remove(index));
        done.push(value);
    }
    done
}

#[tokio::test(start_paused = true)]
async fn what_was_paused_by_request_stays_paused() {
    let (world, id, web) = asleep(WakeOnVisit::Idle).await;
    world.pause(id).await;
    let refusal = world.engine.enter_preview(&web.preview.label, None).await.err().unwrap();
    assert_eq!(refusal.to_string(), "the sandbox behind this preview is paused: (state=PAUSED)");
    world.resume(id).await;
    world.visit(&web).await;
    world.pause(id).await;
    assert_eq!(world.refusal(&web).await, Code::PreviewPaused);
    assert_eq!(world.session(id).await.state, SessionState::Paused);
}

#[tokio::test(start_paused = true)]
async fn the_operator_decides_who_is_woken() {
    let (world, id, web) = asleep(WakeOnVisit::Never).await;
    assert_eq!(world.refusal(&web).await, Code::PreviewPaused);
    world.resume(id).await;
    let (world, id, web) = asleep(WakeOnVisit::Always).await;
    world.pause(id).await;
    world.visit(&web).await;
    world.fakes.driver.power_off(id);
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::UserShutdown);
    world.visit(&web).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_may_say_itself_what_visits_do() {
    for server in WakeOnVisit::ALL {
        let world = World::with(EngineConfig { wake_on_visit: server, ..EngineConfig::default() }).await;
        let made = |wake_on_visit| NewSession { wake_on_visit, ..open() };
        let never = world.run(made(Some(WakeOnVisit::Never))).await.id;
        let always = world.run(made(Some(WakeOnVisit::Always))).await.id;
        let forks = world.engine.fork_session(&world.caller, never, Fork { count: 1, name: None }).await.unwrap();
        let fork = world.settled(forks[0].id).await.id;
        let plain = world.run(made(None)).await.id;
        let [of_never, of_always, of_fork, of_plain] = [
            world.expose(never, port(80)).await,
            world.expose(always, port(80)).await,
            world.expose(fork, port(80)).await,
            world.expose(plain, port(80)).await,
        ];
        for id in [never, always, fork, plain] {
            world.pause(id).await;
        }
        // It is recorded.
        let world = world.restart(|_| ()).await;
        world.visit(&of_always).await;
        assert_eq!(world.refusal(&of_never).await, Code::PreviewPaused);
        assert_eq!(world.refusal(&of_fork).await, Code::PreviewPaused);
        match server {
            WakeOnVisit::Always => drop(world.visit(&of_plain).await),
            _ => assert_eq!(world.refusal(&of_plain).await, Code::PreviewPaused),
        }
        let explained = world.engine.explain(&world.caller, never).await.unwrap();
        assert_eq!(explained[0].detail, "it was asked to pause; visits do not resume it");
        // It can be changed while it is stopped, and be given up.
        let update = |wake_on_visit| SessionUpdate { wake_on_visit: Some(wake_on_visit), ..SessionUpdate::default() };
        world.engine.update_session(&world.caller, never, update(Some(WakeOnVisit::Always))).await.unwrap();
        let explained = world.engine.explain(&world.caller, never).await.unwrap();
        assert_eq!(explained[0].detail, "it was asked to pause; a visit resumes it");
        world.visit(&of_never).await;
        world.engine.update_session(&world.caller, never, update(None)).await.unwrap();
        assert_eq!(world.session(never).await.wake_on_visit, None);
    }
    // What fell asleep is woken where its own value says so, whatever the server does.
    let world = World::with(EngineConfig { wake_on_visit: WakeOnVisit::Never, ..EngineConfig::default() }).await;
    let new = NewSession { idle_timeout_minutes: Some(1), wake_on_visit: Some(WakeOnVisit::Idle), ..open() };
    let id = world.run(new).await.id;
    let web = world.expose(id, port(80)).await;
    tokio::time::sleep(Duration::from_millis(2 * MINUTE)).await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
    world.visit(&web).await;
    world.pause(id).await;
    assert_eq!(world.refusal(&web).await, Code::PreviewPaused);
}

#[tokio::test(start_paused = true)]
async fn a_visitor_waits_until_the_session_is_there_but_not_for_ever() {
    let world = World::new().await;
    world.fakes.driver.hold_creates(true);
    let id = world.engine.create_session(&world.caller, open()).await.unwrap().id;
    let web = world.expose(id, port(80)).await;
    let refusal = world.engine.enter_preview(&web.preview.label, None).await.err().unwrap();
    assert_eq!(refusal.to_string(), "session not RUNNING: (state=CREATING)");
    let visitor = tokio::spawn({
        let (engine, label) = (world.engine.clone(), web.preview.label.clone());
        async move { engine.enter_preview(&label, None).await.map(|visit| visit.port) }
    });
    idle().await;
    world.fakes.driver.hold_creates(false);
    assert_eq!(visitor.await.unwrap(), Ok(80));

    // A full server does not wake anybody.
    let (world, id, web) = asleep(WakeOnVisit::Idle).await;
    let update = WorkspaceSettingsUpdate { sessions_max: Some(Some(1)), ..Default::default() };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let busy = world.running().await;
    assert_eq!(world.refusal(&web).await, Code::QuotaExceeded);
    world.engine.terminate_session(&world.caller, busy).await.unwrap();
    world.visit(&web).await;
    world.engine.terminate_session(&world.caller, id).await.unwrap();
}
