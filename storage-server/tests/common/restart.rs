//! A server in its own process that is killed and comes again on the same data.

use std::process::{Command, ExitStatus};

use baton_protocol::AccessMode;
use tempfile::TempDir;

use super::handoff::{Backend, Member, S, SOURCE};
use super::{Client, Daemon, daemon_command, greeting};

pub struct Mortal {
    pub dir: TempDir,
    daemon: Option<Daemon>,
}

impl Mortal {
    pub fn start() -> Self {
        Self::with(|_| ())
    }

    /// The first incarnation is changed; the ones after it are not.
    pub fn with(change: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut command = daemon_command(dir.path());
        change(&mut command);
        Self { daemon: Some(Daemon::from(command)), dir }
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("running")
    }

    /// Waits until it has ended by itself.
    pub fn died(&mut self) -> ExitStatus {
        self.daemon.as_mut().expect("running").wait()
    }

    pub fn create(&self, name: &str) -> Member {
        Member::create(self.daemon().data, self.daemon().admin, name)
    }

    /// Kill -9; the same data is served again, elsewhere.
    pub fn kill(&mut self, members: &mut [&mut Member]) {
        self.kill_and(members, |_| ());
    }

    /// [`Mortal::kill`], with something done to the data in between.
    pub fn kill_and(&mut self, members: &mut [&mut Member], then: impl FnOnce(&TempDir)) {
        self.daemon.take().expect("running").kill();
        then(&self.dir);
        let daemon = Daemon::start(self.dir.path());
        for member in members {
            (member.data, member.admin) = (daemon.data, daemon.admin);
        }
        self.daemon = Some(daemon);
    }
}

impl Member {
    /// The control connection of a session that was granted `epoch` once.
    pub fn rejoin(&self, owner: &str, session: u64, epoch: u64) -> Client {
        self.control(owner, session, AccessMode::Owner, epoch)
    }

    /// The source, which was at `epoch` and had used `seq` on its queue, all answered.
    pub fn source_again(&self, epoch: u64, seq: u64) -> Backend {
        let control = self.rejoin(SOURCE, S, epoch);
        let mut hello = greeting(&self.name, SOURCE, S);
        (hello.epoch, hello.resume_from) = (epoch, seq + 1);
        let queue = Client::greet(self.data, &hello).expect("welcomed").0;
        Backend { control, queue }
    }
}
