//! What the program prints. Whoever reads it may be gone, may have stopped reading, or may have no space left: nothing here
//! panics, and the server waits for none of it.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Lines of the log that wait to be written; later ones are left out, and counted.
const LINES_MAX: usize = 4_096;
/// How long the end of the program waits for what is still to be printed.
const FLUSH_MAX: Duration = Duration::from_secs(1);

enum Line {
    Text(Vec<u8>),
    /// Everything before it is written when this is dropped.
    Mark(#[allow(dead_code)] mpsc::Sender<()>),
}

struct Log {
    lines: SyncSender<Line>,
    left_out: AtomicU64,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Starts the thread that writes the log to standard error; what panics goes there too.
pub fn start_log() -> LogWriter {
    LOG.get_or_init(|| {
        let (lines, queue) = mpsc::sync_channel(LINES_MAX);
        // Without a thread there is no log.
        let _ = std::thread::Builder::new().name("log".into()).spawn(move || write_lines(&queue));
        Log { lines, left_out: AtomicU64::new(0) }
    });
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(thread = thread.name(), %backtrace, "{panic}");
    }));
    LogWriter
}

fn write_lines(queue: &Receiver<Line>) {
    let standard_error = rustix::stdio::stderr();
    while let Ok(line) = queue.recv() {
        if let Line::Text(text) = line {
            write_all(standard_error, &text);
        }
        let left_out = LOG.get().map_or(0, |log| log.left_out.swap(0, Ordering::Relaxed));
        if left_out > 0 {
            write_all(standard_error, format!("({left_out} lines of the log were left out)\n").as_bytes());
        }
    }
}

/// What cannot be written is lost.
fn write_all(to: BorrowedFd<'_>, mut text: &[u8]) {
    while !text.is_empty() {
        match rustix::io::write(to, text) {
            Ok(0) => return,
            Ok(length) => text = &text[length..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => return,
        }
    }
}

/// Waits for a moment until what was logged is written.
pub fn flush_log() {
    let Some(log) = LOG.get() else { return };
    let (mark, written) = mpsc::channel();
    if log.lines.try_send(Line::Mark(mark)).is_ok() {
        let _ = written.recv_timeout(FLUSH_MAX);
    }
}

/// Puts lines into the queue of the log.
#[derive(Clone, Copy)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if let Some(log) = LOG.get()
            && log.lines.try_send(Line::Text(text.to_vec())).is_err()
        {
            log.left_out.fetch_add(1, Ordering::Relaxed);
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

/// Prints a line of a short command's answer; waits for whoever reads it.
pub fn say(text: impl Display) {
    write_all(rustix::stdio::stdout(), format!("{text}\n").as_bytes());
}

/// Prints a line to standard output from a server, which goes on when nobody takes it.
pub fn announce(text: impl Display) {
    print_soon(format!("{text}\n"), write_to_standard_output);
}

/// The same to standard error, after what was logged.
pub fn complain(text: impl Display) {
    flush_log();
    print_soon(format!("{text}\n"), write_to_standard_error);
}

fn write_to_standard_output(text: &str) {
    write_all(rustix::stdio::stdout(), text.as_bytes());
}

fn write_to_standard_error(text: &str) {
    write_all(rustix::stdio::stderr(), text.as_bytes());
}

fn print_soon(text: String, print: fn(&str)) {
    let (done, printed) = mpsc::channel::<()>();
    let printing = std::thread::Builder::new().name("print".into()).spawn(move || {
        print(&text);
        drop(done);
    });
    if printing.is_ok() {
        let _ = printed.recv_timeout(FLUSH_MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_cannot_be_written_is_lost_and_nothing_else_happens() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device");
        write_all(std::os::fd::AsFd::as_fd(&full), b"lost");
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        write_all(std::os::fd::AsFd::as_fd(&writer), b"lost");
    }

    #[test]
    fn everything_is_written_where_there_is_room() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let text = vec![b'x'; 1 << 20];
        let expected = text.len();
        let writing = std::thread::spawn(move || write_all(std::os::fd::AsFd::as_fd(&writer), &text));
        let mut found = Vec::new();
        reader.read_to_end(&mut found).expect("read");
        writing.join().expect("no panic");
        assert_eq!(found.len(), expected);
    }
}
