//! What busy polling brings, and what it takes.
//!
//! One read of 4 KiB at a time, the front-end asleep on its call events. A backend on a volume that does nothing has a
//! core for itself, and so a floor: a thread that does nothing but look. With a server there are three parties for two
//! CPUs here.
//!
//! Who answers at once may call the front-end just while it falls asleep. The kernel then has an interrupt sent to its
//! CPU, which takes 10 us on a virtual machine and depends on how far apart the two CPUs are at the moment; so these
//! are counted.

use crate::bench::compare::quiet;
use crate::bench::cpu::{
    bind_process, cpu_time_of, hold_cpus_awake, on_own_thread, pin_this_thread,
};
use crate::bench::floor;
use crate::bench::load::{Job, Pattern};
use crate::bench::outcome::Outcome;
use crate::bench::stack::{Kind, PollUs, Stack, StackConfig};
use crate::bench::stats::Spread;
use crate::bench::targets::Target;
use crate::blk::Request;
use crate::raw_frontend::{Options, RawFrontend};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fmt::Write as _;
use std::time::Duration;

/// Of a backend that polls and has a core, against a thread that does nothing but look.
pub const TO_FLOOR: Target = Target::AtMost(1.3);
/// How much longer a backend that polls keeps its core for a request behind which no other comes, in us.
pub const KEEPS_US: Target = Target::AtMost(100.0);

/// With more interrupts per request than these a run shows what interrupts cost.
const INTERRUPTS_MAX: f64 = 0.1;

/// The longest that can be asked for, in us.
const LIMIT_US: u64 = 100;
const DISK_BYTES: u64 = 64 << 20;
/// Requests that come one by one, with a pause after each in which a core is given back, or not.
const LONE_REQUESTS: u32 = 200;
const PAUSE: Duration = Duration::from_millis(2);
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Who is where, and who of them looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// What serves the disk.
    kind: Kind,
    /// Where the server is, in a pinned run; the backend is on CPU 1.
    server_cpu: usize,
    poll: PollUs,
}

const fn case(kind: Kind, server_cpu: usize, backend_us: u64, server_us: u64) -> Case {
    Case { kind, server_cpu, poll: PollUs { backend: backend_us, server: server_us } }
}

/// The first of each kind and place is the one without polling.
const CASES: [Case; 10] = [
    case(Kind::BatonNull, 1, 0, 0),
    case(Kind::BatonNull, 1, LIMIT_US, 0),
    case(Kind::Baton, 1, 0, 0),
    case(Kind::Baton, 1, LIMIT_US, LIMIT_US),
    case(Kind::Baton, 1, LIMIT_US, 0),
    case(Kind::Baton, 1, 0, LIMIT_US),
    case(Kind::Baton, 0, 0, 0),
    case(Kind::Baton, 0, LIMIT_US, LIMIT_US),
    case(Kind::Baton, 0, LIMIT_US, 0),
    case(Kind::Baton, 0, 0, LIMIT_US),
];

/// What one case showed.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// Which.
    pub case: Case,
    /// Each round's run.
    pub outcomes: Vec<Outcome>,
    /// Interrupts to the front-end's CPU that had to wake it, per request, each round's.
    pub interrupts: Vec<f64>,
    /// CPU time of the backend for each of some requests with pauses between them, in us, each round's; only without a
    /// server.
    pub lone_us: Vec<f64>,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Polling {
    /// Whether idle CPUs were kept awake.
    pub awake: bool,
    /// Median of each round, of a call by a thread that looks, in us.
    pub floor_us: Vec<f64>,
    /// By case.
    pub measured: Vec<Measured>,
}

/// Starts each case anew in each round, in changing order.
pub fn measure(rounds: u32, time: Duration, progress: impl FnMut(&str) + Send) -> Result<Polling> {
    on_own_thread(|| measure_here(rounds, time, progress))
}

fn measure_here(rounds: u32, time: Duration, mut progress: impl FnMut(&str)) -> Result<Polling> {
    if rounds == 0 {
        bail!("nothing to measure: --rounds must be at least 1");
    }
    if std::thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
        bail!("polling needs two CPUs, or who looks keeps the others from working");
    }
    let awake = hold_cpus_awake();
    pin_this_thread(0)?;
    let measured =
        |case| Measured { case, outcomes: Vec::new(), interrupts: Vec::new(), lone_us: Vec::new() };
    let mut all = CASES.map(measured);
    let mut floor_us = Vec::new();
    for round in 0..rounds {
        progress(&format!("round {} of {rounds}", round + 1));
        floor_us.push(floor::look(time).context("the floor of polling")?);
        for at in 0..all.len() {
            let at = if round % 2 == 0 { at } else { all.len() - 1 - at };
            one(&mut all[at], time, round)?;
        }
    }
    Ok(Polling { awake: awake.is_some(), floor_us, measured: all.into() })
}

