//! Opening a data directory: lock, make what is missing in a new one, refuse what does not fit, replay the journal.
//!
//! After a kill of the process nothing is synced here: the page cache has everything, and a restart must be quick.
//! After a torn journal (power loss) its valid prefix is applied to `meta.redb` before anything else is written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::PoolConfig;
use super::core::{Core, Drain, LogCursor, net_effect};
use super::error::{MetaError, OpenError};
use super::extent_map::ExtentMap;
use super::generation::{BootId, DurabilityRow};
use super::journal::{Journal, Run, chain};
use super::layout::{
    EXTENT_BYTES, FORMAT_VERSION, JOURNAL_FILES, LOCK_FILE, MAX_SLOTS, META_FILE, META_FILE_NEW,
    POOL_FILE, POOL_HEADER_BYTES, PoolHeader, PoolId, Record,
};
use super::lock::try_lock;
use super::mark::Mark;
use super::meta::{Loaded, Meta};
use super::pool_file::{PoolFile, slot_offset};
use super::slots::Slots;
use super::volume::{Volume, extent_of};

pub(super) fn open(
    dir: &Path,
    config: &PoolConfig,
    boot: BootId,
) -> Result<(Arc<Core>, Vec<Volume>), OpenError> {
    make_dir(dir)?;
    let files = Files::new(dir);
    let lock = exclusive(dir, &files.lock, true)?;
    let is_new = !files.meta.try_exists().map_err(file("look at", &files.meta))?;
    let pool = exclusive(dir, &files.pool, is_new)?;
    if is_new {
        create(dir, &files, &pool)?;
    }
    let pool_id = check_header(&files.pool, &pool)?;
    let mark = pool.try_clone().and_then(|pool| Mark::read(pool, pool_id));
    let mark = mark.map_err(file("read", &files.pool))?;
    let pool = PoolFile::new(pool).map_err(file("read", &files.pool))?;
    let meta = open_meta(&files.meta, &pool_id, mark)?;
    let journal = Journal::new(open_journal(&files)?, pool_id);
    let read = |n: usize| journal.read(n).map_err(file("read", &files.journal[n]));
    let runs = [read(0)?, read(1)?];

    let loaded = meta.load().map_err(files.meta_error())?;
    let recovered = Recovered::build(&files, &meta, &loaded, &runs, &pool)?;
    let slot_max = u32::try_from(recovered.used.len() - 1).unwrap_or(MAX_SLOTS);
    let slots_error = file("prepare", &files.pool);
    pool.extend_to(slot_max).map_err(slots_error)?;
    let log = resume(&files, &meta, &pool, &journal, &loaded, &runs, &recovered)?;
    for id in &loaded.deleting {
        meta.purge(*id).map_err(files.meta_error())?;
    }
    let unused = clear_unused(&pool, &recovered.used).map_err(file("clear", &files.pool))?;
    let slots = Slots::new(capacity_slots(config), slot_max + 1, unused);
    let durability = note_opened(&meta, boot).map_err(files.meta_error())?;
    let core = Core::new((pool, meta, journal), slots, log, durability, config.reserve_bytes, lock);
    let mut maps = recovered.maps;
    let volumes = loaded.volumes.into_iter().map(|(id, row)| {
        let map = maps.remove(&id).unwrap_or_else(ExtentMap::new);
        Volume::new(Arc::clone(&core), id, row, map)
    });
    Ok((Arc::clone(&core), volumes.collect()))
}

/// The paths of a data directory.
struct Files {
    lock: PathBuf,
    pool: PathBuf,
    meta: PathBuf,
    meta_new: PathBuf,
    journal: [PathBuf; 2],
}

impl Files {
    fn new(dir: &Path) -> Self {
        Self {
            lock: dir.join(LOCK_FILE),
            pool: dir.join(POOL_FILE),
            meta: dir.join(META_FILE),
            meta_new: dir.join(META_FILE_NEW),
            journal: JOURNAL_FILES.map(|name| dir.join(name)),
        }
    }

    fn meta_error(&self) -> impl Fn(MetaError) -> OpenError {
        |source| OpenError::Metadata { path: self.meta.clone(), source }
    }
}

fn file<'a>(op: &'static str, path: &'a Path) -> impl Fn(io::Error) -> OpenError + 'a {
    move |source| OpenError::File { op, path: path.to_owned(), source }
}

