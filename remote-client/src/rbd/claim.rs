//! Who an image belongs to, and what a client that wants it may do about that.
//! Pure: facts in, a step out.
//!
//! Two things are on the image. The *lock* is Ceph's: one client has it, until
//! it gives it back or is found dead. The *claim* is a note of ours with the
//! name of the owner (host and VM), and outlives the client: a backend that was
//! killed leaves both, and only the backend that takes its place may break the
//! lock, because only it is entitled to fence the one before. A client that has made no
//! claim, such as a QEMU without Baton, keeps its lock while it is alive.

use std::fmt;
use std::str::FromStr;

/// The note's name on the image.
pub(super) const CLAIM_NOTE: &str = "baton.claim";

/// What the note says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Address and nonce of the client that wrote it, holding the lock.
    pub(super) client: String,
    /// Host and VM.
    pub(super) owner: String,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1 {} {}", self.client, self.owner)
    }
}

impl FromStr for Claim {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.splitn(3, ' ');
        match (parts.next(), parts.next(), parts.next()) {
            (Some("1"), Some(client), Some(owner)) if !client.is_empty() && !owner.is_empty() => {
                Ok(Self { client: client.to_owned(), owner: owner.to_owned() })
            }
            _ => Err(()),
        }
    }
}

/// What to do for the lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nobody alive has it: ask for it.
    Acquire,
    /// A client that is this owner's is still there, or the one that has it was
    /// not heard of lately: fence it, break the lock, ask for it.
    TakeOver(String),
    /// A client that is alive and not ours has it.
    InUse(String),
    /// The image is another owner's.
    NotOwner(String),
}

/// `claim`: of the image, as it stands; `watchers`: clients that are alive.
pub(super) fn next(
    owner: &str,
    claim: Option<&Claim>,
    lock: Option<&str>,
    watchers: &[String],
) -> Step {
    let is_alive = |client: &str| watchers.iter().any(|alive| alive == client);
    match (claim, lock) {
        (Some(claim), _) if claim.owner != owner => Step::NotOwner(claim.owner.clone()),
        // It has given up its lock but not ended: it may be dead, and then every
        // notice to those who watch the image waits for it, or frozen.
        (Some(claim), None) if is_alive(&claim.client) => Step::TakeOver(claim.client.clone()),
        (_, None) => Step::Acquire,
        // Dead or frozen; which of them cannot be known from here.
        (Some(claim), Some(client)) if claim.client == client => Step::TakeOver(client.to_owned()),
        (_, Some(client)) if is_alive(client) => Step::InUse(client.to_owned()),
        // Its watch has timed out, which a frozen one's does, too.
        (_, Some(client)) => Step::TakeOver(client.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(client: &str, owner: &str) -> Claim {
        Claim { client: client.to_owned(), owner: owner.to_owned() }
    }

    #[test]
    fn a_claim_reads_as_it_was_written() {
        let written = claim("127.0.0.1:0/7", "host 1/vm");
        assert_eq!(written.to_string(), "1 127.0.0.1:0/7 host 1/vm");
        assert_eq!(written.to_string().parse(), Ok(written));
        for wrong in ["", "1", "1 a", "1 a ", "1  b", "2 a b"] {
            assert_eq!(wrong.parse::<Claim>(), Err(()), "{wrong:?}");
        }
    }

    #[test]
    fn every_case_of_claim_lock_and_life() {
        let (mine, other) = (claim("old", "me"), claim("old", "you"));
        let (acquire, over) = (Step::Acquire, Step::TakeOver("old".to_owned()));
        let dead_one = Step::TakeOver("qemu".to_owned());
        let in_use = |client: &str| Step::InUse(client.to_owned());
        let theirs = Step::NotOwner("you".to_owned());
        let alive = ["old".to_owned(), "qemu".to_owned()];
        // What is claimed, who has the lock, and the step if that one is dead or alive.
        for (claim, lock, dead, living) in [
            (None, None, &acquire, &acquire),
            (None, Some("qemu"), &dead_one, &in_use("qemu")),
            (Some(&mine), None, &acquire, &over),
            (Some(&mine), Some("old"), &over, &over),
            (Some(&mine), Some("qemu"), &dead_one, &in_use("qemu")),
            (Some(&other), None, &theirs, &theirs),
            (Some(&other), Some("old"), &theirs, &theirs),
            (Some(&other), Some("qemu"), &theirs, &theirs),
        ] {
            assert_eq!(&next("me", claim, lock, &[]), dead, "{claim:?} {lock:?} dead");
            assert_eq!(&next("me", claim, lock, &alive), living, "{claim:?} {lock:?} alive");
        }
    }
}
