//! Mutual TLS 1.3 between Baton's programs: both sides show a certificate of the
//! same authority, and both learn whom it names.
//!
//! What a peer may do is decided by those who call this, with the [`Identity`].

mod verifier;

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::identity::{Identity, IdentityError};

use verifier::PeerVerifier;

/// Not looked at by anyone: the identity in the certificate is what counts.
const SERVER_NAME: &str = "baton.invalid";

/// For a peer that is refused to read why.
const FAREWELL: Duration = Duration::from_millis(500);
/// What a refused peer may still send.
const FAREWELL_BYTES_MAX: u64 = 64 << 10;

/// Where the certificates are, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Of the authority whose certificates are accepted.
    pub ca: PathBuf,
    /// Our own, with intermediates behind it.
    pub cert: PathBuf,
    /// Of our own certificate; readable by its owner only.
    pub key: PathBuf,
}

/// Our certificate and whom we believe.
#[derive(Clone)]
pub struct Credentials {
    identity: Identity,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    acceptor: TlsAcceptor,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file that is missing or not PEM.
    #[error("cannot read {what} from {}; give a PEM file (`baton-agent dev-ca` makes a set to try with)", path.display())]
    File {
        /// Which.
        what: &'static str,
        /// As configured.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A key that everybody can read.
    #[error("everybody can read the key {}; make it private with `chmod 600`", .0.display())]
    PublicKey(PathBuf),
    /// No identity in our own certificate.
    #[error("the certificate {} names nobody", path.display())]
    Identity {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
    /// Certificates and key that do not go together.
    #[error("the certificate {} and its key or authority do not go together", path.display())]
    Mismatch {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why two programs do not trust each other, one sentence from our side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer has no certificate.
    #[error("the peer showed no certificate; give it one of our authority")]
    NoCertificate,
    /// Another authority.
    #[error(
        "the peer's certificate is of another authority; both sides need certificates of the same one"
    )]
    OtherAuthority,
    /// Too old, or not valid yet.
    #[error(
        "the peer's certificate has expired or is not valid yet; renew it, or set its host's clock"
    )]
    Expired,
    /// Otherwise bad.
    #[error("the peer's certificate is not good: {0}")]
    BadCertificate(String),
    /// Names nobody.
    #[error("the peer is nobody: {0}")]
    Nobody(#[from] IdentityError),
    /// Names somebody else.
    #[error("the peer is {found}, not {expected}; check the address, or the certificate there")]
    SomebodyElse {
        /// Whom we called.
        expected: Identity,
        /// Who answered.
        found: Identity,
    },
    /// The peer does not accept us.
    #[error("the peer does not accept us: {0}")]
    Refused(&'static str),
    /// Not TLS, or it broke off.
    #[error("the peer does not speak TLS 1.3 or broke off: {0}")]
    Broken(String),
}

impl Credentials {
    /// Reads the files.
    ///
    /// # Errors
    /// [`CredentialsError`], one sentence for each kind of mistake.
    pub fn load(files: &TlsFiles) -> Result<Self, CredentialsError> {
        let mut roots = RootCertStore::empty();
        for cert in certificates("the authority's certificate", &files.ca)? {
            roots.add(cert).map_err(|source| CredentialsError::File {
                what: "the authority's certificate",
                path: files.ca.clone(),
                source: source.into(),
            })?;
        }
        let chain = certificates("the certificate", &files.cert)?;
        let own = chain.first().ok_or_else(|| empty("the certificate", &files.cert))?;
        let identity = Identity::of_certificate(own)
            .map_err(|source| CredentialsError::Identity { path: files.cert.clone(), source })?;
        let key = private_key(&files.key)?;
        let mismatch = |source: Box<dyn std::error::Error + Send + Sync>| {
            CredentialsError::Mismatch { path: files.cert.clone(), source }
        };
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|error| mismatch(error.into()))?;
        let server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| mismatch(error.into()))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|error| mismatch(error.into()))?;
        let acceptor = TlsAcceptor::from(Arc::new(server));
        Ok(Self { identity, roots, chain, key: Arc::new(key), acceptor })
    }

    /// Who we are.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Serves one connection; who called.
    ///
    /// # Errors
    /// [`HandshakeError`]. The caller sets a time limit.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> Result<(server::TlsStream<TcpStream>, Identity), HandshakeError> {
        let stream = match self.acceptor.accept(stream).into_fallible().await {
            Ok(stream) => stream,
            Err((error, stream)) => {
                let _ = tokio::time::timeout(FAREWELL, hear_out(stream)).await;
                return Err(HandshakeError::of_io(&error));
            }
        };
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let own = certificates.first().ok_or(HandshakeError::NoCertificate)?;
        let peer = Identity::of_certificate(own)?;
        Ok((stream, peer))
    }

    /// Calls `expected`, and nobody else.
    ///
    /// # Errors
    /// [`HandshakeError`]. That the peer refuses us is told at the first read.
    pub async fn connect(
        &self,
        stream: TcpStream,
        expected: &Identity,
    ) -> Result<client::TlsStream<TcpStream>, HandshakeError> {
        let verifier = PeerVerifier::new(Arc::clone(&self.roots), provider(), expected.clone());
        let broken = |error: rustls::Error| HandshakeError::of_tls(&error);
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(broken)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(broken)?;
        let name = ServerName::try_from(SERVER_NAME)
            .map_err(|error| HandshakeError::Broken(error.to_string()))?;
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| HandshakeError::of_io(&error))
    }
}

