//! The least that a request can cost on this machine: what is under any backend and server.
//!
//! ```text
//!   eventfd   CPU 0 <--> CPU 1       a kick and a call: one each way
//!   tcp       CPU 1 <--> CPU 1       32 bytes there, 4 KiB back; or the reverse for a write
//!   batched   CPU 1 <--> CPU 1       the same with 32 under way, one send and one receive for all that is there
//!   look      CPU 0 <--> CPU 1       a word in memory that somebody looks at, and a call back
//!   chain     CPU 0 <--> CPU 1       all calls of one request, in the order in which a stack makes them (`chain`)
//! ```
//!
//! The first three are blocking calls, nothing else: no epoll, no ring, no data looked at. Where the stacks are bound to CPUs these are, too.

use crate::bench::chain::{self, Chain};
use crate::bench::cpu::pin_this_thread;
use crate::bench::stats::Spread;
use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SMALL_BYTES: usize = 32;
const BLOCK_BYTES: usize = 4096;
/// Messages under way in the batched pair.
const BATCH: usize = 32;
/// Fewer say nothing; on a busy machine they take longer than was asked for.
const TRIPS_MIN: u64 = 100;
/// Whoever waits for longer waits for a peer that has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Floors of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floors {
    /// Median round trip of two eventfds, in us.
    pub eventfd_us: f64,
    /// Median round trip of 32 bytes there and 4 KiB back, in us.
    pub tcp_read_us: f64,
    /// Median round trip of 4 KiB there and 32 bytes back, in us.
    pub tcp_write_us: f64,
    /// CPU time of both ends for each message of the batched pair, 4 KiB back, in us.
    pub batched_read_us: f64,
    /// CPU time of both ends for each message of the batched pair, 4 KiB there, in us.
    pub batched_write_us: f64,
    /// Plain programs that make all calls of a 4 KiB read.
    pub chain_read: Chain,
    /// Of a 4 KiB write.
    pub chain_write: Chain,
}

/// Measures each for so long; what takes data, on so many bytes of it.
pub fn measure(pinned: bool, bytes: u64, time: Duration) -> Result<Floors> {
    let cpus = |a, b| if pinned { (Some(a), Some(b)) } else { (None, None) };
    let tcp = |there, back, in_flight| {
        let shape = Shape { there, back, in_flight };
        tcp(shape, cpus(1, 1), time)
    };
    let [chain_read, chain_write] =
        chain::measure(cpus(0, 1), bytes, time).context("the floor of a chain")?;
    Ok(Floors {
        chain_read,
        chain_write,
        eventfd_us: eventfd(cpus(0, 1), time).context("the floor of eventfds")?,
        tcp_read_us: tcp(SMALL_BYTES, BLOCK_BYTES, 1)?.p50_us,
        tcp_write_us: tcp(BLOCK_BYTES, SMALL_BYTES, 1)?.p50_us,
        batched_read_us: tcp(SMALL_BYTES, BLOCK_BYTES, BATCH)?.cpu_us,
        batched_write_us: tcp(BLOCK_BYTES, SMALL_BYTES, BATCH)?.cpu_us,
    })
}

/// A run of a pair.
#[derive(Clone, Copy, Debug)]
struct Trips {
    /// Median from sending to having the whole answer, in us.
    p50_us: f64,
    /// CPU time of both ends per message, in us.
    cpu_us: f64,
}

#[derive(Clone, Copy)]
struct Shape {
    there: usize,
    back: usize,
    in_flight: usize,
}

pub(super) fn bind(cpu: Option<usize>) -> Result<()> {
    cpu.map_or(Ok(()), pin_this_thread)
}

fn thread_cpu() -> Result<Duration> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?))
}

pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 10_000_000_000, 3).expect("bounds and digits are in range")
}

#[allow(clippy::cast_precision_loss, reason = "nanoseconds of a short wait")]
pub(super) fn p50_us(histogram: &Histogram<u64>) -> Result<f64> {
    if histogram.len() < TRIPS_MIN {
        bail!("only {} round trips in the time", histogram.len());
    }
    Ok(histogram.value_at_quantile(0.5) as f64 / 1000.0)
}

/// Whether to go on after the end, for too few round trips.
pub(super) fn is_short(trips: &Histogram<u64>, end: Instant) -> bool {
    trips.len() < TRIPS_MIN && Instant::now() < end + PATIENCE
}