fn damaged(path: &Path, what: impl Into<String>) -> OpenError {
    OpenError::Corrupt { path: path.to_owned(), what: what.into() }
}

/// Makes the directory but not its parents: a mistyped path must not grow a tree.
fn make_dir(dir: &Path) -> Result<(), OpenError> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let dir = dir.to_owned();
            if dir.is_dir() { Ok(()) } else { Err(OpenError::NotADirectory { dir }) }
        }
        Err(source) => Err(OpenError::CreateDir { dir: dir.to_owned(), source }),
    }
}

fn open_file(path: &Path, create: bool) -> Result<File, OpenError> {
    let mut options = File::options();
    options.read(true).write(true).create(create).mode(0o600);
    options.open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound if !create => OpenError::Missing { path: path.to_owned() },
        _ => file("open", path)(e),
    })
}

fn exclusive(dir: &Path, path: &Path, create: bool) -> Result<File, OpenError> {
    let opened = open_file(path, create)?;
    if try_lock(&opened).map_err(file("lock", path))? {
        return Ok(opened);
    }
    Err(OpenError::InUse { dir: dir.to_owned() })
}

/// Makes a new pool. `meta.redb` appears last and whole, so a directory without it holds nothing yet and a creation
/// that was cut off starts anew.
fn create(dir: &Path, files: &Files, pool: &File) -> Result<(), OpenError> {
    let pool_error = file("write", &files.pool);
    let mut header = [0; POOL_HEADER_BYTES];
    let len = pool.metadata().map_err(&pool_error)?.len();
    if len > EXTENT_BYTES {
        return Err(OpenError::Missing { path: files.meta.clone() });
    }
    let ours = len < POOL_HEADER_BYTES as u64
        || pool.read_exact_at(&mut header, 0).is_err()
        || header == [0; POOL_HEADER_BYTES]
        || PoolHeader::decode(&header).is_some();
    if !ours {
        return Err(damaged(&files.pool, "it is not a pool"));
    }
    let mut pool_id = PoolId::default();
    super::random(&mut pool_id).map_err(file("name", &files.pool))?;
    let header = PoolHeader {
        version: FORMAT_VERSION,
        extent_bytes: EXTENT_BYTES.try_into().expect("1 MiB fits"),
        pool_id,
    };
    let done = pool.set_len(EXTENT_BYTES);
    let done = done.and_then(|()| pool.write_all_at(&header.encode(), 0));
    done.and_then(|()| pool.sync_all()).map_err(&pool_error)?;
    for path in &files.journal {
        let journal = open_file(path, true)?;
        let done = Journal::prepare(&journal).and_then(|()| journal.sync_all());
        done.map_err(file("write", path))?;
    }
    match fs::remove_file(&files.meta_new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(file("remove", &files.meta_new)(e));
        }
        _ => {}
    }
    drop(Meta::create(&files.meta_new, &pool_id).map_err(files.meta_error())?);
    let done = fs::rename(&files.meta_new, &files.meta);
    done.map_err(file("make", &files.meta))?;
    let sync = |dir: &Path| {
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(file("sync", dir))
    };
    sync(dir)?;
    match dir.canonicalize().ok().as_deref().and_then(Path::parent) {
        // A parent that may not be read cannot be synced from here; the directory was there long before, then.
        Some(parent) if File::open(parent).is_ok() => sync(parent),
        _ => Ok(()),
    }
}

fn check_header(path: &Path, pool: &File) -> Result<PoolId, OpenError> {
    let mut header = [0; POOL_HEADER_BYTES];
    let read = pool.read_exact_at(&mut header, 0);
    if let Err(e) = read
        && e.kind() != io::ErrorKind::UnexpectedEof
    {
        return Err(file("read", path)(e));
    }
    let header = PoolHeader::decode(&header)
        .ok_or_else(|| damaged(path, "its first 64 bytes are no pool header"))?;
    check_format(path, header.version.into(), header.extent_bytes.into())?;
    Ok(header.pool_id)
}

