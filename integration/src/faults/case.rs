//! The cases of the matrix, all generated: every message boundary, every process, both faults, one volume and two.

use super::guest::mix;
use clap::ValueEnum;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Where the VM's volumes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// On storage servers of Baton's own.
    Baton,
    /// Images of a Ceph cluster.
    Rbd,
}

/// A process that can be hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Actor {
    /// The source's backend.
    SourceBackend,
    /// The destination's backend.
    DestinationBackend,
    /// The storage server of the anchor.
    Anchor,
    /// The storage server of the other volume.
    Other,
    /// The OSD of the Ceph cluster, which has all images and their records.
    Osd,
    /// Its monitor, which has the blocklist.
    Monitor,
    /// `baton-coordinator`.
    Coordinator,
    /// `baton-agent` of the source.
    SourceAgent,
    /// `baton-agent` of the destination.
    DestinationAgent,
    /// The VMM that runs the guest at first.
    SourceVmm,
    /// The VMM that waits for the guest.
    DestinationVmm,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL; whoever supervises it starts it again, unless it is a VMM.
    Kill,
    /// SIGSTOP for a while, then SIGCONT.
    Freeze,
}

/// What the orchestrator is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Story {
    /// The guest moves.
    Move,
    /// The guest stops on the source, and goes on there.
    Return,
    /// Both VMMs are told to run the guest.
    Race,
    /// The anchor's server restarts during pre-copy, then the guest moves.
    Restart,
    /// The anchor's server restarts after the seal, then the guest goes on on the source.
    Frozen,
    /// The source's backend is killed during pre-copy, its next one goes on, then the guest moves.
    Successor,
    /// The handoff is called off before the guest stops.
    Cancel,
    /// The source's host is said to be dead while its guest runs on: its volumes are taken, and the guest boots on the
    /// destination.
    Evacuate,
}

/// A named point of a daemon.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// As `fault_point::at` has it.
    pub name: &'static str,
    /// Processes that pass it.
    pub owners: &'static [Actor],
    /// In which stories it is passed.
    pub stories: &'static [Story],
    /// With so many volumes at least.
    pub volumes: usize,
    /// On which engines.
    pub engines: &'static [Engine],
}

use Actor::{
    Anchor, Coordinator, DestinationAgent, DestinationBackend, DestinationVmm, Monitor, Osd, Other,
    SourceAgent, SourceBackend, SourceVmm,
};
use Story::{Cancel, Evacuate, Frozen, Move, Race, Restart, Return, Successor};

const EVERY_ENGINE: &[Engine] = &[Engine::Baton, Engine::Rbd];

const fn point(name: &'static str, owners: &'static [Actor], stories: &'static [Story]) -> Point {
    Point { name, owners, stories, volumes: 1, engines: EVERY_ENGINE }
}

/// A point of servers of our own, or of what is said to them only.
const fn baton(name: &'static str, owners: &'static [Actor], stories: &'static [Story]) -> Point {
    Point { engines: &[Engine::Baton], ..point(name, owners, stories) }
}

/// A point of who changes an image's record, its lock or the blocklist.
const fn rbd(name: &'static str, owners: &'static [Actor], stories: &'static [Story]) -> Point {
    Point { engines: &[Engine::Rbd], ..point(name, owners, stories) }
}

