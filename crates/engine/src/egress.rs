//! Where sandboxes may go: the destinations that callers name, and what they see of connections.

use std::net::Ipv4Addr;

use nagaya_api::error::{Code, Error};

use crate::model::Egress;
use crate::ports::DriverError;

/// Entries of an allow-list: every packet and every question of the sandbox is compared with them.
const DOMAINS_MAX: usize = 512;
const CIDRS_MAX: usize = 256;
/// Characters of the longest name that DNS has, and of the longest IPv4 network.
const DOMAIN_CHARS_MAX: usize = 253;
const CIDR_CHARS_MAX: usize = "255.255.255.255/32".len();

/// Why destinations could not be changed or looked at, in the words of the table.
pub(crate) fn egress_error(error: DriverError) -> Error {
    match error {
        DriverError::Gone => Code::GuestUnreachable.into(),
        DriverError::Refused(reason) => Error::new(Code::InvalidArgument, reason),
        DriverError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit.name()),
        error => Error::new(Code::Internal, format!("the rules of the sandbox's network: {error}")),
    }
}

fn invalid(detail: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, detail)
}

/// An allow-list in its one form, without duplicates.
pub(crate) fn checked(egress: Egress) -> Result<Egress, Error> {
    if egress.allow_domains.len() > DOMAINS_MAX {
        return Err(invalid(format!("egress.allow_domains has more than {DOMAINS_MAX} names")));
    }
    if egress.allow_cidrs.len() > CIDRS_MAX {
        return Err(invalid(format!("egress.allow_cidrs has more than {CIDRS_MAX} networks")));
    }
    let mut checked = Egress::default();
    for domain in &egress.allow_domains {
        add(&mut checked.allow_domains, domain_name(domain)?);
    }
    for cidr in &egress.allow_cidrs {
        add(&mut checked.allow_cidrs, network(cidr)?);
    }
    Ok(checked)
}

fn add(list: &mut Vec<String>, item: String) {
    if !list.contains(&item) {
        list.push(item);
    }
}

/// A host name, or `*.` and one, as resolvers ask for it: other alphabets in their `xn--` form.
fn domain_name(text: &str) -> Result<String, Error> {
    let problem = |problem: &str| invalid(format!("egress.allow_domains: {problem}"));
    if text.len() > DOMAIN_CHARS_MAX {
        return Err(problem(&format!("a name has more than {DOMAIN_CHARS_MAX} characters")));
    }
    let lower = text.to_ascii_lowercase();
    let name = lower.strip_suffix('.').unwrap_or(&lower);
    let labels: Vec<&str> = name.strip_prefix("*.").unwrap_or(name).split('.').collect();
    let is_label = |label: &&str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(allowed)
    };
    if !labels.iter().all(is_label) {
        return Err(problem(
            "a name is labels of letters, digits, '-' and '_', with '*.' before them for every name below; other \
             alphabets are written in their xn-- form",
        ));
    }
    // Resolvers take it for an address and never ask for it, so it would allow nothing.
    if labels.last().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(problem("addresses belong into allow_cidrs"));
    }
    Ok(name.to_owned())
}

/// An IPv4 network as `first/prefix`; a single address is one of 32 bits.
fn network(text: &str) -> Result<String, Error> {
    let problem = || {
        invalid("egress.allow_cidrs: each must be an IPv4 network such as 1.2.3.0/24; IPv6 does not exist in sandboxes")
    };
    if text.len() > CIDR_CHARS_MAX {
        return Err(problem());
    }
    let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
    let address: Ipv4Addr = address.parse().map_err(|_| problem())?;
    let plain = prefix.len() <= 2 && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u32 = prefix.parse().ok().filter(|prefix| plain && *prefix <= 32).ok_or_else(problem)?;
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    Ok(format!("{}/{prefix}", Ipv4Addr::from(u32::from(address) & mask)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_get_one_form() {
        for (given, kept) in [
            ("example.com", "example.com"),
            ("Example.COM.", "example.com"),
            ("*.Example.com", "*.example.com"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_dmarc.a-b.c1", "_dmarc.a-b.c1"),
            ("com", "com"),
        ] {
            assert_eq!(domain_name(given).as_deref(), Ok(kept));
        }
        let long_label = format!("{}.example", "a".repeat(64));
        let bad = [
            "",
            ".",
            "*",
            "*.",
            "*.*.a",
            "a.*.b",
            "a..b",
            ".a",
            "a b",
            "bücher.example",
            "a/b",
            "1.2.3.4",
            "a\0",
            "http://a",
            "a:1",
        ];
        for bad in bad.into_iter().chain([long_label.as_str(), &"a.".repeat(127)]) {
            assert_eq!(domain_name(bad).map_err(|error| error.code), Err(Code::InvalidArgument), "{bad}");
        }
        assert!(domain_name(&format!("{}a", "a.".repeat(126))).is_ok());
    }

    #[test]
    fn networks_get_one_form() {
        for (given, kept) in [
            ("1.2.3.0/24", "1.2.3.0/24"),
            ("1.2.3.4/24", "1.2.3.0/24"),
            ("1.2.3.4", "1.2.3.4/32"),
            ("255.255.255.255/32", "255.255.255.255/32"),
            ("8.8.8.8/0", "0.0.0.0/0"),
        ] {
            assert_eq!(network(given).as_deref(), Ok(kept));
        }
        for bad in [
            "",
            "/",
            "1.2.3/24",
            "1.2.3.4/33",
            "1.2.3.4/-1",
            "1.2.3.4/+1",
            "1.2.3.4/",
            "::/0",
            "1.2.3.4/024",
            "01.2.3.4/8",
            "a/8",
        ] {
            assert_eq!(network(bad).map_err(|error| error.code), Err(Code::InvalidArgument), "{bad}");
        }
    }

    #[test]
    fn lists_are_limited_and_have_no_duplicates() {
        let of = |domains: usize, cidrs: usize| Egress {
            allow_domains: (0..domains).map(|n| format!("a{n}.example")).collect(),
            allow_cidrs: (0..cidrs).map(|n| format!("1.2.{}.{}/32", n / 256, n % 256)).collect(),
        };
        assert_eq!(checked(of(512, 256)), Ok(of(512, 256)));
        assert!(checked(of(513, 0)).is_err() && checked(of(0, 257)).is_err());
        let twice = Egress {
            allow_domains: vec!["A.b".into(), "a.B.".into()],
            allow_cidrs: vec!["1.1.1.1".into(), "1.1.1.1/32".into()],
        };
        let once = Egress { allow_domains: vec!["a.b".into()], allow_cidrs: vec!["1.1.1.1/32".into()] };
        assert_eq!(checked(twice), Ok(once));
    }
}
