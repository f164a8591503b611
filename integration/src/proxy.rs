//! A hostile network between a client and a storage server: requests late, and twice when their client has connected
//! again; replies late and out of order; silence, cut connections.
//!
//! Requests pass in their order, as TCP has it. Replies are taken apart into frames, each is held for a random time, and they leave in
//! the order in which their times end: the server is free to answer in any order, so this is a network and a server
//! at their worst, not a broken one. Deterministic for a seed as far as threads allow.

use anyhow::{Context, Result};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Of a reply (docs/wire.md): its header, and where in it the length of the payload is.
const REPLY_HEADER_BYTES: usize = 32;
const REPLY_MAGIC: &[u8] = b"BTNr";
const PAYLOAD_LEN_AT: usize = 24;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// What the network does now.
#[derive(Debug)]
struct Weather {
    request_delay_us_max: AtomicU64,
    reply_delay_us_max: AtomicU64,
    /// Nothing passes in either direction, and nobody is told.
    silent: AtomicBool,
    /// Requests are kept here and not passed on.
    holding: AtomicBool,
    request_bytes: AtomicU64,
    random: Mutex<fastrand::Rng>,
    /// Replies are Baton's and taken apart; others pass as they come.
    framed: bool,
    connections: Mutex<Vec<Connection>>,
}

/// A client and its server.
#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    /// By how much later arrives what is under way; 0 as long as the client is there.
    late_us: Arc<AtomicU64>,
}

impl Weather {
    fn random(&self, below: u64) -> u64 {
        self.random.lock().expect("no panic while held").u64(..below.max(1))
    }
}

/// A running proxy. Its threads end with the process.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    weather: Arc<Weather>,
}

impl Proxy {
    /// Listens on a port of its own and passes to `server`.
    pub fn start(server: SocketAddr, seed: u64) -> Result<Self> {
        Self::begin(LOOPBACK, server, seed, true)
    }

    /// The same for a server of another protocol: replies pass as they come.
    pub fn of_bytes(server: SocketAddr) -> Result<Self> {
        Self::begin(LOOPBACK, server, 1, false)
    }

    /// The same on another address of this host's.
    pub fn of_bytes_at(ip: IpAddr, server: SocketAddr) -> Result<Self> {
        Self::begin(ip, server, 1, false)
    }