fn one(measured: &mut Measured, time: Duration, round: u32) -> Result<()> {
    let Case { kind, server_cpu, poll } = measured.case;
    let (bytes, cpu) = (DISK_BYTES, Some(1));
    let config = StackConfig { kind, queues: 1, bytes, cpu, callgrind: false, poll, ceph: None };
    let stack = Stack::start(&config)?;
    let pids = stack.pids();
    match pids.get(1) {
        Some(&server) => bind_process(server, server_cpu)?,
        None => measured.lone_us.push(lone_requests(&stack)?),
    }
    let before = call_interrupts(0)?;
    let single = Job::single(stack.socket(), pids, Pattern::RandRead, time);
    let outcome = quiet(&Job { seed: u64::from(round) + 1, ..single })?;
    // Of all tries and of warming up, too: what matters is whether there are any to speak of.
    #[allow(clippy::cast_precision_loss, reason = "counts of a short measurement")]
    measured.interrupts.push((call_interrupts(0)? - before) as f64 / outcome.ios as f64);
    measured.outcomes.push(outcome);
    Ok(())
}

/// Function call interrupts that a CPU has had; 0 where the kernel does not say.
fn call_interrupts(cpu: usize) -> Result<u64> {
    let all = std::fs::read_to_string("/proc/interrupts").context("cannot count interrupts")?;
    Ok(interrupts_of(&all, "CAL:", cpu).unwrap_or(0))
}

fn interrupts_of(all: &str, kind: &str, cpu: usize) -> Option<u64> {
    let line = all.lines().find_map(|line| line.trim_start().strip_prefix(kind))?;
    line.split_whitespace().nth(cpu)?.parse().ok()
}

fn lone_requests(stack: &Stack) -> Result<f64> {
    let backend = *stack.pids().first().context("no backend")?;
    let mut frontend = RawFrontend::connect(stack.socket(), Options::default())?;
    let queue = frontend.queue(0);
    let before = cpu_time_of(backend)?;
    for _ in 0..LONE_REQUESTS {
        queue.submit(&Request::Read { sector: 0, len: 4096 })?;
        queue.kick()?;
        queue.wait_completion(REPLY_LIMIT)?.context("no answer")?.ok()?;
        std::thread::sleep(PAUSE);
    }
    let took = cpu_time_of(backend)?.saturating_sub(before);
    Ok(1e6 * took.as_secs_f64() / f64::from(LONE_REQUESTS))
}

fn spread(figures: impl Iterator<Item = f64>) -> Spread {
    Spread::of(&(0..).zip(figures).collect::<Vec<_>>())
}

fn place(case: Case) -> &'static str {
    match (case.kind, case.server_cpu) {
        (Kind::BatonNull, _) => "backend on CPU 1, a volume that does nothing",
        (_, 1) => "backend and server on CPU 1",
        _ => "backend on CPU 1, server on CPU 0 with the front-end",
    }
}

fn who(poll: PollUs) -> &'static str {
    match (poll.backend > 0, poll.server > 0) {
        (false, false) => "nobody",
        (true, false) => "backend",
        (false, true) => "server",
        (true, true) => "both",
    }
}

/// For people, and for docs/performance.md.
#[must_use]
pub fn table(polling: &Polling) -> String {
    let Polling { floor_us, measured, .. } = polling;
    let mut text = format!(
        "One random read of 4 KiB at a time, the front-end asleep on CPU 0, 64 MiB in memory; `--poll-us {LIMIT_US}` of those who look, {} rounds. Median [lowest and highest round].\n\n\
         | where | who looks | p50, us | p99, us | p99.9, us | IOPS, of nobody's | CPU per request, us | interrupts to wake the front-end, per request |\n\
         |---|---|---|---|---|---|---|---|\n",
        floor_us.len(),
    );
    let mut nobody: &[Outcome] = &[];
    for Measured { case, outcomes, interrupts, .. } in measured {
        if case.poll == PollUs::default() {
            nobody = outcomes;
        }
        let of = |figure: &dyn Fn(&Outcome) -> f64, digits| {
            spread(outcomes.iter().map(figure)).text(digits)
        };
        let ratio = spread(outcomes.iter().zip(nobody).map(|(o, off)| o.iops / off.iops));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            place(*case),
            who(case.poll),
            of(&|o| o.p50_us, 1),
            of(&|o| o.p99_us, 0),
            of(&|o| o.p999_us, 0),
            ratio.text(2),
            of(&Outcome::cpu_us_per_io_of_all, 1),
            spread(interrupts.iter().copied()).text(2),
        );
    }
    text.push_str(&verdicts(polling));
    text
}

