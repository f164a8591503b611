//! A client of a storage server's wire that knows as much of it as `docs/wire.md` tells: control connections and what
//! they ask in a handoff, and queues whose requests may come from the past.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const HELLO: u8 = 1;
const WRITE: u8 = 3;
const FLUSH: u8 = 4;
const PING: u8 = 7;
const ACCESS: u8 = 10;
const HANDOFF: u8 = 11;
const CONTROL_QUEUE: u16 = u16::MAX;
const FEATURE_HANDOFF: u64 = 2;
const TIMEOUT: Duration = Duration::from_secs(20);

/// Status of a reply: done.
pub const OK: u16 = 0;
/// Status of a reply: the sender was fenced.
pub const STALE_EPOCH: u16 = 2;

/// What a session is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The owner, by a claim.
    Owner = 1,
    /// Watches, and may win a handoff.
    Standby = 2,
}

/// What a backend asks of the access record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// I have stopped; nothing that I sent is unanswered.
    Seal = 1,
    /// I run.
    Activate = 2,
    /// I go on.
    Reclaim = 3,
}

/// The answer to HANDOFF or ACCESS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0: granted.
    pub outcome: u16,
    /// The server's incarnation.
    pub boot_id: u64,
    /// The record's phase: 2 armed, 3 sealed, 4 active.
    pub phase: u8,
    /// The record's version.
    pub version: u64,
}

/// Whose connection it is.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    /// The owner name.
    pub owner: &'a str,
    /// The volume's name.
    pub volume: &'a str,
    /// Incarnation of the client process.
    pub session: u64,
}

/// A queue of an owner's session.
#[derive(Debug)]
pub struct Queue(Connection);

impl Queue {
    /// One more queue of a session that owns the volume at this epoch.
    pub fn join(server: SocketAddr, who: Who<'_>, epoch: u64, queue: u16) -> Result<Self> {
        Connection::open(server, who, Mode::Owner, epoch, queue).map(Self)
    }

    /// Sends a write under the epoch of the beginning, whatever has become of it; [`Self::status`] gets the answer.
    pub fn send_write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.0.send(WRITE, offset, data.len() as u64, data)
    }

    /// Sends a flush; [`Self::status`] gets the answer.
    pub fn send_flush(&mut self) -> Result<()> {
        self.0.send(FLUSH, 0, 0, &[])
    }

    /// Status of the next reply.
    pub fn status(&mut self) -> Result<u16> {
        Ok(self.0.receive()?.1)
    }

    /// There and back, before any other reply; what was sent before is with the server then.
    pub fn ping(&mut self) -> Result<()> {
        self.0.ping()
    }
}

/// The control connection of a session.
#[derive(Debug)]
pub struct Control(Connection);

impl Control {
    /// Connects and says HELLO.
    pub fn connect(
        server: SocketAddr,
        volume: &str,
        owner: &str,
        session: u64,
        mode: Mode,
    ) -> Result<Self> {
        let who = Who { owner, volume, session };
        Connection::open(server, who, mode, 0, CONTROL_QUEUE).map(Self)
    }

    /// The epoch that it was granted.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.epoch
    }

    /// There and back, before any other reply.
    pub fn ping(&mut self) -> Result<()> {
        self.0.ping()
    }

    /// The record now.
    pub fn access(&mut self) -> Result<Answer> {
        self.0.send(ACCESS, 0, 0, &[])?;
        self.answer()
    }

    /// Asks for the record as soon as it is another than `known`; [`Control::answer`] gets it.
    pub fn watch(&mut self, known: &Answer) -> Result<()> {
        self.0.send(ACCESS, known.version, known.boot_id, &[])
    }

    /// Sends a HANDOFF request of try 1; [`Control::answer`] gets the answer.
    pub fn send_ask(&mut self, id: u128, ask: Ask) -> Result<()> {
        let mut body = vec![ask as u8, 0, 0, 0, 0, 0, 0, 0];
        body.extend_from_slice(&id.to_le_bytes());
        body.extend_from_slice(&1_u32.to_le_bytes());
        body.extend_from_slice(&[0; 12]);
        self.0.send(HANDOFF, 0, 0, &body)
    }

    /// Asks and fails unless it is granted.
    pub fn ask(&mut self, id: u128, ask: Ask) -> Result<Answer> {
        self.send_ask(id, ask)?;
        self.granted()
    }

    /// The next answer, which must be a granted one.
    pub fn granted(&mut self) -> Result<Answer> {
        let answer = self.answer()?;
        if answer.outcome != 0 {
            bail!("the server did not grant it: {answer:?}");
        }
        Ok(answer)
    }

    /// The next answer.
    pub fn answer(&mut self) -> Result<Answer> {
        let body = self.0.reply()?;
        let outcome = u16::from_le_bytes([byte_at(&body, 0)?, byte_at(&body, 1)?]);
        let record = if byte_at(&body, 2)? == 1 { 16 + 48 } else { 16 };
        Ok(Answer {
            outcome,
            boot_id: u64_at(&body, 8)?,
            phase: byte_at(&body, record + 1)?,
            version: u64_at(&body, record + 16)?,
        })
    }
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    session: u64,
    queue: u16,
    epoch: u64,
    seq: u64,
}

