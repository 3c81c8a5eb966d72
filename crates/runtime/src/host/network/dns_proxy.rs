//! The name server of restricted sandboxes, and the watch on what the rules log: one thread, so that no
//! flood of questions takes time from anything else.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use domain::base::iana::Rcode;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::dns_message::{self, Answer, Question, Received, UDP_BYTES_MAX};
use super::egress_policy::{EgressPolicy, Refusal};
use super::netfilter::{self, Event};
use super::rules;
use crate::sys;

/// Questions under way: in all, and of one sandbox.
const QUESTIONS_MAX: usize = 512;
const QUESTIONS_PER_SANDBOX_MAX: usize = 32;
/// Connections for questions: in all, and of one sandbox.
const CONNECTIONS_MAX: usize = 256;
const CONNECTIONS_PER_SANDBOX_MAX: usize = 8;
/// How long a connection may be silent.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// How long the name server may take, attempt by attempt.
const ATTEMPTS: [Duration; 3] =
    [Duration::from_millis(1_000), Duration::from_millis(1_500), Duration::from_millis(2_000)];
/// The longest answer that is taken from the name server.
const ANSWER_BYTES_MAX: usize = 16 << 10;
/// Packets that are no answer to the question, before an attempt is given up.
const STRANGERS_MAX: usize = 64;

/// Sockets for questions, on one port.
pub(super) struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
    pub port: u16,
}

impl Sockets {
    /// Binds to an address that the host need not have yet. The rules know the sockets by their mark.
    pub fn bind(address: Ipv4Addr, mark: u32) -> io::Result<Self> {
        let open = |kind, port| {
            let socket = rustix::net::socket_with(
                AddressFamily::INET,
                kind,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )?;
            rustix::net::sockopt::set_ip_freebind(&socket, true)?;
            sys::set_socket_mark(socket.as_fd(), mark)?;
            rustix::net::bind(&socket, &SocketAddr::from((address, port)))?;
            Ok::<OwnedFd, io::Error>(socket)
        };
        let mut attempts_left = 16;
        loop {
            let udp = UdpSocket::from(open(SocketType::DGRAM, 0)?);
            let port = udp.local_addr()?.port();
            match open(SocketType::STREAM, port) {
                Ok(tcp) => {
                    rustix::net::listen(&tcp, 128)?;
                    return Ok(Self { udp, tcp: TcpListener::from(tcp), port });
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempts_left > 0 => attempts_left -= 1,
                Err(error) => return Err(error),
            }
        }
    }
}

/// The running thread; dropping it ends it.
pub(super) struct DnsProxy {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl DnsProxy {
    /// `upstream` answers what sandboxes may ask; without one, nothing can be answered. `watched` sockets bring events.
    pub fn start(
        sockets: Sockets,
        upstream: Option<SocketAddr>,
        destinations: Arc<EgressPolicy>,
        watched: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let server = Arc::new(Server {
            upstream,
            destinations,
            questions: Gate::new(QUESTIONS_MAX, QUESTIONS_PER_SANDBOX_MAX),
            connections: Gate::new(CONNECTIONS_MAX, CONNECTIONS_PER_SANDBOX_MAX),
        });
        let work = move || {
            runtime.block_on(async move {
                tokio::select! {
                    _ = stopped => {}
                    result = server.serve(sockets, watched) => {
                        let error = result.err().map(|error| error.to_string()).unwrap_or_default();
                        tracing::error!(error, "names do not resolve any more in sandboxes with allowed destinations");
                    }
                }
            });
        };
        let thread = std::thread::Builder::new().name("names".into()).spawn(work)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for DnsProxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Lets in a number in all, and of each sandbox.
struct Gate {
    all: Arc<Semaphore>,
    each_max: usize,
    inside: Arc<Mutex<HashMap<Ipv4Addr, usize>>>,
}

struct Pass {
    guest: Ipv4Addr,
    inside: Arc<Mutex<HashMap<Ipv4Addr, usize>>>,
    _one: tokio::sync::OwnedSemaphorePermit,
}

impl Gate {
    fn new(all: usize, each_max: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), each_max, inside: Arc::default() }
    }

