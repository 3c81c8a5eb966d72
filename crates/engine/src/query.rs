//! Pages of lists: sizes and tokens.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nagaya_api::error::{Code, Error};
use uuid::Uuid;

use crate::model::UnixMs;

/// Rows of one page, which are held in memory together; and how many there are when nobody says.
const PAGE_SIZE_MAX: u32 = 200;
const PAGE_SIZE_DEFAULT: u32 = 50;

/// A token names the last row of the page before; a leading byte says how to read the rest.
const VERSION: u8 = 1;

/// The number of rows to return; 0 asks for the default.
pub(crate) fn page_size(asked: u32) -> Result<u32, Error> {
    match asked {
        0 => Ok(PAGE_SIZE_DEFAULT),
        size if size <= PAGE_SIZE_MAX => Ok(size),
        _ => Err(Error::new(Code::InvalidArgument, format!("page_size is at most {PAGE_SIZE_MAX}"))),
    }
}

/// Cuts what was read, which may be one row too many, to a page; the token of the next one is empty at the end.
pub(crate) fn page<T>(rows: &mut Vec<T>, size: u32, key: impl Fn(&T) -> (UnixMs, Uuid)) -> String {
    if rows.len() <= size as usize {
        return String::new();
    }
    rows.truncate(size as usize);
    rows.last().map(key).map(|(created_at, id)| page_token(created_at, id)).unwrap_or_default()
}

fn page_token(created_at: UnixMs, id: Uuid) -> String {
    let mut bytes = [0; 25];
    bytes[0] = VERSION;
    bytes[1..9].copy_from_slice(&created_at.to_be_bytes());
    bytes[9..].copy_from_slice(id.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Where a page starts; `None` for the first one, whose token is empty.
pub(crate) fn parse_page_token(token: &str) -> Result<Option<(UnixMs, Uuid)>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let invalid = || Error::new(Code::InvalidArgument, "page_token is none that this server returned");
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| invalid())?;
    match <[u8; 25]>::try_from(bytes) {
        Ok([VERSION, rest @ ..]) => {
            let (created_at, id) = rest.split_at(8);
            let created_at = UnixMs::from_be_bytes(created_at.try_into().map_err(|_| invalid())?);
            let id = Uuid::from_slice(id).map_err(|_| invalid())?;
            Ok(Some((created_at, id)))
        }
        _ => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_leads_back_to_its_row() {
        let id = Uuid::from_bytes([3; 16]);
        assert_eq!(parse_page_token(&page_token(1_700_000_000_000, id)), Ok(Some((1_700_000_000_000, id))));
        assert_eq!(parse_page_token(""), Ok(None));
    }

    #[test]
    fn foreign_tokens_and_sizes_are_refused() {
        let id = Uuid::from_bytes([3; 16]);
        let token = page_token(1, id);
        for bad in ["x", "AAAA", &token[1..], &format!("{token}A"), "not base64!", &"A".repeat(10_000)] {
            assert_eq!(parse_page_token(bad).unwrap_err().code, Code::InvalidArgument, "{bad}");
        }
        assert_eq!(page_size(0), Ok(50));
        assert_eq!(page_size(200), Ok(200));
        assert_eq!(page_size(201).unwrap_err().code, Code::InvalidArgument);
    }
}
