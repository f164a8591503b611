//! The network between two QEMUs during a migration: it holds whatever the other end does not read.
//!
//! Without it, the socket to a destination that is frozen would fill up at a moment that depends on the machine's load,
//! and the source's QEMU, which sends under its big lock, would hang as well.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

/// Bytes read at once.
const PIECE: usize = 64 << 10;

/// What the last bytes of a migration are: the end of a JSON description of the guest's devices.
const END_OF_STREAM: &[u8] = b"]}";

/// One connection from a source to a destination. It ends when either end does.
#[derive(Debug)]
pub struct Wire {
    address: SocketAddr,
    /// The last bytes that the source has sent.
    last: Arc<Mutex<Vec<u8>>>,
}

impl Wire {
    /// Carries the first connection that comes to `destination`.
    pub fn to(destination: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
        let address = listener.local_addr()?;
        let last = Arc::new(Mutex::new(Vec::new()));
        let watch = Arc::clone(&last);
        std::thread::spawn(move || {
            // An end that is gone is what the other end then sees.
            let Ok((source, _)) = listener.accept() else { return };
            let Ok(destination) = TcpStream::connect(destination) else { return };
            carry(source, destination, &watch);
        });
        Ok(Self { address, last })
    }

    /// Where the source connects.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether the source has sent the whole guest.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        *self.last.lock().expect("the carrier does not panic") == END_OF_STREAM
    }
}

fn carry(mut source: TcpStream, mut destination: TcpStream, last: &Mutex<Vec<u8>>) {
    let (Ok(mut answers), Ok(mut to_source)) = (destination.try_clone(), source.try_clone()) else {
        return;
    };
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut answers, &mut to_source);
        let _ = to_source.shutdown(Shutdown::Both);
    });
    // Unbounded on purpose: it holds at most a guest's RAM.
    let (sender, receiver) = channel::<Vec<u8>>();
    std::thread::spawn(move || deliver(&receiver, &mut destination));
    let mut piece = vec![0; PIECE];
    while let Ok(len @ 1..) = source.read(&mut piece) {
        keep_last(&mut last.lock().expect("nobody panics with this"), &piece[..len]);
        if sender.send(piece[..len].to_vec()).is_err() {
            break;
        }
    }
}

fn keep_last(last: &mut Vec<u8>, piece: &[u8]) {
    last.extend_from_slice(&piece[piece.len().saturating_sub(END_OF_STREAM.len())..]);
    let old = last.len().saturating_sub(END_OF_STREAM.len());
    last.drain(..old);
}

fn deliver(pieces: &Receiver<Vec<u8>>, destination: &mut TcpStream) {
    for piece in pieces {
        if destination.write_all(&piece).is_err() {
            return;
        }
    }
    // What was sent is delivered, and only then the end.
    let _ = destination.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_that_does_not_read_holds_up_nobody_and_gets_everything() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Wire::to(listener.local_addr().unwrap()).unwrap();
        let mut source = TcpStream::connect(wire.address()).unwrap();
        let (mut destination, _) = listener.accept().unwrap();
        // More than any socket holds; this would never return.
        let sent: Vec<u8> = (0..40_u32 << 20).map(|n| n.to_le_bytes()[2]).collect();
        source.write_all(&sent).unwrap();
        assert!(!wire.is_complete());
        source.write_all(b"]").unwrap();
        source.write_all(b"}").unwrap();
        while !wire.is_complete() {
            std::thread::yield_now();
        }
        destination.write_all(b"ok").unwrap();
        let mut answer = [0; 2];
        source.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ok");
        // Nothing of it is lost when the source goes away.
        source.shutdown(Shutdown::Both).unwrap();
        let mut got = Vec::new();
        destination.read_to_end(&mut got).unwrap();
        assert!(got.len() == sent.len() + 2 && got.starts_with(&sent));
    }
}
