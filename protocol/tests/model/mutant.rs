//! Mistakes that others have made or that somebody could make here, as wrappers
//! around the real functions. The model must find a way in which each does harm.

use baton_protocol::access::{AccessRecord, By, Input, Phase, Refusal, Step, Store};
use baton_protocol::handoff::role::{self, Asked, Output};
use baton_protocol::handoff::{Mode, Outcome, Proof, Role, Side};

use crate::scope::{ANCHOR, D, S, Scope};

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mutant {
    /// The server knows epochs in memory only.
    VolatileEpoch,
    /// The gate does not wait for what is inside.
    NoDrain,
    /// Both sides are granted what they ask.
    NoArbiter,
    /// A seal does not wait for what the source sent.
    SealSkipsCount,
    /// The destination looks at the anchor's seal only.
    ActAnchorOnly,
    /// The source takes each volume back on its own.
    SelfResume,
    /// What a killed server had given to the kernel is done later.
    KernelIoOutlivesServer,
    /// The destination may activate what is not sealed.
    ActOnArmed,
    /// A restarted server takes a seal without knowing what has arrived.
    NoFsyncBlindSeal,
    /// A restarted server goes on as armed in fast mode.
    NoFsyncNoPresume,
    /// A delayed UNFREEZE of an earlier incarnation counts.
    UnfreezeNoBootId,
    /// The source says it never sealed although it did.
    UnfreezeAfterStop,
    /// Members open without a proof.
    OpenNoProof,
    /// Members take the grant of an earlier incarnation.
    OpenOldGrant,
    /// Members forget a grant to another session at a restart.
    OpenArmedLater,
    /// A fence keeps the epoch.
    FenceKeepsEpoch,
    /// A fence is not durable.
    FenceNotDurable,
    /// The next incarnation of the winner gets the epoch of the last.
    ReactivateSameEpoch,
    /// RECLAIMED is not durable.
    ReclaimNotDurable,
    /// A destination that has activated abdicates when it is asked back.
    AbdicateAfterActivate,
    /// A new incarnation of the destination abdicates for the one before it.
    AbdicateUnwitnessed,
    /// A coordinator abdicates for a dead destination although nobody knows
    /// whether it had activated.
    CoordinatorAbdicatesFrozen,
    /// An ARM is taken however old its plan is.
    ArmWhenever,
    /// A server answers a write before it would survive a crash.
    ForgetsWrites,
    /// A connection in standby carries requests.
    StandbyLetIn,
    /// A destination reads ahead while it stands by, and shows its guest that.
    DestinationCaches,
    /// A volume that its source has sealed is disarmed, too.
    DisarmSealed,
    /// The same after a restart, when nobody knows whether it was sealed.
    DisarmFrozen,
    /// A volume that is disarmed takes back the numbers that ARM has reserved.
    DisarmGivesNumbersBack,
    /// A volume stays armed for a handoff that its anchor has forgotten.
    NeverDisarms,
}

