//! `write` and `read`: one file of a sandbox.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use clap::Args;
use nagaya_client::WriteOptions;
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::connect;
use crate::errors::Failure;
use crate::output::{Screen, bytes};
use crate::resolve::{self, Among};

/// How much is in memory on the way between a file here and one there.
const PIECE: usize = 256 * 1024;

#[derive(Debug, Args)]
pub struct Write {
    /// Session: an id, the beginning of one, or a name.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// The file in the sandbox; relative paths begin at the home directory.
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// The content itself.
    #[arg(long, value_name = "TEXT", conflicts_with = "data_file")]
    data: Option<String>,
    /// A file of this machine with the content; without it and --data that is stdin.
    #[arg(long, value_name = "FILE", alias = "file")]
    data_file: Option<PathBuf>,
    /// The mode of a new file, in octal.
    #[arg(long, value_name = "MODE", default_value = "644", value_parser = mode)]
    mode: u32,
    /// [SESSION] [PATH]
    #[arg(num_args = 0..=2, value_name = "SESSION")]
    words: Vec<String>,
}

fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| "write it in octal, such as 755".into())
}

impl Write {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let (session, path) = session_and_path(self.session, self.path, self.words)?;
        // What cannot be read here fails before anything is asked of the server.
        let mut source = source(self.data, self.data_file.as_deref()).await?;
        let session = resolve::session(&connect::client()?, &session, Among::Live).await?;
        let options = WriteOptions::default().mode(self.mode);
        let mut writer = session.files().writer(&path, options).await?;
        let from = self.data_file.unwrap_or_else(|| "stdin".into());
        copy(&mut source, &mut writer, &from).await?;
        let written = writer.finish().await?;
        screen.done(&json!({ "path": path, "bytes": written }), |_| format!("{path}: {} written", bytes(written)))
    }
}

async fn source(data: Option<String>, file: Option<&Path>) -> Result<Box<dyn AsyncRead + Unpin>, Failure> {
    Ok(match (data, file) {
        (Some(data), _) => Box::new(io::Cursor::new(data.into_bytes())),
        (None, Some(file)) if file != Path::new("-") => {
            let opened = tokio::fs::File::open(file).await.map_err(|error| Failure::reading(file, &error))?;
            if opened.metadata().await.is_ok_and(|metadata| metadata.is_dir()) {
                let what = format!("cannot read {}: it is a directory", file.display());
                return Err(Failure::usage(what, "`nagaya sandbox cp` copies directories."));
            }
            Box::new(opened)
        }
        _ => Box::new(tokio::io::stdin()),
    })
}

/// Copies to the end, telling errors of this machine from the server's.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    name: &Path,
) -> Result<(), Failure> {
    let mut buffer = vec![0; PIECE];
    loop {
        let length = from.read(&mut buffer).await.map_err(|error| local_or_server(&error, name, Failure::reading))?;
        if length == 0 {
            return Ok(());
        }
        let piece = &buffer[..length];
        to.write_all(piece).await.map_err(|error| local_or_server(&error, name, Failure::writing))?;
    }
}

/// An error of a stream that may be the server's answer.
pub fn local_or_server(error: &io::Error, path: &Path, local: fn(&Path, &io::Error) -> Failure) -> Failure {
    match nagaya_client::Error::in_io(error) {
        Some(server) => server.clone().into(),
        None => local(path, error),
    }
}

#[derive(Debug, Args)]
pub struct Read {
    /// Session: an id, the beginning of one, or a name.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// The file in the sandbox; relative paths begin at the home directory.
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// Put the content into this file of this machine, all of it or nothing, instead of stdout.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// [SESSION] [PATH]
    #[arg(num_args = 0..=2, value_name = "SESSION")]
    words: Vec<String>,
}

impl Read {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let (session, path) = session_and_path(self.session, self.path, self.words)?;
        let session = resolve::session(&connect::client()?, &session, Among::Live).await?;
        let mut reader = session.files().reader(&path).await?;
        match self.out.filter(|out| out != Path::new("-")) {
            None => {
                let mut stdout = tokio::io::stdout();
                let mut buffer = vec![0; PIECE];
                loop {
                    let length = reader.read(&mut buffer).await.map_err(nagaya_client::Error::from)?;
                    if length == 0 {
                        return stdout.flush().await.map_err(|error| Failure::printing(&error));
                    }
                    stdout.write_all(&buffer[..length]).await.map_err(|error| Failure::printing(&error))?;
                }
            }
            Some(out) => {
                let mut target = Target::beside(&out)?;
                let count = target.fill(&mut reader, |_| {}).await?;
                target.put_in_place()?;
                let done = json!({ "path": path, "out": out, "bytes": count });
                screen.done(&done, |_| format!("{}: {} written", out.display(), bytes(count)))
            }
        }
    }
}

