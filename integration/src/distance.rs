//! A long way between clients and a server: every byte takes the same time in each direction, in order, whatever else is
//! under way.
//!
//! For what must not depend on how far things are from each other, or only by so many round trips. A network that loses,
//! reorders and falls silent is `proxy`.

use anyhow::{Context, Result};
use nix::sys::prctl::set_timerslack;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

const READ_BYTES: usize = 256 << 10;

/// The near end of the way. Its threads end with the process.
#[derive(Clone, Copy, Debug)]
pub struct Distance {
    address: SocketAddr,
}

impl Distance {
    /// A way to `server` that takes so long in one direction, on a port of its own.
    pub fn start(server: SocketAddr, one_way: Duration) -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot bind the near end")?;
        let address = listener.local_addr()?;
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                // Dropped: a server that is down hangs up at once.
                let _ = TcpStream::connect(server).and_then(|far| lay(&near, &far, one_way));
            }
        });
        Ok(Self { address })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn lay(near: &TcpStream, far: &TcpStream, one_way: Duration) -> std::io::Result<()> {
    for (from, to) in [(near, far), (far, near)] {
        let (mut from, to) = (from.try_clone()?, to.try_clone()?);
        to.set_nodelay(true)?;
        let (leaves, arrives) = channel();
        thread::spawn(move || deliver(&arrives, to));
        thread::spawn(move || collect(&mut from, &leaves, one_way));
    }
    Ok(())
}

type Parcel = (Instant, Vec<u8>);

fn collect(from: &mut TcpStream, leaves: &Sender<Parcel>, one_way: Duration) {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        // The end of a connection takes as long as everything else: it is an empty parcel.
        let n = from.read(&mut buffer).unwrap_or(0);
        let sent = leaves.send((Instant::now() + one_way, buffer[..n].to_vec()));
        if n == 0 || sent.is_err() {
            return;
        }
    }
}

fn deliver(arrives: &Receiver<Parcel>, mut to: TcpStream) {
    // The kernel's 50 us, which sleepers are woken late by, twice in each round trip.
    let _ = set_timerslack(1);
    for (due, bytes) in arrives {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if bytes.is_empty() {
            let _ = to.shutdown(Shutdown::Write);
        } else if to.write_all(&bytes).is_err() {
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives_whole_in_order_and_not_early() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let one_way = Duration::from_millis(20);
        let way = Distance::start(server.local_addr().unwrap(), one_way).unwrap();
        let mut near = TcpStream::connect(way.address()).unwrap();
        let (mut far, _) = server.accept().unwrap();
        let sent: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[0]).collect();
        let start = Instant::now();
        let echo = thread::spawn(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).unwrap();
            far.write_all(&all).unwrap();
        });
        near.write_all(&sent).unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        near.read_to_end(&mut back).unwrap();
        echo.join().unwrap();
        assert_eq!(back, sent);
        assert!(start.elapsed() >= 2 * one_way, "{:?}", start.elapsed());
    }
}
