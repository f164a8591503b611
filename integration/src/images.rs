//! Images of a Ceph cluster as the volumes of a VM, and who may write them, read and changed with Ceph's own tools as an
//! operator would.
//!
//! A cluster is shared by many VMs, one after another, so the names of the images are its user's. Reads the record from
//! its bytes (`docs/on-disk.md`) by itself.

use crate::ceph::{Ceph, POOL};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard};

/// A cluster whose daemons may be started again by who uses it.
pub type SharedCeph = Arc<Mutex<Ceph>>;

/// The note on an image.
const NOTE: &str = "baton.access";
/// User of backends.
const VM_USER: &str = "vm";
/// User of coordinators.
pub const COORDINATOR_USER: &str = "coordinator";

/// Makes the users that the documents ask for, with no more rights.
pub fn add_users(ceph: &Ceph) -> Result<()> {
    let osd = format!("profile rbd pool={POOL}");
    ceph.add_user(VM_USER, "profile rbd", &osd)?;
    let mon = "profile rbd, allow command \"osd blocklist\" with blocklistop=rm";
    ceph.add_user(COORDINATOR_USER, mon, &osd)
}

/// Images of one VM.
#[derive(Debug)]
pub struct Images {
    /// Where they are.
    pub ceph: SharedCeph,
    prefix: String,
}

impl Images {
    /// New images, named by what no other VM of the cluster has.
    pub fn create(ceph: &SharedCeph, prefix: &str, names: &[String], bytes: u64) -> Result<Self> {
        let images = Self { ceph: Arc::clone(ceph), prefix: prefix.to_owned() };
        for name in names {
            images.ceph().create_image(&images.name(name), bytes)?;
        }
        Ok(images)
    }

    /// The cluster, for one thing at a time.
    pub fn ceph(&self) -> MutexGuard<'_, Ceph> {
        self.ceph.lock().expect("nobody panics here")
    }

    fn name(&self, volume: &str) -> String {
        format!("{}-{volume}", self.prefix)
    }

    /// URI of an image, for backends.
    #[must_use]
    pub fn uri(&self, volume: &str) -> String {
        format!("{}&id={VM_USER}", self.ceph().uri(&self.name(volume)))
    }

    fn note(&self, volume: &str) -> Result<Value> {
        let image = format!("{POOL}/{}", self.name(volume));
        let args = ["image-meta", "get", &image, NOTE];
        Ok(serde_json::from_str(&self.ceph().rbd_while_up(&args)?)?)
    }

    /// The access record, in the words of a storage server's admin API.
    pub fn record(&self, volume: &str) -> Result<Value> {
        record(&self.note(volume)?)
    }

    /// Takes an image from everybody who has it, in the way that is documented for when there is no coordinator.
    pub fn fence(&self, volume: &str) -> Result<()> {
        let note = self.note(volume)?;
        let former = note["former"].as_array().context("a note has former clients")?.iter();
        let loose = former.filter(|one| one["sealed"] != true && one["listed"] != true);
        let clients = loose.map(|one| &one["client"]).chain([&note["client"]]);
        for client in clients.filter_map(Value::as_str) {
            self.ceph().blocklist(client)?;
        }
        let image = format!("{POOL}/{}", self.name(volume));
        self.ceph().rbd(&["image-meta", "remove", &image, NOTE]).map(drop)
    }
}

fn record(note: &Value) -> Result<Value> {
    let hex = note["record"].as_str().context("a note has a record")?;
    ensure!(hex.is_ascii() && hex.len() % 2 == 0, "a record is hexadecimal");
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16);
    let bytes = (0..hex.len()).step_by(2).map(byte).collect::<Result<Vec<u8>, _>>()?;
    let mut rest = Bytes(&bytes);
    let [2, _phase, present, ..] = *rest.take(8)? else { bail!("a record of another format") };
    rest.take(5 * 8)?;
    let has = |bit: u8| present & 1 << bit != 0;
    if has(0) {
        rest.take(8)?;
        rest.text()?;
    }
    if has(1) {
        rest.text()?;
    }
    let mut handoff = Value::Null;
    if has(2) {
        handoff = json!({ "id": rest.ulid()? });
        rest.take(4 + 4 + 8 + 8 + 4 * 8 + 32)?;
        for _name in 0..3 {
            rest.text()?;
        }
    }
    let mut decided = Value::Null;
    if has(3) {
        let (id, winner) = (rest.ulid()?, rest.take(4 + 4)?[4]);
        let winner = match winner {
            0 => "source",
            1 => "destination",
            other => bail!("nobody is side {other}"),
        };
        decided = json!({ "id": id, "winner": winner });
    }
    let owner = note["owner"].as_str().map(|name| json!({ "name": name }));
    Ok(json!({
        "phase": note["phase"], "owner": owner, "handoff": handoff, "decided": decided,
        "client": note["client"], "former": note["former"],
    }))
}

/// What was not read yet.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).context("the record is short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn text(&mut self) -> Result<()> {
        let length = u16::from_le_bytes(self.take(2)?.try_into()?);
        self.take(usize::from(length)).map(drop)
    }

    fn ulid(&mut self) -> Result<String> {
        Ok(crate::handoff::ulid_text(u128::from_le_bytes(self.take(16)?.try_into()?)))
    }
}