fn session_and_path(
    session: Option<String>,
    path: Option<String>,
    words: Vec<String>,
) -> Result<(String, String), Failure> {
    let (session, mut words) = resolve::split(session, words, usize::from(path.is_none()))?;
    let path = path.or_else(|| words.pop()).filter(|path| !path.is_empty());
    Ok((session, path.ok_or_else(|| Failure::usage("a path is missing", "Give --path PATH."))?))
}

/// A file of this machine that appears under its name when it is whole. What is no regular file, such as a device or
/// a pipe, is written as it is.
pub enum Target {
    Beside { file: NamedTempFile, name: PathBuf },
    Through { file: fs::File, name: PathBuf },
}

impl Target {
    pub fn beside(path: &Path) -> Result<Self, Failure> {
        let wrong = |error: io::Error| Failure::writing(path, &error);
        // A link stays a link; what it leads to is replaced.
        let name = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let existing = fs::metadata(&name).ok();
        match &existing {
            Some(metadata) if metadata.is_dir() => return Err(wrong(io::ErrorKind::IsADirectory.into())),
            Some(metadata) if !metadata.is_file() => {
                let file = fs::OpenOptions::new().write(true).open(&name).map_err(wrong)?;
                return Ok(Self::Through { file, name });
            }
            _ => {}
        }
        let directory = name.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // The mode that the umask leaves, or mode and owner of the file which is replaced.
        let mode = existing.as_ref().map_or(0o666, |metadata| metadata.permissions().mode() & 0o777);
        let file = tempfile::Builder::new()
            .prefix(".nagaya-")
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(directory)
            .map_err(wrong)?;
        if let Some(metadata) = existing {
            // Only root can, and only for root does it matter.
            let _ = fchown(file.as_file(), Some(metadata.uid()), Some(metadata.gid()));
        }
        Ok(Self::Beside { file, name })
    }

    /// Takes everything that the reader has; the length of it. `progress` hears of every piece.
    pub async fn fill(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        progress: impl Fn(u64),
    ) -> Result<u64, Failure> {
        let (file, name) = match self {
            Self::Beside { file, name } => (file.as_file_mut(), name),
            Self::Through { file, name } => (file, name),
        };
        let mut buffer = vec![0; PIECE];
        let mut count = 0;
        loop {
            let length = reader.read(&mut buffer).await.map_err(nagaya_client::Error::from)?;
            if length == 0 {
                return Ok(count);
            }
            io::Write::write_all(file, &buffer[..length]).map_err(|error| Failure::writing(name, &error))?;
            count += length as u64;
            progress(length as u64);
        }
    }

    pub fn put_in_place(self) -> Result<(), Failure> {
        match self {
            Self::Through { .. } => Ok(()),
            // A full disk may say so only now.
            Self::Beside { file, name } => {
                file.as_file().sync_all().map_err(|error| Failure::writing(&name, &error))?;
                file.persist(&name).map_err(|error| Failure::writing(&name, &error.error)).map(drop)
            }
        }
    }

    /// The mode bits of the file that will be put in place, where it does not exist yet.
    pub fn set_mode(&self, mode: u32) -> Result<(), Failure> {
        let Self::Beside { file, name } = self else { return Ok(()) };
        if name.exists() {
            return Ok(());
        }
        let allowed = file.as_file().metadata().map(|metadata| metadata.permissions().mode() | 0o111);
        // The umask said what may be, and execution is as the source has it.
        let mode = allowed.map(|allowed| mode & allowed & 0o777).unwrap_or(mode & 0o700);
        let set = file.as_file().set_permissions(Permissions::from_mode(mode));
        set.map_err(|error| Failure::writing(name, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_appears_when_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let mut target = Target::beside(&path).unwrap();
        target.fill(&mut &b"new"[..], |_| {}).await.unwrap();
        assert!(!path.exists());
        target.put_in_place().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");

        let mut dropped = Target::beside(&path).unwrap();
        dropped.fill(&mut &b"half"[..], |_| {}).await.unwrap();
        drop(dropped);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[tokio::test]
    async fn a_link_and_a_mode_stay() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        let mut target = Target::beside(&link).unwrap();
        target.fill(&mut &b"new"[..], |_| {}).await.unwrap();
        target.put_in_place().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn directories_and_missing_places_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Target::beside(directory.path()).err().unwrap().exit_code(), 74);
        assert_eq!(Target::beside(&directory.path().join("no/such")).err().unwrap().exit_code(), 74);
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!((mode("755"), mode("0644")), (Ok(0o755), Ok(0o644)));
        assert!(mode("789").is_err() && mode("77777").is_err());
    }
}
