//! The network of sandboxes: one routed link for each, and one rule set for all.
//!
//! A sandbox with outbound access has a link `eth0` whose other end is on the host, named after the
//! server and the slot. The rules match that name by its prefix, so making or removing a sandbox
//! changes no rule; the few that may reach named destinations only stand in sets. A sandbox without
//! outbound access has no link at all.

mod config;
mod connections;
mod dns_message;
mod dns_proxy;
mod egress_policy;
mod netfilter;
mod ranges;
mod rules;

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nagaya_engine::model::{Connection, Egress};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::sys;
use crate::sys::netlink::{GUEST_LINK, LOOPBACK, Netlink};

pub use config::NetworkConfig;
use dns_proxy::{DnsProxy, Sockets};
use egress_policy::EgressPolicy;
use netfilter::{Batch, Element};
use rules::{Rules, Share};

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("run nft, which sets the rules of the sandboxes' network; install the package nftables")]
    NoNft(#[source] io::Error),
    #[error("nft refused the rules: {0}")]
    Rules(String),
    #[error("switch on IPv4 forwarding")]
    Forwarding(#[source] io::Error),
    #[error("{step}")]
    Link { step: &'static str, source: io::Error },
    #[error("{0:?} is not a range of IPv4 addresses")]
    Allow(String),
    #[error("every /16 of 10.192.0.0/10 is routed already; name a free network as network.cidr")]
    NoneFree,
    #[error("network.cidr {0:?} is not an IPv4 network of the form a.b.c.d/n with n from 8 to 28")]
    Cidr(String),
}

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Cidr {
    first: u32,
    prefix: u8,
}

impl std::str::FromStr for Cidr {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let bad = || NetworkError::Cidr(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        let first = u32::from(address);
        if !(8..=28).contains(&prefix) || first & (u32::MAX >> prefix) != 0 {
            return Err(bad());
        }
        Ok(Self { first, prefix })
    }
}

impl TryFrom<String> for Cidr {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        text.parse()
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.first), self.prefix)
    }
}

impl Cidr {
    /// The network that `file` names, or else one of 10.192.0.0/10 that the host has no route into,
    /// which is then written there. Servers that start at the same moment try in different orders.
    pub fn choose(file: &Path) -> Result<Self, NetworkError> {
        let kept = |source| NetworkError::Link { step: "keep the chosen network", source };
        match fs::read_to_string(file) {
            Ok(text) => return text.trim().parse(),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(kept(error)),
            Err(_) => {}
        }
        let routes = fs::read_to_string("/proc/net/route").map_err(kept)?;
        let start = u32::from(blake3::hash(file.as_os_str().as_encoded_bytes()).as_bytes()[0]) % 64;
        let all = (0..64).map(|step| Self { first: (10 << 24) | ((192 + (start + step) % 64) << 16), prefix: 16 });
        let free = all.into_iter().find(|cidr| !cidr.is_routed(&routes)).ok_or(NetworkError::NoneFree)?;
        fs::write(file, format!("{free}\n")).map_err(kept)?;
        Ok(free)
    }

    /// Whether a route other than the default one leads into this network, by the text of
    /// `/proc/net/route`: destination and mask are the second and eighth column, in reverse order.
    fn is_routed(&self, routes: &str) -> bool {
        let number = |text: Option<&str>| u32::from_str_radix(text?, 16).ok().map(u32::swap_bytes);
        let own_mask = u32::MAX << (32 - self.prefix);
        routes.lines().skip(1).any(|line| {
            let mut columns = line.split_whitespace();
            let (destination, mask) = (number(columns.nth(1)), number(columns.nth(5)));
            let (Some(destination), Some(mask)) = (destination, mask) else { return false };
            mask != 0 && destination & mask & own_mask == self.first & mask
        })
    }

    /// The one address that the host has on every link.
    fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.first + 1)
    }

    /// Sandboxes that fit: all addresses but the first two and the last.
    pub fn capacity(&self) -> u32 {
        (1 << (32 - self.prefix)) - 3
    }

    fn guest(&self, slot: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.first + 2 + slot)
    }
}

