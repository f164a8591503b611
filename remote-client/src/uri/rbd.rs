//! `rbd://POOL/IMAGE[@SNAPSHOT][?conf=PATH&id=USER&namespace=NAME&direct-reads=off]`.

use std::fmt;
use std::path::PathBuf;

use super::{Escaped, UriError, VolumeUri, absolute, shown, unescape};

/// A block image of a Ceph cluster, or one of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdUri {
    /// Pool.
    pub pool: String,
    /// Name of the image.
    pub image: String,
    /// Read this snapshot instead of the image.
    pub snapshot: Option<String>,
    /// Part of the pool.
    pub namespace: Option<String>,
    /// Ceph's configuration; `None`: where Ceph's own programs look for it.
    pub conf: Option<PathBuf>,
    /// Ceph user, without `client.`; `None`: `admin`.
    pub id: Option<String>,
    /// Reads may go past librbd to the image's objects.
    pub direct_reads: bool,
}

impl RbdUri {
    /// Ceph user, without `client.`.
    #[must_use]
    pub fn user(&self) -> &str {
        self.id.as_deref().unwrap_or("admin")
    }

    /// As Ceph's own tools take it: `POOL[/NAMESPACE]/IMAGE[@SNAPSHOT]`.
    #[must_use]
    pub fn spec(&self) -> String {
        let mut spec = self.pool.clone();
        for part in self.namespace.iter().chain([&self.image]) {
            spec.push('/');
            spec.push_str(part);
        }
        if let Some(snapshot) = &self.snapshot {
            spec.push('@');
            spec.push_str(snapshot);
        }
        spec
    }
}

pub(super) fn parse(rest: &str) -> Result<VolumeUri, UriError> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (pool, image) = path.split_once('/').unwrap_or((path, ""));
    let (image, snapshot) = match image.split_once('@') {
        Some((image, snapshot)) => (image, Some(name(snapshot)?)),
        None => (image, None),
    };
    let mut uri = RbdUri {
        pool: name(pool)?,
        image: name(image)?,
        snapshot,
        namespace: None,
        conf: None,
        id: None,
        direct_reads: true,
    };
    for pair in query.split('&').filter(|_| rest.contains('?')) {
        match pair.split_once('=') {
            Some(("conf", path)) if uri.conf.is_none() => uri.conf = Some(absolute(path)?),
            Some(("id", user)) if uri.id.is_none() => uri.id = Some(name(user)?),
            Some(("namespace", space)) if uri.namespace.is_none() => {
                uri.namespace = Some(name(space)?);
            }
            Some(("direct-reads", "off")) if uri.direct_reads => uri.direct_reads = false,
            _ => return Err(UriError::Unexpected(pair.to_owned(), "rbd")),
        }
    }
    Ok(VolumeUri::Rbd(uri))
}

/// A name that Ceph's tools can write in one word with others.
fn name(text: &str) -> Result<String, UriError> {
    let name = unescape(text)?;
    if name.is_empty() || name.contains(['/', '@']) {
        return Err(UriError::RbdName(name));
    }
    Ok(name)
}

impl fmt::Display for RbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rbd://{}/{}", Escaped(&self.pool), Escaped(&self.image))?;
        if let Some(snapshot) = &self.snapshot {
            write!(f, "@{}", Escaped(snapshot))?;
        }
        let conf = self.conf.as_deref().map(|path| shown(path).into_owned());
        let mut before = '?';
        let direct = (!self.direct_reads).then(|| "off".to_owned());
        for (key, value) in [
            ("conf", &conf),
            ("id", &self.id),
            ("namespace", &self.namespace),
            ("direct-reads", &direct),
        ] {
            if let Some(value) = value {
                write!(f, "{before}{key}={}", Escaped(value))?;
                before = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Result<VolumeUri, UriError> {
        text.parse()
    }

    #[test]
    fn each_part_is_found_and_prints_back() {
        let plain = RbdUri {
            pool: "vms".to_owned(),
            image: "web".to_owned(),
            snapshot: None,
            namespace: None,
            conf: None,
            id: None,
            direct_reads: true,
        };
        let full = RbdUri {
            snapshot: Some("before upgrade".to_owned()),
            namespace: Some("east".to_owned()),
            conf: Some(PathBuf::from("/etc/ceph/a&b.conf")),
            id: Some("baton".to_owned()),
            direct_reads: false,
            ..plain.clone()
        };
        for (text, uri, spec) in [
            ("rbd://vms/web", &plain, "vms/web"),
            (
                "rbd://vms/web@before%20upgrade?conf=/etc/ceph/a%26b.conf&id=baton&namespace=east&direct-reads=off",
                &full,
                "vms/east/web@before upgrade",
            ),
        ] {
            assert_eq!(parsed(text), Ok(VolumeUri::Rbd(uri.clone())), "{text}");
            assert_eq!((uri.to_string().as_str(), uri.spec().as_str()), (text, spec));
        }
        assert_eq!((plain.user(), full.user()), ("admin", "baton"));
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        for (text, part) in [
            ("rbd://vms", "write rbd://POOL/IMAGE"),
            ("rbd:///web", "write rbd://POOL/IMAGE"),
            ("rbd://vms/", "write rbd://POOL/IMAGE"),
            ("rbd://vms/east/web", "?namespace="),
            ("rbd://vms/web@", "write rbd://POOL/IMAGE"),
            ("rbd://vms/web@a@b", "write rbd://POOL/IMAGE"),
            ("rbd://vms/web?", "`` has no place in a rbd:// URI"),
            ("rbd://vms/web?x=1", "`x=1` has no place in a rbd:// URI"),
            ("rbd://vms/web?direct-reads=on", "`direct-reads=on` has no place"),
            ("rbd://vms/web?id=a&id=b", "`id=b` has no place"),
            ("rbd://vms/web?id=", "write rbd://POOL/IMAGE"),
            ("rbd://vms/web?conf=ceph.conf", "not an absolute path"),
            ("rbd://vms/w%0", "percent escape"),
        ] {
            let error = parsed(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "rbd://[ -~]{0,60}") {
            if let Ok(uri) = parsed(&text) {
                prop_assert_eq!(parsed(&uri.to_string()), Ok(uri));
            }
        }
    }
}
