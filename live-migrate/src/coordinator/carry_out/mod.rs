//! Carries out one action of a row: calls servers and agents until it is done,
//! and reports what it learns. It may be aborted at any await: everything it
//! does may be done again.

mod hosts;
mod storage;

use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::keeper::Reports;
use super::plan::{Action, Input, Member, Row, Trouble};

/// Between two tries, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

pub(super) async fn carry_out(core: Arc<Core>, row: Arc<Row>, action: Action, reports: Reports) {
    let work = Work { core, row, reports };
    match action {
        Action::Arm(place) => work.arm(place).await,
        Action::Watch(place) => work.watch(place).await,
        Action::Stand => work.stand(true).await,
        Action::Inspect => work.stand(false).await,
        Action::Countdown => {
            tokio::time::sleep(Duration::from_millis(work.row.ready_timeout_ms)).await;
            work.reports.tell(Input::Late).await;
        }
        Action::OrderSeal => work.order(&work.row.from, "seal", Input::SealOrdered).await,
        Action::OrderActivate => work.order(&work.row.to, "activate", Input::ActivateOrdered).await,
        Action::Reclaim => work.reclaim().await,
        Action::Abdicate => work.abdicate().await,
        Action::Prove => work.prove().await,
        Action::Settle(place) => work.settle(place).await,
        Action::EndSource => work.end_source().await,
        Action::Permit => work.tell_winner(&work.row.to, "permit", Input::Permitted).await,
        Action::Keep => work.tell_winner(&work.row.from, "keep", Input::Restored).await,
        Action::Dismiss => work.dismiss().await,
        Action::StopSource => work.stop(&work.row.from).await,
        Action::StopDestination => work.stop(&work.row.to).await,
    }
}

struct Work {
    core: Arc<Core>,
    row: Arc<Row>,
    reports: Reports,
}

/// Grows with every failure; says each new trouble once.
struct Patience {
    pause: Duration,
    told: Option<Trouble>,
}

impl Patience {
    fn new() -> Self {
        Self { pause: PAUSE.0, told: None }
    }

    async fn wait(&mut self, reports: &Reports, trouble: Option<&Trouble>) {
        if let Some(trouble) = trouble.filter(|trouble| self.told.as_ref() != Some(*trouble)) {
            self.told = Some(trouble.clone());
            reports.tell(Input::Hindered(trouble.clone())).await;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE.1);
    }
}

impl Work {
    fn member(&self, place: usize) -> Option<&Member> {
        self.row.members.get(place)
    }
}
