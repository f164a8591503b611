//! Why an image cannot be opened. Each is one sentence that says what to do.

use std::io;
use std::path::PathBuf;

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RbdError {
    /// No such library.
    #[error(
        "cannot load `{name}`, which rbd:// volumes need on this host; install it (on Debian: apt-get install librbd1)"
    )]
    NoLibrary {
        /// File name.
        name: &'static str,
        /// Of the loader.
        #[source]
        source: libloading::Error,
    },
    /// A library of an older Ceph.
    #[error(
        "`{name}` has no `{symbol}`: it is too old; install the client libraries of Ceph 16.2 or newer"
    )]
    OldLibrary {
        /// File name.
        name: &'static str,
        /// First function that is missing.
        symbol: &'static str,
    },
    /// No configuration.
    #[error("cannot read Ceph's configuration {}; check the path, or name it with ?conf=/PATH", shown(conf.as_ref()))]
    Conf {
        /// As the URI has it.
        conf: Option<PathBuf>,
        /// What Ceph says.
        #[source]
        source: io::Error,
    },
    /// The library has no such setting.
    #[error(
        "this host's Ceph libraries do not know the setting `{0}`; install those of Ceph 16.2 or newer"
    )]
    Setting(&'static str),
    /// No key, or a wrong one.
    #[error(
        "the Ceph cluster does not let `client.{user}` in; check ?id= and the keyring that {} names",
        shown(conf.as_ref())
    )]
    Key {
        /// Without `client.`.
        user: String,
        /// As the URI has it.
        conf: Option<PathBuf>,
        /// What Ceph says.
        #[source]
        source: io::Error,
    },
    /// Nobody there.
    #[error(
        "no monitor of the Ceph cluster answers within {after_ms} ms; check `mon host` in {} and the network",
        shown(conf.as_ref())
    )]
    NoMonitor {
        /// As the URI has it.
        conf: Option<PathBuf>,
        /// How long was waited, milliseconds.
        after_ms: u128,
    },
    /// The monitors answer, the rest does not.
    #[error(
        "the Ceph cluster did not open image `{spec}` within {after_ms} ms; look at `ceph health detail`"
    )]
    NoAnswer {
        /// Which.
        spec: String,
        /// How long was waited, milliseconds.
        after_ms: u128,
    },
    /// No such pool.
    #[error(
        "the Ceph cluster has no pool `{0}`; check the name, or make it with `ceph osd pool create {0}` and `rbd pool init {0}`"
    )]
    NoPool(String),
    /// No such image.
    #[error(
        "there is no image `{0}` in Ceph; check the name, or make it with `rbd create --size 10G {0}`"
    )]
    NoImage(String),
    /// No such snapshot, or no such image.
    #[error("there is no snapshot `{0}` in Ceph; check both names with `rbd snap ls`")]
    NoSnapshot(String),
    /// Not one sector.
    #[error(
        "image `{0}` is smaller than one sector; make it larger with `rbd resize --size 10G {0}`"
    )]
    Empty(String),
    /// The user has too few capabilities.
    #[error(
        "`client.{user}` may not use image `{spec}`; give it `mon 'profile rbd' osd 'profile rbd pool={pool}'` with `ceph auth caps`"
    )]
    Denied {
        /// Without `client.`.
        user: String,
        /// Pool of the image.
        pool: String,
        /// Which image.
        spec: String,
    },
    /// Nothing would keep a second writer away.
    #[error(
        "image `{0}` has no exclusive lock, without which two hosts could write it; run `rbd feature enable {0} exclusive-lock`"
    )]
    NoLock(String),
    /// A Ceph client that is alive.
    #[error(
        "image `{spec}` is in use by the Ceph client {client}; stop it (`rbd status {spec}` shows it), or open a snapshot"
    )]
    InUse {
        /// Which image.
        spec: String,
        /// Address and nonce.
        client: String,
    },
    /// Another VM's.
    #[error(
        "image `{spec}` belongs to `{owner}`; end that one's backend, or, if its host is surely dead, take the image from it with `baton handoff fence`"
    )]
    NotOwner {
        /// Which image.
        spec: String,
        /// Host and VM.
        owner: String,
    },
    /// The access record says no.
    #[error("image `{spec}` cannot be had: {refusal}")]
    Refused {
        /// Which image.
        spec: String,
        /// Why.
        refusal: baton_protocol::access::Refusal,
    },
    /// The access record cannot be read.
    #[error(
        "the note `baton.access` of image `{0}` is not this image's, or of a newer Baton: upgrade, or, if no backend uses the image, remove it with `rbd image-meta remove {0} baton.access`"
    )]
    Note(String),
    /// `rbd config` has the last word, and says something unsafe.
    #[error(
        "{of} `{name}` sets `{key}` for its clients, which is not safe here; undo it with `rbd config {level} remove {name} {key}`"
    )]
    Override {
        /// "image" or "pool", for people.
        of: &'static str,
        /// The same, for the command.
        level: &'static str,
        /// Which.
        name: String,
        /// Setting.
        key: &'static str,
    },
    /// A step that has no sentence of its own.
    #[error("Ceph failed to {what} for image `{spec}`")]
    Ceph {
        /// Step.
        what: &'static str,
        /// Which image.
        spec: String,
        /// What Ceph says.
        #[source]
        source: io::Error,
    },
}

fn shown(conf: Option<&PathBuf>) -> String {
    conf.map_or_else(|| "/etc/ceph/ceph.conf".to_owned(), |path| format!("`{}`", path.display()))
}
