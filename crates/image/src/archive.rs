//! Reads tar archives of strangers: ustar, GNU and PAX, one entry at a time, with a bound for everything that is held.
//!
//! The crate `tar` reads names and PAX records of any length into memory, ends a record at the first line feed of a binary value, and knows
//! no sparse files of PAX; so the walk is our own.

use std::io::{self, Read};

/// The unit of archives.
const BLOCK: usize = 512;
/// PAX records of one entry, in bytes: its attributes are among them.
const PAX_BYTES_MAX: u64 = 1 << 20;
/// The longest path of Linux, and its end.
pub(crate) const PATH_BYTES_MAX: usize = 4095;
/// Parts of one sparse file.
const SPARSE_PARTS_MAX: usize = 1 << 18;
/// The largest file that can be claimed to be mostly holes: 1 TiB.
const SPARSE_BYTES_MAX: u64 = 1 << 40;

#[derive(Debug)]
pub(crate) enum ArchiveError {
    /// The bytes are no archive.
    Invalid(String),
    /// They could not be had.
    Read(io::Error),
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Invalid("the archive ends in the middle".into()),
            _ => Self::Read(error),
        }
    }
}

fn invalid<T>(problem: impl Into<String>) -> Result<T, ArchiveError> {
    Err(ArchiveError::Invalid(problem.into()))
}

/// A name and its value, which may be any bytes.
type Attribute = (Vec<u8>, Vec<u8>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    SymbolicLink,
    Directory,
    Fifo,
    /// Of either kind.
    Device,
}

/// What an archive says of one file. Nothing of it is checked but its length.
#[derive(Debug)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds.
    pub modified: (i64, u32),
    /// Bytes of content in the archive.
    pub size: u64,
    /// Where the content belongs, if it is not all there.
    pub sparse: Option<Sparse>,
    pub attributes: Vec<Attribute>,
}

/// A file of this size, of which only some parts are in the archive: offsets and lengths.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sparse {
    pub size: u64,
    pub parts: Vec<(u64, u64)>,
}

pub(crate) struct Archive<R> {
    reader: R,
    /// Of the content of the entry that was given last.
    left: u64,
    padding: u64,
}

/// What the headers before an entry say of it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<Attribute>,
}

