//! What an NBD server says, from its greeting on, to a session with requests.
//!
//! Held: nothing panics, and a request is completed once or not at all.
#![no_main]

use baton_remote_client::nbd::fuzz::session;
use libfuzzer_sys::fuzz_target;

/// A greeting and an export with all commands, so that most of the time goes into
/// what follows.
const HANDSHAKE: &[u8] = b"NBDMAGICIHAVEOPT\0\x03\
\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\0\0\0\x01\0\0\0\0\
\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x10\0\0\0\x6d\
\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0";

/// The context `base:allocation` has number 1.
const CONTEXT: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x01base:allocation\
\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0";

fuzz_target!(|input: (u8, bool, u16, &[u8], &[u8])| {
    let (extended, own, cut, handshake, answer) = input;
    let mut ready = HANDSHAKE.to_vec();
    if extended & 1 == 0 {
        // Neither extended headers nor chunks: 0x80000001, UNSUP.
        ready[30..34].copy_from_slice(&[0x80, 0, 0, 1]);
        let mut chunks = ready[18..38].to_vec();
        chunks[11] = 8;
        if extended & 2 == 0 {
            chunks[12..16].copy_from_slice(&[0, 0, 0, 1]);
        }
        ready.splice(38..38, chunks);
    }
    if extended & 3 != 2 {
        let at = if extended & 1 == 0 { 58 } else { 38 };
        ready.splice(at..at, CONTEXT.iter().copied());
    }
    session(usize::from(cut), if own { handshake } else { &ready }, answer);
});
