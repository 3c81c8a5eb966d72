//! Sockets in a sandbox's network, made by the server itself, where sandboxes share its kernel.
//!
//! A socket belongs to the network namespace in which it was made, whoever uses it. So the server enters the
//! sandbox's namespace for the moment of making one and then has a socket of its own there: bytes take no
//! detour, and nobody in the sandbox holds the other end of a descriptor that the server trusts. A socket also keeps
//! its namespace alive; that is why none may outlive the connection to the sandbox's agent.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_engine::ports::{Accepted, GuestError, Listener};
use nagaya_guest::mux::Mux;
use rustix::io::Errno;
use rustix::net::Shutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;

use super::{Link, guest_error};
use crate::sys;

/// Peers that wait in the sandbox's kernel until they are accepted.
const BACKLOG: u32 = 128;
/// Between the end of a sandbox and the closing of sockets that their users do not look at.
const CUT_GRACE: Duration = Duration::from_millis(500);
/// After a failed accept, e.g. because no descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The sandbox's first process, by which its network is found, and what was made there.
#[derive(Debug)]
pub(super) struct Network {
    process: OwnedFd,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    sockets: Vec<Weak<Mutex<State>>>,
    /// The sandbox has ended.
    over: bool,
}

impl Network {
    pub(super) fn new(process: OwnedFd) -> Self {
        Self { process, open: Mutex::default() }
    }

    fn socket(&self, ip: IpAddr) -> io::Result<TcpSocket> {
        sys::in_network_namespace(self.process.as_fd(), || match ip {
            IpAddr::V4(_) => TcpSocket::new_v4(),
            IpAddr::V6(_) => TcpSocket::new_v6(),
        })
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().expect("nothing panics while holding the list of sockets")
    }

    /// Takes a connected socket into the list of those that end with the sandbox.
    fn keep(&self, stream: TcpStream) -> Stream {
        // What is written is waited for; bulk data fills packets by itself.
        let _ = stream.set_nodelay(true);
        // No path to probe leads to it, which the host's choice may do at a price for each packet.
        let _ = rustix::net::sockopt::set_tcp_congestion(&stream, "reno");
        let mut open = self.open();
        let stream = Stream(Arc::new(Mutex::new(State { stream: Some(stream), cut: open.over })));
        if open.sockets.len() == open.sockets.capacity() {
            open.sockets.retain(|socket| socket.strong_count() > 0);
        }
        open.sockets.push(Arc::downgrade(&stream.0));
        stream
    }

    /// Ends all connections, now and later, when the one to the agent has ended.
    pub(super) async fn cut_with(&self, mux: Mux) {
        mux.closed().await;
        let sockets = {
            let mut open = self.open();
            open.over = true;
            std::mem::take(&mut open.sockets)
        };
        for socket in sockets.iter().filter_map(Weak::upgrade) {
            let mut state = lock(&socket);
            state.cut = true;
            // Wakes whoever waits for it, who then lets go of it.
            if let Some(stream) = &state.stream {
                let _ = rustix::net::shutdown(stream, Shutdown::Both);
            }
        }
        tokio::time::sleep(CUT_GRACE).await;
        for socket in sockets.iter().filter_map(Weak::upgrade) {
            lock(&socket).stream = None;
        }
    }
}

pub(super) async fn connect(network: &Network, address: SocketAddr) -> Result<Stream, GuestError> {
    let connecting = async {
        let stream = network.socket(address.ip())?.connect(address).await?;
        // A port that the kernel gives to clients may be given to this very one, which then meets itself.
        match stream.local_addr()? == stream.peer_addr()? {
            true => Err(Errno::CONNREFUSED.into()),
            false => Ok(stream),
        }
    };
    Ok(network.keep(connecting.await.map_err(|error| refusal(&error, Code::GuestUnreachable))?))
}

/// What an error of the sandbox's network means; `otherwise` where it has no meaning of its own.
fn refusal(error: &io::Error, otherwise: Code) -> GuestError {
    let errno = Errno::from_io_error(error);
    let code = match errno {
        Some(Errno::CONNREFUSED) => Code::ConnectionRefused,
        // The process that the namespace was named by has ended.
        Some(Errno::SRCH) => Code::GuestUnreachable,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
            return guest_error(Code::CapacityUnavailable, "sockets of the server");
        }
        _ => otherwise,
    };
    let detail = errno.map_or_else(|| error.kind().to_string(), |errno| io::Error::from(errno).to_string());
    GuestError { code, detail, errno: errno.map_or(0, Errno::raw_os_error) }
}

pub(super) async fn listen(link: &Link, network: &Arc<Network>, address: SocketAddr) -> Result<Listener, GuestError> {
    let bound = || -> io::Result<(TcpListener, u16)> {
        let socket = network.socket(address.ip())?;
        // A tunnel that is opened again gets its port back while old connections fade.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    };
    let (listener, port) = bound().map_err(|error| refusal(&error, Code::BindFailed))?;
    let (accepted, incoming) = mpsc::channel(1);
    let (mux, network) = (link.mux.clone(), network.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, &network, &accepted) => {}
            () = accepted.closed() => {}
            _ = mux.closed() => {}
        }
    });
    Ok(Listener { port, incoming })
}

async fn accept(listener: TcpListener, network: &Network, accepted: &mpsc::Sender<Accepted>) {
    // Nobody is accepted before somebody takes it: peers wait in the sandbox.
    while let Ok(place) = accepted.reserve().await {
        match listener.accept().await {
            Ok((stream, source)) => {
                let source = SocketAddr::new(source.ip().to_canonical(), source.port()).to_string();
                place.send(Accepted { stream: Box::new(network.keep(stream)), source });
            }
            Err(error) => {
                tracing::debug!(%error, "failed to accept a connection in a sandbox");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection in a sandbox. It ends when the sandbox does, even while nobody looks at it.
#[derive(Debug)]
pub(super) struct Stream(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// `None` once it has been cut.
    stream: Option<TcpStream>,
    /// The sandbox has ended.
    cut: bool,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("nothing panics while holding a socket")
}

impl Stream {
    fn poll<T>(&self, work: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let mut state = lock(&self.0);
        if state.cut {
            state.stream = None;
        }
        match &mut state.stream {
            Some(stream) => work(Pin::new(stream)),
            None => Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, "the sandbox has ended"))),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(|stream| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(|stream| stream.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_shutdown(context))
    }
}
