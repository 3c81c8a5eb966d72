//! `cp`: files and directories, in and out.
//!
//! A file goes through the file calls. A directory goes as one tar archive through `tar` in the sandbox, so that a
//! thousand small files cost one stream, and links and modes stay what they are.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use nagaya_api::error::Code;
use nagaya_api::names;
use nagaya_client::{CommandStdin, Error as ClientError, Event, FileStat, RefusalKind, Running, Session, WriteOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::io::SyncIoBridge;

use crate::connect;
use crate::errors::{Failure, Local};
use crate::files::{Target, local_or_server};
use crate::output::{bytes, print};
use crate::parse::{self, Place};
use crate::resolve::{self, Among};
use crate::unpack;

/// Pieces of an archive that wait between the connection and the disk.
const PIECES_AHEAD: usize = 16;
/// How much of what tar complains about is kept.
const COMPLAINTS_MAX: usize = 2048;
const PACK_AS_ROOT: &str = "--privileged packs and unpacks as root there.";

#[derive(Debug, Args)]
pub struct Copy {
    /// Session for sides that begin with a bare colon, as in :/etc/hosts.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// Unpack and pack directories as root in the sandbox.
    #[arg(long)]
    privileged: bool,
    /// Say nothing.
    #[arg(long, short)]
    quiet: bool,
    /// What to copy: a path here, or SESSION:PATH.
    #[arg(value_name = "SOURCE", value_parser = OsStringValueParser::new().try_map(parse::place))]
    source: Place,
    /// Where to: a path here, or SESSION:PATH. Existing directories get the copy inside.
    #[arg(value_name = "TARGET", value_parser = OsStringValueParser::new().try_map(parse::place))]
    target: Place,
}

impl Copy {
    pub async fn run(self) -> Result<(), Failure> {
        let (session, job) = match (self.source, self.target) {
            (Place::Local(from), Place::Sandbox { session, path }) => (session, Job::In { from, to: path }),
            (Place::Sandbox { session, path }, Place::Local(to)) => (session, Job::Out { from: path, to }),
            _ => {
                let what = "one side is in a sandbox and the other is not";
                let remedy = "Write `cp FILE SESSION:PATH` or `cp SESSION:PATH FILE`; ./a:b is a file of this machine.";
                return Err(Failure::usage(format!("cp needs two sides, of which {what}"), remedy));
            }
        };
        if let Job::In { from, .. } = &job {
            // Before anything is asked of the server.
            fs::metadata(from).map_err(|error| Failure::reading(from, &error))?;
        }
        let text = session.or(self.session).map_or_else(resolve::default_session, Ok)?;
        let session = resolve::session(&connect::client()?, &text, Among::Live).await?;
        let bar = progress(self.quiet);
        let way = Way { session: &session, bar: &bar, privileged: self.privileged };
        let (count, to) = match job {
            Job::In { from, to } => way.send(&from, &to).await?,
            Job::Out { from, to } => way.fetch(&from, &to).await?,
        };
        bar.finish_and_clear();
        match self.quiet {
            true => Ok(()),
            false => print(&format!("{to}: {} copied\n", bytes(count))),
        }
    }
}

enum Job {
    In { from: PathBuf, to: String },
    Out { from: String, to: PathBuf },
}

/// On a terminal only; stdout stays free for the result.
fn progress(quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::no_length();
    bar.set_style(style("{spinner} {binary_bytes} {binary_bytes_per_sec}"));
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates here are well formed")
}

fn known_length(bar: &ProgressBar, length: u64) {
    bar.set_style(style("{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"));
    bar.set_length(length);
}

struct Way<'a> {
    session: &'a Session,
    bar: &'a ProgressBar,
    privileged: bool,
}

