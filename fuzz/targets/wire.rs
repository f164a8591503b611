//! Every decoder of `baton-protocol`, on any bytes.
//!
//! Held: what decodes is encoded to the same value again.
#![no_main]

use baton_protocol::access::AccessRecord;
use baton_protocol::handoff::{Answer, HandoffRequest, Open};
use baton_protocol::{Event, Hello, ReplyHeader, RequestHeader, Welcome};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(head) = bytes.first_chunk()
        && let Ok(header) = RequestHeader::decode(head)
    {
        assert_eq!(RequestHeader::decode(&header.encode()), Ok(header));
    }
    if let Some(head) = bytes.first_chunk()
        && let Ok(header) = ReplyHeader::decode(head)
    {
        assert_eq!(ReplyHeader::decode(&header.encode()), Ok(header));
    }
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
    if let Ok(welcome) = Welcome::decode(bytes) {
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
    }
    if let Ok(event) = Event::decode(bytes) {
        assert_eq!(Event::decode(&event.encode()), Ok(event));
    }
    if let Ok(record) = AccessRecord::decode(bytes) {
        assert_eq!(AccessRecord::decode(&record.encode()), Ok(record));
    }
    if let Ok(request) = HandoffRequest::decode(bytes) {
        assert_eq!(request.encode(), bytes);
    }
    if let Ok(open) = Open::decode(bytes) {
        assert_eq!(open.encode(), bytes);
    }
    if let Ok(answer) = Answer::decode(bytes) {
        // Keys are left out on the wire.
        let shown = Answer { record: answer.record.without_keys(), ..answer };
        assert_eq!(Answer::decode(&shown.encode()), Ok(shown));
    }
});
