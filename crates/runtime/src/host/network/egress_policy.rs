//! Where each sandbox may go, here and in the kernel's sets.
//!
//! Three sets, keyed by the sandbox's address: who is restricted at all, the networks it may reach, and
//! the addresses that names it may reach have resolved to, each until its time is over. What is in the
//! sets decides about new flows; a flow that exists goes on until it is cut.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nagaya_engine::model::{CONNECTIONS_USED_UP, Connection, Egress, UnixMs};
use tokio::sync::mpsc;

use super::connections::Log;
use super::netfilter::{self, Batch, Element, Flow, Tuple};
use super::ranges::{self, Range};

pub(super) const RESTRICTED: &str = "restricted";
pub(super) const NETWORKS: &str = "networks";
pub(super) const NAMES: &str = "names";
/// Ports of the host's loopback device whose connections take no place in the table of connections.
pub(super) const UNTRACKED: &str = "untracked";

/// Addresses that the names of one sandbox may have resolved to and be reachable at a time.
const ADDRESSES_MAX: usize = 4_096;
/// How long an address stays reachable at least, for programs that resolve first and connect later.
const REACHABLE_MIN: Duration = Duration::from_secs(60);
/// The longest time for which programs are told to remember an address.
pub(super) const TTL_MAX: Duration = Duration::from_secs(3_600);
/// How often flows are looked for that are to be cut; questions for names begin new ones all the time.
const CUTS_MAX: usize = 4;
/// What a program may need from hearing an address to using it.
const GRACE: Duration = Duration::from_secs(30);
/// How often it is told at most that a sandbox has used up its connections.
const USED_UP_EVERY: Duration = Duration::from_secs(600);

/// Reasons in the log.
pub(super) const NOT_ALLOWED: &str = "not among the session's allowed destinations";
pub(super) const NAME_NOT_ALLOWED: &str = "the name is not among the session's allowed destinations";
pub(super) const LEADS_INSIDE: &str = "the name leads to a private address";
pub(super) const TOO_MANY: &str = "the session's names have more addresses than can be kept";

/// Why a name is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    NotAllowed,
    LeadsInside,
    TooMany,
    /// The kernel did not take the addresses.
    Failed,
}

pub(super) struct EgressPolicy {
    /// The table in which the sets are.
    table: String,
    denied: Vec<Range>,
    /// What the operator lets sandboxes reach although it is denied.
    opened: Vec<Range>,
    sandboxes: Mutex<HashMap<Ipv4Addr, Sandbox>>,
    /// Told of sandboxes that have used up their connections.
    used_up: mpsc::UnboundedSender<Ipv4Addr>,
}

#[derive(Default)]
struct Sandbox {
    policy: Option<Policy>,
    /// What the names of the policy resolved to, also after its time in the kernel's set is over: flows go on.
    addresses: HashMap<Ipv4Addr, Address>,
    log: Log,
    /// Cutting flows failed; some may go on that are not allowed.
    cut_owed: bool,
    used_up_told: Option<Instant>,
}

struct Address {
    /// Empty when an earlier server learnt it.
    names: Vec<Arc<str>>,
    /// When the kernel's set loses it.
    until: Instant,
}

/// An allow-list, ready to be asked.
#[derive(Debug, Clone)]
struct Policy {
    text: Egress,
    names: HashSet<String>,
    /// Endings with their dot in front, such as `.example.com`.
    endings: Vec<String>,
    networks: Vec<Range>,
}

impl Policy {
    fn new(egress: &Egress) -> Self {
        let (below, names): (Vec<&String>, Vec<&String>) =
            egress.allow_domains.iter().partition(|name| name.starts_with("*."));
        Self {
            text: egress.clone(),
            names: names.into_iter().cloned().collect(),
            endings: below.into_iter().map(|name| name[1..].to_owned()).collect(),
            networks: ranges::merged(egress.allow_cidrs.iter().filter_map(|cidr| ranges::parse(cidr)).collect()),
        }
    }

    fn allows_name(&self, name: &str) -> bool {
        // `*.example.com` is not `.example.com`, which nobody can ask for.
        self.names.contains(name)
            || self.endings.iter().any(|ending| name.len() > ending.len() && name.ends_with(ending))
    }

    fn allows_address(&self, address: Ipv4Addr) -> bool {
        self.networks.iter().any(|range| range.contains(address))
    }

