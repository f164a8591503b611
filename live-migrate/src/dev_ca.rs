//! A certificate authority to try Baton with: one command, one directory.
//!
//! The authority's key lies beside the certificates, so whoever reads the
//! directory can be anybody. For anything that matters, use the authority that
//! the site has, with the same URIs.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::identity::Identity;

/// Long enough for a trial, short enough not to be kept.
const VALID: Duration = Duration::days(365);
/// Clocks of hosts that differ.
const EARLIER: Duration = Duration::hours(1);

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum DevCaError {
    /// Something is there.
    #[error("{} exists; nothing is overwritten: choose another directory, or remove it", .0.display())]
    Exists(PathBuf),
    /// Nobody to certify.
    #[error("nobody is named; give at least one --host, --coordinator or --operator")]
    Nobody,
    /// The same one twice.
    #[error("{0} is named twice")]
    Twice(Identity),
    /// The disk.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The library.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
}

/// An authority, in memory.
#[derive(Debug)]
pub struct DevCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl DevCa {
    /// A new one.
    ///
    /// # Errors
    /// [`DevCaError::Certificate`].
    pub fn new() -> Result<Self, DevCaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Baton development CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = valid_from(OffsetDateTime::now_utc());
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// Its certificate, PEM.
    #[must_use]
    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// Its key, PEM.
    #[must_use]
    pub fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Certificate and key of somebody, PEM, valid for a year from `start`.
    ///
    /// # Errors
    /// [`DevCaError::Certificate`].
    pub fn issue(
        &self,
        identity: &Identity,
        start: OffsetDateTime,
    ) -> Result<(String, String), DevCaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, identity.name.as_str());
        let uri = Ia5String::try_from(identity.to_string())?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = valid_from(start);
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok((cert.pem(), key.serialize_pem()))
    }
}

fn valid_from(start: OffsetDateTime) -> (OffsetDateTime, OffsetDateTime) {
    (start - EARLIER, start + VALID)
}

/// Makes `dir` with `ca.pem`, `ca.key`, and `ROLE-NAME.pem` and `.key` of each.
///
/// # Errors
/// [`DevCaError`]; what is there is left alone.
pub fn write(dir: &Path, identities: &[Identity]) -> Result<(), DevCaError> {
    if identities.is_empty() {
        return Err(DevCaError::Nobody);
    }
    for (at, identity) in identities.iter().enumerate() {
        if identities[..at].contains(identity) {
            return Err(DevCaError::Twice(identity.clone()));
        }
    }
    // All of it before anything is on the disk.
    let ca = DevCa::new()?;
    let now = OffsetDateTime::now_utc();
    let mut files = vec![
        ("ca.pem".to_owned(), ca.certificate(), 0o644),
        ("ca.key".to_owned(), ca.key(), 0o600),
    ];
    for identity in identities {
        let (cert, key) = ca.issue(identity, now)?;
        let stem = format!("{}-{}", identity.role.name(), identity.name);
        files.push((format!("{stem}.pem"), cert, 0o644));
        files.push((format!("{stem}.key"), key, 0o600));
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => DevCaError::Exists(path),
            _ => DevCaError::Write { path, source },
        }
    };
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(failed(parent))?;
    }
    DirBuilder::new().mode(0o700).create(dir).map_err(failed(dir))?;
    for (name, text, mode) in files {
        let path = dir.join(name);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(failed(&path))?;
    }
    Ok(())
}
