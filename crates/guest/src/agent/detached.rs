//! Commands that belong to the sandbox: their output is kept on its disk, for any later connection
//! to follow from the beginning.
//!
//! A sandbox keeps so much output and no more: the oldest of the oldest execution goes first. It also goes some time
//! after the command has ended, sooner when it was read.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use nagaya_api::error::Code;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Agent;
use super::clock::Clock;
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
/// How long output is kept that was read to its end: a reader that lost its connection comes again.
const READ_KEPT: Duration = Duration::from_secs(60);
/// What is let go of at once is at least this part of what may be kept.
const PART_MIN: u64 = 16;
/// Kind and length before each record in a spool.
const RECORD_HEADER_BYTES: usize = 5;
/// What a follower reads at once, bytes; holds any record.
const FOLLOW_BYTES: usize = 256 * 1024;
const TRUNCATED: &[u8] = b"\n[nagaya: the rest of the output was not kept because space ran out]\n";

/// How much output a sandbox keeps.
#[derive(Debug, Clone, Copy)]
pub struct KeptMax {
    /// Of all executions together.
    pub bytes: u64,
    /// After the command has ended.
    pub time: Duration,
}

/// All executions this agent knows, oldest first.
#[derive(Debug)]
pub struct Executions {
    kept_max: KeptMax,
    list: Mutex<VecDeque<Arc<Execution>>>,
    /// Held while output is let go of.
    shrinking: tokio::sync::Mutex<()>,
    /// Notified when the time of some output is known.
    due: Notify,
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
    /// Where the whole records in the spool begin, which is at the first one that is kept, and where they end, bytes.
    begin: u64,
    bytes: u64,
    truncated: bool,
    /// It was read to its end.
    read: bool,
    /// When it is let go of.
    due: Option<Instant>,
    exit: Option<Exit>,
}

impl Executions {
    pub fn new(kept_max: KeptMax) -> Self {
        Self {
            kept_max,
            list: Mutex::default(),
            shrinking: tokio::sync::Mutex::default(),
            due: Notify::new(),
            starting: tokio::sync::Mutex::default(),
        }
    }

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
            let sink = Sink::Spool(agent.clone(), execution.clone());
            let exit = supervise(&agent, program, timeout_ms, sink, Some(control)).await;
            let due = agent.clock.now().checked_add(agent.executions.kept_max.time);
            execution.progress.send_modify(|progress| (progress.exit, progress.due) = (Some(exit), due));
            agent.executions.drop_oldest_finished();
            agent.executions.due.notify_one();
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

    /// Forgets an execution; one that still runs is ended. An unknown one is ignored.
    pub fn forget(&self, id: &str) {
        let mut list = self.list();
        if let Some(index) = list.iter().position(|execution| execution.id == id)
            && let Some(execution) = list.remove(index)
        {
            execution.cancel.notify_one();
        }
    }

    /// Sends the output of an execution from its beginning, and waits for its end.
    pub async fn follow(&self, clock: &Clock, id: &str, sender: &Sender) -> Result<Exit, Failure> {
        let execution = self.find(id).ok_or_else(|| Failure::new(Code::ExecutionNotFound, ""))?;
        let exit = execution.follow(sender, true).await?;
        let soon = clock.now() + READ_KEPT.min(self.kept_max.time);
        execution.progress.send_modify(|progress| {
            progress.read = true;
            progress.due = Some(progress.due.map_or(soon, |due| due.min(soon)));
        });
        self.due.notify_one();
        Ok(exit)
    }

    /// Waits for the end of an execution.
    pub async fn follow_exit(&self, id: &str, sender: &Sender) -> Result<Exit, Failure> {
        let execution = self.find(id).ok_or_else(|| Failure::new(Code::ExecutionNotFound, ""))?;
        execution.follow(sender, false).await
    }

    /// Lets go of output whose time is over. Never returns.
    pub async fn sweep(&self, clock: &Clock) {
        loop {
            let due = |execution: &Arc<Execution>| Some((execution.progress.borrow().due?, execution.clone()));
            let held = |execution: &&Arc<Execution>| execution.kept() > 0;
            let next = self.list().iter().filter(held).filter_map(due).min_by_key(|(due, _)| *due);
            match next {
                None => self.due.notified().await,
                Some((due, execution)) => tokio::select! {
                    () = clock.sleep_until(due) => execution.discard(u64::MAX).await,
                    () = self.due.notified() => {}
                },
            }
        }
    }

    /// Output that is kept, bytes.
    pub fn kept(&self) -> u64 {
        self.list().iter().map(|execution| execution.kept()).sum()
    }

