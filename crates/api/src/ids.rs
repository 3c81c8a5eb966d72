//! Ids of everything a caller can name. All are UUIDs; new ones are version 7, so they sort by age.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The text is not a UUID in its usual hyphenated form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parse id: not a UUID")]
pub struct ParseIdError;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Makes a version 7 id from milliseconds since the Unix epoch and ten random bytes.
            pub fn new(unix_ms: u64, random: [u8; 10]) -> Self {
                Self(uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid())
            }

            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn as_uuid(&self) -> &Uuid {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            /// Accepts the hyphenated form only, as the wire contracts ask (`string.uuid`).
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                if text.len() != 36 {
                    return Err(ParseIdError);
                }
                Uuid::try_parse(text).map(Self).map_err(|_| ParseIdError)
            }
        }
    };
}

id!(
    /// One sandbox and its life, from creation to its last trace.
    SessionId
);
id!(
    /// The owner of sessions and quotas; every object belongs to exactly one.
    WorkspaceId
);
id!(
    /// An API key; the key's secret is never an id.
    KeyId
);
id!(
    /// One command started through `ExecuteCommand`.
    ExecutionId
);
id!(
    /// A point in the life of a sandbox's disk, kept to start others from.
    SnapshotId
);
id!(
    /// A disk that outlives sandboxes and is mounted into them.
    VolumeId
);
id!(
    /// One volume in one session.
    AttachmentId
);
id!(
    /// A disk image at rest, on its way into or out of a sandbox.
    DiskImageId
);
id!(
    /// A name under which a port of a sandbox is reached from outside.
    PreviewId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hyphenated_form_is_an_id() {
        let id = SessionId::new(1_700_000_000_000, [7; 10]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "x", &id.as_uuid().simple().to_string(), &format!("{{{id}}}"), &format!("{id} ")] {
            assert_eq!(bad.parse::<SessionId>(), Err(ParseIdError), "{bad:?}");
        }
    }

    #[test]
    fn ids_sort_by_age() {
        assert!(SessionId::new(1, [255; 10]) < SessionId::new(2, [0; 10]));
    }
}
