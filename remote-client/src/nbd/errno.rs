//! What an error number of the protocol means to the guest.
//!
//! | number | name | the guest sees |
//! |---|---|---|
//! | 1 | EPERM | [`IoError::ReadOnly`] for a change, else [`IoError::Io`] |
//! | 28 | ENOSPC | [`IoError::NoSpace`] for a change, else [`IoError::Io`] |
//! | 95 | ENOTSUP | [`IoError::Unsupported`]; nothing for a discard, which is a hint |
//! | 108 | ESHUTDOWN | nothing: the server goes away, and the request is sent again |
//! | 5, 12, 22, 75, any other | EIO, ENOMEM, EINVAL, EOVERFLOW | [`IoError::Io`] |
//!
//! EINVAL is not "off the volume": that is checked before anything is sent.

use super::wire::Command;
use crate::volume::IoError;

const EPERM: u32 = 1;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// What comes of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answer(Result<(), IoError>),
    /// The server is about to end; the request waits for the next one.
    GoingAway,
}

/// `errno` is not zero.
pub(super) fn outcome(command: Command, errno: u32) -> Outcome {
    let changes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
    Outcome::Answer(match errno {
        ESHUTDOWN => return Outcome::GoingAway,
        EPERM if changes => Err(IoError::ReadOnly),
        ENOSPC if changes => Err(IoError::NoSpace),
        ENOTSUP if command == Command::Trim => Ok(()),
        ENOTSUP => Err(IoError::Unsupported),
        _ => Err(IoError::Io),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_for_every_command() {
        use Command::{Flush, Read, Trim, Write, WriteZeroes};
        let all = [Read, Write, Flush, Trim, WriteZeroes];
        let [io, ro, full, unsup] =
            [IoError::Io, IoError::ReadOnly, IoError::NoSpace, IoError::Unsupported].map(Err);
        for (errno, want) in [
            (1, [io, ro, io, ro, ro]),
            (5, [io; 5]),
            (12, [io; 5]),
            (22, [io; 5]),
            (28, [io, full, io, full, full]),
            (75, [io; 5]),
            (95, [unsup, unsup, unsup, Ok(()), unsup]),
            (4711, [io; 5]),
        ] {
            for (command, want) in all.into_iter().zip(want) {
                assert_eq!(outcome(command, errno), Outcome::Answer(want), "{command:?} {errno}");
            }
        }
        for command in all {
            assert_eq!(outcome(command, 108), Outcome::GoingAway);
        }
    }
}
