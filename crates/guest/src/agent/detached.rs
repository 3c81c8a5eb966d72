//! Commands that belong to the sandbox: their output is kept on its disk, for any later connection
//! to follow from the beginning.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{BufMut, Bytes, BytesMut};
use nagaya_api::error::Code;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tokio::sync::{Notify, watch};

use super::Agent;
use super::command::{Control, Sink, supervise};
use super::failure::Failure;
use super::program;
use crate::frame::{DATA_BYTES_MAX, Kind};
use crate::messages::{Command, Exit};
use crate::mux::Sender;

/// Finished executions whose output is kept.
const FINISHED_MAX: usize = 64;
/// Executions that may run at once.
const RUNNING_MAX: usize = 256;
/// Output kept of one execution, bytes.
const SPOOL_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// Kind and length before each record in a spool.
const RECORD_HEADER_BYTES: usize = 5;
/// What a follower reads at once, bytes; holds any record.
const FOLLOW_BYTES: usize = 256 * 1024;
const TRUNCATED: &[u8] = b"\n[nagaya: the rest of the output was not kept for want of space]\n";

/// All executions this agent knows, oldest first.
#[derive(Debug, Default)]
pub struct Executions {
    list: Mutex<VecDeque<Arc<Execution>>>,
    /// Held while one is started, so that repeating an id never starts it twice.
    starting: tokio::sync::Mutex<()>,
}

/// One detached command.
#[derive(Debug)]
pub struct Execution {
    id: String,
    pid: u32,
    cancel: Arc<Notify>,
    /// `None` when the disk had no place for it.
    spool: Option<Arc<File>>,
    /// Held while a record is written.
    writing: tokio::sync::Mutex<()>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug, Clone, Default)]
struct Progress {
    /// Whole records in the spool, bytes.
    bytes: u64,
    truncated: bool,
    exit: Option<Exit>,
}

impl Executions {
    fn list(&self) -> MutexGuard<'_, VecDeque<Arc<Execution>>> {
        self.list.lock().expect("nothing panics while holding the list of executions")
    }

    fn find(&self, id: &str) -> Option<Arc<Execution>> {
        self.list().iter().find(|execution| execution.id == id).cloned()
    }

    /// Starts a command under an id, or finds it started already. Returns its process id.
    pub async fn start(&self, agent: &Arc<Agent>, id: String, mut command: Command) -> Result<u32, Failure> {
        let _starting = self.starting.lock().await;
        if let Some(execution) = self.find(&id) {
            return Ok(execution.pid);
        }
        let running = self.list().iter().filter(|execution| !execution.is_finished()).count();
        if running >= RUNNING_MAX {
            return Err(Failure::new(Code::CapacityUnavailable, "executions in the sandbox"));
        }
        let spool = tokio::task::spawn_blocking(open_spool).await.ok().flatten();
        command.stdin = false;
        let timeout_ms = command.timeout_ms;
        let program = program::start(agent, command).await?;
        let pid = program.pid as u32;
        let execution = Arc::new(Execution {
            id,
            pid,
            cancel: Arc::new(Notify::new()),
            progress: watch::Sender::new(Progress { truncated: spool.is_none(), ..Default::default() }),
            spool: spool.map(Arc::new),
            writing: tokio::sync::Mutex::new(()),
        });
        self.list().push_back(execution.clone());
        agent.busy.notify_one();
        let agent = agent.clone();
        tokio::spawn(async move {
            let control = Control::Cancel(execution.cancel.clone());
            let exit =
                supervise(&agent.clock, program, timeout_ms, Sink::Spool(execution.clone()), Some(control)).await;
            execution.progress.send_modify(|progress| progress.exit = Some(exit));
            agent.executions.drop_oldest_finished();
        });
        Ok(pid)
    }

    fn drop_oldest_finished(&self) {
        let mut list = self.list();
        let mut finished = list.iter().filter(|execution| execution.is_finished()).count();
        list.retain(|execution| {
            let drop = finished > FINISHED_MAX && execution.is_finished();
            finished -= usize::from(drop);
            !drop
        });
    }

    /// Forgets an execution; one that still runs is ended. An unknown one is no error.
    pub fn forget(&self, id: &str) {
        let mut list = self.list();
        if let Some(index) = list.iter().position(|execution| execution.id == id)
            && let Some(execution) = list.remove(index)
        {
            execution.cancel.notify_one();
        }
    }

    /// Sends the output of an execution from its beginning, and waits for its end.
    pub async fn follow(&self, id: &str, sender: &Sender) -> Result<Exit, Failure> {
        let execution = self.find(id).ok_or_else(|| Failure::new(Code::ExecutionNotFound, ""))?;
        execution.follow(sender).await
    }
}

impl Execution {
    fn is_finished(&self) -> bool {
        self.progress.borrow().exit.is_some()
    }

    /// Keeps a piece of output. When the disk is full this and all later output is dropped.
    pub async fn append(&self, kind: Kind, data: Bytes) {
        let _writing = self.writing.lock().await;
        let (offset, truncated) = {
            let progress = self.progress.borrow();
            (progress.bytes, progress.truncated)
        };
        let Some(spool) = self.spool.clone().filter(|_| !truncated) else {
            return;
        };
        let mut record = BytesMut::with_capacity(RECORD_HEADER_BYTES + data.len());
        record.put_u8(kind as u8);
        record.put_u32_le(data.len() as u32);
        record.put_slice(&data);
        let end = offset + record.len() as u64;
        let written = match end <= SPOOL_BYTES_MAX {
            true => tokio::task::spawn_blocking(move || spool.write_all_at(&record, offset))
                .await
                .is_ok_and(|result| result.is_ok()),
            false => false,
        };
        self.progress.send_modify(|progress| match written {
            true => progress.bytes = end,
            false => progress.truncated = true,
        });
    }

