//! One SSH connection: who is let in, and what is begun on its channels.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nagaya_api::ids::SessionId;
use nagaya_engine::SshSession;
use nagaya_engine::event_log::CommandLog;
use nagaya_engine::ports::Guest;
use russh::keys::Certificate;
use russh::server::{Auth, Handle, Session, VerifiedPublicKey};
use russh::{ChannelId, Disconnect};
use tokio::sync::{OnceCell, Semaphore, oneshot};
use tokio::task::JoinSet;

use super::Shared;
use super::authority::Permissions;
use super::channels::Entry;
use super::inbound::{self, ChannelReader, ChannelWriter};
use super::login;
use nagaya_engine::ports::User;

/// How long a session may take to be resumed for somebody who comes in.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Completes with the words for the visitor when what was visited is gone.
pub type Ended = std::pin::Pin<Box<dyn Future<Output = &'static str> + Send>>;

/// How somebody came to the server.
pub enum Transport {
    /// With a key of the API that opens this session.
    Bridge(Box<SshSession>),
    /// With nothing but what SSH itself will tell.
    Listener,
}

/// Somebody who was let into a session, as the tasks of all channels know them.
pub struct Visitor {
    visit: SshSession,
    user: User,
    peer: Option<SocketAddr>,
    pub permissions: Permissions,
    pub handle: Handle,
    /// Places for streams that come from the sandbox.
    pub places: Arc<Semaphore>,
    shell: OnceCell<&'static str>,
    /// The path of the socket that leads to the client's agent, once it is asked for.
    pub agent_socket: Mutex<Option<String>>,
    /// Halves of channels that the server opened, until both who wait for them have theirs; `None` when the
    /// connection is gone.
    rendezvous: Mutex<Option<HashMap<ChannelId, Half>>>,
    backlog: Arc<AtomicUsize>,
}

enum Half {
    ChannelWriter(ChannelWriter),
    ChannelReader(ChannelReader),
}

impl Visitor {
    pub fn guest(&self) -> &Arc<dyn Guest> {
        &self.visit.open.guest
    }

    /// Where commands get their ids, and their abnormal ends are recorded.
    pub fn commands(&self) -> &CommandLog {
        &self.visit.open.commands
    }

    pub fn session_id(&self) -> SessionId {
        self.visit.session_id
    }

    pub fn user(&self) -> User {
        self.user
    }

    /// The session's environment, and what SSH servers add.
    pub fn env(&self) -> BTreeMap<String, String> {
        let mut env = self.visit.open.env.clone();
        if let Some(peer) = self.peer {
            let ip = peer.ip().to_canonical();
            env.insert("SSH_CLIENT".to_owned(), format!("{ip} {} 22", peer.port()));
            env.insert("SSH_CONNECTION".to_owned(), format!("{ip} {} 127.0.0.1 22", peer.port()));
        }
        if let Some(path) = &*self.agent_socket.lock().expect("no holder of this lock panics") {
            env.insert("SSH_AUTH_SOCK".to_owned(), path.clone());
        }
        env
    }

    /// The better shell where the sandbox has it.
    pub async fn shell(&self, better: &'static str, other: &'static str) -> &'static str {
        let look = async {
            match self.guest().stat(better).await {
                Ok(Some(_)) => better,
                Ok(None) | Err(_) => other,
            }
        };
        self.shell.get_or_init(|| look).await
    }

    /// What the client sends on a channel that the server opened.
    pub fn intake_of(&self, id: ChannelId) -> ChannelReader {
        let (feeder, intake) = inbound::channel(&self.backlog);
        let mut halves = self.rendezvous.lock().expect("no holder of this lock panics");
        let Some(halves) = &mut *halves else { return intake };
        match halves.remove(&id) {
            Some(Half::ChannelReader(intake)) => intake,
            Some(Half::ChannelWriter(_)) | None => {
                halves.insert(id, Half::ChannelWriter(feeder));
                intake
            }
        }
    }

    /// The other end of [`Visitor::intake_of`].
    pub fn feeder_of(&self, id: ChannelId) -> ChannelWriter {
        let (feeder, intake) = inbound::channel(&self.backlog);
        let mut halves = self.rendezvous.lock().expect("no holder of this lock panics");
        let Some(halves) = &mut *halves else { return feeder };
        match halves.remove(&id) {
            Some(Half::ChannelWriter(feeder)) => feeder,
            Some(Half::ChannelReader(_)) | None => {
                halves.insert(id, Half::ChannelReader(intake));
                feeder
            }
        }
    }
}

/// What the SSH library calls as things happen on a connection.
pub struct Connection {
    pub(super) shared: Arc<Shared>,
    peer: Option<SocketAddr>,
    /// Taken when somebody is let in.
    entrance: Option<Transport>,
    accepted: Option<(User, SessionId, Permissions)>,
    /// Told when somebody is in.
    entered: Option<oneshot::Sender<Ended>>,
    visitor: Option<Arc<Visitor>>,
    pub(super) channels: HashMap<ChannelId, Entry>,
    pub(super) channels_opened: u32,
    pub(super) backlog: Arc<AtomicUsize>,
    /// What listens in the sandbox for this client, by the name the client has for it.
    pub(super) listeners: HashMap<String, tokio::task::AbortHandle>,
    pub(super) tasks: JoinSet<()>,
}

