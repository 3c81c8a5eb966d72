//! What clients ask for on their channels.
//!
//! The library waits for each of these calls before it reads on, so nothing here waits for a sandbox, except where
//! the answer needs it (listening), and then not for long.

use std::time::Duration;

use bytes::Bytes;
use nagaya_engine::ports::{Bind, Listener, Signal, Terminal, TerminalSize};
use russh::keys::Certificate;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, ChannelWriteHalf, Pty, Sig};

use super::connection::{Connection, Visitor};
use super::forward::{self, Origin};
use super::inbound::{self, ChannelReader, ChannelWriter, Item};
use super::process::{self, Preparation, Program};

/// Variables that a client may set on one channel, and bytes of all of them.
const VARIABLES_MAX: usize = 128;
const VARIABLES_BYTES_MAX: usize = 64 * 1024;
const LISTENERS_MAX: usize = 64;
/// Channels in the whole life of a connection: the library keeps a trace of each that was closed here first.
const CHANNELS_OPENED_MAX: u32 = 20_000;
/// How long a client is kept waiting for a place to listen in its sandbox.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel as long as it is open.
pub struct Entry {
    feeder: ChannelWriter,
    /// Until something is started on it.
    waiting: Option<Waiting>,
}

struct Waiting {
    write: ChannelWriteHalf<Msg>,
    intake: ChannelReader,
    preparation: Preparation,
}

impl Connection {
    /// Refuses a channel that would be one too many, and forgets those that are done.
    fn has_room(&mut self) -> bool {
        self.channels.retain(|_, entry| entry.waiting.is_some() || !entry.feeder.is_done());
        let has_room = self.channels.len() < self.shared.limits.channels_per_connection_max
            && self.channels_opened < CHANNELS_OPENED_MAX;
        self.channels_opened += u32::from(has_room);
        has_room
    }

    fn preparation(&mut self, id: ChannelId) -> Option<&mut Preparation> {
        Some(&mut self.channels.get_mut(&id)?.waiting.as_mut()?.preparation)
    }

    /// Starts a program where nothing was started yet. The client is answered when it runs.
    fn start(&mut self, id: ChannelId, program: Program, session: &mut Session) -> Result<(), russh::Error> {
        let visitor = self.visitor()?;
        let Some(Waiting { write, intake, preparation }) = self.channels.get_mut(&id).and_then(|of| of.waiting.take())
        else {
            return session.channel_failure(id);
        };
        tokio::spawn(process::run(visitor, program, preparation, write, intake));
        Ok(())
    }

    fn push(&self, id: ChannelId, item: Item) -> Result<(), russh::Error> {
        let Some(entry) = self.channels.get(&id) else { return Ok(()) };
        entry.feeder.push(item).map_err(|inbound::TooMuch| {
            tracing::warn!("an SSH client sent more than it was granted; its connection is closed");
            russh::Error::Inconsistent
        })
    }

    /// Connects a new channel to something in the sandbox.
    async fn stream(
        &mut self,
        channel: Channel<Msg>,
        address: Option<nagaya_engine::ports::Address>,
        reply: ChannelOpenHandle,
    ) -> Result<(), russh::Error> {
        let visitor = self.visitor()?;
        let Some(address) = address.filter(|_| visitor.permissions.port_forwarding_local) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let write = forward::writer(channel);
        let (feeder, intake) = inbound::channel(&self.backlog);
        self.channels.insert(write.id(), Entry { feeder, waiting: None });
        tokio::spawn(forward::connect(visitor, address, reply, write, intake));
        Ok(())
    }

    /// Listens in the sandbox; the port, or why not.
    async fn listen(
        &mut self,
        name: impl FnOnce(&Listener) -> String,
        bind: Option<Bind>,
        origin: impl FnOnce(&Listener) -> Origin,
    ) -> Result<Option<u16>, russh::Error> {
        let visitor = self.visitor()?;
        let Some(bind) = bind.filter(|_| visitor.permissions.port_forwarding_remote) else { return Ok(None) };
        let Some(listener) = self.listening(&visitor, bind).await else { return Ok(None) };
        let (name, port, origin) = (name(&listener), listener.port, origin(&listener));
        let task = self.tasks.spawn(forward::accept(visitor, listener, origin));
        self.listeners.insert(name, task);
        Ok(Some(port))
    }

