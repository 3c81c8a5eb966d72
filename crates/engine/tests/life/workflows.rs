//! Every workflow, under every fault. See `steps.rs`.

use nagaya_api::error::{Code, Error};
use nagaya_engine::model::{AttachmentState, RestoreMode, Session, SessionState, SnapshotState};
use nagaya_engine::ports::Clock;
use nagaya_engine::{Fork, NewMount, NewSession, NewSnapshot, NewVolume};

use crate::preview_workflows::{
    BindPreview, CreatePreview, DeletePreview, EndOfBinding, EndOfExposure, Expose, ExposeNamed, OpenPreview,
    TouchPreview, Unexpose,
};

use crate::steps::{Stage, Workflow, run};
use crate::support::{MIB, idle, mount};

async fn state(stage: &Stage) -> SessionState {
    stage.world.session(stage.session).await.state
}

async fn pause(stage: &Stage) {
    stage.world.pause(stage.session).await;
}

/// Pauses the session and gives up its memory.
async fn park(stage: &Stage) {
    pause(stage).await;
    stage.world.fakes.driver.report_memory_low();
    idle().await;
    assert!(stage.world.fakes.driver.is_only_a_disk(stage.session));
}

struct CreateFromSnapshot;

impl Workflow for CreateFromSnapshot {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let world = &stage.world;
        let mounts = vec![mount(stage.free, "/free")];
        let new = NewSession { snapshot_id: Some(stage.snapshot), mounts, ..NewSession::default() };
        let id = world.engine.create_session(&world.caller, new).await?.id;
        let session = world.settled(id).await;
        match session.state {
            SessionState::Running => Ok(()),
            _ => Err(Error::new(Code::Internal, session.terminal_error)),
        }
    }

    async fn check(&self, stage: &Stage) {
        let sessions = stage.world.fakes.store.all_sessions();
        let made = sessions.iter().find(|of| of.source_snapshot_id == Some(stage.snapshot)).unwrap();
        assert_eq!((made.state, made.attachments.len()), (SessionState::Running, 1));
        assert_eq!(stage.world.read(made.id, "/root/log").await.as_deref(), Some("kept"));
    }
}

struct CreateFromPause;

impl Workflow for CreateFromPause {
    async fn prepare(&self, stage: &Stage) {
        pause(stage).await;
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let world = &stage.world;
        let snapshot_id = world.session(stage.session).await.pause.map(|pause| pause.snapshot_id);
        let new = NewSession { snapshot_id, ..NewSession::default() };
        let id = world.engine.create_session(&world.caller, new).await?.id;
        let session = world.settled(id).await;
        match session.state {
            SessionState::Running => Ok(()),
            _ => Err(Error::new(Code::Internal, session.terminal_error)),
        }
    }

    async fn check(&self, stage: &Stage) {
        let sessions = stage.world.fakes.store.all_sessions();
        let made = sessions.iter().find(|of| of.id != stage.session).unwrap();
        assert_eq!(stage.world.read(made.id, "/root/log").await.as_deref(), Some("kept"));
    }
}

struct Pause;

impl Workflow for Pause {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.pause_session(&stage.world.caller, stage.session).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert!(stage.world.fakes.driver.is_frozen(stage.session));
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(state(stage).await, SessionState::Running);
    }
}

struct ResumeFromMemory;

impl Workflow for ResumeFromMemory {
    async fn prepare(&self, stage: &Stage) {
        pause(stage).await;
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.resume_session(&stage.world.caller, stage.session).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(state(stage).await, SessionState::Running);
        let resume = stage.world.session(stage.session).await.last_resume;
        assert_eq!(resume.map(|resume| resume.mode), Some(RestoreMode::Memory));
    }

    async fn check_refused(&self, stage: &Stage) {
        assert!(stage.world.fakes.driver.is_frozen(stage.session));
    }
}

struct ResumeFromDisk;

impl Workflow for ResumeFromDisk {
    async fn prepare(&self, stage: &Stage) {
        park(stage).await;
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.resume_session(&stage.world.caller, stage.session).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(state(stage).await, SessionState::Running);
        let resume = stage.world.session(stage.session).await.last_resume;
        assert_eq!(resume.map(|resume| resume.mode), Some(RestoreMode::ColdBoot));
        assert_eq!(stage.world.read(stage.session, "/data/log").await.as_deref(), Some("kept too"));
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(state(stage).await, SessionState::Paused);
    }
}

