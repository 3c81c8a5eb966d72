use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use nagaya_api::error::Code;
use nagaya_api::ids::ExecutionId;
use tokio::sync::{mpsc, watch};

use super::files::Files;
use super::sockets::Sockets;
use super::{Faults, programs};
use crate::model::ImageUser;
use crate::ports::{
    Address, Bind, BoxStream, Command, DirectoryEntry, ExitStatus, FileReader, FileStat, FileWriter, Guest, GuestError,
    Listener, Process, ProcessEvent, Room, WriteOptions,
};

/// Bytes in a chunk of a file, and messages in a channel.
const CHUNK_BYTES: usize = 64 * 1024;
const CHANNEL_MAX: usize = 4;

/// The inside of a fake sandbox, with the user of its image: files in memory, a handful of programs (see `programs.rs`) and sockets (see `sockets.rs`).
pub struct FakeGuest {
    faults: Arc<Faults>,
    user: ImageUser,
    disk: Arc<Mutex<Files>>,
    mounts: Mutex<Vec<Mounted>>,
    frozen: watch::Sender<bool>,
    detached: Mutex<BTreeMap<ExecutionId, watch::Sender<Vec<ProcessEvent>>>>,
    sockets: Sockets,
    /// Why the sandbox died, once it has.
    death: watch::Sender<Option<String>>,
}

struct Mounted {
    path: String,
    files: Arc<Mutex<Files>>,
    readonly: bool,
}

pub(super) fn refuse<T>(code: Code, errno: i32) -> Result<T, GuestError> {
    Err(GuestError { code, detail: String::new(), errno })
}

impl FakeGuest {
    pub(super) fn new(faults: Arc<Faults>, user: ImageUser, disk: Arc<Mutex<Files>>) -> Self {
        Self {
            sockets: Sockets::of_user(&user.home),
            faults,
            user,
            disk,
            mounts: Mutex::default(),
            frozen: watch::Sender::new(false),
            detached: Mutex::default(),
            death: watch::Sender::new(None),
        }
    }

    pub(super) fn set_frozen(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
    }

    /// Calls on a frozen sandbox stand still until it is thawed.
    async fn awake(&self) -> Result<(), GuestError> {
        // The sender is ours, so waiting cannot fail.
        let _ = self.frozen.subscribe().wait_for(|frozen| !frozen).await;
        self.check()
    }

    pub(super) fn mount(&self, path: String, files: Arc<Mutex<Files>>, readonly: bool) {
        self.mounts.lock().expect("no holder of this lock panics").push(Mounted { path, files, readonly });
    }

    pub(super) fn unmount(&self, path: &str) {
        self.mounts.lock().expect("no holder of this lock panics").retain(|mount| mount.path != path);
    }

