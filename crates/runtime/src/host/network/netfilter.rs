//! What the server asks of the kernel's packet filter beside its rules: elements of sets, and flows.
//!
//! Changes of sets are a few hundred bytes to the kernel here; `nft` as a program would take milliseconds.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::sys::netlink::{ACKNOWLEDGE, CREATE, MESSAGE_ERROR, Message};

const DUMP: u16 = 0x300;
const MESSAGE_DONE: u16 = 3;
const HEADER: usize = 16;
/// `struct nfgenmsg`: family, version, number of a resource.
const GENERIC: usize = 4;

const SUBSYSTEM_CONNTRACK: u16 = 1;
const SUBSYSTEM_LOG: u16 = 4;
const SUBSYSTEM_TABLES: u16 = 10;
/// `NFPROTO_INET`, the family of our table.
const FAMILY_INET: u8 = 1;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_ELEMENTS: u16 = SUBSYSTEM_TABLES << 8 | 12;
const DELETE_ELEMENTS: u16 = SUBSYSTEM_TABLES << 8 | 14;

const GET_FLOWS: u16 = SUBSYSTEM_CONNTRACK << 8 | 1;
const DELETE_FLOW: u16 = SUBSYSTEM_CONNTRACK << 8 | 2;
const FLOW_TUPLE: u16 = 1;
const FLOW_COUNTERS_SENT: u16 = 9;
const FLOW_COUNTERS_RECEIVED: u16 = 10;
const FLOW_ID: u16 = 12;
const FLOW_FILTER: u16 = 25;
/// The group whose members hear of the ends of flows, as a bit.
const GROUP_FLOW_ENDED: u32 = 1 << 2;

const LOG_PACKET: u16 = SUBSYSTEM_LOG << 8;
const LOG_CONFIGURE: u16 = SUBSYSTEM_LOG << 8 | 1;
const LOG_PAYLOAD: u16 = 9;
const LOG_PREFIX: u16 = 10;
/// Bytes of each packet: the headers that say where it goes.
const LOG_BYTES: u32 = 64;
/// How long the kernel may gather packets before it tells of them, hundredths of a second.
const LOG_DELAY: u32 = 5;

fn generic(family: u8, resource: u16) -> [u8; GENERIC] {
    let resource = resource.to_be_bytes();
    [family, 0, resource[0], resource[1]]
}

fn open(groups: u32) -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let sent = rustix::net::sendto(socket.as_fd(), bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("netlink took a message in part")) }
}

/// An element of a set: one key, or all from one to another.
#[derive(Debug, Clone)]
pub(super) struct Element {
    pub first: Vec<u8>,
    pub last: Option<Vec<u8>>,
    /// It goes by itself after this long. Milliseconds.
    pub timeout_ms: Option<u64>,
}

impl Element {
    pub fn of(addresses: &[Ipv4Addr]) -> Self {
        Self { first: addresses.iter().flat_map(Ipv4Addr::octets).collect(), last: None, timeout_ms: None }
    }
}

/// Changes of the sets of one table that take effect together, or not at all.
pub(super) struct Batch<'a> {
    table: &'a str,
    bytes: Vec<u8>,
    sequence: u32,
}

/// Elements in one message: its list must stay below 64 KiB.
const ELEMENTS_MAX: usize = 500;

impl<'a> Batch<'a> {
    pub fn new(table: &'a str) -> Self {
        let begin = Message::request(BATCH_BEGIN, 0, &generic(0, SUBSYSTEM_TABLES)).finish(1);
        Self { table, bytes: begin, sequence: 1 }
    }

    pub fn add(&mut self, set: &str, elements: &[Element]) {
        self.push(NEW_ELEMENTS, CREATE, set, elements);
    }

    /// Elements that are not there make the batch fail with `ENOENT`.
    pub fn remove(&mut self, set: &str, elements: &[Element]) {
        self.push(DELETE_ELEMENTS, 0, set, elements);
    }

    fn push(&mut self, kind: u16, flags: u16, set: &str, elements: &[Element]) {
        let text = |name: &str| [name.as_bytes(), b"\0"].concat();
        for some in elements.chunks(ELEMENTS_MAX) {
            self.sequence += 1;
            let message = Message::request(kind, ACKNOWLEDGE | flags, &generic(FAMILY_INET, 0))
                .attribute(1, &text(self.table))
                .attribute(2, &text(set))
                .nested(3, &[], |list| {
                    some.iter().fold(list, |list, element| list.nested(1, &[], |one| fill(one, element)))
                });
            self.bytes.extend(message.finish(self.sequence));
        }
    }