/// The host's side of the sandboxes' network.
pub struct Network {
    cidr: Cidr,
    /// Four hexadecimal digits that tell this server's links and rules from another's.
    instance: String,
    destinations: Arc<EgressPolicy>,
    share: Share,
    /// Ends with the network.
    _stub: DnsProxy,
}

impl Network {
    /// Sets the rules, those of sandboxes in `existing` slots included, and starts the name server. Also returns who
    /// tells of sandboxes that have used up their connections; see [`Network::slot`].
    pub fn open(
        instance: &str,
        cidr: Cidr,
        config: &NetworkConfig,
        existing: &[(u32, Option<Egress>)],
    ) -> Result<(Self, mpsc::UnboundedReceiver<Ipv4Addr>), NetworkError> {
        switch_on("/proc/sys/net/ipv4/ip_forward").map_err(NetworkError::Forwarding)?;
        if let Err(error) = switch_on("/proc/sys/net/netfilter/nf_conntrack_acct") {
            tracing::warn!(%error, "the kernel does not count bytes of sandboxes' connections");
        }
        let (upstream, forwarded) = name_servers(config.name_server);
        let number = u16::from_str_radix(instance, 16).unwrap_or(0);
        let mark = u32::from(number) | MARK;
        let sockets = Sockets::bind(cidr.gateway(), mark).map_err(on("open the name server of sandboxes"))?;
        let table = format!("nagaya_{instance}");
        let range = |text: &str| ranges::parse(text).ok_or_else(|| NetworkError::Allow(text.to_owned()));
        let denied = rules::DENIED.iter().map(|text| range(text)).collect::<Result<_, _>>()?;
        let opened = config.allow.iter().map(|text| range(text)).collect::<Result<_, _>>()?;
        let (used_up, told) = mpsc::unbounded_channel();
        let destinations = Arc::new(EgressPolicy::new(table.clone(), denied, opened, used_up));
        let share = share_of_connections(config.connections_max);
        let stale_names = take_over(&destinations, cidr, &table, existing);
        let (restricted, networks) = destinations.describe();
        let rules = Rules {
            table: &table,
            links: &format!("ngy{instance}"),
            cidr,
            gateway: cidr.gateway(),
            opened: &config.allow,
            name_server: forwarded,
            port: sockets.port,
            mark,
            log_group: number,
            share,
            restricted,
            networks,
            stale_names,
        };
        if let Err(error) = run_nft(&rules.script(true)) {
            tracing::debug!(error = &error as &dyn std::error::Error, "the rules of an earlier server are not kept");
            run_nft(&rules.script(false))?;
        }
        let stub = DnsProxy::start(sockets, upstream, destinations.clone(), watched(number))
            .map_err(on("start the name server of sandboxes"))?;
        Ok((Self { cidr, instance: instance.to_owned(), destinations, share, _stub: stub }, told))
    }

    /// The slot of the sandbox with this address.
    pub fn slot(&self, guest: Ipv4Addr) -> Option<u32> {
        u32::from(guest).checked_sub(u32::from(self.cidr.guest(0)))
    }

    /// Connections that one sandbox may have at a time.
    pub fn connections_max(&self) -> u32 {
        self.share.at_once
    }

    /// Keeps connections to a port of the host's loopback device possible when the host's table of connections is full.
    pub fn leave_untracked(&self, port: u16) -> io::Result<()> {
        let table = self.table();
        let mut batch = Batch::new(&table);
        batch.add(
            egress_policy::UNTRACKED,
            &[Element { first: port.to_be_bytes().into(), last: None, timeout_ms: None }],
        );
        batch.commit()
    }

    /// The name server that sandboxes are told; requests to it go to the host's own one, or to the stub.
    pub fn name_server(&self) -> Ipv4Addr {
        self.cidr.gateway()
    }

    pub fn capacity(&self) -> u32 {
        self.cidr.capacity()
    }

    fn table(&self) -> String {
        format!("nagaya_{}", self.instance)
    }