    fn enter(&self, guest: Ipv4Addr) -> Option<Pass> {
        let one = self.all.clone().try_acquire_owned().ok()?;
        let mut inside = self.inside.lock().expect("counting does not panic");
        let count = inside.entry(guest).or_default();
        if *count == self.each_max {
            return None;
        }
        *count += 1;
        Some(Pass { guest, inside: self.inside.clone(), _one: one })
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut inside = self.inside.lock().expect("counting does not panic");
        if let Some(count) = inside.get_mut(&self.guest) {
            *count -= 1;
            if *count == 0 {
                inside.remove(&self.guest);
            }
        }
    }
}

struct Server {
    upstream: Option<SocketAddr>,
    destinations: Arc<EgressPolicy>,
    questions: Gate,
    connections: Gate,
}

impl Server {
    async fn serve(self: Arc<Self>, sockets: Sockets, watched: Vec<OwnedFd>) -> io::Result<()> {
        let udp = Arc::new(tokio::net::UdpSocket::from_std(sockets.udp)?);
        let tcp = tokio::net::TcpListener::from_std(sockets.tcp)?;
        for socket in watched {
            tokio::spawn(watch(socket, self.destinations.clone()));
        }
        tokio::spawn(self.clone().accept(tcp));
        let mut buffer = vec![0; UDP_BYTES_MAX + 1];
        loop {
            // Errors are of single packets: one that could not be delivered is told at the next call.
            let Ok((length, from)) = udp.recv_from(&mut buffer).await else { continue };
            let IpAddr::V4(guest) = from.ip() else { continue };
            // Who asks too much is not answered, and asks again.
            let Some(pass) = self.questions.enter(guest).filter(|_| length <= UDP_BYTES_MAX) else { continue };
            let (server, udp, question) = (self.clone(), udp.clone(), buffer[..length].to_vec());
            tokio::spawn(async move {
                if let Some(answer) = server.answer(guest, &question, true).await {
                    let _ = udp.send_to(&answer, from).await;
                }
                drop(pass);
            });
        }
    }

