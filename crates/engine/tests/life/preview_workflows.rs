//! Workflows of previews, for `workflows.rs`.

use nagaya_api::error::{Code, Error};
use nagaya_engine::model::{Binding, Preview, PreviewKind};
use nagaya_engine::ports::Clock;
use nagaya_engine::{NewExposure, NewPreview, PreviewUrl};

use crate::steps::{Stage, Workflow};
use crate::support::code;

fn port(port: u16) -> NewExposure {
    NewExposure { port, ..NewExposure::default() }
}

fn named(port: u16) -> NewExposure {
    NewExposure { port, slug: Some("shop".into()), ..NewExposure::default() }
}

async fn expose(stage: &Stage, new: NewExposure) -> Result<PreviewUrl, Error> {
    stage.world.engine.expose_port(&stage.world.caller, stage.session, new).await
}

async fn create(stage: &Stage) -> Result<PreviewUrl, Error> {
    let new = NewPreview { slug: "shop".into(), ..NewPreview::default() };
    stage.world.engine.create_preview(&stage.world.caller, new).await
}

fn recorded(stage: &Stage) -> Vec<Preview> {
    stage.world.fakes.store.previews_now()
}

async fn enter(stage: &Stage, preview: &Preview) -> Result<u16, Code> {
    let entered = stage.world.engine.enter_preview(&preview.label, None).await;
    entered.map(|visit| visit.port).map_err(|error| error.code)
}

/// Whether everybody who comes to the one preview there is gets to this port.
async fn leads_to(stage: &Stage, port: u16) {
    let previews = recorded(stage);
    assert_eq!(previews.len(), 1);
    assert_eq!(enter(stage, &previews[0]).await, Ok(port));
}

pub struct Expose;

impl Workflow for Expose {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        expose(stage, port(80)).await.map(drop)
    }

    async fn check(&self, stage: &Stage) {
        leads_to(stage, 80).await;
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(recorded(stage), []);
    }
}

pub struct ExposeNamed {
    pub known: bool,
}

impl Workflow for ExposeNamed {
    async fn prepare(&self, stage: &Stage) {
        if self.known {
            create(stage).await.unwrap();
        }
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        expose(stage, named(80)).await.map(drop)
    }

    async fn check(&self, stage: &Stage) {
        leads_to(stage, 80).await;
    }

    async fn check_refused(&self, stage: &Stage) {
        let left = recorded(stage);
        assert!(if self.known { left.len() == 1 && left[0].binding.is_none() } else { left.is_empty() }, "{left:?}");
    }
}

pub struct Unexpose;

impl Workflow for Unexpose {
    async fn prepare(&self, stage: &Stage) {
        expose(stage, port(80)).await.unwrap();
        expose(stage, named(80)).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.unexpose_port(&stage.world.caller, stage.session, 80).await
    }

    async fn check(&self, stage: &Stage) {
        let left = recorded(stage);
        assert_eq!((left.len(), left[0].kind), (1, PreviewKind::Named));
        assert_eq!(enter(stage, &left[0]).await, Err(Code::PreviewUnbound));
    }

    async fn check_refused(&self, stage: &Stage) {
        for preview in recorded(stage) {
            assert_eq!(enter(stage, &preview).await, Ok(80));
        }
    }
}

pub struct CreatePreview;

impl Workflow for CreatePreview {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        create(stage).await.map(drop)
    }

    async fn check(&self, stage: &Stage) {
        let found = stage.world.engine.preview_by_slug(&stage.world.caller, "shop").await.unwrap();
        assert!(!found.url.is_empty());
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(recorded(stage), []);
        // The slug is free.
        create(stage).await.unwrap();
    }
}

pub struct BindPreview;

impl Workflow for BindPreview {
    async fn prepare(&self, stage: &Stage) {
        expose(stage, named(80)).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let id = recorded(stage)[0].id;
        let binding = Binding { session_id: stage.session, port: 81 };
        stage.world.engine.bind_preview(&stage.world.caller, id, binding, None).await.map(drop)
    }

    async fn check(&self, stage: &Stage) {
        leads_to(stage, 81).await;
    }

    async fn check_refused(&self, stage: &Stage) {
        leads_to(stage, 80).await;
    }
}

pub struct DeletePreview;

impl Workflow for DeletePreview {
    async fn prepare(&self, stage: &Stage) {
        create(stage).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let id = recorded(stage)[0].id;
        stage.world.engine.delete_preview(&stage.world.caller, id).await
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(recorded(stage), []);
    }
}

pub struct OpenPreview;

impl Workflow for OpenPreview {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.open_preview(&stage.world.caller, stage.session, 80, None).await.map(drop)
    }

    async fn check(&self, stage: &Stage) {
        let opened = stage.world.engine.open_preview(&stage.world.caller, stage.session, 80, None).await.unwrap();
        assert_eq!(recorded(stage).len(), 1);
        let entered = stage.world.engine.enter_preview(&opened.preview.label, Some(&opened.viewer_token)).await;
        assert_eq!(entered.map(|visit| visit.port), Ok(80));
        assert_eq!(enter(stage, &opened.preview).await, Err(Code::PreviewPrivate));
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(recorded(stage), []);
    }
}

pub struct TouchPreview;

impl Workflow for TouchPreview {
    async fn prepare(&self, stage: &Stage) {
        stage.world.engine.open_preview(&stage.world.caller, stage.session, 80, None).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let label = recorded(stage)[0].label.clone();
        stage.world.engine.touch_preview(&stage.world.caller, &label).await.map(drop)
    }

    async fn check(&self, stage: &Stage) {
        assert!(recorded(stage)[0].last_accessed_at.is_some());
    }
}

/// What leads to a session goes when its time has come, or when the session ends.
pub struct EndOfExposure {
    pub terminated: bool,
}

impl Workflow for EndOfExposure {
    async fn prepare(&self, stage: &Stage) {
        let expires_at = Some(stage.world.fakes.clock.now() + 60_000);
        expose(stage, NewExposure { expires_at, ..port(80) }).await.unwrap();
        stage.world.engine.open_preview(&stage.world.caller, stage.session, 80, expires_at).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        if self.terminated {
            return stage.world.engine.terminate_session(&stage.world.caller, stage.session).await.map(drop);
        }
        stage.world.fakes.clock.advance(60_000);
        Ok(())
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(recorded(stage), []);
    }

    fn keeps_session(&self) -> bool {
        !self.terminated
    }
}

/// A named preview loses its session when the time has come.
pub struct EndOfBinding;

impl Workflow for EndOfBinding {
    async fn prepare(&self, stage: &Stage) {
        let expires_at = Some(stage.world.fakes.clock.now() + 60_000);
        expose(stage, NewExposure { expires_at, ..named(80) }).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.fakes.clock.advance(60_000);
        Ok(())
    }

    async fn check(&self, stage: &Stage) {
        let id = recorded(stage)[0].id;
        let found = stage.world.engine.preview(&stage.world.caller, id).await.unwrap().preview;
        assert_eq!((found.binding, found.expires_at), (None, None));
        assert_eq!(code(stage.world.engine.enter_preview("shop", None).await), Code::PreviewUnbound);
    }
}
