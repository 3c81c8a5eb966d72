//! Sockets of the sandbox, carried to the server: those that others listen on, and those that the server does. How unix
//! sockets are found and made is here, too; of TCP that is in [`super::tcp`].

use std::collections::HashMap;
use std::ffi::CString;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nagaya_api::error::Code;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, tcp, unix};

use super::failure::Failure;
use super::paths::{Place, Root};
use super::{Agent, blocking};
use crate::frame::Kind;
use crate::messages::{Accept, Arrived, Connect, EndOfContent, Event, Listen, Opened, Outcome, encode, ip_bytes};
use crate::mux::{Incoming, Receiver, Sender, charge};

/// Read from a socket at once.
const CHUNK_BYTES: usize = 32 * 1024;
/// Peers that wait in the kernel until they are accepted.
const BACKLOG: i32 = 64;
/// Between attempts to connect to a socket whose queue is full.
const QUEUE_PAUSE: Duration = Duration::from_millis(20);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection of either kind.
#[derive(Debug)]
pub enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A socket that the server listens on.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// The next peer, and its address if it has one.
    async fn accept(&self) -> std::io::Result<(Connection, Option<SocketAddr>)> {
        match self {
            Self::Unix(listener) => Ok((Connection::Unix(listener.accept().await?.0), None)),
            Self::Tcp(listener) => {
                let (stream, source) = listener.accept().await?;
                Ok((super::tcp::prepare(stream), Some(source)))
            }
        }
    }
}

/// Peers that have connected and were not taken yet, by number.
#[derive(Debug, Default)]
pub struct Peers {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, Connection>>,
}

impl Peers {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.waiting.lock().expect("nothing panics while holding the peers")
    }
}

/// Nobody listens any more, so the text does not matter.
pub fn gone() -> Failure {
    Failure::new(Code::GuestUnreachable, "")
}

async fn tell(sender: &Sender, event: Event) -> Result<(), Failure> {
    sender.message(encode(&event)).await.map_err(|_| gone())
}

/// Connects to a socket and carries its bytes.
pub async fn connect(
    agent: &Arc<Agent>,
    request: Connect,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let root = agent.clone();
    let socket = blocking(move || locate(&root.root, &request.path, &request.allowed)).await?;
    // Whatever has the name now: this is the socket that was looked at.
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let stream = loop {
        match UnixStream::connect(&path).await {
            Ok(stream) => break stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::select! {
                    () = tokio::time::sleep(QUEUE_PAUSE) => {}
                    () = sender.closed() => return Err(gone()),
                }
            }
            Err(error) => return Err(not_connected(&error)),
        }
    };
    drop(socket);
    carry(Connection::Unix(stream), sender, receiver).await
}

fn not_connected(error: &std::io::Error) -> Failure {
    match Errno::from_io_error(error) {
        // Nobody listens, or it is not a socket of streams.
        Some(errno @ (Errno::CONNREFUSED | Errno::PROTOTYPE)) => Failure::with(Code::ConnectionRefused, "", errno),
        Some(errno) => errno.into(),
        None => Failure::new(Code::FileSystem, error.kind().to_string()),
    }
}

/// Finds a socket and checks where it really lies.
fn locate(root: &Root, path: &str, allowed: &[String]) -> Result<OwnedFd, Failure> {
    let file = root.open_path(path, OFlags::PATH)?;
    if !allowed.is_empty() {
        let place = rustix::fs::readlinkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
        let place = place.to_string_lossy();
        if !allowed.iter().any(|allowed| Path::new(&*place).starts_with(allowed)) {
            return Err(Failure::with(Code::PermissionDenied, "the path leads elsewhere", Errno::ACCESS));
        }
    }
    match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
        FileType::Socket => Ok(file),
        _ => Err(Failure::with(Code::ConnectionRefused, "not a socket", Errno::CONNREFUSED)),
    }
}

