//! Handoff of volume access between hosts.
//!
//! `baton-coordinator` (plans a handoff, keeps its journal, answers the REST
//! API) and `baton-agent` (one per host: starts backends, drives the VMM) are
//! built here when the handoff protocol is built. The rule they obey is already
//! enforced elsewhere: the storage server admits a request by the epoch of the
//! volume's access record (`baton_protocol::access`), whoever says what.
