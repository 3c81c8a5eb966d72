//! Layers of strangers: what becomes of each kind of entry, and that nothing leaves the directory.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nagaya_image::{Digest, ImageError, Limits, Unpacked, unpack};
use tempfile::TempDir;

use crate::tar::{Entry, Tar, header, pax_record, sign};

const LIMITS: Limits = Limits { bytes_max: 1 << 30, entries_max: 100_000, ratio_max: 200 };

/// A directory for a layer, and beside it something that no layer may reach.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("layer")).unwrap();
        fs::write(directory.path().join("secret"), "outside").unwrap();
        Self { directory }
    }

    fn layer(&self) -> PathBuf {
        self.directory.path().join("layer")
    }

    fn unpack(&self, archive: &[u8]) -> Result<Unpacked, ImageError> {
        let root = File::open(self.layer()).unwrap();
        let outcome = unpack(archive, root.as_fd(), &LIMITS, &Digest::of(b"layer"));
        let outside: Vec<_> =
            fs::read_dir(self.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(outside.len(), 2, "something was made outside: {outside:?}");
        assert_eq!(fs::read_to_string(self.directory.path().join("secret")).unwrap(), "outside");
        assert_eq!(fs::metadata(self.directory.path().join("secret")).unwrap().nlink(), 1);
        outcome.map(|(unpacked, _)| unpacked)
    }
}

fn unpacked<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> Place {
    let place = Place::new();
    place.unpack(&Tar::of(entries)).unwrap();
    place
}

fn refusal<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> String {
    let error = Place::new().unpack(&Tar::of(entries)).expect_err("it was accepted");
    assert_eq!(error.kind(), "invalid_layer", "{error}");
    error.to_string()
}

fn text(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn status(path: &Path) -> fs::Metadata {
    fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(100);
    rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value)).ok()?;
    Some(value)
}

fn is_whiteout(path: &Path) -> bool {
    let found = status(path);
    found.file_type().is_char_device() && found.rdev() == 0
}

fn is_opaque(path: &Path) -> bool {
    attribute(path, "trusted.overlay.opaque").as_deref() == Some(b"y")
}