fn check_format(path: &Path, version: u64, extent_bytes: u64) -> Result<(), OpenError> {
    if version > u64::from(FORMAT_VERSION) {
        return Err(OpenError::NewerFormat {
            path: path.to_owned(),
            found: version,
            known: FORMAT_VERSION.into(),
        });
    }
    if extent_bytes != EXTENT_BYTES {
        return Err(OpenError::ExtentSize {
            path: path.to_owned(),
            found: extent_bytes,
            expected: EXTENT_BYTES,
        });
    }
    Ok(())
}

fn open_meta(path: &Path, pool_id: &PoolId, mark: Mark) -> Result<Meta, OpenError> {
    let error = |source| OpenError::Metadata { path: path.to_owned(), source };
    let mut meta = Meta::open(path).map_err(error)?;
    let format = meta.format().map_err(error)?;
    let format = format.ok_or_else(|| damaged(path, "it does not say its format"))?;
    check_format(path, format.version, format.extent_bytes)?;
    if format.pool_id != *pool_id {
        return Err(OpenError::ForeignFile { path: path.to_owned() });
    }
    let (found, acknowledged) = (meta.last_change().map_err(error)?, mark.change());
    if found < acknowledged {
        return Err(OpenError::RolledBack { path: path.to_owned(), found, acknowledged });
    }
    meta.keep_mark(mark);
    Ok(meta)
}

fn open_journal(files: &Files) -> Result<[File; 2], OpenError> {
    let open = |path: &Path| {
        let journal = open_file(path, false)?;
        Journal::prepare(&journal).map_err(file("write", path))?;
        Ok(journal)
    };
    Ok([open(&files.journal[0])?, open(&files.journal[1])?])
}

/// The maps as of the last record that survived.
struct Recovered {
    maps: BTreeMap<u64, ExtentMap>,
    /// By slot: does a map name it? As long as the pool's file is, or must be.
    used: Vec<bool>,
    /// Records that are not in `meta.redb` yet.
    chain: Vec<Record>,
}

impl Recovered {
    fn build(
        files: &Files,
        meta: &Meta,
        loaded: &Loaded,
        runs: &[Run; 2],
        pool: &PoolFile,
    ) -> Result<Self, OpenError> {
        let chain = chain(loaded.applied_seq, runs);
        let reached = chain.last().map_or(loaded.applied_seq, |r| r.seq);
        if reached < loaded.checkpoint_seq {
            let needed = loaded.checkpoint_seq;
            let what = format!("the journal ends at record {reached}, a checkpoint needs {needed}");
            return Err(damaged(&files.journal[0], what));
        }
        let mut maps: BTreeMap<u64, ExtentMap> = BTreeMap::new();
        let mut bad = None;
        let mut change = |volume: u64, extent: u32, slot: u32| {
            let Some(row) = loaded.volumes.get(&volume) else {
                return;
            };
            let end = extent_of(row.size_bytes.next_multiple_of(EXTENT_BYTES));
            if extent >= end || slot > MAX_SLOTS {
                bad = Some(format!("extent {extent} of volume {volume:016x} has slot {slot}"));
                return;
            }
            let map = maps.entry(volume).or_insert_with(ExtentMap::new);
            map.unmap(extent);
            if slot != 0 {
                map.map(extent, slot, 0);
            }
        };
        let mut slot_max = 0;
        let rows = meta.for_each_extent(|volume, extent, slot| {
            change(volume, extent, slot);
            if loaded.volumes.contains_key(&volume) {
                slot_max = slot_max.max(slot);
            }
        });
        rows.map_err(files.meta_error())?;
        // Checkpoints follow a sync of the pool, so its length is at least this, power loss or not.
        if u64::from(slot_max) >= pool.end_slot() {
            let what = format!("it ends before slot {slot_max}, which a volume uses");
            return Err(damaged(&files.pool, what));
        }
        for ((volume, extent), slot) in net_effect(&chain) {
            change(volume, extent, slot);
        }
        if let Some(what) = bad {
            return Err(damaged(&files.meta, what));
        }
        let used = used_slots(&maps, pool.end_slot()).map_err(|what| damaged(&files.meta, what))?;
        Ok(Self { maps, used, chain })
    }
}

