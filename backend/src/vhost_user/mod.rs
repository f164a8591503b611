//! The vhost-user protocol, back-end side (QEMU `docs/interop/vhost-user.rst`).
//!
//! | module | noun |
//! |---|---|
//! | [`message`] | bytes and descriptors to a [`message::Request`] and back; pure |
//! | [`connection`] | the socket: frames, passed descriptors, replies |
//! | [`features`] | the feature bits this back-end has |
//! | [`refused`] | why a message is refused |
//! | [`session`] | one front-end: what it negotiated, what its rings look like |
//!
//! Why an own message layer and not the `vhost` crate's: see
//! `docs/decisions/0001-own-vhost-user-layer.md`.

pub mod connection;
pub mod features;
pub mod message;
pub mod refused;
pub mod session;
