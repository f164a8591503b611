//! How handoffs end, and why: every one is counted as exactly one of these.

use std::fmt;

/// How a handoff ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The destination's rings ran when it won.
    DestinationRan,
    /// The destination won by an order, before its rings ran.
    DestinationOrdered,
    /// The source's backend took the volumes back: its rings ran again, it was
    /// ordered to, or it could not finish otherwise.
    SourceCameBack,
    /// The coordinator took them back: the orchestrator had cancelled, or nothing
    /// went on in time.
    CoordinatorReclaimed,
    /// It never began: the plan could not be taken at the anchor any more.
    NeverBegan,
    /// By FENCE, though nobody was dead: an operator forced it.
    FenceForced,
    /// By FENCE, because the destination's host was gone and the anchor was
    /// frozen: only the destination could say whether it had activated.
    FenceDestinationGone,
    /// By FENCE, because the anchor was frozen and the only process that could
    /// say whether the destination had activated was dead.
    FenceWitnessDead,
    /// By FENCE, because a volume had stopped for a handoff that its anchor had
    /// forgotten.
    FenceForgotten,
}

impl Ending {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::DestinationRan,
        Self::DestinationOrdered,
        Self::SourceCameBack,
        Self::CoordinatorReclaimed,
        Self::NeverBegan,
        Self::FenceForced,
        Self::FenceDestinationGone,
        Self::FenceWitnessDead,
        Self::FenceForgotten,
    ];

    /// Why nothing else was possible, or how it went.
    fn name(self) -> &'static str {
        match self {
            Self::DestinationRan => "destination: its rings ran",
            Self::DestinationOrdered => "destination: ordered to activate",
            Self::SourceCameBack => "source: its backend took the volumes back",
            Self::CoordinatorReclaimed => "source: the coordinator took them back",
            Self::NeverBegan => "source: the plan could not be taken any more",
            Self::FenceForced => "FENCE: an operator forced it, nobody was dead",
            Self::FenceDestinationGone => {
                "FENCE: the anchor was frozen and the destination's host gone"
            }
            Self::FenceWitnessDead => {
                "FENCE: the anchor was frozen and the process that could tell dead"
            }
            Self::FenceForgotten => "FENCE: a volume stood still in a handoff that was forgotten",
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How often handoffs ended how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endings {
    /// Indexed like [`Ending::ALL`].
    pub handoffs: [u64; Ending::ALL.len()],
    /// Handoffs that were decided, and whose winner's host was gone before the
    /// machine went on there: FENCE, and a start from the disks elsewhere.
    pub evacuated: u64,
    /// Machines whose memory got lost with a decided handoff, started from their
    /// disks by their owner: no FENCE.
    pub booted: u64,
}

impl Endings {
    pub(crate) fn count(&mut self, ending: Ending) {
        let place = Ending::ALL.iter().position(|other| *other == ending).unwrap_or_default();
        self.handoffs[place] += 1;
    }

    /// Adds another world's.
    pub fn add(&mut self, other: &Self) {
        let both = self.handoffs.iter_mut().zip(other.handoffs);
        both.for_each(|(mine, theirs)| *mine += theirs);
        self.evacuated += other.evacuated;
        self.booted += other.booted;
    }

    /// What never happened.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        // It takes a seal or a restart in the moment before a volume is disarmed.
        let rare = |ending: &Ending| *ending == Ending::FenceForgotten;
        let all = Ending::ALL.iter().zip(self.handoffs);
        let never = all.filter(|(ending, count)| *count == 0 && !rare(ending));
        let more = [("a winner's host was gone", self.evacuated), ("a boot", self.booted)];
        let more = more.into_iter().filter(|(_, count)| *count == 0);
        never
            .map(|(ending, _)| format!("ending `{ending}`"))
            .chain(more.map(|(what, _)| what.to_owned()))
            .collect()
    }
}
