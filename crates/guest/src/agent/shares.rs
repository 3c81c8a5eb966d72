//! What a sandbox may have of things that hold kernel memory which no control group counts.
//!
//! Every new one is asked for. All that were granted since a count are taken to be there still, so that the kernel is
//! asked how many there are only when that would be too many.

use std::fs;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::Instant;

use super::{Agent, memory, processes};

/// Sockets for netlink. Each holds two buffers of 416 KiB at most.
const NETLINK_MAX: u32 = 64;
/// Sockets for datagrams (UDP, `ping`), of which each holds one such buffer of what nobody counts: errors, and of
/// `ping` everything. So many for each MiB of the sandbox's memory, but at least this many.
const DATAGRAMS_FOR_EACH_MIB: u64 = 2;
const DATAGRAMS_MIN: u32 = 1_024;
/// Filters of system calls that programs install themselves. The host has one space for them
/// (`net.core.bpf_jit_limit`), of which one takes some 100 KB at most.
const FILTERS_MAX: u32 = 256;

/// After counting nothing of that kind is counted for this many times as long: nobody gets all this process's time by
/// having it count.
const REST_AFTER_COUNTING: u32 = 9;
/// How long a call that was let go on usually takes at most to have made what it asked for.
const UNDER_WAY: Duration = Duration::from_millis(20);

pub struct Shares {
    netlink: Share,
    datagrams: Share,
    filters: Share,
    /// Filters that everything in the sandbox is under.
    filters_of_all: u32,
}

impl Shares {
    pub fn new() -> Self {
        Self {
            netlink: Share::new(NETLINK_MAX),
            datagrams: Share::new(DATAGRAMS_MIN),
            filters: Share::new(FILTERS_MAX),
            filters_of_all: processes::number_in_status("self", "Seccomp_filters:").unwrap_or(1),
        }
    }

    /// For a socket that is made before the next one is asked for.
    pub fn take_netlink(&mut self) -> Result<(), Errno> {
        self.netlink.take(false, || sockets().netlink).then_some(()).ok_or(Errno::NOBUFS)
    }

    pub fn take_datagrams(&mut self, agent: &Agent) -> Result<(), Errno> {
        let share = &mut self.datagrams;
        if share.is_used_up() {
            let wanted = (memory::limit(&agent.settings) >> 20).saturating_mul(DATAGRAMS_FOR_EACH_MIB);
            share.most = u32::try_from(wanted).unwrap_or(u32::MAX).max(DATAGRAMS_MIN);
        }
        share.take(true, || sockets().datagrams).then_some(()).ok_or(Errno::NOBUFS)
    }

    pub fn take_filter(&mut self) -> Result<(), Errno> {
        let of_all = self.filters_of_all;
        let count = || processes::filters(of_all, FILTERS_MAX);
        // What the kernel answers when its space is used up.
        self.filters.take(true, count).then_some(()).ok_or(Errno::NOMEM)
    }
}

/// What this thread has had of a processor: it may have to wait for one for long.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One kind.
struct Share {
    most: u32,
    /// No more than so many are there.
    counted: u32,
    no_count_before: Instant,
    /// Granted in the time of this length that runs, and in the one before it.
    granted: [u32; 2],
    since: Instant,
}

impl Share {
    fn new(most: u32) -> Self {
        let now = Instant::now();
        Self { most, counted: 0, no_count_before: now, granted: [0; 2], since: now }
    }

    fn is_used_up(&self) -> bool {
        self.counted >= self.most
    }

    /// Takes one. What is `let_go_on` may be under way while a later one is asked for, and not be counted yet.
    fn take(&mut self, let_go_on: bool, count: impl FnOnce() -> u32) -> bool {
        let now = Instant::now();
        self.forget(now);
        if self.is_used_up() && now >= self.no_count_before {
            let begin = processor_time();
            let under_way = if let_go_on { self.granted.iter().sum() } else { 0 };
            // All that were granted since the last count are more than there can be.
            self.counted = count().saturating_add(under_way).min(self.counted);
            self.no_count_before = now + (processor_time() - begin) * REST_AFTER_COUNTING;
        }
        if self.is_used_up() {
            return false;
        }
        self.counted += 1;
        self.granted[0] += 1;
        true
    }

