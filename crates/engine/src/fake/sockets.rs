//! What can be reached in a fake sandbox: whatever [`crate::ports::Guest::listen`] listens to, and an echo on TCP
//! port 7 and on `echo.sock` in the user's home. There are no symbolic links in a fake.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::task::{Context, Poll};

use nagaya_api::error::Code;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::{mpsc, watch};

use super::guest::refuse;
use crate::ports::{Accepted, Address, Bind, BoxFuture, BoxStream, GuestError, Listener};

/// What the echo listens on.
const ECHO_PORT: u16 = 7;
/// Bytes under way in each direction.
const PIPE_BYTES: usize = 64 * 1024;
/// Ports that the system chooses.
const FIRST_FREE_PORT: u16 = 32_768;

const EINVAL: i32 = 22;
const EACCES: i32 = 13;
const EADDRINUSE: i32 = 98;
const ECONNREFUSED: i32 = 111;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Port(u16),
    Path(String),
}

pub(super) struct Sockets {
    echo_path: String,
    listening: Mutex<BTreeMap<Place, mpsc::Sender<Accepted>>>,
    /// Counts the ports given to clients.
    peers: AtomicU16,
}

type Death = watch::Receiver<Option<String>>;

impl Sockets {
    pub(super) fn of_user(home: &str) -> Self {
        Self { echo_path: format!("{home}/echo.sock"), listening: Mutex::default(), peers: AtomicU16::default() }
    }

    fn listening(&self) -> MutexGuard<'_, BTreeMap<Place, mpsc::Sender<Accepted>>> {
        self.listening.lock().expect("no holder of this lock panics")
    }

    pub(super) async fn connect(&self, address: &Address, death: Death) -> Result<BoxStream, GuestError> {
        let place = match address {
            Address::Tcp { port } | Address::Ip { port, .. } => Place::Port(*port),
            Address::Unix { path } => Place::Path(path.clone()),
            Address::UnixWithin { path, allowed } => {
                let within = |allowed: &String| {
                    path.strip_prefix(allowed.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                };
                if !allowed.iter().any(within) {
                    return refuse(Code::PermissionDenied, EACCES);
                }
                Place::Path(path.clone())
            }
        };
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        if place == Place::Port(ECHO_PORT) || place == Place::Path(self.echo_path.clone()) {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(theirs);
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
            });
            return Ok(Mortal::boxed(ours, death));
        }
        let listener = self.listening().get(&place).cloned();
        let Some(listener) = listener else { return refuse(Code::ConnectionRefused, ECONNREFUSED) };
        let source = match place {
            Place::Port(_) => {
                format!("127.0.0.1:{}", FIRST_FREE_PORT + self.peers.fetch_add(1, Ordering::Relaxed) % 1_024)
            }
            Place::Path(_) => String::new(),
        };
        let accepted = Accepted { stream: Mortal::boxed(theirs, death.clone()), source };
        match listener.send(accepted).await {
            Ok(()) => Ok(Mortal::boxed(ours, death)),
            Err(_) => refuse(Code::ConnectionRefused, ECONNREFUSED),
        }
    }

    pub(super) fn listen(&self, bind: &Bind, mut death: Death) -> Result<Listener, GuestError> {
        let mut listening = self.listening();
        listening.retain(|_, listener| !listener.is_closed());
        let place = match bind {
            Bind::Tcp { port: 0, .. } => {
                let free = (FIRST_FREE_PORT..).find(|port| !listening.contains_key(&Place::Port(*port)));
                Place::Port(free.expect("nobody listens on all of them"))
            }
            Bind::Tcp { port, .. } => Place::Port(*port),
            Bind::Unix { path } if path.starts_with('/') => Place::Path(path.clone()),
            Bind::Unix { .. } => return refuse(Code::BindFailed, EINVAL),
        };
        if listening.contains_key(&place) || place == Place::Port(ECHO_PORT) {
            return refuse(Code::BindFailed, EADDRINUSE);
        }
        let (sender, mut accepted) = mpsc::channel(1);
        let (taken, incoming) = mpsc::channel(1);
        let port = if let Place::Port(port) = &place { *port } else { 0 };
        listening.insert(place, sender);
        tokio::spawn(async move {
            loop {
                let peer = tokio::select! {
                    peer = accepted.recv() => peer,
                    () = taken.closed() => return,
                    _ = death.wait_for(Option::is_some) => return,
                };
                let Some(peer) = peer else { return };
                if taken.send(peer).await.is_err() {
                    return;
                }
            }
        });
        Ok(Listener { port, incoming })
    }
}

/// A stream that ends with its sandbox.
struct Mortal {
    stream: DuplexStream,
    /// For those who read and for those who write; `None` after the death.
    death: [Option<BoxFuture<()>>; 2],
}

impl Mortal {
    fn boxed(stream: DuplexStream, death: Death) -> BoxStream {
        let wait = |mut death: Death| -> Option<BoxFuture<()>> {
            Some(Box::pin(async move { drop(death.wait_for(Option::is_some).await) }))
        };
        Box::new(Self { stream, death: [wait(death.clone()), wait(death)] })
    }

    fn check(&mut self, side: usize, context: &mut Context<'_>) -> io::Result<()> {
        if let Some(death) = &mut self.death[side]
            && death.as_mut().poll(context).is_pending()
        {
            return Ok(());
        }
        self.death[side] = None;
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

impl AsyncRead for Mortal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(0, context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Mortal {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(1, context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