/// Every point of the daemons; a test compares this with their sources.
pub const POINTS: &[Point] = &[
    // Storage servers, in the order of a move.
    baton("arm.stored", &[Anchor, Other], &[Move]),
    baton("seal.requested", &[Anchor, Other], &[Move]),
    baton("seal.closed", &[Anchor, Other], &[Move, Return]),
    baton("seal.answered", &[Anchor, Other], &[Move]),
    baton("activate.stepped", &[Anchor], &[Move, Race]),
    baton("activate.answered", &[Anchor], &[Move]),
    baton("open.stepped", &[Other], &[Move]),
    baton("open.answered", &[Other], &[Move]),
    baton("reclaim.stored", &[Anchor], &[Return, Race, Cancel]),
    baton("reclaim.answered", &[Anchor], &[Return]),
    baton("settle.stored", &[Anchor, Other], &[Move, Return, Cancel]),
    baton("unfreeze.answered", &[Anchor], &[Restart]),
    baton("abdicate.answered", &[Anchor], &[Frozen]),
    baton("fence.stored", &[Anchor, Other], &[Evacuate]),
    // Who changes an image's record, from reading it to after the swap; its lock, the blocklist, the map.
    rbd("arm.swapping", &[Coordinator], &[Move]),
    rbd("arm.swapped", &[Coordinator], &[Move]),
    rbd("loose.listed", &[SourceBackend], &[Successor]),
    rbd("lock.broken", &[SourceBackend], &[Successor]),
    rbd("lock.left", &[SourceBackend], &[Move, Return]),
    rbd("seal.swapping", &[SourceBackend], &[Move]),
    rbd("seal.swapped", &[SourceBackend], &[Move, Return]),
    rbd("activate.swapping", &[DestinationBackend], &[Move, Race]),
    rbd("activate.swapped", &[DestinationBackend], &[Move, Race]),
    Point { volumes: 2, ..rbd("open.swapping", &[DestinationBackend], &[Move]) },
    Point { volumes: 2, ..rbd("open.swapped", &[DestinationBackend], &[Move]) },
    rbd("map.waited", &[DestinationBackend], &[Move]),
    rbd("lock.taken", &[DestinationBackend], &[Move]),
    rbd("image.entered", &[DestinationBackend], &[Move]),
    rbd("reclaim.swapping", &[SourceBackend], &[Return, Race]),
    rbd("reclaim.swapped", &[SourceBackend], &[Return, Race]),
    rbd("image.entered", &[SourceBackend], &[Return]),
    rbd("settle.swapping", &[Coordinator], &[Move, Return]),
    rbd("settle.swapped", &[Coordinator], &[Move]),
    rbd("former.listed", &[Coordinator], &[Move]),
    rbd("former.noted", &[Coordinator], &[Move]),
    rbd("entry.ended", &[Coordinator], &[Move]),
    // Backends.
    point("standby.ready", &[DestinationBackend], &[Move]),
    point("seal.sent", &[SourceBackend], &[Move, Return]),
    point("sealed.heard", &[SourceBackend], &[Move]),
    point("stop.drained", &[SourceBackend], &[Move]),
    point("activate.sent", &[DestinationBackend], &[Move, Race]),
    point("activated.heard", &[DestinationBackend], &[Move]),
    Point { volumes: 2, ..point("open.sent", &[DestinationBackend], &[Move]) },
    point("reclaim.sent", &[SourceBackend], &[Return, Race]),
    point("reclaimed.heard", &[SourceBackend], &[Return]),
    baton("unfreeze.sent", &[SourceBackend], &[Restart]),
    baton("abdicate.sent", &[DestinationBackend], &[Frozen]),
    // The coordinator.
    point("arm.sent", &[Coordinator], &[Move]),
    point("ready.told", &[Coordinator], &[Move]),
    point("settle.sent", &[Coordinator], &[Move]),
    baton("fence.sent", &[Coordinator], &[Evacuate]),
    // Agents.
    baton("backend.started", &[DestinationAgent], &[Move]),
    baton("backend.stopped", &[SourceAgent], &[Move]),
    baton("backend.stopped", &[DestinationAgent], &[Cancel]),
];

/// Every process of the matrix that there is on every engine.
const ACTORS: &[Actor] = &[
    SourceBackend,
    DestinationBackend,
    Coordinator,
    SourceAgent,
    DestinationAgent,
    SourceVmm,
    DestinationVmm,
];

/// Every process of a VM with so many volumes.
#[must_use]
pub fn actors(engine: Engine, volumes: usize) -> Vec<Actor> {
    let storage: &[Actor] = match engine {
        Engine::Baton if volumes > 1 => &[Anchor, Other],
        Engine::Baton => &[Anchor],
        Engine::Rbd => &[Osd, Monitor],
    };
    [ACTORS, storage].concat()
}

/// One accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Case {
    /// Where the volumes are.
    pub engine: Engine,
    /// The point at which `owner` stops.
    pub point: &'static str,
    /// Who stops there.
    pub owner: Actor,
    /// What the orchestrator wants.
    pub story: Story,
    /// Who is hurt while it stands there.
    pub victim: Actor,
    /// How.
    pub fault: Fault,
    /// Volumes of the VM; the second is on a server of its own.
    pub volumes: usize,
}

impl fmt::Display for Case {
    /// `seal.closed@anchor/move kill source-vmm 2v`: what `--filter` looks in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, point, owner, story, victim, fault, volumes } = self;
        let (story, fault) = (format!("{story:?}").to_lowercase(), format!("{fault:?}"));
        write!(f, "{point}@{owner}/{story} {} {victim} {volumes}v", fault.to_lowercase())?;
        f.write_str(if *engine == Engine::Rbd { " rbd" } else { "" })
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.to_possible_value().expect("no actor is hidden");
        f.write_str(name.get_name())
    }
}

/// All cases of an engine.
#[must_use]
pub fn all(engine: Engine) -> Vec<Case> {
    let mut cases = Vec::new();
    for volumes in [1, 2] {
        let actors = actors(engine, volumes);
        let points = POINTS.iter().filter(|point| point.engines.contains(&engine));
        for point in points.filter(|point| point.volumes <= volumes) {
            for &owner in point.owners.iter().filter(|owner| actors.contains(owner)) {
                for &story in point.stories {
                    for &victim in &actors {
                        for fault in [Fault::Kill, Fault::Freeze] {
                            let point = point.name;
                            cases.push(Case {
                                engine,
                                point,
                                owner,
                                story,
                                victim,
                                fault,
                                volumes,
                            });
                        }
                    }
                }
            }
        }
    }
    cases
}

