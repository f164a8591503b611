//! What a queue's thread looks for before it sleeps, where polling is switched on.
//!
//! Answers of the storage and requests of the guest come at paces of their own: a
//! guest that pauses for a millisecond between two requests must not end the looking
//! for answers that take 15 us. So there is a window for each.

use std::time::Instant;

use baton_protocol::BusyPoll;

pub(super) struct Polling {
    clock: Box<dyn Fn() -> Instant + Send>,
    /// While requests are in flight.
    answers: BusyPoll,
    /// While none is.
    requests: BusyPoll,
    /// Which of the two it was at the last look.
    for_answers: bool,
}

impl Polling {
    /// `None` when it is off.
    pub(super) fn new(poll_us: u64, clock: impl Fn() -> Instant + Send + 'static) -> Option<Self> {
        let window = BusyPoll::new(poll_us)?;
        let (answers, requests) = (window.clone(), window);
        Some(Self { clock: Box::new(clock), answers, requests, for_answers: false })
    }

    pub(super) fn now(&self) -> Instant {
        (self.clock)()
    }

    /// There was work, found at `now` by a look or a wake-up.
    pub(super) fn found(&mut self, now: Instant) {
        self.window().found(now);
    }

    /// All of it is done. True: look once more; false: sleep.
    pub(super) fn look_again(&mut self, in_flight: usize) -> bool {
        let now = self.now();
        self.for_answers = in_flight > 0;
        self.window().look_again(now)
    }

    fn window(&mut self) -> &mut BusyPoll {
        if self.for_answers { &mut self.answers } else { &mut self.requests }
    }
}