    fn forget(&mut self, now: Instant) {
        let passed = now - self.since;
        if passed >= UNDER_WAY {
            self.granted = [0, if passed < 2 * UNDER_WAY { self.granted[0] } else { 0 }];
            self.since = now;
        }
    }
}

#[derive(Debug, PartialEq)]
struct Sockets {
    netlink: u32,
    datagrams: u32,
}

/// Those of the sandbox's network namespace, bound or not. What cannot be read is full.
fn sockets() -> Sockets {
    let read = |name| fs::read_to_string(name).ok();
    let texts = read("/proc/net/sockstat").zip(read("/proc/net/protocols"));
    let counted = texts.and_then(|(all, protocols)| Sockets::parse(&all, &protocols));
    counted.unwrap_or(Sockets { netlink: u32::MAX, datagrams: u32::MAX })
}

impl Sockets {
    /// The kernel counts sockets for datagrams by their protocol when they are bound, and in the sum of all when they
    /// are made. So they are what is left of the sum; sockets of TCP that are not connected are in that, too.
    fn parse(all: &str, protocols: &str) -> Option<Self> {
        let all: u32 = all.strip_prefix("sockets: used ")?.lines().next()?.trim().parse().ok()?;
        let (mut netlink, mut others) = (0, 0);
        for line in protocols.lines().skip(1) {
            let mut words = line.split_whitespace();
            let (name, number) = (words.next()?, words.nth(1)?);
            // Below 0 for a moment, where one processor counts what another one makes.
            let number = number.parse::<i64>().ok()?.max(0) as u32;
            match name {
                "NETLINK" => netlink = number,
                _ if ["UDP", "PING"].iter().any(|kind| name.starts_with(kind)) => {}
                _ => others += number,
            }
        }
        Some(Self { netlink, datagrams: all.saturating_sub(netlink + others) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_for_datagrams_are_what_is_left() {
        let protocols = "protocol  size sockets  memory press maxhdr  slab module     cl co\n\
                         PINGv6    1344      1      -1   NI       0   yes  kernel      y  y\n\
                         UDPv6     1472      2       0   NI       0   yes  kernel      y  y\n\
                         TCPv6     2432      3       0   no     192   yes  kernel      y  y\n\
                         UNIX-STREAM 1152      4      -1   NI       0   yes  kernel      y  n\n\
                         NETLINK   1096      5      -1   NI       0   no   kernel      n  n\n";
        let all = "sockets: used 20\nTCP: inuse 3 orphan 0 tw 0 alloc 1 mem 0\n";
        assert_eq!(Sockets::parse(all, protocols), Some(Sockets { netlink: 5, datagrams: 8 }));
        assert_eq!(Sockets::parse("", protocols), None);
        assert_eq!(Sockets::parse(all, "\nTCP 1"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_granted_is_there_until_it_is_counted() {
        let mut share = Share::new(4);
        for _ in 0..4 {
            assert!(share.take(false, || panic!("nothing to count yet")));
        }
        assert!(!share.take(false, || 4), "all are there");
        assert!(!share.take(false, || panic!("not again at once")));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(share.take(false, || 1), "some are gone");
        assert!(share.take(false, || panic!("there is room for two more")));
        assert!(share.take(false, || panic!("there is room for one more")));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!share.take(false, || 4));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_under_way_counts_until_it_must_be_there() {
        let mut share = Share::new(4);
        for _ in 0..4 {
            assert!(share.take(true, || 0));
        }
        assert!(!share.take(true, || 0), "four are under way");
        tokio::time::advance(UNDER_WAY).await;
        assert!(!share.take(true, || 0), "they still may be");
        tokio::time::advance(UNDER_WAY).await;
        assert!(share.take(true, || 3), "they came to an end");
        assert!(!share.take(true, || 3), "one is under way");
    }
}
