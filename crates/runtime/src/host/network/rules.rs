//! The rules for all sandboxes of a server, as text for `nft`.
//!
//! ```text
//!  from a sandbox ─┬─ to its name server ──▶ the host's, or ours where destinations are restricted
//!                  ├─ to the host ─────────▶ dropped, but for ours
//!                  └─ to anywhere else ───▶ its own list, where it has one ──▶ the list for all ──▶ out
//! ```
//!
//! What is let through begins only within the sandbox's share of the host's table of connections.
//!
//! Nothing here names a single sandbox: that is in the sets, see `destinations.rs`. Of every flow the
//! first packet is logged to a group of its own, at a rate that no sandbox exceeds.

use std::net::{Ipv4Addr, SocketAddr};

use nagaya_engine::model::CONNECTIONS_USED_UP;

use super::Cidr;
use super::egress_policy::{NAMES, NETWORKS, NOT_ALLOWED, RESTRICTED, UNTRACKED};

/// EgressPolicy that no sandbox reaches unless the operator allows them: this network, private and
/// shared ranges, loopback, link-local (cloud metadata among them), documentation, benchmarking,
/// multicast, reserved. Source: IANA's special-purpose address registry.
pub(super) const DENIED: [&str; 13] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
];

const ALLOWED: &str = "allowed";
const PRIVATE: &str = "private";
const HOST: &str = "host";
const SANDBOX: &str = "sandbox";
const SHARE: &str = "share";

/// What the log says of a packet that a rule logged under this prefix; empty when it was let through.
pub(super) fn reason(prefix: &str) -> &'static str {
    match prefix {
        ALLOWED => "",
        PRIVATE => "private, link-local and other special networks are closed to sandboxes",
        HOST => "the host is closed to sandboxes",
        SANDBOX => "other sandboxes are closed to sandboxes",
        SHARE => CONNECTIONS_USED_UP,
        _ => NOT_ALLOWED,
    }
}

/// What one sandbox may take of the host's table of connections. The kernel does not count a TCP connection that is
/// over, but keeps it in the table for two minutes more; the rate bounds those. Altogether eight times `at_once`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub at_once: u32,
}

impl Share {
    /// The part of the table that one sandbox may have open; with those that are over, an eighth.
    const PART_OF_TABLE: u32 = 64;

    /// What the operator wants, within what the host's table of this size has room for.
    pub fn of_table(wanted: u32, table_max: u32) -> Self {
        Self { at_once: wanted.min(table_max / Self::PART_OF_TABLE).max(1) }
    }

    fn per_second(self) -> u32 {
        (self.at_once / 20).max(1)
    }

    fn burst(self) -> u32 {
        self.at_once.max(5)
    }
}

pub(super) struct Rules<'a> {
    pub table: &'a str,
    /// What the names of all links on the host begin with.
    pub links: &'a str,
    pub cidr: Cidr,
    pub gateway: Ipv4Addr,
    /// Networks that the operator lets sandboxes reach.
    pub opened: &'a [String],
    /// Where unrestricted sandboxes' questions for names go; `None`: to our own name server too.
    pub name_server: Option<SocketAddr>,
    /// The port of our own name server at the gateway's address, and the mark of its sockets.
    pub port: u16,
    pub mark: u32,
    pub log_group: u16,
    pub share: Share,
    /// Elements of the sets.
    pub restricted: Vec<String>,
    pub networks: Vec<String>,
    /// Elements that an earlier server left, of sandboxes that are gone.
    pub stale_names: Vec<String>,
}

