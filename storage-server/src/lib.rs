//! The storage server as a library; `baton-storage` (`main.rs`) is arguments, configuration and `run`.

pub mod store;
