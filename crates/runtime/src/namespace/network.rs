//! The network of sandboxes: one routed link for each, and one rule set for all.
//!
//! A sandbox with outbound access has a link `eth0` whose other end is on the host, named after the
//! server and the slot. The rules match that name by its prefix, so making or removing a sandbox
//! changes no rule. A sandbox without outbound access has no link at all.

use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sys;
use crate::sys::netlink::{GUEST_LINK, LOOPBACK, Netlink};

/// Destinations that no sandbox reaches unless the operator allows them: this network, private and
/// shared ranges, loopback, link-local (cloud metadata among them), documentation, benchmarking,
/// multicast, reserved. Source: IANA's special-purpose address registry.
const DENIED: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, \
     192.0.0.0/24, 192.0.2.0/24, 192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24, 224.0.0.0/3";

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
    #[error("every /16 of 10.192.0.0/10 is routed already; name a free network as network.cidr")]
    NoneFree,
    #[error("network_cidr {0:?} is not an IPv4 network of the form a.b.c.d/n with n from 8 to 28")]
    Cidr(String),
}

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
#[derive(Debug, Clone)]
pub struct Network {
    cidr: Cidr,
    /// Four hexadecimal digits that tell this server's links and rules from another's.
    instance: String,
}

impl Network {
    /// Sets the rules. `allowed` networks are reachable although they are private.
    pub fn open(instance: &str, cidr: Cidr, allowed: &[String]) -> Result<Self, NetworkError> {
        let network = Self { cidr, instance: instance.to_owned() };
        let forwarding = Path::new("/proc/sys/net/ipv4/ip_forward");
        if !fs::read_to_string(forwarding).map_err(NetworkError::Forwarding)?.starts_with('1') {
            fs::write(forwarding, "1").map_err(NetworkError::Forwarding)?;
        }
        let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let behind_stub = fs::read_to_string("/run/systemd/resolve/resolv.conf").unwrap_or_default();
        let upstream = name_server(&resolver).or_else(|| name_server(&behind_stub));
        if upstream.is_none() {
            tracing::warn!("the host names no reachable IPv4 name server; names do not resolve in sandboxes");
        }
        run_nft(&network.rules(allowed, upstream))?;
        Ok(network)
    }

    /// The name server that sandboxes are told; requests to it go to the host's own one.
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

    fn rules(&self, allowed: &[String], upstream: Option<Ipv4Addr>) -> String {
        let (table, links, cidr, gateway) = (self.table(), self.link_prefix(), self.cidr, self.cidr.gateway());
        let allow =
            if allowed.is_empty() { String::new() } else { format!("ip daddr {{ {} }} accept", allowed.join(", ")) };
        let dns = upstream.map_or(String::new(), |upstream| {
            format!(
                "iifname \"{links}*\" ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {upstream}"
            )
        });
        format!(
            r#"add table inet {table}
delete table inet {table}
table inet {table} {{
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        {dns}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {cidr} oifname != "{links}*" masquerade
    }}
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        iifname "{links}*" drop
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        iifname "{links}*" jump outbound
        oifname "{links}*" jump inbound
    }}
    chain outbound {{
        meta nfproto != ipv4 drop
        ip saddr != {cidr} drop
        fib saddr . iif oif missing drop
        oifname "{links}*" drop
        ct status dnat accept
        {allow}
        ip daddr {{ {DENIED} }} drop
        fib daddr type != unicast drop
        accept
    }}
    chain inbound {{
        ct state established,related accept
        drop
    }}
}}
"#
        )
    }

    /// Gives a namespace its loopback device and, with a `slot`, its link and address.
    /// Blocks, and moves the calling thread between namespaces.
    pub fn set_up(&self, namespace: BorrowedFd<'_>, slot: Option<u32>) -> Result<(), NetworkError> {
        let Some(slot) = slot else { return Self::set_up_isolated(namespace) };
        let mut host = Netlink::open().map_err(on("open netlink"))?;
        let name = format!("{}{slot:x}", self.link_prefix());
        host.add_pair(&name, namespace).map_err(on("make a link"))?;
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
        let index = socket
            .and_then(|socket| rustix::net::netdevice::name_to_index(socket, &name))
            .map_err(|errno| on("find the link")(errno.into()))?;
        host.add_address(index, self.cidr.gateway()).map_err(on("address the link"))?;
        host.add_host_route(index, self.cidr.guest(slot)).map_err(on("route to the link"))?;

        let mut inside = open_inside(namespace)?;
        inside.set_up(LOOPBACK).map_err(on("start the loopback device"))?;
        inside.add_address(GUEST_LINK, self.cidr.guest(slot)).map_err(on("address eth0"))?;
        inside.set_up(GUEST_LINK).map_err(on("start eth0"))?;
        inside.add_host_route(GUEST_LINK, self.cidr.gateway()).map_err(on("route to the gateway"))?;
        inside.add_default_route(GUEST_LINK, self.cidr.gateway()).map_err(on("route through the gateway"))
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

fn on(step: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Link { step, source }
}

/// Sets what every sandbox's network has, and opens a socket in it.
fn open_inside(namespace: BorrowedFd<'_>) -> Result<Netlink, NetworkError> {
    let prepare = || {
        // Without IPv6 there is no address that the rules would have to know.
        let _ = fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        // `ping` without raw sockets, and low ports for everybody: a sandbox has one owner.
        let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 4294967294");
        let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
        Netlink::open()
    };
    within(namespace, prepare).map_err(on("enter the network namespace"))
}

/// Runs `work` on this thread in another network namespace. The way back must not fail: a thread
/// in the wrong namespace would build all later links there.
fn within<T>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let home = fs::File::open("/proc/thread-self/ns/net")?;
    sys::enter_network_namespace(namespace)?;
    let result = work();
    sys::enter_network_namespace(home.as_fd()).expect("a thread may return to the namespace it came from");
    result
}

/// The first IPv4 name server of a resolv.conf that is not on the host's own loopback.
fn name_server(resolver: &str) -> Option<Ipv4Addr> {
    resolver
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok())
        .find(|address: &Ipv4Addr| !address.is_loopback() && !address.is_unspecified())
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
