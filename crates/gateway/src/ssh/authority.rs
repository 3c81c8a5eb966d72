//! The certificates that open sessions: made here, and believed only when they were made here.

use std::net::IpAddr;
use std::time::Duration;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;
use russh::keys::ssh_key::certificate::{Builder, CertType};
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{Algorithm, Certificate, HashAlg, PrivateKey, PublicKey};

/// How much earlier than now a certificate begins, for clocks that are a little behind.
const CLOCK_SKEW_SECONDS: u64 = 60;
const SOURCE_ADDRESS: &str = "source-address";
const PTY: &str = "permit-pty";
const AGENT: &str = "permit-agent-forwarding";
const PORTS: &str = "permit-port-forwarding";
const RSA_BITS_MIN: u32 = 2048;

/// What the holder of a certificate may do beside running commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    pub pty: bool,
    pub agent_forwarding: bool,
    pub port_forwarding_local: bool,
    pub port_forwarding_remote: bool,
}

impl Permissions {
    /// X11 is not forwarded: sandboxes have no display, and its protocol cannot be confined.
    pub const ALL: Self =
        Self { pty: true, agent_forwarding: true, port_forwarding_local: true, port_forwarding_remote: true };
}

/// A certificate to be made.
#[derive(Debug)]
pub struct Order<'a> {
    pub session_id: SessionId,
    /// Who asked for it, for the logs.
    pub holder: &'a str,
    /// In the form of an `authorized_keys` line without options.
    pub public_key: &'a str,
    pub ttl: Duration,
    /// Addresses and networks from which it can be used; empty is everywhere.
    pub source_addresses: &'a [String],
    pub now_seconds: u64,
    pub serial: u64,
    pub nonce: [u8; 32],
}

/// A certificate that was made.
#[derive(Debug)]
pub struct Issued {
    /// As in a `-cert.pub` file, without a newline at its end.
    pub certificate: String,
    pub expires_at_seconds: u64,
    pub serial: u64,
    pub permissions: Permissions,
}

/// Signs certificates, and checks them.
#[derive(Debug)]
pub struct Authority {
    key: PrivateKey,
}

fn invalid(detail: &str) -> Error {
    Error::new(Code::InvalidArgument, detail)
}

impl Authority {
    pub fn new(secret: &[u8; 32]) -> Self {
        Self { key: key_of(secret) }
    }

    /// In the form of an `authorized_keys` line.
    pub fn public_key(&self) -> String {
        self.key.public_key().to_openssh().expect("an Ed25519 key has a text")
    }

    pub fn issue(&self, order: &Order<'_>) -> Result<Issued, Error> {
        let key = PublicKey::from_openssh(order.public_key)
            .map_err(|_| invalid("public_key is not an OpenSSH public key"))?;
        check_strength(&key)?;
        let expires_at_seconds = order.now_seconds.saturating_add(order.ttl.as_secs());
        let certificate = self.sign(&key, order, expires_at_seconds)?;
        let certificate = certificate.to_openssh().map_err(broken)?;
        Ok(Issued { certificate, expires_at_seconds, serial: order.serial, permissions: Permissions::ALL })
    }

    fn sign(&self, key: &PublicKey, order: &Order<'_>, expires_at_seconds: u64) -> Result<Certificate, Error> {
        let valid_after = order.now_seconds.saturating_sub(CLOCK_SKEW_SECONDS);
        let addresses = order.source_addresses.iter().map(|text| Network::parse(text).ok_or(text));
        let addresses: Result<Vec<Network>, _> = addresses.collect();
        let addresses =
            addresses.map_err(|_| invalid("source_addresses must be addresses or networks such as 10.0.0.0/8"))?;
        let mut builder =
            Builder::new(order.nonce, key.key_data().clone(), valid_after, expires_at_seconds).map_err(broken)?;
        builder.serial(order.serial).map_err(broken)?;
        builder.cert_type(CertType::User).map_err(broken)?;
        builder.key_id(format!("{} for {}", principal(order.session_id), order.holder)).map_err(broken)?;
        builder.valid_principal(principal(order.session_id)).map_err(broken)?;
        if !addresses.is_empty() {
            let list = addresses.iter().map(Network::to_string).collect::<Vec<_>>().join(",");
            builder.critical_option(SOURCE_ADDRESS, list).map_err(broken)?;
        }
        // In the order of their names, as the format wants it.
        for extension in [AGENT, PORTS, PTY] {
            builder.extension(extension, "").map_err(broken)?;
        }
        builder.sign(&self.key).map_err(broken)
    }