/// An order of the cases in which every prefix is spread over points, victims and faults: first one case for each
/// point, owner and story, then one more, and so on, with victims and faults in turn.
#[must_use]
pub fn shuffled(cases: Vec<Case>, seed: u64) -> Vec<Case> {
    sample(cases, seed, usize::MAX)
}

/// The first `most` of [`shuffled`].
fn sample(mut cases: Vec<Case>, seed: u64, most: usize) -> Vec<Case> {
    let random = |case: &Case, salt: u64| {
        let text = format!("{case}");
        text.bytes().fold(mix(seed ^ salt), |hash, byte| mix(hash ^ u64::from(byte)))
    };
    cases.sort_by_cached_key(|case| random(case, 0));
    // Numbers of each case's parts, and how often each was taken so far.
    let (mut points, mut hurts) = (BTreeMap::new(), BTreeMap::new());
    let mut left: Vec<(Case, [usize; 3])> = Vec::with_capacity(cases.len());
    for case in cases {
        let (next_point, next_hurt) = (points.len(), hurts.len());
        let point = points.entry((case.point, case.owner, case.story)).or_insert(next_point);
        let hurt = hurts.entry((case.victim, case.fault)).or_insert(next_hurt);
        left.push((case, [*point, *hurt, case.volumes]));
    }
    let mut taken = vec![[0; 3]; left.len() + 3];
    let mut spread: Vec<Case> = Vec::with_capacity(left.len());
    while !left.is_empty() && spread.len() < most {
        // The case whose parts were taken least often so far, the point first; the shuffle breaks ties.
        let next = (0..left.len()).min_by_key(|&at| {
            let parts = left[at].1;
            [0, 1, 2].map(|kind| taken[parts[kind]][kind])
        });
        let (case, parts) = left.remove(next.expect("some are left"));
        for (kind, part) in parts.into_iter().enumerate() {
            taken[part][kind] += 1;
        }
        spread.push(case);
    }
    spread
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    /// String literals like `"seal.closed"` in the sources of the daemons, tests apart.
    fn names_in(dir: &Path, names: &mut BTreeSet<String>) {
        const ENDS: [&str; 21] = [
            "stored",
            "requested",
            "closed",
            "answered",
            "stepped",
            "sent",
            "heard",
            "told",
            "ready",
            "swapping",
            "swapped",
            "listed",
            "noted",
            "waited",
            "broken",
            "left",
            "taken",
            "entered",
            "ended",
            "started",
            "stopped",
        ];
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                names_in(&path, names);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let literals = text.split('"');
                names.extend(literals.filter_map(|literal| {
                    let (what, end) = literal.split_once('.')?;
                    let word = !what.is_empty() && what.bytes().all(|b| b.is_ascii_lowercase());
                    (word && (ENDS.contains(&end) || literal == "stop.drained"))
                        .then(|| literal.to_owned())
                }));
            }
        }
    }

    #[test]
    fn the_matrix_knows_every_point_of_the_sources_and_no_other() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let mut found = BTreeSet::new();
        for part in ["storage-server", "remote-client", "backend", "live-migrate"] {
            names_in(&root.join(part).join("src"), &mut found);
        }
        // No parts of a handoff.
        found.remove("release.answered");
        found.remove("record.swapping");
        found.remove("record.swapped");
        let known: BTreeSet<String> = POINTS.iter().map(|point| point.name.to_owned()).collect();
        assert_eq!(known, found);
    }

    #[test]
    fn a_short_sample_has_every_victim_fault_and_point() {
        for (engine, seed) in (0..20).flat_map(|seed| EVERY_ENGINE.iter().map(move |e| (*e, seed)))
        {
            let sample = sample(all(engine), seed, 60);
            for victim in actors(engine, 2) {
                for fault in [Fault::Kill, Fault::Freeze] {
                    let has = sample.iter().any(|c| c.victim == victim && c.fault == fault);
                    assert!(has, "seed {seed}: nobody does {fault:?} to {victim}");
                }
            }
            for point in POINTS.iter().filter(|point| point.engines.contains(&engine)) {
                assert!(sample.iter().any(|case| case.point == point.name), "{}", point.name);
            }
        }
    }

    #[test]
    fn the_seed_decides_the_order_and_nothing_is_lost() {
        for engine in EVERY_ENGINE {
            let names = |seed| {
                let cases = shuffled(all(*engine), seed);
                cases.iter().map(Case::to_string).collect::<Vec<_>>()
            };
            assert_eq!(names(1), names(1));
            assert_ne!(names(1), names(2));
            let set = |seed| names(seed).into_iter().collect::<BTreeSet<_>>();
            assert_eq!(set(1), set(2));
            assert_eq!(set(1).len(), all(*engine).len());
        }
    }
}
