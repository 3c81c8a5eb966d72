//! The SSH server of every sandbox.
//!
//! It speaks SSH itself and reaches into sandboxes through the engine's `Guest`, so that no sandbox needs a server of
//! its own, nor keys, nor an address. Clients come through a WebSocket of the API, where a key of the API was shown
//! already, or to a listener of SSH's own, where the certificate is all there is. See docs/decisions/0010.

mod abortable;
mod authority;
mod channels;
mod connection;
mod forward;
mod inbound;
mod login;
mod process;
mod websocket;

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;
use nagaya_engine::{Caller, Engine, SshSession};
use russh::keys::{Certificate, HashAlg, PrivateKey};
use russh::{Disconnect, MethodKind, MethodSet, Preferred, SshId, cipher, kex, server};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use abortable::Abortable;
use authority::{Authority, Order};
pub use authority::{Issued, Permissions};
use connection::{Connection, Ended, Transport};
pub use websocket::{WebSocket, accept_key};

use crate::config::SshConfig;
use crate::places::Places;
use crate::traffic::{Counted, Side, Traffic};

const CA_SECRET: &str = "ssh_ca_key";
const HOST_SECRET: &str = "ssh_host_key";
/// How long a connection may take to close after its client was told to go.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long no connection is accepted after accepting one failed, e.g. because no descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// After this long without a word a client is asked whether it is there; three times.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// A connection that neither says nor takes anything for this long is closed.
const INACTIVITY: Duration = Duration::from_secs(150);
/// Between a refused login and its answer.
const REFUSAL: Duration = Duration::from_millis(500);
const LOGIN_ATTEMPTS_MAX: usize = 10;
/// Messages from sandboxes that wait for one connection.
const EVENTS_MAX: usize = 32;

/// What all connections share.
struct Shared {
    engine: Engine,
    authority: Authority,
    protocol: Arc<server::Config>,
    limits: SshConfig,
    /// What visitors call the image's user.
    user_name: &'static str,
    places: Arc<Semaphore>,
    logins: Arc<Places>,
    traffic: Arc<Traffic>,
    closing: watch::Sender<bool>,
}

/// The server for SSH. Clones share it.
#[derive(Clone)]
pub struct SshServer {
    shared: Arc<Shared>,
}

