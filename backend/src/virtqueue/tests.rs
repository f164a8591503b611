use super::*;
use crate::memory::tests::region;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// One region at zero: descriptors at 0, rings behind them, buffers above.
const MEMORY_BYTES: u64 = 0x10000;
const USER: u64 = 0x7000_0000_0000;
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 8;

/// The driver's side, by raw bytes.
struct Driver {
    memory: Arc<GuestMemory>,
    avail_idx: u16,
}

impl Driver {
    fn new() -> (Self, Virtqueue) {
        let memory = Arc::new(GuestMemory::new(vec![region(0, MEMORY_BYTES)]).expect("one region"));
        let ring =
            RingAddresses::find(&memory, u32::from(SIZE), USER + DESC, USER + AVAIL, USER + USED)
                .expect("a good ring");
        (Self { memory, avail_idx: 0 }, Virtqueue::new(ring, true, 0))
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        let at = self.memory.contiguous(addr, bytes.len() as u64).expect("in memory");
        // SAFETY: in the region, which only this test touches.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
    }

    fn read_u16(&self, addr: u64) -> u16 {
        let at = self.memory.contiguous(addr, 2).expect("in memory");
        // SAFETY: as above.
        unsafe { at.as_ptr().cast::<u16>().read_unaligned() }
    }

    fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    fn offer(&mut self, head: u16) {
        self.write(AVAIL + 4 + 2 * u64::from(self.avail_idx % SIZE), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.write(AVAIL + 2, &self.avail_idx.to_le_bytes());
    }
}

fn lens(buffers: &[libc::iovec]) -> Vec<usize> {
    buffers.iter().map(|b| b.iov_len).collect()
}

fn chain_of(queue: &Virtqueue, head: u16) -> Result<Chain, ChainError> {
    let mut chain = Chain::default();
    queue.read_chain(head, &mut chain).map(|()| chain)
}

#[test]
fn rings_that_cannot_be_are_not_found() {
    let memory = Arc::new(GuestMemory::new(vec![region(0, MEMORY_BYTES)]).expect("one region"));
    let find = |num, desc: u64, avail: u64, used: u64| {
        RingAddresses::find(&memory, num, USER + desc, USER + avail, USER + used).is_some()
    };
    assert!(find(8, DESC, AVAIL, USED));
    for num in [0, 3, 100, 65536, u32::MAX] {
        assert!(!find(num, DESC, AVAIL, USED), "{num} entries");
    }
    assert!(!find(8, 8, AVAIL, USED), "misaligned descriptors");
    assert!(!find(8, DESC, AVAIL + 1, USED), "misaligned available ring");
    assert!(!find(8, DESC, AVAIL, USED + 2), "misaligned used ring");
    assert!(!find(8, MEMORY_BYTES - 64, AVAIL, USED), "descriptors run out of memory");
    assert!(!find(8, DESC, AVAIL, MEMORY_BYTES - 64), "used ring runs out of memory");
    assert!(!find(8, DESC, MEMORY_BYTES, USED));
}

#[test]
fn a_chain_is_read_in_order() {
    let (mut driver, mut queue) = Driver::new();
    driver.descriptor(DESC, 0, 0x4000, 16, DESC_NEXT, 3);
    driver.descriptor(DESC, 3, 0x5000, 0, DESC_NEXT, 1);
    driver.descriptor(DESC, 1, 0x6000, 512, DESC_NEXT | DESC_WRITE, 2);
    driver.descriptor(DESC, 2, 0x7000, 1, DESC_WRITE, 0);
    assert_eq!(queue.pop(), Ok(None));
    driver.offer(0);
    assert_eq!(queue.pop(), Ok(Some(0)));
    assert_eq!(queue.pop(), Ok(None));
    let chain = chain_of(&queue, 0).expect("good");
    assert_eq!((lens(&chain.readable), lens(&chain.writable)), (vec![16], vec![512, 1]));
    assert!(!chain.faulty);
}

#[test]
fn an_indirect_table_is_followed_once() {
    let (driver, queue) = Driver::new();
    driver.descriptor(DESC, 0, 0x3000, 48, DESC_INDIRECT, 0);
    driver.descriptor(0x3000, 0, 0x4000, 16, DESC_NEXT, 2);
    driver.descriptor(0x3000, 2, 0x5000, 1, DESC_WRITE, 0);
    let chain = chain_of(&queue, 0).expect("good");
    assert_eq!((lens(&chain.readable), lens(&chain.writable)), (vec![16], vec![1]));

    driver.descriptor(0x3000, 2, 0x3000, 48, DESC_INDIRECT, 0);
    assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::BadIndirect), "nested");
    driver.descriptor(0x3000, 0, 0x4000, 16, DESC_NEXT, 3);
    assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::BadNext), "out of the table");
    driver.descriptor(0x3000, 0, 0x4000, 16, DESC_NEXT, 0);
    assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::TooLong), "loop");
    for (addr, len, what) in [
        (0x3000, 0, "empty"),
        (0x3000, 40, "odd"),
        (MEMORY_BYTES - 16, 48, "outside"),
        (0x3000, !15, "huge"),
    ] {
        driver.descriptor(DESC, 0, addr, len, DESC_INDIRECT, 0);
        assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::BadIndirect), "{what}");
    }
    driver.descriptor(DESC, 0, 0x3000, 48, DESC_INDIRECT | DESC_NEXT, 1);
    assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::BadIndirect), "chained onwards");
}

