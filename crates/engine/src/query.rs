//! Pages of lists: sizes and tokens.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;
use nagaya_api::limits::{PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX};
use uuid::Uuid;

use crate::model::UnixMs;

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

pub(crate) fn page_token(created_at: UnixMs, id: SessionId) -> String {
    let mut bytes = [0; 25];
    bytes[0] = VERSION;
    bytes[1..9].copy_from_slice(&created_at.to_be_bytes());
    bytes[9..].copy_from_slice(id.as_uuid().as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Where a page starts; `None` for the first one, whose token is empty.
pub(crate) fn parse_page_token(token: &str) -> Result<Option<(UnixMs, SessionId)>, Error> {
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
            Ok(Some((created_at, SessionId::from_uuid(id))))
        }
        _ => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_leads_back_to_its_row() {
        let id = SessionId::new(77, [3; 10]);
        assert_eq!(parse_page_token(&page_token(1_700_000_000_000, id)), Ok(Some((1_700_000_000_000, id))));
        assert_eq!(parse_page_token(""), Ok(None));
    }

    #[test]
    fn foreign_tokens_and_sizes_are_refused() {
        let id = SessionId::new(77, [3; 10]);
        let token = page_token(1, id);
        for bad in ["x", "AAAA", &token[1..], &format!("{token}A"), "not base64!", &"A".repeat(10_000)] {
            assert_eq!(parse_page_token(bad).unwrap_err().code, Code::InvalidArgument, "{bad}");
        }
        assert_eq!(page_size(0), Ok(20));
        assert_eq!(page_size(100), Ok(100));
        assert_eq!(page_size(101).unwrap_err().code, Code::InvalidArgument);
    }
}
