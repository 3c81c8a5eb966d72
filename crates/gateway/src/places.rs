//! Places for connections: how many there are, and who gives way when there is none left.
//!
//! ```text
//!  accepted ──▶ a place among strangers ── has shown a key ──▶ a place among those who may be here
//!                 │  full: the oldest of whoever has most         │  full: the longest idle one gives way,
//!                 ▼  gives way                                    ▼  or else nobody comes in
//! ```
//!
//! So strangers can only push out strangers, first of all their own, and who is at work is never pushed out.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::Instant;

use tokio::sync::Notify;

/// Set in [`State::active`] when the connection has to go.
const GIVEN_UP: u32 = 1 << 31;

/// Places of one kind.
pub struct Places {
    max: usize,
    taken: Mutex<HashMap<u64, Arc<State>>>,
}

struct State {
    peer: IpAddr,
    /// Exchanges under way, and whether the connection has to go.
    active: AtomicU32,
    /// When the last one ended, or the connection began: milliseconds.
    idle_since: AtomicU64,
    gone: Notify,
}

impl State {
    fn is_idle(&self) -> bool {
        self.active.load(Ordering::Acquire) == 0
    }
}

/// A connection's place, until it is dropped.
pub struct Seat {
    id: u64,
    state: Arc<State>,
    at: Mutex<Arc<Places>>,
    moved: AtomicBool,
}

/// An exchange that is under way on a connection.
pub struct Active(Arc<Seat>);

impl Places {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, taken: Mutex::default() })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<u64, Arc<State>>> {
        self.taken.lock().expect("places are counted without panics")
    }

    /// A place for a connection that has shown nothing yet. Where there is none, the oldest connection of whoever has
    /// most of them gives way.
    pub fn enter(self: &Arc<Self>, peer: IpAddr) -> Seat {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let state = Arc::new(State {
            peer: network(peer),
            active: AtomicU32::new(0),
            idle_since: AtomicU64::new(now()),
            gone: Notify::new(),
        });
        let mut taken = self.taken();
        while taken.len() >= self.max {
            // Whoever comes first to a full house of no places gets in all the same.
            let Some(id) = first_to_go(&taken, |_| true, |id, _| id) else { break };
            taken.remove(&id).inspect(|state| {
                state.active.fetch_or(GIVEN_UP, Ordering::AcqRel);
                state.gone.notify_one();
            });
        }
        taken.insert(id, Arc::clone(&state));
        drop(taken);
        Seat { id, state, at: Mutex::new(Arc::clone(self)), moved: AtomicBool::new(false) }
    }

    /// Lets one in that may be here; false when there is no place and nobody is idle.
    fn admit(&self, id: u64, state: &Arc<State>) -> bool {
        let mut taken = self.taken();
        while taken.len() >= self.max {
            let idle_since = |_, state: &State| state.idle_since.load(Ordering::Relaxed);
            let Some(id) = first_to_go(&taken, State::is_idle, idle_since) else { return false };
            let idle = taken.get(&id).is_some_and(|state| {
                let gives_way = state.active.compare_exchange(0, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire).is_ok();
                if gives_way {
                    state.gone.notify_one();
                }
                gives_way
            });
            if idle {
                taken.remove(&id);
            }
        }
        taken.insert(id, Arc::clone(state));
        true
    }
}

