//! What a HELLO asks for, and what is wrong with it. Pure: bytes in, decision out.

use baton_protocol::access::{AccessRecord, Phase, Refusal as AccessRefusal};
use baton_protocol::frame::{REQUEST_HEADER_BYTES, REQUEST_MAGIC};
use baton_protocol::message::{HELLO_BYTES_MAX, HELLO_FIXED_BYTES};
use baton_protocol::{
    AccessMode, Epoch, Hello, Opcode, QueueId, RequestHeader, Seq, SessionId, Status, Version,
};

use crate::session;
use crate::volumes::{ChangeError, NoSeat, Request};

/// A typed no, with a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// What programs go by.
    pub status: Status,
    /// What people read.
    pub text: String,
}

impl Refusal {
    pub(super) fn new(status: Status, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

/// What the first 64 bytes of a connection are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// The header of a HELLO; its body, of this many bytes, follows.
    Hello(RequestHeader, usize),
    /// Ours, but no HELLO we can read.
    Refused(Opcode, Seq, Refusal),
    /// Not ours: nothing we say would be understood.
    Foreign,
}

/// Judges the first header. Nothing is read or allocated by a length that was
/// not checked here.
#[must_use]
pub(super) fn opening(head: &[u8; REQUEST_HEADER_BYTES]) -> Opening {
    let Some((opcode, seq)) = session::addressee(head) else { return Opening::Foreign };
    debug_assert_eq!(head[..4], REQUEST_MAGIC.to_le_bytes());
    let refused =
        |text: String| Opening::Refused(opcode, seq, Refusal::new(Status::Protocol, text));
    let header = match RequestHeader::decode(head) {
        Ok(header) => header,
        Err(error) => return refused(error.to_string()),
    };
    if header.opcode != Opcode::Hello {
        return refused(format!("the first request must be HELLO, not {opcode:?}"));
    }
    let len = header.payload_len as usize;
    if !(HELLO_FIXED_BYTES..=HELLO_BYTES_MAX).contains(&len) {
        return refused(format!(
            "a HELLO body has {HELLO_FIXED_BYTES} to {HELLO_BYTES_MAX} bytes, not {len}"
        ));
    }
    if header.flags != 0 {
        return refused(format!("HELLO has no flags, not {:#04x}", header.flags));
    }
    Opening::Hello(header, len)
}

/// What a readable HELLO asks for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// To speak.
    pub version: Version,
    /// As received.
    pub hello: Hello,
    /// The role.
    pub role: Role,
}

/// Which way in.
#[derive(Clone, Debug)]
pub(super) enum Role {
    /// Ask the access record.
    Owner(Request),
    /// Beside the owner; a named epoch must be the volume's.
    ReadOnly(Option<Epoch>),
    /// Sees size and events.
    Standby,
}

/// Reads the body.
///
/// # Errors
/// A [`Refusal`] to send.
pub(super) fn wanted(header: &RequestHeader, body: &[u8]) -> Result<Wanted, Refusal> {
    // The versions come first and stay where they are in every version.
    if let Some((versions, _)) = body.split_first_chunk::<4>() {
        let [o0, o1, n0, n1] = *versions;
        let (oldest, newest) = (u16::from_le_bytes([o0, o1]), u16::from_le_bytes([n0, n1]));
        if Version::negotiate(oldest, newest).is_none() {
            return Err(Refusal::new(
                Status::Version,
                format!(
                    "this server speaks versions {} to {}, the client {oldest} to {newest}; update the older side",
                    Version::OLDEST.number(),
                    Version::NEWEST.number()
                ),
            ));
        }
    }
    let hello =
        Hello::decode(body).map_err(|error| Refusal::new(error.status(), error.to_string()))?;
    let version = Version::negotiate(hello.version_oldest, hello.version_newest)
        .ok_or_else(|| Refusal::new(Status::Version, "no common version"))?;
    if header.session.0 == 0 {
        return Err(Refusal::new(Status::Protocol, "a session number is never zero"));
    }
    let (session, epoch) = (header.session, header.epoch);
    let role = match hello.mode {
        AccessMode::Owner if epoch.0 == 0 => {
            Role::Owner(Request::Claim { name: hello.owner.clone(), session })
        }
        AccessMode::Owner => Role::Owner(Request::Rejoin { session, epoch }),
        AccessMode::ReadOnly => Role::ReadOnly((epoch.0 != 0).then_some(epoch)),
        AccessMode::Standby => Role::Standby,
    };
    Ok(Wanted { version, hello, role })
}

/// Whether a connection of the owner may be welcomed as things stand now.
///
/// # Errors
/// A [`Refusal`] to send.
pub(super) fn may_serve(
    record: &AccessRecord,
    session: SessionId,
    queue: QueueId,
) -> Result<(), Refusal> {
    if record.owner.as_ref().is_none_or(|owner| owner.session != session) {
        let text = format!("the grant is over: the volume is at epoch {}", record.epoch);
        return Err(Refusal::new(Status::StaleEpoch, text));
    }
    // The control connection says how the handoff stood; nothing else can be done.
    if record.phase == Phase::Frozen && queue != QueueId::CONTROL {
        let text =
            "the server restarted during a handoff of the volume; try again when it is decided";
        return Err(Refusal::new(Status::Busy, text));
    }
    Ok(())
}