    /// Whether everything that another one allows is allowed by this one too, by the text alone.
    fn covers(&self, other: &Self) -> bool {
        let all = |here: &[String], there: &[String]| there.iter().all(|item| here.contains(item));
        all(&self.text.allow_domains, &other.text.allow_domains) && all(&self.text.allow_cidrs, &other.text.allow_cidrs)
    }

    fn elements(&self, guest: Ipv4Addr) -> Vec<Element> {
        let of = |range: &Range| Element {
            last: Some(Element::of(&[guest, range.last]).first),
            ..Element::of(&[guest, range.first])
        };
        self.networks.iter().map(of).collect()
    }
}

impl EgressPolicy {
    pub fn new(
        table: String,
        denied: Vec<Range>,
        opened: Vec<Range>,
        used_up: mpsc::UnboundedSender<Ipv4Addr>,
    ) -> Self {
        Self { table, denied, opened, sandboxes: Mutex::default(), used_up }
    }

    fn sandboxes(&self) -> MutexGuard<'_, HashMap<Ipv4Addr, Sandbox>> {
        self.sandboxes.lock().expect("destinations are changed without panics")
    }

    /// Takes over a sandbox that an earlier server made, with the addresses that its names resolved to then; the caller
    /// sees to the kernel's sets.
    pub fn take_over(&self, guest: Ipv4Addr, egress: Option<&Egress>, addresses: Vec<(Ipv4Addr, Duration)>) {
        let now = Instant::now();
        let known = |(address, left)| (address, Address { names: Vec::new(), until: now + left });
        let sandbox = Sandbox {
            policy: egress.map(Policy::new),
            addresses: addresses.into_iter().map(known).collect(),
            ..Sandbox::default()
        };
        self.sandboxes().insert(guest, sandbox);
    }

    /// The text for `nft` of the sets as they are here: of who is restricted, and of networks.
    pub fn describe(&self) -> (Vec<String>, Vec<String>) {
        let sandboxes = self.sandboxes();
        let restricted = sandboxes.iter().filter_map(|(guest, of)| Some((guest, of.policy.as_ref()?)));
        let mut texts = (Vec::new(), Vec::new());
        for (guest, policy) in restricted {
            texts.0.push(guest.to_string());
            texts.1.extend(policy.networks.iter().map(|range| format!("{guest} . {}-{}", range.first, range.last)));
        }
        texts
    }

    /// Begins with a sandbox, before anything of its user's runs in it. Without an allow-list that changes nothing in the
    /// kernel.
    pub fn begin(&self, guest: Ipv4Addr, egress: Option<&Egress>) -> io::Result<()> {
        let policy = egress.map(Policy::new);
        if let Some(policy) = &policy {
            let mut batch = Batch::new(&self.table);
            batch.add(RESTRICTED, &[Element::of(&[guest])]);
            batch.add(NETWORKS, &policy.elements(guest));
            batch.commit()?;
            // Of the last sandbox with this address; they would go on without being judged.
            netfilter::flows(guest)?.iter().try_for_each(Flow::cut)?;
        }
        self.sandboxes().insert(guest, Sandbox { policy, ..Sandbox::default() });
        Ok(())
    }

    /// Changes the allow-list of a sandbox; flows to what is not allowed any more are cut on return. Blocks.
    pub fn change(&self, guest: Ipv4Addr, egress: Option<&Egress>) -> io::Result<()> {
        let mut sandboxes = self.sandboxes();
        let sandbox = sandboxes.entry(guest).or_default();
        if sandbox.policy.as_ref().map(|policy| &policy.text) == egress {
            return if sandbox.cut_owed { self.cut(guest, sandbox) } else { Ok(()) };
        }
        let policy = egress.map(Policy::new);
        let mut batch = Batch::new(&self.table);
        match (&sandbox.policy, &policy) {
            (None, Some(_)) => batch.add(RESTRICTED, &[Element::of(&[guest])]),
            (Some(_), None) => batch.remove(RESTRICTED, &[Element::of(&[guest])]),
            _ => {}
        }
        let networks =
            |policy: &Option<Policy>| policy.as_ref().map(|policy| policy.elements(guest)).unwrap_or_default();
        batch.remove(NETWORKS, &networks(&sandbox.policy));
        batch.add(NETWORKS, &networks(&policy));
        batch.commit()?;
        let wider = match (&sandbox.policy, &policy) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(before), Some(now)) => now.covers(before),
        };
        sandbox.policy = policy;
        if wider {
            sandbox.cut_owed &= sandbox.policy.is_some();
            return Ok(());
        }
        self.narrow(guest, sandbox);
        self.cut(guest, sandbox)
    }

    /// Cuts flows to what is not allowed.
    fn cut(&self, guest: Ipv4Addr, sandbox: &mut Sandbox) -> io::Result<()> {
        sandbox.cut_owed = true;
        let stays = |tuple: &Tuple| {
            let by_network = sandbox.policy.as_ref().is_some_and(|policy| policy.allows_address(tuple.destination));
            by_network || sandbox.addresses.contains_key(&tuple.destination)
        };
        // A packet that was judged before the sets changed may begin a flow a moment later.
        for _ in 0..CUTS_MAX {
            let flows = netfilter::flows(guest)?;
            let gone: Vec<&Flow> = flows.iter().filter(|flow| !stays(&flow.tuple)).collect();
            if gone.is_empty() {
                break;
            }
            gone.into_iter().try_for_each(Flow::cut)?;
        }
        sandbox.cut_owed = false;
        Ok(())
    }

    /// Forgets addresses of names that are not allowed any more.
    fn narrow(&self, guest: Ipv4Addr, sandbox: &mut Sandbox) {
        let Some(policy) = &sandbox.policy else { return };
        let gone = |_: &Ipv4Addr, address: &mut Address| {
            address.names.retain(|name| policy.allows_name(name));
            address.names.is_empty()
        };
        let gone: Vec<Ipv4Addr> = sandbox.addresses.extract_if(gone).map(|(address, _)| address).collect();
        self.remove_names(guest, &gone);
    }

    /// Removes addresses from the kernel's set, where some may have gone by themselves.
    fn remove_names(&self, guest: Ipv4Addr, addresses: &[Ipv4Addr]) {
        let elements: Vec<Element> = addresses.iter().map(|address| Element::of(&[guest, *address])).collect();
        let remove = |elements: &[Element]| {
            let mut batch = Batch::new(&self.table);
            batch.remove(NAMES, elements);
            batch.commit()
        };
        if remove(&elements).is_ok() {
            return;
        }
        for element in &elements {
            if let Err(error) = remove(std::slice::from_ref(element))
                && error.raw_os_error() != Some(libc::ENOENT)
            {
                tracing::warn!(%error, %guest, "an address stays reachable for a sandbox until its time is over");
            }
        }
    }

    /// Forgets a sandbox whose processes are gone, in the kernel too. Blocks.
    pub fn forget(&self, guest: Ipv4Addr) {
        let Some(sandbox) = self.sandboxes().remove(&guest) else { return };
        let addresses: Vec<Ipv4Addr> = sandbox.addresses.into_keys().collect();
        if !addresses.is_empty() {
            self.remove_names(guest, &addresses);
        }
        let mut batch = Batch::new(&self.table);
        if let Some(policy) = &sandbox.policy {
            batch.remove(NETWORKS, &policy.elements(guest));
            batch.remove(RESTRICTED, &[Element::of(&[guest])]);
        }
        if let Err(error) = batch.commit() {
            tracing::warn!(%error, %guest, "something is left of a sandbox's network rules");
        }
        // Nobody ends its connections any more: they would stay in the host's table for up to five days, and count
        // against the next sandbox with this address.
        if let Err(error) = netfilter::flows(guest).and_then(|flows| flows.iter().try_for_each(Flow::cut)) {
            tracing::warn!(%error, %guest, "connections are left of a sandbox that is gone");
        }
    }

    /// Whether a sandbox may ask for a name; writes down when not.
    pub fn may_ask(&self, guest: Ipv4Addr, name: &str) -> bool {
        let mut sandboxes = self.sandboxes();
        let Some(sandbox) = sandboxes.get_mut(&guest) else { return false };
        let may = sandbox.policy.as_ref().is_none_or(|policy| policy.allows_name(name));
        if !may {
            sandbox.log.refused_name(now(), name, NAME_NOT_ALLOWED);
        }
        may
    }

    /// Makes the addresses of a name reachable, before the sandbox hears of them.
    pub fn resolved(&self, guest: Ipv4Addr, name: &str, found: &[(Ipv4Addr, Duration)]) -> Result<(), Refusal> {
        let leads_inside = found.iter().any(|(address, _)| self.is_inside(*address));
        let mut sandboxes = self.sandboxes();
        let sandbox = sandboxes.get_mut(&guest).ok_or(Refusal::NotAllowed)?;
        // Without an allow-list it goes by the rules for all, and only the log wants to know.
        let has_room = sandbox.has_room(found);
        let result = match &sandbox.policy {
            None => {
                sandbox.remember(name, found);
                return Ok(());
            }
            // It may have changed since the question.
            Some(policy) if !policy.allows_name(name) => Err(Refusal::NotAllowed),
            Some(_) if found.is_empty() => Ok(()),
            Some(_) if leads_inside => Err(Refusal::LeadsInside),
            Some(_) if !has_room => Err(Refusal::TooMany),
            Some(_) => self.open(guest, sandbox, found).map_err(|error| {
                tracing::warn!(%error, %guest, "the kernel did not take the addresses of a name");
                Refusal::Failed
            }),
        };
        match result {
            Ok(()) => sandbox.remember(name, found),
            Err(Refusal::NotAllowed) => sandbox.log.refused_name(now(), name, NAME_NOT_ALLOWED),
            Err(Refusal::LeadsInside) => sandbox.log.refused_name(now(), name, LEADS_INSIDE),
            Err(Refusal::TooMany) => sandbox.log.refused_name(now(), name, TOO_MANY),
            Err(Refusal::Failed) => {}
        }
        result
    }

    fn is_inside(&self, address: Ipv4Addr) -> bool {
        let within = |ranges: &[Range]| ranges.iter().any(|range| range.contains(address));
        (within(&self.denied) || is_of_the_host(address)) && !within(&self.opened)
    }

    /// Puts addresses into the kernel's set, or gives them more time.
    fn open(&self, guest: Ipv4Addr, sandbox: &Sandbox, found: &[(Ipv4Addr, Duration)]) -> io::Result<()> {
        let now = Instant::now();
        let element = |(address, ttl): &(Ipv4Addr, Duration)| Element {
            timeout_ms: Some(reachable(*ttl).as_millis() as u64),
            ..Element::of(&[guest, *address])
        };
        // Most are there already, with enough time left.
        let wanted: Vec<&(Ipv4Addr, Duration)> = found
            .iter()
            .filter(|(address, ttl)| {
                sandbox.addresses.get(address).is_none_or(|of| of.until < now + reachable(*ttl) - GRACE / 2)
            })
            .collect();
        let elements: Vec<Element> = wanted.iter().map(|found| element(found)).collect();
        let there: Vec<Element> = wanted
            .iter()
            .filter(|(address, _)| sandbox.addresses.get(address).is_some_and(|of| of.until > now))
            .map(|(address, _)| Element::of(&[guest, *address]))
            .collect();
        let renew = |there: &[Element]| {
            let mut batch = Batch::new(&self.table);
            // Only what is removed first gets a new time.
            batch.remove(NAMES, there);
            batch.add(NAMES, &elements);
            batch.commit()
        };
        match renew(&there) {
            // One of them went by itself in this moment.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => renew(&[]),
            other => other,
        }
    }

    /// Writes down what a rule let through or did not.
    pub fn saw(&self, tuple: Tuple, denied: &'static str) {
        let mut sandboxes = self.sandboxes();
        let Some(sandbox) = sandboxes.get_mut(&tuple.guest) else { return };
        let name = sandbox.addresses.get(&tuple.destination).and_then(|of| of.names.last().cloned());
        sandbox.log.began(now(), tuple, name, denied);
        if denied == CONNECTIONS_USED_UP && sandbox.used_up_told.is_none_or(|told| told.elapsed() >= USED_UP_EVERY) {
            sandbox.used_up_told = Some(Instant::now());
            // Nobody listens any more when the driver ends.
            let _ = self.used_up.send(tuple.guest);
        }
    }

    pub fn ended(&self, flow: &Flow) {
        if let Some(sandbox) = self.sandboxes().get_mut(&flow.tuple.guest) {
            sandbox.log.count(flow);
        }
    }

    /// The last connections of a sandbox. Blocks.
    pub fn connections(&self, guest: Ipv4Addr) -> io::Result<Vec<Connection>> {
        let flows = netfilter::flows(guest)?;
        let mut sandboxes = self.sandboxes();
        let Some(sandbox) = sandboxes.get_mut(&guest) else { return Ok(Vec::new()) };
        flows.iter().for_each(|flow| sandbox.log.count(flow));
        Ok(sandbox.log.list())
    }
}

