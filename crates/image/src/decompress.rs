//! A layer on its way from a stranger: decompressed, hashed before and after, and within its limits.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::digest::{Digest, Hasher};
use crate::error::ImageError;
use crate::manifest::Compression;
use crate::unpack::Limits;

/// Up to this size a layer may be compressed as well as it likes.
const RATIO_FREE_BYTES: u64 = 1 << 30;
/// What decompression of zstd may keep: 2 to this power, 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Counts and hashes what is read.
struct Hashing<R> {
    reader: R,
    hasher: Hasher,
    bytes: u64,
}

impl<R: BufRead> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Hashing<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        if amount > 0 {
            // What was filled and not consumed is still there.
            if let Ok(bytes) = self.reader.fill_buf() {
                self.hasher.update(&bytes[..amount]);
            }
            self.bytes += amount as u64;
            self.reader.consume(amount);
        }
    }
}

enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
}

impl<R: BufRead> Decoder<R> {
    fn source(&mut self) -> &mut R {
        match self {
            Self::Plain(reader) => reader,
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// The archive of a layer. Its errors are [`ImageError`]s within those of I/O where they are not its source's.
pub(crate) struct LayerReader<R: BufRead> {
    decoder: Decoder<Hashing<R>>,
    hasher: Hasher,
    bytes: u64,
    limits: Limits,
    layer: Digest,
}

/// What a layer was, when all of it had been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Whole {
    /// Of the archive.
    pub diff_id: Digest,
    /// Of what was read.
    pub blob: Digest,
    pub blob_bytes: u64,
}

impl<R: BufRead> LayerReader<R> {
    pub fn new(reader: R, compression: Compression, limits: Limits, layer: Digest) -> io::Result<Self> {
        let source = Hashing { reader, hasher: Hasher::default(), bytes: 0 };
        let decoder = match compression {
            Compression::None => Decoder::Plain(source),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(source))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Decoder::Zstd(decoder)
            }
        };
        Ok(Self { decoder, hasher: Hasher::default(), bytes: 0, limits, layer })
    }

    /// Reads what is left, and gives the digests.
    pub fn finish(mut self) -> io::Result<Whole> {
        io::copy(&mut BufReader::with_capacity(64 << 10, &mut self), &mut io::sink())?;
        // Behind the end of a compressed stream nothing but its source's end may follow; that it has one is to be seen.
        let rest = io::copy(self.decoder.source(), &mut io::sink())?;
        if rest > 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "something follows the end of the compressed layer",
            ));
        }
        let Hashing { hasher, bytes, .. } = self.decoder.source();
        let (blob, blob_bytes) = (std::mem::take(hasher).finish(), *bytes);
        Ok(Whole { diff_id: self.hasher.finish(), blob, blob_bytes })
    }
}

impl<R: BufRead> Read for LayerReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.bytes += read as u64;
        let too_large = |limit: String, setting| {
            let what = format!("the layer {}, uncompressed,", self.layer);
            Err(io::Error::other(ImageError::TooLarge { what, limit, setting }))
        };
        if self.bytes > self.limits.bytes_max {
            return too_large(format!("{} MiB", self.limits.bytes_max >> 20), "images.layer_mb_max");
        }
        let most = self.decoder.source().bytes.saturating_mul(self.limits.ratio_max).max(RATIO_FREE_BYTES);
        if self.bytes > most {
            let limit = format!("{} times its compressed size", self.limits.ratio_max);
            return too_large(limit, "images.compression_ratio_max");
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LIMITS: Limits = Limits { bytes_max: 4 << 30, entries_max: 10, ratio_max: 200 };

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn reader(bytes: &[u8], compression: Compression, limits: Limits) -> LayerReader<&[u8]> {
        LayerReader::new(bytes, compression, limits, Digest::of(b"")).unwrap()
    }

    #[test]
    fn all_forms_give_the_same_content_and_both_digests() {
        let content: Vec<u8> = (0..200_000u32).flat_map(|number| number.to_le_bytes()).collect();
        let two_members = [gzip(&content[..1000]), gzip(&content[1000..])].concat();
        let two_frames =
            [zstd::encode_all(&content[..1000], 1).unwrap(), zstd::encode_all(&content[1000..], 1).unwrap()].concat();
        for (bytes, compression) in [
            (content.clone(), Compression::None),
            (gzip(&content), Compression::Gzip),
            (two_members, Compression::Gzip),
            (two_frames, Compression::Zstd),
        ] {
            let mut read = reader(&bytes, compression, LIMITS);
            let mut first = vec![0; 5000];
            read.read_exact(&mut first).unwrap();
            assert_eq!(first, content[..5000]);
            let whole = read.finish().unwrap();
            let expected =
                Whole { diff_id: Digest::of(&content), blob: Digest::of(&bytes), blob_bytes: bytes.len() as u64 };
            assert_eq!(whole, expected, "{compression:?}");
        }
    }

    #[test]
    fn what_is_cut_or_followed_by_something_is_refused() {
        let whole = gzip(b"content");
        reader(&whole[..whole.len() - 1], Compression::Gzip, LIMITS).finish().unwrap_err();
        reader(&[&whole[..], b"more"].concat(), Compression::Gzip, LIMITS).finish().unwrap_err();
        reader(b"plain", Compression::Gzip, LIMITS).finish().unwrap_err();
        let frame = zstd::encode_all(&b"content"[..], 1).unwrap();
        reader(&frame[..frame.len() - 1], Compression::Zstd, LIMITS).finish().unwrap_err();
        reader(&[&frame[..], b"more"].concat(), Compression::Zstd, LIMITS).finish().unwrap_err();
    }

    #[test]
    fn bombs_are_refused_by_size_and_by_ratio() {
        let error = |read: LayerReader<&[u8]>| read.finish().unwrap_err().downcast::<ImageError>().unwrap().to_string();
        let zeros = vec![0; 3 << 20];
        let small = Limits { bytes_max: 2 << 20, ..LIMITS };
        assert!(error(reader(&zeros, Compression::None, small)).contains("2 MiB; the setting images.layer_mb_max"));
        // 1.5 GiB in some KiB.
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        for _ in 0..512 {
            encoder.write_all(&zeros).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        assert!(bomb.len() < 1 << 20);
        assert!(error(reader(&bomb, Compression::Zstd, LIMITS)).contains("images.compression_ratio_max"));
    }
}
