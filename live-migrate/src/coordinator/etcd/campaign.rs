//! Carries out what the [`election`](super::election) says: one request to etcd at
//! a time, and the end of a lease on time whether or not one is under way.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::EtcdError;
use super::chain::{self, Counter, Keys, Lead, Leader};
use super::client::Client;
use super::election::{Do, Input, State, Why};

/// Between two looks at who leads.
const LOOK: Duration = Duration::from_millis(500);
/// Between two tries to take the lead with a lease at hand.
const AGAIN: Duration = Duration::from_millis(200);
/// A year, ms.
const NEVER: u64 = 365 * 24 * 3600 * 1000;
/// For a lease to be given back when the process ends.
const GIVE_BACK: Duration = Duration::from_millis(500);

/// What the others and the API are told.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// By what right it leads, if it does.
    pub lead: Option<Lead>,
    /// Who leads, as far as is known.
    pub leader: Option<Leader>,
    /// Why it cannot know.
    pub trouble: Option<EtcdError>,
    /// Why it is over.
    pub over: Option<Why>,
}

/// How leases are taken.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// For how long.
    pub ttl: Duration,
    /// For tests: its end is not looked at.
    pub ignored: bool,
}

/// One that campaigns.
#[derive(Debug)]
pub struct Campaign {
    client: Arc<Client>,
    keys: Keys,
    who: Leader,
    lease: Lease,
    term_min: u64,
    state: State,
    counter: Counter,
    begun: Instant,
    show: watch::Sender<Standing>,
}

impl Campaign {
    /// Of this process, whose term is at least `term_min`.
    #[must_use]
    pub fn new(
        client: Arc<Client>,
        keys: Keys,
        who: Leader,
        lease: Lease,
        term_min: u64,
    ) -> (Self, watch::Receiver<Standing>) {
        let (show, shown) = watch::channel(Standing::default());
        let campaign = Self {
            client,
            keys,
            who,
            lease,
            term_min,
            state: State::Following,
            counter: Counter::default(),
            begun: Instant::now(),
            show,
        };
        (campaign, shown)
    }

    /// Runs until it is over. `told` says what others have found out.
    pub async fn run(mut self, mut told: mpsc::Receiver<Input>) {
        let (client, keys, who) = (Arc::clone(&self.client), self.keys.clone(), self.who.clone());
        let mut next = vec![Do::Look];
        loop {
            // One request at a time; what ends a lead does not wait for it.
            let mut input = None;
            if let Some(request) = next.first().copied() {
                next.remove(0);
                if !matches!(request, Do::Lead(_) | Do::End(_)) {
                    let over = matches!(self.state, State::Over(_));
                    let asked = ask(
                        (&*client, &keys, &who),
                        (self.lease, self.term_min, self.counter),
                        request,
                        self.begun,
                    );
                    let mut asked = pin!(asked);
                    let until = self.until();
                    tokio::select! {
                        biased;
                        word = told.recv(), if !over => input = Some(word.unwrap_or(Input::Stop)),
                        () = tokio::time::sleep_until(until), if !over => input = Some(Input::Tick),
                        answer = &mut asked => {
                            input = answer.input;
                            self.heard(answer.heard);
                        }
                        () = tokio::time::sleep(GIVE_BACK), if over => {}
                    }
                }
            } else if matches!(self.state, State::Over(_)) {
                return;
            } else {
                let pause = match self.state {
                    State::Following => LOOK.min(self.lease.ttl / 4),
                    State::Campaigning { .. } => AGAIN,
                    State::Leading { .. } | State::Over(_) => self.lease.ttl / 3,
                };
                let at = (Instant::now() + pause).min(self.until());
                input = Some(tokio::select! {
                    word = told.recv() => word.unwrap_or(Input::Stop),
                    () = tokio::time::sleep_until(at) => Input::Tick,
                });
            }
            let Some(input) = input else { continue };
            let (state, todo) = self.state.step(since(self.begun), input);
            self.state = state;
            for one in todo {
                match one {
                    Do::Lead(lead) => self.show.send_modify(|shown| {
                        shown.lead = Some(lead);
                        shown.leader = Some(Leader { term: lead.term, ..self.who.clone() });
                        shown.trouble = None;
                    }),
                    Do::End(why) => self.show.send_modify(|shown| {
                        shown.lead = None;
                        shown.over = Some(why);
                    }),
                    request => next.push(request),
                }
            }
        }
    }

