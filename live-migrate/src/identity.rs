//! Who a peer is: a role and a name, as a URI in its certificate.
//!
//! `baton://host/NAME`, `baton://coordinator/NAME`, `baton://operator/NAME`.
//! Names of machines in certificates (DNS, IP) are not looked at: hosts change
//! addresses, and an address says nothing about what its owner may do.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

const SCHEME: &str = "baton://";
const NAME_BYTES_MAX: usize = 64;

/// What a peer may do, roughly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A host: its agent, its backends.
    Host,
    /// Plans handoffs.
    Coordinator,
    /// A person, or a program in a person's name.
    Operator,
}

/// A role and a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// What it may do.
    pub role: Role,
    /// Which one of them it is.
    pub name: String,
}

/// Why something is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not of our form.
    #[error(
        "`{0}` is no identity; write baton://ROLE/NAME with a role of host, coordinator or operator"
    )]
    Form(String),
    /// A name we do not take.
    #[error(
        "`{0}` cannot be a name; use a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`"
    )]
    Name(String),
    /// A certificate that names nobody, or several.
    #[error("the certificate has {0} baton:// URIs among its alternative names; it must have one")]
    Count(usize),
    /// Not a certificate.
    #[error("the certificate cannot be read")]
    Certificate,
}

impl Role {
    /// As in the URI.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Coordinator => "coordinator",
            Self::Operator => "operator",
        }
    }
}

impl Identity {
    /// Checks the name.
    ///
    /// # Errors
    /// [`IdentityError::Name`].
    pub fn new(role: Role, name: &str) -> Result<Self, IdentityError> {
        if !is_name(name) {
            return Err(IdentityError::Name(name.to_owned()));
        }
        Ok(Self { role, name: name.to_owned() })
    }

    /// Whom a certificate names. Does not check who signed it.
    ///
    /// # Errors
    /// [`IdentityError`] when it names nobody, or several.
    pub fn of_certificate(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let cert = EndEntityCert::try_from(der).map_err(|_| IdentityError::Certificate)?;
        let ours: Vec<&str> =
            cert.valid_uri_names().filter(|uri| uri.starts_with(SCHEME)).collect();
        match ours[..] {
            [uri] => uri.parse(),
            _ => Err(IdentityError::Count(ours.len())),
        }
    }
}

/// Whether hosts, VMs and disks may be called so: it is safe in a path and a URI.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(rest)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role.name(), self.name)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(text.to_owned());
        let (role, name) =
            text.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/')).ok_or_else(form)?;
        let role = [Role::Host, Role::Coordinator, Role::Operator]
            .into_iter()
            .find(|known| known.name() == role)
            .ok_or_else(form)?;
        Self::new(role, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_an_identity_and_what_is_not() {
        for good in ["baton://host/a", "baton://coordinator/c-1", "baton://operator/me.x_9"] {
            assert_eq!(good.parse::<Identity>().expect("good").to_string(), good);
        }
        let long = format!("baton://host/{}", "a".repeat(65));
        for bad in [
            "",
            "host/a",
            "baton://host",
            "baton://host/",
            "baton://root/a",
            "baton://host/a/b",
            "baton://host/../x",
            "baton://host/-a",
            "baton://host/a b",
            "BATON://host/a",
            &long,
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_and_any_bytes_are_safe(text in ".{0,40}", der in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
            prop_assert!(Identity::of_certificate(&CertificateDer::from(der)).is_err());
        }
    }
}
