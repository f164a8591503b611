//! The cases of the matrix, all generated: every message boundary, every process, both faults, one volume and two.

use super::guest::mix;
use clap::ValueEnum;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

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
}

use Actor::{
    Anchor, Coordinator, DestinationAgent, DestinationBackend, DestinationVmm, Other, SourceAgent,
    SourceBackend, SourceVmm,
};
use Story::{Frozen, Move, Race, Restart, Return};

const fn point(name: &'static str, owners: &'static [Actor], stories: &'static [Story]) -> Point {
    Point { name, owners, stories, volumes: 1 }
}

/// Every point of the daemons; a test compares this with their sources.
pub const POINTS: &[Point] = &[
    // Storage servers, in the order of a move.
    point("arm.stored", &[Anchor, Other], &[Move]),
    point("seal.requested", &[Anchor, Other], &[Move]),
    point("seal.closed", &[Anchor, Other], &[Move, Return]),
    point("seal.answered", &[Anchor, Other], &[Move]),
    point("activate.stepped", &[Anchor], &[Move, Race]),
    point("activate.answered", &[Anchor], &[Move]),
    point("open.stepped", &[Other], &[Move]),
    point("open.answered", &[Other], &[Move]),
    point("reclaim.stored", &[Anchor], &[Return, Race]),
    point("reclaim.answered", &[Anchor], &[Return]),
    point("settle.stored", &[Anchor, Other], &[Move, Return]),
    point("unfreeze.answered", &[Anchor], &[Restart]),
    point("abdicate.answered", &[Anchor], &[Frozen]),
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
    point("unfreeze.sent", &[SourceBackend], &[Restart]),
    point("abdicate.sent", &[DestinationBackend], &[Frozen]),
    // The coordinator.
    point("arm.sent", &[Coordinator], &[Move]),
    point("ready.told", &[Coordinator], &[Move]),
    point("settle.sent", &[Coordinator], &[Move]),
];

/// Every process of the matrix.
pub const ACTORS: &[Actor] = &[
    SourceBackend,
    DestinationBackend,
    Anchor,
    Other,
    Coordinator,
    SourceAgent,
    DestinationAgent,
    SourceVmm,
    DestinationVmm,
];

/// One accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Case {
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
        let Self { point, owner, story, victim, fault, volumes } = self;
        let (story, fault) = (format!("{story:?}").to_lowercase(), format!("{fault:?}"));
        write!(f, "{point}@{owner}/{story} {} {victim} {volumes}v", fault.to_lowercase())
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.to_possible_value().expect("no actor is hidden");
        f.write_str(name.get_name())
    }
}

/// All cases.
#[must_use]
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for volumes in [1, 2] {
        let exists = |actor: Actor| volumes > 1 || actor != Other;
        for point in POINTS.iter().filter(|point| point.volumes <= volumes) {
            for &owner in point.owners.iter().filter(|owner| exists(**owner)) {
                for &story in point.stories {
                    for &victim in ACTORS.iter().filter(|victim| exists(**victim)) {
                        for fault in [Fault::Kill, Fault::Freeze] {
                            let point = point.name;
                            cases.push(Case { point, owner, story, victim, fault, volumes });
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
pub fn shuffled(mut cases: Vec<Case>, seed: u64) -> Vec<Case> {
    let random = |case: &Case, salt: u64| {
        let text = format!("{case}");
        text.bytes().fold(mix(seed ^ salt), |hash, byte| mix(hash ^ u64::from(byte)))
    };
    cases.sort_by_key(|case| random(case, 0));
    let mut left = cases;
    let mut spread: Vec<Case> = Vec::with_capacity(left.len());
    let (mut points, mut hurts, mut sizes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let point = |case: &Case| (case.point, case.owner, case.story);
    let hurt = |case: &Case| (case.victim, case.fault);
    while !left.is_empty() {
        // The case whose parts were taken least often so far, the point first; the shuffle breaks ties.
        let next = (0..left.len()).min_by_key(|&at| {
            let case = &left[at];
            let point: usize = points.get(&point(case)).copied().unwrap_or(0);
            let hurt: usize = hurts.get(&hurt(case)).copied().unwrap_or(0);
            let size: usize = sizes.get(&case.volumes).copied().unwrap_or(0);
            (point, hurt, size)
        });
        let case = left.remove(next.expect("some are left"));
        *points.entry(point(&case)).or_default() += 1;
        *hurts.entry(hurt(&case)).or_default() += 1;
        *sizes.entry(case.volumes).or_default() += 1;
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
        const ENDS: [&str; 9] = [
            "stored",
            "requested",
            "closed",
            "answered",
            "stepped",
            "sent",
            "heard",
            "told",
            "ready",
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
        found.remove("fence.stored");
        found.remove("release.answered");
        let known: BTreeSet<String> = POINTS.iter().map(|point| point.name.to_owned()).collect();
        assert_eq!(known, found);
    }

    #[test]
    fn a_short_sample_has_every_victim_fault_and_point() {
        for seed in 0..20 {
            let sample = &shuffled(all(), seed)[..60];
            for &victim in ACTORS {
                for fault in [Fault::Kill, Fault::Freeze] {
                    let has = sample.iter().any(|c| c.victim == victim && c.fault == fault);
                    assert!(has, "seed {seed}: nobody does {fault:?} to {victim}");
                }
            }
            for point in POINTS {
                assert!(sample.iter().any(|case| case.point == point.name), "{}", point.name);
            }
        }
    }

    #[test]
    fn the_seed_decides_the_order_and_nothing_is_lost() {
        let names = |seed| shuffled(all(), seed).iter().map(Case::to_string).collect::<Vec<_>>();
        assert_eq!(names(1), names(1));
        assert_ne!(names(1), names(2));
        let set = |seed| names(seed).into_iter().collect::<BTreeSet<_>>();
        assert_eq!(set(1), set(2));
        assert_eq!(set(1).len(), all().len());
    }
}