impl Sandbox {
    /// Makes room among the addresses, by forgetting those whose time is over.
    fn has_room(&mut self, found: &[(Ipv4Addr, Duration)]) -> bool {
        if self.addresses.len() + found.len() > ADDRESSES_MAX {
            let now = Instant::now();
            self.addresses.retain(|_, address| address.until > now);
        }
        self.addresses.len() + found.len() <= ADDRESSES_MAX
    }

    fn remember(&mut self, name: &str, found: &[(Ipv4Addr, Duration)]) {
        /// An address that many names share is known by the last ones.
        const NAMES_MAX: usize = 16;
        if !self.has_room(found) {
            return;
        }
        let now = Instant::now();
        let name: Arc<str> = name.into();
        for (address, ttl) in found {
            let known = self.addresses.entry(*address).or_insert_with(|| Address { names: Vec::new(), until: now });
            known.until = known.until.max(now + reachable(*ttl));
            known.names.retain(|other| *other != name);
            if known.names.len() == NAMES_MAX {
                known.names.remove(0);
            }
            known.names.push(name.clone());
        }
    }
}

/// For how long an address is reachable that a name resolved to.
fn reachable(ttl: Duration) -> Duration {
    ttl.clamp(REACHABLE_MIN, TTL_MAX) + GRACE
}

