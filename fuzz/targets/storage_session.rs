//! What a client sends to a storage server after its welcome: a stream of requests.
//!
//! Held: what is run lies on the volume, and the stream always moves on or ends.
#![no_main]
// The file is shared with the server; a target has no use for the rest of it.
#![allow(dead_code, unreachable_pub)]

#[path = "../../storage-server/src/session.rs"]
mod session;

use baton_protocol::frame::REQUEST_HEADER_BYTES;
use baton_protocol::window::Window;
use baton_protocol::{AccessMode, QueueId, Seq, SessionId};
use libfuzzer_sys::fuzz_target;
use session::{Front, Identity, Verdict, front, judge};

const SIZE_BYTES: u64 = 1 << 20;

fuzz_target!(|input: (u8, u16, &[u8])| {
    // So much of the first payload is in a pipe, and not among the bytes.
    let (mode, elsewhere, mut bytes) = input;
    let mut elsewhere = usize::from(elsewhere);
    let mode = [AccessMode::Owner, AccessMode::Standby, AccessMode::ReadOnly][usize::from(mode % 3)];
    let features = baton_protocol::Features::HANDOFF;
    let identity = Identity { session: SessionId(0), queue: QueueId(0), mode, features };
    let mut window = Window::starting_at(Seq(0));
    loop {
        match front(bytes, elsewhere) {
            Front::Partial { need } => {
                // A header is never elsewhere.
                let there = if bytes.len() < REQUEST_HEADER_BYTES { 0 } else { elsewhere };
                assert!(need > bytes.len() + there, "would wait for what is there");
                return;
            }
            Front::Broken { .. } => return,
            Front::Whole { header, bytes: taken } => {
                assert!(taken > 0 && taken <= bytes.len() + elsewhere);
                let verdict = judge(&identity, &mut window, &header, SIZE_BYTES, |_| true);
                match verdict {
                    Verdict::Run if header.opcode.has_range() => {
                        assert!(header.offset.checked_add(header.len).is_some_and(|end| end <= SIZE_BYTES));
                    }
                    Verdict::Run | Verdict::Answer(_) => {}
                    Verdict::Break(_) => return,
                }
                window.complete(header.seq);
                bytes = &bytes[taken.saturating_sub(elsewhere)..];
                elsewhere = 0;
            }
        }
    }
});
