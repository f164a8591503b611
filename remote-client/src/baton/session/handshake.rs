//! HELLO and what its answer means. Pure: judges, changes nothing.

use baton_protocol::handoff::message::HandoffBodyError;
use baton_protocol::message::{BodyError, Welcome};
use baton_protocol::{
    AccessMode, Epoch, Features, Hello, Opcode, QueueId, RequestHeader, Seq, SessionId, Status,
    Version, VolumeId,
};

/// Who a session is and what it wants. The same for every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) owner: String,
    pub(crate) session: SessionId,
    pub(crate) queue: QueueId,
    pub(crate) mode: AccessMode,
    pub(crate) volume: String,
    /// Keep an EVENT request parked.
    pub(crate) watch: bool,
    /// Offer [`Features::HANDOFF`].
    pub(crate) handoff: bool,
}

/// What the first WELCOME of a volume said; every later one must agree, or the
/// address has come to serve something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) volume: VolumeId,
    pub(crate) epoch: Epoch,
    pub(crate) block_bytes: u32,
    /// The volume may grow, never shrink.
    pub(crate) size_bytes: u64,
    /// [`Features::HANDOFF`] was agreed.
    pub(crate) handoff: bool,
}

/// Why the volume is not, or no longer, the one that is meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LostReason {
    #[error("the server has no such volume any more")]
    Gone,
    #[error("the server now serves another volume of this name ({found} instead of {expected})")]
    OtherVolume { expected: VolumeId, found: VolumeId },
    #[error("the volume shrank from {expected} to {found} bytes")]
    Shrunk { expected: u64, found: u64 },
    #[error("the volume's block size changed from {expected} to {found} bytes")]
    BlockSize { expected: u32, found: u32 },
    /// The very first HELLO was refused: nothing was ever granted.
    #[error("the server refused: {status}: {text}")]
    Refused { status: Status, text: String },
}

/// What the server did that no server does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error(transparent)]
    Handoff(#[from] HandoffBodyError),
    #[error("the access record of another volume")]
    OtherRecord,
    #[error("an access record that is known")]
    OldRecord,
    #[error(transparent)]
    Frame(#[from] baton_protocol::FrameError),
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error("a WELCOME with an impossible {0}")]
    Welcome(&'static str),
    #[error("an answer to {opcode:?} {seq:?}, which was not asked")]
    NotAsked { opcode: Opcode, seq: Seq },
    #[error("{len} bytes of payload in the answer to {opcode:?}")]
    PayloadLength { opcode: Opcode, len: u32 },
    #[error("flags {0:#04x}, which were not agreed")]
    Flags(u8),
    #[error("status `{status}` in the answer to {opcode:?}")]
    Status { opcode: Opcode, status: Status },
    #[error("event {found} after event {known}")]
    EventOrder { known: u64, found: u64 },
}

/// What the answer to HELLO means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome(Welcome),
    /// Try again, after a pause.
    Later {
        status: Status,
        text: String,
    },
    /// Try again in standby: the volume is not this session's now.
    StandBy,
    Fenced,
    Lost(LostReason),
    Violation(Violation),
}

