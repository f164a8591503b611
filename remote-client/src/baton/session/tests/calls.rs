//! How much goes into one call.

use super::pair::Pair;
use baton_protocol::frame::REQUEST_HEADER_BYTES;

const KIB: usize = 1 << 10;

/// So many writes of so many bytes, sent; bytes of each call.
fn calls(writes: u32, bytes: usize) -> Vec<usize> {
    let mut pair = Pair::new(8 << 20, 128);
    pair.settle();
    for tag in 0..writes {
        pair.write(tag, 0, &vec![7; bytes]);
    }
    let mut calls = Vec::new();
    loop {
        let mut iov = Vec::new();
        let offered = pair.session.gather(pair.now, &mut iov, 1024);
        assert_eq!(offered, iov.iter().map(|part| part.iov_len).sum::<usize>());
        if offered == 0 {
            break;
        }
        pair.session.sent(pair.now, offered);
        calls.push(offered);
    }
    let all = writes as usize * (REQUEST_HEADER_BYTES + bytes);
    assert_eq!(calls.iter().sum::<usize>(), all, "nothing is left out or sent twice");
    calls
}

#[test]
fn a_few_requests_go_at_once() {
    assert_eq!(calls(8, 128 * KIB).len(), 1);
    assert_eq!(calls(32, 4 * KIB).len(), 1);
    assert_eq!(calls(16, 1024 * KIB).len(), 1);
}

/// The more are under way, the shorter.
#[test]
fn of_many_large_ones_a_call_takes_pieces() {
    for bytes in [32, 64, 100, 128, 1024] {
        let calls = calls(100, bytes * KIB);
        let frame = REQUEST_HEADER_BYTES + bytes * KIB;
        let (first, rest) = calls.split_first().expect("some");
        assert_eq!(*first, 16 * frame, "{bytes} KiB: the first few");
        let mut begun = *first;
        for call in rest {
            let longest = if begun >= 64 * frame { 64 } else { 256 } * KIB;
            assert!(*call <= longest, "{bytes} KiB: {calls:?}");
            begun += call;
            // Nothing is divided that need not be.
            assert!(bytes > 128 || begun > 64 * frame || begun % frame == 0, "{calls:?}");
        }
        // No more calls than are of use: only the last may have less.
        let (_, whole) = rest.split_last().expect("many");
        assert!(whole.iter().all(|call| *call >= 32 * KIB), "{bytes} KiB: {calls:?}");
        let many = rest.iter().filter(|call| **call > 64 * KIB).count();
        assert!(many > 0, "{bytes} KiB: longer ones while there are fewer: {calls:?}");
    }
}

#[test]
fn of_many_small_ones_a_call_takes_dozens() {
    let calls = calls(100, 4 * KIB);
    assert!(calls.len() <= 4, "{calls:?}");
}
