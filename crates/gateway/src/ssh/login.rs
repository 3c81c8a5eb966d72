//! User names, and the keys of sessions.

use nagaya_api::ids::SessionId;
use nagaya_engine::ports::User;
use russh::keys::PublicKey;
use russh::keys::ssh_key::authorized_keys::Entry;

const ROOT: &str = "root";

/// The name of the image's user, `root`, and for those who must name the session: `SESSION`, `USER@SESSION`, `root@SESSION`.
pub fn parse(login: &str, user: &str) -> Option<(User, Option<SessionId>)> {
    let named = |name: &str| match name {
        ROOT => Some(User::Root),
        name => (name == user).then_some(User::Image),
    };
    if let Some(user) = named(login) {
        return Some((user, None));
    }
    match login.split_once('@') {
        Some((name, session)) => Some((named(name)?, Some(session.parse().ok()?))),
        None => Some((User::Image, Some(login.parse().ok()?))),
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

    fn parse(login: &str) -> Option<(User, Option<SessionId>)> {
        super::parse(login, "user")
    }

    #[test]
    fn user_names_tell_account_and_session() {
        let id = SessionId::new(5, [5; 10]);
        assert_eq!(parse("user"), Some((User::Image, None)));
        assert_eq!(parse("root"), Some((User::Root, None)));
        assert_eq!(parse(&id.to_string()), Some((User::Image, Some(id))));
        assert_eq!(parse(&format!("user@{id}")), Some((User::Image, Some(id))));
        assert_eq!(parse(&format!("root@{id}")), Some((User::Root, Some(id))));
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