impl Connection {
    pub fn new(
        shared: Arc<Shared>,
        entrance: Transport,
        peer: Option<SocketAddr>,
        entered: oneshot::Sender<Ended>,
    ) -> Self {
        Self {
            shared,
            peer,
            entrance: Some(entrance),
            accepted: None,
            entered: Some(entered),
            visitor: None,
            channels: HashMap::new(),
            channels_opened: 0,
            backlog: Arc::default(),
            listeners: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Who was let in. The library calls for channels only after that.
    pub(super) fn visitor(&self) -> Result<Arc<Visitor>, russh::Error> {
        self.visitor.clone().ok_or(russh::Error::Inconsistent)
    }

    /// The account and the session that a user name stands for here.
    fn login(&self, user: &str) -> Option<(User, SessionId)> {
        let (account, named) = login::parse(user, self.shared.user_name)?;
        match (&self.entrance, named) {
            (Some(Transport::Bridge(visit)), None) => Some((account, visit.session_id)),
            (Some(Transport::Bridge(visit)), Some(id)) => (id == visit.session_id).then_some((account, id)),
            (Some(Transport::Listener), Some(id)) => Some((account, id)),
            (Some(Transport::Listener), None) | (None, _) => None,
        }
    }

    pub(super) fn certificate(&mut self, user: &str, certificate: &Certificate) -> Auth {
        let Some((account, id)) = self.login(user) else {
            tracing::debug!("an SSH client's user name names no account or no session");
            return Auth::reject();
        };
        let peer = self.peer.map(|peer| peer.ip());
        match self.shared.authority.check(certificate, id, peer, login::now_seconds()) {
            Ok(permissions) => {
                self.accepted = Some((account, id, permissions));
                Auth::Accept
            }
            Err(reason) => {
                tracing::info!(session = %id, reason, "an SSH certificate was refused");
                Auth::reject()
            }
        }
    }

    /// The session's own keys are good only where the API's key was shown first.
    pub(super) fn public_key(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Auth {
        let (Some((account, id)), Some(Transport::Bridge(visit))) = (self.login(user), &self.entrance) else {
            return Auth::reject();
        };
        if !login::is_authorized(&visit.ssh_authorized_keys, key.public_key) {
            return Auth::reject();
        }
        self.accepted = Some((account, id, Permissions::ALL));
        Auth::Accept
    }

    /// Opens the session for whoever was let in; where that is refused, says why and ends the connection.
    pub(super) async fn enter(&mut self, session: &mut Session) -> Result<(), russh::Error> {
        let (Some((account, id, permissions)), Some(entrance)) = (self.accepted.take(), self.entrance.take()) else {
            return Err(russh::Error::Inconsistent);
        };
        let visit = match entrance {
            Transport::Bridge(visit) => Ok(*visit),
            Transport::Listener => {
                match tokio::time::timeout(OPEN_TIMEOUT, self.shared.engine.visit_certified(id)).await {
                    Ok(visit) => visit.map_err(|error| error.coded_text()),
                    Err(_) => Err("the session was not resumed in time".to_owned()),
                }
            }
        };
        let visit = match visit {
            Ok(visit) => visit,
            Err(text) => return session.disconnect(Disconnect::ByApplication, &text, ""),
        };
        tracing::info!(session = %id, ?account, peer = ?self.peer, "an SSH client entered");
        let ended: Ended = Box::pin(visit.ended());
        self.visitor = Some(Arc::new(Visitor {
            visit,
            user: account,
            peer: self.peer,
            permissions,
            handle: session.handle(),
            places: Arc::new(Semaphore::new(self.shared.limits.channels_per_connection_max)),
            shell: OnceCell::new(),
            agent_socket: Mutex::default(),
            rendezvous: Mutex::new(Some(HashMap::new())),
            backlog: Arc::clone(&self.backlog),
        }));
        // Whoever waits for this may have given up already, which cuts the connection.
        let _ = self.entered.take().map(|entered| entered.send(ended));
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(visitor) = &self.visitor else { return };
        // Otherwise a task could wait for ever for what nobody feeds any more.
        visitor.rendezvous.lock().expect("no holder of this lock panics").take();
        let socket = visitor.agent_socket.lock().expect("no holder of this lock panics").take();
        let directory =
            socket.as_deref().and_then(|path| path.rsplit_once('/')).map(|(directory, _)| directory.to_owned());
        if let (Some(directory), Ok(runtime)) = (directory, tokio::runtime::Handle::try_current()) {
            let guest = Arc::clone(visitor.guest());
            runtime.spawn(async move {
                let _ = guest.remove(&directory, true).await;
            });
        }
    }
}