struct Park;

impl Workflow for Park {
    async fn prepare(&self, stage: &Stage) {
        pause(stage).await;
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.fakes.driver.report_memory_low();
        let mut states = stage.world.engine.watch_session(&stage.world.caller, stage.session).await?;
        let parked = |of: &Session| of.pause.as_ref().is_some_and(|pause| !pause.in_memory);
        states.wait_for(parked).await.map(|_| ()).map_err(|_| Code::Draining.into())
    }

    async fn check(&self, stage: &Stage) {
        assert!(stage.world.fakes.driver.is_only_a_disk(stage.session));
    }
}

/// The sandbox dies, or powers itself off.
struct End {
    powered_off: bool,
}

impl Workflow for End {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        match self.powered_off {
            true => stage.world.fakes.driver.power_off(stage.session),
            false => stage.world.fakes.driver.kill(stage.session, "killed"),
        };
        Ok(())
    }

    async fn check(&self, stage: &Stage) {
        let expected = if self.powered_off { SessionState::UserShutdown } else { SessionState::Paused };
        assert_eq!(state(stage).await, expected);
    }
}

struct TakeSnapshot {
    paused: bool,
}

impl Workflow for TakeSnapshot {
    async fn prepare(&self, stage: &Stage) {
        // Other bytes than those of the snapshot that is there already.
        stage.world.write(stage.session, "/root/more", "more").await;
        if self.paused {
            pause(stage).await;
        }
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let new = NewSnapshot { name: "mine".into(), wait: true, ..NewSnapshot::default() };
        stage.world.engine.create_snapshot(&stage.world.caller, stage.session, new).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        let snapshots = stage.world.fakes.store.snapshots_now();
        let mine = snapshots.iter().find(|of| of.name == "mine").unwrap();
        assert_eq!(mine.state, SnapshotState::Ready);
        assert!(stage.world.fakes.blobs.is_durable(&mine.manifest));
    }
}

struct DeleteSnapshot;

impl Workflow for DeleteSnapshot {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.delete_snapshot(&stage.world.caller, stage.snapshot).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert!(stage.world.fakes.store.snapshots_now().is_empty() && stage.world.fakes.blobs.stored().is_empty());
    }
}

struct CreateVolume;

impl Workflow for CreateVolume {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let new = NewVolume { name: "mine".into(), size_bytes: 2 * MIB, workspace_id: None };
        stage.world.engine.create_volume(&stage.world.caller, new).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(stage.world.fakes.driver.volumes_now().len(), 3);
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(stage.world.fakes.driver.volumes_now().len(), 2);
    }
}

struct GrowVolume;

impl Workflow for GrowVolume {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.resize_volume(&stage.world.caller, stage.attached, 3 * MIB).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(stage.world.fakes.driver.volumes_now()[&stage.attached].size_bytes, 3 * MIB);
    }
}

struct AttachVolume {
    readonly: bool,
}

impl Workflow for AttachVolume {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let new = NewMount { readonly: self.readonly, ..mount(stage.free, "/free") };
        stage.world.engine.attach_volume(&stage.world.caller, stage.session, new).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        let session = stage.world.session(stage.session).await;
        assert_eq!(session.attachments.len(), 2);
        assert!(session.attachments.iter().all(|of| of.state == AttachmentState::Attached));
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(stage.world.session(stage.session).await.attachments.len(), 1);
    }
}

struct DetachVolume;

impl Workflow for DetachVolume {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.detach_volume(&stage.world.caller, stage.session, stage.attached, false).await
    }

    async fn check(&self, stage: &Stage) {
        assert!(stage.world.session(stage.session).await.attachments.is_empty());
        // Somebody else can have it at once.
        let other = stage.world.running().await;
        stage.world.attach(other, stage.attached, "/data").await;
        assert_eq!(stage.world.read(other, "/data/log").await.as_deref(), Some("kept too"));
    }
}

struct DeleteVolume;

impl Workflow for DeleteVolume {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.delete_volume(&stage.world.caller, stage.free).await
    }

    async fn check(&self, stage: &Stage) {
        assert!(!stage.world.fakes.driver.volumes_now().contains_key(&stage.free));
    }
}

