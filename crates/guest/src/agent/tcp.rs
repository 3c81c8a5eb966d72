//! TCP sockets in the sandbox's network, for a server that cannot make them there itself.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nagaya_api::error::Code;
use rustix::io::Errno;
use tokio::net::{TcpSocket, TcpStream};

use super::Agent;
use super::failure::Failure;
use super::sockets::{Connection, Listener, announce, carry, gone};
use crate::messages::{ConnectTcp, ListenTcp, Opened, Outcome, socket_address};
use crate::mux::{Receiver, Sender};

/// Peers that wait in the kernel until they are accepted.
const BACKLOG: u32 = 128;

/// Connects to a port and carries its bytes.
pub async fn connect(request: ConnectTcp, sender: &Sender, receiver: &mut Receiver) -> Result<Outcome, Failure> {
    let address = address(&request.ip, request.port)?;
    let connecting = async {
        let stream = socket(address.ip())?.connect(address).await?;
        // A port that the kernel gives to clients may be given to this very one, which then meets itself.
        match stream.local_addr()? == stream.peer_addr()? {
            true => Err(Errno::CONNREFUSED.into()),
            false => Ok(stream),
        }
    };
    let stream = tokio::select! {
        stream = connecting => stream.map_err(|error| refusal(&error, Code::GuestUnreachable))?,
        () = sender.closed() => return Err(gone()),
    };
    carry(prepare(stream), sender, receiver).await
}

/// Listens on a port, and tells of every peer, until the server gives up or is gone.
pub async fn listen(
    agent: &Arc<Agent>,
    request: ListenTcp,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let address = address(&request.ip, request.port)?;
    let bind = || {
        let socket = socket(address.ip())?;
        // A tunnel that is opened again gets its port back while old connections fade.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    };
    let (listener, port) = bind().map_err(|error| refusal(&error, Code::BindFailed))?;
    let opened = Opened { port: port.into(), ..Opened::default() };
    announce(agent, &Listener::Tcp(listener), opened, sender, receiver).await
}

fn address(ip: &[u8], port: u32) -> Result<SocketAddr, Failure> {
    socket_address(ip, port).ok_or_else(|| Failure::new(Code::InvalidArgument, "no address and port of TCP"))
}

fn socket(ip: IpAddr) -> std::io::Result<TcpSocket> {
    match ip {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    }
}

/// A new connection, as all of them are.
pub fn prepare(stream: TcpStream) -> Connection {
    // What is written is waited for; bulk data fills packets by itself.
    let _ = stream.set_nodelay(true);
    // No path to probe leads to it, which the kernel's choice may do at a price for each packet.
    let _ = rustix::net::sockopt::set_tcp_congestion(&stream, "reno");
    Connection::Tcp(stream)
}

/// What an error of the sandbox's network means; `otherwise` where it has no meaning of its own.
fn refusal(error: &std::io::Error, otherwise: Code) -> Failure {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
            Failure::new(Code::CapacityUnavailable, "sockets of the sandbox")
        }
        Some(errno) => {
            let code = if errno == Errno::CONNREFUSED { Code::ConnectionRefused } else { otherwise };
            Failure::with(code, std::io::Error::from(errno).to_string(), errno)
        }
        None => Failure::new(otherwise, error.kind().to_string()),
    }
}