impl<R: Read> Archive<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, left: 0, padding: 0 }
    }

    pub fn reader(&self) -> &R {
        &self.reader
    }

    /// The reader, behind what was read.
    pub fn into_inner(self) -> R {
        self.reader
    }

    /// The next entry; what was not read of the content before is skipped.
    pub fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extensions = Extensions::default();
        let mut begun = false;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return if begun { invalid("it ends between the name of an entry and the entry") } else { Ok(None) };
            };
            let size = number(&header[124..136], "size")?;
            match header[156] {
                b'L' => extensions.path = Some(self.text(size)?),
                b'K' => extensions.link = Some(self.text(size)?),
                b'x' => {
                    if !extensions.pax.is_empty() {
                        return invalid("two PAX headers are about one entry");
                    }
                    extensions.pax = pax_records(&self.bytes(size, PAX_BYTES_MAX, "a PAX header")?)?;
                }
                // For all that follows, such as the commit that an archive was made of. No tool that makes images needs it.
                b'g' => {
                    self.bytes(size, PAX_BYTES_MAX, "a PAX header")?;
                    continue;
                }
                kind => return self.entry(&header, kind, size, extensions).map(Some),
            }
            begun = true;
        }
    }

    /// Content of the entry that was given last; 0 is its end.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let read = self.reader.read(&mut buffer[..most])?;
        if read == 0 {
            return invalid("the archive ends in the middle of a file");
        }
        self.left -= read as u64;
        Ok(read)
    }

    fn begin(&mut self, size: u64) -> Result<(), ArchiveError> {
        // So large that nothing overflows, and larger than any limit.
        if size > 1 << 60 {
            return invalid(format!("a size of {size} bytes"));
        }
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        Ok(())
    }

    fn skip(&mut self) -> Result<(), ArchiveError> {
        let skipped = self.left + self.padding;
        let found = io::copy(&mut (&mut self.reader).take(skipped), &mut io::sink())?;
        // Some writers leave out the padding of the last file.
        if found < self.left {
            return invalid("the archive ends in the middle of a file");
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, ArchiveError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return invalid("the archive ends in the middle of a header"),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(block))
    }

    /// The next header, or `None` at the end: two blocks of zeros, or nothing more.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, ArchiveError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block == [0; BLOCK] {
            return match self.block()? {
                Some(second) if second != [0; BLOCK] => invalid("something follows the end of the archive"),
                _ => Ok(None),
            };
        }
        let sum = |byte: (usize, &u8)| if (148..156).contains(&byte.0) { 32 } else { u64::from(*byte.1) };
        if number(&block[148..156], "checksum")? != block.iter().enumerate().map(sum).sum::<u64>() {
            return invalid("the checksum of a header is wrong");
        }
        Ok(Some(block))
    }

    fn bytes(&mut self, size: u64, most: u64, what: &str) -> Result<Vec<u8>, ArchiveError> {
        if size > most {
            return invalid(format!("{what} has {size} bytes, and {most} are allowed"));
        }
        self.begin(size)?;
        let mut bytes = vec![0; size as usize];
        self.reader.read_exact(&mut bytes)?;
        self.left = 0;
        Ok(bytes)
    }

    fn text(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut text = self.bytes(size, PATH_BYTES_MAX as u64 + 1, "a name")?;
        text.truncate(text.iter().position(|byte| *byte == 0).unwrap_or(text.len()));
        Ok(text)
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        letter: u8,
        size: u64,
        extensions: Extensions,
    ) -> Result<Entry, ArchiveError> {
        let Extensions { path, link, pax } = extensions;
        let mut entry = Entry {
            path: path.unwrap_or_else(|| name(header)),
            kind: match letter {
                0 | b'0' | b'7' | b'S' => Kind::File,
                b'1' => Kind::HardLink,
                b'2' => Kind::SymbolicLink,
                b'3' | b'4' => Kind::Device,
                b'5' => Kind::Directory,
                b'6' => Kind::Fifo,
                other => return invalid(format!("an entry of the unknown kind {:?}", char::from(other))),
            },
            link: link.unwrap_or_else(|| until_zero(&header[157..257]).to_vec()),
            mode: (number(&header[100..108], "mode")? & 0o7777) as u32,
            uid: number(&header[108..116], "owner")?,
            gid: number(&header[116..124], "group")?,
            modified: (signed_number(&header[136..148], "time")?, 0),
            size,
            sparse: None,
            attributes: Vec::new(),
        };
        let sparse = entry.apply(pax)?;
        // Archives from before 1988 know no directories but by their name.
        if letter == 0 && entry.path.ends_with(b"/") {
            entry.kind = Kind::Directory;
        }
        if entry.path.len() > PATH_BYTES_MAX || entry.link.len() > PATH_BYTES_MAX {
            return invalid(format!("a name of more than {PATH_BYTES_MAX} bytes"));
        }
        // Only files have content, whatever size the others claim: so does Go read archives, and with it all tools for images.
        if entry.kind != Kind::File {
            entry.size = 0;
        }
        self.begin(entry.size)?;
        if letter == b'S' {
            entry.sparse = Some(self.gnu_sparse(header)?);
        } else if let Some(sparse) = sparse.filter(|_| entry.kind == Kind::File) {
            entry.sparse = Some(self.pax_sparse(sparse)?);
        }
        if let Some(sparse) = &entry.sparse {
            entry.size = self.left;
            sparse.check(self.left)?;
        }
        Ok(entry)
    }

    /// The parts of a sparse file as GNU tar wrote them before 2005: in the header and in blocks that follow it.
    fn gnu_sparse(&mut self, header: &[u8; BLOCK]) -> Result<Sparse, ArchiveError> {
        let size = number(&header[483..495], "size")?;
        let mut parts = Vec::new();
        let mut more = gnu_parts(&header[386..482], &mut parts)? && header[482] != 0;
        while more {
            let Some(block) = self.block()? else { return invalid("the archive ends in the middle of a header") };
            more = gnu_parts(&block[..504], &mut parts)? && block[504] != 0;
        }
        Ok(Sparse { size, parts })
    }

    /// The parts of a sparse file as PAX headers have them, or, in version 1.0, lines before the content.
    fn pax_sparse(&mut self, found: PaxSparse) -> Result<Sparse, ArchiveError> {
        let Some(size) = found.size else { return invalid("a sparse file without a size") };
        if !found.before_content {
            return Ok(Sparse { size, parts: pairs(found.numbers)? });
        }
        let mut lines = Lines { archive: self, block: [0; BLOCK], at: BLOCK };
        let count = lines.number()?;
        if count > SPARSE_PARTS_MAX as u64 {
            return invalid(format!("a sparse file of {count} parts; {SPARSE_PARTS_MAX} are allowed"));
        }
        let numbers: Result<Vec<_>, _> = (0..count * 2).map(|_| lines.number()).collect();
        Ok(Sparse { size, parts: pairs(numbers?)? })
    }
}

