//! SEAL: answered when nothing of its sender is under way any more, which may be never.

use std::sync::Arc;

use baton_protocol::RequestHeader;
use baton_protocol::handoff::{Count, Try};

use crate::session::Violation;
use crate::volumes::{RunningVolume, SealWait, Sealing};

use super::super::Context;
use super::super::conn::Conn;
use super::Sender;
use super::answer::{Kind, Reply};
use super::turn::Entry;

/// SEALs of one connection that may wait. A client has one.
const SEALS_MAX: usize = 4;

impl Context {
    pub(super) fn seal(
        &mut self,
        conn: &mut Conn,
        volume: &Arc<RunningVolume>,
        header: &RequestHeader,
        attempt: Try,
        counts: Vec<Count>,
    ) -> Result<(), Violation> {
        if conn.asks.seals.len() >= SEALS_MAX {
            return Err(Violation::TooManySeals);
        }
        let session = header.session;
        let reply = self.reply_to(conn, header, Kind::Seal);
        let entry = conn.asks.turns.enter(volume);
        let from = Sender::of(conn, session);
        let volume = Arc::clone(volume);
        // Not counted as in flight: a connection does not outlive its peer for the
        // sake of a seal that may wait for ever.
        let task = match entry {
            Entry::Now(_) if !from.is_heard(&volume) => {
                let asked = reply.unheard(&volume);
                self.tell(conn, asked);
                return Ok(());
            }
            Entry::Now(control) => {
                let sealed = match volume.begin_seal(control, attempt, session, &counts) {
                    Ok(Sealing::Waits(wait)) => {
                        let may_end = wait.may_be_given_up();
                        let task = self.setup.runtime.spawn(finish_seal(volume, wait, reply));
                        if may_end {
                            conn.asks.seals.push((header.seq, task.abort_handle()));
                        }
                        return Ok(());
                    }
                    Ok(Sealing::Done(record)) => Ok(record),
                    Err(error) => Err(error),
                };
                let asked = reply.answered(&volume, attempt, None, sealed);
                self.tell(conn, asked);
                return Ok(());
            }
            Entry::Later(turn) => self.setup.runtime.spawn(async move {
                let control = turn.control(&volume).await;
                let mailbox = Arc::clone(&reply.mailbox);
                if !from.is_heard(&volume) {
                    return mailbox.answer(reply.unheard(&volume));
                }
                let sealed = match volume.begin_seal(control, attempt, session, &counts) {
                    Ok(Sealing::Waits(wait)) => return finish_seal(volume, wait, reply).await,
                    Ok(Sealing::Done(record)) => Ok(record),
                    Err(error) => Err(error),
                };
                mailbox.answer(reply.answered(&volume, attempt, None, sealed));
            }),
        };
        conn.asks.seals.push((header.seq, task.abort_handle()));
        Ok(())
    }
}

async fn finish_seal(volume: Arc<RunningVolume>, wait: SealWait, reply: Reply) {
    let attempt = wait.attempt();
    let sealed = volume.finish_seal(wait).await;
    let mailbox = Arc::clone(&reply.mailbox);
    mailbox.answer(reply.answered(&volume, attempt, None, sealed));
}
