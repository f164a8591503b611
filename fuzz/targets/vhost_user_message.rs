//! What a front-end sends: any header, any body, any number of descriptors.
#![no_main]

use baton_backend::vhost_user::message::{BODY_BYTES_MAX, Header, Request};
use libfuzzer_sys::fuzz_target;
use std::os::fd::OwnedFd;

fuzz_target!(|input: (u8, u8, bool, &[u8])| {
    let (request, fds, whole, bytes) = input;
    let fds: Vec<OwnedFd> =
        (0..fds % 5).map(|_| std::fs::File::open("/dev/null").expect("/dev/null").into()).collect();
    // Either a whole message, or a body that fits some known request better than chance would.
    let (header, body) = if whole {
        let Some((head, body)) = bytes.split_first_chunk() else { return };
        let Ok(header) = Header::decode(head) else { return };
        assert!(header.size <= BODY_BYTES_MAX);
        let Some(body) = body.get(..header.size) else { return };
        (header, body)
    } else {
        let header =
            Header { request: u32::from(request % 48), need_reply: false, size: bytes.len() };
        (header, bytes)
    };
    let _ = Request::decode(header, body, fds);
});