    fn begin(ip: IpAddr, server: SocketAddr, seed: u64, framed: bool) -> Result<Self> {
        let listener = TcpListener::bind((ip, 0)).context("cannot bind the proxy")?;
        let address = listener.local_addr()?;
        let weather = Arc::new(Weather {
            request_delay_us_max: AtomicU64::new(0),
            reply_delay_us_max: AtomicU64::new(0),
            silent: AtomicBool::new(false),
            holding: AtomicBool::new(false),
            request_bytes: AtomicU64::new(0),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            framed,
            connections: Mutex::default(),
        });
        let theirs = Arc::clone(&weather);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is down looks to the client like one that hangs up at once.
                if let Ok(server) = TcpStream::connect(server) {
                    let _ = join(client, server, &theirs);
                }
            }
        });
        Ok(Self { address, weather })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Holds each reply for up to this long from now on.
    pub fn delay_replies(&self, max: Duration) {
        self.weather.reply_delay_us_max.store(micros(max), Ordering::Relaxed);
    }

    /// Holds what is sent at once for up to this long from now on, and what comes behind it as well.
    pub fn delay_requests(&self, max: Duration) {
        self.weather.request_delay_us_max.store(micros(max), Ordering::Relaxed);
    }

    /// Keeps requests on their way from now on: sent by the client, not seen by the server.
    pub fn hold_requests(&self) {
        self.weather.holding.store(true, Ordering::SeqCst);
    }

    /// Bytes of requests that have reached the proxy, passed on or kept.
    #[must_use]
    pub fn request_bytes(&self) -> u64 {
        self.weather.request_bytes.load(Ordering::SeqCst)
    }

    /// Delivers the requests kept.
    pub fn release_requests(&self) {
        self.weather.holding.store(false, Ordering::SeqCst);
    }

    /// Passes nothing any more, on old and new connections, without closing them: a host that vanished.
    pub fn fall_silent(&self) {
        self.weather.silent.store(true, Ordering::SeqCst);
    }

    /// Passes data again, for connections made from now on. What was swallowed stays swallowed.
    pub fn speak(&self) {
        self.weather.silent.store(false, Ordering::SeqCst);
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        let mut connections = self.weather.connections.lock().expect("nobody panics here");
        for Connection { client, server, .. } in connections.drain(..) {
            let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
        }
    }

    /// Ends every connection for its client; what is under way arrives all the same, so much later.
    pub fn hang_up(&self, late: Duration) {
        for connection in self.weather.connections.lock().expect("nobody panics here").iter() {
            connection.late_us.store(micros(late), Ordering::SeqCst);
            let _ = connection.client.shutdown(Shutdown::Both);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn join(client: TcpStream, server: TcpStream, weather: &Arc<Weather>) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let late_us = Arc::<AtomicU64>::default();
    weather.connections.lock().expect("nobody panics here").push(Connection {
        client: client.try_clone()?,
        server: server.try_clone()?,
        late_us: Arc::clone(&late_us),
    });
    let (client_in, server_out) = (client.try_clone()?, server.try_clone()?);
    let up = Arc::clone(weather);
    thread::spawn(move || pass_requests(client_in, server_out, &late_us, &up));
    let down = Arc::clone(weather);
    thread::spawn(move || pass_replies(server, client, &down));
    Ok(())
}

fn pass_requests(mut from: TcpStream, mut to: TcpStream, late_us: &AtomicU64, weather: &Weather) {
    // So that requests kept are delivered although no new one comes.
    let _ = from.set_read_timeout(Some(Duration::from_millis(20)));
    let mut buffer = vec![0; 256 << 10];
    let mut kept = Vec::new();
    // A connection that lost data to silence stays dead: TCP has no gaps.
    let mut lost = false;
    loop {
        match from.read(&mut buffer) {
            // What was sent before the end is on its way all the same.
            Ok(0) => {
                while weather.holding.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(5));
                }
                let _ = to.write_all(&kept);
                break;
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
            Ok(_) if lost || weather.silent.load(Ordering::SeqCst) => lost = true,
            Ok(n) => {
                weather.request_bytes.fetch_add(n as u64, Ordering::SeqCst);
                kept.extend_from_slice(&buffer[..n]);
                let max = weather.request_delay_us_max.load(Ordering::Relaxed);
                thread::sleep(Duration::from_micros(weather.random(max + 1)));
                thread::sleep(Duration::from_micros(late_us.load(Ordering::SeqCst)));
            }
        }
        if !weather.holding.load(Ordering::SeqCst)
            && to.write_all(&std::mem::take(&mut kept)).is_err()
        {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// A reply that waits for its time: (when, order of arrival, bytes).
type Held = Reverse<(Instant, u64, Vec<u8>)>;

#[derive(Default)]
struct Holding {
    replies: BinaryHeap<Held>,
    ended: bool,
}

fn pass_replies(mut from: TcpStream, to: TcpStream, weather: &Arc<Weather>) {
    let shared = Arc::new((Mutex::new(Holding::default()), Condvar::new()));
    let theirs = Arc::clone(&shared);
    let sender = thread::spawn(move || release(&theirs, to));
    let (holding, changed) = &*shared;
    let mut arrival = 0;
    let mut lost = false;
    let read = if weather.framed { read_frame } else { read_bytes };
    while let Ok(frame) = read(&mut from) {
        if lost || weather.silent.load(Ordering::SeqCst) {
            lost = true;
            continue;
        }
        let delay = weather.random(weather.reply_delay_us_max.load(Ordering::Relaxed) + 1);
        // The answer to HELLO is the first frame; nothing may overtake it, and nothing can.
        let due = Instant::now() + Duration::from_micros(delay);
        arrival += 1;
        holding.lock().expect("nobody panics here").replies.push(Reverse((due, arrival, frame)));
        changed.notify_one();
    }
    holding.lock().expect("nobody panics here").ended = true;
    changed.notify_one();
    let _ = sender.join();
}

fn release((holding, changed): &(Mutex<Holding>, Condvar), mut to: TcpStream) {
    let mut held = holding.lock().expect("nobody panics here");
    loop {
        let now = Instant::now();
        let next = held.replies.peek().map(|Reverse((due, ..))| *due);
        held = match next {
            Some(due) if due <= now => {
                let Some(Reverse((.., frame))) = held.replies.pop() else { continue };
                drop(held);
                if to.write_all(&frame).is_err() {
                    break;
                }
                holding.lock().expect("nobody panics here")
            }
            Some(due) => changed.wait_timeout(held, due - now).expect("nobody panics here").0,
            None if held.ended => break,
            None => changed.wait(held).expect("nobody panics here"),
        };
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn read_bytes(from: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; 64 << 10];
    match from.read(&mut bytes)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n => {
            bytes.truncate(n);
            Ok(bytes)
        }
    }
}

fn read_frame(from: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut header = [0; REPLY_HEADER_BYTES];
    from.read_exact(&mut header)?;
    if !header.starts_with(REPLY_MAGIC) {
        return Err(ErrorKind::InvalidData.into());
    }
    let (_, from_len) = header.split_at(PAYLOAD_LEN_AT);
    let payload = u32::from_le_bytes([from_len[0], from_len[1], from_len[2], from_len[3]]);
    let mut frame = header.to_vec();
    frame.resize(REPLY_HEADER_BYTES + payload as usize, 0);
    from.read_exact(&mut frame[REPLY_HEADER_BYTES..])?;
    Ok(frame)
}