/// A place for one connection.
pub struct ConnectionPermit(#[allow(dead_code)] OwnedSemaphorePermit);

impl SshServer {
    /// Makes the keys of this server when there are none yet. `user_name` is what visitors call the image's user.
    pub async fn start(engine: Engine, limits: SshConfig, user_name: &'static str) -> Result<Self, Error> {
        let authority = Authority::new(&engine.lasting_secret(CA_SECRET).await?);
        let host_key = authority::key_of(&engine.lasting_secret(HOST_SECRET).await?);
        let shared = Arc::new(Shared {
            engine,
            protocol: Arc::new(protocol(authority.vouch(&host_key)?, host_key)),
            authority,
            places: Arc::new(Semaphore::new(limits.connections_max)),
            logins: Places::new(limits.logins_max),
            traffic: Arc::default(),
            closing: watch::Sender::new(false),
            limits,
            user_name,
        });
        Ok(Self { shared })
    }

    /// What passes between the server and its clients, encrypted as it is.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.shared.traffic
    }

    /// The key that signs certificates, in the form of an `authorized_keys` line.
    pub fn ca_public_key(&self) -> String {
        self.shared.authority.public_key()
    }

    /// What clients must see at their first connection, as `ssh-keygen -l` shows it.
    pub fn host_key_fingerprint(&self) -> String {
        let fingerprint = |key: &PrivateKey| key.fingerprint(HashAlg::Sha256).to_string();
        self.shared.protocol.keys.first().map(fingerprint).unwrap_or_default()
    }

    /// A certificate that opens one session of the caller's. The wish for a time is cut to what is allowed.
    pub async fn issue(
        &self,
        caller: &Caller,
        session_id: SessionId,
        public_key: &str,
        ttl: Option<Duration>,
        source_addresses: &[String],
    ) -> Result<Issued, Error> {
        let Shared { engine, authority, limits, .. } = &*self.shared;
        engine.check_visit(caller, session_id).await?;
        let mut random = [0; 40];
        getrandom::fill(&mut random).map_err(|error| Error::new(Code::Internal, error.to_string()))?;
        let (serial, nonce) = random.split_first_chunk::<8>().expect("40 bytes begin with 8");
        authority.issue(&Order {
            session_id,
            holder: &caller.key_id.to_string(),
            public_key,
            ttl: limits.certificate_ttl(ttl),
            source_addresses,
            now_seconds: login::now_seconds(),
            serial: u64::from_be_bytes(*serial),
            nonce: nonce.try_into().map_err(|_| Error::new(Code::Internal, "a nonce of another length"))?,
        })
    }

    /// A place for a connection that is about to be served.
    pub fn place(&self) -> Result<ConnectionPermit, Error> {
        if *self.shared.closing.borrow() {
            return Err(Code::Draining.into());
        }
        let place = Arc::clone(&self.shared.places).try_acquire_owned();
        let place = place.map_err(|_| Error::new(Code::SshGatewayUnavailable, "ssh.connections_max is reached"))?;
        Ok(ConnectionPermit(place))
    }

    /// Serves a client that has shown a key of the API for this session.
    pub async fn serve_visit<S>(&self, stream: S, visit: SshSession, peer: Option<SocketAddr>, place: ConnectionPermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.serve(stream, Transport::Bridge(Box::new(visit)), peer, place).await;
    }

    /// Listens for clients that have nothing but a certificate. Returns the address; serves until the shutdown.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        let server = self.clone();
        tokio::spawn(async move { server.accept(listener).await });
        Ok(local)
    }

    async fn accept(&self, listener: TcpListener) {
        let mut closing = self.shared.closing.subscribe();
        loop {
            let accepted = tokio::select! {
                biased;
                _ = closing.wait_for(|closing| *closing) => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept an SSH connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = self.place() else {
                tracing::warn!("an SSH connection was closed at once: ssh.connections_max is reached");
                continue;
            };
            // Keystrokes and their echoes are small and waited for.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "failed to set TCP_NODELAY");
            }
            let server = self.clone();
            tokio::spawn(async move { server.serve(stream, Transport::Listener, Some(peer), place).await });
        }
    }

    /// Sees one connection through to its end.
    async fn serve<S>(&self, stream: S, entrance: Transport, peer: Option<SocketAddr>, place: ConnectionPermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Who comes over the bridge has shown a key of the API already.
        let login =
            peer.filter(|_| matches!(entrance, Transport::Listener)).map(|peer| self.shared.logins.enter(peer.ip()));
        let mut gave_way = Box::pin(async move {
            match login {
                Some(login) => login.given_up().await,
                None => std::future::pending().await,
            }
        });
        let mut closing = self.shared.closing.subscribe();
        let (stream, scissors) = Abortable::new(Counted::new(stream, Side::Client, &self.shared.traffic));
        let (entered, entering) = oneshot::channel();
        let handler = Connection::new(Arc::clone(&self.shared), entrance, peer, entered);
        let deadline = tokio::time::Instant::now() + self.shared.limits.login_timeout();
        let greeted = server::run_stream(Arc::clone(&self.shared.protocol), stream, handler);
        let greeted = tokio::select! {
            greeted = tokio::time::timeout_at(deadline, greeted) => greeted,
            () = &mut gave_way => return tracing::debug!("an SSH client that did not log in gave way to another"),
        };
        let mut session = match greeted {
            Ok(Ok(session)) => session,
            Ok(Err(error)) => return tracing::debug!(%error, "an SSH client did not greet"),
            Err(_) => return tracing::debug!("an SSH client did not greet in time"),
        };
        let handle = session.handle();
        let ended: Ended = tokio::select! {
            ended = entering => match ended {
                Ok(ended) => ended,
                // Nobody was let in, and the client has been told.
                Err(_) => Box::pin(std::future::ready("")),
            },
            () = tokio::time::sleep_until(deadline) => return tracing::debug!("an SSH client did not log in in time"),
            () = &mut gave_way => return tracing::debug!("an SSH client that did not log in gave way to another"),
            _ = closing.wait_for(|closing| *closing) => return,
            result = &mut session => return note_end(result),
        };
        drop(gave_way);
        let reason = tokio::select! {
            result = &mut session => return note_end(result),
            reason = ended => reason,
            _ = closing.wait_for(|closing| *closing) => "the server is stopping; the sandbox lives on",
        };
        if !reason.is_empty() {
            let _ = handle.disconnect(Disconnect::ByApplication, reason.to_owned(), String::new()).await;
        }
        let _ = tokio::time::timeout(GOODBYE, &mut session).await;
        drop((scissors, place));
    }

    /// Accepts nothing new, tells all clients to go, and returns when they have.
    pub async fn shut_down(&self) {
        self.shared.closing.send_replace(true);
        let all = u32::try_from(self.shared.limits.connections_max).unwrap_or(u32::MAX);
        // Whatever happens, the server must be able to stop.
        let _ = tokio::time::timeout(2 * GOODBYE, self.shared.places.acquire_many(all)).await;
    }
}

fn note_end(result: Result<(), russh::Error>) {
    if let Err(error) = result {
        tracing::debug!(%error, "an SSH connection ended early");
    }
}

fn protocol(host_certificate: Certificate, host_key: PrivateKey) -> server::Config {
    server::Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-Nagaya_", env!("CARGO_PKG_VERSION")))),
        methods: MethodSet::from([MethodKind::PublicKey].as_slice()),
        auth_rejection_time: REFUSAL,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        certificates: vec![host_certificate],
        window_size: inbound::WINDOW_BYTES,
        event_buffer_size: EVENTS_MAX,
        max_auth_attempts: LOGIN_ATTEMPTS_MAX,
        inactivity_timeout: Some(INACTIVITY),
        keepalive_interval: Some(KEEP_ALIVE),
        keepalive_max: 3,
        preferred: Preferred {
            // Those of the library's that are fast; every client of the last ten years has one of them.
            kex: Cow::Borrowed(&[
                kex::MLKEM768X25519_SHA256,
                kex::CURVE25519,
                kex::CURVE25519_PRE_RFC_8731,
                kex::ECDH_SHA2_NISTP256,
                kex::EXTENSION_SUPPORT_AS_SERVER,
                kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
            ]),
            cipher: Cow::Borrowed(&[
                cipher::CHACHA20_POLY1305,
                cipher::AES_128_GCM,
                cipher::AES_256_GCM,
                cipher::AES_256_CTR,
                cipher::AES_128_CTR,
            ]),
            ..Preferred::DEFAULT
        },
        ..server::Config::default()
    }
}
