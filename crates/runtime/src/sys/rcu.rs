//! Grace periods of the kernel, made short while somebody waits for them.
//!
//! Freezing a file system waits for three grace periods, one after the other, while all who write to it wait too: some
//! 50 ms in all, and 1 ms where they are expedited. Expediting is a setting of the whole host that costs its
//! processors an interruption each, so it is switched on for those moments only.

use std::fs;
use std::io;
use std::sync::Mutex;

const SETTING: &str = "/sys/kernel/rcu_expedited";

/// How many wait now, and whether this process switched the setting on for them.
static WAITING: Mutex<(usize, bool)> = Mutex::new((0, false));

/// Grace periods are short while one of these exists. Where the host does not allow it they are as long as ever.
pub struct Expedited(());

impl Expedited {
    pub fn begin() -> Self {
        let mut waiting = WAITING.lock().expect("counting does not panic");
        if waiting.0 == 0 {
            waiting.1 = can_be_expedited() && fs::write(SETTING, "1").is_ok();
        }
        waiting.0 += 1;
        Self(())
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        let mut waiting = WAITING.lock().expect("counting does not panic");
        waiting.0 -= 1;
        if waiting.0 == 0 && waiting.1 {
            if let Err(error) = end() {
                tracing::warn!(%error, "the host's grace periods stay expedited");
            }
            waiting.1 = false;
        }
    }
}

/// Whether they are short now, whoever switched that on.
pub fn are_expedited() -> bool {
    fs::read_to_string(SETTING).is_ok_and(|value| value.trim() != "0")
}

/// What the host's operator, or another server, has switched on already stays so.
pub fn can_be_expedited() -> bool {
    fs::read_to_string(SETTING).is_ok_and(|value| value.trim() == "0")
}

/// Undoes what a server left that was killed meanwhile.
pub fn end() -> io::Result<()> {
    fs::write(SETTING, "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_is_as_it_was_when_the_last_one_is_done() {
        let before = fs::read_to_string(SETTING).ok();
        let (one, other) = (Expedited::begin(), Expedited::begin());
        drop(one);
        drop(other);
        assert_eq!(fs::read_to_string(SETTING).ok(), before);
    }
}
