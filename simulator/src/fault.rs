//! What goes wrong, and when: at a random moment, or exactly when a step of the
//! protocol has just happened and nobody has been told yet.

/// A step of the protocol at which something can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// ARM has arrived at a member.
    ArmArrived,
    /// A member is armed.
    Armed,
    /// A process has started that stands by, and has heard nothing yet.
    StandbyStarted,
    /// The VMM has stopped a source's rings.
    RingsStopped,
    /// SEAL has arrived at a member.
    SealArrived,
    /// A seal waits for what was counted, or for the drain.
    SealWaits,
    /// A member is sealed.
    Sealed,
    /// The source's memory is on its way.
    ImageSent,
    /// The destination's VMM has started its rings.
    RingsStarted,
    /// ACTIVATE has arrived at the anchor.
    ActivateArrived,
    /// The destination has won.
    Activated,
    /// RECLAIM has arrived at the anchor.
    ReclaimArrived,
    /// The source has won.
    Reclaimed,
    /// ABDICATE has arrived at the anchor.
    AbdicateArrived,
    /// A member has abdicated.
    Abdicated,
    /// OPEN has arrived at a member.
    OpenArrived,
    /// A member is opened.
    Opened,
    /// UNFREEZE has arrived at a member.
    UnfreezeArrived,
    /// SETTLE has arrived at a member.
    SettleArrived,
    /// A member is settled.
    Settled,
    /// A server has come back frozen.
    Frozen,
    /// An operator's FENCE has arrived at a member.
    FenceArrived,
    /// A member is fenced.
    Fenced,
    /// DISARM has arrived at a member.
    DisarmArrived,
    /// A member is disarmed.
    Disarmed,
}