    async fn listening(&mut self, visitor: &Visitor, bind: Bind) -> Option<Listener> {
        while self.tasks.try_join_next().is_some() {}
        if self.tasks.len() >= LISTENERS_MAX {
            return None;
        }
        match tokio::time::timeout(LISTEN_TIMEOUT, visitor.guest().listen(&bind)).await {
            Ok(Ok(listener)) => Some(listener),
            Ok(Err(error)) => {
                tracing::debug!(session = %visitor.session_id(), %error, "an SSH client cannot listen in its sandbox");
                None
            }
            Err(_) => None,
        }
    }

    fn stop_listening(&mut self, name: &str) -> bool {
        self.listeners.remove(name).map(|task| task.abort()).is_some()
    }

    /// A socket in the sandbox that leads to the client's agent.
    async fn offer_agent(&mut self) -> Result<bool, russh::Error> {
        let visitor = self.visitor()?;
        if !visitor.permissions.agent_forwarding {
            return Ok(false);
        }
        if visitor.agent_socket.lock().expect("no holder of this lock panics").is_some() {
            return Ok(true);
        }
        let mut random = [0; 8];
        if getrandom::fill(&mut random).is_err() {
            return Ok(false);
        }
        let directory = format!("/tmp/ssh-{:016x}", u64::from_ne_bytes(random));
        let made = visitor.guest().make_directory(&directory, 0o700, false);
        if !matches!(tokio::time::timeout(LISTEN_TIMEOUT, made).await, Ok(Ok(_))) {
            return Ok(false);
        }
        let path = format!("{directory}/agent");
        // From here on the directory is removed when the connection ends.
        *visitor.agent_socket.lock().expect("no holder of this lock panics") = Some(path.clone());
        let Some(listener) = self.listening(&visitor, Bind::Unix { path }).await else { return Ok(false) };
        self.tasks.spawn(forward::accept(visitor, listener, Origin::Agent));
        Ok(true)
    }
}

fn tcp_name(address: &str, port: u32) -> String {
    format!("{address}:{port}")
}

