//! A running `baton-vmm-stub`, as an orchestrator sees it.

use super::history::{self, Event};
use crate::baton::wait_until;
use crate::daemon::Daemon;
use crate::handoff::ask;
use crate::workspace::program;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// For an order that blocks while a back-end does: longer than any freeze of a case's sample.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the history of the process with this number is.
#[must_use]
pub fn history_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("vmm-{number}.history"))
}

/// The process. Killed when dropped.
#[derive(Debug)]
pub struct Stub {
    /// Its process.
    pub daemon: Daemon,
    control: PathBuf,
    history: PathBuf,
}

impl Stub {
    /// Starts one on the sockets of a back-end, with its rings stopped. Returns without waiting until it has connected.
    pub fn start(dir: &Path, number: u64, sockets: &[PathBuf]) -> Result<Self> {
        let name = format!("vmm-{number}");
        let control = dir.join(format!("{name}.control"));
        let history = history_path(dir, number);
        let mut command = Command::new(program("baton-vmm-stub")?);
        command.args(["--number", &number.to_string()]);
        command.arg("--control").arg(&control).arg("--history").arg(&history);
        command.arg("--memory").arg(dir.join(format!("{name}.memory"))).args(sockets);
        let daemon = Daemon::start_command(dir, &name, command)?;
        Ok(Self { daemon, control, history })
    }

    /// Waits until it has connected and takes orders.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.daemon.wait_socket(&self.control, START_TIMEOUT)
    }

    /// Gives an order and waits for its status.
    pub fn order(&self, order: &str) -> Result<Value> {
        ask(&self.control, &json!({ "cmd": order }), ORDER_TIMEOUT)
    }

    /// Saves the stopped guest to a directory.
    pub fn save(&self, dir: &Path) -> Result<Value> {
        ask(&self.control, &json!({ "cmd": "save", "dir": dir }), ORDER_TIMEOUT)
    }

    /// Takes the place of a guest saved to a directory.
    pub fn load(&self, dir: &Path) -> Result<Value> {
        ask(&self.control, &json!({ "cmd": "load", "dir": dir }), ORDER_TIMEOUT)
    }

    /// Answers its guest has seen, for each disk.
    pub fn answered(&self) -> Result<Vec<u64>> {
        let status = self.order("status")?;
        let answered = status["answered"].as_array().context("a status counts answers")?;
        Ok(answered.iter().map(|n| n.as_u64().unwrap_or(0)).collect())
    }

    /// Waits until the guest has seen so many more answers on each disk.
    pub fn wait_progress(&self, more: u64, timeout: Duration) -> Result<()> {
        let from = self.answered()?;
        wait_until("the guest goes on", timeout, || {
            let now = self.answered().unwrap_or_default();
            now.len() == from.len() && now.iter().zip(&from).all(|(now, from)| *now >= from + more)
        })
        .with_context(|| format!("from {from:?}: {:?}", self.order("status")))
    }

    /// Looks at every block once, with nothing else going on.
    pub fn sweep(&self, timeout: Duration) -> Result<()> {
        self.order("sweep")?;
        self.order("run")?;
        wait_until("every block is read", timeout, || {
            self.order("status").is_ok_and(|status| {
                let left = status["sweep_left"].as_array();
                left.is_some_and(|left| left.iter().all(|n| *n == 0))
            })
        })
    }

    /// What its guest has done so far.
    pub fn history(&self) -> Result<Vec<Event>> {
        history::read(&self.history)
    }
}