/// Decimal numbers on lines of their own, in whole blocks.
struct Lines<'a, R> {
    archive: &'a mut Archive<R>,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64, ArchiveError> {
        let mut digits = Vec::new();
        loop {
            if self.at == BLOCK {
                if self.archive.left < BLOCK as u64 {
                    return invalid("the list of a sparse file's parts has no end");
                }
                self.archive.reader.read_exact(&mut self.block)?;
                self.archive.left -= BLOCK as u64;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => return decimal(&digits),
                _ if digits.len() == 20 => return decimal(b"too long"),
                byte => digits.push(byte),
            }
        }
    }
}

impl Sparse {
    /// Parts lie in order and within the file, and all of their content is there.
    fn check(&self, content: u64) -> Result<(), ArchiveError> {
        if self.size > SPARSE_BYTES_MAX {
            return invalid(format!("a sparse file of {} bytes; {SPARSE_BYTES_MAX} are allowed", self.size));
        }
        let (mut end, mut sum) = (0, 0);
        for &(offset, length) in &self.parts {
            let Some(next) = offset.checked_add(length).filter(|next| offset >= end && *next <= self.size) else {
                return invalid("the parts of a sparse file overlap or leave it");
            };
            end = next;
            sum += length;
        }
        match sum == content {
            true => Ok(()),
            false => invalid(format!("a sparse file has {content} bytes of content, and its parts {sum}")),
        }
    }
}

#[derive(Default)]
struct PaxSparse {
    size: Option<u64>,
    numbers: Vec<u64>,
    before_content: bool,
}

impl Entry {
    /// Takes over what PAX records say, which is more and better than what the header says.
    fn apply(&mut self, records: Vec<Attribute>) -> Result<Option<PaxSparse>, ArchiveError> {
        let mut sparse: Option<PaxSparse> = None;
        let mut sparse_name = None;
        for (key, value) in records {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                self.attributes.push((name.to_vec(), value));
                continue;
            }
            match key.as_slice() {
                // An empty value takes a global one back.
                _ if value.is_empty() => {}
                b"path" => self.path = value,
                b"linkpath" => self.link = value,
                b"size" => self.size = decimal(&value)?,
                b"uid" => self.uid = decimal(&value)?,
                b"gid" => self.gid = decimal(&value)?,
                b"mtime" => self.modified = time(&value)?,
                b"GNU.sparse.name" => sparse_name = Some(value),
                b"GNU.sparse.major" => sparse.get_or_insert_default().before_content = decimal(&value)? == 1,
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                    sparse.get_or_insert_default().size = Some(decimal(&value)?);
                }
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    sparse.get_or_insert_default().numbers.push(decimal(&value)?);
                }
                b"GNU.sparse.map" => {
                    let numbers: Result<Vec<_>, _> = value.split(|byte| *byte == b',').map(decimal).collect();
                    sparse.get_or_insert_default().numbers = numbers?;
                }
                _ => {}
            }
        }
        if let (Some(_), Some(name)) = (&sparse, sparse_name) {
            self.path = name;
        }
        Ok(sparse)
    }
}