/// Takes a peer and carries its bytes.
pub async fn accept(
    agent: &Arc<Agent>,
    request: Accept,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let peer = agent.peers.waiting().remove(&request.number);
    carry(peer.ok_or_else(gone)?, sender, receiver).await
}

/// Carries bytes both ways until both sides have sent all, or one of them is gone.
pub async fn carry(connection: Connection, sender: &Sender, receiver: &mut Receiver) -> Result<Outcome, Failure> {
    tell(sender, Event { kind: Opened::default().into() }).await?;
    match connection {
        Connection::Unix(stream) => {
            let (reader, writer) = stream.into_split();
            both_ways(reader, writer, sender, receiver).await
        }
        Connection::Tcp(stream) => {
            let (reader, writer) = stream.into_split();
            both_ways(reader, writer, sender, receiver).await
        }
    }
}

async fn both_ways(
    reader: impl ReadHalf,
    writer: impl AsyncWrite + Unpin,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let mut up = std::pin::pin!(up(reader, sender));
    let taken = {
        let mut down = std::pin::pin!(down(writer, receiver));
        tokio::select! {
            end = &mut up => {
                end?;
                down.await?.map_err(Failure::from)?;
                return Ok(Outcome::default());
            }
            taken = &mut down => taken?,
        }
    };
    match taken {
        // The server may have ended its side because it gives up: the peer need not say anything for that to be noticed.
        Ok(()) => tokio::select! {
            end = up => end?,
            () = sender.closed() => return Err(gone()),
        },
        // A peer that reads no more may still have something to say.
        Err(error) => {
            tokio::select! {
                end = up => end?,
                failure = ignore(receiver) => return Err(failure),
            }
            return Err(error.into());
        }
    }
    Ok(Outcome::default())
}

/// The half of a connection that is read.
trait ReadHalf {
    async fn readable(&self) -> std::io::Result<()>;
    fn try_read_buf(&self, buffer: &mut Vec<u8>) -> std::io::Result<usize>;
}

impl ReadHalf for unix::OwnedReadHalf {
    async fn readable(&self) -> std::io::Result<()> {
        self.readable().await
    }

    fn try_read_buf(&self, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
        self.try_read_buf(buffer)
    }
}

impl ReadHalf for tcp::OwnedReadHalf {
    async fn readable(&self) -> std::io::Result<()> {
        self.readable().await
    }

    fn try_read_buf(&self, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
        self.try_read_buf(buffer)
    }
}

async fn up(reader: impl ReadHalf, sender: &Sender) -> Result<(), Failure> {
    loop {
        reader.readable().await?;
        // Only now, so that a connection in which nothing happens holds no memory.
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        match reader.try_read_buf(&mut chunk) {
            Ok(0) => break,
            Ok(read) if read < CHUNK_BYTES / 8 => chunk = chunk.as_slice().into(),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        }
        sender.data(Kind::Data, chunk.into()).await.map_err(|_| gone())?;
    }
    tell(sender, Event { kind: EndOfContent::default().into() }).await
}

/// Writes what the server sends, to its end. The inner result says whether the peer took it.
async fn down(mut writer: impl AsyncWrite + Unpin, receiver: &mut Receiver) -> Result<std::io::Result<()>, Failure> {
    loop {
        match receiver.next().await {
            Some(Incoming::Data(data)) => {
                let taken = writer.write_all(&data).await;
                receiver.release(charge(data.len()));
                if taken.is_err() {
                    return Ok(taken);
                }
            }
            // Dropping the half is what the peer sees as the end.
            Some(Incoming::End(_)) => return Ok(Ok(())),
            Some(Incoming::Message(_)) => {}
            Some(Incoming::Reset | Incoming::ErrorData(_)) | None => return Err(gone()),
        }
    }
}

/// Lets go of what the server sends, until it gives up.
async fn ignore(receiver: &mut Receiver) -> Failure {
    loop {
        match receiver.next().await {
            Some(Incoming::Data(data)) => receiver.release(charge(data.len())),
            Some(Incoming::Message(_) | Incoming::End(_)) => {}
            Some(Incoming::Reset | Incoming::ErrorData(_)) | None => return gone(),
        }
    }
}