/// Milliseconds.
fn now() -> u64 {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(BEGIN.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Of those that may, who gives way: of the peer with most connections the one that has been here for longest.
fn first_to_go(
    taken: &HashMap<u64, Arc<State>>,
    may: impl Fn(&State) -> bool,
    since: impl Fn(u64, &State) -> u64,
) -> Option<u64> {
    let mut of_peer: HashMap<IpAddr, usize> = HashMap::new();
    for state in taken.values() {
        *of_peer.entry(state.peer).or_default() += 1;
    }
    let candidates = taken.iter().filter(|(_, state)| may(state));
    let first = candidates.max_by_key(|(id, state)| {
        let age = std::cmp::Reverse((since(**id, state), **id));
        (of_peer.get(&state.peer).copied().unwrap_or_default(), age)
    });
    first.map(|(id, _)| *id)
}

/// What one peer has for its own: an IPv6 network counts as one address.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

impl Seat {
    fn at(&self) -> MutexGuard<'_, Arc<Places>> {
        self.at.lock().expect("places are counted without panics")
    }

    /// Takes a place among those who may be here, instead of the first one; only the first call does anything. False
    /// when there is none, or the connection has to go anyway.
    pub fn move_to(&self, places: &Arc<Places>) -> bool {
        if self.has_moved() {
            return true;
        }
        let mut at = self.at();
        if self.has_moved() {
            return true;
        }
        if !places.admit(self.id, &self.state) {
            return false;
        }
        if at.taken().remove(&self.id).is_none() {
            places.taken().remove(&self.id);
            return false;
        }
        *at = Arc::clone(places);
        self.moved.store(true, Ordering::Release);
        true
    }

    pub fn has_moved(&self) -> bool {
        self.moved.load(Ordering::Acquire)
    }

    /// Marks an exchange as under way. `None` when the connection has to go: nothing may begin on it.
    pub fn begin(self: &Arc<Self>) -> Option<Active> {
        let before = self.state.active.fetch_add(1, Ordering::AcqRel);
        let active = Active(Arc::clone(self));
        (before & GIVEN_UP == 0).then_some(active)
    }

    pub fn is_idle(&self) -> bool {
        self.state.is_idle()
    }

    /// What follows on the connection is never idle.
    pub fn stay_active(&self) {
        self.state.active.fetch_add(1, Ordering::AcqRel);
    }

    /// Completes when the connection has to go.
    pub async fn given_up(&self) {
        self.state.gone.notified().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.at().taken().remove(&self.id);
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let Self(seat) = self;
        if seat.state.active.load(Ordering::Acquire) == 1 {
            seat.state.idle_since.store(now(), Ordering::Relaxed);
        }
        seat.state.active.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn peer(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    fn is_given_up(seat: &Seat) -> bool {
        seat.state.active.load(Ordering::Relaxed) & GIVEN_UP != 0
    }

    fn given_up(seats: &[Arc<Seat>]) -> Vec<usize> {
        (0..seats.len()).filter(|at| is_given_up(&seats[*at])).collect()
    }

    #[tokio::test]
    async fn a_crowd_of_strangers_pushes_out_its_own_first_and_its_oldest_first() {
        let strangers = Places::new(4);
        let quiet = Arc::new(strangers.enter(peer(1)));
        let crowd: Vec<Arc<Seat>> = (0..10).map(|_| Arc::new(strangers.enter(peer(2)))).collect();
        assert!(!is_given_up(&quiet));
        assert_eq!(given_up(&crowd), [0, 1, 2, 3, 4, 5, 6]);
        crowd[0].given_up().await;
        // Work does not protect a stranger: anybody can ask for something and not read the answer.
        let busy = crowd[7].begin();
        assert!(busy.is_some());
        let _another = strangers.enter(peer(3));
        assert_eq!(given_up(&crowd), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(crowd[7].begin().is_none(), "nothing begins on it any more");
    }

    #[test]
    fn who_has_shown_a_key_is_out_of_reach_of_strangers() {
        let (strangers, known) = (Places::new(2), Places::new(2));
        let seat = Arc::new(strangers.enter(peer(1)));
        assert!(seat.move_to(&known) && seat.has_moved());
        let crowd: Vec<Arc<Seat>> = (0..10).map(|_| Arc::new(strangers.enter(peer(1)))).collect();
        assert!(!is_given_up(&seat));
        assert_eq!(given_up(&crowd).len(), 8);
        assert!(!crowd[0].move_to(&known), "it has to go");
        assert_eq!((strangers.taken().len(), known.taken().len()), (2, 1));
        drop((crowd, seat));
        assert_eq!((strangers.taken().len(), known.taken().len()), (0, 0));
    }

    #[test]
    fn of_those_who_may_be_here_the_longest_idle_gives_way_and_who_is_at_work_never() {
        let (strangers, known) = (Places::new(9), Places::new(2));
        let [first, second, third, fourth] = [1, 2, 3, 4].map(|n| Arc::new(strangers.enter(peer(n))));
        let at_work = first.begin().unwrap();
        assert!(first.move_to(&known) && second.move_to(&known));
        assert!(third.move_to(&known));
        assert!(is_given_up(&second) && !is_given_up(&first));
        third.stay_active();
        assert!(!fourth.move_to(&known), "all are at work");
        assert!(!is_given_up(&fourth), "it stays a stranger");
        drop(at_work);
        assert!(fourth.move_to(&known));
        assert!(is_given_up(&first) && !is_given_up(&third));
    }

    #[test]
    fn a_network_of_the_newer_addresses_counts_as_one_peer() {
        let address = |text: &str| network(text.parse().unwrap());
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:192.0.2.1"), address("192.0.2.1"));
    }
}
