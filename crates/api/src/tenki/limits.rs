//! Ranges that the protocol fixes for its requests. What any server can take beyond them is the server's to say.

/// Cores a sandbox may have; inclusive. Source: rule on `CreateSessionRequest.cpu_cores`.
pub const CPU_CORES: std::ops::RangeInclusive<u32> = 1..=16;
/// Memory in MiB, even numbers only. Source: rules on `CreateSessionRequest.memory_mb`.
pub const MEMORY_MB: std::ops::RangeInclusive<u32> = 128..=65_536;
/// Disk in GiB. Source: rule on `CreateSessionRequest.disk_size_gb`.
pub const DISK_GB: std::ops::RangeInclusive<u32> = 5..=100;

pub const DEFAULT_CPU_CORES: u32 = 2;
pub const DEFAULT_MEMORY_MB: u32 = 4_096;
pub const DEFAULT_DISK_GB: u32 = 5;

/// Size of a volume in bytes. Source: rules on `CreateVolumeRequest.size_bytes`.
pub const VOLUME_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=100 << 30;

/// Entries of an allow-list of destinations. Source: rules on `SessionEgressPolicy`.
pub const EGRESS_DOMAINS_MAX: usize = 256;
pub const EGRESS_CIDRS_MAX: usize = 64;

/// Characters in the slug of a preview. Source: rules on `CreatePreviewUrlRequest.slug`.
pub const SLUG_CHARS: std::ops::RangeInclusive<usize> = 3..=63;

/// Characters in the name of a session, snapshot or volume. Source: rules on `name` of their updates.
pub const NAME_CHARS_MAX: usize = 64;
/// Tags of a session, snapshot or volume. Source: rules on `tags`.
pub const TAGS_MAX: usize = 20;
pub const TAG_CHARS_MAX: usize = 32;
/// Largest page of a list; 0 in a request means [`PAGE_SIZE_DEFAULT`].
pub const PAGE_SIZE_MAX: u32 = 100;
pub const PAGE_SIZE_DEFAULT: u32 = 20;
/// Ids in one `TerminateSessions`.
pub const TERMINATE_BATCH_MAX: usize = 100;

/// Whether a tag is `[a-z0-9][a-z0-9_:.-]*` and short enough.
pub fn is_tag(tag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    tag.len() <= TAG_CHARS_MAX
        && tag.bytes().next().is_some_and(plain)
        && tag.bytes().all(|byte| plain(byte) || b"_:.-".contains(&byte))
}
