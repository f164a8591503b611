use super::*;
use proptest::prelude::*;
use std::io::Write;

fn disk(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    file.as_file().set_len(bytes).expect("set size");
    file
}

fn iov(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }
}

fn run(queue: &mut dyn VolumeQueue, op: Op, data: &[libc::iovec]) -> Result<(), IoError> {
    let mut done = Vec::new();
    // SAFETY: the buffers outlive the poll that completes the request.
    unsafe { queue.submit(Tag(7), op, data) };
    queue.poll(&mut done);
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].tag, Tag(7));
    assert_eq!(queue.in_flight(), 0);
    done[0].result
}

fn queue(file: &tempfile::NamedTempFile, read_only: bool) -> Box<dyn VolumeQueue> {
    FileVolume::open(file.path(), read_only).expect("open").open_queue(0, 8).expect("queue")
}

#[test]
fn scattered_buffers_arrive_in_order_and_are_read_back() {
    let file = disk(1 << 20);
    let mut q = queue(&file, false);
    let (mut a, mut b, mut c) = (vec![1u8; 512], vec![], vec![2u8; 1024]);
    let data = [iov(&mut a), iov(&mut b), iov(&mut c)];
    assert_eq!(run(&mut *q, Op::Write { offset: 512 }, &data), Ok(()));
    assert_eq!(run(&mut *q, Op::Flush, &[]), Ok(()));
    let mut back = vec![9u8; 3072];
    assert_eq!(run(&mut *q, Op::Read { offset: 0 }, &[iov(&mut back)]), Ok(()));
    let want: Vec<u8> = [(0u8, 512), (1, 512), (2, 1024), (0, 1024)]
        .iter()
        .flat_map(|(v, n)| vec![*v; *n])
        .collect();
    assert_eq!(back, want);
}

#[test]
fn more_buffers_than_one_system_call_takes() {
    let file = disk(4 << 20);
    let mut q = queue(&file, false);
    let mut memory: Vec<u8> = (0..3000u32 * 512).map(|i| (i / 512 % 251) as u8).collect();
    let data: Vec<_> = memory.chunks_mut(512).map(iov).collect();
    assert_eq!(run(&mut *q, Op::Write { offset: 0 }, &data), Ok(()));
    let mut back = vec![0u8; memory.len()];
    let data: Vec<_> = back.chunks_mut(512).map(iov).collect();
    assert_eq!(run(&mut *q, Op::Read { offset: 0 }, &data), Ok(()));
    assert_eq!(back, memory);
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let file = disk(4096);
    let mut q = queue(&file, false);
    let mut buffer = vec![0u8; 1024];
    for (offset, len) in [(3584, 1024), (4096, 512), (u64::MAX - 511, 512), (1, 512), (0, 511)] {
        let data = [libc::iovec { iov_len: len, ..iov(&mut buffer) }];
        let len = len as u64;
        for op in [
            Op::Read { offset },
            Op::Write { offset },
            Op::Discard { offset, len },
            Op::WriteZeroes { offset, len, unmap: false },
        ] {
            assert_eq!(run(&mut *q, op, &data), Err(IoError::OutOfRange), "{op:?}");
        }
    }
    assert_eq!(file.as_file().metadata().expect("metadata").len(), 4096);
}

#[test]
fn zeroes_and_discards_read_as_zeros_and_touch_nothing_else() {
    for (unmap, discard) in [(false, false), (true, false), (false, true)] {
        let file = disk(256 << 10);
        let mut q = queue(&file, false);
        let mut ones = vec![1u8; 256 << 10];
        assert_eq!(run(&mut *q, Op::Write { offset: 0 }, &[iov(&mut ones)]), Ok(()));
        let (offset, len) = (4096, 130 << 10);
        let op = if discard {
            Op::Discard { offset, len }
        } else {
            Op::WriteZeroes { offset, len, unmap }
        };
        assert_eq!(run(&mut *q, op, &[]), Ok(()));
        let mut back = vec![9u8; 256 << 10];
        assert_eq!(run(&mut *q, Op::Read { offset: 0 }, &[iov(&mut back)]), Ok(()));
        for (at, byte) in back.iter().enumerate() {
            let inside = (4096..4096 + (130 << 10)).contains(&at);
            assert_eq!(*byte, u8::from(!inside), "byte {at}, unmap {unmap}, discard {discard}");
        }
    }
}

/// The path of file systems without ZERO_RANGE.
#[test]
fn zeros_can_be_written_by_hand() {
    let file = disk(256 << 10);
    file.as_file().write_all(&[1; 256 << 10]).expect("fill");
    let queue = FileQueue {
        file: Arc::new(file.reopen().expect("reopen")),
        geometry: FileVolume::open(file.path(), false).expect("open").geometry(),
        done: Vec::new(),
        iov: Vec::new(),
        wake: EventFd::new().expect("eventfd"),
    };
    queue.write_zeros(512, 100_352).expect("zeros");
    let bytes = std::fs::read(file.path()).expect("read");
    let zeros: Vec<usize> = (0..bytes.len()).filter(|i| bytes[*i] == 0).collect();
    assert_eq!((zeros.first(), zeros.last(), zeros.len()), (Some(&512), Some(&100_863), 100_352));
}