    fn link_prefix(&self) -> String {
        format!("ngy{}", self.instance)
    }

    /// Sets where the sandbox in a slot may go, before anything of its user's runs in it. See [`EgressPolicy::begin`].
    pub fn begin(&self, slot: u32, egress: Option<&Egress>) -> io::Result<()> {
        self.destinations.begin(self.cidr.guest(slot), egress)
    }

    /// Changes that; see [`EgressPolicy::change`]. Blocks.
    pub fn change(&self, slot: u32, egress: Option<&Egress>) -> io::Result<()> {
        self.destinations.change(self.cidr.guest(slot), egress)
    }

    /// Forgets the sandbox in a slot, whose processes are gone. Blocks.
    pub fn forget(&self, slot: u32) {
        self.destinations.forget(self.cidr.guest(slot));
    }

    /// The last connections of the sandbox in a slot. Blocks.
    pub fn connections(&self, slot: u32) -> io::Result<Vec<Connection>> {
        self.destinations.connections(self.cidr.guest(slot))
    }

    /// Gives a namespace its loopback device and, with a `slot`, its link and address.
    /// Blocks, and moves the calling thread between namespaces.
    pub fn set_up(&self, namespace: BorrowedFd<'_>, slot: Option<u32>) -> Result<(), NetworkError> {
        let Some(slot) = slot else { return Self::set_up_isolated(namespace) };
        let mut host = Netlink::open().map_err(on("open netlink"))?;
        let name = format!("{}{slot:x}", self.link_prefix());
        let (gateway, guest) = (self.cidr.gateway(), self.cidr.guest(slot));
        host.add_pair(&name, hardware_address(gateway), hardware_address(guest), namespace)
            .map_err(on("make a link"))?;
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
        let index = socket
            .and_then(|socket| rustix::net::netdevice::name_to_index(socket, &name))
            .map_err(|errno| on("find the link")(errno.into()))?;
        host.add_address(index, gateway).map_err(on("address the link"))?;
        host.add_host_route(index, guest).map_err(on("route to the link"))?;
        // Neighbours that are learnt take places in one small table of the whole host, these do not.
        host.add_neighbour(index, guest, hardware_address(guest)).map_err(on("name the link's neighbour"))?;

        let mut inside = open_inside(namespace)?;
        inside.set_up(LOOPBACK).map_err(on("start the loopback device"))?;
        inside.add_address(GUEST_LINK, guest).map_err(on("address eth0"))?;
        inside.set_up(GUEST_LINK).map_err(on("start eth0"))?;
        inside.add_host_route(GUEST_LINK, gateway).map_err(on("route to the gateway"))?;
        inside
            .add_neighbour(GUEST_LINK, gateway, hardware_address(gateway))
            .map_err(on("name the gateway as a neighbour"))?;
        inside.add_default_route(GUEST_LINK, gateway).map_err(on("route through the gateway"))
    }

    /// As [`Network::set_up`], without any way out.
    pub fn set_up_isolated(namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
        open_inside(namespace)?.set_up(LOOPBACK).map_err(on("start the loopback device"))
    }

    /// Removes the rules; links go with their sandboxes.
    pub fn remove(&self) -> Result<(), NetworkError> {
        let table = self.table();
        run_nft(&format!("add table inet {table}\ndelete table inet {table}\n"))
    }
}

/// Tells sockets of our name server from all others of the host; the lower half tells servers apart.
const MARK: u32 = 0x6e67_0000;

/// The hardware address of the end of a link that has this address: both are known before the link is there.
fn hardware_address(address: Ipv4Addr) -> [u8; 6] {
    // The second bit of the first byte: locally administered.
    let [a, b, c, d] = address.octets();
    [0x0a, 0x6e, a, b, c, d]
}

/// What one sandbox may have of the host's table of connections.
fn share_of_connections(wanted: u32) -> Share {
    const SETTING: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
    let table_max = fs::read_to_string(SETTING).ok().and_then(|text| text.trim().parse().ok());
    let Some(table_max) = table_max else { return Share { at_once: wanted.max(1) } };
    let share = Share::of_table(wanted, table_max);
    if share.at_once < wanted {
        let at_once = share.at_once;
        tracing::warn!(at_once, table_max, "network.connections_max is more than the host's table has room for");
    }
    share
}

