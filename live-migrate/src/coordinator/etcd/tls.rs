//! TLS to etcd: its certificate is checked against its authority and its name, as
//! on the web. (Between Baton's own programs the identity in the certificate
//! counts, and not the name: `crate::tls`.)

use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::settings::Settings;
use crate::tls::{CredentialsError, certificates, private_key, provider};

/// Calls members by TLS.
#[derive(Clone)]
pub(super) struct Tls(TlsConnector);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// Of the configuration; `None` without an authority.
    pub(super) fn load(settings: &Settings) -> Result<Option<Self>, CredentialsError> {
        let Some(ca) = &settings.ca else { return Ok(None) };
        let what = "the certificate of etcd's authority";
        let mut roots = RootCertStore::empty();
        for cert in certificates(what, ca)? {
            roots.add(cert).map_err(|source| CredentialsError::File {
                what,
                path: ca.clone(),
                source: source.into(),
            })?;
        }
        let mismatch = |path: &PathBuf, error: rustls::Error| CredentialsError::Mismatch {
            path: path.clone(),
            source: error.into(),
        };
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| mismatch(ca, error))?
            .with_root_certificates(roots);
        let config = match &settings.cert {
            None => config.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = certificates("the certificate for etcd", cert)?;
                config
                    .with_client_auth_cert(chain, private_key(key)?)
                    .map_err(|error| mismatch(cert, error))?
            }
        };
        Ok(Some(Self(TlsConnector::from(Arc::new(config)))))
    }

    /// With the member's name, as in its endpoint.
    pub(super) async fn connect(
        &self,
        authority: &str,
        stream: TcpStream,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
        self.0.connect(name, stream).await
    }
}