/// With the mode in which each is possible, and whether it does harm by leaving
/// nobody running.
pub(crate) const ALL: [(Mutant, Mode, bool); 30] = [
    (Mutant::VolatileEpoch, Mode::Base, false),
    (Mutant::NoDrain, Mode::Base, false),
    (Mutant::NoArbiter, Mode::Base, false),
    (Mutant::SealSkipsCount, Mode::Base, false),
    (Mutant::ActAnchorOnly, Mode::Base, false),
    (Mutant::SelfResume, Mode::Base, false),
    (Mutant::KernelIoOutlivesServer, Mode::Base, false),
    (Mutant::ActOnArmed, Mode::Base, false),
    (Mutant::NoFsyncBlindSeal, Mode::Fast, false),
    (Mutant::NoFsyncNoPresume, Mode::Fast, false),
    (Mutant::UnfreezeNoBootId, Mode::Fast, false),
    (Mutant::UnfreezeAfterStop, Mode::Fast, false),
    (Mutant::OpenNoProof, Mode::Base, false),
    (Mutant::OpenOldGrant, Mode::Base, true),
    (Mutant::OpenArmedLater, Mode::Base, false),
    (Mutant::FenceKeepsEpoch, Mode::Base, false),
    (Mutant::FenceNotDurable, Mode::Base, false),
    (Mutant::ReactivateSameEpoch, Mode::Base, false),
    (Mutant::ReclaimNotDurable, Mode::Base, false),
    (Mutant::AbdicateAfterActivate, Mode::Fast, false),
    (Mutant::AbdicateUnwitnessed, Mode::Fast, false),
    (Mutant::CoordinatorAbdicatesFrozen, Mode::Fast, false),
    (Mutant::ArmWhenever, Mode::Base, false),
    (Mutant::ForgetsWrites, Mode::Base, false),
    (Mutant::StandbyLetIn, Mode::Base, false),
    (Mutant::DestinationCaches, Mode::Fast, false),
    (Mutant::DisarmSealed, Mode::Base, false),
    (Mutant::DisarmFrozen, Mode::Fast, false),
    (Mutant::DisarmGivesNumbersBack, Mode::Base, false),
    (Mutant::NeverDisarms, Mode::Base, true),
];

impl Mutant {
    /// A scope in which the mistake has its chance.
    pub(crate) fn tempt(self, scope: Scope) -> Scope {
        match self {
            Self::FenceKeepsEpoch | Self::FenceNotDurable => {
                Scope { fence: true, rogue: false, ..scope }
            }
            Self::OpenNoProof => scope,
            // So that it is the first whose requests have that epoch.
            Self::StandbyLetIn => Scope { writes: [0, 0], ..scope },
            // A handoff, another, and the first one's ARM again.
            Self::ArmWhenever => Scope { late_arms: 1, fresh_ids: true, rogue: false, ..scope },
            Self::DisarmSealed | Self::DisarmFrozen => {
                Scope { disarms: true, rogue: false, attempts: 1, ..scope }
            }
            Self::DisarmGivesNumbersBack => {
                Scope { disarms: true, late_arms: 1, rogue: false, ..scope }
            }
            Self::NeverDisarms => Scope { forgets: true, attempts: 2, fresh_ids: true, ..scope },
            Self::OpenOldGrant => Scope { backend_crashes: [0, 1], coordinator: false, ..scope },
            Self::UnfreezeNoBootId => Scope {
                members: 1,
                server_crashes: 2,
                backend_crashes: [0, 0],
                attempts: 1,
                writes: [0, 0],
                net_faults: 1,
                coordinator: false,
                orders: false,
                armed: true,
                slow_io: false,
                slow_answers: false,
                rogue: false,
                stops: 1,
                starts: 1,
                ..scope
            },
            _ => Scope { rogue: false, attempts: 1, ..scope },
        }
    }
}

fn disarm_as_armed(record: &AccessRecord, input: Input<'_>) -> Result<Step, Refusal> {
    AccessRecord { phase: Phase::Armed, ..record.clone() }.step(input)
}