fn switch_on(setting: &str) -> io::Result<()> {
    if fs::read_to_string(setting)?.starts_with('1') { Ok(()) } else { fs::write(setting, "1") }
}

/// Whom the stub asks, and to whom questions are sent on without it. The stub is on the host, so it may ask on loopback.
fn name_servers(chosen: Option<SocketAddr>) -> (Option<SocketAddr>, Option<SocketAddr>) {
    if let Some(server) = chosen {
        return (Some(server), Some(server).filter(|server| server.is_ipv4() && !server.ip().is_loopback()));
    }
    let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let behind_stub = fs::read_to_string("/run/systemd/resolve/resolv.conf").unwrap_or_default();
    let reachable = name_server(&resolver).or_else(|| name_server(&behind_stub));
    let upstream = reachable.or_else(|| any_name_server(&resolver));
    if upstream.is_none() {
        tracing::warn!("the host names no IPv4 name server; names do not resolve in sandboxes");
    }
    let on_port_53 = |address| SocketAddr::from((address, 53));
    (upstream.map(on_port_53), reachable.map(on_port_53))
}

/// Takes over sandboxes of an earlier server, with the names that its kernel set still holds; returns elements of that
/// set that belong to none of them.
fn take_over(destinations: &EgressPolicy, cidr: Cidr, table: &str, existing: &[(u32, Option<Egress>)]) -> Vec<String> {
    let mut left = names_in_kernel(table);
    for (slot, egress) in existing {
        let guest = cidr.guest(*slot);
        let (own, others) = left.into_iter().partition(|name: &KeptName| name.guest == guest && egress.is_some());
        left = others;
        let addresses = own.into_iter().map(|name: KeptName| (name.address, name.left)).collect();
        destinations.take_over(guest, egress.as_ref(), addresses);
    }
    left.into_iter().map(|name| format!("{} . {}", name.guest, name.address)).collect()
}

struct KeptName {
    guest: Ipv4Addr,
    address: Ipv4Addr,
    left: Duration,
}

/// What an earlier server's set holds; nothing where there is none.
fn names_in_kernel(table: &str) -> Vec<KeptName> {
    let output = Command::new("nft")
        .args(["-j", "list", "set", "inet", table, egress_policy::NAMES])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stderr(Stdio::null())
        .output();
    let listed = output.ok().and_then(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).ok());
    listed.map(|listed| kept_names(&listed)).unwrap_or_default()
}

fn kept_names(listed: &serde_json::Value) -> Vec<KeptName> {
    let sets = listed["nftables"].as_array().into_iter().flatten();
    let elements = sets.filter_map(|object| object["set"]["elem"].as_array()).flatten();
    let kept = |element: &serde_json::Value| {
        let element = &element["elem"];
        let address = |at: usize| element["val"]["concat"][at].as_str()?.parse().ok();
        let left = Duration::from_secs(element["expires"].as_u64()?);
        Some(KeptName { guest: address(0)?, address: address(1)?, left })
    };
    elements.filter_map(kept).collect()
}

/// Sockets on which the kernel tells of connections. Without them there is no log, and all else works.
fn watched(group: u16) -> Vec<std::os::fd::OwnedFd> {
    let opened = [netfilter::open_log(group), netfilter::open_flow_ends()];
    let told = |socket: io::Result<_>| {
        socket.inspect_err(|error| tracing::warn!(%error, "connections of sandboxes are not written down in full")).ok()
    };
    opened.into_iter().filter_map(told).collect()
}

fn on(step: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Link { step, source }
}

/// Whether sockets may keep copies of what they sent, beside the time of sending. That is memory which no control group
/// counts. Up to Linux 6.12 there is one switch for the whole host.
const COPIES_OF_SENT: &str = "/proc/sys/net/core/tstamp_allow_data";

