//! What a client that may have an image does about the one that has its lock.
//! Pure: facts in, a step out.
//!
//! The lock is Ceph's: one client has it, until it gives it back or is found
//! dead. Whose the image is, the access record says ([`super::seat`]): a backend
//! that was killed leaves both, and only who is granted the image by the record
//! may break the lock. A client that the record has never heard of, such as a
//! QEMU without Baton, keeps its lock while it is alive.

/// What to do for the lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nobody alive has it: ask for it.
    Acquire,
    /// A client that had the image before has it, or one that was not heard of
    /// lately: fence it, break the lock, ask for it.
    TakeOver(String),
    /// A client that is alive and was never let in by the record has it.
    InUse(String),
}

/// `before`: clients that had the image by the record; `watchers`: those that
/// are alive.
pub(super) fn next<'a>(
    mut before: impl Iterator<Item = &'a str>,
    lock: Option<&str>,
    watchers: &[String],
) -> Step {
    match lock {
        None => Step::Acquire,
        // Dead or frozen; which of them cannot be known from here.
        Some(client) if before.any(|known| known == client) => Step::TakeOver(client.to_owned()),
        Some(client) if watchers.iter().any(|alive| alive == client) => {
            Step::InUse(client.to_owned())
        }
        // Its watch has timed out, which a frozen one's does, too.
        Some(client) => Step::TakeOver(client.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_of_record_lock_and_life() {
        let alive = ["old".to_owned(), "qemu".to_owned()];
        let take = |client: &str| Step::TakeOver(client.to_owned());
        let in_use = |client: &str| Step::InUse(client.to_owned());
        // Who has the lock, whether the record knows it, and the step if that one is dead or alive.
        for (lock, known, dead, living) in [
            (None, false, Step::Acquire, Step::Acquire),
            (Some("old"), true, take("old"), take("old")),
            (Some("qemu"), false, take("qemu"), in_use("qemu")),
        ] {
            let before = || known.then_some("old").into_iter();
            assert_eq!(next(before(), lock, &[]), dead, "{lock:?} dead");
            assert_eq!(next(before(), lock, &alive), living, "{lock:?} alive");
        }
    }
}
