//! F7: a torn or old metadata page. Whatever happens to the file that holds the
//! access records, an opening store gives back the record that was acknowledged
//! last, or refuses with a sentence; never one from before.

use super::*;
use crate::store::layout::META_FILE;

/// Longer than a page's slack, so that two records differ in many bytes.
fn record(n: u8) -> Vec<u8> {
    vec![n; 700]
}

/// Two records, one after the other, both acknowledged; then the process is
/// killed or stops, and its files are left.
fn written(clean: bool) -> (TempDir, crate::store::VolumeId) {
    let (dir, store, volume) = with_volume(8, MIB);
    let id = volume.id();
    store.put_access(id, &record(1)).unwrap();
    store.put_access(id, &record(2)).unwrap();
    if clean {
        drop(volume);
        store.close().unwrap();
        return (dir, id);
    }
    (snapshot(dir.path()), id)
}

/// How a store on these bytes opens: `Err` is the sentence.
fn opened(
    like: &Path,
    bytes: &[u8],
    id: crate::store::VolumeId,
) -> Result<Option<Vec<u8>>, String> {
    let dir = snapshot(like);
    fs::write(dir.path().join(META_FILE), bytes).unwrap();
    let said = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    match Store::open(dir.path(), config(8)) {
        Ok(store) => Ok(store.access(id)),
        Err(error) => Err(said(&error)),
    }
}

fn judge(what: &str, outcome: Result<Option<Vec<u8>>, String>) -> bool {
    match outcome {
        Ok(found) => {
            assert!(found.as_deref() == Some(&record(2)[..]), "{what}: an older right came back");
            true
        }
        Err(sentence) => {
            assert!(sentence.contains("meta.redb"), "{what}: `{sentence}` names no file");
            assert!(!sentence.contains('\n'), "{what}: `{sentence}` is not one sentence");
            false
        }
    }
}

#[test]
fn f7_a_damaged_page_gives_no_older_right_back() {
    damage_every_page(true);
}

#[test]
fn f7_a_page_damaged_after_a_kill_gives_no_older_right_back() {
    damage_every_page(false);
}

fn damage_every_page(clean: bool) {
    {
        let (dir, id) = written(clean);
        let whole = fs::read(dir.path().join(META_FILE)).unwrap();
        assert!(judge("whole", opened(dir.path(), &whole, id)));
        let (mut refused, mut unharmed) = (0, 0);
        // Only pages in use can matter; the empty ones are all alike.
        let used = (0..whole.len())
            .step_by(512)
            .filter(|at| whole[*at..(at + 512).min(whole.len())].iter().any(|byte| *byte != 0));
        for at in used {
            let end = (at + 512).min(whole.len());
            for (how, fill) in [("zeroed", 0u8), ("flipped", 0xFF)] {
                let mut bytes = whole.clone();
                for byte in &mut bytes[at..end] {
                    *byte = if fill == 0 { 0 } else { *byte ^ fill };
                }
                let what = format!("clean {clean}, bytes {at}..{end} {how}");
                match judge(&what, opened(dir.path(), &bytes, id)) {
                    true => unharmed += 1,
                    false => refused += 1,
                }
            }
        }
        assert!(refused > 0, "clean {clean}: {unharmed} unharmed, none refused");
    }
}

#[test]
fn f7_a_truncated_file_gives_no_older_right_back() {
    for clean in [true, false] {
        let (dir, id) = written(clean);
        let whole = fs::read(dir.path().join(META_FILE)).unwrap();
        for len in (0..whole.len()).step_by(whole.len() / 64) {
            judge(&format!("clean {clean}, cut at {len}"), opened(dir.path(), &whole[..len], id));
        }
    }
}

/// A page of the file as it was before the second record, in the file as it is now.
#[test]
fn f7_an_old_page_gives_no_older_right_back() {
    let (dir, store, volume) = with_volume(8, MIB);
    let id = volume.id();
    store.put_access(id, &record(1)).unwrap();
    let old = fs::read(snapshot(dir.path()).path().join(META_FILE)).unwrap();
    store.put_access(id, &record(2)).unwrap();
    let now = snapshot(dir.path());
    let whole = fs::read(now.path().join(META_FILE)).unwrap();
    let mut differ = 0;
    for at in (0..whole.len().min(old.len())).step_by(512) {
        let end = (at + 512).min(whole.len()).min(old.len());
        if old[at..end] == whole[at..end] {
            continue;
        }
        differ += 1;
        let mut bytes = whole.clone();
        bytes[at..end].copy_from_slice(&old[at..end]);
        judge(&format!("bytes {at}..{end} of before"), opened(now.path(), &bytes, id));
    }
    assert!(differ > 0);
}
