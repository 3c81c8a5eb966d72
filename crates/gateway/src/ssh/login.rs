//! User names, and the keys of sessions.

use nagaya_api::ids::SessionId;
use russh::keys::PublicKey;
use russh::keys::ssh_key::authorized_keys::Entry;

/// The users of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Account {
    Tenki,
    Root,
}

impl Account {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tenki => "tenki",
            Self::Root => "root",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Tenki, Self::Root].into_iter().find(|account| account.name() == name)
    }
}

/// `tenki`, `root`, and for those who must name the session: `SESSION`, `tenki@SESSION`, `root@SESSION`.
pub fn parse(user: &str) -> Option<(Account, Option<SessionId>)> {
    if let Some(account) = Account::parse(user) {
        return Some((account, None));
    }
    match user.split_once('@') {
        Some((account, session)) => Some((Account::parse(account)?, Some(session.parse().ok()?))),
        None => Some((Account::Tenki, Some(user.parse().ok()?))),
    }
}

/// Whether a key is among the lines of an `authorized_keys` file. A line with options does not count: what its
/// options would forbid is not looked at here.
pub fn is_authorized(lines: &[String], key: &PublicKey) -> bool {
    lines
        .iter()
        .filter_map(|line| line.trim().parse::<Entry>().ok())
        .any(|entry| entry.config_opts().is_empty() && entry.public_key().key_data() == key.key_data())
}

pub fn now_seconds() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_names_tell_account_and_session() {
        let id = SessionId::new(5, [5; 10]);
        assert_eq!(parse("tenki"), Some((Account::Tenki, None)));
        assert_eq!(parse("root"), Some((Account::Root, None)));
        assert_eq!(parse(&id.to_string()), Some((Account::Tenki, Some(id))));
        assert_eq!(parse(&format!("tenki@{id}")), Some((Account::Tenki, Some(id))));
        assert_eq!(parse(&format!("root@{id}")), Some((Account::Root, Some(id))));
        for bad in ["", "ubuntu", "root@", "@", "root@x", &format!("mail@{id}"), &format!("{id}@root"), "Root"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_key_counts_only_in_a_line_without_options() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";
        let public = PublicKey::from_openssh(key).unwrap();
        let lines = |lines: &[&str]| lines.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(is_authorized(&lines(&["# nothing", "garbage", &format!("{key} me@home")]), &public));
        assert!(!is_authorized(&lines(&[&format!("command=\"true\" {key}")]), &public));
        assert!(!is_authorized(&[], &public));
    }
}
