//! The system calls that one 4 KiB request at a time takes, and nothing else: no ring, no protocol, no bookkeeping.
//!
//! ```text
//!   CPU 0   front-end   write kick, read call
//!   CPU 1   backend     epoll_wait, send, epoll_wait, recv, write call
//!   CPU 1   server      epoll_wait, recv, pread or pwrite, send
//! ```
//!
//! Whoever serves a disk by these calls is not faster than this. Sockets are watched edge-triggered and the server has a
//! short time slice, which is the fastest way to make them that is known here.

use crate::bench::floor::{bind, histogram, is_short, p50_us, ready, record};
use crate::workspace::TestDir;
use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BLOCK_BYTES: usize = 4096;
/// As in Baton's protocol.
const REQUEST_BYTES: usize = 64;
const REPLY_BYTES: usize = 32;
/// Wakes somebody for the last time.
const LAST: u64 = 1 << 32;
const KICK: u64 = 1;
const SOCKET: u64 = 2;

/// What such programs reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Chain {
    /// Median from the kick to the call, in us.
    pub p50_us: f64,
    /// Requests per second.
    pub iops: f64,
}

#[derive(Clone, Copy, Debug)]
struct Work {
    is_read: bool,
    /// Of the file, whose blocks are taken at random.
    blocks: u64,
}

impl Work {
    fn request_bytes(self) -> usize {
        REQUEST_BYTES + if self.is_read { 0 } else { BLOCK_BYTES }
    }

    fn reply_bytes(self) -> usize {
        REPLY_BYTES + if self.is_read { BLOCK_BYTES } else { 0 }
    }
}

/// Reads and writes, for so long each, on a file of so many bytes in memory. The CPUs are the front-end's and the others'.
pub fn measure(
    (front, back): (Option<usize>, Option<usize>),
    bytes: u64,
    time: Duration,
) -> Result<[Chain; 2]> {
    let dir = TestDir::in_memory("chain")?;
    let file = File::options().read(true).write(true).create_new(true).open(dir.join("data"))?;
    let blocks = (bytes / BLOCK_BYTES as u64).max(1);
    let piece = vec![1; 256 * BLOCK_BYTES];
    for at in (0..blocks * BLOCK_BYTES as u64).step_by(piece.len()) {
        file.write_all_at(&piece, at).context("cannot fill a file in memory")?;
    }
    let run = |is_read| chain(Work { is_read, blocks }, &file, (front, back), time);
    Ok([run(true)?, run(false)?])
}

fn chain(
    work: Work,
    file: &File,
    (front, back): (Option<usize>, Option<usize>),
    time: Duration,
) -> Result<Chain> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    ready(&client)?;
    ready(&server)?;
    let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
    let (kick, call, stop) = (event()?, event()?, AtomicBool::new(false));
    std::thread::scope(|scope| {
        let served = scope.spawn(|| bind(back).and_then(|()| serve(server, file, work)));
        let passed = scope.spawn(|| {
            let passed = bind(back).and_then(|()| pass(&client, &kick, &call, &stop, work));
            // Whatever happened, nobody waits for this thread any more.
            let _ = (client.shutdown(Shutdown::Both), call.write(LAST));
            passed
        });
        let asked = scope.spawn(|| {
            let asked = bind(front).and_then(|()| ask(&kick, &call, time));
            stop.store(true, Ordering::Relaxed);
            kick.write(1)?;
            asked
        });
        let asked = asked.join().expect("no panic in a chain");
        passed.join().expect("no panic in a chain")?;
        served.join().expect("no panic in a chain")?;
        asked
    })
}

/// The front-end.
#[allow(clippy::cast_precision_loss, reason = "a count of requests of a short run")]
fn ask(kick: &EventFd, call: &EventFd, time: Duration) -> Result<Chain> {
    let mut trips = histogram();
    let start = Instant::now();
    let end = start + time;
    while Instant::now() < end || is_short(&trips, end) {
        let asked = Instant::now();
        kick.write(1)?;
        if call.read()? >= LAST {
            bail!("the backend of a chain has gone");
        }
        record(&mut trips, asked);
    }
    let iops = trips.len() as f64 / start.elapsed().as_secs_f64();
    Ok(Chain { p50_us: p50_us(&trips)?, iops })
}

fn watch(epoll: &Epoll, fd: impl AsFd, what: u64) -> Result<()> {
    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, what))?;
    Ok(())
}

/// The backend: what is kicked goes to the server, and what it answers is called.
fn pass(
    mut server: &TcpStream,
    kick: &EventFd,
    call: &EventFd,
    stop: &AtomicBool,
    work: Work,
) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    watch(&epoll, kick, KICK)?;
    watch(&epoll, server, SOCKET)?;
    let request = vec![2; work.request_bytes()];
    let mut replies = vec![0; 64 * BLOCK_BYTES];
    let (mut events, mut bytes) = ([EpollEvent::empty(); 8], 0);
    while !stop.load(Ordering::Relaxed) {
        let happened = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..happened] {
            if event.data() == KICK {
                server.write_all(&request)?;
                continue;
            }
            match server.read(&mut replies)? {
                0 => bail!("the server of a chain has gone"),
                n => bytes += n,
            }
            if bytes >= work.reply_bytes() {
                bytes = 0;
                call.write(1)?;
            }
        }
    }
    Ok(())
}

/// The storage server, until its client has gone.
fn serve(mut client: TcpStream, file: &File, work: Work) -> Result<()> {
    // Old kernels, and those who may not: slower, and a floor all the same.
    let _ = baton_storage_server::ask_for_short_slice();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    watch(&epoll, &client, SOCKET)?;
    let (mut requests, mut reply) = (vec![0; 4 * BLOCK_BYTES], vec![3; work.reply_bytes()]);
    let mut places = fastrand::Rng::with_seed(1);
    let (mut events, mut bytes) = ([EpollEvent::empty(); 8], 0);
    loop {
        epoll.wait(&mut events, EpollTimeout::NONE)?;
        match client.read(&mut requests)? {
            0 => return Ok(()),
            n => bytes += n,
        }
        if bytes < work.request_bytes() {
            continue;
        }
        bytes = 0;
        let at = places.u64(..work.blocks) * BLOCK_BYTES as u64;
        if work.is_read {
            file.read_exact_at(&mut reply[REPLY_BYTES..], at)?;
        } else {
            file.write_all_at(&requests[..BLOCK_BYTES], at)?;
        }
        client.write_all(&reply)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_measured_on_any_machine() {
        for chain in measure((None, None), 1 << 20, Duration::ZERO).unwrap() {
            assert!(chain.p50_us > 0.1 && chain.iops > 1.0, "{chain:?}");
        }
    }

    #[test]
    fn a_backend_that_goes_is_an_error_not_a_figure() {
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        let (kick, call) = (event(), event());
        call.write(LAST).unwrap();
        assert!(ask(&kick, &call, Duration::from_millis(10)).is_err());
    }
}
