//! What programs tell the system's log: `/dev/log`, kept in `/var/log/syslog`.
//!
//! Some programs fail when nobody listens there. A log of its own, once it is installed, takes the socket's place.
//! Whoever floods it waits: the agent works outside of the sandbox's limits and must not work for one program alone.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use tokio::net::UnixDatagram;

/// Where `/dev/log` leads.
const SOCKET: &str = "/run/dev-log";
const FILE: &str = "/var/log/syslog";
const FILE_BEFORE: &str = "/var/log/syslog.1";
/// From this size on a new file is begun, bytes. One before it is kept.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Longest message; the rest of a longer one is lost, bytes.
const MESSAGE_BYTES_MAX: usize = 8 * 1024;
/// Messages that are taken at once, and the time until the next ones are.
const BATCH_MAX: usize = 32;
const PAUSE: Duration = Duration::from_millis(100);

/// Listens from now on. Where that is impossible there is no log.
pub fn start() {
    let _ = rustix::fs::unlinkat(CWD, SOCKET, AtFlags::empty());
    let Ok(socket) = UnixDatagram::bind(SOCKET) else { return };
    let _ = std::fs::set_permissions(SOCKET, std::fs::Permissions::from_mode(0o666));
    tokio::spawn(serve(socket));
}

async fn serve(socket: UnixDatagram) {
    while socket.readable().await.is_ok() {
        let lines = take(&socket);
        // The disk may stand still.
        let _ = tokio::task::spawn_blocking(move || append(&lines)).await;
        tokio::time::sleep(PAUSE).await;
    }
}

/// The messages that wait, as lines. There may be a thousand agents, and most are idle: nothing is kept for the next ones.
fn take(socket: &UnixDatagram) -> Vec<u8> {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let mut lines = Vec::new();
    for _ in 0..BATCH_MAX {
        match socket.try_recv(&mut buffer) {
            Ok(length) => line(&buffer[..length], &mut lines),
            Err(_) => break,
        }
    }
    lines
}

/// One message as one line, without the number of its priority.
fn line(message: &[u8], lines: &mut Vec<u8>) {
    let end = message.iter().position(|byte| *byte == b'>').filter(|end| message.first() == Some(&b'<') && *end < 5);
    let text = end.map_or(message, |end| &message[end + 1..]);
    let end = text.iter().rposition(|byte| !b"\n\0 ".contains(byte)).map_or(0, |last| last + 1);
    let text = &text[..end];
    lines.extend(text.iter().map(|byte| if byte.is_ascii_control() && *byte != b'\t' { b' ' } else { *byte }));
    lines.push(b'\n');
}

fn append(lines: &[u8]) {
    let Some((mut file, size)) = open() else { return };
    if size >= FILE_BYTES_MAX {
        let _ = rustix::fs::renameat(CWD, FILE, CWD, FILE_BEFORE);
        match open() {
            Some((fresh, _)) => file = fresh,
            None => return,
        }
    }
    let _ = file.write_all(lines);
}

/// The log and its size. What is no file was put there by root of the sandbox, who wants no log.
fn open() -> Option<(File, u64)> {
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(FILE, flags | OFlags::NOCTTY, Mode::from_raw_mode(0o640)).ok()?;
    let status = rustix::fs::fstat(&file).ok()?;
    (FileType::from_raw_mode(status.st_mode) == FileType::RegularFile).then(|| (file.into(), status.st_size as u64))
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_message_is_one_line_whatever_is_in_it() {
        for (message, expected) in [
            (&b"<13>Nov 28 22:33:48 me: hello\n\0"[..], &b"Nov 28 22:33:48 me: hello\n"[..]),
            (b"<13>a\nb\tc\x1b[0m", b"a b\tc [0m\n"),
            (b"no priority>", b"no priority>\n"),
            (b"<12345>x", b"<12345>x\n"),
            (b"", b"\n"),
        ] {
            let mut lines = Vec::new();
            line(message, &mut lines);
            assert_eq!(lines, expected, "{message:?}");
        }
    }
}
