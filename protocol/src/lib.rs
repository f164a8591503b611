//! Wire vocabulary and pure state machines shared by every Baton daemon.
//!
//! Nothing here knows about sockets, clocks, threads or async: bytes go in and
//! values come out, events go in and effects come out. That is what lets the
//! same code run in the daemons, in the tests and in a simulator.
//!
//! | module | noun |
//! |---|---|
//! | [`units`] | newtypes that keep two integers from being swapped |
//! | [`version`] | wire versions; the enum's documentation is the changelog |
//! | [`frame`] | the fixed request and reply headers |
//! | [`message`] | opcodes and the bodies of HELLO, WELCOME and EVENT |
//! | [`status`] | typed errors on the wire |
//! | [`access`] | the access record: who may touch a volume, decided by epoch |
//! | [`handoff`] | moving the right to write from one host to another |
//! | [`busy_poll`] | how long a thread that ran out of work looks for more before it sleeps |
//! | [`window`] | sequence numbers of one queue: each request takes effect once |

pub mod access;
pub mod busy_poll;
mod cursor;
pub mod frame;
pub mod handoff;
pub mod message;
pub mod status;
pub mod units;
pub mod version;
pub mod window;

pub use busy_poll::{BusyPoll, POLL_US_MAX};
pub use frame::{FrameError, ReplyHeader, RequestHeader};
pub use message::{AccessMode, Event, EventKind, Features, Hello, Opcode, Welcome};
pub use status::Status;
pub use units::{ByteSize, Epoch, QueueId, Seq, SessionId, VolumeId};
pub use version::Version;