impl Way<'_> {
    /// The bytes that went in, and where to.
    async fn send(&self, from: &Path, to: &str) -> Result<(u64, String), Failure> {
        let metadata = fs::metadata(from).map_err(|error| Failure::reading(from, &error))?;
        let to = match (self.stat(to).await?, base_name(from)) {
            (Some(there), Some(name)) if there.is_dir => join(to, &names::to_text(name.as_bytes())),
            _ => to.to_owned(),
        };
        let count = match metadata.is_dir() {
            true => self.directory_in(from, &to).await?,
            false => self.file_in(from, &metadata, &to).await?,
        };
        Ok((count, to))
    }

    async fn stat(&self, path: &str) -> Result<Option<FileStat>, Failure> {
        match self.session.files().stat(path).await {
            Ok(stat) => Ok(Some(stat)),
            Err(ClientError::Refused { kind: RefusalKind::FileNotFound, .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn file_in(&self, from: &Path, metadata: &fs::Metadata, to: &str) -> Result<u64, Failure> {
        let mut file = tokio::fs::File::open(from).await.map_err(|error| Failure::reading(from, &error))?;
        if metadata.is_file() {
            known_length(self.bar, metadata.len());
        }
        let options = WriteOptions::default().mode(metadata.permissions().mode() & 0o777);
        let mut writer = self.session.files().writer(to, options).await?;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let length = file.read(&mut buffer).await.map_err(|error| Failure::reading(from, &error))?;
            if length == 0 {
                return Ok(writer.finish().await?);
            }
            writer.write_all(&buffer[..length]).await.map_err(ClientError::from)?;
            self.bar.inc(length as u64);
        }
    }

    async fn directory_in(&self, from: &Path, to: &str) -> Result<u64, Failure> {
        let count = content(from)?;
        // Archives are a little longer, so the bar may reach its end early.
        known_length(self.bar, count);
        if self.stat(to).await?.is_none() {
            self.session.files().mkdir(to).await?;
        }
        let mut running = self.tar(to, &["-x", "-f", "-"]).await?;
        let stdin = running.take_stdin().ok_or_else(|| broken("a command without stdin"))?;
        let packing = tokio::task::spawn_blocking({
            let (from, bar) = (from.to_owned(), self.bar.clone());
            move || pack(&from, stdin, bar)
        });
        let mut complaints = Vec::new();
        while let Some(event) = running.next().await? {
            if let Event::Stderr(bytes) = event {
                keep(&mut complaints, &bytes);
            }
        }
        let output = running.wait().await?;
        let packed = packing.await.map_err(|_| broken("packing ended early"))?;
        // A sandbox that stopped reading says best why.
        if !output.is_success()
            && !matches!(packed, Err(Failure::Told { code, .. }) if code == Local::CannotRead.name())
        {
            return Err(tar_failed(&complaints, output.exit_code));
        }
        packed.map(|()| count)
    }

    /// The bytes that came out, and where to.
    async fn fetch(&self, from: &str, to: &Path) -> Result<(u64, String), Failure> {
        let stat = self.session.files().stat(from).await?;
        let inside = names::to_bytes(from);
        let to = match (to.is_dir(), base_name(Path::new(OsStr::from_bytes(&inside)))) {
            (true, Some(name)) => to.join(name),
            _ => to.to_owned(),
        };
        let count = match stat.is_dir {
            true => self.directory_out(from, &to).await?,
            false => self.file_out(from, &stat, &to).await?,
        };
        Ok((count, to.display().to_string()))
    }

    async fn file_out(&self, from: &str, stat: &FileStat, to: &Path) -> Result<u64, Failure> {
        let mut reader = self.session.files().reader(from).await?;
        known_length(self.bar, reader.total_size().unwrap_or(stat.size));
        let mut target = Target::beside(to)?;
        let count = target.fill(&mut reader, |length| self.bar.inc(length)).await?;
        target.set_mode(stat.mode)?;
        target.put_in_place()?;
        Ok(count)
    }

    async fn directory_out(&self, from: &str, to: &Path) -> Result<u64, Failure> {
        let mut running = self.tar(from, &["-c", "-f", "-", "."]).await?;
        drop(running.take_stdin());
        let (pieces, archive) = mpsc::channel(PIECES_AHEAD);
        let unpacking = tokio::task::spawn_blocking({
            let (to, bar) = (to.to_owned(), self.bar.clone());
            move || unpack::unpack(Pieces { archive, now: Bytes::new(), bar }, &to)
        });
        let mut complaints = Vec::new();
        while let Some(event) = running.next().await? {
            match event {
                Event::Stderr(bytes) => keep(&mut complaints, &bytes),
                Event::Stdout(bytes) => {
                    // Nobody takes them once unpacking has failed: then tar ends with `running`.
                    if pieces.send(bytes).await.is_err() {
                        break;
                    }
                }
            }
        }
        let gave_up = pieces.is_closed();
        drop(pieces);
        let unpacked = unpacking.await.map_err(|_| broken("unpacking ended early"))?;
        if gave_up {
            return unpacked;
        }
        let output = running.wait().await?;
        match output.is_success() {
            true => unpacked,
            false => Err(tar_failed(&complaints, output.exit_code)),
        }
    }

    /// The directory is not among tar's arguments: those are text, and a path is any bytes.
    async fn tar(&self, directory: &str, arguments: &[&str]) -> Result<Running, Failure> {
        let words = std::iter::once("tar").chain(arguments.iter().copied());
        let command = self.session.command(words.map(str::to_owned)).cwd(directory).privileged(self.privileged);
        command.start().await.map_err(|error| match error.code() {
            Some(Code::PermissionDenied) => closed(directory),
            _ => error.into(),
        })
    }
}

/// Writes the archive of a directory's content into a command's stdin.
fn pack(from: &Path, stdin: CommandStdin, bar: ProgressBar) -> Result<(), Failure> {
    let mut archive = tar::Builder::new(Counted { to: SyncIoBridge::new(stdin), bar });
    archive.follow_symlinks(false);
    let problem = |error: io::Error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::new(Local::Broken, "tar in the sandbox stopped reading", ""),
        _ => local_or_server(&error, from, Failure::reading),
    };
    archive.append_dir_all(".", from).map_err(problem)?;
    let mut counted = archive.into_inner().map_err(problem)?;
    counted.flush().and_then(|()| counted.to.shutdown()).map_err(problem)
}

/// The lengths of all files below a directory together.
fn content(directory: &Path) -> Result<u64, Failure> {
    let problem = |error: io::Error| Failure::reading(directory, &error);
    let mut total = 0;
    for entry in fs::read_dir(directory).map_err(problem)? {
        let entry = entry.map_err(problem)?;
        let metadata = entry.metadata().map_err(problem)?;
        total += match metadata.is_dir() {
            true => content(&entry.path())?,
            false if metadata.is_file() => metadata.len(),
            false => 0,
        };
    }
    Ok(total)
}

struct Counted {
    to: SyncIoBridge<CommandStdin>,
    bar: ProgressBar,
}

impl io::Write for Counted {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let length = self.to.write(piece)?;
        self.bar.inc(length as u64);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The archive as it arrives.
struct Pieces {
    archive: mpsc::Receiver<Bytes>,
    now: Bytes,
    bar: ProgressBar,
}

impl io::Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.archive.blocking_recv() {
                Some(piece) => self.now = piece,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.now.len());
        buffer[..length].copy_from_slice(&self.now.split_to(length));
        self.bar.inc(length as u64);
        Ok(length)
    }
}

