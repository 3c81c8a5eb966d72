//! How much processor time threads have had, compared between two looks at them.

use std::collections::BTreeMap;

/// By the number of a thread: microseconds on processors, and waiting for one.
pub type ProcessorTimes = BTreeMap<u32, (u64, u64)>;

/// What the threads that are there in the end had since the beginning, together; one that is new began with nothing.
pub fn between(before: &ProcessorTimes, after: &ProcessorTimes) -> (u64, u64) {
    let since = |(thread, (ran, waited)): (&u32, &(u64, u64))| {
        let (ran_before, waited_before) = before.get(thread).copied().unwrap_or_default();
        (ran.saturating_sub(ran_before), waited.saturating_sub(waited_before))
    };
    after.iter().map(since).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_end_meanwhile_take_nothing_from_the_others() {
        let before = ProcessorTimes::from([(1, (1_000_000, 50)), (2, (100, 10))]);
        let after = ProcessorTimes::from([(2, (350, 15)), (3, (40, 2))]);
        assert_eq!(between(&before, &after), (290, 7));
        assert_eq!(between(&ProcessorTimes::new(), &ProcessorTimes::new()), (0, 0));
    }
}