pub(super) fn record(histogram: &mut Histogram<u64>, since: Instant) {
    histogram.saturating_record(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX));
}

/// Median round trip between two threads that sleep in read(2), in us.
fn eventfd((here, there): (Option<usize>, Option<usize>), time: Duration) -> Result<f64> {
    let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
    let (ping, pong) = (event()?, event()?);
    // Ends the echo, which only looks at what it reads.
    const LAST: u64 = 1 << 32;
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| -> Result<()> {
            bind(there)?;
            while ping.read()? < LAST {
                pong.write(1)?;
            }
            Ok(())
        });
        let caller = scope.spawn(|| -> Result<f64> {
            let measured = (|| {
                bind(here)?;
                let mut trips = histogram();
                let end = Instant::now() + time;
                while Instant::now() < end || is_short(&trips, end) {
                    let start = Instant::now();
                    ping.write(1)?;
                    pong.read()?;
                    record(&mut trips, start);
                }
                p50_us(&trips)
            })();
            ping.write(LAST)?;
            measured
        });
        let measured = caller.join().expect("no panic in a floor");
        echo.join().expect("no panic in a floor")?;
        measured
    })
}

/// Median of a call by a thread on CPU 1 that only looks, to a thread that sleeps in read(2) on CPU 0, in us.
pub fn look(time: Duration) -> Result<f64> {
    let call = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
    let (asked, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let looker = scope.spawn(|| -> Result<()> {
            pin_this_thread(1)?;
            let mut seen = 0;
            while !over.load(Ordering::Relaxed) {
                let now = asked.load(Ordering::Acquire);
                if now != seen {
                    seen = now;
                    call.write(1)?;
                }
                std::hint::spin_loop();
            }
            Ok(())
        });
        let caller = scope.spawn(|| {
            let measured = (|| {
                pin_this_thread(0)?;
                let mut trips = histogram();
                let end = Instant::now() + time;
                while Instant::now() < end || is_short(&trips, end) {
                    let start = Instant::now();
                    asked.fetch_add(1, Ordering::Release);
                    call.read()?;
                    record(&mut trips, start);
                }
                p50_us(&trips)
            })();
            over.store(true, Ordering::Relaxed);
            measured
        });
        let measured = caller.join().expect("no panic in a floor");
        looker.join().expect("no panic in a floor")?;
        measured
    })
}

/// A client that keeps some messages under way, and a server that answers each.
#[allow(clippy::cast_precision_loss, reason = "a count of messages of a short run")]
fn tcp(
    shape: Shape,
    (here, there): (Option<usize>, Option<usize>),
    time: Duration,
) -> Result<Trips> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    std::thread::scope(|scope| {
        let answered = scope.spawn(|| bind(there).and_then(|()| answer(server, shape)));
        let asked = scope.spawn(|| bind(here).and_then(|()| ask(client, shape, time)));
        let asked = asked.join().expect("no panic in a floor");
        let answered = answered.join().expect("no panic in a floor");
        let (trips, messages, cpu) = asked?;
        let cpu = cpu + answered?;
        Ok(Trips {
            p50_us: p50_us(&trips)?,
            cpu_us: 1e6 * cpu.as_secs_f64() / messages.max(1) as f64,
        })
    })
}

pub(super) fn ready(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(())
}

/// Answers until the client has gone; its CPU time.
fn answer(mut stream: TcpStream, shape: Shape) -> Result<Duration> {
    ready(&stream)?;
    let mut asked = vec![0; shape.there * shape.in_flight];
    let answers = vec![1; shape.back * shape.in_flight];
    let (mut bytes, before) = (0, thread_cpu()?);
    loop {
        match stream.read(&mut asked)? {
            0 => return Ok(thread_cpu()?.saturating_sub(before)),
            n => bytes += n,
        }
        let messages = bytes / shape.there;
        bytes %= shape.there;
        stream.write_all(&answers[..messages * shape.back])?;
    }
}

