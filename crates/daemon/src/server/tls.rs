//! Reads certificate and key, and offers HTTP/2 and HTTP/1.1 by ALPN.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::config::TlsConfig;

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

pub(crate) fn acceptor(config: &TlsConfig) -> Result<TlsAcceptor, TlsError> {
    let path = &config.certificate_file;
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(read("certificate", path))?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate(path.clone()));
    }
    let key = PrivateKeyDer::from_pem_file(&config.key_file).map_err(read("private key", &config.key_file))?;

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

fn read(what: &'static str, path: &Path) -> impl FnOnce(pem::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |source| TlsError::Read { what, path, source }
}
