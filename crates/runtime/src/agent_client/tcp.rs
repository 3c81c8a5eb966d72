//! TCP ports of the sandbox: through sockets of the server's own where it can make them there, else through the agent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_engine::ports::{BoxStream, GuestError, Listener};
use rustix::io::Errno;

use super::{Link, guest_error, sockets, streams};

/// How long connecting may take. Within one machine only a full queue of the service makes it take long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a sandbox calls itself.
pub(super) const LOOPBACK: &[IpAddr] = &[IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Connects to a port of the first of the sandbox's addresses that does not refuse it.
pub(super) async fn connect(link: &Link, addresses: &[IpAddr], port: u16) -> Result<BoxStream, GuestError> {
    let connecting = async {
        let mut first = None;
        for ip in addresses {
            match connect_to(link, SocketAddr::new(*ip, port)).await {
                // Where there is no such address, or nothing either, the first refusal tells more.
                Err(error) if first.is_some() || error.code == Code::ConnectionRefused => {
                    first.get_or_insert(error);
                }
                other => return other,
            }
        }
        Err(first.unwrap_or_else(|| guest_error(Code::GuestUnreachable, "no address")))
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_| Err(timed_out()))
}

async fn connect_to(link: &Link, address: SocketAddr) -> Result<BoxStream, GuestError> {
    match link.network.get() {
        Some(network) => Ok(Box::new(sockets::connect(network, address).await?)),
        None => Ok(Box::new(streams::connect_tcp(link, address).await?)),
    }
}

/// Listens in the sandbox until the listener is dropped or the sandbox ends.
pub(super) async fn listen(link: &Link, address: SocketAddr) -> Result<Listener, GuestError> {
    match link.network.get() {
        Some(network) => sockets::listen(link, network, address).await,
        None => streams::listen_tcp(link, address).await,
    }
}

pub(super) fn timed_out() -> GuestError {
    let detail = "connecting in the sandbox took too long".into();
    GuestError { code: Code::DeadlineExceeded, detail, errno: Errno::TIMEDOUT.raw_os_error() }
}
