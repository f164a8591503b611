//! Ports for daemons that keep theirs over their restarts.
//!
//! Below the range from which the kernel takes the ports of connections: one in it may become a connection's between
//! two lives of the daemon, or before its first.

use anyhow::{Context, Result};
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

/// Below are ports with names, and those that people like.
const LOWEST: u16 = 12_000;
const TRIES: usize = 100;

/// A port of loopback that nobody listens on, for a daemon that is about to.
pub fn free_port() -> Result<SocketAddr> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let first: u16 = range.split_ascii_whitespace().next().context("a range")?.parse()?;
    let ports = u64::from(first.saturating_sub(LOWEST)).max(1);
    // Tests that run at once do not try the same ones.
    let random = || RandomState::new().build_hasher().finish();
    (0..TRIES)
        .filter_map(|_| {
            let port = LOWEST + u16::try_from(random() % ports).expect("less than a port");
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            TcpListener::bind(address).is_ok().then_some(address)
        })
        .next()
        .context("no port is free")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_connection_gets_a_port_of_a_daemon() {
        // Each in use, so that all are different.
        let taken: Vec<TcpListener> =
            (0..200).map(|_| TcpListener::bind(free_port().unwrap()).unwrap()).collect();
        let connection = |listener: &TcpListener| {
            let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            stream.local_addr().unwrap().port()
        };
        let lowest = taken.iter().map(connection).min().unwrap();
        let highest = taken.iter().map(|listener| listener.local_addr().unwrap().port()).max();
        assert!(highest.unwrap() < lowest, "{highest:?} {lowest}");
    }
}