#[test]
fn every_kind_is_made_with_owner_permissions_time_and_attributes() {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let place = unpacked([
        Entry { time: 5, ..Entry::directory("./").owned(1, 2, 0o711) },
        Entry { time: 7, ..Entry::directory("usr").owned(3, 4, 0o2755) },
        Entry::file("usr/program", "text").owned(65535, 65535, 0o6755),
        Entry::file("usr/ping", "ping").owned(0, 0, 0o755).attribute("SCHILY.xattr.security.capability", capability),
        Entry::hard_link("usr/same", "usr/program"),
        Entry::symlink("usr/link", "/etc/target").owned(8, 9, 0o777),
        Entry::new(b'6', "fifo").owned(10, 11, 0o620),
        Entry::new(b'3', "null"),
        Entry::new(b'4', "disk"),
        Entry::file("noted", "").attribute("SCHILY.xattr.user.note", b"a\nb\0c"),
        Entry::file("fraction", "").attribute("mtime", b"12.345"),
    ]);
    let at = |name: &str| place.layer().join(name);
    let shown = |name: &str| {
        let found = status(&at(name));
        (found.uid(), found.gid(), found.mode() & 0o7777, found.mtime())
    };
    assert_eq!(shown(""), (1, 2, 0o711, 5));
    assert_eq!(shown("usr"), (3, 4, 0o2755, 7), "what is made in a directory does not change its time");
    assert_eq!(shown("usr/program"), (65535, 65535, 0o6755, 1_000_000_000));
    assert_eq!(status(&at("usr/same")).ino(), status(&at("usr/program")).ino());
    assert_eq!((status(&at("usr/link")).uid(), status(&at("usr/link")).gid()), (8, 9));
    assert_eq!(status(&at("usr/link")).mtime(), 1_000_000_000);
    assert_eq!(fs::read_link(at("usr/link")).unwrap(), Path::new("/etc/target"));
    assert!(status(&at("fifo")).file_type().is_fifo());
    assert_eq!(shown("fifo"), (10, 11, 0o620, 1_000_000_000));
    assert!(!at("null").exists() && !at("disk").exists(), "device nodes are left out");
    assert_eq!(attribute(&at("usr/ping"), "security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(attribute(&at("noted"), "user.note").as_deref(), Some(&b"a\nb\0c"[..]));
    assert_eq!((status(&at("fraction")).mtime(), status(&at("fraction")).mtime_nsec()), (12, 345_000_000));
}

#[test]
fn attributes_that_would_change_what_others_show_are_left_out() {
    let place = unpacked([
        Entry::directory("d").attribute("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        Entry::file("f", "")
            .attribute("SCHILY.xattr.trusted.overlay.redirect", b"/etc")
            .attribute("SCHILY.xattr.trusted.overlay.whiteout", b"")
            .attribute("SCHILY.xattr.user.overlay.redirect", b"/etc")
            .attribute("SCHILY.xattr.security.ima", b"x")
            .attribute("SCHILY.xattr.system.posix_acl_access", b"x"),
    ]);
    assert!(!is_opaque(&place.layer().join("d")));
    let mut names = vec![0; 1000];
    let length = rustix::fs::llistxattr(place.layer().join("f"), &mut names).unwrap();
    assert_eq!(length, 0, "{:?}", String::from_utf8_lossy(&names[..length]));
}

#[test]
fn names_of_any_length_and_bytes_are_read_in_all_three_forms() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let gnu = Tar::new()
        .raw(&header(&Entry::new(b'L', "././@LongLink"), long.len() as u64 + 1))
        .content(format!("{long}\0").as_bytes())
        .raw(&header(&Entry::file(&long, ""), 3))
        .content(b"gnu")
        .raw(&header(&Entry::new(b'K', "././@LongLink"), long.len() as u64 + 1))
        .content(format!("{long}\0").as_bytes())
        .raw(&header(&Entry::symlink("link", &long), 0))
        .end();
    let place = Place::new();
    place.unpack(&gnu).unwrap();
    assert_eq!(text(place.layer().join(&long)), "gnu");
    assert_eq!(fs::read_link(place.layer().join("link")).unwrap(), Path::new(&long));
    let pax = unpacked([Entry::file(&long, "pax")]);
    assert_eq!(text(pax.layer().join(&long)), "pax");
    let mut prefixed = header(&Entry::file("name", ""), 0);
    prefixed[345..348].copy_from_slice(b"a/b");
    sign(&mut prefixed);
    let place = Place::new();
    place.unpack(&Tar::new().raw(&prefixed).end()).unwrap();
    assert!(place.layer().join("a/b/name").exists());
    let bytes = Entry { path: b"\xff\n\x01", ..Entry::file("", "x") };
    use std::os::unix::ffi::OsStrExt;
    assert_eq!(text(unpacked([bytes]).layer().join(std::ffi::OsStr::from_bytes(b"\xff\n\x01"))), "x");
}

#[test]
fn sparse_files_have_their_holes_in_all_four_forms() {
    const HOLE: u64 = 10 << 20;
    let content = [b"a".repeat(512), b"b".repeat(512)].concat();
    let expect = |archive: Vec<u8>, form: &str| {
        let place = Place::new();
        place.unpack(&archive).unwrap_or_else(|error| panic!("{form}: {error}"));
        let path = place.layer().join("sparse");
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, HOLE + 1024, "{form}");
        assert!(bytes[..512].iter().all(|byte| *byte == b'a'), "{form}");
        assert!(bytes[512..HOLE as usize].iter().all(|byte| *byte == 0), "{form}");
        assert!(bytes[HOLE as usize..HOLE as usize + 512].iter().all(|byte| *byte == b'b'), "{form}");
        assert!(status(&path).blocks() * 512 < 1 << 20, "{form}: it was written out");
    };
    let size = (HOLE + 1024).to_string();
    let offset = HOLE.to_string();
    let map = format!("0,512,{offset},512");
    let mut old = header(&Entry::new(b'S', "sparse"), 1024);
    old[257..265].copy_from_slice(b"ustar  \0");
    for (at, value) in [(386, 0), (398, 512), (410, HOLE), (422, 512), (434, HOLE + 1024), (446, 0), (483, HOLE + 1024)]
    {
        old[at..at + 12].copy_from_slice(format!("{value:011o}\0").as_bytes());
    }
    sign(&mut old);
    expect(Tar::new().raw(&old).content(&content).end(), "GNU");
    let file = |name, pax: Vec<(&'static str, Vec<u8>)>, content: &[u8]| {
        let mut entry = Entry { content, ..Entry::new(b'0', name) };
        entry.pax = pax.iter().map(|(key, value)| (*key, value.as_slice())).collect();
        Tar::new().add(&entry).end()
    };
    let zero = vec![
        ("GNU.sparse.size", size.clone().into_bytes()),
        ("GNU.sparse.numblocks", b"2".to_vec()),
        ("GNU.sparse.offset", b"0".to_vec()),
        ("GNU.sparse.numbytes", b"512".to_vec()),
        ("GNU.sparse.offset", offset.clone().into_bytes()),
        ("GNU.sparse.numbytes", b"512".to_vec()),
    ];
    expect(file("sparse", zero, &content), "0.0");
    let one = vec![
        ("GNU.sparse.size", size.clone().into_bytes()),
        ("GNU.sparse.map", map.into_bytes()),
        ("GNU.sparse.name", b"sparse".to_vec()),
    ];
    expect(file("GNUSparseFile.0/sparse", one, &content), "0.1");
    let mut with_map = format!("2\n0\n512\n{offset}\n512\n").into_bytes();
    with_map.resize(512, 0);
    with_map.extend(&content);
    let version_1 = vec![
        ("GNU.sparse.major", b"1".to_vec()),
        ("GNU.sparse.minor", b"0".to_vec()),
        ("GNU.sparse.name", b"sparse".to_vec()),
        ("GNU.sparse.realsize", size.into_bytes()),
    ];
    expect(file("GNUSparseFile.0/sparse", version_1, &with_map), "1.0");
}

#[test]
fn sparse_files_that_lie_are_refused() {
    for (size, map, content, says) in [
        ("100", "0,512", 512, "overlap or leave"),
        ("1024", "512,512,0,512", 1024, "overlap or leave"),
        ("1024", "0,600,512,100", 700, "overlap or leave"),
        ("1024", "0,512", 1024, "1024 bytes of content"),
        ("1024", "0", 0, "no length"),
        ("1024", "0,x", 0, "no number"),
        ("18446744073709551615", "0,512", 512, "are allowed"),
        ("99999999999999999999", "0,512", 512, "no number"),
        ("1024", "18446744073709551615,18446744073709551615", 0, "overlap or leave"),
    ] {
        let content = vec![0; content];
        let entry = Entry { content: &content, ..Entry::new(b'0', "s") }
            .attribute("GNU.sparse.size", size.as_bytes())
            .attribute("GNU.sparse.map", map.as_bytes());
        let said = refusal([entry]);
        assert!(said.contains(says), "{size} {map}: {said}");
    }
    let endless = Entry { content: &[b'1'; 512], ..Entry::new(b'0', "s") }
        .attribute("GNU.sparse.major", b"1")
        .attribute("GNU.sparse.realsize", b"10");
    assert!(refusal([endless]).contains("no number"));
}

#[test]
fn later_entries_replace_earlier_ones() {
    let place = unpacked([
        Entry::file("a", "old"),
        Entry::file("a", "new"),
        Entry::directory("tree/deep/er"),
        Entry::file("tree/deep/er/file", ""),
        Entry::file("tree", "a file now"),
        Entry::file("d", "a file"),
        Entry::directory("d").owned(5, 5, 0o700),
        Entry::file("d/in", "kept"),
        Entry::directory("d").owned(6, 6, 0o750),
        Entry::symlink("s", "/nowhere"),
        Entry::file("s", "not through the link"),
        Entry::symlink("up", "."),
        Entry::directory("up"),
        Entry::file("up/in", "in the directory"),
        Entry::hard_link("a", "a"),
    ]);
    let at = |name: &str| place.layer().join(name);
    assert_eq!(text(at("a")), "new");
    assert_eq!(text(at("tree")), "a file now");
    assert_eq!(text(at("d/in")), "kept");
    assert_eq!((status(&at("d")).uid(), status(&at("d")).mode() & 0o7777), (6, 0o750));
    assert_eq!(text(at("s")), "not through the link");
    assert_eq!(text(at("up/in")), "in the directory");
    assert!(!at("in").exists());
}

#[test]
fn a_hard_linked_file_is_not_written_through_when_one_name_is_replaced() {
    let place = unpacked([
        Entry::file("a", "first"),
        Entry::hard_link("b", "a"),
        Entry::file("a", "second"),
        Entry::symlink("b2", "b"),
    ]);
    assert_eq!(text(place.layer().join("b")), "first");
    assert_eq!(text(place.layer().join("a")), "second");
}

#[test]
fn whiteouts_are_of_overlayfs_and_their_order_does_not_matter() {
    let place = unpacked([
        Entry::file("etc/.wh.gone", ""),
        Entry::file(".wh.replaced", ""),
        Entry::file("replaced/new", ""),
        Entry::file("before/new", ""),
        Entry::file(".wh.before", ""),
        Entry::file(".wh.file", ""),
        Entry::file("file", "new"),
        Entry::file("other", "new"),
        Entry::file(".wh.other", ""),
        Entry::directory("hides"),
        Entry::file("hides/.wh..wh..opq", ""),
        Entry::file("implied/.wh..wh..opq", ""),
        Entry::file(".wh..wh.aufs", ""),
        Entry::file(".wh..wh.plnk/12.34", ""),
        Entry::file(".wh.twice", ""),
        Entry::file(".wh.twice", ""),
        Entry::file(".wh.explicit", ""),
        Entry::directory("explicit"),
        Entry::directory("plain"),
    ]);
    let at = |name: &str| place.layer().join(name);
    assert!(is_whiteout(&at("etc/gone")) && is_whiteout(&at("twice")));
    assert!(!is_opaque(&at("etc")) && !is_opaque(&at("plain")));
    for opaque in ["replaced", "before", "hides", "implied", "explicit"] {
        assert!(is_opaque(&at(opaque)), "{opaque}");
    }
    assert_eq!((text(at("file")), text(at("other"))), ("new".into(), "new".into()));
    let left: Vec<_> = fs::read_dir(place.layer()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".wh.")), "{left:?}");
}