#[test]
fn a_broken_chain_is_one_error_and_a_bad_buffer_a_mark() {
    let (driver, queue) = Driver::new();
    driver.descriptor(DESC, 0, 0x4000, 16, DESC_NEXT, 0);
    assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::TooLong), "a loop");
    driver.descriptor(DESC, 0, 0x4000, 16, DESC_NEXT, SIZE);
    assert_eq!(chain_of(&queue, 0).err(), Some(ChainError::BadNext));
    driver.descriptor(DESC, 0, MEMORY_BYTES - 8, 16, DESC_NEXT, 1);
    driver.descriptor(DESC, 1, 0x5000, 1, DESC_WRITE, 0);
    assert!(chain_of(&queue, 0).expect("shape is good").faulty, "outside memory");
    driver.descriptor(DESC, 0, 0x5000, 1, DESC_WRITE | DESC_NEXT, 1);
    driver.descriptor(DESC, 1, 0x4000, 16, 0, 0);
    assert!(chain_of(&queue, 0).expect("shape is good").faulty, "readable after writable");
}

#[test]
fn a_broken_ring_is_noticed() {
    let (mut driver, mut queue) = Driver::new();
    driver.write(AVAIL + 2, &9u16.to_le_bytes());
    assert_eq!(queue.pop(), Err(RingError::AvailJump { avail_idx: 9, next_avail: 0, size: SIZE }));
    driver.write(AVAIL + 2, &0xffffu16.to_le_bytes());
    assert!(queue.pop().is_err(), "an index that went back");
    driver.write(AVAIL + 2, &0u16.to_le_bytes());
    driver.offer(SIZE);
    assert_eq!(queue.pop(), Err(RingError::BadHead { head: SIZE, size: SIZE }));
}

#[test]
fn indices_wrap_and_batches_are_published_at_once() {
    let (mut driver, _) = Driver::new();
    for (at, value) in [(AVAIL + 2, 0xfffeu16), (USED + 2, 0xfffe)] {
        driver.write(at, &value.to_le_bytes());
    }
    driver.avail_idx = 0xfffe;
    let ring = RingAddresses::find(&driver.memory, 8, USER + DESC, USER + AVAIL, USER + USED)
        .expect("ring");
    let mut queue = Virtqueue::new(ring, true, 0xfffe);
    for head in 0..4 {
        driver.offer(head);
    }
    for head in 0..4 {
        assert_eq!(queue.pop(), Ok(Some(head)));
        queue.put_used(head, u32::from(head) * 10);
        assert_eq!(driver.read_u16(USED + 2), 0xfffe, "not published yet");
    }
    queue.publish();
    assert_eq!(driver.read_u16(USED + 2), 2);
    // Entry of used index 1, which is slot 1: head 3, 30 bytes.
    assert_eq!((driver.read_u16(USED + 4 + 8), driver.read_u16(USED + 8 + 8)), (3, 30));
}