/// Listens on a new socket, and tells of every peer, until the server gives up or is gone.
pub async fn listen(
    agent: &Arc<Agent>,
    request: Listen,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let root = agent.clone();
    let bound = blocking(move || Bound::new(&root.root, &request.path)).await?;
    let listener = Listener::Unix(UnixListener::from_std(bound.socket.try_clone()?.into())?);
    announce(agent, &listener, Opened::default(), sender, receiver).await
}

/// Tells of every peer, until the server gives up or is gone.
pub async fn announce(
    agent: &Agent,
    listener: &Listener,
    opened: Opened,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    tell(sender, Event { kind: opened.into() }).await?;
    let mut numbers = Vec::new();
    let arriving = async {
        loop {
            match listener.accept().await {
                Ok((peer, source)) => {
                    let number = agent.peers.next.fetch_add(1, Ordering::Relaxed) + 1;
                    agent.peers.waiting().insert(number, peer);
                    numbers.push(number);
                    let (ip, port) = source.map(|source| (ip_bytes(source.ip()), source.port())).unwrap_or_default();
                    let arrived = Arrived { number, ip, port: port.into() };
                    if tell(sender, Event { kind: arrived.into() }).await.is_err() {
                        return;
                    }
                    numbers.retain(|number| agent.peers.waiting().contains_key(number));
                }
                // Out of descriptors or memory for a moment.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    };
    tokio::select! {
        () = arriving => {}
        () = given_up(receiver) => {}
    }
    agent.peers.waiting().retain(|number, _| !numbers.contains(number));
    Ok(Outcome::default())
}

async fn given_up(receiver: &mut Receiver) {
    while let Some(Incoming::Message(_) | Incoming::Data(_)) = receiver.next().await {}
}

/// A socket file, which goes when this does.
struct Bound {
    socket: OwnedFd,
    place: Place,
    status: Stat,
}

impl Bound {
    fn new(root: &Root, path: &str) -> Result<Self, Failure> {
        let refused = |errno: Errno| Failure::with(Code::BindFailed, std::io::Error::from(errno).to_string(), errno);
        if !path.starts_with('/') {
            return Err(refused(Errno::INVAL));
        }
        let place = root.place(path)?.filter(|place| !place.directory_meant).ok_or_else(|| refused(Errno::ISDIR))?;
        let bind = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // The file gets the socket's mode, so nobody else can connect even for a moment.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            let mut path = format!("/proc/self/fd/{}/", place.directory.as_raw_fd()).into_bytes();
            path.extend_from_slice(place.name.as_bytes());
            rustix::net::bind(&socket, &SocketAddrUnix::new(CString::new(path).map_err(|_| Errno::INVAL)?)?)?;
            Ok(socket)
        };
        let socket = bind().map_err(refused)?;
        let status = rustix::fs::statat(&place.directory, &place.name, AtFlags::SYMLINK_NOFOLLOW)?;
        let bound = Self { socket, place, status };
        bound.hand_over(root.owner)?;
        rustix::net::listen(&bound.socket, BACKLOG).map_err(refused)?;
        Ok(bound)
    }

    /// Makes the file the user's, unless somebody has put something else in its place.
    fn hand_over(&self, (user, group): (Uid, Gid)) -> Result<(), Failure> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.place.directory, &self.place.name, flags, Mode::empty())?;
        let status = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::Socket || !self.is(&status) {
            return Err(Failure::with(Code::BindFailed, "somebody replaced the socket", Errno::BUSY));
        }
        Ok(rustix::fs::chownat(file.as_fd(), c"", Some(user), Some(group), AtFlags::EMPTY_PATH)?)
    }

    fn is(&self, status: &Stat) -> bool {
        (status.st_dev, status.st_ino) == (self.status.st_dev, self.status.st_ino)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let Place { directory, name, .. } = &self.place;
        if rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|status| self.is(&status)) {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
    }
}
