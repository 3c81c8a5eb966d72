//! Streams through an SSH connection: to what listens in the sandbox, and from there to the client.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nagaya_engine::ports::{Accepted, Address, Bind, BoxStream, Listener};
use russh::server::{ChannelOpenHandle, Msg};
use russh::{Channel, ChannelOpenFailure, ChannelWriteHalf};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::oneshot;

use super::connection::Visitor;
use super::inbound::{ChannelReader, Item};

/// How long connecting in the sandbox may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const PIECE_BYTES: usize = 32 * 1024;

/// What a client wants to be told about a stream that comes from the sandbox.
#[derive(Debug, Clone)]
pub enum Origin {
    Tcp { address: String, port: u32 },
    Unix { path: String },
    Agent,
}

/// Where a host and port that a client names lead to: only the sandbox itself is reached this way. For the rest there
/// are the sandbox's own programs, under its own rules.
pub fn inside(host: &str, port: u32) -> Option<Address> {
    let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
    let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
    match host.parse::<IpAddr>() {
        // Mapped or not, an address is taken as it is: 127.0.0.2 is not 127.0.0.1, and has services of its own.
        Ok(ip) => {
            let is_inside = ip.to_canonical().is_loopback() || ip.to_canonical().is_unspecified();
            is_inside.then_some(Address::Ip { ip, port })
        }
        Err(_) if host.eq_ignore_ascii_case("localhost") => Some(Address::Tcp { port }),
        Err(_) if host.eq_ignore_ascii_case("ip6-localhost") => {
            Some(Address::Ip { ip: Ipv6Addr::LOCALHOST.into(), port })
        }
        Err(_) => None,
    }
}

/// Where to listen for a client that names an address as `ssh -R` does.
pub fn bind(address: &str, port: u32) -> Option<Bind> {
    let port = u16::try_from(port).ok()?;
    let ip = match address {
        "" | "*" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        "ip6-localhost" => IpAddr::V6(Ipv6Addr::LOCALHOST),
        other => other.parse().ok()?,
    };
    Some(Bind::Tcp { ip, port })
}

/// Connects in the sandbox for a client that waits for it, then carries bytes.
pub async fn connect(
    visitor: Arc<Visitor>,
    address: Address,
    reply: ChannelOpenHandle,
    write: ChannelWriteHalf<Msg>,
    intake: ChannelReader,
) {
    match tokio::time::timeout(CONNECT_TIMEOUT, visitor.guest().connect(&address)).await {
        Ok(Ok(stream)) => {
            reply.accept().await;
            carry(stream, write, intake).await;
        }
        Ok(Err(error)) => {
            tracing::debug!(session = %visitor.session_id(), %error, "an SSH client's stream leads nowhere");
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
        Err(_) => reply.reject(ChannelOpenFailure::ConnectFailed).await,
    }
}

/// Opens a channel to the client for everybody who connects in the sandbox, until the listener ends.
pub async fn accept(visitor: Arc<Visitor>, mut listener: Listener, origin: Origin) {
    while let Some(accepted) = listener.incoming.recv().await {
        let Ok(place) = Arc::clone(&visitor.places).try_acquire_owned() else {
            tracing::debug!(session = %visitor.session_id(), "too many streams to one SSH client; one was closed");
            continue;
        };
        let (visitor, origin) = (Arc::clone(&visitor), origin.clone());
        tokio::spawn(async move {
            deliver(&visitor, accepted, &origin).await;
            drop(place);
        });
    }
}

async fn deliver(visitor: &Visitor, accepted: Accepted, origin: &Origin) {
    let Accepted { stream, source } = accepted;
    let handle = &visitor.handle;
    let channel = match origin {
        Origin::Agent => handle.channel_open_agent().await,
        Origin::Unix { path } => handle.channel_open_forwarded_streamlocal(path).await,
        Origin::Tcp { address, port } => {
            let (ip, source_port) = source.rsplit_once(':').unwrap_or(("127.0.0.1", "0"));
            let ip = ip.trim_start_matches('[').trim_end_matches(']');
            handle.channel_open_forwarded_tcpip(address, *port, ip, source_port.parse().unwrap_or(0)).await
        }
    };
    match channel {
        Ok(channel) => {
            let write = writer(channel);
            let intake = visitor.intake_of(write.id());
            carry(stream, write, intake).await;
        }
        Err(error) => tracing::debug!(%error, "an SSH client did not take a stream from its sandbox"),
    }
}

/// The half of a channel that is written to. What comes in is taken from the callbacks: see `inbound`.
pub fn writer(channel: Channel<Msg>) -> ChannelWriteHalf<Msg> {
    let (_read, write) = channel.split();
    write
}

/// Carries bytes both ways until both sides have ended, or one has gone.
async fn carry(stream: BoxStream, write: ChannelWriteHalf<Msg>, mut intake: ChannelReader) {
    let (reader, writer) = tokio::io::split(stream);
    let (ended, client_ended) = oneshot::channel();
    let expired = intake.expired();
    let both_ended = async {
        if outward(reader, &write).await.is_ok() {
            let _ = client_ended.await;
        }
    };
    tokio::select! {
        () = both_ended => {}
        () = expired => {}
        () = inward(&mut intake, writer, ended) => {}
    }
    let _ = write.close().await;
}

async fn outward(mut reader: ReadHalf<BoxStream>, write: &ChannelWriteHalf<Msg>) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE_BYTES);
        if reader.read_buf(&mut buffer).await? == 0 {
            return write.eof().await.map_err(io::Error::other);
        }
        write.data_bytes(buffer.split().freeze()).await.map_err(io::Error::other)?;
    }
}