/// The backend that has a core, with and without polling.
fn verdicts(Polling { floor_us, measured, .. }: &Polling) -> String {
    let alone = |looks: bool| {
        measured
            .iter()
            .find(|m| m.case.kind == Kind::BatonNull && (m.case.poll.backend > 0) == looks)
    };
    let (Some(off), Some(on)) = (alone(false), alone(true)) else { return String::new() };
    let rounds = on.outcomes.iter().zip(floor_us).zip(&on.interrupts);
    let undisturbed: Vec<f64> = rounds
        .filter(|&(_, &interrupts)| interrupts <= INTERRUPTS_MAX)
        .map(|((outcome, floor), _)| outcome.p50_us / floor)
        .collect();
    let count = undisturbed.len();
    let multiple = spread(undisturbed.into_iter());
    let keeps = spread(on.lone_us.iter().zip(&off.lone_us).map(|(on, off)| on - off));
    format!(
        "\n| a backend with a core for itself | |\n|---|---|\n\
         | a thread on CPU 1 that only looks, and calls the front-end asleep on CPU 0, p50 | {} us |\n\
         | p50 of the backend that looks, as a multiple, in the rounds with at most {INTERRUPTS_MAX} interrupts per request ({count} of {}) | {} |\n\
         | how much longer it keeps its core for each of {LONE_REQUESTS} requests that come {} ms apart, us | {} |\n",
        spread(floor_us.iter().copied()).text(2),
        floor_us.len(),
        TO_FLOOR.text(multiple),
        PAUSE.as_millis(),
        KEEPS_US.text(keeps),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cpu::Usage;

    #[test]
    fn what_looks_is_set_against_nobody_in_the_same_place_and_round() {
        let usage = Usage { processes_s: vec![3e-6], ..Usage::default() };
        let measured = |case: Case, figures: [f64; 2]| Measured {
            case,
            outcomes: figures
                .map(|f| Outcome {
                    iops: f,
                    p50_us: 10.0 / f,
                    ios: 1,
                    usage: usage.clone(),
                    ..Outcome::default()
                })
                .into(),
            interrupts: vec![0.0, 0.5],
            lone_us: figures.map(|f| 10.0 * f).into(),
        };
        let figures = [[1.0, 2.0], [2.0, 5.0], [1.0, 1.0], [3.0, 3.0]];
        let polling = Polling {
            awake: true,
            floor_us: vec![4.0, 1.0],
            measured: CASES.into_iter().zip(figures).map(|(c, f)| measured(c, f)).collect(),
        };
        let text = table(&polling);
        for part in [
            "| backend on CPU 1, a volume that does nothing | nobody | 7.5 [5.0 10.0] | 0 [0 0] | 0 [0 0] | 1.00 [1.00 1.00] |",
            "| backend on CPU 1, a volume that does nothing | backend | 3.5 [2.0 5.0] | 0 [0 0] | 0 [0 0] | 2.25 [2.00 2.50] |",
            "| backend and server on CPU 1 | both | 3.3 [3.3 3.3] | 0 [0 0] | 0 [0 0] | 3.00 [3.00 3.00] | 3.0 [3.0 3.0] | 0.25 [0.00 0.50] |",
            // 5 of 4 us; the 2 of 1 had interrupts.
            "(1 of 2) | 1.25 (at most 1.3): met |",
            "200 requests that come 2 ms apart, us | 20.00 (at most 100): met |",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn interrupts_are_those_of_one_cpu() {
        let all = "            CPU0       CPU1\n  8:  1  2  IO-APIC\n CAL:  345  67   Function call interrupts\n";
        assert_eq!(interrupts_of(all, "CAL:", 1), Some(67));
        assert_eq!(interrupts_of(all, "CAL:", 2), None);
        assert_eq!(interrupts_of(all, "RES:", 0), None);
    }

    #[test]
    fn each_place_begins_with_nobody() {
        for places in CASES.chunk_by(|a, b| place(*a) == place(*b)) {
            assert_eq!(who(places[0].poll), "nobody", "{places:?}");
        }
    }
}