impl Scope {
    /// The real judgement, or a mistaken one.
    pub(crate) fn judge(&self, record: &AccessRecord, input: Input<'_>) -> Result<Step, Refusal> {
        let Some(mutant) = self.mutant else { return record.step(input) };
        match (mutant, input) {
            (Mutant::ArmWhenever, Input::Arm { plan, term, generation, .. }) => {
                let next_epoch = record.next_epoch;
                record.step(Input::Arm { plan, term, next_epoch, generation })
            }
            (Mutant::NoArbiter, Input::Reclaim { attempt, by })
                if record.phase == Phase::Active =>
            {
                let mut mistaken = record.clone();
                mistaken.phase = Phase::Sealed;
                mistaken.step(Input::Reclaim { attempt, by })
            }
            (Mutant::SelfResume, Input::Reclaim { .. }) => {
                let mut mistaken = record.clone();
                if let Some(handoff) = &mut mistaken.handoff {
                    handoff.plan.anchor = record.volume;
                }
                let mut step = mistaken.step(input)?;
                if let (Some(after), Some(before)) = (&mut step.record.handoff, &record.handoff) {
                    after.plan.anchor = before.plan.anchor;
                }
                Ok(step)
            }
            (Mutant::ActOnArmed, Input::Activate { .. }) if record.phase == Phase::Armed => {
                let mut mistaken = record.clone();
                mistaken.phase = Phase::Sealed;
                mistaken.step(input)
            }
            (Mutant::UnfreezeNoBootId, Input::Unfreeze { attempt, session, boot_id_now, .. }) => {
                let boot_id = boot_id_now;
                record.step(Input::Unfreeze { attempt, session, boot_id, boot_id_now })
            }
            (Mutant::OpenNoProof, Input::Open { attempt, session, proof }) => {
                let Some(handoff) = &record.handoff else { return record.step(input) };
                let proof =
                    Proof::new(&handoff.plan.key, attempt, proof.side, proof.grant, session);
                record.step(Input::Open { attempt, session, proof })
            }
            (Mutant::OpenOldGrant, Input::Open { .. }) => {
                let mut mistaken = record.clone();
                if let Some(handoff) = &mut mistaken.handoff {
                    handoff.grant = 0;
                }
                mistaken.step(input)
            }
            (Mutant::OpenArmedLater, Input::Open { .. }) if record.phase == Phase::Armed => {
                record.step(input).map(|step| Step { store: Store::Later, ..step })
            }
            (Mutant::FenceKeepsEpoch, Input::Fence { .. } | Input::Claim { name: "x", .. }) => {
                let mut step = record.step(input)?;
                step.record.epoch = record.epoch;
                Ok(step)
            }
            (Mutant::FenceNotDurable, Input::Fence { .. } | Input::Claim { name: "x", .. }) => {
                record.step(input).map(|step| Step { store: Store::Never, ..step })
            }
            (Mutant::ReactivateSameEpoch, Input::Activate { .. })
                if record.phase == Phase::Active =>
            {
                let mut step = record.step(input)?;
                step.record.epoch = record.epoch;
                Ok(step)
            }
            (Mutant::ReclaimNotDurable, Input::Reclaim { .. }) => {
                record.step(input).map(|step| Step { store: Store::Later, ..step })
            }
            (
                Mutant::CoordinatorAbdicatesFrozen,
                Input::Abdicate { attempt, by: By::Coordinator { .. } },
            ) if record.phase == Phase::Frozen => {
                let name = record.handoff.as_ref().map_or("", |handoff| &handoff.plan.to);
                let by = By::Backend { name, session: baton_protocol::SessionId(1) };
                record.step(Input::Abdicate { attempt, by })
            }
            (Mutant::DisarmSealed, Input::Disarm { .. }) if record.phase == Phase::Sealed => {
                disarm_as_armed(record, input)
            }
            (Mutant::DisarmFrozen, Input::Disarm { .. }) if record.phase == Phase::Frozen => {
                disarm_as_armed(record, input)
            }
            (Mutant::DisarmGivesNumbersBack, Input::Disarm { .. }) => {
                let mut step = record.step(input)?;
                if let Some(handoff) = &record.handoff {
                    step.record.next_epoch = handoff.e_to;
                }
                Ok(step)
            }
            _ => record.step(input),
        }
    }