#[test]
fn the_guest_is_signalled_when_it_asked_to_be() {
    let (mut driver, mut queue) = Driver::new();
    let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
    let complete = |driver: &mut Driver, queue: &mut Virtqueue, n: u16| {
        for _ in 0..n {
            driver.offer(0);
            assert_eq!(queue.pop(), Ok(Some(0)));
            queue.put_used(0, 1);
        }
        queue.publish();
        queue.wants_signal()
    };
    driver.write(used_event, &0u16.to_le_bytes());
    assert!(complete(&mut driver, &mut queue, 1), "asked for entry 0");
    assert!(!complete(&mut driver, &mut queue, 1), "has not asked again");
    driver.write(used_event, &4u16.to_le_bytes());
    assert!(!complete(&mut driver, &mut queue, 2), "asked for entry 4, now at 4");
    assert!(complete(&mut driver, &mut queue, 3), "passed entry 4");
    assert!(!queue.wants_signal(), "nothing new");

    // The device's own wish.
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    assert!(!queue.enable_kicks());
    assert_eq!(driver.read_u16(avail_event), queue.next_avail());
    driver.offer(1);
    assert!(queue.enable_kicks(), "an entry is there that no kick tells of");

    // Without event indices: flags.
    let ring = RingAddresses::find(&driver.memory, 8, USER + DESC, USER + AVAIL, USER + USED)
        .expect("ring");
    queue.relocate(ring, false);
    queue.disable_kicks();
    assert_eq!(driver.read_u16(USED), 1);
    assert!(queue.enable_kicks());
    assert_eq!(driver.read_u16(USED), 0);
    assert_eq!(queue.pop(), Ok(Some(1)));
    queue.put_used(1, 0);
    driver.write(AVAIL, &1u16.to_le_bytes());
    assert!(!queue.wants_signal(), "no interrupt wanted");
    queue.put_used(1, 0);
    driver.write(AVAIL, &0u16.to_le_bytes());
    assert!(queue.wants_signal());
}

/// A descriptor as a guest might make it: mostly plausible, sometimes wild.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![8 => 0x3000u64..MEMORY_BYTES, 1 => any::<u64>()];
    let len = prop_oneof![8 => 0u32..600, 2 => (0u32..8).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0u16..4, 1 => Just(DESC_INDIRECT), 1 => any::<u16>()];
    (addr, len, flags, prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the table holds: no panic, nothing outside memory, bounded; and
    /// where the general implementation sees a whole chain, the same buffers.
    #[test]
    fn any_table_is_read_safely_and_like_the_general_queue(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(descriptor(), 8),
        head in 0..SIZE,
    ) {
        let (mut driver, queue) = Driver::new();
        let mut other = vec![];
        for (base, entries) in [(DESC, &table), (0x3000, &indirect)] {
            for (index, (addr, len, flags, next)) in (0u16..).zip(entries.iter().copied()) {
                driver.descriptor(base, index, addr, len, flags, next);
                let mut bytes = addr.to_le_bytes().to_vec();
                bytes.extend(len.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes.extend(next.to_le_bytes());
                other.push((base + 16 * u64::from(index), bytes));
            }
        }
        driver.offer(head);
        let ours = chain_of(&queue, head);
        let base = driver.memory.contiguous(0, MEMORY_BYTES).expect("region").as_ptr() as usize;
        if let Ok(chain) = &ours {
            let buffers = chain.readable.iter().chain(&chain.writable);
            for buffer in buffers {
                let start = (buffer.iov_base as usize).checked_sub(base).expect("not below memory");
                prop_assert!((start + buffer.iov_len) as u64 <= MEMORY_BYTES);
            }
        }

        let general: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(MEMORY_BYTES).expect("small"))]).expect("memory");
        for (addr, bytes) in other {
            general.write_slice(&bytes, GuestAddress(addr)).expect("in memory");
        }
        general.write_slice(&head.to_le_bytes(), GuestAddress(AVAIL + 4)).expect("in memory");
        general.write_slice(&1u16.to_le_bytes(), GuestAddress(AVAIL + 2)).expect("in memory");
        let mut reference = Queue::new(SIZE).expect("size");
        reference.set_desc_table_address(Some(0), Some(0));
        reference.set_avail_ring_address(Some(0x1000), Some(0));
        reference.set_used_ring_address(Some(0x2000), Some(0));
        reference.set_ready(true);
        let Some(theirs) = reference.pop_descriptor_chain(&general) else { return Ok(()) };
        let theirs: Vec<_> = theirs.collect();
        // It cuts a broken chain short without saying so, so compare only what
        // ended by itself.
        let whole = theirs.last().is_some_and(|last| !last.has_next());
        if let (Ok(chain), true) = (&ours, whole) && !chain.faulty {
            let lens_of = |write_only: bool| -> Vec<usize> {
                theirs.iter().filter(|d| d.is_write_only() == write_only && d.len() > 0).map(|d| d.len() as usize).collect()
            };
            prop_assert_eq!(lens(&chain.readable), lens_of(false));
            prop_assert_eq!(lens(&chain.writable), lens_of(true));
        }
        // An indirect descriptor that is chained onwards the general queue lets
        // pass; the specification forbids it to drivers.
        if let Err(error) = ours && error != ChainError::BadIndirect {
            prop_assert!(!whole, "{error} on a chain that the general queue reads to its end");
        }
    }
}
