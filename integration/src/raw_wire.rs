//! A client of a storage server's wire that knows as much of it as `docs/wire.md` tells: control connections and what
//! they ask in a handoff.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const HELLO: u8 = 1;
const PING: u8 = 7;
const ACCESS: u8 = 10;
const HANDOFF: u8 = 11;
const CONTROL_QUEUE: u16 = u16::MAX;
const FEATURE_HANDOFF: u64 = 2;
const TIMEOUT: Duration = Duration::from_secs(20);

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

/// The control connection of a session.
#[derive(Debug)]
pub struct Control {
    stream: TcpStream,
    session: u64,
    epoch: u64,
    seq: u64,
}

impl Control {
    /// Connects and says HELLO.
    pub fn connect(
        server: SocketAddr,
        volume: &str,
        owner: &str,
        session: u64,
        mode: Mode,
    ) -> Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut this = Self { stream, session, epoch: 0, seq: 0 };
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

    /// There and back.
    pub fn ping(&mut self) -> Result<()> {
        self.send(PING, 0, 0, &[])?;
        self.reply().map(drop)
    }

    /// The record now.
    pub fn access(&mut self) -> Result<Answer> {
        self.send(ACCESS, 0, 0, &[])?;
        self.answer()
    }

    /// Asks for the record as soon as it is another than `known`; [`Control::answer`] gets it.
    pub fn watch(&mut self, known: &Answer) -> Result<()> {
        self.send(ACCESS, known.version, known.boot_id, &[])
    }

    /// Sends a HANDOFF request of try 1; [`Control::answer`] gets the answer.
    pub fn send_ask(&mut self, id: u128, ask: Ask) -> Result<()> {
        let mut body = vec![ask as u8, 0, 0, 0, 0, 0, 0, 0];
        body.extend_from_slice(&id.to_le_bytes());
        body.extend_from_slice(&1_u32.to_le_bytes());
        body.extend_from_slice(&[0; 12]);
        self.send(HANDOFF, 0, 0, &body)
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
        let body = self.reply()?;
        let outcome = u16::from_le_bytes([byte_at(&body, 0)?, byte_at(&body, 1)?]);
        let record = if byte_at(&body, 2)? == 1 { 16 + 48 } else { 16 };
        Ok(Answer {
            outcome,
            boot_id: u64_at(&body, 8)?,
            phase: byte_at(&body, record + 1)?,
            version: u64_at(&body, record + 16)?,
        })
    }

    fn send(&mut self, opcode: u8, offset: u64, len: u64, body: &[u8]) -> Result<()> {
        self.seq += 1;
        let mut frame = Vec::with_capacity(64 + body.len());
        frame.extend_from_slice(b"BTNq");
        frame.extend_from_slice(&[opcode, 0]);
        frame.extend_from_slice(&CONTROL_QUEUE.to_le_bytes());
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
        let mut head = [0; 32];
        self.stream.read_exact(&mut head)?;
        let [m0, m1, m2, m3, _, _, s0, s1, ..] = head;
        if [m0, m1, m2, m3] != *b"BTNr" {
            bail!("this is no reply of a storage server");
        }
        let len = u32::from_le_bytes([head[24], head[25], head[26], head[27]]);
        let mut body = vec![0; usize::try_from(len)?];
        self.stream.read_exact(&mut body)?;
        match u16::from_le_bytes([s0, s1]) {
            0 => Ok(body),
            status => bail!("status {status}: {}", String::from_utf8_lossy(&body)),
        }
    }
}

fn byte_at(bytes: &[u8], at: usize) -> Result<u8> {
    bytes.get(at).copied().context("the answer is too short")
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    let bytes = bytes.get(at..at + 8).context("the answer is too short")?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}