    async fn follow(&self, sender: &Sender) -> Result<Exit, Failure> {
        super::serve::started(sender, self.pid).await?;
        let mut progress = self.progress.subscribe();
        let mut offset = 0;
        loop {
            let now = progress.borrow_and_update().clone();
            while offset < now.bytes {
                let Some(spool) = self.spool.clone() else { break };
                let length = (now.bytes - offset).min(FOLLOW_BYTES as u64) as usize;
                let read = tokio::task::spawn_blocking(move || {
                    let mut block = vec![0; length];
                    spool.read_exact_at(&mut block, offset).map(|()| Bytes::from(block))
                });
                let mut block = read.await.map_err(|_| Failure::new(Code::Internal, "reading kept output"))??;
                while let Some((kind, data)) = take_record(&mut block) {
                    offset += (RECORD_HEADER_BYTES + data.len()) as u64;
                    if sender.data(kind, data).await.is_err() {
                        return Err(Failure::new(Code::GuestUnreachable, ""));
                    }
                }
            }
            if let Some(exit) = now.exit {
                if now.truncated {
                    let _ = sender.data(Kind::ErrorData, Bytes::from_static(TRUNCATED)).await;
                }
                return Ok(exit);
            }
            tokio::select! {
                changed = progress.changed() => changed.map_err(|_| Failure::new(Code::ExecutionNotFound, ""))?,
                _ = sender.closed() => return Err(Failure::new(Code::GuestUnreachable, "")),
            }
        }
    }
}

/// The next whole record of a block that begins with one.
fn take_record(block: &mut Bytes) -> Option<(Kind, Bytes)> {
    let header: [u8; RECORD_HEADER_BYTES] = block.get(..RECORD_HEADER_BYTES)?.try_into().ok()?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length > DATA_BYTES_MAX || block.len() < RECORD_HEADER_BYTES + length {
        return None;
    }
    let kind = if header[0] == Kind::ErrorData as u8 { Kind::ErrorData } else { Kind::Data };
    let mut record = block.split_to(RECORD_HEADER_BYTES + length);
    Some((kind, record.split_off(RECORD_HEADER_BYTES)))
}

/// A file without a name, which is gone with the agent.
fn open_spool() -> Option<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    for directory in ["/var/tmp", "/tmp", "/root"] {
        let mode = Mode::RUSR | Mode::WUSR;
        if let Ok(file) = rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
            return Some(file.into());
        }
        // Not every file system makes files without a name.
        let path = format!("{directory}/.nagaya-spool-{:016x}", super::random());
        if let Ok(file) = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode) {
            let _ = rustix::fs::unlinkat(CWD, &path, AtFlags::empty());
            return Some(file.into());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::Handshake;
    use crate::mux::{Incoming, Mux, Role};

    #[tokio::test]
    async fn what_a_full_disk_does_not_take_is_dropped_and_the_reader_is_told() {
        // Opened for reading only, so that every write fails.
        let spool = File::open("/dev/null").expect("open /dev/null");
        let execution = Execution {
            id: "x".into(),
            pid: 1,
            cancel: Arc::new(Notify::new()),
            spool: Some(Arc::new(spool)),
            writing: tokio::sync::Mutex::new(()),
            progress: watch::Sender::default(),
        };
        execution.append(Kind::Data, Bytes::from_static(b"lost")).await;
        execution.append(Kind::Data, Bytes::from_static(b"lost")).await;
        execution.progress.send_modify(|progress| progress.exit = Some(Exit { code: 3, ..Default::default() }));

        let (host, agent) = tokio::io::duplex(4096);
        let (host, agent) = (tokio::io::split(host), tokio::io::split(agent));
        let (host, agent) = tokio::join!(
            Mux::start(host.0, host.1, Role::Host, Handshake::default()),
            Mux::start(agent.0, agent.1, Role::Agent, Handshake::default()),
        );
        let (host, mut requests) = (host.expect("a greeting").0, agent.expect("a greeting").1);
        let (_sender, mut receiver) = host.open(Bytes::new()).await.expect("a stream");
        let request = requests.recv().await.expect("a request");
        assert_eq!(execution.follow(&request.sender).await.map(|exit| exit.code), Ok(3));
        assert!(matches!(receiver.next().await, Some(Incoming::Message(_))));
        assert_eq!(receiver.next().await, Some(Incoming::ErrorData(Bytes::from_static(TRUNCATED))));
    }

    #[test]
    fn only_whole_records_are_taken() {
        let mut block = Bytes::from_static(&[Kind::ErrorData as u8, 2, 0, 0, 0, b'a', b'b', Kind::Data as u8, 9, 0, 0]);
        assert_eq!(take_record(&mut block), Some((Kind::ErrorData, Bytes::from_static(b"ab"))));
        assert_eq!(take_record(&mut block), None);
        assert_eq!(block.len(), 4);
    }
}