    /// A certificate of the server's own host key, so that whoever knows this authority's key (as `@cert-authority`
    /// in `known_hosts`) need not be asked whether the host is the right one. Good under every name, for ever.
    pub fn vouch(&self, host_key: &PrivateKey) -> Result<Certificate, Error> {
        // It is made anew at every start from the same two keys and is the same then: nothing in it need be random.
        let mut builder =
            Builder::new([0; 32], host_key.public_key().key_data().clone(), 0, u64::MAX).map_err(broken)?;
        builder.cert_type(CertType::Host).map_err(broken)?;
        builder.key_id("nagaya").map_err(broken)?;
        builder.all_principals_valid().map_err(broken)?;
        builder.sign(&self.key).map_err(broken)
    }

    /// Whether a certificate opens this session for somebody at this address. The error is for the log: whoever
    /// shows a bad certificate is told nothing.
    pub fn check(
        &self,
        certificate: &Certificate,
        session_id: SessionId,
        peer: Option<IpAddr>,
        now_seconds: u64,
    ) -> Result<Permissions, &'static str> {
        let ours = self.key.public_key().fingerprint(HashAlg::Sha256);
        certificate
            .validate_at(now_seconds, [&ours])
            .map_err(|_| "it is expired, not valid yet, or of another authority")?;
        if certificate.cert_type() != CertType::User {
            return Err("it is not a user's certificate");
        }
        // A certificate without principals would be good for every session.
        if !certificate.valid_principals().contains(&principal(session_id)) {
            return Err("it is for another session");
        }
        for (name, value) in certificate.critical_options().iter() {
            match (name.as_str(), peer) {
                (SOURCE_ADDRESS, Some(peer)) if is_among(value, peer) => {}
                (SOURCE_ADDRESS, _) => return Err("it cannot be used from this address"),
                _ => return Err("it has a critical option that is unknown here"),
            }
        }
        let may = |extension: &str| certificate.extensions().contains_key(extension);
        Ok(Permissions {
            pty: may(PTY),
            agent_forwarding: may(AGENT),
            port_forwarding_local: may(PORTS),
            port_forwarding_remote: may(PORTS),
        })
    }
}

/// An Ed25519 key made of 32 secret bytes.
pub fn key_of(secret: &[u8; 32]) -> PrivateKey {
    PrivateKey::from(Ed25519Keypair::from_seed(secret))
}

/// The name under which a certificate opens a session.
pub fn principal(id: SessionId) -> String {
    format!("session:{id}")
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::new(Code::Internal, format!("an SSH certificate could not be made: {error}"))
}

/// Keys that are broken, or that no login could be made with.
fn check_strength(key: &PublicKey) -> Result<(), Error> {
    match key.algorithm() {
        Algorithm::Dsa => Err(invalid("DSA keys are not accepted; use Ed25519")),
        Algorithm::Rsa { .. } => match key.key_data().rsa().map(|key| key.key_size()) {
            Some(bits) if bits >= RSA_BITS_MIN => Ok(()),
            _ => Err(invalid("RSA keys must have at least 2048 bits")),
        },
        Algorithm::Other(_) => Err(invalid("public_key is of an unknown kind; use Ed25519")),
        _ => Ok(()),
    }
}

/// Addresses with the same beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.trim().split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse().ok()?)),
            None => (text.trim(), None),
        };
        let address: IpAddr = address.parse().ok()?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(all);
        (bits <= all).then_some(Self { address, bits })
    }

    fn has(&self, peer: IpAddr) -> bool {
        match (self.address, peer) {
            (IpAddr::V4(ours), IpAddr::V4(peer)) => begins_alike(u32::from(ours), u32::from(peer), 32 - self.bits),
            (IpAddr::V6(ours), IpAddr::V6(peer)) => begins_alike(u128::from(ours), u128::from(peer), 128 - self.bits),
            _ => false,
        }
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// Whether two numbers are the same but for their last bits.
fn begins_alike<T: Into<u128>>(a: T, b: T, last_bits: u32) -> bool {
    let differing = a.into() ^ b.into();
    differing.checked_shr(last_bits).unwrap_or(0) == 0
}

fn is_among(list: &str, peer: IpAddr) -> bool {
    let peer = peer.to_canonical();
    list.split(',').filter_map(Network::parse).any(|network| network.has(peer))
}

#[cfg(test)]
mod tests;
