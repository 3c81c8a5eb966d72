//! The file system of a volume: an ext4 image that may begin with 1 MiB and grow to 100 GiB.
//!
//! The journal comes on top of the volume's size, so that the smallest volume has one too and is as
//! safe against a crash of the host as any. The geometry must hold from the smallest to the largest size, because
//! growing cannot change it; decision 0006 has the measurements.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

pub const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Group descriptors are set aside for that much, in seven blocks: six would not do for 100 GiB and the journal.
const GROWN_BLOCKS_MAX: u64 = 112 * GIB / BLOCK;
const BYTES_PER_INODE: u64 = 16 * 1024;
/// Every block group, of 128 MiB, has as many inodes as the first one; so a volume that began with 1 MiB
/// has room for 200,000 files when it has 100 GiB.
const INODES_MIN: u64 = 256;
/// mkfs makes no journal that takes more than half of an image; smaller ones are made that large and cut.
const FORMAT_BYTES_MIN: u64 = 16 * MIB;
/// Who may write to a new volume: the first ordinary user of most images, and root in any case.
const OWNER: u32 = 1000;

const SUPERBLOCK_AT: u64 = 1024;
const MAGIC: u16 = 0xEF53;
const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;
const NEEDS_RECOVERY: u32 = 4;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{step}")]
    System { step: &'static str, source: io::Error },
    /// A program of e2fsprogs failed, and said this.
    #[error("{program}: {said}")]
    Program { program: &'static str, said: String },
    #[error("the volume's image holds no ext4 file system")]
    Foreign,
}

pub fn on(step: &'static str) -> impl Fn(io::Error) -> ImageError {
    move |source| ImageError::System { step, source }
}

/// What the image says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Of the whole file system, journal included.
    pub bytes: u64,
    pub journal_bytes: u64,
    /// Was mounted when the host crashed, or has errors.
    pub needs_check: bool,
    /// Something went wrong while it was mounted.
    pub has_errors: bool,
}

impl Superblock {
    pub fn read(image: &File) -> Result<Self, ImageError> {
        let mut raw = [0; 1024];
        image.read_exact_at(&mut raw, SUPERBLOCK_AT).map_err(on("read the volume's superblock"))?;
        let two = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let four = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        if two(0x38) != MAGIC {
            return Err(ImageError::Foreign);
        }
        let state = two(0x3A);
        Ok(Self {
            bytes: u64::from(four(0x4)) * BLOCK,
            // A copy of the journal's inode stands here; these are its size's lower bits.
            journal_bytes: four(0x14C).into(),
            has_errors: state & STATE_ERRORS != 0 || four(0x194) != 0,
            needs_check: state & STATE_CLEAN == 0 || state & STATE_ERRORS != 0 || four(0x60) & NEEDS_RECOVERY != 0,
        })
    }
}

/// Makes an empty file system for `size` bytes of the user's, a multiple of [`BLOCK`], synced.
pub fn format(path: &Path, size: u64) -> Result<(), ImageError> {
    let journal = if size < GIB { 4 * MIB } else { 16 * MIB };
    let bytes = size + journal;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(on("create the volume's image"))?;
    file.set_len(bytes.max(FORMAT_BYTES_MIN)).map_err(on("size the volume's image"))?;
    let extended = format!(
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={OWNER}:{OWNER},resize={GROWN_BLOCKS_MAX}"
    );
    let journal = format!("size={}", journal / MIB);
    let inodes = (size / BYTES_PER_INODE).max(INODES_MIN).to_string();
    let fixed = "-q -F -t ext4 -T default -b 4096 -I 256 -m 0 -e remount-ro -O ^64bit".split(' ');
    let arguments: Vec<&str> = fixed.chain(["-N", &inodes, "-J", &journal, "-E", &extended]).collect();
    run("mkfs.ext4", &arguments, path, &[])?;
    // An empty volume is empty. Repairs make it anew where they need it.
    run("debugfs", &["-w", "-R", "rmdir lost+found"], path, &[])?;
    if bytes < FORMAT_BYTES_MIN {
        let blocks = (bytes / BLOCK).to_string();
        run("resize2fs", &["-f"], path, &[&blocks])?;
        file.set_len(bytes).map_err(on("size the volume's image"))?;
    }
    let made = Superblock::read(&file)?;
    if made.bytes != bytes || made.needs_check {
        return Err(ImageError::Program { program: "mkfs.ext4", said: format!("made {made:?} of {bytes} bytes") });
    }
    file.sync_all().map_err(on("sync the volume's image"))
}

/// Puts a file system in order that nobody has mounted: replays its journal, and repairs what is not in order, such as
/// what a growth left that the host had no space for.
pub fn recover(path: &Path) -> Result<Superblock, ImageError> {
    let file = File::open(path).map_err(on("open the volume's image"))?;
    let found = Superblock::read(&file)?;
    if !found.needs_check {
        return Ok(found);
    }
    tracing::info!(image = %path.display(), "checking a volume's file system");
    check(path, "-p")?;
    file.sync_all().map_err(on("sync the volume's image"))?;
    Superblock::read(&file)
}

/// Repairs a file system that had errors, as far as that takes; what cannot be placed any more is in `lost+found` then.
pub fn repair(path: &Path) -> Result<(), ImageError> {
    tracing::warn!(image = %path.display(), "repairing a disk that had errors");
    let file = File::open(path).map_err(on("open the disk"))?;
    check(path, "-fp")?;
    file.sync_all().map_err(on("sync the disk"))
}

/// Repairs first what can be repaired without losing anything, and all else where that is not enough.
fn check(path: &Path, first: &str) -> Result<(), ImageError> {
    match run("e2fsck", &[first], path, &[]) {
        Err(ImageError::Program { .. }) => run("e2fsck", &["-fy"], path, &[]),
        other => other,
    }
}

/// Grows a file system that nobody has mounted, and that is in order, to that many bytes of its image. The kernel does this
/// better, since it uses the journal; this is for servers that may not ask it to.
pub fn grow(path: &Path, bytes: u64) -> Result<(), ImageError> {
    run("resize2fs", &["-f"], path, &[&(bytes / BLOCK).to_string()])
}

/// Runs a program of e2fsprogs on an image.
fn run(program: &'static str, before: &[&str], path: &Path, after: &[&str]) -> Result<(), ImageError> {
    let output = Command::new(program)
        .args(before)
        .arg(path)
        .args(after)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| ImageError::Program {
            program,
            said: format!("cannot be run (package e2fsprogs): {error}"),
        })?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
    match output.status.code() {
        Some(0) => Ok(()),
        // It repaired something, all of it.
        Some(1 | 2) if program == "e2fsck" => {
            tracing::warn!(image = %path.display(), said, "repaired a volume's file system");
            Ok(())
        }
        _ if said.contains("No space left on device") => Err(ImageError::System {
            step: "write the volume's image",
            source: io::Error::from_raw_os_error(libc::ENOSPC),
        }),
        _ => {
            tracing::error!(image = %path.display(), program, said, "a volume's file system");
            // What it says of paths is for the operator, who finds it in the log.
            let said = said.replace(&*path.to_string_lossy(), "the image");
            Err(ImageError::Program { program, said })
        }
    }
}

pub fn sync_directory(path: &Path) -> Result<(), ImageError> {
    fs::File::open(path).and_then(|directory| directory.sync_all()).map_err(on("sync the directory of volumes"))
}

#[cfg(test)]
mod tests;
