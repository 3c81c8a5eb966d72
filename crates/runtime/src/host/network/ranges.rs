//! Ranges of IPv4 addresses.

use std::net::Ipv4Addr;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub first: Ipv4Addr,
    pub last: Ipv4Addr,
}

impl Range {
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&address)
    }
}

/// An address, a network such as `1.2.3.0/24`, or `first-last`.
pub(super) fn parse(text: &str) -> Option<Range> {
    if let Some((first, last)) = text.split_once('-') {
        let range = Range { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? };
        return (range.first <= range.last).then_some(range);
    }
    let (address, prefix) = text.trim().split_once('/').unwrap_or((text.trim(), "32"));
    let address: Ipv4Addr = address.parse().ok()?;
    let prefix: u32 = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    let first = u32::from(address) & mask;
    Some(Range { first: first.into(), last: (first | !mask).into() })
}

/// The same addresses in ranges that neither overlap nor touch, in order.
pub(super) fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_by_key(|range| range.first);
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last).saturating_add(1) => {
                last.last = last.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_to_say_a_range_are_known() {
        for (text, first, last) in [
            ("1.2.3.4", [1, 2, 3, 4], [1, 2, 3, 4]),
            ("1.2.3.4/24", [1, 2, 3, 0], [1, 2, 3, 255]),
            ("0.0.0.0/0", [0, 0, 0, 0], [255, 255, 255, 255]),
            ("1.2.3.4-1.2.3.9", [1, 2, 3, 4], [1, 2, 3, 9]),
        ] {
            assert_eq!(parse(text), Some(Range { first: first.into(), last: last.into() }), "{text}");
        }
        for bad in ["", "x", "1.2.3.4/33", "1.2.3.9-1.2.3.4", "::1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn overlapping_and_touching_ranges_become_one() {
        let of = |texts: &[&str]| texts.iter().filter_map(|text| parse(text)).collect::<Vec<_>>();
        let ranges = of(&["2.0.0.0/8", "1.0.0.0/8", "1.5.0.0/16", "9.9.9.9", "255.255.255.0/24", "255.255.255.255"]);
        assert_eq!(merged(ranges), of(&["1.0.0.0-2.255.255.255", "9.9.9.9", "255.255.255.0/24"]));
    }
}