impl Point {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::ArmArrived,
        Self::Armed,
        Self::StandbyStarted,
        Self::RingsStopped,
        Self::SealArrived,
        Self::SealWaits,
        Self::Sealed,
        Self::ImageSent,
        Self::RingsStarted,
        Self::ActivateArrived,
        Self::Activated,
        Self::ReclaimArrived,
        Self::Reclaimed,
        Self::AbdicateArrived,
        Self::Abdicated,
        Self::OpenArrived,
        Self::Opened,
        Self::UnfreezeArrived,
        Self::SettleArrived,
        Self::Settled,
        Self::Frozen,
        Self::FenceArrived,
        Self::Fenced,
        Self::DisarmArrived,
        Self::Disarmed,
    ];
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A server's process is killed; what it acknowledged is still in the page cache.
    ServerKilled,
    /// A server's machine loses its power: only what was flushed is certain.
    PowerLost,
    /// The source's backend is killed.
    SourceKilled,
    /// The destination's backend is killed.
    DestinationKilled,
    /// The coordinator is killed; its journal is not.
    CoordinatorKilled,
    /// A second coordinator takes over while the first still runs.
    SecondCoordinator,
    /// The journal is lost when the handoff has been settled at the anchor alone.
    JournalLost,
    /// A server is stopped for a while.
    ServerFrozen,
    /// The source's backend is stopped for a while.
    SourceFrozen,
    /// The destination's backend is stopped for a while.
    DestinationFrozen,
    /// The coordinator is stopped for a while.
    CoordinatorFrozen,
    /// What the source sends to a server does not arrive for a while.
    SourceUnheard,
    /// What a server sends to the source does not arrive for a while.
    SourceDeaf,
    /// What the destination sends to a server does not arrive for a while.
    DestinationUnheard,
    /// What a server sends to the destination does not arrive for a while.
    DestinationDeaf,
    /// Connections of a host are reset.
    ConnectionReset,
    /// Connections of a host end without the server's knowing.
    ConnectionCut,
    /// A server's disk is very slow for a while.
    DiskSlow,
    /// The coordinator's next messages are lost.
    MessagesLost,
    /// The coordinator's next messages arrive twice, the second time much later,
    /// now and then in another handoff.
    MessagesDoubled,
    /// The VM's memory never arrives at the destination.
    ImageLost,
    /// The orchestrator resumes the source without asking anybody.
    SourceResumed,
    /// The orchestrator starts the destination with whatever memory it has.
    DestinationStarted,
    /// The source's host is gone for ever: backend, agent and machine.
    SourceHostDied,
    /// The destination's host is gone for ever.
    DestinationHostDied,
    /// The source's host hangs as a whole, longer than anybody waits, and then
    /// goes on where it was.
    SourceHostHung,
    /// The destination's host hangs like that.
    DestinationHostHung,
    /// The destination's backend dies, and its host hangs as the next one starts.
    DestinationDiedAndHung,
    /// An operator fences every member, for either host, though nobody is dead.
    FenceForced,
    /// The orchestrator cancels the handoff.
    Cancelled,
    /// An agent orders a seal.
    SealOrdered,
    /// An agent orders an activation, whether or not the machine is there.
    ActivateOrdered,
    /// An agent orders an abdication.
    AbdicateOrdered,
    /// An agent orders a reclaim.
    ReclaimOrdered,
    /// Agents order whatever comes to their minds, several times.
    OrdersContradict,
    /// The guest resets one of its disks while its machine is being migrated.
    DiskReset,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 36] = [
        Self::ServerKilled,
        Self::PowerLost,
        Self::SourceKilled,
        Self::DestinationKilled,
        Self::CoordinatorKilled,
        Self::SecondCoordinator,
        Self::JournalLost,
        Self::ServerFrozen,
        Self::SourceFrozen,
        Self::DestinationFrozen,
        Self::CoordinatorFrozen,
        Self::SourceUnheard,
        Self::SourceDeaf,
        Self::DestinationUnheard,
        Self::DestinationDeaf,
        Self::ConnectionReset,
        Self::ConnectionCut,
        Self::DiskSlow,
        Self::MessagesLost,
        Self::MessagesDoubled,
        Self::ImageLost,
        Self::SourceResumed,
        Self::DestinationStarted,
        Self::SourceHostDied,
        Self::DestinationHostDied,
        Self::SourceHostHung,
        Self::DestinationHostHung,
        Self::DestinationDiedAndHung,
        Self::FenceForced,
        Self::Cancelled,
        Self::SealOrdered,
        Self::ActivateOrdered,
        Self::AbdicateOrdered,
        Self::ReclaimOrdered,
        Self::OrdersContradict,
        Self::DiskReset,
    ];

    /// It ends a process that remembers which requests were carried out.
    pub(crate) fn forgets(self) -> bool {
        matches!(
            self,
            Self::ServerKilled
                | Self::PowerLost
                | Self::SourceKilled
                | Self::DestinationKilled
                // A nominee's backend is ended before the fence.
                | Self::SourceHostDied
                | Self::DestinationHostDied
                | Self::SourceHostHung
                | Self::DestinationHostHung
                | Self::DestinationDiedAndHung
                | Self::FenceForced
        )
    }
}

/// A fault that is still to come when a step of the protocol happens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trap {
    pub(crate) point: Point,
    /// Springs when this many more have passed.
    pub(crate) passes: u32,
    pub(crate) fault: Fault,
}

/// How often each thing happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hits {
    /// Indexed like [`Fault::ALL`].
    pub faults: [u64; Fault::ALL.len()],
    /// Indexed like [`Point::ALL`]: passed.
    pub points: [u64; Point::ALL.len()],
    /// Indexed like [`Point::ALL`]: passed, and something went wrong there.
    pub sprung: [u64; Point::ALL.len()],
}

impl Default for Hits {
    fn default() -> Self {
        Self {
            faults: [0; Fault::ALL.len()],
            points: [0; Point::ALL.len()],
            sprung: [0; Point::ALL.len()],
        }
    }
}

impl Hits {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        let sum = |mine: &mut [u64], theirs: &[u64]| {
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
        };
        sum(&mut self.faults, &other.faults);
        sum(&mut self.points, &other.points);
        sum(&mut self.sprung, &other.sprung);
    }

    /// What never happened.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let faults = Fault::ALL.iter().zip(self.faults).filter(|(_, hits)| *hits == 0);
        let points = Point::ALL.iter().zip(self.points).filter(|(_, hits)| *hits == 0);
        let sprung = Point::ALL.iter().zip(self.sprung).filter(|(_, hits)| *hits == 0);
        faults
            .map(|(fault, _)| format!("fault {fault:?}"))
            .chain(points.map(|(point, _)| format!("step {point:?}")))
            .chain(sprung.map(|(point, _)| format!("a fault at step {point:?}")))
            .collect()
    }
}