#[test]
fn missing_parents_belong_to_root_and_have_no_time_of_this_host() {
    let place = unpacked([Entry::file("a/b/c", "")]);
    let found = status(&place.layer().join("a/b"));
    assert_eq!((found.uid(), found.mode() & 0o7777, found.mtime()), (0, 0o755, 0));
    assert_eq!(status(&place.layer().join("a")).mtime(), 0);
    assert_eq!((status(&place.layer()).mode() & 0o7777, status(&place.layer()).mtime()), (0o755, 0));
}

#[test]
fn links_of_the_layer_are_followed_as_its_root_would() {
    let place = unpacked([
        Entry::symlink("lib", "usr/lib"),
        Entry::file("lib/one", "1"),
        Entry::directory("usr/lib"),
        Entry::file("lib/two", "2"),
        Entry::symlink("absolute", "/usr/lib"),
        Entry::file("absolute/three", "3"),
        Entry::symlink("up", "../../../../../../usr"),
        Entry::file("up/lib/four", "4"),
        Entry::symlink("usr/back", "../usr/../usr/lib"),
        Entry::file("usr/back/five", "5"),
        Entry::hard_link("six", "absolute/one"),
    ]);
    for (name, content) in [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5")] {
        assert_eq!(text(place.layer().join("usr/lib").join(name)), content);
    }
    assert_eq!(text(place.layer().join("six")), "1");
}

