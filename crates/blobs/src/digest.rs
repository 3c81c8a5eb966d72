//! Names of blobs.

use std::fmt;
use std::str::FromStr;

use nagaya_engine::ports::BlobError;

/// The BLAKE3 hash of a blob's bytes, and its name: 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        blake3::Hash::from_bytes(self.0).to_hex().fmt(f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = BlobError;

    /// Names become file names, so that nothing but the exact form is one.
    fn from_str(text: &str) -> Result<Self, BlobError> {
        let lower_case = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match blake3::Hash::from_hex(text) {
            Ok(hash) if lower_case => Ok(Self(*hash.as_bytes())),
            _ => Err(BlobError::Failed(format!("{text:?} is not the name of a blob"))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_64_lower_case_digits_are_a_name() {
        let digest = Digest::of(b"x");
        let name = digest.to_string();
        assert_eq!(name.parse::<Digest>().unwrap(), digest);
        for bad in ["", "../../etc/passwd", &name[1..], &format!("{name}0"), &name.to_uppercase(), &"é".repeat(32)] {
            bad.parse::<Digest>().unwrap_err();
        }
    }
}
