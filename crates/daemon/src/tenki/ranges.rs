//! What the contract lets requests say of names, tags, pages, sizes and destinations. The engine has bounds of its own, which
//! keep the server safe and are wider.

use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::limits;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::Egress;

use crate::rpc::parse;

/// Names of the service itself, beyond those that the engine reserves.
const RESERVED_SLUGS: [&str; 2] = ["sandbox-gateway", "tenki"];

fn refused<T>(detail: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(Code::InvalidArgument, detail))
}

/// The name of a session, snapshot or volume. May be empty.
pub(super) fn name(name: String) -> Result<String, Error> {
    if name.chars().count() > limits::NAME_CHARS_MAX {
        return refused(format!("name has more than {} characters", limits::NAME_CHARS_MAX));
    }
    Ok(name)
}

pub(super) fn tags(tags: Vec<String>) -> Result<Vec<String>, Error> {
    if tags.len() > limits::TAGS_MAX {
        return refused(format!("more than {} tags", limits::TAGS_MAX));
    }
    if !tags.iter().all(|tag| limits::is_tag(tag)) {
        return refused(format!(
            "tags must match [a-z0-9][a-z0-9_:.-]* and have at most {} characters",
            limits::TAG_CHARS_MAX
        ));
    }
    Ok(tags)
}

/// The tags of an update: without any they stay, unless they are to be cleared.
pub(super) fn updated_tags(given: Vec<String>, clear: bool) -> Result<Option<Vec<String>>, Error> {
    match (given.is_empty(), clear) {
        (false, true) => refused("tags and clear_tags exclude each other"),
        (true, false) => Ok(None),
        _ => tags(given).map(Some),
    }
}

/// The number of rows to return; 0 asks for the contract's default.
pub(super) fn page_size(asked: i32) -> Result<u32, Error> {
    match parse::page_size(asked)? {
        0 => Ok(limits::PAGE_SIZE_DEFAULT),
        size if size <= limits::PAGE_SIZE_MAX => Ok(size),
        _ => refused(format!("page_size is at most {}", limits::PAGE_SIZE_MAX)),
    }
}

/// The size of a volume, which the wire has as signed.
pub(super) fn volume_bytes(asked: i64) -> Result<u64, Error> {
    let size = u64::try_from(asked).ok().filter(|size| limits::VOLUME_BYTES.contains(size));
    size.map_or_else(|| refused("size_bytes must be 1 MiB to 100 GiB"), Ok)
}

/// The name of a preview.
pub(super) fn slug(slug: String) -> Result<String, Error> {
    if !limits::SLUG_CHARS.contains(&slug.len()) {
        return refused("slug must have 3 to 63 characters");
    }
    if RESERVED_SLUGS.contains(&slug.as_str()) {
        return refused("slug is reserved");
    }
    Ok(slug)
}

/// Destinations of a session.
pub(super) fn egress(policy: wire::SessionEgressPolicy) -> Result<Egress, Error> {
    let (domains_max, cidrs_max) = (limits::EGRESS_DOMAINS_MAX, limits::EGRESS_CIDRS_MAX);
    if policy.allow_domains.len() > domains_max {
        return refused(format!("egress.allow_domains has more than {domains_max} names"));
    }
    if policy.allow_cidrs.len() > cidrs_max {
        return refused(format!("egress.allow_cidrs has more than {cidrs_max} networks"));
    }
    Ok(parse::egress(policy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_refused<T: std::fmt::Debug>(answer: Result<T, Error>) -> bool {
        answer.is_err_and(|error| error.code == Code::InvalidArgument)
    }

    #[test]
    fn names_count_characters_not_bytes() {
        assert!(name(String::new()).is_ok());
        assert!(name("長".repeat(64)).is_ok());
        assert!(is_refused(name("a".repeat(65))));
    }

    #[test]
    fn tags_are_few_and_of_one_form() {
        let of = |count: u32| (0..count).map(|n| n.to_string()).collect();
        assert!(tags(["b", "a:1", "b", "0.x_y-z"].map(String::from).to_vec()).is_ok());
        assert!(tags(of(20)).is_ok() && is_refused(tags(of(21))));
        for bad in ["", "A", "_a", "a b", "ä", &"a".repeat(33)] {
            assert!(is_refused(tags(vec![bad.into()])), "{bad:?}");
        }
    }

    #[test]
    fn an_update_keeps_changes_or_clears_tags() {
        let some = || vec!["a".to_owned()];
        assert_eq!(updated_tags(Vec::new(), false), Ok(None));
        assert_eq!(updated_tags(Vec::new(), true), Ok(Some(Vec::new())));
        assert_eq!(updated_tags(some(), false), Ok(Some(some())));
        assert!(is_refused(updated_tags(some(), true)));
        assert!(is_refused(updated_tags(vec!["A".to_owned()], false)));
    }

    #[test]
    fn pages_have_the_contracts_sizes() {
        assert_eq!((page_size(0), page_size(1), page_size(100)), (Ok(20), Ok(1), Ok(100)));
        assert!(is_refused(page_size(101)) && is_refused(page_size(-1)));
    }

    #[test]
    fn volumes_have_the_contracts_sizes() {
        assert_eq!((volume_bytes(1 << 20), volume_bytes(100 << 30)), (Ok(1 << 20), Ok(100 << 30)));
        for bad in [-1, 0, (1 << 20) - 1, (100 << 30) + 1] {
            assert!(is_refused(volume_bytes(bad)), "{bad}");
        }
    }

    #[test]
    fn slugs_are_long_enough_and_not_the_services_own() {
        assert!(slug("abc".into()).is_ok() && slug("a".repeat(63)).is_ok());
        for bad in ["", "ab", &"a".repeat(64), "tenki", "sandbox-gateway"] {
            assert!(is_refused(slug(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn lists_of_destinations_are_no_longer_than_the_contracts() {
        let of = |domains: usize, cidrs: usize| wire::SessionEgressPolicy {
            allow_domains: vec!["a.example".to_owned(); domains],
            allow_cidrs: vec!["1.2.3.4".to_owned(); cidrs],
        };
        assert!(egress(of(256, 64)).is_ok());
        assert!(is_refused(egress(of(257, 0))) && is_refused(egress(of(0, 65))));
    }

    proptest! {
        #[test]
        fn accepted_tags_match_the_contracts_pattern(text in "\\PC{0,40}") {
            let expected = text.len() <= 32
                && text.chars().enumerate().all(|(index, c)| match c {
                    'a'..='z' | '0'..='9' => true,
                    '_' | ':' | '.' | '-' => index > 0,
                    _ => false,
                })
                && !text.is_empty();
            prop_assert_eq!(tags(vec![text]).is_ok(), expected);
        }
    }
}