/// The one table from a change that was refused to the wire.
impl From<ChangeError> for Refusal {
    fn from(error: ChangeError) -> Self {
        let status = match &error {
            ChangeError::Refused(AccessRefusal::NotOwner { .. } | AccessRefusal::Barred { .. }) => {
                Status::NotOwner
            }
            ChangeError::Refused(AccessRefusal::StaleEpoch { .. }) => Status::StaleEpoch,
            ChangeError::Refused(AccessRefusal::InHandoff(_)) => Status::InHandoff,
            // No HELLO is answered with any of these.
            ChangeError::Refused(_) => Status::Protocol,
            ChangeError::Store(_) => Status::Io,
            ChangeError::Deleted => Status::NoSuchVolume,
            ChangeError::Stopped => Status::Busy,
        };
        Self::new(status, error.to_string())
    }
}

impl From<NoSeat> for Refusal {
    fn from(no: NoSeat) -> Self {
        Self::new(
            Status::Busy,
            match no {
                NoSeat::Overtaken => "a newer connection of this queue came",
                NoSeat::StillBusy => {
                    "requests of this queue's last connection are still at the disk; try again"
                }
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_protocol::{Features, QueueId, SessionId};

    fn hello(mode: AccessMode) -> Hello {
        Hello {
            version_oldest: 1,
            version_newest: 1,
            mode,
            features: Features::default(),
            resume_from: Seq(1),
            owner: "host/vm".to_owned(),
            volume: "disk".to_owned(),
            token: Vec::new(),
        }
    }

    fn header(epoch: u64) -> RequestHeader {
        RequestHeader {
            opcode: Opcode::Hello,
            flags: 0,
            queue: QueueId(0),
            seq: Seq(4),
            epoch: Epoch(epoch),
            session: SessionId(9),
            offset: 0,
            len: 0,
            payload_len: 43,
            payload_crc32c: 0,
        }
    }

    /// The matrix of mode x epoch.
    #[test]
    fn what_each_hello_asks_for() {
        for epoch in [0, 5] {
            for mode in [AccessMode::Owner, AccessMode::Standby, AccessMode::ReadOnly] {
                let got = wanted(&header(epoch), &hello(mode).encode()).expect("good").role;
                let right = match (mode, epoch) {
                    (AccessMode::Owner, 0) => {
                        matches!(&got, Role::Owner(Request::Claim { name, session }) if name == "host/vm" && session.0 == 9)
                    }
                    (AccessMode::Owner, _) => matches!(
                        got,
                        Role::Owner(Request::Rejoin { session: SessionId(9), epoch: Epoch(5) })
                    ),
                    (AccessMode::ReadOnly, 0) => matches!(got, Role::ReadOnly(None)),
                    (AccessMode::ReadOnly, _) => matches!(got, Role::ReadOnly(Some(Epoch(5)))),
                    (AccessMode::Standby, _) => matches!(got, Role::Standby),
                };
                assert!(right, "{mode:?} epoch {epoch}: {got:?}");
            }
        }
    }

    #[test]
    fn a_version_that_is_not_ours_is_told_ours_whatever_the_rest_says() {
        let mut body = hello(AccessMode::Owner).encode();
        body[0..4].copy_from_slice(&[7, 0, 9, 0]);
        body[4] = 99;
        let refusal = wanted(&header(0), &body).expect_err("version");
        assert_eq!(refusal.status, Status::Version);
        assert!(refusal.text.contains("1 to 1") && refusal.text.contains("7 to 9"));
    }

    #[test]
    fn bad_bodies_and_headers_are_refused() {
        let good = hello(AccessMode::Owner).encode();
        let no_session = RequestHeader { session: SessionId(0), ..header(0) };
        assert_eq!(wanted(&no_session, &good).expect_err("session").status, Status::Protocol);
        assert_eq!(wanted(&header(0), &good[..40]).expect_err("cut").status, Status::Protocol);
        let refused = |header: RequestHeader| match opening(&header.encode()) {
            Opening::Refused(_, Seq(4), refusal) => refusal.text,
            other => panic!("{other:?}"),
        };
        assert!(refused(RequestHeader { opcode: Opcode::Read, ..header(0) }).contains("HELLO"));
        assert!(refused(RequestHeader { payload_len: 31, ..header(0) }).contains("31"));
        assert!(refused(RequestHeader { payload_len: 900, ..header(0) }).contains("900"));
        assert!(refused(RequestHeader { flags: 1, ..header(0) }).contains("flags"));
        let mut head = header(0).encode();
        assert!(matches!(opening(&head), Opening::Hello(_, 43)));
        head[4] = 200;
        assert!(matches!(opening(&head), Opening::Refused(Opcode::Hello, Seq(4), _)));
        head[0] = b'G';
        assert_eq!(opening(&head), Opening::Foreign);
    }

    #[test]
    fn every_refusal_of_the_record_has_a_status() {
        let record = |refusal| Refusal::from(ChangeError::Refused(refusal)).status;
        let epoch = Epoch(1);
        assert_eq!(record(AccessRefusal::NotOwner { owner: "x".into(), epoch }), Status::NotOwner);
        assert_eq!(record(AccessRefusal::Barred { name: "x".into(), epoch }), Status::NotOwner);
        assert_eq!(record(AccessRefusal::StaleEpoch { current: epoch }), Status::StaleEpoch);
        assert_eq!(Refusal::from(ChangeError::Deleted).status, Status::NoSuchVolume);
        assert_eq!(Refusal::from(NoSeat::StillBusy).status, Status::Busy);
    }
}
