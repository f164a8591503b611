//! The driver for NBD servers, as the protocol's document defines them: nbdkit,
//! qemu-nbd, qemu-storage-daemon and others.
//!
//! ```text
//!  NbdVolume --open_queue--> NbdQueue --- Link --- Session --- Handshake
//!                                          |          |    \-- Table
//!                                socket, timer    bytes in, bytes out
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`uri`] | how a person names an export |
//! | [`wire`] | the bytes |
//! | [`errno`] | what an error means to the guest |
//! | [`allocation`] | what an export tells of its holes |
//! | [`handshake`] | from the greeting to an export |
//! | [`table`] | requests and what was cut from them |
//! | [`session`], [`receive`] | one conversation over any number of connections, sans-IO |
//! | [`link`] | what gives a session a socket and a clock |
//! | [`tls`] | what is between link and socket when the URI says so |
//! | [`volume`] | the export as a volume, and its queues |
//!
//! NBD has no fence: a server does not know who may write. Nothing here can keep
//! two hosts apart.

mod allocation;
mod errno;
mod handshake;
mod link;
mod receive;
mod session;
mod table;
mod tls;
pub(crate) mod uri;
pub(crate) mod volume;
mod wire;

pub(crate) use handshake::EXPORT_BYTES_MAX;

use crate::engine::{Capabilities, Support};
use crate::fence::Fence;

/// What this driver can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    fence: Fence::Cooperative,
    handoff: true,
    queues: Support::If("if the server says CAN_MULTI_CONN"),
    discard: Support::If("if the server has TRIM"),
    growth: Support::If("at the next reconnect"),
    waits: Support::Yes,
    encrypted: Support::If("with `nbds://`"),
};

#[cfg(fuzzing)]
pub mod fuzz;
