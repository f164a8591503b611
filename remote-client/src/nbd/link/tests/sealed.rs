//! An NBD server's end through TLS, with a key that both have.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use openssl::ssl::{ShutdownState, SslContextBuilder, SslMethod, SslStream, SslVersion};

use super::super::super::uri::{TlsAs, TlsUri};
use super::super::super::volume::NbdVolume;
use super::*;
use crate::volume::Volume;

const KEY: [u8; 16] = *b"0123456789abcdef";

/// How a client begins with this server.
fn psk() -> TlsUri {
    static FILE: OnceLock<tempfile::NamedTempFile> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        let digits: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(file, "alice:{digits}").expect("written");
        file
    });
    let auth = TlsAs::Psk { file: file.path().to_owned(), user: "alice".to_owned() };
    TlsUri { auth, hostname: None, verify: true }
}

/// What the server's TLS reads and writes.
#[derive(Debug, Default)]
struct Pipe {
    inbox: std::collections::VecDeque<u8>,
    outbox: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self.inbox.read(out)? {
            0 => Err(ErrorKind::WouldBlock.into()),
            n => Ok(n),
        }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outbox.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A server through TLS.
struct Sealed {
    plain: Plain,
    tls: Option<SslStream<Pipe>>,
}

impl Sealed {
    fn accept() -> SslStream<Pipe> {
        let mut context = SslContextBuilder::new(SslMethod::tls_server()).expect("TLS");
        context.set_max_proto_version(Some(SslVersion::TLS1_2)).expect("1.2");
        context.set_cipher_list("PSK").expect("ciphers");
        context.set_psk_server_callback(|_, user, out| {
            assert_eq!(user, Some(&b"alice"[..]));
            out[..KEY.len()].copy_from_slice(&KEY);
            Ok(KEY.len())
        });
        let mut ssl = openssl::ssl::Ssl::new(&context.build()).expect("TLS");
        ssl.set_accept_state();
        SslStream::new(ssl, Pipe::default()).expect("TLS")
    }
}

impl Server for Sealed {
    type Session = Session;
    const WHOLE: bool = true;

    fn session() -> Session {
        Plain::session(true)
    }

    fn settings() -> Option<Arc<TlsSettings>> {
        Some(Arc::new(TlsSettings::new(&psk(), None)))
    }

    fn submit(session: &mut Session, tag: Tag, op: Op, data: &[libc::iovec]) {
        session.submit(tag, op, data);
    }

    fn new(payload_max: u32) -> Self {
        Self { plain: Plain { tls: true, ..Plain::new(payload_max) }, tls: None }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let Some(tls) = &mut self.tls else {
            let reply = self.plain.take(bytes);
            // In clear text nothing is said but the wish for TLS.
            if reply.starts_with(&wire::OPTION_REPLY_MAGIC.to_be_bytes()) {
                self.tls = Some(Self::accept());
            }
            return reply;
        };
        tls.get_mut().inbox.extend(bytes);
        let mut buffer = [0; 16 << 10];
        while let Ok(n @ 1..) = tls.ssl_read(&mut buffer) {
            let reply = self.plain.take(&buffer[..n]);
            if !reply.is_empty() {
                tls.ssl_write(&reply).expect("taken");
            }
        }
        std::mem::take(&mut tls.get_mut().outbox)
    }

    fn heard(&self) -> &[(u64, Frame)] {
        self.plain.heard()
    }

    fn tail(&self) -> &[u8] {
        self.plain.tail()
    }

    fn answer(&mut self, number: u64, frame: &Frame) -> Vec<u8> {
        let tls = self.tls.as_mut().expect("TLS");
        tls.ssl_write(&self.plain.answer(number, frame)).expect("taken");
        std::mem::take(&mut tls.get_mut().outbox)
    }
}

#[test]
fn a_break_in_a_sealed_stream_says_nothing_twice() {
    link::a_break_at_each_byte_says_nothing_twice::<Sealed>(17);
}

#[test]
fn pieces_of_a_sealed_stream_are_put_together() {
    link::pieces_of_any_size_are_put_together::<Sealed>(37);
}

#[test]
fn more_than_the_socket_holds_is_said_once_through_a_seal() {
    link::more_than_the_socket_holds_is_said_once::<Sealed>();
}

/// Serves one connection until the client has closed it.
fn serve(listener: &UnixListener) -> Sealed {
    let (mut stream, _) = listener.accept().expect("a client");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
    let mut server = Sealed::new(4096);
    let greeting = server.take(&[]);
    stream.write_all(&greeting).expect("sent");
    let (mut buffer, mut answered) = (vec![0; 64 << 10], 0);
    loop {
        let n = stream.read(&mut buffer).expect("the client closes it, and does not break it");
        if n == 0 {
            return server;
        }
        let mut reply = server.take(&buffer[..n]);
        while let Some((number, frame)) = server.heard().get(answered).cloned() {
            reply.extend(server.answer(number, &frame));
            answered += 1;
        }
        stream.write_all(&reply).expect("sent");
    }
}

/// A server of one place would keep it for a client that just goes, and GnuTLS servers
/// take the end of a connection without the end of TLS for an attack.
#[test]
fn a_gate_that_is_shut_ends_tls_as_it_should_and_says_nothing_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("server");
    let listener = UnixListener::bind(&path).expect("a socket");
    let TlsAs::Psk { file, .. } = &psk().auth else { unreachable!("a key") };
    let uri = format!(
        "nbds+unix://alice@/disk?socket={}&tls-psk-file={}",
        path.display(),
        file.display()
    );
    let uri = uri.parse().expect("a URI");
    let crate::uri::VolumeUri::Nbd(uri) = uri else { panic!("{uri:?}") };
    let server = thread::spawn(move || (serve(&listener), listener));
    let volume = NbdVolume::open(&uri, &crate::OpenOptions::new("host/vm")).expect("open");
    let mut queue = volume.open_queue(0, DEPTH).expect("a queue");
    let mut data = link::bytes(512, 1024);
    let iov = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }];
    let mut done = Vec::new();
    // SAFETY: the buffer outlives the queue.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 512 }, &iov) };
    while done.is_empty() {
        queue.poll(&mut done);
    }
    volume.gate().expect("a gate").shut();
    queue.poll(&mut done);

    let (served, listener) = server.join().expect("served");
    let write = Frame { what: What::Write, offset: 512, len: 1024, payload: data.clone() };
    assert_eq!(served.heard(), [(1, write)]);
    assert!(served.plain.parted, "no goodbye");
    let mut tls = served.tls.expect("TLS");
    assert_eq!(tls.get_shutdown(), ShutdownState::RECEIVED, "TLS was not ended");
    assert!(tls.get_ref().inbox.is_empty(), "something behind the end of TLS");

    // SAFETY: the buffer outlives the queue.
    unsafe { queue.submit(Tag(2), Op::Write { offset: 512 }, &iov) };
    for _ in 0..3 {
        queue.send(&mut done);
        queue.poll(&mut done);
    }
    listener.set_nonblocking(true).expect("set");
    let came = listener.accept().map(drop).expect_err("a shut gate makes no connection");
    assert_eq!((came.kind(), done.len()), (ErrorKind::WouldBlock, 1));
}
