//! The device against a front-end without a VM, on a volume that completes out of order and on command.
//!
//! Everything runs in this process: the disk server on threads of its own, the front-end in the test.

mod broken;
mod control;
mod device;
mod dirty_log;
mod drain;
mod gated;
mod memory;
mod order;
mod restart;
mod volume;
mod write_cache;