/// Returns when the channel was closed.
async fn inward(intake: &mut ChannelReader, mut writer: WriteHalf<BoxStream>, ended: oneshot::Sender<()>) {
    let mut ended = Some(ended);
    // A service that reads no more may still have something to say.
    let mut is_read = true;
    while let Some(item) = intake.next().await {
        match item {
            Item::Data(data) if is_read => is_read = writer.write_all(&data).await.is_ok(),
            Item::EndOfFile => {
                let _ = writer.shutdown().await;
                ended.take().map(|ended| ended.send(()));
            }
            Item::Data(_) | Item::Signal(_) | Item::Resize(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sandbox_itself_is_inside() {
        for host in ["localhost", "LOCALHOST."] {
            assert_eq!(inside(host, 80), Some(Address::Tcp { port: 80 }), "{host}");
        }
        for host in ["", "example.org", "10.0.0.1", "169.254.169.254", "localhost.example.org", "::2", "0177.0.0.1"] {
            assert_eq!(inside(host, 80), None, "{host}");
        }
        assert_eq!(inside("localhost", 0), None);
        assert_eq!(inside("localhost", 65_536), None);
    }

    #[test]
    fn addresses_are_taken_as_given() {
        for (host, ip) in [
            ("127.0.0.1", "127.0.0.1"),
            ("127.9.9.9", "127.9.9.9"),
            ("0.0.0.0", "0.0.0.0"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            ("::", "::"),
            ("ip6-localhost", "::1"),
            ("::ffff:127.0.0.2", "::ffff:127.0.0.2"),
        ] {
            assert_eq!(inside(host, 80), Some(Address::Ip { ip: ip.parse().unwrap(), port: 80 }), "{host}");
        }
        assert_eq!(inside("::ffff:10.0.0.1", 80), None);
    }

    #[test]
    fn addresses_to_listen_at_are_those_of_ssh() {
        let at = |ip: &str, port| Some(Bind::Tcp { ip: ip.parse().unwrap(), port });
        assert_eq!(bind("", 0), at("0.0.0.0", 0));
        assert_eq!(bind("localhost", 80), at("127.0.0.1", 80));
        assert_eq!(bind("::1", 80), at("::1", 80));
        assert_eq!(bind("example.org", 80), None);
        assert_eq!(bind("", 65_536), None);
    }
}