/// The bytes of HELLO.
pub(super) fn hello(who: &Identity, epoch: Epoch, resume_from: Seq) -> Vec<u8> {
    let body = Hello {
        version_oldest: Version::OLDEST.number(),
        version_newest: Version::NEWEST.number(),
        mode: who.mode,
        features: offered(who),
        resume_from,
        owner: who.owner.clone(),
        volume: who.volume.clone(),
        token: Vec::new(),
    }
    .encode();
    let header = RequestHeader {
        opcode: Opcode::Hello,
        flags: 0,
        queue: who.queue,
        seq: Seq(0),
        epoch,
        session: who.session,
        offset: 0,
        len: 0,
        payload_len: u32::try_from(body.len()).expect("bounded by HELLO_BYTES_MAX"),
        payload_crc32c: 0,
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

fn offered(who: &Identity) -> Features {
    if who.handoff { Features::HANDOFF } else { Features::default() }
}

/// Judges the answer to HELLO. `grant` is what was granted before, if anything.
pub(super) fn judge(who: &Identity, grant: Option<&Grant>, status: Status, body: &[u8]) -> Verdict {
    if status == Status::Ok {
        return match Welcome::decode(body) {
            Ok(welcome) => check(who, grant, welcome),
            Err(error) => Verdict::Violation(error.into()),
        };
    }
    let text = sentence(body);
    if status == Status::Busy {
        return Verdict::Later { status, text };
    }
    let Some(grant) = grant else {
        return if status == Status::InHandoff && who.handoff && who.mode == AccessMode::Owner {
            Verdict::StandBy
        } else {
            Verdict::Lost(LostReason::Refused { status, text })
        };
    };
    match status {
        Status::NoSuchVolume | Status::Gone => Verdict::Lost(LostReason::Gone),
        // The record says what that means, and only the control connection
        // reads it; the queues come again when they are told to.
        Status::StaleEpoch | Status::NotOwner | Status::InHandoff
            if who.mode == AccessMode::Owner && grant.handoff =>
        {
            if who.watch {
                Verdict::StandBy
            } else {
                Verdict::Later { status, text }
            }
        }
        Status::StaleEpoch | Status::NotOwner if who.mode == AccessMode::Owner => Verdict::Fenced,
        // A server of another version, or one that is being set up: the guest
        // waits until a person has put it right.
        _ => Verdict::Later { status, text },
    }
}

fn check(who: &Identity, grant: Option<&Grant>, welcome: Welcome) -> Verdict {
    let impossible = |what| Verdict::Violation(Violation::Welcome(what));
    if Version::from_number(welcome.version).is_none() {
        return impossible("version");
    }
    if welcome.mode != who.mode {
        return impossible("mode");
    }
    if !offered(who).contains(welcome.features) {
        return impossible("feature");
    }
    if welcome.volume.0 == 0 {
        return impossible("volume");
    }
    if !welcome.block_bytes.is_power_of_two() || !(512..=1 << 20).contains(&welcome.block_bytes) {
        return impossible("block size");
    }
    if welcome.size_bytes == 0 || !welcome.size_bytes.is_multiple_of(512) {
        return impossible("size");
    }
    if welcome.payload_bytes_max < 4096 {
        return impossible("payload limit");
    }
    if welcome.window_requests == 0 {
        return impossible("window");
    }
    if welcome.epoch.0 == 0 && who.mode == AccessMode::Owner {
        return impossible("epoch");
    }
    let Some(grant) = grant else {
        return Verdict::Welcome(welcome);
    };
    // Compared before anything is sent again: requests must never be replayed
    // onto another volume.
    if welcome.volume != grant.volume {
        let (expected, found) = (grant.volume, welcome.volume);
        return Verdict::Lost(LostReason::OtherVolume { expected, found });
    }
    if welcome.block_bytes != grant.block_bytes {
        let (expected, found) = (grant.block_bytes, welcome.block_bytes);
        return Verdict::Lost(LostReason::BlockSize { expected, found });
    }
    if welcome.size_bytes < grant.size_bytes {
        let (expected, found) = (grant.size_bytes, welcome.size_bytes);
        return Verdict::Lost(LostReason::Shrunk { expected, found });
    }
    let handoff = welcome.features.contains(Features::HANDOFF);
    if grant.handoff && !handoff {
        return impossible("feature");
    }
    if who.mode == AccessMode::Owner {
        // Each epoch of one session is its own: it may hear of a newer one here.
        let newer = grant.handoff && welcome.epoch > grant.epoch;
        if welcome.epoch != grant.epoch && !newer {
            return impossible("epoch");
        }
    }
    Verdict::Welcome(welcome)
}

/// The server's sentence, fit for a log line.
pub(super) fn sentence(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn who(mode: AccessMode) -> Identity {
        Identity {
            owner: "h/vm".to_owned(),
            session: SessionId(9),
            queue: QueueId(2),
            mode,
            volume: "v".to_owned(),
            watch: false,
            handoff: false,
        }
    }

    const GRANT: Grant = Grant {
        volume: VolumeId(1),
        epoch: Epoch(4),
        block_bytes: 512,
        size_bytes: 1 << 20,
        handoff: false,
    };

    fn welcome(mode: AccessMode) -> Welcome {
        Welcome {
            version: 1,
            mode,
            read_only: false,
            block_bytes: 512,
            volume: VolumeId(1),
            epoch: Epoch(4),
            size_bytes: 1 << 20,
            features: Features::default(),
            payload_bytes_max: 1 << 20,
            window_requests: 1024,
            discard_bytes: 1 << 20,
            boot_id: 3,
            event_id: 0,
            durability_generation: 1,
        }
    }

    #[test]
    fn hello_says_who_and_from_where() {
        let bytes = hello(&who(AccessMode::Owner), Epoch(4), Seq(77));
        let (header, body) = bytes.split_at(64);
        let header = RequestHeader::decode(header.try_into().expect("64")).expect("header");
        assert_eq!(
            (header.queue, header.epoch, header.session),
            (QueueId(2), Epoch(4), SessionId(9))
        );
        let body = Hello::decode(body).expect("body");
        assert_eq!(
            (body.resume_from, body.owner.as_str(), body.volume.as_str()),
            (Seq(77), "h/vm", "v")
        );
    }

    /// Every status, before and after something was granted, for both modes.
    #[test]
    fn the_whole_matrix_of_refusals() {
        let verdict = |mode, granted: bool, status| match judge(
            &who(mode),
            granted.then_some(&GRANT),
            status,
            b"because\n",
        ) {
            Verdict::Later { text, .. } => {
                assert_eq!(text, "because");
                "later"
            }
            Verdict::Fenced => "fenced",
            Verdict::Lost(LostReason::Refused { text, .. }) => {
                assert_eq!(text, "because");
                "refused"
            }
            Verdict::Lost(LostReason::Gone) => "gone",
            Verdict::Violation(_) => "violation",
            other => panic!("{other:?}"),
        };
        for number in 0..14 {
            let status = Status::from_number(number).expect("status");
            for mode in [AccessMode::Owner, AccessMode::ReadOnly] {
                let first = match status {
                    Status::Ok => "violation",
                    Status::Busy => "later",
                    _ => "refused",
                };
                assert_eq!(verdict(mode, false, status), first, "{status:?}");
                let again = match status {
                    Status::Ok => "violation",
                    Status::NoSuchVolume | Status::Gone => "gone",
                    Status::StaleEpoch | Status::NotOwner if mode == AccessMode::Owner => "fenced",
                    _ => "later",
                };
                assert_eq!(verdict(mode, true, status), again, "{status:?}");
            }
        }
    }

    #[test]
    fn a_welcome_that_differs_is_never_used() {
        let with = |change: fn(&mut Welcome)| {
            let mut w = welcome(AccessMode::Owner);
            change(&mut w);
            judge(&who(AccessMode::Owner), Some(&GRANT), Status::Ok, &w.encode())
        };
        assert!(matches!(with(|_| ()), Verdict::Welcome(_)));
        assert!(matches!(with(|w| w.size_bytes += 512), Verdict::Welcome(_)), "grown");
        assert!(matches!(with(|w| w.volume.0 = 2), Verdict::Lost(LostReason::OtherVolume { .. })));
        assert!(matches!(with(|w| w.size_bytes -= 512), Verdict::Lost(LostReason::Shrunk { .. })));
        assert!(matches!(
            with(|w| w.block_bytes = 4096),
            Verdict::Lost(LostReason::BlockSize { .. })
        ));
        for change in [
            (|w| w.version = 2) as fn(&mut Welcome),
            |w| w.mode = AccessMode::ReadOnly,
            |w| w.features = Features::CHECKSUM,
            |w| w.volume.0 = 0,
            |w| w.block_bytes = 0,
            |w| w.size_bytes += 1,
            |w| w.payload_bytes_max = 4095,
            |w| w.window_requests = 0,
            |w| w.epoch.0 = 0,
            |w| w.epoch.0 += 1,
        ] {
            assert!(matches!(with(change), Verdict::Violation(_)));
        }
        let mut newer = welcome(AccessMode::ReadOnly);
        newer.epoch = Epoch(5);
        let verdict = judge(&who(AccessMode::ReadOnly), Some(&GRANT), Status::Ok, &newer.encode());
        assert!(matches!(verdict, Verdict::Welcome(_)), "a reader follows the epoch");
    }
}