fn used_slots(maps: &BTreeMap<u64, ExtentMap>, end_slot: u64) -> Result<Vec<bool>, String> {
    let end_slot = end_slot.min(u64::from(MAX_SLOTS) + 1);
    let end_slot = usize::try_from(end_slot).map_err(|e| e.to_string())?;
    let mut used = vec![false; end_slot];
    let mut twice = Ok(());
    for (volume, map) in maps {
        map.for_each(|extent, slot, _| {
            let at = slot as usize;
            if at >= used.len() {
                used.resize(at + 1, false);
            }
            if std::mem::replace(&mut used[at], true) {
                twice = Err(format!(
                    "slot {slot} of extent {extent} of volume {volume:016x} has another user too"
                ));
            }
        });
    }
    twice.map(|()| used)
}

/// Where the journal goes on. `used` slots are inside the file by now.
fn resume(
    files: &Files,
    meta: &Meta,
    pool: &PoolFile,
    journal: &Journal,
    loaded: &Loaded,
    runs: &[Run; 2],
    recovered: &Recovered,
) -> Result<LogCursor, OpenError> {
    let last = recovered.chain.last().map_or(loaded.applied_seq, |r| r.seq);
    let seq_max = runs.iter().map(|run| run.seq_max).fold(last, u64::max);
    let mut log = LogCursor {
        current: 0,
        used: 0,
        next_seq: seq_max + 1,
        unsynced: [false; 2],
        draining: None,
        no_room_until: None,
    };
    if seq_max > last {
        // Torn: records behind the gap must never look like the continuation of new ones. So nothing of these files
        // stays in use, and numbers go on behind the highest ever seen. The page cache is empty after a power loss:
        // this sync is short.
        tracing::warn!(
            last_record = last,
            lost_up_to = seq_max,
            "the journal ends in a gap, as after a power loss; changes that were never synced are gone"
        );
        pool.sync().map_err(file("sync", &files.pool))?;
        for (n, path) in files.journal.iter().enumerate() {
            journal.sync(n).map_err(file("sync", path))?;
        }
        let net = net_effect(&recovered.chain);
        let done = meta.checkpoint(&net, last, || Ok(()));
        done.map_err(files.meta_error())?;
        let done = meta.checkpoint(&BTreeMap::new(), seq_max, || Ok(()));
        done.map_err(files.meta_error())?;
        return Ok(log);
    }
    let live = |run: &Run| run.last_seq().filter(|seq| *seq > loaded.applied_seq);
    let len = |run: &Run| u32::try_from(run.records.len()).unwrap_or(u32::MAX);
    let live_seqs = [live(&runs[0]), live(&runs[1])];
    log.unsynced = live_seqs.map(|seq| seq.is_some());
    match live_seqs {
        [None, None] => {}
        [Some(first), Some(second)] => {
            log.current = usize::from(second > first);
            let file = 1 - log.current;
            log.draining =
                Some(Drain { file, records: len(&runs[file]), last_seq: first.min(second) });
        }
        [first, _] => log.current = usize::from(first.is_none()),
    }
    if live_seqs[log.current].is_some() {
        log.used = len(&runs[log.current]);
    }
    Ok(log)
}

/// Judges what the last server left, durably, before anything is acknowledged by this one.
fn note_opened(meta: &Meta, boot: BootId) -> Result<DurabilityRow, MetaError> {
    let found = meta.durability()?;
    let row = DurabilityRow::opened(found, boot);
    meta.put_durability(row)?;
    if found.is_some_and(|found| found.generation != row.generation) {
        tracing::warn!(
            generation = row.generation,
            "the machine or the pool went down while the pool was in use: changes that were never flushed may be gone; clients that had some report a failed flush to their guests"
        );
    }
    Ok(row)
}

/// Nobody knows what unused slots hold: zeros all of them, neighbours at once, and returns them.
fn clear_unused(pool: &PoolFile, used: &[bool]) -> io::Result<Vec<u32>> {
    let mut unused = Vec::new();
    let slots = (0u32..).zip(used).skip(1);
    unused.extend(slots.filter(|(_, used)| !**used).map(|(slot, _)| slot));
    for run in unused.chunk_by(|a: &u32, b| a + 1 == *b) {
        pool.punch(slot_offset(run[0]), run.len() as u64 * EXTENT_BYTES)?;
    }
    Ok(unused)
}

fn capacity_slots(config: &PoolConfig) -> Option<u32> {
    let slots = config.capacity_bytes? / EXTENT_BYTES;
    Some(u32::try_from(slots).unwrap_or(MAX_SLOTS))
}