    /// When its lease ends, by this host's clock.
    fn until(&self) -> Instant {
        match self.state {
            State::Leading { until, .. } => self.begun + Duration::from_millis(until),
            _ => Instant::now() + Duration::from_secs(3600),
        }
    }

    fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Nothing => {}
            Heard::Trouble(error) => {
                let new = self.show.borrow().trouble.as_ref() != Some(&error);
                if new {
                    tracing::warn!(%error, "etcd");
                }
                self.show.send_modify(|shown| shown.trouble = Some(error));
            }
            Heard::Leader(leader, counter) => {
                self.counter = counter;
                let (seen, cured) = {
                    let shown = self.show.borrow();
                    (shown.leader.clone(), shown.trouble.is_some())
                };
                if cured {
                    tracing::info!("etcd answers again");
                }
                if seen != leader
                    && let Some(leader) = &leader
                {
                    let Leader { name, api, term, .. } = leader;
                    tracing::info!(name, api, term, "another coordinator leads");
                }
                self.show.send_modify(|shown| {
                    shown.leader = leader;
                    shown.trouble = None;
                });
            }
        }
    }
}

fn since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
}

struct Answer {
    input: Option<Input>,
    heard: Heard,
}

enum Heard {
    Nothing,
    Trouble(EtcdError),
    Leader(Option<Leader>, Counter),
}

impl From<Input> for Answer {
    fn from(input: Input) -> Self {
        Self { input: Some(input), heard: Heard::Nothing }
    }
}

impl From<EtcdError> for Answer {
    fn from(error: EtcdError) -> Self {
        match error {
            EtcdError::LeaseGone => Input::LeaseGone.into(),
            error => Self { input: Some(Input::Failed), heard: Heard::Trouble(error) },
        }
    }
}

/// Carries out one request. A lease lives from when it was asked for, not from
/// when it was granted.
async fn ask(
    (client, keys, who): (&Client, &Keys, &Leader),
    (Lease { ttl, ignored }, term_min, counter): (Lease, u64, Counter),
    request: Do,
    begun: Instant,
) -> Answer {
    let asked_at = since(begun);
    let until = |ttl: Duration| {
        if ignored {
            return NEVER;
        }
        asked_at.saturating_add(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))
    };
    let done: Result<Answer, EtcdError> = async {
        Ok(match request {
            Do::Look => {
                let (found, counter) = chain::looked(&client.txn(&chain::look(keys)).await?)?;
                let input = match &found {
                    None => Input::Vacant,
                    Some((leader, lead)) if leader.instance == who.instance => {
                        Input::LeftBehind { lease: lead.lease }
                    }
                    Some(_) => Input::Led,
                };
                let heard = Heard::Leader(found.map(|(leader, _)| leader), counter);
                Answer { input: Some(input), heard }
            }
            Do::Grant => {
                let (lease, granted) = client.grant(ttl).await?;
                // Never longer than was asked for: the configuration says when we end.
                Input::Granted { lease, until: until(granted.min(ttl)) }.into()
            }
            Do::Campaign { lease } => {
                let txn = chain::campaign(keys, who, lease, counter, term_min);
                match chain::elected(who, lease, &client.txn(&txn).await?)? {
                    Some(lead) => Input::Won(lead).into(),
                    None => Input::Lost.into(),
                }
            }
            Do::KeepAlive { lease } => {
                let left = match client.keep_alive(lease).await {
                    Err(EtcdError::LeaseGone) if ignored => ttl,
                    left => left?,
                };
                Answer {
                    input: Some(Input::Kept { until: until(left.min(ttl)) }),
                    heard: Heard::Nothing,
                }
            }
            Do::Revoke { lease } => {
                client.revoke(lease).await?;
                Answer { input: None, heard: Heard::Nothing }
            }
            Do::Lead(_) | Do::End(_) => Answer { input: None, heard: Heard::Nothing },
        })
    }
    .await;
    done.unwrap_or_else(Answer::from)
}
