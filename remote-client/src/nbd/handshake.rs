//! From the server's greeting to an export that takes requests. Sans-IO: bytes
//! in, bytes out.
//!
//! ```text
//!  Greeting -> [Tls] -> Extended -> [Structured] -> [Context] -> Go -> Done
//!                                          |
//!                a server that knows no GO: ExportName
//! ```

use super::allocation;
use super::wire::{
    self, Dialect, ExportFlags, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, Info,
    OLDSTYLE_MAGIC, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT,
    OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_BYTES, OptionReply, REP_ACK,
    REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_SHUTDOWN, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN,
    REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT,
};

/// Longest answer to an option that is read, bytes: an info or a sentence.
const BODY_BYTES_MAX: usize = 8192;
/// Longest export name of the protocol, bytes.
pub(crate) const EXPORT_BYTES_MAX: usize = 4096;
/// What a server that names no block sizes takes: proto.md, "Size constraints".
const PAYLOAD_BYTES_DEFAULT: u32 = 32 << 20;
/// Smallest "maximum block size" that is of use, bytes.
const PAYLOAD_BYTES_LEAST: u32 = 4096;
/// Largest sector that guests of all kinds can have, bytes.
pub(super) const MIN_BLOCK_BYTES_MAX: u32 = 4096;

/// What is served, as the handshake found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) size_bytes: u64,
    pub(crate) flags: ExportFlags,
    pub(crate) dialect: Dialect,
    /// Requests are multiples of it, a power of two, bytes.
    pub(crate) min_block: u32,
    /// What the server likes best, a power of two, bytes.
    pub(crate) preferred_block: u32,
    /// Longest payload, a multiple of `min_block`, bytes.
    pub(crate) payload_max: u32,
    /// The number of `base:allocation`, where it was asked for and is there.
    pub(crate) allocation: Option<u32>,
}

/// Why there is no export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("it speaks another protocol")]
    NotNbd,
    #[error("it speaks only the old style of NBD")]
    OldStyle,
    #[error("it requires TLS")]
    TlsRequired,
    #[error("it does not offer TLS{}", said(.0))]
    NoTls(String),
    #[error("it has no such export{}", said(.0))]
    NoExport(String),
    #[error("it does not let this client in{}", said(.0))]
    Policy(String),
    #[error("it is shutting down")]
    ShuttingDown,
    #[error("it refused the export with error {code:#x}{}", said(.text))]
    Refused { code: u32, text: String },
    #[error(
        "it needs requests of at least {0} bytes, and a guest's disk has at most {MIN_BLOCK_BYTES_MAX}"
    )]
    BlockSize(u32),
    #[error("it broke the protocol: {0}")]
    Broken(&'static str),
}

