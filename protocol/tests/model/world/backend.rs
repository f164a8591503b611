//! A backend: what it hears, and what its role has it say and do.

use std::sync::Arc;

use baton_protocol::Epoch;
use baton_protocol::handoff::role::{self, Asked, Output};
use baton_protocol::handoff::{Proof, Try};

use super::{Body, Broken, Message, Reply, Server, World};
use crate::scope::{ANCHOR, D, S, Scope};

impl World {
    pub(super) fn hear_at_once(&mut self, scope: &Scope, message: Message) {
        if let Some((message, reply)) = self.actor(message.actor).slots[message.member].take() {
            self.hear(scope, message, reply);
        }
    }

    pub(super) fn hear(&mut self, scope: &Scope, message: Message, reply: Reply) {
        let Message { actor, member, attempt, body } = message;
        let input = match (body, reply) {
            (_, Reply::Opened(epoch)) => role::Input::Opened { member, epoch },
            (Body::Seal(..), Reply::Answer(answer)) => {
                role::Input::Answered { member, attempt, ask: Asked::Seal, answer }
            }
            (Body::Ask(ask), Reply::Answer(answer)) => {
                role::Input::Answered { member, attempt, ask, answer }
            }
            (Body::Open(_), Reply::Answer(_)) => return,
        };
        if let role::Input::Answered { answer, .. } = &input {
            let seen = Some((answer.boot_id, answer.record.version));
            self.actor(actor).seen[member] = seen;
        }
        self.tell(scope, actor, input);
    }

    /// A backend hears something and does what its role says.
    pub(super) fn tell(&mut self, scope: &Scope, at: usize, input: role::Input) {
        let anchor = self.servers[ANCHOR].record.clone();
        let side = self.actors[at].side;
        let input = scope.hear(side, &anchor, input);
        let mut outputs = self.actor(at).role.step(input.clone());
        scope.say(side, &input, &self.actors[at].role, &mut outputs);
        for output in outputs {
            match output {
                Output::Ask { member, attempt, ask } => {
                    let vm = &self.vms[side];
                    let body = match ask {
                        Asked::Seal => Body::Seal(vm.issued[member], vm.acked[member] + 1),
                        ask => Body::Ask(ask),
                    };
                    self.net.insert(Message { actor: at, member, attempt, body });
                }
                Output::Open { member, attempt, proof } => {
                    let body = Body::Open(proof);
                    self.net.insert(Message { actor: at, member, attempt, body });
                }
                Output::Go { member, epoch, open } => self.go(at, member, epoch, open),
                Output::Hold { .. } | Output::Park(_) => {}
            }
        }
    }

    pub(super) fn go(
        &mut self,
        at: usize,
        member: usize,
        epoch: Epoch,
        open: Option<(Try, Proof)>,
    ) {
        let side = self.actors[at].side;
        self.actor(at).opens[member] = open;
        if side == D {
            let undone = |(server, issued): (&Arc<Server>, &u8)| server.cell < *issued;
            let source = &self.vms[S];
            let taken = source.at_stop.as_ref().unwrap_or(&source.issued);
            if self.servers.iter().zip(taken).any(undone) {
                self.broken = Some(Broken::Undone);
            }
        }
        let vm = &self.vms[side];
        let value = vm.issued[member];
        let waits = self
            .requests
            .iter()
            .any(|r| (r.member, r.actor, r.value, r.epoch) == (member, at, value, epoch));
        if value > vm.acked[member] && !waits {
            self.send(at, member, value, epoch, open);
        }
    }
}
