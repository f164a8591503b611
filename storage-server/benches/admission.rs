//! What every request passes on the server before it touches data: the gate and the extent map. Alone, and with a second
//! thread that does the same.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use baton_protocol::Epoch;
use baton_storage_server::gate::{Gate, Principal};
use criterion::{Criterion, criterion_group, criterion_main};

use extent_map::ExtentMap;

#[allow(dead_code, unused_imports, reason = "measured here, used and tested elsewhere")]
#[path = "../src/store/extent_map.rs"]
mod extent_map;

/// 1 TiB of extents.
const EXTENTS: u32 = 1 << 20;
/// A stride that spreads over the map as random requests do.
const STRIDE: u32 = 7919;

/// Runs `act` on another thread until the result is dropped, beside `measure`.
fn beside(act: impl Fn() + Sync, measure: impl FnOnce()) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                act();
            }
        });
        measure();
        over.store(true, Ordering::Relaxed);
    });
}

fn gate(c: &mut Criterion) {
    let gate: Gate = Gate::new(2);
    gate.open(Some(Epoch(7)), Some(Epoch(7)));
    let pass = |slot| drop(black_box(Gate::admit(&gate, slot, Principal::Owner, Epoch(7))));
    assert!(Gate::admit(&gate, 0, Principal::Owner, Epoch(6)).is_none());
    let mut group = c.benchmark_group("gate");
    group.bench_function("in and out", |b| b.iter(|| pass(0)));
    beside(
        || pass(1),
        || {
            group.bench_function("in and out, beside another thread", |b| b.iter(|| pass(0)));
        },
    );
}

fn extents(c: &mut Criterion) {
    let map = ExtentMap::new();
    for extent in 0..EXTENTS {
        map.map(extent, extent + 1, 0);
    }
    let pin = |extent: u32| {
        assert_eq!(map.pin(extent), Some(extent + 1));
        map.unpin(extent)
    };
    let mut group = c.benchmark_group("extent map of 1 TiB");
    group.bench_function("pin and unpin, one extent", |b| b.iter(|| pin(black_box(5))));
    let mut at = 0;
    group.bench_function("pin and unpin, anywhere", |b| {
        b.iter(|| {
            at = (at + STRIDE) % EXTENTS;
            pin(at)
        });
    });
}

criterion_group!(benches, gate, extents);
criterion_main!(benches);
