//! What the end-to-end tests, the demo and the benchmark are made of.
//!
//! Starts real processes (`daemon`), real guests (`guest`, `qemu`, `qmp`) and plays the other side of a vhost-user
//! socket without a guest (`vhost_user`, `ring`, `raw_frontend`). Knows the command lines of Baton's programs;
//! links none of their code, so that both sides of a test cannot share a mistake.

pub mod daemon;
pub mod guest;
pub mod qemu;
pub mod qmp;
pub mod workspace;
