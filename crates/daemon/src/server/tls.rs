//! Reads certificates and keys, chooses by the name that a client asks for, and offers HTTP/2 and HTTP/1.1 by ALPN.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;

use crate::config::{Config, TlsConfig};

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {what} from {path}")]
    Read { what: &'static str, path: PathBuf, source: pem::Error },
    #[error("read certificate from {0}: the file holds none in PEM form")]
    NoCertificate(PathBuf),
    #[error("use certificate and key")]
    Use(#[from] rustls::Error),
}

/// `None` where the server speaks clear text.
pub(crate) fn acceptor(config: &Config) -> Result<Option<TlsAcceptor>, TlsError> {
    let Some(tls) = &config.tls else { return Ok(None) };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let own = Arc::new(certified(tls, &provider)?);
    let of_previews = match (&config.preview_domain, &config.previews.tls) {
        (Some(domain), Some(tls)) => Some((format!(".{domain}"), Arc::new(certified(tls, &provider)?))),
        _ => None,
    };
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Certificates { own, of_previews }));
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

#[derive(Debug)]
struct Certificates {
    own: Arc<CertifiedKey>,
    /// For names that end like this.
    of_previews: Option<(String, Arc<CertifiedKey>)>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or_default().to_ascii_lowercase();
        let of_previews = self.of_previews.iter().find(|(ending, _)| name.ends_with(ending.as_str()));
        Some(Arc::clone(of_previews.map_or(&self.own, |(_, certificate)| certificate)))
    }
}

fn certified(config: &TlsConfig, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let path = &config.certificate_file;
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(read("certificate", path))?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate(path.clone()));
    }
    let key = PrivateKeyDer::from_pem_file(&config.key_file).map_err(read("private key", &config.key_file))?;
    Ok(CertifiedKey::from_der(certificates, key, provider)?)
}

fn read(what: &'static str, path: &Path) -> impl FnOnce(pem::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |source| TlsError::Read { what, path, source }
}
