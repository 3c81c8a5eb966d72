//! Archives made by hand, byte by byte: what no honest program writes is what is to be tested.

/// An archive under construction.
#[derive(Clone, Default)]
pub struct Tar(Vec<u8>);

/// One entry; most of it has defaults.
#[derive(Clone)]
pub struct Entry<'a> {
    pub kind: u8,
    pub path: &'a [u8],
    pub link: &'a [u8],
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub time: u64,
    pub content: &'a [u8],
    /// Pairs of a PAX header before it.
    pub pax: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Entry<'a> {
    pub fn new(kind: u8, path: &'a str) -> Self {
        Self {
            kind,
            path: path.as_bytes(),
            link: b"",
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            time: 1_000_000_000,
            content: b"",
            pax: Vec::new(),
        }
    }

    pub fn file(path: &'a str, content: &'a str) -> Self {
        Self { content: content.as_bytes(), ..Self::new(b'0', path) }
    }

    pub fn directory(path: &'a str) -> Self {
        Self::new(b'5', path)
    }

    pub fn hard_link(path: &'a str, target: &'a str) -> Self {
        Self { link: target.as_bytes(), ..Self::new(b'1', path) }
    }

    pub fn symlink(path: &'a str, target: &'a str) -> Self {
        Self { link: target.as_bytes(), mode: 0o777, ..Self::new(b'2', path) }
    }

    pub fn owned(self, uid: u64, gid: u64, mode: u32) -> Self {
        Self { uid, gid, mode, ..self }
    }

    pub fn attribute(mut self, name: &'a str, value: &'a [u8]) -> Self {
        self.pax.push((name, value));
        self
    }
}

fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    // What has no room in octal is written as GNU does.
    if value >> (digits * 3) > 0 {
        field.fill(0);
        field[digits - 7..].copy_from_slice(&value.to_be_bytes());
        field[0] |= 0x80;
        return;
    }
    field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
}

/// A header of 512 bytes with its checksum. Paths are cut to their fields.
pub fn header(entry: &Entry<'_>, size: u64) -> [u8; 512] {
    let mut header = [0; 512];
    let put = |header: &mut [u8; 512], at: usize, most: usize, text: &[u8]| {
        let length = text.len().min(most);
        header[at..at + length].copy_from_slice(&text[..length]);
    };
    put(&mut header, 0, 100, entry.path);
    octal(&mut header[100..108], entry.mode.into());
    octal(&mut header[108..116], entry.uid);
    octal(&mut header[116..124], entry.gid);
    octal(&mut header[124..136], size);
    octal(&mut header[136..148], entry.time);
    header[156] = entry.kind;
    put(&mut header, 157, 100, entry.link);
    header[257..265].copy_from_slice(b"ustar\x0000");
    sign(&mut header);
    header
}

/// Puts the right checksum into a header.
pub fn sign(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    octal(&mut header[148..155], sum.into());
}

pub fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn of<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> Vec<u8> {
        entries.into_iter().fold(Self::new(), |tar, entry| tar.add(&entry)).end()
    }

    /// An entry; what is too long for its header goes into a PAX header.
    pub fn add(mut self, entry: &Entry<'_>) -> Self {
        let mut pax: Vec<u8> = entry.pax.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        if entry.path.len() > 100 {
            pax.extend(pax_record("path", entry.path));
        }
        if entry.link.len() > 100 {
            pax.extend(pax_record("linkpath", entry.link));
        }
        if !pax.is_empty() {
            self = self.raw(&header(&Entry::new(b'x', "pax"), pax.len() as u64)).content(&pax);
        }
        self.raw(&header(entry, entry.content.len() as u64)).content(entry.content)
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn content(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).0
    }
}
