//! The journal's store in etcd, for the coordinator that leads.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::EtcdError;
use super::chain::{Chain, Keys, Lead, Verdict, parsed};
use super::client::Client;
use super::txn::Kv;
use crate::coordinator::journal::{Change, Event, Found, JournalError, Store};

/// Between two tries of a write that was not answered.
const PAUSE: Duration = Duration::from_millis(50);
/// For whoever asked to hear that its write is in doubt, before the process ends.
const FAREWELL: Duration = Duration::from_millis(300);

/// See the module.
#[derive(Debug)]
pub struct EtcdStore {
    client: Arc<Client>,
    keys: Keys,
    /// `None` once a write may or may not be there: nothing is written behind it.
    chain: Mutex<Option<Chain>>,
    /// For a write to be answered.
    patience: Duration,
    /// A write of this term was refused, or is in doubt.
    lost: watch::Sender<bool>,
    /// How many of these one commit takes is asked without waiting.
    fitting: std::sync::Mutex<Chain>,
}

impl EtcdStore {
    /// Reads all of the journal, which nobody writes any more but whoever has this
    /// lead.
    ///
    /// # Errors
    /// etcd, or a value that is not ours.
    pub async fn open(
        client: Arc<Client>,
        keys: Keys,
        lead: Lead,
        patience: Duration,
        lost: watch::Sender<bool>,
    ) -> Result<(Self, Found), EtcdError> {
        let tail_key = keys.tail();
        let tail = client.range(&tail_key, &format!("{tail_key}\0"), 1).await?;
        let chain = Chain::behind(keys.clone(), lead, tail.first())?;
        let rows = values(&client.all(&keys.all("handoffs")).await?)?;
        let mut vms = HashMap::new();
        for kv in client.all(&keys.all("vms")).await? {
            let name = kv.key[keys.all("vms").len()..].to_owned();
            vms.insert(name, parsed(&kv)?);
        }
        let found = Found { term: lead.term, rows, vms, seq: chain.seq() };
        let fitting = std::sync::Mutex::new(chain.clone());
        Ok((Self { client, keys, chain: Mutex::new(Some(chain)), patience, lost, fitting }, found))
    }

    fn refused(&self) -> EtcdError {
        self.lost.send_replace(true);
        EtcdError::Deposed
    }
}

#[async_trait]
impl Store for EtcdStore {
    fn batch(&self, changes: &[&Change]) -> usize {
        self.fitting.lock().unwrap_or_else(PoisonError::into_inner).fitting(changes)
    }

    async fn commit(&self, changes: &[&Change]) -> Result<u64, JournalError> {
        let mut place = self.chain.lock().await;
        let Some(chain) = &mut *place else { return Err(self.refused().into()) };
        let (tail, txn) = chain.next(changes)?;
        let begun = Instant::now();
        // A try that was not answered may be done, now or later.
        let mut doubt = false;
        let what = loop {
            let answer = self.client.txn(&txn).await;
            match answer.and_then(|answer| chain.judge(&tail, &answer)) {
                Ok(Verdict::Done(revision)) => {
                    let seq = tail.seq;
                    chain.advance(tail, revision);
                    *self.fitting.lock().unwrap_or_else(PoisonError::into_inner) = chain.clone();
                    return Ok(seq);
                }
                Ok(Verdict::Deposed) => {
                    *place = None;
                    return Err(self.refused().into());
                }
                Err(EtcdError::Unreachable { what, .. }) if begun.elapsed() > self.patience => {
                    break what;
                }
                Err(EtcdError::Unreachable { .. }) => {
                    doubt = true;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) if doubt => break error.to_string(),
                Err(error) => return Err(error.into()),
            }
        };
        // What comes behind it could be overtaken by it.
        *place = None;
        let lost = self.lost.clone();
        tokio::spawn(async move {
            tokio::time::sleep(FAREWELL).await;
            lost.send_replace(true);
        });
        Err(EtcdError::Unknown { what }.into())
    }

    async fn events_after(
        &self,
        cursor: u64,
        limit: usize,
    ) -> Result<(Vec<Event>, u64), JournalError> {
        let (all, before) = (self.keys.event(0), self.keys.event(u64::MAX));
        let oldest = match self.client.range(&all, &before, 1).await?.first() {
            Some(kv) => parsed::<Event>(kv)?.seq,
            None => 1,
        };
        let mut events: Vec<Event> = Vec::new();
        let mut from = self.keys.event(cursor.saturating_add(1));
        while events.len() < limit {
            let page = self.client.range(&from, &before, (limit - events.len()).min(1000)).await?;
            let Some(last) = page.last() else { break };
            from = format!("{}\0", last.key);
            events.extend(values::<Event>(&page)?);
        }
        Ok((events, oldest))
    }
}

fn values<T: DeserializeOwned>(kvs: &[Kv]) -> Result<Vec<T>, EtcdError> {
    kvs.iter().map(parsed).collect()
}
