//! The engine's view of a sandbox, over a link.

use std::net::SocketAddr;

use async_trait::async_trait;
use nagaya_api::error::Code;
use nagaya_api::ids::ExecutionId;
use nagaya_engine::ports::{
    Address, Bind, BoxStream, Command, DirectoryEntry, FileReader, FileStat, FileWriter, Guest, GuestError, Listener,
    Process, ProcessEvent, Room, WriteOptions,
};
use nagaya_guest::messages::{self, ListDirectory, MakeDirectory, ReadFile, Remove, event, outcome};
use nagaya_guest::mux::Incoming;
use tokio::sync::mpsc;

use super::{Link, briefly, event_of, files, finish, guest_error, process, streams, tcp, unexpected};

/// Memory for an entry in all forms that it has on its way to a client, beside its name.
const ENTRY_BYTES: usize = 320;
/// What is taken from an agent as the entries of one directory: a million of them with names of 30 bytes.
const ENTRIES_BYTES_MAX: usize = 64 * 1024 * 1024;

pub(super) fn unexpected_outcome() -> GuestError {
    guest_error(Code::GuestUnreachable, "the sandbox's agent answered something else")
}

#[async_trait]
impl Guest for Link {
    async fn run(&self, command: Command) -> Result<Process, GuestError> {
        process::run(self, command).await
    }

    async fn run_detached(&self, id: ExecutionId, command: Command) -> Result<u32, GuestError> {
        let request =
            messages::RunDetached { execution_id: id.to_string(), command: process::to_message(command).into() };
        let (_sender, mut receiver) = self.open(request).await?;
        briefly(process::started(&mut receiver)).await
    }

    async fn follow(&self, id: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
        process::follow(self, id.to_string(), false).await
    }

    async fn follow_exit(&self, id: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
        process::follow(self, id.to_string(), true).await
    }

    async fn forget(&self, id: ExecutionId) -> Result<(), GuestError> {
        let request = messages::Forget { execution_id: id.to_string() };
        self.ask_briefly(request).await.map(|_| ())
    }

    async fn read_file(
        &self,
        path: &str,
        offset: u64,
        length: u64,
        chunk_bytes: u32,
    ) -> Result<FileReader, GuestError> {
        files::read(self, ReadFile { path: path.into(), offset, length, chunk_bytes }).await
    }

    async fn write_file(&self, path: &str, options: WriteOptions) -> Result<FileWriter, GuestError> {
        files::write(self, path.into(), options).await
    }

    async fn stat(&self, path: &str) -> Result<Option<FileStat>, GuestError> {
        match self.ask_briefly(messages::Stat { path: path.into() }).await? {
            Some(outcome::Kind::FileStatus(status)) => Ok(status.exists.then_some(FileStat {
                size: status.size,
                mode: status.mode,
                modified_unix_ns: status.modified_unix_ns,
                is_dir: status.is_dir,
                is_symlink: status.is_symlink,
                symlink_target: status.symlink_target,
            })),
            _ => Err(unexpected_outcome()),
        }
    }

    async fn make_directory(&self, path: &str, mode: u32, recursive: bool) -> Result<i64, GuestError> {
        match self.ask_briefly(MakeDirectory { path: path.into(), mode, recursive }).await? {
            Some(outcome::Kind::Made(made)) => Ok(made.modified_unix_ns),
            _ => Err(unexpected_outcome()),
        }
    }

    async fn remove(&self, path: &str, recursive: bool) -> Result<u64, GuestError> {
        match self.ask(Remove { path: path.into(), recursive }).await? {
            Some(outcome::Kind::Removed(removed)) => Ok(removed.entries),
            _ => Err(unexpected_outcome()),
        }
    }

    async fn list_directory(
        &self,
        path: &str,
        include_hidden: bool,
        room: &dyn Room,
    ) -> Result<Vec<DirectoryEntry>, GuestError> {
        let (_sender, mut receiver) = self.open(ListDirectory { path: path.into(), include_hidden }).await?;
        let mut entries = Vec::new();
        let mut bytes = 0;
        loop {
            match receiver.next().await {
                Some(Incoming::Message(message)) => {
                    bytes += message.len();
                    let Some(event::Kind::Entries(part)) = event_of(&message) else { continue };
                    room.grow(part.entries.iter().map(|entry| ENTRY_BYTES + 3 * entry.name.len()).sum()).await?;
                    entries.extend(part.entries.into_iter().map(|entry| DirectoryEntry {
                        name: entry.name,
                        size: entry.size,
                        mode: entry.mode,
                        modified_unix_ns: entry.modified_unix_ns,
                        is_dir: entry.is_dir,
                    }));
                    if bytes > ENTRIES_BYTES_MAX {
                        let detail = "the directory's entries are more than 64 MiB; list it with a command";
                        return Err(guest_error(Code::MessageTooLarge, detail));
                    }
                }
                Some(Incoming::End(end)) => {
                    finish(&end)?;
                    entries.sort_unstable_by(|a: &DirectoryEntry, b| a.name.cmp(&b.name));
                    return Ok(entries);
                }
                other => return Err(unexpected(other)),
            }
        }
    }

    async fn connect(&self, address: &Address) -> Result<BoxStream, GuestError> {
        match address {
            Address::Tcp { port } => tcp::connect(self, tcp::LOOPBACK, *port).await,
            Address::Ip { ip, port } => tcp::connect(self, &[*ip], *port).await,
            Address::Unix { path } => Ok(Box::new(streams::connect(self, path, &[]).await?)),
            Address::UnixWithin { path, allowed } => Ok(Box::new(streams::connect(self, path, allowed).await?)),
        }
    }

    async fn listen(&self, bind: &Bind) -> Result<Listener, GuestError> {
        match bind {
            Bind::Tcp { ip, port } => tcp::listen(self, SocketAddr::new(*ip, *port)).await,
            Bind::Unix { path } => streams::listen(self, path).await,
        }
    }
}
