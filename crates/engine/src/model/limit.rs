//! What there is only so much of on a host.

use serde::{Deserialize, Serialize};

macro_rules! limits {
    ($($variant:ident => $name:literal, $resource:ident;)*) => {
        /// Something finite that a request ran into. Recorded under its name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum Limit {
            $(#[serde(rename = $name)] $variant,)*
            /// Recorded by another version of the server.
            #[serde(other)]
            Unknown,
        }

        impl Limit {
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// As users are told: the setting where there is one, else what it is.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* Self::Unknown => "a limit of the host" }
            }

            /// What is short when the limit is reached.
            pub const fn resource(self) -> Resource {
                match self { $(Self::$variant => Resource::$resource,)* Self::Unknown => Resource::Other }
            }
        }
    };
}

limits! {
    DiskFreeMin => "disk_free_mb_min", Disk;
    MemoryAvailableMin => "memory_available_mb_min", Memory;
    Slots => "slots_max", Sandboxes;
    ImageBytes => "image_bytes_max", Disk;
    HostDisk => "space on the host's disk", Disk;
    HostMemory => "memory of the host", Memory;
    HostOpenFiles => "open files of the host", Other;
    ServerOpenFiles => "open files of the server", Other;
    LoopDevices => "loop devices of the host", Other;
}

/// Kinds of what limits are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Memory,
    Disk,
    Sandboxes,
    Other,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_recorded_under_their_names_and_unknown_ones_are_read() {
        for limit in Limit::ALL {
            let text = serde_json::to_string(limit).unwrap();
            assert_eq!(text, format!("{:?}", limit.name()));
            assert_eq!(serde_json::from_str::<Limit>(&text).unwrap(), *limit);
        }
        assert_eq!(serde_json::from_str::<Limit>("\"of_tomorrow\"").unwrap(), Limit::Unknown);
    }
}