    /// What a server believes after a restart.
    pub(crate) fn restart(&self, disk: &AccessRecord) -> AccessRecord {
        match self.mutant {
            // Whoever comes first with any number is taken.
            Some(Mutant::VolatileEpoch) => {
                let mut record = disk.clone();
                record.epoch = baton_protocol::Epoch(1);
                record.phase = Phase::Armed;
                record.owner = Some(baton_protocol::access::Owner {
                    name: "s".to_owned(),
                    session: baton_protocol::SessionId(1),
                });
                if let Some(handoff) = &disk.handoff {
                    record.handoff = Some(handoff.clone());
                } else {
                    record.phase = Phase::Owned;
                }
                record
            }
            Some(Mutant::NoFsyncNoPresume) => disk.clone(),
            _ => disk.clone().after_restart(),
        }
    }

    /// A record as a member shows it to a side.
    pub(crate) fn show(&self, side: usize, anchor: &AccessRecord, record: &mut AccessRecord) {
        let blind = match self.mutant {
            Some(Mutant::ActAnchorOnly) => {
                side == D && matches!(anchor.phase, Phase::Sealed | Phase::Active)
            }
            Some(Mutant::ActOnArmed) => side == D,
            _ => false,
        };
        if blind && record.phase == Phase::Armed && record.handoff.is_some() {
            record.phase = Phase::Sealed;
        }
    }

    /// What a side hears.
    pub(crate) fn hear(
        &self,
        side: usize,
        anchor: &AccessRecord,
        input: role::Input,
    ) -> role::Input {
        let mut input = input;
        match &mut input {
            role::Input::Answered { ask: Asked::Reclaim, answer, member, attempt }
                if self.is(Mutant::SelfResume) && side == S && *member != ANCHOR =>
            {
                // Its own word is proof enough.
                if answer.outcome == Outcome::Granted
                    && let (Some(owner), Some(handoff)) = (&answer.record.owner, &anchor.handoff)
                {
                    let key = &handoff.plan.key;
                    let grant = answer.record.epoch.0;
                    answer.proof =
                        Some(Proof::new(key, *attempt, Side::Source, grant, owner.session));
                }
            }
            _ => {}
        }
        input
    }

    /// What a side says.
    pub(crate) fn say(
        &self,
        side: usize,
        input: &role::Input,
        role: &Role,
        outputs: &mut Vec<Output>,
    ) {
        match (self.mutant, input) {
            (Some(Mutant::SelfResume), role::Input::Started { .. }) if side == S => {
                let asked = outputs.iter().find_map(|output| match output {
                    Output::Ask { attempt, ask: Asked::Reclaim, .. } => Some(*attempt),
                    _ => None,
                });
                if let Some(attempt) = asked {
                    let more = (0..self.members).filter(|at| *at != ANCHOR);
                    outputs.extend(more.map(|member| Output::Ask {
                        member,
                        attempt,
                        ask: Asked::Reclaim,
                    }));
                }
            }
            (Some(Mutant::UnfreezeAfterStop), role::Input::View { member, boot_id, record })
                if side == S && record.phase == Phase::Frozen =>
            {
                if let Some(handoff) = &record.handoff {
                    outputs.clear();
                    outputs.push(Output::Ask {
                        member: *member,
                        attempt: handoff.plan.attempt,
                        ask: Asked::Unfreeze { boot_id: *boot_id },
                    });
                }
            }
            (
                Some(Mutant::AbdicateAfterActivate | Mutant::AbdicateUnwitnessed),
                role::Input::View { member: ANCHOR, record, .. },
            ) if side == D && record.phase == Phase::Frozen && role.parked().is_none() => {
                let activated = role.granted(ANCHOR).is_some();
                if let Some(handoff) = &record.handoff
                    && handoff.wanted_back
                    && activated == self.is(Mutant::AbdicateAfterActivate)
                {
                    outputs.retain(|output| {
                        !matches!(output, Output::Ask { ask: Asked::Activate, .. })
                    });
                    outputs.push(Output::Ask {
                        member: ANCHOR,
                        attempt: handoff.plan.attempt,
                        ask: Asked::Abdicate,
                    });
                }
            }
            _ => {}
        }
    }
}