/// `None` when it is not known how many characters fit in.
fn size(columns: u32, rows: u32, width_px: u32, height_px: u32) -> Option<TerminalSize> {
    let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    let size = TerminalSize {
        columns: short(columns),
        rows: short(rows),
        width_px: short(width_px),
        height_px: short(height_px),
    };
    (columns > 0 && rows > 0).then_some(size)
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_openssh_certificate(&mut self, user: &str, certificate: &Certificate) -> Result<Auth, russh::Error> {
        Ok(self.certificate(user, certificate))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        Ok(self.public_key(user, key))
    }

    async fn auth_succeeded(&mut self, session: &mut Session) -> Result<(), russh::Error> {
        self.enter(session).await
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let write = forward::writer(channel);
        let (feeder, intake) = inbound::channel(&self.backlog);
        let id = write.id();
        let waiting = Some(Waiting { write, intake, preparation: Preparation::default() });
        self.channels.insert(id, Entry { feeder, waiting });
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_x11(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        self.stream(channel, forward::inside(host, port), reply).await
    }

    async fn channel_open_forwarded_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let address = nagaya_engine::ports::Address::Unix { path: path.to_owned() };
        self.stream(channel, path.starts_with('/').then_some(address), reply).await
    }

    async fn channel_open_confirmation(
        &mut self,
        id: ChannelId,
        _: u32,
        _: u32,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let feeder = self.visitor()?.feeder_of(id);
        self.channels.insert(id, Entry { feeder, waiting: None });
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _: &mut Session) -> Result<(), russh::Error> {
        self.channels.remove(&id);
        Ok(())
    }

    async fn channel_eof(&mut self, id: ChannelId, _: &mut Session) -> Result<(), russh::Error> {
        self.push(id, Item::EndOfFile)
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], _: &mut Session) -> Result<(), russh::Error> {
        self.push(id, Item::Data(Bytes::copy_from_slice(data)))?;
        if let Some(entry) = self.channels.get(&id) {
            entry.feeder.pause_if_behind().await;
        }
        Ok(())
    }

    fn adjust_window(&mut self, _: ChannelId, _: u32) -> u32 {
        inbound::next_window(self.channels.values().map(|entry| &entry.feeder))
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        kind: &str,
        columns: u32,
        rows: u32,
        width_px: u32,
        height_px: u32,
        modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let may = self.visitor()?.permissions.pty && kind.len() <= 256 && !kind.contains('\0');
        match self.preparation(id).filter(|_| may) {
            Some(preparation) => {
                let modes = modes.iter().map(|&(mode, value)| (mode as u8, value)).collect();
                let size = size(columns, rows, width_px, height_px);
                preparation.terminal = Some((kind.to_owned(), Terminal { size, modes }));
                session.channel_success(id)
            }
            None => session.channel_failure(id),
        }
    }

    async fn x11_request(
        &mut self,
        id: ChannelId,
        _: bool,
        _: &str,
        _: &str,
        _: u32,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        session.channel_failure(id)
    }

    /// Every variable is taken: whoever may run any command may set any variable.
    async fn env_request(
        &mut self,
        id: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let is_good = !name.is_empty() && name.bytes().all(plain) && !value.contains('\0');
        let Some(preparation) = self.preparation(id).filter(|_| is_good) else { return session.channel_failure(id) };
        let bytes: usize = preparation.env.iter().map(|(name, value)| name.len() + value.len()).sum();
        if preparation.env.len() >= VARIABLES_MAX || bytes + name.len() + value.len() > VARIABLES_BYTES_MAX {
            return session.channel_failure(id);
        }
        preparation.env.insert(name.to_owned(), value.to_owned());
        session.channel_success(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        self.start(id, Program::Shell, session)
    }

    async fn exec_request(&mut self, id: ChannelId, data: &[u8], session: &mut Session) -> Result<(), russh::Error> {
        match std::str::from_utf8(data) {
            Ok(command) => self.start(id, Program::Command(command.to_owned()), session),
            Err(_) => session.channel_failure(id),
        }
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        match name {
            "sftp" => self.start(id, Program::FileServer, session),
            _ => session.channel_failure(id),
        }
    }

    async fn window_change_request(
        &mut self,
        id: ChannelId,
        columns: u32,
        rows: u32,
        width_px: u32,
        height_px: u32,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        if let Some(size) = size(columns, rows, width_px, height_px) {
            self.push(id, Item::Resize(size))?;
        }
        session.channel_success(id)
    }

    async fn agent_request(&mut self, _: ChannelId, _: &mut Session) -> Result<bool, russh::Error> {
        self.offer_agent().await
    }

    async fn signal(&mut self, id: ChannelId, signal: Sig, _: &mut Session) -> Result<(), russh::Error> {
        let signal = match signal {
            Sig::HUP => Signal::Hup,
            Sig::INT => Signal::Int,
            Sig::KILL => Signal::Kill,
            Sig::TERM => Signal::Term,
            Sig::USR1 => Signal::Usr1,
            Sig::Custom(name) if name == "USR2" => Signal::Usr2,
            // The others cannot be sent into a sandbox, and asking for them has no answer.
            _ => return Ok(()),
        };
        self.push(id, Item::Signal(signal))
    }

    async fn tcpip_forward(&mut self, address: &str, port: &mut u32, _: &mut Session) -> Result<bool, russh::Error> {
        let listening = |listener: &Listener| tcp_name(address, listener.port.into());
        let origin = |listener: &Listener| Origin::Tcp { address: address.to_owned(), port: listener.port.into() };
        let chosen = self.listen(listening, forward::bind(address, *port), origin).await?;
        if let Some(chosen) = chosen {
            *port = chosen.into();
        }
        Ok(chosen.is_some())
    }

    async fn cancel_tcpip_forward(&mut self, address: &str, port: u32, _: &mut Session) -> Result<bool, russh::Error> {
        Ok(self.stop_listening(&tcp_name(address, port)))
    }

    async fn streamlocal_forward(&mut self, path: &str, _: &mut Session) -> Result<bool, russh::Error> {
        let bind = path.starts_with('/').then(|| Bind::Unix { path: path.to_owned() });
        let origin = |_: &Listener| Origin::Unix { path: path.to_owned() };
        Ok(self.listen(|_| path.to_owned(), bind, origin).await?.is_some())
    }

    async fn cancel_streamlocal_forward(&mut self, path: &str, _: &mut Session) -> Result<bool, russh::Error> {
        Ok(self.stop_listening(path))
    }
}
