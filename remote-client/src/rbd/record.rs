//! An image's access record for who plans and fences: the coordinator. Reads
//! and changes it, and the blocklist; never the image's data.

use std::sync::Arc;
use std::time::Duration;

use baton_fault_point as fault_point;
use baton_protocol::VolumeId;
use baton_protocol::access::{Input, Refusal};

use super::error::RbdError;
use super::opening::Opening;
use super::register::{Register, SeatError};
use super::seat::Seat;
use crate::open::OpenOptions;
use crate::uri::RbdUri;

/// Why a record was not read or not changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It stays as it is.
    #[error(transparent)]
    Refused(Refusal),
    /// The cluster, or the way to it.
    #[error(transparent)]
    Rbd(#[from] RbdError),
}

/// The access record of an image, with a client of the cluster of its own.
/// Every call waits for the cluster, up to a time-out, after which what was
/// asked may happen all the same.
#[derive(Debug)]
pub struct ImageRecord {
    opening: Opening,
    register: Register,
}

impl ImageRecord {
    /// Connects. Waits at most `timeout` for each step.
    ///
    /// # Errors
    /// [`RbdError`].
    pub fn connect(uri: &RbdUri, timeout: Duration) -> Result<Self, RbdError> {
        let options = OpenOptions { connect_timeout: timeout, ..OpenOptions::new("record") };
        let opening = Opening::new(uri, &options)?.with_patience(timeout);
        let register = opening.register(&Arc::new(opening.image(true)?))?;
        Ok(Self { opening, register })
    }

    /// How the record names the image.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.register.volume()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn read(&self) -> Result<Seat, RecordError> {
        self.register.read().map_err(|error| self.failed(error))
    }

    /// Changes it as a storage server would, durably.
    ///
    /// # Errors
    /// [`RecordError`]; a refusal changes nothing.
    pub fn change(&self, input: Input<'_>) -> Result<Seat, RecordError> {
        let [swapping, swapped] = match input {
            Input::Arm { .. } => ["arm.swapping", "arm.swapped"],
            Input::Settle { .. } => ["settle.swapping", "settle.swapped"],
            _ => ["record.swapping", "record.swapped"],
        };
        let changed = self.register.change(|seat| {
            let next = seat.step(input, None);
            fault_point::at(swapping);
            next
        });
        if changed.is_ok() {
            fault_point::at(swapped);
        }
        changed.map_err(|error| self.failed(error))
    }

    /// Takes the image from its owner: every client that could still write is on
    /// the blocklist before the record says so.
    ///
    /// # Errors
    /// [`RecordError`]; refused, nobody was fenced.
    pub fn fence(&self, input: Input<'_>) -> Result<Seat, RecordError> {
        let fence = || -> Result<Seat, SeatError> {
            loop {
                let seat = self.register.read()?;
                let fenced = match seat.step(input, None) {
                    Ok(fenced) => fenced,
                    Err(refusal) => return Err(SeatError::Refused(refusal, Box::new(seat))),
                };
                let clients: Vec<String> = fenced.unlisted().map(str::to_owned).collect();
                for client in &clients {
                    self.register.blocklist(client)?;
                }
                // Another client may have come meanwhile, or a reason to refuse.
                let fenced = fenced.with_listed(&clients);
                if self.register.swap_if(&seat, &fenced)? {
                    return Ok(fenced);
                }
            }
        };
        fence().map_err(|error| self.failed(error))
    }

    /// Puts those on the blocklist that had the image before and are not on it
    /// yet, also if they had sealed it; which they were.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn keep_former_out(&self) -> Result<Vec<String>, RecordError> {
        let former = |seat: &Seat| seat.unlisted().map(str::to_owned).collect();
        let kept_out = self.register.keep_out(former);
        kept_out.map(|(_, clients)| clients).map_err(|error| self.failed(error))
    }

    /// Ends the blocklist's entry of an owner's last client, whose process is
    /// proven dead, if it had sealed the image; whose it was. Needs more than
    /// the profile `rbd`.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn bury(&self, owner: &str) -> Result<Vec<String>, RecordError> {
        self.register.bury(owner).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: SeatError) -> RecordError {
        match error {
            SeatError::Refused(refusal, _) => RecordError::Refused(refusal),
            error => RecordError::Rbd(self.opening.unseated(error)),
        }
    }
}