#[test]
fn nothing_leaves_the_layer() {
    // The directory's own name is what an attacker would have to guess; here it is known.
    let known = Place::new();
    let outside = known.directory.path().to_string_lossy().into_owned();
    let secret = format!("{outside}/secret");
    let attempts: &[&[Entry<'_>]] = &[
        &[Entry::symlink("out", &outside), Entry::file("out/secret", "gone")],
        &[Entry::symlink("out", ".."), Entry::file("out/secret", "gone")],
        &[Entry::symlink("a", ".."), Entry::symlink("b", "a/.."), Entry::file("b/secret", "gone")],
        &[Entry::symlink("f", &secret), Entry::file("f", "gone")],
        &[Entry::symlink("f", &secret), Entry::directory("f")],
        &[Entry::symlink("f", &secret), Entry::hard_link("g", "f")],
        &[Entry::symlink("f", "../secret"), Entry::file(".wh.f", "")],
        &[Entry::symlink("out", &outside), Entry::file("out/.wh.secret", "")],
        &[Entry::symlink("out", &outside), Entry::file("out/.wh..wh..opq", "")],
        &[Entry::symlink("link", "/proc/self/root"), Entry::file("link/secret", "gone")],
        &[Entry::file(&secret, "gone")],
    ];
    for attempt in attempts {
        let place = Place::new();
        place.unpack(&Tar::of(attempt.iter().cloned())).unwrap();
        known.unpack(&Tar::of(attempt.iter().cloned())).unwrap();
    }
    for (attempt, says) in [
        (vec![Entry::file("../secret", "gone")], "'..'"),
        (vec![Entry::file("a/../../secret", "gone")], "'..'"),
        (vec![Entry::directory("..")], "'..'"),
        (vec![Entry::hard_link("h", "../secret")], "'..'"),
        (vec![Entry::hard_link("h", &secret)], "this layer does not have"),
        (vec![Entry::symlink("out", &outside), Entry::hard_link("h", "out/secret")], "this layer does not have"),
        (vec![Entry::file(".wh...", "")], "whiteout of no name"),
        (vec![Entry::file("d/.wh..", "")], "whiteout of no name"),
        (vec![Entry::file(".wh.", "")], "whiteout of no name"),
        (vec![Entry::file(".wh.d/f", "")], "below a whiteout"),
        (vec![Entry::file(".wh.d/.wh..wh..opq", "")], "below a whiteout"),
        (vec![Entry::symlink("s", ".wh.d"), Entry::file("s/f", "")], "below a whiteout"),
        (vec![Entry::file(".wh.x", ""), Entry::hard_link("w", "x")], "this layer does not have"),
        (vec![Entry::directory("d"), Entry::hard_link("h", "d")], "to a directory"),
        (vec![Entry::hard_link("h", "/")], "to the root"),
        (vec![Entry::file("f", ""), Entry::file("f/g", "")], "no directory"),
        (vec![Entry::symlink("a", "b"), Entry::symlink("b", "a"), Entry::file("a/f", "")], "too many links"),
        (vec![Entry::new(b'6', "p"), Entry::file("p/f", "")], "no directory"),
        (vec![Entry::file("./", "")], "the root can only be"),
        (vec![Entry::symlink("", "x")], "the root can only be"),
        (vec![Entry::symlink("s", "")], "to nothing"),
        (vec![Entry::file("big", "").owned(65536, 0, 0o644)], "0 to 65535"),
        (vec![Entry::file("big", "").owned(0, 1 << 40, 0o644)], "0 to 65535"),
        (vec![Entry::new(b'V', "volume")], "unknown kind"),
        (vec![Entry::file("f", "").attribute("path", b"a\0b")], "byte 0"),
        (vec![Entry::file("f", "").attribute("SCHILY.xattr.security.capability", b"nonsense")], "security.capability"),
    ] {
        let said = refusal(attempt);
        assert!(said.contains(says), "expected {says}: {said}");
    }
}

#[test]
fn names_and_depth_have_bounds() {
    let part = "p".repeat(256);
    let deep = "d/".repeat(129);
    let long = format!("{}x", "n/".repeat(2048));
    let mut chain = vec![Entry::directory("deep")];
    let nested = format!("{}deep", "d/".repeat(100));
    chain.push(Entry::directory(&nested));
    chain.push(Entry::symlink("far", &nested));
    let through = format!("far/{nested}");
    chain.push(Entry::file(&through, ""));
    for (attempt, says) in [
        (vec![Entry::file(&part, "")], "255 bytes"),
        (vec![Entry::file(&deep, "")], "128 directories"),
        (vec![Entry::file(&long, "")], "4095 bytes"),
        (chain, "128 directories"),
        (vec![Entry::symlink("s", &"l".repeat(4096))], "4095 bytes"),
    ] {
        let said = refusal(attempt);
        assert!(said.contains(says), "expected {says}: {said}");
    }
}

#[test]
fn entries_and_headers_have_bounds_and_the_refusal_says_where() {
    let place = Place::new();
    let names: Vec<_> = (0..20).map(|number| format!("file-{number}")).collect();
    let archive = Tar::of(names.iter().map(|name| Entry::file(name, "")));
    let root = File::open(place.layer()).unwrap();
    let limits = Limits { entries_max: 10, ..LIMITS };
    let error = unpack(&archive[..], root.as_fd(), &limits, &Digest::of(b"layer")).err().unwrap();
    assert_eq!(error.kind(), "too_large");
    let said = error.to_string();
    assert!(said.contains("entry 11 (\"file-10\")") && said.contains("layer_entries_max"), "{said}");
    let said = refusal([Entry::file("good", ""), Entry::file("../bad", "")]);
    assert!(said.contains("entry 2 (\"../bad\")") && said.contains(&Digest::of(b"layer").to_string()), "{said}");
    for (kind, size, says) in
        [(b'x', 2 << 20, "a PAX header has"), (b'L', 5000, "a name has"), (b'g', 1 << 40, "a PAX header has")]
    {
        // The size alone is refused, before anything of it is held.
        let archive = Tar::new().raw(&header(&Entry::new(kind, "x"), size)).end();
        let said = Place::new().unpack(&archive).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn what_is_no_archive_is_refused() {
    let good = Tar::of([Entry::file("f", "content")]);
    let mut checksum = good.clone();
    checksum[0] ^= 1;
    let mut number = header(&Entry::file("f", ""), 0);
    number[100] = b'9';
    sign(&mut number);
    let mut negative = header(&Entry::file("f", ""), 0);
    negative[124..136].fill(0xff);
    sign(&mut negative);
    let huge = header(&Entry::file("f", ""), 1 << 61);
    let pax = |bytes: &[u8]| Tar::new().raw(&header(&Entry::new(b'x', "x"), bytes.len() as u64)).content(bytes);
    let file = header(&Entry::file("f", ""), 0);
    for (archive, says) in [
        (checksum, "checksum"),
        (good[..515].to_vec(), "in the middle of a file"),
        (good[..300].to_vec(), "in the middle of a header"),
        (Tar::new().raw(&number).end(), "no number"),
        (Tar::new().raw(&negative).end(), "negative"),
        (Tar::new().raw(&huge).end(), "a size of"),
        (pax(b"5 a=b\n").raw(&file).end(), "PAX record"),
        (pax(b"999 a=b\n").raw(&file).end(), "PAX record"),
        (pax(b"0 a=b\n").raw(&file).end(), "PAX record"),
        (pax(b"7 a=bcd").raw(&file).end(), "PAX record"),
        (pax(&pax_record("size", b"-1")).raw(&file).end(), "no number"),
        (pax(&pax_record("path", b"x")).end(), "between the name of an entry and the entry"),
        (pax(&pax_record("path", b"x")).raw(&pax(&pax_record("path", b"y")).end()).end(), "two PAX headers"),
        (Tar::new().raw(&[0; 512]).raw(&file).end(), "follows the end"),
    ] {
        let error = Place::new().unpack(&archive).expect_err(says);
        assert_eq!(error.kind(), "invalid_layer");
        assert!(error.to_string().contains(says), "expected {says}: {error}");
    }
    assert_eq!(Place::new().unpack(&[]).unwrap(), Unpacked::default());
    // Without the two blocks of zeros, and without the padding of the last file.
    let short = &good[..519];
    assert_eq!(Place::new().unpack(short).unwrap().bytes, 7);
}

#[test]
fn what_other_programs_write_is_read() {
    let source = tempfile::tempdir().unwrap();
    let at = |name: &str| source.path().join(name);
    fs::create_dir_all(at("d/e")).unwrap();
    fs::write(at("d/e/f"), "content").unwrap();
    fs::set_permissions(at("d/e/f"), PermissionsExt::from_mode(0o4711)).unwrap();
    fs::hard_link(at("d/e/f"), at("hard")).unwrap();
    std::os::unix::fs::symlink("d/e/f", at("soft")).unwrap();
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(5 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (5 << 20) - 3).unwrap();
    for format in ["gnu", "oldgnu", "pax", "posix", "ustar", "v7"] {
        let mut tar = std::process::Command::new("tar");
        // The oldest ones know no holes.
        tar.args((!matches!(format, "ustar" | "v7")).then_some("--sparse"));
        tar.args(["--format", format, "-cC"]).arg(source.path()).arg(".");
        let archive = tar.output().unwrap();
        assert!(archive.status.success(), "{format}: {}", String::from_utf8_lossy(&archive.stderr));
        let place = Place::new();
        place.unpack(&archive.stdout).unwrap_or_else(|error| panic!("{format}: {error}"));
        assert_eq!(text(place.layer().join("soft")), "content", "{format}");
        assert_eq!(status(&place.layer().join("hard")).nlink(), 2, "{format}");
        assert_eq!(status(&place.layer().join("hard")).mode() & 0o7777, 0o4711, "{format}");
        assert_eq!(fs::read(place.layer().join("sparse")).unwrap(), fs::read(at("sparse")).unwrap(), "{format}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    /// Any entries over few names, so that they meet: whatever they do to each other, they do it in the layer.
    #[test]
    fn no_sequence_of_entries_leaves_the_layer(entries in proptest::collection::vec((0..8usize, path(), path()), 1..20)) {
        let entries = entries.iter().map(|(kind, path, target)| match kind {
            0 | 1 => Entry::file(path, "content"),
            2 => Entry::directory(path),
            3 => Entry::hard_link(path, target),
            4 | 5 => Entry::symlink(path, target),
            6 => Entry::new(b'6', path),
            _ => Entry::new(b'3', path),
        });
        let place = Place::new();
        if let Err(error) = place.unpack(&Tar::of(entries)) {
            proptest::prop_assert_eq!(error.kind(), "invalid_layer", "{}", error);
        }
        for entry in fs::read_dir(place.layer()).unwrap() {
            let name = entry.unwrap().file_name();
            proptest::prop_assert!(!name.to_string_lossy().starts_with(".wh."), "{:?}", name);
        }
        fs::remove_dir_all(place.layer()).unwrap();
    }
}

/// Up to four parts, some of which mean something.
fn path() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::strategy::Strategy;
    let part = proptest::sample::select(vec!["a", "b", "c", "..", ".", "", "secret", ".wh.a", ".wh..wh..opq", ".wh.b"]);
    proptest::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
}
