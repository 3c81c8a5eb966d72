//! Numbers of sandboxes, from which their host ids, their address and the name of their control group follow. One that is
//! alive has one; all drivers of a host draw from the same.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};

use nagaya_guest::spawn::IDS_PER_SANDBOX;

/// The first host id of number 0. systemd leaves the range from 0x7000_0000 on to nobody; see its
/// page on users, groups and ids.
const FIRST_ID: u32 = 0x7000_0000;
/// All ids stay below 0x8000_0000: programs that keep them in signed numbers are many.
const LIMIT: u32 = 4_096;

#[derive(Debug, thiserror::Error)]
#[error("all {0} slots are in use")]
pub(crate) struct UsedUp(pub u32);

/// The first host uid and gid of a sandbox.
pub(crate) const fn first_id(number: u32) -> u32 {
    FIRST_ID + number * IDS_PER_SANDBOX
}

/// Which numbers are taken.
pub(crate) struct Numbers {
    state: Mutex<State>,
    max: u32,
}

struct State {
    used: BTreeSet<u32>,
    /// Numbers are given out in a circle, so that a freed one rests as long as possible.
    next: u32,
}

impl Numbers {
    pub fn new(max: u32) -> Self {
        Self { state: Mutex::new(State { used: BTreeSet::new(), next: 0 }), max: max.min(LIMIT) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("numbers are changed without panics")
    }

    /// Takes the number of a sandbox that exists already.
    pub fn claim(&self, number: u32) {
        self.state().used.insert(number);
    }

    pub fn release(&self, number: u32) {
        self.state().used.remove(&number);
    }

    pub fn take(&self) -> Result<u32, UsedUp> {
        let (mut state, max) = (self.state(), self.max);
        let start = state.next;
        let free = (0..max).map(|step| (start + step) % max).find(|number| !state.used.contains(number));
        let number = free.ok_or(UsedUp(max))?;
        state.used.insert(number);
        state.next = (number + 1) % max;
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_rests_before_it_comes_again_and_there_are_only_so_many() {
        let numbers = Numbers::new(3);
        numbers.claim(1);
        assert_eq!((numbers.take().unwrap(), numbers.take().unwrap()), (0, 2));
        assert!(matches!(numbers.take(), Err(UsedUp(3))));
        numbers.release(2);
        numbers.release(0);
        assert_eq!((numbers.take().unwrap(), numbers.take().unwrap()), (0, 2));
        assert_eq!(first_id(1) - first_id(0), IDS_PER_SANDBOX);
    }
}