    /// Blocks for less than a millisecond.
    pub fn commit(mut self) -> io::Result<()> {
        if self.sequence == 1 {
            return Ok(());
        }
        self.bytes.extend(Message::request(BATCH_END, 0, &generic(0, SUBSYSTEM_TABLES)).finish(self.sequence + 1));
        let socket = open(0)?;
        send(&socket, &self.bytes)?;
        // The kernel works while the message is sent: all answers are there now.
        let mut acknowledged = false;
        let mut buffer = vec![0; 32 << 10];
        loop {
            let length = match rustix::net::recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => length,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            };
            for message in messages(&buffer[..length]) {
                check(&message)?;
                acknowledged |= message.kind == MESSAGE_ERROR;
            }
        }
        if acknowledged { Ok(()) } else { Err(io::Error::other("the kernel did not acknowledge a change of a set")) }
    }
}

fn fill(message: Message, element: &Element) -> Message {
    let mut message = message.nested(1, &[], |key| key.attribute(1, &element.first));
    if let Some(last) = &element.last {
        message = message.nested(10, &[], |key| key.attribute(1, last));
    }
    match element.timeout_ms {
        Some(timeout_ms) => message.attribute(4, &timeout_ms.to_be_bytes()),
        None => message,
    }
}

struct Received<'a> {
    kind: u16,
    body: &'a [u8],
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(0..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received { kind, body })
    })
}

fn check(message: &Received<'_>) -> io::Result<()> {
    if message.kind != MESSAGE_ERROR {
        return Ok(());
    }
    let errno = message.body.get(0..4).and_then(|bytes| bytes.try_into().ok()).map_or(-libc::EIO, i32::from_ne_bytes);
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-errno)) }
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        // The two upper bits are flags.
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// What tells one flow of packets from others, from the side of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tuple {
    pub guest: Ipv4Addr,
    pub guest_port: u16,
    pub destination: Ipv4Addr,
    pub port: u16,
    pub protocol: u8,
}

/// A flow that the kernel knows.
#[derive(Debug, Clone)]
pub(super) struct Flow {
    pub tuple: Tuple,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// What names it to the kernel.
    name: Vec<(u16, Vec<u8>)>,
}

impl Flow {
    fn parse(attributes: &[u8]) -> Option<Self> {
        let tuple = attribute(attributes, FLOW_TUPLE)?;
        let (ip, transport) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
        let address = |kind| Some(Ipv4Addr::from(<[u8; 4]>::try_from(attribute(ip, kind)?).ok()?));
        let port =
            |kind| attribute(transport, kind).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_be_bytes);
        let bytes = |kind| {
            let counted = attribute(attribute(attributes, kind)?, 2)?;
            Some(u64::from_be_bytes(counted.try_into().ok()?))
        };
        let name =
            [FLOW_TUPLE, FLOW_ID].into_iter().filter_map(|kind| Some((kind, attribute(attributes, kind)?.to_vec())));
        Some(Self {
            tuple: Tuple {
                guest: address(1)?,
                guest_port: port(2),
                destination: address(2)?,
                port: port(3),
                protocol: *attribute(transport, 1)?.first()?,
            },
            bytes_sent: bytes(FLOW_COUNTERS_SENT).unwrap_or(0),
            bytes_received: bytes(FLOW_COUNTERS_RECEIVED).unwrap_or(0),
            name: name.collect(),
        })
    }

    /// Makes the kernel forget it: its next packet is judged like that of a new one. One that is gone is skipped.
    pub fn cut(&self) -> io::Result<()> {
        let request = Message::request(DELETE_FLOW, ACKNOWLEDGE, &generic(libc::AF_INET as u8, 0));
        let request = self.name.iter().fold(request, |request, (kind, value)| match *kind {
            FLOW_TUPLE => request.nested(FLOW_TUPLE, value, |message| message),
            kind => request.attribute(kind, value),
        });
        match call(&open(0)?, request, |_| ()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

/// The flows that a sandbox began.
pub(super) fn flows(guest: Ipv4Addr) -> io::Result<Vec<Flow>> {
    // The kernel compares the original source address only: bit 0.
    let request = Message::request(GET_FLOWS, DUMP, &generic(libc::AF_INET as u8, 0))
        .nested(FLOW_FILTER, &[], |filter| filter.attribute(1, &1u32.to_ne_bytes()))
        .nested(FLOW_TUPLE, &[], |tuple| tuple.nested(1, &[], |ip| ip.attribute(1, &guest.octets())));
    let mut found = Vec::new();
    call(&open(0)?, request, |body| {
        found.extend(body.get(GENERIC..).and_then(Flow::parse).filter(|flow| flow.tuple.guest == guest));
    })?;
    Ok(found)
}

/// Sends a request and takes everything that the kernel says to it.
fn call(socket: &OwnedFd, request: Message, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    send(socket, &request.finish(1))?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, _) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())?;
        for message in messages(&buffer[..length]) {
            check(&message)?;
            match message.kind {
                MESSAGE_ERROR | MESSAGE_DONE => return Ok(()),
                _ => take(message.body),
            }
        }
    }
}

