//! Several coordinators on one etcd: who leads, and the journal that they share.
//!
//! Nothing here decides what is safe. A lease says when to try to lead; the
//! transaction that takes the leader's key takes the next term with it, every
//! write of the journal is a transaction under that key, and storage servers and
//! agents refuse a term lower than the highest they have heard
//! (docs/decisions/0009).
//!
//! | module | is |
//! |---|---|
//! | [`election`] | when to campaign, lead and end: a pure function |
//! | [`chain`] | the transactions, and what their answers mean: pure |
//! | [`txn`] | a transaction as data, and as etcd's JSON gateway takes it |
//! | [`campaign`] | carries out what the election says |
//! | [`store`] | the journal's [`Store`](super::journal::Store) |
//! | [`client`], [`tls`] | HTTP to one of several members |
//! | [`settings`] | the section `[etcd]` |

pub mod campaign;
pub mod chain;
pub mod client;
pub mod election;
#[cfg(test)]
mod model;
pub mod settings;
pub mod store;
mod tls;
pub mod txn;

/// Why etcd did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EtcdError {
    /// No member answers, or too few of them can hear each other.
    #[error(
        "etcd cannot be reached at {at}: {what}; see to its members, a majority must be up: VMs run on meanwhile, and no handoff begins"
    )]
    Unreachable {
        /// The endpoints.
        at: String,
        /// Why.
        what: String,
    },
    /// A write of which nobody knows whether it is there.
    #[error(
        "etcd did not say whether it has written this ({what}), so this coordinator leads no more; ask again with the same id, and the next one answers"
    )]
    Unknown {
        /// The last that was heard.
        what: String,
    },
    /// Somebody else leads.
    #[error("another coordinator leads now and this one writes nothing any more; ask again")]
    Deposed,
    /// Larger than etcd takes.
    #[error(
        "{bytes} bytes are more than etcd takes at once ({most}); nothing was started: move fewer volumes in one VM"
    )]
    TooLarge {
        /// So many.
        bytes: usize,
        /// At most.
        most: usize,
    },
    /// Its quota is used up.
    #[error(
        "etcd has no space left (alarm NOSPACE), nothing was started: compact and defragment it or raise --quota-backend-bytes, then `etcdctl alarm disarm`; and turn on --auto-compaction-retention"
    )]
    NoSpace,
    /// It wants to know who asks.
    #[error("etcd asks for a user; set `user` and `password_file` in [etcd]")]
    NoUser,
    /// Wrong user or password.
    #[error(
        "etcd does not accept user `{user}` with this password; see to `user` and `password_file` in [etcd]"
    )]
    Credentials {
        /// As configured.
        user: String,
    },
    /// The user may not.
    #[error(
        "etcd does not let {who} use the keys under {prefix}; grant it: etcdctl role grant-permission ROLE readwrite --prefix=true {prefix}"
    )]
    Forbidden {
        /// As configured.
        who: String,
        /// As configured.
        prefix: String,
    },
    /// Certificates.
    #[error(
        "etcd at {at} and this coordinator do not trust each other: {what}; see to `ca`, `cert` and `key` in [etcd]"
    )]
    Distrust {
        /// Which endpoint.
        at: String,
        /// Why.
        what: String,
    },
    /// Something else answers.
    #[error(
        "what answers at {at} is not etcd's client port ({what}); see to `endpoints` in [etcd]: it needs etcd 3.4 or newer, and its client port is 2379 by custom"
    )]
    Foreign {
        /// Which endpoint.
        at: String,
        /// What came.
        what: String,
    },
    /// A value under our keys that we cannot read.
    #[error(
        "{key} in etcd is not what a coordinator of this version writes there ({what}); is the prefix used by something else?"
    )]
    Value {
        /// Which key.
        key: String,
        /// Why.
        what: String,
    },
    /// The lease is over.
    #[error("the lease is over")]
    LeaseGone,
    /// Anything else.
    #[error("etcd refused: {0}")]
    Refused(String),
}
