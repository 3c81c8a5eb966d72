//! Names of files as text.
//!
//! A name on Linux is any bytes but NUL and the slash; a path in the API is text. A byte that is not part of valid
//! UTF-8 is told as the character U+EF00 plus the byte, U+EF80 to U+EFFF, and read back from it. So that no two names
//! have the same text, characters of that range in a name are told byte by byte as well.

use std::borrow::Cow;

/// The escape of the byte 0; of those that need one the lowest is 0x80.
const ESCAPES: u32 = 0xef00;
const FIRST: char = '\u{ef80}';
const LAST: char = '\u{efff}';

fn is_escape(character: char) -> bool {
    (FIRST..=LAST).contains(&character)
}

/// A name or path as text.
pub fn to_text(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(is_escape) => Cow::Borrowed(text),
        _ => Cow::Owned(escape(bytes)),
    }
}

fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    let byte_by_byte = |text: &mut String, bytes: &[u8]| {
        text.extend(bytes.iter().filter_map(|byte| char::from_u32(ESCAPES + u32::from(*byte))));
    };
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match is_escape(character) {
                true => byte_by_byte(&mut text, character.encode_utf8(&mut [0; 4]).as_bytes()),
                false => text.push(character),
            }
        }
        byte_by_byte(&mut text, chunk.invalid());
    }
    text
}

/// The name or path that a text stands for.
pub fn to_bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.contains(is_escape) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match is_escape(character) {
            true => bytes.push((u32::from(character) - ESCAPES) as u8),
            false => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_names_have_a_text_of_their_own_and_come_back_from_it() {
        let mut names: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![b'a', byte, b'z']).collect();
        names.extend((0..=255u8).map(|byte| vec![0xc3, byte]));
        // Cut off and overlong sequences, a surrogate, and what looks like an escape.
        let odd: [&[u8]; 7] = [
            b"",
            "日本".as_bytes(),
            &"日本".as_bytes()[..5],
            b"\xc0\xaf",
            b"\xed\xa0\x80",
            "\u{ef80}\u{efff}".as_bytes(),
            "\u{ee80}\u{f000}".as_bytes(),
        ];
        names.extend(odd.iter().map(|name| name.to_vec()));
        for name in &names {
            assert_eq!(to_bytes(&to_text(name)), *name);
        }
        let texts: BTreeSet<_> = names.iter().map(|name| to_text(name)).collect();
        assert_eq!(texts.len(), names.iter().collect::<BTreeSet<_>>().len());
    }

    #[test]
    fn text_stays_what_it_is_and_an_escape_is_never_a_slash_or_nothing() {
        assert!(matches!(to_text("naïve 日本".as_bytes()), Cow::Borrowed("naïve 日本")));
        assert_eq!(to_text(b"caf\xe9"), "caf\u{efe9}");
        for byte in 0x80..=0xffu32 {
            let text = char::from_u32(0xef00 + byte).unwrap().to_string();
            assert_eq!(*to_bytes(&text), [byte as u8]);
        }
    }
}