/// Sets what every sandbox's network has, and opens a socket in it.
fn open_inside(namespace: BorrowedFd<'_>) -> Result<Netlink, NetworkError> {
    let prepare = || {
        // Without IPv6 there is no address that the rules would have to know.
        let _ = fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        // But for the loopback device, which leads nowhere: programs that name it `localhost` often take ::1.
        let _ = fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "0");
        // `ping` without raw sockets, and low ports for everybody: a sandbox has one owner.
        let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 4294967294");
        let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
        let has_own_switch = fs::write(COPIES_OF_SENT, "0").is_ok();
        Ok((Netlink::open()?, has_own_switch))
    };
    let (inside, has_own_switch) =
        sys::in_network_namespace(namespace, prepare).map_err(on("enter the network namespace"))?;
    if !has_own_switch && let Err(error) = fs::write(COPIES_OF_SENT, "0") {
        tracing::warn!(%error, file = COPIES_OF_SENT, "sockets of sandboxes may keep copies of what they sent; set it to 0");
    }
    Ok(inside)
}

/// The first IPv4 name server of a resolv.conf that is not on the host's own loopback.
fn name_server(resolver: &str) -> Option<Ipv4Addr> {
    addresses(resolver).find(|address| !address.is_loopback() && !address.is_unspecified())
}

fn any_name_server(resolver: &str) -> Option<Ipv4Addr> {
    addresses(resolver).find(|address| !address.is_unspecified())
}

fn addresses(resolver: &str) -> impl Iterator<Item = Ipv4Addr> + '_ {
    resolver.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok())
}

fn run_nft(rules: &str) -> Result<(), NetworkError> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NetworkError::NoNft)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A refusal closes the pipe early; what nft says then tells more than the broken pipe.
        let _ = stdin.write_all(rules.as_bytes());
    }
    let output = child.wait_with_output().map_err(NetworkError::NoNft)?;
    if output.status.success() {
        Ok(())
    } else {
        Err(NetworkError::Rules(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_parsed_strictly() {
        let cidr: Cidr = "10.200.0.0/16".parse().expect("a network");
        assert_eq!(cidr.to_string(), "10.200.0.0/16");
        assert_eq!(cidr.capacity(), 65_533);
        assert_eq!(cidr.guest(0), Ipv4Addr::new(10, 200, 0, 2));
        assert_eq!(cidr.guest(cidr.capacity() - 1), Ipv4Addr::new(10, 200, 255, 254));
        for bad in ["", "10.0.0.0", "10.0.0.1/16", "10.0.0.0/7", "10.0.0.0/29", "x/16", "10.0.0.0/x", "::/16"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_with_a_route_into_it_is_taken() {
        let cidr: Cidr = "10.200.0.0/16".parse().expect("a network");
        let header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
        let route = |destination: &str, mask: &str| {
            format!("{header}eth0\t{destination}\t00000000\t1\t0\t0\t0\t{mask}\t0\t0\t0\n")
        };
        assert!(!cidr.is_routed(&route("00000000", "00000000")), "the default route");
        assert!(!cidr.is_routed(&route("0000C90A", "0000FFFF")), "10.201.0.0/16");
        assert!(cidr.is_routed(&route("0000C80A", "0000FFFF")), "the same network");
        assert!(cidr.is_routed(&route("0207C80A", "FFFFFFFF")), "one address in it");
        assert!(cidr.is_routed(&route("0000000A", "000000FF")), "a network around it");
    }

    #[test]
    fn a_chosen_network_is_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("network");
        let chosen = Cidr::choose(&file).expect("a free network");
        assert_eq!(Cidr::choose(&file).expect("the same"), chosen);
    }

    #[test]
    fn a_stub_resolver_on_loopback_is_passed_over() {
        assert_eq!(name_server("nameserver 127.0.0.53\n"), None);
        assert_eq!(name_server("# x\nnameserver ::1\nnameserver 192.0.2.7\n"), Some(Ipv4Addr::new(192, 0, 2, 7)));
    }
}
