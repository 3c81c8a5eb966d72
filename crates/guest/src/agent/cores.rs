//! Where cores of crashed programs go.

/// Whether the host would write a core outside of the sandbox.
///
/// A core is written by the kernel as a file of the crashing process's own, so it stays inside, with one exception: with
/// `fs.suid_dumpable = 2` the core of a program that changed its user, or cannot be read, goes to an absolute path of the
/// host's own root, as the host's root. A pattern that is a pipe is not a matter of limits: the kernel does not ask them.
pub fn leave_the_sandbox() -> bool {
    let setting = |name: &str| std::fs::read_to_string(format!("/proc/sys/{name}")).unwrap_or_default();
    // What cannot be read could be anything.
    match setting("fs/suid_dumpable").trim() {
        "0" | "1" => false,
        _ => !is_relative(&setting("kernel/core_pattern")),
    }
}

fn is_relative(pattern: &str) -> bool {
    !pattern.is_empty() && !pattern.starts_with(['/', '|'])
}

#[cfg(test)]
mod tests {
    use super::is_relative;

    #[test]
    fn only_relative_patterns_stay_inside_whatever_crashes() {
        assert!(is_relative("core\n"));
        for outside in ["", "/var/crash/core.%p\n", "|/usr/bin/handler %p\n"] {
            assert!(!is_relative(outside), "{outside:?}");
        }
    }
}
