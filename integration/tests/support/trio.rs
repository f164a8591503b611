//! Three coordinators on three real members of etcd, around a [`Stage`].
#![allow(dead_code, reason = "not every test needs all of it")]

#[path = "stage.rs"]
pub(crate) mod stage;

use anyhow::{Context, Result, bail};
use baton_integration::etcd::Etcd;
use baton_integration::faults::cluster::{Client, Kept, VM};
use baton_integration::handoff::Fleet;
use baton_integration::proxy::Proxy;
use serde_json::{Value, json};
use stage::Stage;
use std::time::{Duration, Instant};

/// For a step that several processes have to take, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);
pub(crate) const POLL: Duration = Duration::from_millis(20);
/// Of the leader's lease.
pub(crate) const TTL: Duration = Duration::from_secs(3);
pub(crate) const COORDINATORS: usize = 3;

/// A stage with three coordinators, each of which reaches each member of etcd through a proxy of its own.
pub(crate) struct Trio {
    pub(crate) stage: Stage,
    pub(crate) etcd: Etcd,
    pub(crate) proxies: Vec<Vec<Proxy>>,
    pub(crate) coordinators: Vec<Kept>,
    /// Processes that leads no more and ended by themselves.
    pub(crate) deposed: usize,
    /// Who is not started again: its end is what the test looks at, whenever it comes.
    pub(crate) watched: Option<usize>,
}

impl Trio {
    pub(crate) fn start(name: &str, more: &str) -> Self {
        let mut stage = Stage::new(name);
        // The one of one's own.
        stage.world.retire_coordinator().unwrap();
        let etcd = Etcd::start(stage.dir.path(), 3).unwrap();
        let (mut proxies, mut coordinators) = (Vec::new(), Vec::new());
        for n in 0..COORDINATORS {
            let own: Vec<Proxy> =
                etcd.clients().into_iter().map(|client| Proxy::of_bytes(client).unwrap()).collect();
            let endpoints: Vec<String> =
                own.iter().map(|proxy| format!("http://{}", proxy.address())).collect();
            let section =
                format!("endpoints = {endpoints:?}\nlease_ttl_s = {}\n{more}", TTL.as_secs());
            coordinators.push(stage.world.one_of_several(&format!("c{n}"), &section).unwrap());
            proxies.push(own);
        }
        Self { stage, etcd, proxies, coordinators, deposed: 0, watched: None }
    }

    /// Starts again who has died, as a supervisor would.
    pub(crate) fn mend(&mut self) {
        let watched = self.watched;
        for (_, kept) in
            self.coordinators.iter_mut().enumerate().filter(|(n, _)| Some(*n) != watched)
        {
            if !kept.daemon.is_running().unwrap() {
                self.deposed +=
                    usize::from(kept.daemon.log().contains("this one ends, and follows"));
                kept.restart(&Vec::new()).unwrap();
            }
        }
    }

    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        mut ask: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> T {
        let deadline = Instant::now() + SOON;
        loop {
            let answer = ask(self);
            if let Ok(Some(answer)) = answer {
                return answer;
            }
            if Instant::now() > deadline {
                let logs: Vec<String> = self.coordinators.iter().map(|c| c.daemon.log()).collect();
                panic!("in vain: {what}: {:?}\n{}", answer.err(), logs.join("\n----\n"));
            }
            self.mend();
            std::thread::sleep(POLL);
        }
    }

    /// Who leads and its term; `not`, who may still think that it does, is not asked.
    pub(crate) fn leading(&self, not: Option<usize>) -> Result<(usize, u64)> {
        for n in (0..COORDINATORS).filter(|n| Some(*n) != not) {
            if let Ok(answer) = quick(self.coordinators[n].client(), "/v1/leader")
                && answer["role"] == "leader"
            {
                return Ok((n, answer["term"].as_u64().context("a term")?));
            }
        }
        bail!("nobody leads")
    }

    pub(crate) fn leader(&mut self) -> (usize, u64) {
        self.until("somebody leads", |trio| trio.leading(None).map(Some))
    }

    pub(crate) fn leader_but(&mut self, not: usize) -> (usize, u64) {
        self.until("somebody else leads", |trio| trio.leading(Some(not)).map(Some))
    }

    /// Asks whoever leads.
    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        not: Option<usize>,
    ) -> Result<Value> {
        let (n, _) = self.leading(not)?;
        self.coordinators[n].call(method, path, body)
    }

    pub(crate) fn prepare(&mut self, not: Option<usize>) -> String {
        let id = Fleet::attempt().id;
        let (from, to) = (self.stage.at.host(), self.stage.at.other().host());
        let body = json!({"from": from, "to": to});
        self.until("it is ready", |trio| {
            let path = path(&id, "?wait=READY&timeout=1s");
            let row = trio.ask("PUT", &path, Some(&body), not)?;
            Ok((row["state"] == "READY").then_some(()))
        });
        id
    }

    pub(crate) fn row(&self, id: &str, not: Option<usize>) -> Result<Value> {
        self.ask("GET", &path(id, ""), None, not)
    }

    /// Until nothing is left to do.
    pub(crate) fn end(&mut self, id: &str, verb: &str, not: Option<usize>) -> Value {
        self.until(&format!("{verb} is done"), |trio| {
            let row = trio.ask("POST", &path(id, &format!(":{verb}?timeout=500ms")), None, not)?;
            Ok((row["over"] == true).then_some(row))
        })
    }

    /// The guest goes on where it is.
    pub(crate) fn goes_on(&mut self) {
        let at = self.stage.at;
        self.stage.world.vmm(at).unwrap().wait_progress(20, SOON).unwrap();
    }

    pub(crate) fn kill(&mut self, n: usize) {
        self.coordinators[n].daemon.kill().unwrap();
    }

    /// Everything under the prefix but the leader's key, which comes and goes.
    pub(crate) fn journal(&self) -> Vec<(String, String)> {
        let all = self.etcd.values("/baton/").unwrap();
        all.into_iter().filter(|(key, _)| key != "/baton/leader").collect()
    }
}

pub(crate) fn path(id: &str, more: &str) -> String {
    format!("/v1/vms/{VM}/handoffs/{id}{more}")
}

/// An answer at once, or none: a frozen process takes connections and says nothing.
pub(crate) fn quick(client: Client, path: &str) -> Result<Value> {
    client.within(Duration::from_millis(700)).call("GET", path, None)
}

impl Trio {
    /// The guest, which has been moved, goes on.
    pub(crate) fn goes_on_there(&mut self) {
        let at = self.stage.at.other();
        self.stage.world.vmm(at).unwrap().wait_progress(20, SOON).unwrap();
    }
}