struct ForkTwice;

impl Workflow for ForkTwice {
    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        let (engine, caller) = (&stage.world.engine, &stage.world.caller);
        let forks = engine.fork_session(caller, stage.session, Fork { count: 2, name: None }).await?;
        for fork in forks {
            stage.world.settled(fork.id).await;
        }
        Ok(())
    }

    async fn check(&self, stage: &Stage) {
        let sessions = stage.world.fakes.store.all_sessions();
        assert_eq!(sessions.len(), 3);
        for fork in sessions.iter().filter(|of| of.id != stage.session && of.state == SessionState::Running) {
            assert_eq!(stage.world.read(fork.id, "/root/log").await.as_deref(), Some("kept"));
        }
    }

    async fn check_refused(&self, stage: &Stage) {
        assert_eq!(stage.world.fakes.store.all_sessions().len(), 1);
    }
}

struct Terminate {
    paused: bool,
}

impl Workflow for Terminate {
    async fn prepare(&self, stage: &Stage) {
        if self.paused {
            park(stage).await;
        }
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.engine.terminate_session(&stage.world.caller, stage.session).await.map(|_| ())
    }

    async fn check(&self, stage: &Stage) {
        assert_eq!(state(stage).await, SessionState::Terminated);
        let other = stage.world.running().await;
        stage.world.attach(other, stage.attached, "/data").await;
    }

    fn keeps_session(&self) -> bool {
        false
    }
}

/// A session's deadline or a snapshot's expiry comes while nobody asks for anything.
struct Expire;

impl Workflow for Expire {
    async fn prepare(&self, stage: &Stage) {
        let update = nagaya_engine::SnapshotUpdate {
            expires_at: Some(Some(stage.world.fakes.clock.now() + 60_000)),
            ..nagaya_engine::SnapshotUpdate::default()
        };
        stage.world.engine.update_snapshot(&stage.world.caller, stage.snapshot, update).await.unwrap();
    }

    async fn act(&self, stage: &Stage) -> Result<(), Error> {
        stage.world.fakes.clock.advance(60_000);
        Ok(())
    }

    async fn check(&self, stage: &Stage) {
        assert!(stage.world.fakes.store.snapshots_now().is_empty());
    }
}

macro_rules! workflows {
    ($($name:ident => $workflow:expr;)*) => {
        $(
            #[test]
            fn $name() {
                run(&$workflow);
            }
        )*
    };
}

workflows! {
    create_from_a_snapshot_with_a_volume => CreateFromSnapshot;
    create_from_a_paused_session => CreateFromPause;
    pausing => Pause;
    resuming_from_memory => ResumeFromMemory;
    resuming_from_disk => ResumeFromDisk;
    giving_up_memory => Park;
    dying => End { powered_off: false };
    powering_off => End { powered_off: true };
    a_snapshot_of_a_running_session => TakeSnapshot { paused: false };
    a_snapshot_of_a_paused_session => TakeSnapshot { paused: true };
    deleting_a_snapshot => DeleteSnapshot;
    expiry_of_a_snapshot => Expire;
    creating_a_volume => CreateVolume;
    growing_a_volume => GrowVolume;
    attaching_a_volume => AttachVolume { readonly: false };
    attaching_a_volume_read_only => AttachVolume { readonly: true };
    detaching_a_volume => DetachVolume;
    deleting_a_volume => DeleteVolume;
    forking => ForkTwice;
    terminating_with_volumes => Terminate { paused: false };
    terminating_a_stopped_session => Terminate { paused: true };
    exposing_a_port => Expose;
    exposing_a_port_under_a_slug => ExposeNamed { known: false };
    exposing_a_port_under_a_known_slug => ExposeNamed { known: true };
    unexposing_a_port => Unexpose;
    creating_a_preview => CreatePreview;
    binding_a_preview => BindPreview;
    deleting_a_preview => DeletePreview;
    opening_a_private_preview => OpenPreview;
    touching_a_private_preview => TouchPreview;
    expiry_of_an_exposure => EndOfExposure { terminated: false };
    the_end_of_a_session_with_exposures => EndOfExposure { terminated: true };
    expiry_of_a_binding => EndOfBinding;
}
