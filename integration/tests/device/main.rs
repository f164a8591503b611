//! `baton-backend` as a process, with a local file as its volume: what it promises to guests, front-ends and the
//! people who start it. No VM takes part; what needs one is in `guest_on_file.rs` and `trouble.rs`.

mod bad_guest;
mod hostile;
mod messages;
mod program;
mod support;
mod takeover;
mod virtio;
