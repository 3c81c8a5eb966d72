//! A world with an engine, and short words for what tests do in it.

use std::time::Duration;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, VolumeId};
use nagaya_engine::fake::{self, Fakes};
use nagaya_engine::model::{Session, SessionState, Volume};
use nagaya_engine::ports::{Guest, Ports, WriteOptions};
use nagaya_engine::{Caller, Engine, EngineConfig, NewMount, NewSession, NewVolume};

pub const MIB: u64 = 1 << 20;

pub struct World {
    pub engine: Engine,
    pub caller: Caller,
    pub fakes: Fakes,
    pub config: EngineConfig,
}

impl World {
    pub async fn new() -> Self {
        Self::with(EngineConfig::default()).await
    }

    pub async fn with(config: EngineConfig) -> Self {
        let (engine, _, caller, fakes) = fake::start(config.clone()).await;
        Self { engine, caller, fakes, config }
    }

    /// Stops the engine and starts another one in the same world; `between` happens while none runs.
    pub async fn restart(self, between: impl FnOnce(&Fakes)) -> Self {
        let world = self.restart_with(between, Fakes::ports).await;
        idle().await;
        world
    }

    /// As [`World::restart`], with other ports.
    pub async fn restart_with(self, between: impl FnOnce(&Fakes), ports: impl FnOnce(&Fakes) -> Ports) -> Self {
        self.engine.shut_down().await;
        between(&self.fakes);
        self.fakes.disconnect();
        let engine = Engine::start(self.config.clone(), ports(&self.fakes)).await.unwrap();
        Self { engine, ..self }
    }

    pub async fn run(&self, new: NewSession) -> Session {
        let id = self.engine.create_session(&self.caller, new).await.unwrap().id;
        let session = self.settled(id).await;
        assert_eq!(session.state, SessionState::Running, "{}", session.terminal_error);
        session
    }

    pub async fn running(&self) -> SessionId {
        self.run(NewSession::default()).await.id
    }

    /// Waits until a session rests in some state.
    pub async fn settled(&self, id: SessionId) -> Session {
        let mut states = self.engine.watch_session(&self.caller, id).await.unwrap();
        let moving = [SessionState::Creating, SessionState::Pausing, SessionState::Resuming, SessionState::Terminating];
        states.wait_for(|session| !moving.contains(&session.state)).await.unwrap().clone()
    }

    pub async fn session(&self, id: SessionId) -> Session {
        self.engine.session(&self.caller, id).await.unwrap()
    }

    pub async fn pause(&self, id: SessionId) -> Session {
        let session = self.engine.pause_session(&self.caller, id).await.unwrap();
        assert_eq!(session.state, SessionState::Paused);
        session
    }

    pub async fn resume(&self, id: SessionId) -> Session {
        let session = self.engine.resume_session(&self.caller, id).await.unwrap();
        assert_eq!(session.state, SessionState::Running);
        session
    }

    pub async fn active(&self) -> u64 {
        self.engine.usage(&self.caller, None).await.unwrap().active_sessions
    }

    pub async fn write(&self, id: SessionId, path: &str, content: &str) {
        let guest = self.fakes.driver.guest(id).unwrap();
        let options = WriteOptions { mode: 0, truncate: true, sync: true };
        let writer = guest.write_file(path, options).await.unwrap();
        writer.chunks.send(content.to_owned().into()).await.unwrap();
        writer.finish().await.unwrap();
    }

    pub async fn read(&self, id: SessionId, path: &str) -> Option<String> {
        let guest = self.fakes.driver.guest(id).unwrap();
        let mut reader = guest.read_file(path, 0, 0, 0).await.ok()?;
        let mut content = Vec::new();
        while let Some(chunk) = reader.chunks.recv().await {
            content.extend_from_slice(&chunk.unwrap());
        }
        Some(String::from_utf8(content).unwrap())
    }

    pub async fn volume(&self) -> Volume {
        let new = NewVolume { name: "v".into(), size_bytes: MIB, workspace_id: None };
        self.engine.create_volume(&self.caller, new).await.unwrap()
    }

    pub async fn attach(&self, id: SessionId, volume_id: VolumeId, path: &str) {
        self.engine.attach_volume(&self.caller, id, mount(volume_id, path)).await.unwrap();
    }
}

pub fn mount(volume_id: VolumeId, path: &str) -> NewMount {
    NewMount { volume_id, path: path.into(), readonly: false }
}

/// Lets every task do what it can almost without time passing.
pub async fn idle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[track_caller]
pub fn code<T>(result: Result<T, Error>) -> Code {
    result.err().expect("this must be refused").code
}
