//! The few rtnetlink requests that a network slot needs, on a blocking socket.
//!
//! A slot is made of twelve requests; each is one message out and one acknowledgement in.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const REQUEST: u16 = 0x1;
pub const ACKNOWLEDGE: u16 = 0x4;
const EXCLUSIVE: u16 = 0x200;
pub const CREATE: u16 = 0x400;
pub const MESSAGE_ERROR: u16 = 2;

/// The index that a sandbox's side of its link gets; 1 is the loopback device.
pub const GUEST_LINK: u32 = 2;
pub const LOOPBACK: u32 = 1;

const NESTED: u16 = 0x8000;
const LINK_INFO_PEER: u16 = 1;

/// A socket on the network namespace of the thread that opened it, for good.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// A netlink message being built: header, fixed part, attributes.
pub struct Message(Vec<u8>);

impl Message {
    /// A request that the kernel acknowledges.
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self::request(kind, ACKNOWLEDGE | flags, fixed)
    }

    pub fn request(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub fn nested(mut self, kind: u16, fixed: &[u8], fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        self.0[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        self.0.extend_from_slice(fixed);
        let mut filled = fill(self);
        let length = (filled.0.len() - start) as u16;
        filled.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    /// Its bytes, with the number that answers to it bear.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// `struct ifinfomsg`.
fn link_header(index: u32, up: bool) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        header[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        header[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    }
    header
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes a pair of linked devices: `name` here, up; `eth0` with index [`GUEST_LINK`] there, down.
    /// `here` and `there` are their hardware addresses.
    pub fn add_pair(&mut self, name: &str, here: [u8; 6], there: [u8; 6], namespace: BorrowedFd<'_>) -> io::Result<()> {
        let message = Message::new(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, &link_header(0, true))
            .attribute(libc::IFLA_IFNAME, &text(name))
            .attribute(libc::IFLA_ADDRESS, &here)
            .nested(libc::IFLA_LINKINFO, &[], |info| {
                info.attribute(libc::IFLA_INFO_KIND, b"veth").nested(libc::IFLA_INFO_DATA, &[], |data| {
                    data.nested(LINK_INFO_PEER, &link_header(GUEST_LINK, false), |peer| {
                        peer.attribute(libc::IFLA_IFNAME, &text("eth0"))
                            .attribute(libc::IFLA_ADDRESS, &there)
                            .attribute(libc::IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes())
                    })
                })
            });
        self.call(message)
    }

    pub fn set_up(&mut self, link: u32) -> io::Result<()> {
        self.call(Message::new(libc::RTM_NEWLINK, 0, &link_header(link, true)))
    }

    /// Gives a device an address without a subnet.
    pub fn add_address(&mut self, link: u32, address: Ipv4Addr) -> io::Result<()> {
        let mut header = [libc::AF_INET as u8, 32, 0, 0, 0, 0, 0, 0];
        header[4..8].copy_from_slice(&link.to_ne_bytes());
        self.call(
            Message::new(libc::RTM_NEWADDR, CREATE | EXCLUSIVE, &header)
                .attribute(libc::IFA_LOCAL, &address.octets())
                .attribute(libc::IFA_ADDRESS, &address.octets()),
        )
    }

    /// Says for good which hardware address a neighbour has. The kernel neither asks for it nor counts it.
    pub fn add_neighbour(&mut self, link: u32, address: Ipv4Addr, hardware: [u8; 6]) -> io::Result<()> {
        // `struct ndmsg`.
        let mut header = [0; 12];
        header[0] = libc::AF_INET as u8;
        header[4..8].copy_from_slice(&link.to_ne_bytes());
        header[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        self.call(
            Message::new(libc::RTM_NEWNEIGH, CREATE | EXCLUSIVE, &header)
                .attribute(libc::NDA_DST, &address.octets())
                .attribute(libc::NDA_LLADDR, &hardware),
        )
    }

    /// Routes one address to a device.
    pub fn add_host_route(&mut self, link: u32, address: Ipv4Addr) -> io::Result<()> {
        self.call(
            Message::new(libc::RTM_NEWROUTE, CREATE | EXCLUSIVE, &route_header(32, libc::RT_SCOPE_LINK))
                .attribute(libc::RTA_DST, &address.octets())
                .attribute(libc::RTA_OIF, &link.to_ne_bytes()),
        )
    }

    /// Routes everything else through a gateway.
    pub fn add_default_route(&mut self, link: u32, gateway: Ipv4Addr) -> io::Result<()> {
        self.call(
            Message::new(libc::RTM_NEWROUTE, CREATE | EXCLUSIVE, &route_header(0, libc::RT_SCOPE_UNIVERSE))
                .attribute(libc::RTA_GATEWAY, &gateway.octets())
                .attribute(libc::RTA_OIF, &link.to_ne_bytes()),
        )
    }

    fn call(&mut self, message: Message) -> io::Result<()> {
        self.sequence += 1;
        let message = message.finish(self.sequence);
        rustix::net::sendto(self.socket.as_fd(), &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = [0; 4096];
        let (length, _) = rustix::net::recv(self.socket.as_fd(), &mut answer[..], RecvFlags::empty())?;
        let field = |at: usize| answer[at..at + 4].try_into().map(u32::from_ne_bytes).unwrap_or_default();
        if length < 20 || field(8) != self.sequence || u16::from_ne_bytes([answer[4], answer[5]]) != MESSAGE_ERROR {
            return Err(io::Error::other("netlink gave an answer to another question"));
        }
        match field(16) as i32 {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        }
    }
}

/// `struct rtmsg` for a unicast route of the main table.
fn route_header(prefix: u8, scope: u8) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = libc::AF_INET as u8;
    header[1] = prefix;
    header[4] = libc::RT_TABLE_MAIN;
    header[5] = libc::RTPROT_STATIC;
    header[6] = scope;
    header[7] = libc::RTN_UNICAST;
    header
}
