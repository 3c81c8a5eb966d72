//! Between the types of the wire and those of Rust. What a server sends is checked here.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use buffa::{Inline, MessageField};
use buffa_types::google::protobuf as pb;
use serde::Serializer;

/// The end of the year 9999, the last one that RFC 3339 can write.
const LAST_SECOND: u64 = 253_402_300_799;

/// A time of the server; `None` when it sent none, or one outside the years 1970 to 9999.
pub(crate) fn time(field: impl Into<Option<pb::Timestamp>>) -> Option<SystemTime> {
    let timestamp: pb::Timestamp = field.into()?;
    let seconds = u64::try_from(timestamp.seconds).ok().filter(|seconds| *seconds <= LAST_SECOND)?;
    let nanos = u32::try_from(timestamp.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// A time for the server.
pub(crate) fn timestamp(time: Option<SystemTime>) -> MessageField<pb::Timestamp, Inline<pb::Timestamp>> {
    time.map(pb::Timestamp::from).into()
}

/// A span of time of the server; `None` when it sent none or a negative one.
pub(crate) fn span(field: impl Into<Option<pb::Duration>>) -> Option<Duration> {
    Duration::try_from(field.into()?).ok()
}

/// A span of time for the server.
pub(crate) fn duration(span: Option<Duration>) -> MessageField<pb::Duration, Inline<pb::Duration>> {
    span.map(pb::Duration::from).into()
}

/// Time of a file, from nanoseconds since 1970; earlier ones become 1970.
pub(crate) fn file_time(unix_ns: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(u64::try_from(unix_ns).unwrap_or_default())
}

/// A number that cannot be negative; a server that says otherwise means nothing.
pub(crate) fn unsigned<N: TryInto<M>, M: Default>(number: N) -> M {
    number.try_into().unwrap_or_default()
}

pub(crate) fn serialize_time<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    match since_epoch.as_secs() <= LAST_SECOND {
        true => serializer.collect_str(&humantime::format_rfc3339_millis(UNIX_EPOCH + since_epoch)),
        false => Err(serde::ser::Error::custom("a time after the year 9999")),
    }
}

pub(crate) fn serialize_optional_time<S: Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serialize_time(time, serializer),
        None => serializer.serialize_none(),
    }
}

pub(crate) fn serialize_span<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(span.as_secs_f64())
}

pub(crate) fn serialize_optional_span<S: Serializer>(
    span: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match span {
        Some(span) => serialize_span(span, serializer),
        None => serializer.serialize_none(),
    }
}

/// Declares an enumeration that also holds what a newer server may say. It prints and serializes
/// as the lower-case text given here.
macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident, $wire:ty { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// What this version of the client does not know, by its number on the wire.
            Unknown(i32),
        }

        impl $name {
            pub(crate) fn of_wire(value: ::buffa::EnumValue<$wire>) -> Self {
                match value.as_known() {
                    $(Some(<$wire>::$variant) => Self::$variant,)*
                    _ => Self::Unknown(value.to_i32()),
                }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                match self {
                    $(Self::$variant => f.pad($text),)*
                    Self::Unknown(number) => f.pad(&format!("unknown ({number})")),
                }
            }
        }

        impl ::serde::Serialize for $name {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

pub(crate) use wire_enum;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_no_calendar_has_are_no_times() {
        let at = |seconds, nanos| time(Some(pb::Timestamp { seconds, nanos, ..Default::default() }));
        assert_eq!(at(1, 5), Some(UNIX_EPOCH + Duration::new(1, 5)));
        for (seconds, nanos) in [(-1, 0), (i64::MIN, 0), (i64::MAX, 0), (253_402_300_800, 0), (0, -1), (0, i32::MAX)] {
            assert_eq!(at(seconds, nanos), None, "{seconds} {nanos}");
        }
        assert_eq!(time(None), None);
    }

    #[test]
    fn negative_spans_are_none() {
        let of = |seconds, nanos| span(Some(pb::Duration { seconds, nanos, ..Default::default() }));
        assert_eq!(of(2, 5), Some(Duration::new(2, 5)));
        assert_eq!((of(-1, 0), of(1, -1), of(0, i32::MIN)), (None, None, None));
    }
}