/// Whether an address is one of the host's own: what goes there comes from there. No packet is sent.
fn is_of_the_host(address: Ipv4Addr) -> bool {
    let own = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((address, 53))?;
        socket.local_addr()
    };
    own().is_ok_and(|own| own.ip() == address)
}

fn now() -> UnixMs {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as UnixMs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(domains: &[&str], cidrs: &[&str]) -> Policy {
        let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        Policy::new(&Egress { allow_domains: texts(domains), allow_cidrs: texts(cidrs) })
    }

    #[test]
    fn names_are_allowed_whole_or_by_their_ending_at_a_dot() {
        let policy = policy(&["example.com", "*.example.org"], &[]);
        for allowed in ["example.com", "a.example.org", "a.b.example.org"] {
            assert!(policy.allows_name(allowed), "{allowed}");
        }
        for refused in [
            "",
            "a.example.com",
            "example.org",
            ".example.org",
            "badexample.org",
            "example.org.evil",
            "example.com.",
            "example",
        ] {
            assert!(!policy.allows_name(refused), "{refused}");
        }
    }

    #[test]
    fn networks_are_merged_before_the_kernel_gets_them() {
        let policy = policy(&[], &["11.0.0.0/8", "11.1.0.0/16", "12.0.0.0/8", "1.1.1.1/32"]);
        assert!(
            policy.allows_address(Ipv4Addr::new(12, 255, 255, 255)) && policy.allows_address(Ipv4Addr::new(1, 1, 1, 1))
        );
        assert!(
            !policy.allows_address(Ipv4Addr::new(13, 0, 0, 0)) && !policy.allows_address(Ipv4Addr::new(1, 1, 1, 2))
        );
        assert_eq!(policy.elements(Ipv4Addr::new(10, 0, 0, 2)).len(), 2);
    }

    #[test]
    fn a_wider_list_cuts_nothing() {
        let narrow = policy(&["a.example"], &["1.0.0.0/8"]);
        let wide = policy(&["b.example", "a.example"], &["1.0.0.0/8", "2.0.0.0/8"]);
        assert!(wide.covers(&narrow) && !narrow.covers(&wide));
    }

    #[test]
    fn addresses_are_reachable_for_a_minute_and_for_an_hour_at_most() {
        for (ttl, seconds) in [(0, 90), (60, 90), (300, 330), (3_600, 3_630), (u32::MAX, 3_630)] {
            assert_eq!(reachable(Duration::from_secs(ttl.into())), Duration::from_secs(seconds));
        }
    }

    #[test]
    fn private_addresses_and_the_hosts_are_inside_unless_the_operator_opened_them() {
        let range = |text| ranges::parse(text).expect("a network");
        let destinations = EgressPolicy::new(
            "t".into(),
            vec![range("10.0.0.0/8"), range("169.254.0.0/16")],
            vec![range("10.1.2.0/24")],
            mpsc::unbounded_channel().0,
        );
        for (address, inside) in [
            ([10, 0, 0, 1], true),
            ([169, 254, 169, 254], true),
            ([10, 1, 2, 3], false),
            ([127, 0, 0, 1], true),
            ([8, 8, 8, 8], false),
        ] {
            assert_eq!(destinations.is_inside(address.into()), inside, "{address:?}");
        }
    }
}
