//! Descriptions of terminals that people come from, and that the host's own list may lack.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where a terminal's description is looked for, in this order, in the image as on the host.
const DIRECTORIES: [&str; 3] = ["/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo"];

/// What all of them can do beyond `xterm-256color`: colours by their parts, italics, crossed out letters, curly lines under
/// them with colours of their own, the shape of the cursor, synchronised output, the clipboard.
const COMMON: &str = "nagaya-modern|what the terminals below have in common,\n\
    \tTc, Su, sitm=\\E[3m, ritm=\\E[23m, smxx=\\E[9m, rmxx=\\E[29m,\n\
    \tSmulx=\\E[4:%p1%dm, Ss=\\E[%p1%d q, Se=\\E[2 q, Ms=\\E]52;%p1%s;%p2%s\\007,\n\
    \tsmglp@, smglr@, smgrp@, mgc@, Sync=\\E[?2026%?%p1%{1}%-%tl%eh%;, kbs=^?,\n\
    \tuse=xterm-256color,\n";

/// Name, other names, and what is not as with all. Values of `TERM` that terminals set by themselves.
const TERMINALS: [(&str, &str); 12] = [
    ("alacritty", ""),
    ("contour", ""),
    ("foot", ""),
    ("iterm2", ""),
    ("konsole-256color", ""),
    ("mintty", ""),
    ("rio", ""),
    ("st-256color", ""),
    ("vte-256color", ""),
    ("wezterm", ""),
    ("xterm-ghostty|ghostty", ""),
    // It does not fill erased cells with the background.
    ("xterm-kitty", "bce@, "),
];

/// Adds those that the host does not know. Without the compiler of descriptions, or for one that does not know the terminal
/// they build upon, there are none: nothing depends on them.
pub(super) fn make(etc: &Path) {
    let known = |name: &str| {
        let initial = &name[..1];
        DIRECTORIES.iter().any(|directory| Path::new(directory).join(initial).join(name).exists())
    };
    let unknown = TERMINALS.iter().filter(|(names, _)| !names.split('|').any(known));
    let entries: String =
        unknown.map(|(names, rest)| format!("{names}|terminal of this name,\n\t{rest}use=nagaya-modern,\n")).collect();
    if entries.is_empty() {
        return;
    }
    let source = format!("{COMMON}{entries}");
    let compile = || -> std::io::Result<bool> {
        let mut compiler = Command::new("tic")
            .args(["-x", "-o"])
            .arg(etc.join("terminfo"))
            .arg("-")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        if let Some(mut stdin) = compiler.stdin.take() {
            stdin.write_all(source.as_bytes())?;
        }
        Ok(compiler.wait()?.success())
    };
    match compile() {
        Ok(true) => {}
        Ok(false) => tracing::warn!("`tic` did not take the descriptions of today's terminals; sandboxes lack them"),
        Err(error) => tracing::warn!(%error, "without `tic` sandboxes have no descriptions of today's terminals"),
    }
}