    async fn accept(self: Arc<Self>, listener: tokio::net::TcpListener) {
        loop {
            let Ok((stream, from)) = listener.accept().await else {
                // Out of descriptors: those who are being served give some back.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let IpAddr::V4(guest) = from.ip() else { continue };
            let Some(pass) = self.connections.enter(guest) else { continue };
            let server = self.clone();
            tokio::spawn(async move {
                let _ = server.converse(guest, stream).await;
                drop(pass);
            });
        }
    }

    /// Answers one question after another, each with its length before it.
    async fn converse(&self, guest: Ipv4Addr, mut stream: tokio::net::TcpStream) -> io::Result<()> {
        loop {
            let question = timeout(IDLE_MAX, read_framed(&mut stream, UDP_BYTES_MAX)).await??;
            let Some(_pass) = self.questions.enter(guest) else { return Ok(()) };
            let Some(answer) = self.answer(guest, &question, false).await else { return Ok(()) };
            timeout(IDLE_MAX, write_framed(&mut stream, &answer)).await??;
        }
    }

    async fn answer(&self, guest: Ipv4Addr, bytes: &[u8], udp: bool) -> Option<Vec<u8>> {
        let question = match dns_message::read(bytes) {
            Received::Question(question) => question,
            Received::Refused(answer) => return Some(answer),
            Received::Nothing => return None,
        };
        if !self.destinations.may_ask(guest, &question.name) {
            return Some(question.answer(Rcode::REFUSED));
        }
        if question.is_of_no_use() {
            return Some(question.answer(Rcode::NOERROR));
        }
        let Some(answer) = self.ask(&question).await.filter(Answer::is_of_the_name) else {
            return Some(question.answer(Rcode::SERVFAIL));
        };
        if question.asks_for_addresses() {
            let Some(addresses) = answer.addresses() else { return Some(question.answer(Rcode::SERVFAIL)) };
            match self.destinations.resolved(guest, &question.name, &addresses) {
                Ok(()) => {}
                Err(Refusal::NotAllowed | Refusal::LeadsInside) => return Some(question.answer(Rcode::REFUSED)),
                Err(Refusal::TooMany | Refusal::Failed) => return Some(question.answer(Rcode::SERVFAIL)),
            }
        }
        Some(question.answer_with(&answer, udp))
    }

    /// Asks the name server; `None` when it does not answer in time, or not in a way that can be read.
    async fn ask(&self, question: &Question) -> Option<Answer> {
        let upstream = self.upstream?;
        for wait in ATTEMPTS {
            let sent = question.for_upstream(random_id()?)?;
            match timeout(wait, ask_by_packet(upstream, &sent)).await {
                Ok(Ok(answer)) if answer.is_truncated() => {
                    let whole = timeout(wait, ask_by_connection(upstream, &sent)).await;
                    return whole.ok()?.ok();
                }
                Ok(Ok(answer)) => return Some(answer),
                // Nothing listens there, at this moment.
                Ok(Err(_)) => tokio::time::sleep(wait / 4).await,
                Err(_) => {}
            }
        }
        None
    }
}

/// A number that nobody can guess; the port is another one, chosen by the kernel.
fn random_id() -> Option<u16> {
    let mut bytes = [0; 2];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).ok()?;
    Some(u16::from_ne_bytes(bytes))
}

fn unreadable() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the name server gave no answer to the question")
}

async fn ask_by_packet(upstream: SocketAddr, sent: &[u8]) -> io::Result<Answer> {
    let any: SocketAddr = if upstream.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = tokio::net::UdpSocket::bind(any).await?;
    // From then on the kernel takes packets of this peer only.
    socket.connect(upstream).await?;
    socket.send(sent).await?;
    let mut buffer = vec![0; 4_096];
    for _ in 0..STRANGERS_MAX {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = Answer::read(&buffer[..length], sent) {
            return Ok(answer);
        }
    }
    Err(unreadable())
}

async fn ask_by_connection(upstream: SocketAddr, sent: &[u8]) -> io::Result<Answer> {
    let mut stream = tokio::net::TcpStream::connect(upstream).await?;
    write_framed(&mut stream, sent).await?;
    let bytes = read_framed(&mut stream, ANSWER_BYTES_MAX).await?;
    Answer::read(&bytes, sent).ok_or_else(unreadable)
}

async fn read_framed(stream: &mut tokio::net::TcpStream, bytes_max: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn write_framed(stream: &mut tokio::net::TcpStream, bytes: &[u8]) -> io::Result<()> {
    let length = u16::try_from(bytes.len()).map_err(|_| io::Error::other("a message is too long"))?;
    stream.write_all(&[length.to_be_bytes().as_slice(), bytes].concat()).await
}

/// Writes down what happens on a socket of the packet filter, for as long as it works.
async fn watch(socket: OwnedFd, destinations: Arc<EgressPolicy>) {
    let mut buffer = vec![0; 64 << 10];
    let watched = match sys::wait_readable(socket) {
        Ok(watched) => watched,
        Err(error) => {
            tracing::warn!(%error, "connections of sandboxes are not written down");
            return;
        }
    };
    loop {
        let Ok(mut ready) = watched.readable().await else { return };
        match netfilter::take_events(watched.get_ref(), &mut buffer) {
            Ok(events) if events.is_empty() => ready.clear_ready(),
            Ok(events) => events.into_iter().for_each(|event| match event {
                Event::Packet { tuple, prefix } => destinations.saw(tuple, rules::reason(&prefix)),
                Event::Ended(flow) => destinations.ended(&flow),
            }),
            // More came than was taken in time; what is lost is lost.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => {
                tracing::warn!(%error, "connections of sandboxes are not written down any more");
                return;
            }
        }
        // Others of this thread have their turn.
        tokio::task::yield_now().await;
    }
}
