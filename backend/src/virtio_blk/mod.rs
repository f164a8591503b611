//! The block device of virtio 1.2 section 5.2: configuration space and the
//! meaning of requests. Pure; knows neither rings nor storage.

pub mod config_space;
pub mod request;
