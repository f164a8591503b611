//! How a volume is found: server after server is asked until one answers. Who stands by has also heard the access record
//! then: a VMM may connect at once, and whose the volume is decides what it may do.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use baton_protocol::access::AccessRecord;
use baton_protocol::message::Welcome;
use baton_protocol::{AccessMode, Seq, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::link::Link;
use super::session::{DropReason, Identity, LostReason, Notice, Session};
use crate::open::{OpenError, OpenOptions, random_nonzero};
use crate::socket::Endpoint;
use crate::uri::HostPort;

/// Pause between rounds of attempts while a volume is opened.
const OPEN_PAUSE: Duration = Duration::from_millis(50);
/// Sent data that nobody acknowledges for this long ends the connection.
const USER_TIMEOUT_MS: u32 = 15_000;

/// Where to look for a volume.
pub(crate) enum Servers {
    Tcp(Vec<HostPort>),
    Unix(std::path::PathBuf),
}

/// A volume that was found.
pub(super) struct Claimed {
    pub(super) link: Link,
    pub(super) welcome: Welcome,
    /// The access record and the server's incarnation, if the server has told.
    pub(super) view: Option<(u64, AccessRecord)>,
}

/// Tries server after server until one answers or the time is over.
pub(super) fn claim(
    servers: &Servers,
    who: &Identity,
    options: &OpenOptions,
) -> Result<Claimed, OpenError> {
    let deadline = Instant::now() + options.connect_timeout;
    loop {
        let count = match servers {
            Servers::Tcp(list) => list.len(),
            Servers::Unix(_) => 1,
        };
        let mut last = None;
        for index in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            // Later servers get their share when an earlier one is silent.
            let share = left / u32::try_from(count - index).unwrap_or(1);
            match attempt(servers, index, who, options, Instant::now() + share)? {
                Attempt::Claimed(claimed) => return Ok(*claimed),
                Attempt::Failed(error) => last = Some(error),
            }
        }
        if Instant::now() + OPEN_PAUSE >= deadline {
            return Err(last.unwrap_or(OpenError::NoServer));
        }
        thread::sleep(OPEN_PAUSE);
    }
}

enum Attempt {
    Claimed(Box<Claimed>),
    /// May be better the next time.
    Failed(OpenError),
}

/// One connection to one server. An error is final: trying again cannot help.
fn attempt(
    servers: &Servers,
    index: usize,
    who: &Identity,
    options: &OpenOptions,
    until: Instant,
) -> Result<Attempt, OpenError> {
    let endpoint = match servers {
        Servers::Tcp(list) => match Endpoint::resolve(&list[index], USER_TIMEOUT_MS) {
            Ok(endpoint) => endpoint,
            Err(source) => {
                let host = list[index].host.clone();
                return Ok(Attempt::Failed(OpenError::Resolve { host, source }));
            }
        },
        Servers::Unix(path) => Endpoint::Unix(path.clone()),
    };
    let server = endpoint.to_string();
    let now = Instant::now();
    let mut session =
        Session::new(who.clone(), options.timing, None, 0, Seq(1), random_nonzero(), now);
    session.start(now);
    let mut link = Link::new(session, Arc::new(endpoint), false).map_err(OpenError::System)?;
    let mut welcomed = None;
    let mut events = Vec::new();
    loop {
        link.poll(&mut Vec::new());
        while let Some(notice) = link.session().pop_notice() {
            match notice {
                Notice::Welcomed(welcome) if !hears_of_handoffs(link.session()) => {
                    return Ok(Attempt::Claimed(Box::new(Claimed { link, welcome, view: None })));
                }
                Notice::Welcomed(welcome) => welcomed = Some(welcome),
                Notice::View { boot_id, record } => {
                    if let Some(welcome) = welcomed {
                        link.session().put_back(events);
                        let view = Some((boot_id, *record));
                        return Ok(Attempt::Claimed(Box::new(Claimed { link, welcome, view })));
                    }
                }
                // The volume's, once it is open.
                event @ Notice::Event(_) => events.push(event),
                Notice::Dropped(reason) => return failed(server, reason).map(Attempt::Failed),
                Notice::Lost(LostReason::Refused { status, text }) => {
                    return Err(refused(server, who, status, text));
                }
                Notice::Lost(_)
                | Notice::Fenced
                | Notice::Released
                | Notice::WritesLost(_)
                | Notice::StandsBy
                | Notice::Answered { .. }
                | Notice::Opened(_)
                | Notice::Stuck
                | Notice::FirstAnswer => {}
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let after_ms = options.connect_timeout.as_millis();
            return Ok(Attempt::Failed(OpenError::Timeout { server, after_ms }));
        }
        wait(link.wake_fd(), Some(left));
    }
}

/// Its first record comes right behind the welcome.
fn hears_of_handoffs(session: &Session) -> bool {
    session.who().mode == AccessMode::Standby && session.grant().is_some_and(|grant| grant.handoff)
}

fn failed(server: String, reason: DropReason) -> Result<OpenError, OpenError> {
    match reason {
        DropReason::Connect(source) => Ok(OpenError::Unreachable { server, source }),
        DropReason::Violation(violation) => {
            Err(OpenError::NotBaton { server, source: Box::new(violation) })
        }
        reason => Ok(OpenError::NoAnswer { server, source: Box::new(reason) }),
    }
}

fn refused(server: String, who: &Identity, status: Status, text: String) -> OpenError {
    let volume = who.volume.clone();
    match status {
        Status::NoSuchVolume => OpenError::NoSuchVolume { server, volume },
        Status::NotOwner => OpenError::NotOwner { server, volume, text },
        Status::Version => OpenError::Version { server, text },
        _ => OpenError::Refused { server, volume, status, text },
    }
}

/// Waits until the descriptor is readable, at most `limit`.
fn wait(fd: BorrowedFd<'_>, limit: Option<Duration>) {
    // One more millisecond, so that a wait rounded down does not spin.
    let timeout = limit.map_or(PollTimeout::NONE, |limit| {
        PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    });
    // An interrupted wait is a short one; the caller looks again anyway.
    let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout);
}
