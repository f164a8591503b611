//! Mistakes. Each must be found, or the model proves nothing.

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Mutant {
    /// A backend seals while the server has not answered.
    SealsUndrained,
    /// What was given up counts as answered.
    SealsGivenUp,
    /// A guest that came back in the try is sealed.
    SealsCameBack,
    /// A process is taken for the one that the try began with.
    SealsAnyProcess,
    /// What stands by sends.
    StandbySends,
    /// A backend is ended that has not sealed, and that is a proof.
    EndsUnsealed,
    /// The proof is told, and not noted.
    EndsUnnoted,
    /// A late `end` is heard.
    LateEnd,
    /// A late `keep` is heard.
    LateKeep,
    /// A late `permit` is heard.
    LatePermit,
    /// A late `stand` is heard.
    LateStand,
    /// The source's agent is not told that a try is void.
    KeepSkipped,
    /// It leaves a backend that has sealed as it is.
    KeepsSealed,
    /// What stands by for an earlier try stays.
    StandsBeside,
    /// A machine of an earlier try stays, too.
    MachineLeft,
    /// Somebody's backend is started although the volumes are elsewhere.
    ClaimsUnjudged,
    /// Orders are carried out between the look at the note and the start.
    ClaimsUnlocked,
    /// The destination is permitted before anybody has decided.
    PermitsUndecided,
    /// The destination is permitted before the decision is in the journal.
    PermitsUnjournaled,
    /// The decision needs no proof.
    DecidesUnproven,
    /// A machine that waits is let run by force.
    ForcesMachine,
}

impl Mutant {
    pub(super) const ALL: [Self; 21] = [
        Self::SealsUndrained,
        Self::SealsGivenUp,
        Self::SealsCameBack,
        Self::SealsAnyProcess,
        Self::StandbySends,
        Self::EndsUnsealed,
        Self::EndsUnnoted,
        Self::LateEnd,
        Self::LateKeep,
        Self::LatePermit,
        Self::LateStand,
        Self::KeepSkipped,
        Self::KeepsSealed,
        Self::StandsBeside,
        Self::MachineLeft,
        Self::ClaimsUnjudged,
        Self::ClaimsUnlocked,
        Self::PermitsUndecided,
        Self::PermitsUnjournaled,
        Self::DecidesUnproven,
        Self::ForcesMachine,
    ];
}