#[test]
fn one_writer_at_a_time_and_readers_beside_it() {
    let file = disk(4096);
    let first = FileVolume::open(file.path(), false).expect("first");
    let second = FileVolume::open(file.path(), false).expect_err("locked");
    assert!(matches!(second, OpenError::Locked(_)), "{second}");
    let reader = FileVolume::open(file.path(), true).expect("reader");
    assert!(reader.geometry().read_only);
    drop(first);
    FileVolume::open(file.path(), false).expect("free again");
}

#[test]
fn a_read_only_volume_refuses_changes() {
    let file = disk(4096);
    let mut q = queue(&file, true);
    let mut buffer = vec![1u8; 512];
    let data = [iov(&mut buffer)];
    for op in [
        Op::Write { offset: 0 },
        Op::Discard { offset: 0, len: 512 },
        Op::WriteZeroes { offset: 0, len: 512, unmap: true },
    ] {
        assert_eq!(run(&mut *q, op, &data), Err(IoError::ReadOnly));
    }
    assert_eq!(run(&mut *q, Op::Flush, &[]), Ok(()));
    assert_eq!(run(&mut *q, Op::Read { offset: 0 }, &data), Ok(()));
}

#[test]
fn a_bad_address_is_an_io_error_not_a_crash() {
    let file = disk(4096);
    let mut q = queue(&file, false);
    let bad = [libc::iovec { iov_base: 8 as *mut libc::c_void, iov_len: 512 }];
    assert_eq!(run(&mut *q, Op::Read { offset: 0 }, &bad), Err(IoError::Io));
    assert_eq!(run(&mut *q, Op::Write { offset: 0 }, &bad), Err(IoError::Io));
}

#[test]
fn what_is_not_a_disk_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().expect("directory");
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("fifo");
    let refused = |path: &Path, read_only| FileVolume::open(path, read_only).expect_err("refused");
    assert!(matches!(refused(&fifo, true), OpenError::NotAFile(_)));
    assert!(matches!(refused(dir.path(), false), OpenError::NotAFile(_)));
    assert!(matches!(refused(dir.path(), true), OpenError::NotAFile(_)));
    let missing = refused(&dir.path().join("none"), false);
    assert!(missing.to_string().contains("check the path"), "{missing}");
    let empty = disk(511);
    assert!(matches!(refused(empty.path(), false), OpenError::Empty(_)));
    assert_eq!(
        FileVolume::open(disk(1023).path(), false).expect("open").geometry().size_bytes,
        512
    );
}

#[test]
fn the_id_is_the_end_of_the_name_cut_between_characters() {
    assert_eq!(&id_of(Path::new("/x/disk.img"))[..9], b"disk.img\0");
    assert_eq!(&id_of(Path::new("/x/0123456789012345678901234")), b"56789012345678901234");
    let id = id_of(Path::new("/x/ää0123456789012345678"));
    assert!(std::str::from_utf8(&id).is_ok_and(|s| s.starts_with("0123")), "{id:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random requests against a plain array.
    #[test]
    fn agrees_with_an_array(steps in prop::collection::vec((0u8..5, 0usize..24, 1usize..9, any::<u8>()), 1..40)) {
        const BYTES: usize = 16 << 10;
        let file = disk(BYTES as u64);
        let mut q = queue(&file, false);
        let mut oracle = vec![0u8; BYTES];
        for (what, sector, sectors, value) in steps {
            let (at, n) = (sector * 512, sectors * 512);
            let (offset, len) = (at as u64, n as u64);
            let mut buffer = vec![value; n];
            let cut = usize::from(value) % n;
            let (left, right) = buffer.split_at_mut(cut);
            let data = [iov(left), iov(right)];
            match what {
                0 => {
                    prop_assert_eq!(run(&mut *q, Op::Read { offset }, &data), Ok(()));
                    prop_assert_eq!(&buffer[..], &oracle[at..at + n]);
                }
                1 => {
                    prop_assert_eq!(run(&mut *q, Op::Write { offset }, &data), Ok(()));
                    oracle[at..at + n].fill(value);
                }
                2 => prop_assert_eq!(run(&mut *q, Op::Flush, &[]), Ok(())),
                3 => {
                    prop_assert_eq!(run(&mut *q, Op::Discard { offset, len }, &[]), Ok(()));
                    oracle[at..at + n].fill(0);
                }
                _ => {
                    let unmap = value & 1 == 1;
                    prop_assert_eq!(run(&mut *q, Op::WriteZeroes { offset, len, unmap }, &[]), Ok(()));
                    oracle[at..at + n].fill(0);
                }
            }
        }
    }
}