/// Records are `LENGTH KEY=VALUE\n`, and values may hold any byte.
fn pax_records(mut bytes: &[u8]) -> Result<Vec<Attribute>, ArchiveError> {
    let mut records = Vec::new();
    while !bytes.is_empty() && bytes[0] != 0 {
        let record = || {
            let space = bytes.iter().take(8).position(|byte| *byte == b' ')?;
            let length = usize::try_from(decimal(&bytes[..space]).ok()?).ok()?;
            let text = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = text.iter().position(|byte| *byte == b'=')?;
            (equals > 0).then(|| (length, text[..equals].to_vec(), text[equals + 1..].to_vec()))
        };
        let Some((length, key, value)) = record() else { return invalid("a PAX record that is none") };
        records.push((key, value));
        bytes = &bytes[length..];
    }
    Ok(records)
}

fn pairs(numbers: Vec<u64>) -> Result<Vec<(u64, u64)>, ArchiveError> {
    match numbers.len() % 2 {
        0 => Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()),
        _ => invalid("a part of a sparse file has an offset and no length"),
    }
}

/// Adds parts of 24 bytes each; false when the list has ended.
fn gnu_parts(bytes: &[u8], parts: &mut Vec<(u64, u64)>) -> Result<bool, ArchiveError> {
    for part in bytes.chunks_exact(24) {
        if part[0] == 0 && part[12] == 0 {
            return Ok(false);
        }
        if parts.len() == SPARSE_PARTS_MAX {
            return invalid(format!("a sparse file of more than {SPARSE_PARTS_MAX} parts"));
        }
        parts.push((number(&part[..12], "offset")?, number(&part[12..], "length")?));
    }
    Ok(true)
}

fn until_zero(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

fn name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_zero(&header[..100]);
    // GNU's headers have other things where POSIX has the beginning of long names.
    match until_zero(&header[345..500]) {
        prefix if !prefix.is_empty() && header[257..263] == *b"ustar\0" => [prefix, b"/", name].concat(),
        _ => name.to_vec(),
    }
}

fn number(field: &[u8], what: &str) -> Result<u64, ArchiveError> {
    u64::try_from(signed_number(field, what)?).or_else(|_| invalid(format!("a negative {what}")))
}

/// Octal digits, or, where the first bit is set, binary.
fn signed_number(field: &[u8], what: &str) -> Result<i64, ArchiveError> {
    let wrong = || ArchiveError::Invalid(format!("a {what} that is no number"));
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value = if negative { -1i128 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 && !negative { byte & 0x7f } else { *byte };
            value = value << 8 | i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| wrong());
    }
    let text = std::str::from_utf8(until_zero(field)).map_err(|_| wrong())?.trim_matches(' ');
    match text {
        "" => Ok(0),
        text if text.bytes().all(|byte| byte.is_ascii_digit()) => i64::from_str_radix(text, 8).map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

fn decimal(text: &[u8]) -> Result<u64, ArchiveError> {
    let digits = std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(number) => Ok(number),
        None => invalid(format!("{:?} is no number", String::from_utf8_lossy(&text[..text.len().min(32)]))),
    }
}

/// Seconds, with a fraction or without.
fn time(text: &[u8]) -> Result<(i64, u32), ArchiveError> {
    let (negative, rest) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = match rest.iter().position(|byte| *byte == b'.') {
        Some(point) => (&rest[..point], &rest[point + 1..]),
        None => (rest, &b""[..]),
    };
    let seconds = decimal(whole)?.min(1 << 40) as i64;
    let digits: Vec<_> = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9).collect();
    let nanoseconds = decimal(&digits)? as u32;
    Ok(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}
