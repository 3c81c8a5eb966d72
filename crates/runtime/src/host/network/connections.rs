//! What is remembered of a sandbox's connections: the last ones, allowed and denied apart, so that a
//! sandbox cannot push out what it reached by trying what it may not.

use std::collections::VecDeque;
use std::sync::Arc;

use nagaya_engine::model::{Connection, UnixMs};

use super::netfilter::{Flow, Tuple};

/// Connections remembered of each kind.
const KEPT_MAX: usize = 512;
/// How far back an entry is looked for that says the same already.
const SAME_WITHIN: usize = 64;
/// Packets of one flow within this time are one connection, also while nobody answers. Milliseconds.
const SAME_FLOW_MS: u64 = 600_000;
/// Questions for one name within this time are one. Milliseconds.
const SAME_NAME_MS: u64 = 1_000;

#[derive(Debug, Default)]
pub(super) struct Log {
    allowed: VecDeque<Entry>,
    denied: VecDeque<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    at: UnixMs,
    what: What,
    name: Option<Arc<str>>,
    sent: u64,
    received: u64,
    /// Empty when it was let through.
    denied: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Flow(Tuple),
    /// A name was asked for.
    Name,
}

impl Log {
    /// A flow began, or tried to.
    pub fn began(&mut self, at: UnixMs, tuple: Tuple, name: Option<Arc<str>>, denied: &'static str) {
        let known = |entry: &Entry| {
            entry.what == What::Flow(tuple) && entry.denied == denied && at.saturating_sub(entry.at) < SAME_FLOW_MS
        };
        self.push(known, Entry { at, what: What::Flow(tuple), name, sent: 0, received: 0, denied });
    }

    /// A name was asked for that is not answered.
    pub fn refused_name(&mut self, at: UnixMs, name: &str, denied: &'static str) {
        let known = |entry: &Entry| {
            entry.what == What::Name
                && entry.name.as_deref() == Some(name)
                && at.saturating_sub(entry.at) < SAME_NAME_MS
        };
        self.push(known, Entry { at, what: What::Name, name: Some(name.into()), sent: 0, received: 0, denied });
    }

    fn push(&mut self, is_known: impl Fn(&Entry) -> bool, entry: Entry) {
        let list = if entry.denied.is_empty() { &mut self.allowed } else { &mut self.denied };
        if list.iter().rev().take(SAME_WITHIN).any(is_known) {
            return;
        }
        if list.len() == KEPT_MAX {
            list.pop_front();
        }
        list.push_back(entry);
    }

    /// Takes over what the kernel counted of a flow.
    pub fn count(&mut self, flow: &Flow) {
        let same = |entry: &&mut Entry| entry.what == What::Flow(flow.tuple);
        if let Some(entry) = self.allowed.iter_mut().rev().find(same) {
            // An entry may stand for several flows of the same ports, one after another.
            entry.sent = entry.sent.max(flow.bytes_sent);
            entry.received = entry.received.max(flow.bytes_received);
        }
    }

    /// Everything, oldest first.
    pub fn list(&self) -> Vec<Connection> {
        let mut all: Vec<&Entry> = self.allowed.iter().chain(&self.denied).collect();
        all.sort_by_key(|entry| entry.at);
        all.into_iter().map(Entry::describe).collect()
    }
}

impl Entry {
    fn describe(&self) -> Connection {
        let (destination, protocol) = match self.what {
            What::Name => (String::new(), "dns".to_owned()),
            What::Flow(tuple) => {
                let protocol = i32::from(tuple.protocol);
                let address = tuple.destination;
                let with_port = format!("{address}:{}", tuple.port);
                match protocol {
                    libc::IPPROTO_TCP => (with_port, "tcp".to_owned()),
                    libc::IPPROTO_UDP => (with_port, "udp".to_owned()),
                    libc::IPPROTO_ICMP => (address.to_string(), "icmp".to_owned()),
                    other => (address.to_string(), other.to_string()),
                }
            }
        };
        Connection {
            at: self.at,
            destination,
            protocol,
            name: self.name.as_deref().unwrap_or_default().to_owned(),
            bytes_sent: self.sent,
            bytes_received: self.received,
            denied: self.denied.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn tuple(port: u16) -> Tuple {
        Tuple {
            guest: Ipv4Addr::new(10, 0, 0, 2),
            guest_port: 40_000,
            destination: Ipv4Addr::new(1, 2, 3, 4),
            port,
            protocol: 6,
        }
    }

    #[test]
    fn packets_sent_again_are_one_connection() {
        let mut log = Log::default();
        for at in [1, 1_001, 3_001] {
            log.began(at, tuple(80), None, "policy");
            log.refused_name(at, "a.example", "policy");
        }
        log.began(4_000, tuple(80), None, "");
        let listed = log.list();
        assert_eq!(listed.iter().map(|of| of.at).collect::<Vec<_>>(), [1, 1, 1_001, 3_001, 4_000]);
        assert_eq!(listed[0].destination, "1.2.3.4:80");
        assert_eq!((listed[1].destination.as_str(), listed[1].protocol.as_str()), ("", "dns"));
        assert_eq!(listed[4].denied, "");
    }

    #[test]
    fn what_is_denied_pushes_out_nothing_that_was_allowed() {
        let mut log = Log::default();
        log.began(1, tuple(1), Some("kept.example".into()), "");
        for port in 0..5_000 {
            log.began(2, tuple(port), None, "policy");
        }
        let listed = log.list();
        assert_eq!(listed.len(), 1 + KEPT_MAX);
        assert_eq!(listed[0].name, "kept.example");
    }
}