/// Asks for so long: the times of trips (of a batch's first message), messages answered, CPU time.
fn ask(
    mut stream: TcpStream,
    shape: Shape,
    time: Duration,
) -> Result<(Histogram<u64>, u64, Duration)> {
    ready(&stream)?;
    let questions = vec![2; shape.there * shape.in_flight];
    let mut answers = vec![0; shape.back * shape.in_flight];
    let (mut trips, mut messages, mut bytes) = (histogram(), 0, 0);
    let before = thread_cpu()?;
    let end = Instant::now() + time;
    let mut start = Instant::now();
    stream.write_all(&questions)?;
    loop {
        match stream.read(&mut answers)? {
            0 => bail!("the server of a floor has gone"),
            n => bytes += n,
        }
        let done = bytes / shape.back;
        bytes %= shape.back;
        if done == 0 {
            continue;
        }
        messages += done as u64;
        record(&mut trips, start);
        start = Instant::now();
        if start > end && !is_short(&trips, end) {
            // The server sees the end of the connection, with answers under way that nobody reads.
            let cpu = thread_cpu()?.saturating_sub(before);
            finish(stream, shape, done, bytes)?;
            return Ok((trips, messages, cpu));
        }
        stream.write_all(&questions[..done * shape.there])?;
    }
}

/// Takes the answers that are still under way, so that the server ends in an orderly way.
fn finish(mut stream: TcpStream, shape: Shape, done: usize, bytes: usize) -> Result<()> {
    let left = (shape.in_flight - done) * shape.back - bytes;
    stream.read_exact(&mut vec![0; left]).context("the last answers of a floor")
}

/// One figure of the floors over all rounds.
#[must_use]
pub fn spread(floors: &[Floors], figure: impl Fn(&Floors) -> f64) -> Spread {
    let figures: Vec<(u32, f64)> = (0..).zip(floors).map(|(n, floor)| (n, figure(floor))).collect();
    Spread::of(&figures)
}

/// Medians of requests at depth 1, with their rounds, as multiples of the sum of both round trips in the same round.
#[must_use]
pub fn multiples(floors: &[Floors], p50_us: &[(u32, f64)], is_read: bool) -> Spread {
    let multiple = |&(round, p50): &(u32, f64)| {
        let floor = floors.get(usize::try_from(round).unwrap_or(usize::MAX));
        let tcp = floor.map(|f| if is_read { f.tcp_read_us } else { f.tcp_write_us });
        let sum = floor.zip(tcp).map_or(f64::NAN, |(f, tcp)| f.eventfd_us + tcp);
        (round, p50 / sum)
    };
    let all: Vec<(u32, f64)> = p50_us.iter().map(multiple).collect();
    Spread::of(&all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floors(eventfd_us: f64, tcp_read_us: f64) -> Floors {
        Floors {
            eventfd_us,
            tcp_read_us,
            tcp_write_us: 2.0 * tcp_read_us,
            batched_read_us: 0.5,
            batched_write_us: 0.5,
            chain_read: Chain { p50_us: 1.0, iops: 1.0 },
            chain_write: Chain { p50_us: 1.0, iops: 1.0 },
        }
    }

    #[test]
    fn a_multiple_is_of_the_floors_of_its_own_round() {
        let all = [floors(4.0, 4.0), floors(8.0, 8.0)];
        let p50 = [(0, 16.0), (0, 16.0), (1, 16.0), (1, 32.0)];
        let reads = multiples(&all, &p50, true);
        assert_eq!(reads, Spread { median: 2.0, low: 1.5, high: 2.0 });
        let writes = multiples(&all, &p50[..2], false);
        assert!((writes.median - 16.0 / 12.0).abs() < 1e-9, "{writes:?}");
        assert!(multiples(&all, &[(2, 16.0)], true).median.is_nan(), "a round without floors");
    }

    #[test]
    fn floors_are_measured_on_any_machine_and_both_ends_count() {
        let all = measure(false, 1 << 20, Duration::ZERO).unwrap();
        let Floors {
            eventfd_us, tcp_read_us, tcp_write_us, batched_read_us, batched_write_us, ..
        } = all;
        for (trip, batched) in [(tcp_read_us, batched_read_us), (tcp_write_us, batched_write_us)] {
            assert!(eventfd_us > 0.1 && trip > 0.1 && batched > 0.01, "{all:?}");
        }
    }

    #[test]
    fn a_peer_that_goes_is_an_error_not_a_floor() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(listener.accept().unwrap());
        let shape = Shape { there: 32, back: 4096, in_flight: 4 };
        assert!(ask(client, shape, Duration::from_millis(10)).is_err());
    }
}
