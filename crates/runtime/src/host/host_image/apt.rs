//! Where the image's package manager finds packages: the host's own sources, as far as they are no secret.
//!
//! A source's address may hold a password or a customer's token. Whatever could be one is left out with its source,
//! and so is every comment. Passwords in files of their own (`auth.conf`) are never looked at.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{ImageError, at, copy};

/// Files and directories of `/etc/apt` that hold keys of archives and preferences among versions.
const AS_THEY_ARE: [&str; 6] =
    ["apt.conf.d/01autoremove", "keyrings", "preferences", "preferences.d", "trusted.gpg", "trusted.gpg.d"];
/// Settings of the host that decide whether its sources can be used. Of proxies, those without a password.
const SETTINGS: [&str; 2] = ["Acquire::Check-Valid-Until ", "Acquire::Check-Date "];
const PROXIES: [&str; 2] = ["Acquire::http::Proxy", "Acquire::https::Proxy"];
const LEFT_OUT: &str = "# A source of the host is not repeated here: its address may hold a secret.\n";
/// A part of a path this long, with letters and digits in it, may be a token. Characters.
const TOKEN_CHARS_MIN: usize = 16;

pub(super) fn make(etc: &Path) -> Result<(), ImageError> {
    let (host, inside) = (Path::new("/etc/apt"), etc.join("apt"));
    for directory in ["", "apt.conf.d", "keyrings", "mirrors", "preferences.d", "sources.list.d", "trusted.gpg.d"] {
        let path = inside.join(directory);
        at(&path, fs::create_dir_all(&path))?;
    }
    for name in AS_THEY_ARE {
        copy(&host.join(name), &inside.join(name))?;
    }
    let write = |name: &str, content: Option<String>| {
        let path = inside.join(name);
        content.map_or(Ok(()), |content| at(&path, fs::write(&path, content)))
    };
    write("sources.list", readable(&host.join("sources.list")).map(|text| lines(&text)))?;
    for (name, text) in files(host, "sources.list.d") {
        match name.rsplit_once('.') {
            Some((_, "list")) => write(&name, Some(lines(&text)))?,
            Some((_, "sources")) => write(&name, Some(stanzas(&text)))?,
            _ => {}
        }
    }
    for (name, text) in files(host, "mirrors") {
        write(&name, Some(text.lines().filter(|line| is_public(line)).map(|line| format!("{line}\n")).collect()))?;
    }
    let settings = Command::new("apt-config").arg("dump").output();
    let settings = settings.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    write("apt.conf.d/90host", Some(usable(&settings)))
}

/// A file's text, unless it is a secret or no text.
fn readable(path: &Path) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = fs::symlink_metadata(path).ok()?;
    let is_public = metadata.is_file() && metadata.permissions().mode() & 0o004 != 0;
    if is_public { fs::read_to_string(path).ok() } else { None }
}

/// The files of a directory below `/etc/apt`, by their names from there.
fn files(host: &Path, directory: &str) -> Vec<(String, String)> {
    let entries = fs::read_dir(host.join(directory)).into_iter().flatten().flatten();
    let file = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        Some((format!("{directory}/{name}"), readable(&entry.path())?))
    };
    entries.filter_map(file).collect()
}

/// Sources with a line each: kind, options in brackets, address, and the rest.
fn lines(text: &str) -> String {
    let mut kept = String::new();
    for line in text.lines() {
        let source = line.split('#').next().unwrap_or_default().trim();
        let address = source.split_whitespace().skip(1).find(|word| word.contains(':') && !word.contains('='));
        match address {
            None => {}
            // A fragment of an address ends it here, and may go on with what is not to be seen.
            Some(address) if is_public(address) && source == line.trim() => kept.push_str(&format!("{source}\n")),
            Some(_) => kept.push_str(LEFT_OUT),
        }
    }
    kept
}

/// Sources with a paragraph each.
fn stanzas(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).map(str::trim_end).collect();
    let mut kept = String::new();
    for stanza in lines.split(|line| line.is_empty()).filter(|stanza| !stanza.is_empty()) {
        let addresses = || stanza.iter().flat_map(|line| line.split_whitespace()).filter(|word| word.contains(":/"));
        if addresses().next().is_some() && addresses().all(is_public) {
            kept.push_str(&stanza.join("\n"));
            kept.push_str("\n\n");
        } else {
            kept.push_str(LEFT_OUT);
        }
    }
    kept
}

/// Whether an address can be shown to anybody, and leads somewhere from a sandbox.
fn is_public(address: &str) -> bool {
    // A list of mirrors, which is looked through by itself.
    if let Some(list) = address.strip_prefix("mirror+file:") {
        return list.trim_start_matches('/').strip_prefix("etc/apt/mirrors/").is_some_and(|name| !name.contains(".."));
    }
    let Some(rest) = address.strip_prefix("http://").or_else(|| address.strip_prefix("https://")) else { return false };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/[]+".contains(&byte);
    rest.bytes().all(plain) && !rest.split('/').any(is_like_a_token)
}