fn said(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Greeting,
    StartTls,
    /// TLS is being set up; the server says nothing until it is.
    Securing,
    Extended,
    Structured,
    Context,
    Go,
    ExportName,
    Done,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// More bytes.
    More,
    /// TLS begins here.
    Secure,
    Done(Export),
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Handshake {
    export: String,
    /// Holes are of interest.
    map: bool,
    tls: bool,
    allocation: Option<u32>,
    at: At,
    no_zeroes: bool,
    dialect: Dialect,
    /// What arrived and is not yet understood.
    inbox: Vec<u8>,
    /// What is to be sent.
    outbox: Vec<u8>,
    size: Option<(u64, ExportFlags)>,
    blocks: Option<(u32, u32, u32)>,
}

impl Handshake {
    /// For a new connection; with `map`, the export is asked to tell of its holes;
    /// with `tls`, nothing is said in clear text but the wish for TLS.
    pub(crate) fn new(export: &str, map: bool, tls: bool) -> Self {
        Self {
            export: export.to_owned(),
            map,
            tls,
            allocation: None,
            at: At::Greeting,
            no_zeroes: false,
            dialect: Dialect::Simple,
            inbox: Vec::new(),
            outbox: Vec::new(),
            size: None,
            blocks: None,
        }
    }

    /// TLS is there: the conversation begins anew inside.
    pub(crate) fn secured(&mut self) {
        if self.at == At::Securing {
            self.ask(At::Extended);
        }
    }

    /// What is to be sent.
    pub(crate) fn unsent(&self) -> &[u8] {
        &self.outbox
    }

    /// The first `n` bytes of it were.
    pub(crate) fn sent(&mut self, n: usize) {
        self.outbox.drain(..n.min(self.outbox.len()));
    }

    /// Takes bytes; the result's number is how many, the rest is the export's.
    pub(super) fn ingest(&mut self, bytes: &[u8]) -> Result<(usize, Progress), Refusal> {
        let before = self.inbox.len();
        self.inbox.extend_from_slice(bytes);
        let mut used = 0;
        while let Some(n) = self.step(used)? {
            used += n;
            if self.at == At::Securing {
                // What was sent behind the answer is nobody's: it may be an attacker's.
                if used < self.inbox.len() {
                    return Err(Refusal::Broken("clear text where TLS begins"));
                }
                self.inbox.clear();
                return Ok((bytes.len(), Progress::Secure));
            }
            if self.at == At::Done {
                let export = self.concluded()?;
                self.inbox.clear();
                return Ok((used - before, Progress::Done(export)));
            }
        }
        self.inbox.drain(..used);
        Ok((bytes.len(), Progress::More))
    }

    /// Takes one piece that begins at `from`; `None`: it is not whole.
    fn step(&mut self, from: usize) -> Result<Option<usize>, Refusal> {
        let rest = &self.inbox[from..];
        match self.at {
            At::Greeting => self.greeted(from),
            At::ExportName => {
                let Some(head) = rest.first_chunk::<10>() else { return Ok(None) };
                let len = if self.no_zeroes { 10 } else { 10 + 124 };
                if rest.len() < len {
                    return Ok(None);
                }
                self.size = Some(wire::export_name_answer(head));
                self.at = At::Done;
                Ok(Some(len))
            }
            At::StartTls | At::Extended | At::Structured | At::Context | At::Go => {
                let Some(head) = rest.first_chunk::<OPTION_REPLY_BYTES>() else { return Ok(None) };
                let reply =
                    OptionReply::decode(head).ok_or(Refusal::Broken("no answer to an option"))?;
                let len = OPTION_REPLY_BYTES + reply.len as usize;
                if reply.len as usize > BODY_BYTES_MAX {
                    return Err(Refusal::Broken("an answer longer than any"));
                }
                if rest.len() < len {
                    return Ok(None);
                }
                let body = rest[OPTION_REPLY_BYTES..len].to_vec();
                self.answered(reply, &body)?;
                Ok(Some(len))
            }
            At::Securing | At::Done => Ok(None),
        }
    }

    fn greeted(&mut self, from: usize) -> Result<Option<usize>, Refusal> {
        let rest = &self.inbox[from..];
        // Something else may say less than sixteen bytes and wait.
        let known = rest.len().min(8);
        if rest[..known] != INIT_MAGIC.to_be_bytes()[..known] {
            return Err(Refusal::NotNbd);
        }
        let Some(head) = rest.first_chunk::<16>() else { return Ok(None) };
        match wire::greeting(head).1 {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(Refusal::OldStyle),
            _ => return Err(Refusal::NotNbd),
        }
        let Some(flags) = rest[16..].first_chunk().map(|b| u16::from_be_bytes(*b)) else {
            return Ok(None);
        };
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(Refusal::OldStyle);
        }
        self.no_zeroes = flags & FLAG_NO_ZEROES != 0;
        let mine = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
        self.outbox.extend_from_slice(&mine.to_be_bytes());
        self.ask(if self.tls { At::StartTls } else { At::Extended });
        Ok(Some(18))
    }

    fn ask(&mut self, at: At) {
        self.at = at;
        let option = match at {
            At::StartTls => wire::option(OPT_STARTTLS, &[]),
            At::Extended => wire::option(OPT_EXTENDED_HEADERS, &[]),
            At::Structured => wire::option(OPT_STRUCTURED_REPLY, &[]),
            At::Context => allocation::select(&self.export),
            At::Go => wire::go(&self.export),
            At::ExportName => wire::option(OPT_EXPORT_NAME, self.export.as_bytes()),
            At::Greeting | At::Securing | At::Done => return,
        };
        self.outbox.extend_from_slice(&option);
    }

    fn answered(&mut self, reply: OptionReply, body: &[u8]) -> Result<(), Refusal> {
        let asked = match self.at {
            At::StartTls => OPT_STARTTLS,
            At::Extended => OPT_EXTENDED_HEADERS,
            At::Structured => OPT_STRUCTURED_REPLY,
            At::Context => OPT_SET_META_CONTEXT,
            _ => OPT_GO,
        };
        if reply.option != asked {
            return Err(Refusal::Broken("an answer to another option"));
        }
        let text = || wire::printable(body);
        match (self.at, reply.kind) {
            (_, REP_ERR_TLS_REQD) => return Err(Refusal::TlsRequired),
            (At::StartTls, REP_ACK) if body.is_empty() => self.at = At::Securing,
            // Never on in clear text.
            (At::StartTls, _) if reply.is_error() => return Err(Refusal::NoTls(text())),
            (_, REP_ERR_SHUTDOWN) => return Err(Refusal::ShuttingDown),
            (At::Extended, REP_ACK) => {
                self.dialect = Dialect::Extended;
                self.ask(if self.map { At::Context } else { At::Go });
            }
            (At::Extended, _) if reply.is_error() => self.ask(At::Structured),
            (At::Structured, REP_ACK) => {
                self.dialect = Dialect::Structured;
                self.ask(if self.map { At::Context } else { At::Go });
            }
            (At::Structured, _) if reply.is_error() => self.ask(At::Go),
            (At::Context, REP_META_CONTEXT) => {
                // An answer of another name is a context that nobody asked for.
                self.allocation = allocation::selected(body).or(self.allocation);
            }
            // Holes are of use, not needed; a wrong name of the export GO will tell.
            (At::Context, kind) if kind == REP_ACK || reply.is_error() => self.ask(At::Go),
            (At::Go, REP_INFO) => match Info::decode(body) {
                Some(Info::Export { size_bytes, flags }) => self.size = Some((size_bytes, flags)),
                Some(Info::BlockSize { min, preferred, max }) => {
                    self.blocks = Some((min, preferred, max));
                }
                Some(Info::Other) => {}
                None => return Err(Refusal::Broken("an info of another length")),
            },
            (At::Go, REP_ACK) => self.at = At::Done,
            (At::Go, REP_ERR_UNSUP) => self.ask(At::ExportName),
            (At::Go, REP_ERR_UNKNOWN) => return Err(Refusal::NoExport(text())),
            (At::Go, REP_ERR_POLICY) => return Err(Refusal::Policy(text())),
            // What some servers say of a name that they do not have.
            (At::Go, REP_ERR_INVALID) => return Err(Refusal::NoExport(text())),
            (At::Go, kind) if reply.is_error() => {
                return Err(Refusal::Refused { code: kind, text: text() });
            }
            _ => return Err(Refusal::Broken("an answer of another kind")),
        }
        Ok(())
    }

    fn concluded(&self) -> Result<Export, Refusal> {
        let (size_bytes, flags) = self.size.ok_or(Refusal::Broken("an export without a size"))?;
        let (min, preferred, max) = self.blocks.unwrap_or((1, 4096, PAYLOAD_BYTES_DEFAULT));
        if !min.is_power_of_two() || max < min {
            return Err(Refusal::Broken("block sizes that contradict each other"));
        }
        if min > MIN_BLOCK_BYTES_MAX {
            return Err(Refusal::BlockSize(min));
        }
        // A disk's request is at least a sector.
        let min_block = min.max(512);
        // Cut to whole pages where that is possible.
        let payload_max = max.min(PAYLOAD_BYTES_DEFAULT) / min_block * min_block;
        if payload_max == 0 || (self.blocks.is_some() && max < PAYLOAD_BYTES_LEAST.min(min_block)) {
            return Err(Refusal::Broken("a longest payload below one sector"));
        }
        let preferred = if preferred.is_power_of_two() { preferred } else { 4096 };
        Ok(Export {
            size_bytes,
            flags,
            dialect: self.dialect,
            min_block,
            preferred_block: preferred.max(min_block),
            payload_max,
            allocation: self.allocation,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn greeting(flags: u16) -> Vec<u8> {
        let mut bytes = b"NBDMAGICIHAVEOPT".to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes
    }

    fn reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for n in [option, kind, u32::try_from(body.len()).expect("short")] {
            bytes.extend(n.to_be_bytes());
        }
        bytes.extend(body);
        bytes
    }

    fn export_info(size: u64, flags: u16) -> Vec<u8> {
        let mut body = vec![0, 0];
        body.extend(size.to_be_bytes());
        body.extend(flags.to_be_bytes());
        reply(7, REP_INFO, &body)
    }

    fn block_info(min: u32, preferred: u32, max: u32) -> Vec<u8> {
        let mut body = vec![0, 3];
        [min, preferred, max].into_iter().for_each(|n| body.extend(n.to_be_bytes()));
        reply(7, REP_INFO, &body)
    }

    /// Feeds the pieces; the last one's outcome.
    fn feed(handshake: &mut Handshake, pieces: &[Vec<u8>]) -> Result<(usize, Progress), Refusal> {
        let mut last = Ok((0, Progress::More));
        for piece in pieces {
            last = Ok(handshake.ingest(piece)?);
        }
        last
    }

    #[test]
    fn a_modern_server_gives_extended_headers_and_block_sizes() {
        let mut h = Handshake::new("disk", false, false);
        assert_eq!(h.ingest(&greeting(3)), Ok((18, Progress::More)));
        assert_eq!(h.unsent(), [&[0, 0, 0, 3][..], &wire::option(11, &[])].concat());
        h.sent(20);
        let mut last = [reply(7, REP_ACK, &[]), vec![1, 2, 3]].concat();
        let pieces = [
            reply(11, REP_ACK, &[]),
            block_info(1, 65536, 1 << 25),
            export_info(1 << 30, 0x0101),
            std::mem::take(&mut last),
        ];
        let (used, done) = feed(&mut h, &pieces).expect("done");
        assert_eq!(used, 20, "what follows is not the handshake's");
        let Progress::Done(export) = done else { panic!("{done:?}") };
        assert_eq!(export.dialect, Dialect::Extended);
        assert_eq!((export.min_block, export.preferred_block), (512, 65536));
        assert_eq!((export.size_bytes, export.payload_max), (1 << 30, 1 << 25));
        assert!(export.flags.multi_conn());
    }

    #[test]
    fn an_old_server_is_asked_by_name_and_gets_simple_replies() {
        for (flags, zeroes) in [(3, 0), (1, 124)] {
            let mut h = Handshake::new("disk", false, false);
            let mut answer = (1u64 << 20).to_be_bytes().to_vec();
            answer.extend(1u16.to_be_bytes());
            answer.extend(vec![0; zeroes]);
            let pieces = [
                greeting(flags),
                reply(11, REP_ERR_UNSUP, &[]),
                reply(8, REP_ERR_UNSUP, &[]),
                reply(7, REP_ERR_UNSUP, b"what?"),
                answer,
            ];
            let (_, done) = feed(&mut h, &pieces).expect("done");
            let Progress::Done(export) = done else { panic!("{done:?}") };
            assert_eq!(export.dialect, Dialect::Simple);
            assert_eq!((export.size_bytes, export.payload_max), (1 << 20, 32 << 20));
            assert!(h.unsent().ends_with(&wire::option(1, b"disk")));
        }
    }

    #[test]
    fn nothing_is_said_in_clear_text_but_the_wish_for_tls() {
        let mut h = Handshake::new("disk", true, true);
        h.ingest(&greeting(3)).expect("a greeting");
        assert_eq!(h.unsent(), [&[0, 0, 0, 3][..], &wire::option(5, &[])].concat());
        h.sent(20);
        assert_eq!(h.ingest(&reply(5, REP_ACK, &[])), Ok((20, Progress::Secure)));
        assert!(h.unsent().is_empty(), "it waits for TLS");
        h.secured();
        assert_eq!(h.unsent(), wire::option(11, &[]));
        h.secured();
        assert_eq!(h.unsent().len(), 16, "once");

        let no_tls = |text: &str| Err(Refusal::NoTls(text.to_owned()));
        for (answer, want) in [
            (reply(5, REP_ERR_UNSUP, b"what?"), no_tls("what?")),
            (reply(5, REP_ERR_POLICY, b"no"), no_tls("no")),
            (reply(5, REP_ERR_INVALID, b""), no_tls("")),
            (reply(5, REP_INFO, b""), Err(Refusal::Broken("an answer of another kind"))),
            (reply(11, REP_ACK, b""), Err(Refusal::Broken("an answer to another option"))),
            // Somebody on the way answers for the server what it says inside.
            (
                [reply(5, REP_ACK, &[]), reply(11, REP_ACK, &[])].concat(),
                Err(Refusal::Broken("clear text where TLS begins")),
            ),
        ] {
            let mut h = Handshake::new("disk", false, true);
            h.ingest(&greeting(3)).expect("a greeting");
            assert_eq!(h.ingest(&answer), want);
        }
    }

    #[test]
    fn each_refusal_has_its_reason() {
        let to_go = |rest: &[Vec<u8>]| [&[greeting(3), reply(11, REP_ACK, &[])][..], rest].concat();
        for (pieces, want) in [
            (vec![b"SSH-2.0-OpenSSH".to_vec()], Refusal::NotNbd),
            (vec![b"HTTP".to_vec()], Refusal::NotNbd),
            (vec![b"NBDMAGIC12345678".to_vec()], Refusal::NotNbd),
            (vec![b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec()], Refusal::OldStyle),
            (vec![greeting(0)], Refusal::OldStyle),
            (vec![greeting(3), reply(11, REP_ERR_TLS_REQD, b"x")], Refusal::TlsRequired),
            (to_go(&[reply(7, REP_ERR_UNKNOWN, b"no\nsuch")]), Refusal::NoExport("no such".into())),
            (to_go(&[reply(7, REP_ERR_POLICY, b"")]), Refusal::Policy(String::new())),
            (to_go(&[reply(7, REP_ERR_SHUTDOWN, b"")]), Refusal::ShuttingDown),
            (
                to_go(&[
                    block_info(8192, 8192, 8192),
                    export_info(1 << 20, 1),
                    reply(7, REP_ACK, &[]),
                ]),
                Refusal::BlockSize(8192),
            ),
            (
                to_go(&[block_info(3, 4, 4096), export_info(1 << 20, 1), reply(7, REP_ACK, &[])]),
                Refusal::Broken("block sizes that contradict each other"),
            ),
            (to_go(&[reply(7, REP_ACK, &[])]), Refusal::Broken("an export without a size")),
            (to_go(&[reply(8, REP_ACK, &[])]), Refusal::Broken("an answer to another option")),
            (to_go(&[vec![0; 20]]), Refusal::Broken("no answer to an option")),
            (
                to_go(&[reply(7, REP_INFO, &vec![9; 9000])[..20].to_vec()]),
                Refusal::Broken("an answer longer than any"),
            ),
        ] {
            let mut h = Handshake::new("disk", false, false);
            assert_eq!(feed(&mut h, &pieces), Err(want));
        }
    }

    proptest! {
        /// Bytes in any pieces mean the same.
        #[test]
        fn pieces_do_not_matter(cuts in proptest::collection::vec(1usize..40, 1..60)) {
            let whole = [
                greeting(3), reply(11, REP_ERR_UNSUP, b"?"), reply(8, REP_ACK, &[]),
                block_info(512, 4096, 1 << 20), export_info(77 << 9, 1), reply(7, REP_ACK, &[]),
            ].concat();
            let mut h = Handshake::new("disk", false, false);
            let (mut at, mut done) = (0, None);
            for cut in cuts.into_iter().cycle() {
                let end = (at + cut).min(whole.len());
                match h.ingest(&whole[at..end]).expect("fine") {
                    (_, Progress::Done(export)) => { done = Some(export); break }
                    (n, _) => at += n,
                }
            }
            let export = done.expect("done");
            prop_assert_eq!((export.size_bytes, export.min_block), (77 << 9, 512));
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes: Vec<u8>, tail: Vec<u8>) {
            let mut h = Handshake::new("disk", false, false);
            let first = [greeting(3), bytes].concat();
            if h.ingest(&first).is_ok() {
                let _ = h.ingest(&tail);
            }
            prop_assert!(h.inbox.len() <= first.len() + tail.len());
        }
    }
}