    /// The files that a path leads to, its rest there, and whether they can be changed.
    fn place(&self, path: &str) -> (Arc<Mutex<Files>>, String, bool) {
        let mounts = self.mounts.lock().expect("no holder of this lock panics");
        let below = |mount: &&Mounted| {
            path.strip_prefix(&mount.path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        match mounts.iter().find(below) {
            Some(mount) => (mount.files.clone(), format!("/{}", &path[mount.path.len()..]), !mount.readonly),
            None => (self.disk.clone(), path.to_owned(), true),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.death.borrow().is_none()
    }

    pub(super) fn die(&self, cause: &str) {
        self.death.send_if_modified(|death| {
            let first = death.is_none();
            death.get_or_insert_with(|| cause.to_owned());
            first
        });
    }

    /// Detached commands that have not ended.
    pub fn running(&self) -> Vec<ExecutionId> {
        let detached = self.detached.lock().expect("no holder of this lock panics");
        detached.iter().filter(|(_, events)| !ended(&events.borrow())).map(|(id, _)| *id).collect()
    }

    /// Ends a detached command from outside, e.g. one whose task was lost with the runtime.
    pub fn finish(&self, id: ExecutionId, status: ExitStatus) {
        let detached = self.detached.lock().expect("no holder of this lock panics");
        if let Some(events) = detached.get(&id) {
            record(events, ProcessEvent::Exit(status));
        }
    }

    fn check(&self) -> Result<(), GuestError> {
        if self.is_alive() { Ok(()) } else { refuse(Code::GuestUnreachable, 0) }
    }

    async fn look<T>(
        &self,
        path: &str,
        action: impl FnOnce(&Files, &str) -> Result<T, GuestError> + Send,
    ) -> Result<T, GuestError> {
        self.awake().await?;
        let (files, path, _) = self.place(path);
        let files = files.lock().expect("no holder of this lock panics");
        action(&files, &path)
    }

    async fn change<T>(
        &self,
        path: &str,
        action: impl FnOnce(&mut Files, &str) -> Result<T, GuestError> + Send,
    ) -> Result<T, GuestError> {
        self.awake().await?;
        let (files, path, writable) = self.place(path);
        if !writable {
            return refuse(Code::PermissionDenied, 30);
        }
        let mut files = files.lock().expect("no holder of this lock panics");
        action(&mut files, &path)
    }

    async fn start(&self, command: Command) -> Result<Process, GuestError> {
        let cwd = if command.cwd.is_empty() { self.user.home.clone() } else { command.cwd };
        let command = Command { cwd, ..command };
        match self.look(&command.cwd, |files, path| files.stat(path)).await? {
            None => return refuse(Code::FileNotFound, 2),
            Some(stat) if !stat.is_dir => return refuse(Code::NotADirectory, 20),
            Some(_) => {}
        }
        programs::start(command, &self.user.name, self.death.subscribe())
    }
}

fn ended(events: &[ProcessEvent]) -> bool {
    matches!(events.last(), Some(ProcessEvent::Exit(_)))
}

fn record(events: &watch::Sender<Vec<ProcessEvent>>, event: ProcessEvent) {
    events.send_if_modified(|events| {
        let running = !ended(events);
        if running {
            events.push(event);
        }
        running
    });
}

#[async_trait]
impl Guest for FakeGuest {
    async fn run(&self, command: Command) -> Result<Process, GuestError> {
        self.start(command).await
    }

    async fn run_detached(&self, id: ExecutionId, command: Command) -> Result<u32, GuestError> {
        self.awake().await?;
        if self.detached.lock().expect("no holder of this lock panics").contains_key(&id) {
            return Ok(programs::PID);
        }
        let mut process = self.start(Command { stdin: false, ..command }).await?;
        let events = watch::Sender::new(Vec::new());
        self.detached.lock().expect("no holder of this lock panics").insert(id, events.clone());
        let pid = process.pid;
        tokio::spawn(async move {
            while let Some(event) = process.events.recv().await {
                record(&events, event);
            }
        });
        // It runs, whether or not the answer arrives.
        if self.faults.effect().await { refuse(Code::GuestUnreachable, 0) } else { Ok(pid) }
    }

    async fn follow(&self, id: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
        self.awake().await?;
        let events = self.detached.lock().expect("no holder of this lock panics").get(&id).cloned();
        let Some(events) = events else { return refuse(Code::ExecutionNotFound, 0) };
        if self.faults.effect().await {
            return refuse(Code::GuestUnreachable, 0);
        }
        let (sender, receiver) = mpsc::channel(CHANNEL_MAX);
        let faults = self.faults.clone();
        tokio::spawn(async move {
            let mut changes = events.subscribe();
            let mut sent = 0;
            loop {
                let new: Vec<ProcessEvent> = changes.borrow_and_update()[sent..].to_vec();
                sent += new.len();
                let last = ended(&new);
                for event in new {
                    // The connection is lost, or nobody reads any more.
                    if faults.effect().await || sender.send(event).await.is_err() {
                        return;
                    }
                }
                if last {
                    return;
                }
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    _ = changes.changed() => {}
                }
            }
        });
        Ok(receiver)
    }

    async fn forget(&self, id: ExecutionId) -> Result<(), GuestError> {
        self.check()?;
        self.detached.lock().expect("no holder of this lock panics").remove(&id);
        Ok(())
    }

    async fn read_file(
        &self,
        path: &str,
        offset: u64,
        length: u64,
        chunk_bytes: u32,
    ) -> Result<FileReader, GuestError> {
        let content = self.look(path, |files, path| files.read(path)).await?;
        let total_size = content.len() as u64;
        let start = offset.min(total_size) as usize;
        let end = if length == 0 { content.len() } else { content.len().min(start.saturating_add(length as usize)) };
        let mut rest = content.slice(start..end);
        let chunk = if chunk_bytes == 0 { CHUNK_BYTES } else { chunk_bytes as usize };
        let (sender, chunks) = mpsc::channel(CHANNEL_MAX);
        tokio::spawn(async move {
            while !rest.is_empty() {
                let next = rest.split_to(chunk.min(rest.len()));
                if sender.send(Ok(next)).await.is_err() {
                    return;
                }
            }
        });
        Ok(FileReader { total_size, chunks })
    }

    async fn write_file(&self, path: &str, options: WriteOptions) -> Result<FileWriter, GuestError> {
        self.change(path, |files, path| files.check_writable(path)).await?;
        let (sender, mut chunks) = mpsc::channel::<Bytes>(CHANNEL_MAX);
        let (writer, finish) = FileWriter::new(sender);
        let ((files, path, _), death) = (self.place(path), self.death.subscribe());
        tokio::spawn(async move {
            let mut content = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                content.extend_from_slice(&chunk);
            }
            // A caller that gave up changes nothing.
            let Ok(reply) = finish.await else { return };
            let written = content.len() as u64;
            let result = match death.borrow().is_some() {
                true => refuse(Code::GuestUnreachable, 0),
                false => files.lock().expect("no holder of this lock panics").write(&path, content, &options),
            };
            let _ = reply.send(result.map(|()| written));
        });
        Ok(writer)
    }

    async fn stat(&self, path: &str) -> Result<Option<FileStat>, GuestError> {
        self.look(path, |files, path| files.stat(path)).await
    }

    async fn make_directory(&self, path: &str, mode: u32, recursive: bool) -> Result<i64, GuestError> {
        self.change(path, |files, path| files.make_directory(path, mode, recursive)).await
    }

    async fn remove(&self, path: &str, recursive: bool) -> Result<u64, GuestError> {
        self.change(path, |files, path| files.remove(path, recursive)).await
    }

    async fn list_directory(
        &self,
        path: &str,
        include_hidden: bool,
        _: &dyn Room,
    ) -> Result<Vec<DirectoryEntry>, GuestError> {
        self.look(path, |files, path| files.list(path, include_hidden)).await
    }

    async fn connect(&self, address: &Address) -> Result<BoxStream, GuestError> {
        self.awake().await?;
        self.sockets.connect(address, self.death.subscribe()).await
    }

    async fn listen(&self, bind: &Bind) -> Result<Listener, GuestError> {
        self.awake().await?;
        self.sockets.listen(bind, self.death.subscribe())
    }
}