fn is_like_a_token(part: &str) -> bool {
    let has = |kind: fn(&u8) -> bool| part.as_bytes().iter().any(&kind);
    let is_random = has(u8::is_ascii_digit) && has(u8::is_ascii_alphabetic) && !part.contains(['.', ':']);
    part.len() >= TOKEN_CHARS_MIN && is_random
}

/// Of `apt-config dump`, what the host's sources need.
fn usable(settings: &str) -> String {
    let proxy = |line: &str| {
        let value = line.split('"').nth(1).unwrap_or_default();
        PROXIES.iter().any(|name| line.starts_with(name)) && is_public(value) && !is_loopback(value)
    };
    let kept = settings.lines().filter(|line| SETTINGS.iter().any(|name| line.starts_with(name)) || proxy(line));
    kept.map(|line| format!("{line}\n")).collect()
}

/// What listens on the host itself is not reached from a sandbox.
fn is_loopback(address: &str) -> bool {
    let host = address.split("//").nth(1).unwrap_or_default();
    ["localhost", "127.", "[::1]", "0.0.0.0"].iter().any(|name| host.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0a1b2c3d4e5f6a7b8c9d";

    #[test]
    fn addresses_that_may_hold_a_secret_are_not_public() {
        for public in [
            "http://deb.debian.org/debian",
            "https://archive.ubuntu.com:8080/ubuntu/",
            "https://example.org/cuda/repos/ubuntu2204/x86_64/",
            "https://example.org/node_20.x",
            "http://[2001:db8::1]/debian",
            "mirror+file:/etc/apt/mirrors/debian.list",
            "mirror+file:///etc/apt/mirrors/debian.list",
        ] {
            assert!(is_public(public), "{public}");
        }
        for secret in [
            "https://user:password@example.org/debian",
            "https://token@example.org/debian",
            "https://example.org/debian?token=x",
            "https://example.org/%75ser",
            &format!("https://example.org/{TOKEN}/debian"),
            "file:/srv/packages",
            "copy:/srv/packages",
            "cdrom:[Debian]/",
            "ssh://example.org/debian",
            "mirror+file:/etc/apt/mirrors/../auth.conf",
            "mirror+file:/root/list",
            "",
        ] {
            assert!(!is_public(secret), "{secret}");
        }
    }

    #[test]
    fn no_secret_of_a_source_is_repeated_in_either_form() {
        let list = format!(
            "# my password is hunter2\ndeb http://deb.debian.org/debian bookworm main\n\
             deb [arch=amd64 signed-by=/etc/apt/keyrings/x.asc] https://example.org/x stable main\n\
             deb https://user:hunter2@example.org/y stable main # hunter2\n\
             deb http://example.org/z#hunter2 stable main\n\
             deb http://example.org/commented stable main # hunter2\n\
             deb https://example.org/{TOKEN}/y stable main\ndeb file:/srv/hunter2 ./\n"
        );
        let kept = lines(&list);
        assert_eq!(kept.matches("\ndeb ").count() + 1, 2, "{kept}");
        assert_eq!(kept.matches(LEFT_OUT).count(), 5);
        assert!(!kept.contains("hunter2") && !kept.contains(TOKEN), "{kept}");

        let deb822 = format!(
            "Types: deb\n# hunter2\nURIs: http://deb.debian.org/debian\n https://example.org/debian\nSuites: bookworm\n\n\n\
             Types: deb\nURIs: http://example.org/a\n https://u:hunter2@example.org/b\nSuites: x\n\n\
             Types: deb\nURIs: https://example.org/{TOKEN}\nSuites: x\n"
        );
        let kept = stanzas(&deb822);
        let whole = "Types: deb\nURIs: http://deb.debian.org/debian\n https://example.org/debian\nSuites: bookworm\n\n";
        assert_eq!(kept, format!("{whole}{LEFT_OUT}{LEFT_OUT}"));
    }

    #[test]
    fn of_the_hosts_settings_only_what_its_sources_need_is_taken() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::Check-Valid-Until \"false\";\n\
            Acquire::http::Proxy \"http://user:hunter2@proxy.example.org:3128\";\n\
            Acquire::https::Proxy \"http://proxy.example.org:3128\";\n\
            Acquire::http::Proxy::deb.example.org \"http://127.0.0.1:3142\";\n\
            DPkg::Post-Invoke:: \"/root/hook hunter2\";\n";
        let expected =
            "Acquire::Check-Valid-Until \"false\";\nAcquire::https::Proxy \"http://proxy.example.org:3128\";\n";
        assert_eq!(usable(dump), expected);
    }
}