impl Rules<'_> {
    /// Replaces all rules at once. With `keep`, what the sets of an earlier server hold of names stays; that fails
    /// where its sets are of another kind.
    pub fn script(&self, keep: bool) -> String {
        let table = self.table;
        let emptied = if keep { "flush" } else { "delete" };
        let mut script = format!("add table inet {table}\n{emptied} table inet {table}\n");
        script += &self.table();
        script += &format!("flush set inet {table} {RESTRICTED}\nflush set inet {table} {NETWORKS}\n");
        // The port of an earlier server.
        script += &format!("flush set inet {table} {UNTRACKED}\n");
        for (set, elements) in [(RESTRICTED, &self.restricted), (NETWORKS, &self.networks)] {
            for some in elements.chunks(500) {
                script += &format!("add element inet {table} {set} {{ {} }}\n", some.join(", "));
            }
        }
        if keep {
            for some in self.stale_names.chunks(500) {
                script += &format!("delete element inet {table} {NAMES} {{ {} }}\n", some.join(", "));
            }
        }
        script
    }

    /// Logs the first packet of a flow. Each sandbox has its own measure of each kind, so that a flood of what is denied
    /// hides nothing that is allowed.
    fn log(&self, prefix: &str) -> String {
        let (set, rate) = match prefix {
            ALLOWED => ("allowed_rate", "limit rate 50/second burst 500 packets"),
            _ => ("denied_rate", "limit rate 20/second burst 100 packets"),
        };
        let group = self.log_group;
        format!("ct state new update @{set} {{ ip saddr {rate} }} log prefix \"{prefix}\" group {group} snaplen 64")
    }

    fn table(&self) -> String {
        let Self { table, links, cidr, gateway, port, mark, .. } = self;
        let (allowed, private, host, sandbox, listed) =
            (self.log(ALLOWED), self.log(PRIVATE), self.log(HOST), self.log(SANDBOX), self.log("list"));
        let refused = self.log(SHARE);
        let (at_once, per_second, burst) = (self.share.at_once, self.share.per_second(), self.share.burst());
        let denied = DENIED.join(", ");
        let opened = match self.opened {
            [] => String::new(),
            opened => format!("ip daddr {{ {} }} goto accepted", opened.join(", ")),
        };
        let ask = format!("iifname \"{links}*\" ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53");
        let (who, others) = match self.name_server {
            Some(server) => {
                (format!("ip saddr @{RESTRICTED}"), format!("{ask} dnat ip to {}:{}", server.ip(), server.port()))
            }
            None => (String::new(), String::new()),
        };
        format!(
            r#"table inet {table} {{
    set {RESTRICTED} {{
        type ipv4_addr
    }}
    set {NETWORKS} {{
        type ipv4_addr . ipv4_addr
        flags interval
    }}
    set {NAMES} {{
        type ipv4_addr . ipv4_addr
        flags timeout
    }}
    set allowed_rate {{
        type ipv4_addr
        size 8192
        flags dynamic,timeout
        timeout 1m
    }}
    set denied_rate {{
        type ipv4_addr
        size 8192
        flags dynamic,timeout
        timeout 1m
    }}
    set questions_rate {{
        type ipv4_addr
        size 8192
        flags dynamic,timeout
        timeout 1m
    }}
    set begun_rate_{at_once} {{
        type ipv4_addr
        size 8192
        flags dynamic,timeout
        timeout 1m
    }}
    set open_{at_once} {{
        type ipv4_addr
        size 8192
        flags dynamic
    }}
    set {UNTRACKED} {{
        type inet_service
    }}
    chain raw_prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iif lo tcp dport @{UNTRACKED} notrack
        iif lo tcp sport @{UNTRACKED} notrack
    }}
    chain raw_output {{
        type filter hook output priority raw; policy accept;
        oif lo tcp dport @{UNTRACKED} notrack
        oif lo tcp sport @{UNTRACKED} notrack
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        {ask} {who} dnat ip to {gateway}:{port}
        {others}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {cidr} oifname != "{links}*" masquerade
    }}
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        iifname "{links}*" jump to_host
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        iifname "{links}*" jump outbound
        oifname "{links}*" jump inbound
    }}
    chain to_host {{
        meta nfproto != ipv4 drop
        ip saddr != {cidr} drop
        fib saddr . iif oif missing drop
        ct status dnat ip daddr {gateway} udp dport {port} update @questions_rate {{ ip saddr limit rate over 500/second burst 1000 packets }} drop
        ct status dnat jump within_share
        ct status dnat ip daddr {gateway} udp dport {port} socket mark {mark} accept
        ct status dnat ip daddr {gateway} tcp dport {port} ct state established accept
        ct status dnat ip daddr {gateway} tcp dport {port} socket mark {mark} accept
        {host}
        drop
    }}
    chain outbound {{
        meta nfproto != ipv4 drop
        ip saddr != {cidr} drop
        fib saddr . iif oif missing drop
        oifname "{links}*" {sandbox}
        oifname "{links}*" drop
        ct status dnat goto answered
        ip saddr @{RESTRICTED} jump listed
        {opened}
        ip daddr {{ {denied} }} {private}
        ip daddr {{ {denied} }} drop
        fib daddr type != unicast drop
        goto accepted
    }}
    chain listed {{
        ct state established,related return
        ip saddr . ip daddr @{NETWORKS} return
        ip saddr . ip daddr @{NAMES} return
        {listed}
        drop
    }}
    chain answered {{
        jump within_share
        accept
    }}
    chain accepted {{
        jump within_share
        {allowed}
        accept
    }}
    chain within_share {{
        ct state != new return
        ct status confirmed return
        update @begun_rate_{at_once} {{ ip saddr limit rate over {per_second}/second burst {burst} packets }} goto beyond_share
        add @open_{at_once} {{ ip saddr ct count over {at_once} }} goto beyond_share
    }}
    chain beyond_share {{
        {refused} reject with icmpx admin-prohibited
        drop
    }}
    chain inbound {{
        ct state established,related accept
        drop
    }}
}}
"#
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_share_is_more_than_an_eighth_of_the_table() {
        for table_max in [7_680, 65_536, 262_144, 4_194_304] {
            let share = Share::of_table(1_000_000, table_max);
            // A TCP connection that is over stays for 120 seconds.
            let most = share.at_once + share.burst() + 120 * share.per_second();
            assert!(most <= table_max / 8, "{most} of {table_max}");
        }
        assert_eq!(Share::of_table(4_096, 262_144).at_once, 4_096);
        assert_eq!(Share::of_table(100, 262_144).at_once, 100);
        assert_eq!(Share::of_table(100, 0).at_once, 1);
    }

    #[test]
    fn every_reason_but_that_of_the_allowed_says_something() {
        assert_eq!(reason(ALLOWED), "");
        for prefix in [PRIVATE, HOST, SANDBOX, SHARE, "list", "", "of a later server"] {
            assert_ne!(reason(prefix), "", "{prefix}");
        }
    }
}