impl Connection {
    /// Connects and says HELLO; the epoch is 0 for a claim.
    fn open(
        server: SocketAddr,
        Who { owner, volume, session }: Who<'_>,
        mode: Mode,
        epoch: u64,
        queue: u16,
    ) -> Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut this = Self { stream, session, queue, epoch, seq: 0 };
        let mut body = Vec::new();
        body.extend_from_slice(&[1, 0, 1, 0, mode as u8, 0]);
        for text in [owner, volume, ""] {
            body.extend_from_slice(&u16::try_from(text.len())?.to_le_bytes());
        }
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&FEATURE_HANDOFF.to_le_bytes());
        body.extend_from_slice(&1_u64.to_le_bytes());
        body.extend_from_slice(owner.as_bytes());
        body.extend_from_slice(volume.as_bytes());
        this.send(HELLO, 0, 0, &body)?;
        let welcome = this.reply().context("HELLO")?;
        this.epoch = u64_at(&welcome, 16)?;
        this.seq = 0;
        Ok(this)
    }

    fn send(&mut self, opcode: u8, offset: u64, len: u64, body: &[u8]) -> Result<()> {
        self.seq += 1;
        let mut frame = Vec::with_capacity(64 + body.len());
        frame.extend_from_slice(b"BTNq");
        frame.extend_from_slice(&[opcode, 0]);
        frame.extend_from_slice(&self.queue.to_le_bytes());
        for number in [self.seq, self.epoch, self.session, offset, len] {
            frame.extend_from_slice(&number.to_le_bytes());
        }
        frame.extend_from_slice(&u32::try_from(body.len())?.to_le_bytes());
        frame.extend_from_slice(&[0; 12]);
        frame.extend_from_slice(body);
        self.stream.write_all(&frame)?;
        Ok(())
    }

    /// The body of the next reply, whose status must be ok.
    fn reply(&mut self) -> Result<Vec<u8>> {
        match self.receive()? {
            (_, OK, body) => Ok(body),
            (_, status, body) => bail!("status {status}: {}", String::from_utf8_lossy(&body)),
        }
    }

    /// There and back, with no other reply before.
    fn ping(&mut self) -> Result<()> {
        self.send(PING, 0, 0, &[])?;
        match self.receive()? {
            (PING, OK, _) => Ok(()),
            (opcode, status, _) => {
                bail!("an answer to opcode {opcode} came before that to PING: status {status}")
            }
        }
    }

    /// Opcode, status and body of the next reply.
    fn receive(&mut self) -> Result<(u8, u16, Vec<u8>)> {
        let mut head = [0; 32];
        self.stream.read_exact(&mut head)?;
        let [m0, m1, m2, m3, opcode, _, s0, s1, ..] = head;
        if [m0, m1, m2, m3] != *b"BTNr" {
            bail!("this is no reply of a storage server");
        }
        let len = u32::from_le_bytes([head[24], head[25], head[26], head[27]]);
        let mut body = vec![0; usize::try_from(len)?];
        self.stream.read_exact(&mut body)?;
        Ok((opcode, u16::from_le_bytes([s0, s1]), body))
    }
}

fn byte_at(bytes: &[u8], at: usize) -> Result<u8> {
    bytes.get(at).copied().context("the answer is too short")
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    let bytes = bytes.get(at..at + 8).context("the answer is too short")?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}