    /// Keeps a piece of output, and lets go of the oldest where there is too much.
    pub async fn append(&self, execution: &Execution, kind: Kind, data: Bytes) {
        execution.append(kind, data).await;
        if self.kept() <= self.kept_max.bytes {
            return;
        }
        let _alone = self.shrinking.lock().await;
        loop {
            let excess = self.kept().saturating_sub(self.kept_max.bytes);
            if excess == 0 {
                return;
            }
            // Of those that are equal the first one, which is the oldest.
            let order = |execution: &&Arc<Execution>| {
                let progress = execution.progress.borrow();
                (progress.exit.is_none(), !progress.read)
            };
            let holders = self.list().iter().filter(|execution| execution.kept() > 0).min_by_key(order).cloned();
            let Some(holder) = holders else { return };
            holder.discard(excess.max(self.kept_max.bytes / PART_MIN)).await;
        }
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
        let written = tokio::task::spawn_blocking(move || spool.write_all_at(&record, offset))
            .await
            .is_ok_and(|result| result.is_ok());
        self.progress.send_modify(|progress| match written {
            true => progress.bytes = end,
            false => progress.truncated = true,
        });
    }

    fn kept(&self) -> u64 {
        let progress = self.progress.borrow();
        progress.bytes - progress.begin
    }

    /// Lets go of some of the oldest output, at least as many bytes as given where there are so many.
    async fn discard(&self, bytes: u64) {
        let _writing = self.writing.lock().await;
        let Progress { begin, bytes: end, .. } = *self.progress.borrow();
        let Some(spool) = self.spool.clone() else { return };
        let reader = spool.clone();
        let wanted = begin.saturating_add(bytes);
        let found = tokio::task::spawn_blocking(move || record_from(&reader, begin, end, wanted)).await;
        let new = found.unwrap_or(end);
        // Before anything is gone, so that no reader takes what it finds then for output.
        self.progress.send_modify(|progress| progress.begin = new);
        let file = spool.clone();
        let in_part = tokio::task::spawn_blocking(move || {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            new < end && rustix::fs::fallocate(&*file, hole, 0, new).is_ok()
        });
        if !in_part.await.unwrap_or(false) {
            // All of it, also where files have no holes. What is written later goes behind.
            self.progress.send_modify(|progress| progress.begin = end);
            let _ = tokio::task::spawn_blocking(move || spool.set_len(0)).await;
        }
    }

    async fn follow(&self, sender: &Sender, with_output: bool) -> Result<Exit, Failure> {
        super::serve::started(sender, self.pid).await?;
        let mut progress = self.progress.subscribe();
        let mut offset = 0;
        loop {
            let now = progress.borrow_and_update().clone();
            while with_output && offset < now.bytes {
                let Some(spool) = self.spool.clone() else { break };
                let begin = self.progress.borrow().begin;
                if offset < begin {
                    let lost = format!("\n[nagaya: {} bytes of older output were not kept]\n", begin - offset);
                    offset = begin;
                    let told = sender.data(Kind::ErrorData, lost.into()).await;
                    told.map_err(|_| Failure::new(Code::GuestUnreachable, ""))?;
                    continue;
                }
                let length = (now.bytes - offset).min(FOLLOW_BYTES as u64) as usize;
                let read = tokio::task::spawn_blocking(move || read_block(&spool, offset, length));
                let block = read.await.map_err(|_| Failure::new(Code::Internal, "reading kept output"))?;
                if offset < self.progress.borrow().begin {
                    // It was let go of meanwhile.
                    continue;
                }
                let mut block = block?;
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

fn read_block(spool: &File, offset: u64, length: usize) -> std::io::Result<Bytes> {
    let mut block = vec![0; length];
    spool.read_exact_at(&mut block, offset).map(|()| Bytes::from(block))
}

/// Where the first record lies that begins at or behind a wanted place; the end when there is none, or when it cannot
/// be found.
fn record_from(spool: &File, begin: u64, end: u64, wanted: u64) -> u64 {
    let mut offset = begin;
    while offset < wanted && wanted < end {
        let length = (end - offset).min(FOLLOW_BYTES as u64) as usize;
        let Ok(mut block) = read_block(spool, offset, length) else { return end };
        let Some((_, first)) = take_record(&mut block) else { return end };
        offset += (RECORD_HEADER_BYTES + first.len()) as u64;
        while offset < wanted
            && let Some((_, data)) = take_record(&mut block)
        {
            offset += (RECORD_HEADER_BYTES + data.len()) as u64;
        }
    }
    if wanted < end { offset } else { end }
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
        assert_eq!(execution.follow(&request.sender, true).await.map(|exit| exit.code), Ok(3));
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