impl HandshakeError {
    /// What a failed read, write or handshake means.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => Self::of_tls(tls),
            None => Self::Broken(error.to_string()),
        }
    }

    fn of_tls(error: &rustls::Error) -> Self {
        use rustls::Error;
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(cause) => Self::of_certificate(cause),
            Error::AlertReceived(alert) => match alert {
                // It knows the issuer's name with another key.
                AlertDescription::UnknownCA | AlertDescription::DecryptError => Self::Refused(
                    "our certificate is of another authority than it believes; both sides need certificates of the same one",
                ),
                // The one alert for both: TLS has none for "not valid yet".
                AlertDescription::CertificateExpired => Self::Refused(
                    "our certificate has expired or is not valid yet; renew it, or set the clock that is wrong",
                ),
                AlertDescription::CertificateRequired => {
                    Self::Refused("it wants a certificate and we showed none")
                }
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRevoked
                | AlertDescription::AccessDenied => Self::Refused(
                    "it does not take us for whom it called, or our certificate is bad",
                ),
                other => Self::Broken(format!("{other:?}")),
            },
            other => Self::Broken(other.to_string()),
        }
    }

    fn of_certificate(cause: &CertificateError) -> Self {
        match cause {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => Self::Expired,
            // Two authorities of one name differ in their keys.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                Self::OtherAuthority
            }
            CertificateError::Other(other) => match other.0.downcast_ref::<Self>() {
                Some(ours) => ours.clone(),
                None => Self::BadCertificate(cause.to_string()),
            },
            other => Self::BadCertificate(other.to_string()),
        }
    }

    /// The first TLS failure among an error and its causes.
    #[must_use]
    pub fn within(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Some(Self::of_tls(tls));
            }
            if let Some(io) = error.downcast_ref::<io::Error>()
                && io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
            {
                return Some(Self::of_io(io));
            }
            next = error.source();
        }
        None
    }
}

/// Reads what a refused peer has sent already: closing over it would reset the
/// connection, and the peer would never read the alert that says why.
async fn hear_out(mut stream: TcpStream) {
    let _ = stream.shutdown().await;
    let _ = tokio::io::copy(&mut stream.take(FAREWELL_BYTES_MAX), &mut tokio::io::sink()).await;
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let failed = |source: rustls::pki_types::pem::Error| CredentialsError::File {
        what,
        path: path.to_owned(),
        source: source.into(),
    };
    let all = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    if all.is_empty() { Err(empty(what, path)) } else { Ok(all) }
}

fn empty(what: &'static str, path: &Path) -> CredentialsError {
    CredentialsError::File { what, path: path.to_owned(), source: "there is none in it".into() }
}

pub(crate) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| CredentialsError::File {
        what: "the key",
        path: path.to_owned(),
        source,
    };
    let mode = std::fs::metadata(path).map_err(|e| failed(e.into()))?.permissions().mode();
    if mode & 0o007 != 0 {
        return Err(CredentialsError::PublicKey(path.to_owned()));
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| failed(error.into()))
}