fn keep(complaints: &mut Vec<u8>, more: &[u8]) {
    let room = COMPLAINTS_MAX.saturating_sub(complaints.len());
    complaints.extend_from_slice(&more[..more.len().min(room)]);
}

/// The sandbox's user may not enter a directory.
fn closed(directory: &str) -> Failure {
    let code = Code::PermissionDenied;
    Failure::Told {
        what: format!("{}: permission denied", crate::output::printable(directory)),
        remedy: PACK_AS_ROOT.to_owned(),
        code: code.name(),
        exit: code.exit_code(),
    }
}

fn tar_failed(complaints: &[u8], exit_code: i32) -> Failure {
    let said = String::from_utf8_lossy(complaints);
    let first = said.lines().next().map(crate::output::printable).unwrap_or_default();
    let what = format!("tar in the sandbox ended with exit code {exit_code}: {first}");
    Failure::new(Local::Broken, what, PACK_AS_ROOT)
}

fn broken(what: &str) -> Failure {
    Failure::new(Local::Broken, what, "This is a bug in Nagaya; please report it.")
}

/// The last part of a path, unless that is the root, `.` or `..`.
fn base_name(path: &Path) -> Option<&OsStr> {
    path.file_name().filter(|_| !path.ends_with("."))
}

fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_into_directories_keep_their_name() {
        let name = |path| base_name(Path::new(path)).map(OsStr::as_bytes);
        assert_eq!((name("/a/b"), name("b/"), name("..")), (Some(&b"b"[..]), Some(&b"b"[..]), None));
        assert_eq!((name("/"), name(".")), (None, None));
        assert_eq!((join("/tmp/", "x"), join("/", "x"), join("a", "x")), ("/tmp/x".into(), "/x".into(), "a/x".into()));
    }

    #[test]
    fn complaints_are_cut() {
        let mut complaints = Vec::new();
        keep(&mut complaints, &[b'x'; 3000]);
        keep(&mut complaints, b"more");
        assert_eq!(complaints.len(), COMPLAINTS_MAX);
    }
}
