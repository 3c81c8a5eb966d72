use std::collections::BTreeMap;

use bytes::Bytes;
use nagaya_api::error::Code;

use super::guest::refuse;
use crate::ports::{DirectoryEntry, FileStat, GuestError, WriteOptions};

/// Files in memory.
#[derive(Clone)]
pub(super) struct Files {
    /// By absolute path without trailing slash; the root is the empty path.
    nodes: BTreeMap<String, Node>,
    /// Where relative paths start.
    home: String,
}

#[derive(Clone)]
struct Node {
    /// `None` for a directory.
    content: Option<Bytes>,
    mode: u32,
}

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

impl Node {
    fn stat(&self) -> FileStat {
        let kind = if self.content.is_none() { S_IFDIR } else { S_IFREG };
        FileStat {
            size: self.content.as_ref().map_or(4_096, |content| content.len() as u64),
            mode: kind | self.mode,
            modified_unix_ns: 1_767_225_600_000_000_000,
            is_dir: self.content.is_none(),
            is_symlink: false,
            symlink_target: String::new(),
        }
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Files {
    /// An empty file system, as a new volume has.
    pub(super) fn empty() -> Self {
        Self::of_directories([""], "")
    }

    /// What a new sandbox has, whose user lives there.
    pub(super) fn of_user(home: &str) -> Self {
        Self::of_directories(["", "/home", "/root", "/tmp", "/workspace", home], home)
    }

    fn of_directories<const N: usize>(paths: [&str; N], home: &str) -> Self {
        let node = || Node { content: None, mode: 0o755 };
        Self { nodes: paths.into_iter().map(|path| (path.to_owned(), node())).collect(), home: home.to_owned() }
    }

    /// Resolves `.` and `..` by text; there are no links here.
    fn absolute(&self, path: &str) -> Result<String, GuestError> {
        if path.is_empty() || path.contains('\0') || path.len() > 4_096 {
            return refuse(Code::InvalidPath, 0);
        }
        let start = if path.starts_with('/') { "" } else { &self.home };
        let mut parts: Vec<&str> = Vec::new();
        for part in start.split('/').chain(path.split('/')) {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                part => parts.push(part),
            }
        }
        Ok(parts.iter().flat_map(|part| ["/", *part]).collect())
    }

    /// Everything in one piece: what a disk image of these files holds.
    pub(super) fn image(&self) -> Bytes {
        let mut image = Vec::new();
        for (path, node) in &self.nodes {
            image.extend_from_slice(format!("{path} {:o} ", node.mode).as_bytes());
            image.extend_from_slice(node.content.as_deref().unwrap_or_default());
            image.push(b'\n');
        }
        image.into()
    }

    pub(super) fn stat(&self, path: &str) -> Result<Option<FileStat>, GuestError> {
        Ok(self.nodes.get(&self.absolute(path)?).map(Node::stat))
    }

    pub(super) fn read(&self, path: &str) -> Result<Bytes, GuestError> {
        match self.nodes.get(&self.absolute(path)?) {
            Some(Node { content: Some(content), .. }) => Ok(content.clone()),
            Some(_) => refuse(Code::IsADirectory, 21),
            None => refuse(Code::FileNotFound, 2),
        }
    }

    pub(super) fn check_writable(&self, path: &str) -> Result<(), GuestError> {
        let path = self.absolute(path)?;
        if let Some(Node { content: None, .. }) = self.nodes.get(&path) {
            return refuse(Code::IsADirectory, 21);
        }
        let mut above = parent(&path);
        loop {
            match self.nodes.get(above) {
                Some(Node { content: None, .. }) => return Ok(()),
                Some(_) => return refuse(Code::NotADirectory, 20),
                // Made when the content is complete.
                None => above = parent(above),
            }
        }
    }

    pub(super) fn write(&mut self, path: &str, content: Vec<u8>, options: &WriteOptions) -> Result<(), GuestError> {
        self.check_writable(path)?;
        let path = self.absolute(path)?;
        if !self.nodes.contains_key(parent(&path)) {
            self.make_directory(parent(&path), 0, true)?;
        }
        let new_mode = if options.mode == 0 { 0o644 } else { options.mode };
        let node = self.nodes.entry(path).or_insert(Node { content: Some(Bytes::new()), mode: new_mode });
        let mut bytes = content;
        if let Some(old) = node.content.as_ref().filter(|old| !options.truncate && old.len() > bytes.len()) {
            bytes.extend_from_slice(&old[bytes.len()..]);
        }
        node.content = Some(bytes.into());
        Ok(())
    }

    pub(super) fn make_directory(&mut self, path: &str, mode: u32, recursive: bool) -> Result<i64, GuestError> {
        let path = self.absolute(path)?;
        match self.nodes.get(&path) {
            Some(Node { content: None, .. }) if recursive => {}
            Some(_) => return refuse(Code::FileExists, 17),
            None => {
                match self.nodes.get(parent(&path)) {
                    Some(Node { content: None, .. }) => {}
                    Some(_) => return refuse(Code::NotADirectory, 20),
                    None if recursive => {
                        self.make_directory(parent(&path), mode, true)?;
                    }
                    None => return refuse(Code::FileNotFound, 2),
                }
                let mode = if mode == 0 { 0o755 } else { mode };
                self.nodes.insert(path, Node { content: None, mode });
            }
        }
        Ok(1_767_225_600_000_000_000)
    }

    pub(super) fn remove(&mut self, path: &str, recursive: bool) -> Result<u64, GuestError> {
        let path = self.absolute(path)?;
        if path.is_empty() {
            return refuse(Code::PermissionDenied, 1);
        }
        let below = format!("{path}/");
        let doomed: Vec<String> =
            self.nodes.keys().filter(|name| **name == path || name.starts_with(&below)).cloned().collect();
        if doomed.len() > 1 && !recursive {
            return refuse(Code::DirectoryNotEmpty, 39);
        }
        for name in &doomed {
            self.nodes.remove(name);
        }
        Ok(doomed.len() as u64)
    }

    pub(super) fn list(&self, path: &str, include_hidden: bool) -> Result<Vec<DirectoryEntry>, GuestError> {
        let path = self.absolute(path)?;
        match self.nodes.get(&path) {
            Some(Node { content: None, .. }) => {}
            Some(_) => return refuse(Code::NotADirectory, 20),
            None => return refuse(Code::FileNotFound, 2),
        }
        let below = format!("{path}/");
        let entries = self.nodes.iter().filter_map(|(name, node)| {
            let name = name.strip_prefix(&below).filter(|name| !name.is_empty() && !name.contains('/'))?;
            let stat = node.stat();
            (include_hidden || !name.starts_with('.')).then(|| DirectoryEntry {
                name: name.to_owned(),
                size: stat.size,
                mode: stat.mode,
                modified_unix_ns: stat.modified_unix_ns,
                is_dir: stat.is_dir,
            })
        });
        Ok(entries.collect())
    }
}
