//! Headers to bytes and back, and the access record, which a handoff sends and keeps.

use std::hint::black_box;

use baton_protocol::access::{AccessRecord, Input};
use baton_protocol::frame::{ReplyHeader, RequestHeader};
use baton_protocol::{Epoch, Opcode, QueueId, Seq, SessionId, Status, VolumeId};
use criterion::{Criterion, criterion_group, criterion_main};

fn codec(c: &mut Criterion) {
    let request = RequestHeader {
        opcode: Opcode::Write,
        flags: 0,
        queue: QueueId(3),
        seq: Seq(1 << 40),
        epoch: Epoch(7),
        session: SessionId(0x1234_5678_9abc_def0),
        offset: 1 << 33,
        len: 4096,
        payload_len: 4096,
        payload_crc32c: 0,
    };
    let reply = ReplyHeader {
        opcode: Opcode::Read,
        flags: 0,
        status: Status::Ok,
        seq: Seq(1 << 40),
        epoch: Epoch(7),
        payload_len: 4096,
        payload_crc32c: 0,
    };
    let claim = Input::Claim { name: "host-a/vm", session: SessionId(1) };
    let record = AccessRecord::new(VolumeId(7)).step(claim).expect("free").record;
    let (asked, answered, kept) = (request.encode(), reply.encode(), record.encode());
    let mut group = c.benchmark_group("codec");
    group.bench_function("request encode", |b| b.iter(|| black_box(&request).encode()));
    group.bench_function("request decode", |b| {
        b.iter(|| RequestHeader::decode(black_box(&asked)).expect("whole"));
    });
    group.bench_function("reply encode", |b| b.iter(|| black_box(&reply).encode()));
    group.bench_function("reply decode", |b| {
        b.iter(|| ReplyHeader::decode(black_box(&answered)).expect("whole"));
    });
    group.bench_function("access record decode", |b| {
        b.iter(|| AccessRecord::decode(black_box(&kept)).expect("whole"));
    });
}

criterion_group!(benches, codec);
criterion_main!(benches);