/// A socket on which the kernel tells of flows that have ended, with their bytes where it counts them.
pub(super) fn open_flow_ends() -> io::Result<OwnedFd> {
    open(GROUP_FLOW_ENDED)
}

/// A socket on which packets arrive that rules log to this group. `EBUSY` where somebody else has it.
pub(super) fn open_log(group: u16) -> io::Result<OwnedFd> {
    const BIND: u8 = 1;
    const COPY_PACKET: u8 = 2;
    let socket = open(0)?;
    let request = || Message::request(LOG_CONFIGURE, ACKNOWLEDGE, &generic(0, group));
    call(&socket, request().attribute(1, &[BIND]), |_| ())?;
    let mode = [LOG_BYTES.to_be_bytes().as_slice(), &[COPY_PACKET, 0]].concat();
    call(&socket, request().attribute(2, &mode), |_| ())?;
    call(&socket, request().attribute(4, &LOG_DELAY.to_be_bytes()), |_| ())?;
    Ok(socket)
}

/// What arrived on such a socket.
#[derive(Debug, Clone)]
pub(super) enum Event {
    /// The first packet of a flow, and what its rule calls it.
    Packet {
        tuple: Tuple,
        prefix: String,
    },
    Ended(Flow),
}

/// Takes what has arrived; an empty list when nothing has. `ENOBUFS` when more came than fits.
pub(super) fn take_events(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Vec<Event>> {
    let length = match rustix::net::recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
        Ok((length, _)) => length,
        Err(rustix::io::Errno::AGAIN) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let event = |message: Received<'_>| {
        let attributes = message.body.get(GENERIC..)?;
        match message.kind {
            LOG_PACKET => {
                let prefix = attribute(attributes, LOG_PREFIX).unwrap_or_default();
                let prefix = String::from_utf8_lossy(prefix).trim_end_matches('\0').to_owned();
                Some(Event::Packet { tuple: headers(attribute(attributes, LOG_PAYLOAD)?)?, prefix })
            }
            DELETE_FLOW => Flow::parse(attributes).map(Event::Ended),
            _ => None,
        }
    };
    Ok(messages(&buffer[..length]).filter_map(event).collect())
}

/// Where a packet comes from and goes to, by its IPv4 header and what follows.
fn headers(packet: &[u8]) -> Option<Tuple> {
    let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    if packet.first()? >> 4 != 4 {
        return None;
    }
    let length = usize::from(packet[0] & 0xf) * 4;
    let protocol = *packet.get(9)?;
    let has_ports = matches!(
        i32::from(protocol),
        libc::IPPROTO_TCP | libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE | libc::IPPROTO_SCTP
    );
    let port = |at: usize| {
        let bytes = packet.get(at..at + 2).filter(|_| has_ports);
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_be_bytes)
    };
    Some(Tuple {
        guest: address(12)?,
        guest_port: port(length),
        destination: address(16)?,
        port: port(length + 2),
        protocol,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_by_their_headers_however_short() {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 1, 2, 3, 4, 0x1f, 0x90, 0, 80];
        let expected = Tuple {
            guest: Ipv4Addr::new(10, 0, 0, 2),
            guest_port: 8_080,
            destination: Ipv4Addr::new(1, 2, 3, 4),
            port: 80,
            protocol: 6,
        };
        assert_eq!(headers(&packet), Some(expected));
        packet[9] = 1;
        assert_eq!(headers(&packet), Some(Tuple { guest_port: 0, port: 0, protocol: 1, ..expected }));
        for length in 0..20 {
            assert_eq!(headers(&packet[..length]), None, "{length}");
        }
        packet[0] = 0x60;
        assert_eq!(headers(&packet), None);
    }

    #[test]
    fn broken_lists_of_attributes_end() {
        assert_eq!(attributes(&[8, 0, 1, 0, 9, 9, 9, 9, 4, 0, 2, 0]).count(), 2);
        for broken in [&[][..], &[8], &[0, 0, 0, 0], &[3, 0, 1, 0], &[200, 0, 1, 0, 1]] {
            assert_eq!(attributes(broken).count(), 0, "{broken:?}");
        }
        assert_eq!(messages(&[0; 64]).count(), 0);
    }
}
