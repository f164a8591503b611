//! `baton-agent`: see the library.
fn main() {}
