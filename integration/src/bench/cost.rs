//! What a request costs the two processes in instructions, system calls and allocations: figures that no noise changes.
//!
//! Both run under callgrind and get the same requests in the same batches every time: so many are shown to the device
//! at once, and the next ones only after all were answered. Callgrind counts by thread; what a batch costs is what the
//! busiest thread of a process did, the one that serves the queue. The rest is house-keeping of its own rhythm.

use super::callgrind::{Callgrind, Counts};
use super::stack::{Kind, PollUs, Stack, StackConfig};
use crate::blk::Request;
use crate::raw_frontend::{Options, RawFrontend};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

const DISK_BYTES: u64 = 64 << 20;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Batches before the measurement: buffers have grown, and every page was touched.
const WARM_UP: u32 = 20;

/// In the order of [`Stack::callgrinds`].
const PROCESSES: [&str; 2] = ["backend", "server"];

/// Requests that differ in what they cost.
#[derive(Clone, Copy, Debug)]
struct Work {
    name: &'static str,
    write: bool,
    bytes: usize,
    /// Requests in a batch.
    depth: usize,
    batches: u32,
    /// A large request comes in parts, and how many there are is a matter of time: only its allocations are held to
    /// something.
    in_parts: bool,
}

const WORKS: [Work; 6] = [
    Work { name: "r4k-d1", write: false, bytes: 4 << 10, depth: 1, batches: 400, in_parts: false },
    Work { name: "w4k-d1", write: true, bytes: 4 << 10, depth: 1, batches: 400, in_parts: false },
    Work { name: "r4k-d32", write: false, bytes: 4 << 10, depth: 32, batches: 40, in_parts: false },
    Work { name: "w4k-d32", write: true, bytes: 4 << 10, depth: 32, batches: 40, in_parts: false },
    Work {
        name: "r128k-d8",
        write: false,
        bytes: 128 << 10,
        depth: 8,
        batches: 40,
        in_parts: true,
    },
    Work { name: "w128k-d8", write: true, bytes: 128 << 10, depth: 8, batches: 40, in_parts: true },
];

/// What one request costs one process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Instructions in user space.
    pub instructions: f64,
    /// System calls.
    pub system_calls: f64,
    /// Calls to malloc and its kin.
    pub allocations: f64,
}

/// By work ("r4k-d32") and process ("backend", "server").
pub type Costs = BTreeMap<String, BTreeMap<String, Cost>>;

/// The costs that a build is held to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// What `rustc --version` said; another compiler makes other instructions.
    pub compiler: String,
    /// What was counted.
    pub costs: Costs,
}

/// What is wrong with `measured`, a sentence each. Getting cheaper than stored is wrong, too: what was won is lost again
/// unseen unless it is stored.
#[must_use]
pub fn complaints(stored: &Stored, measured: &Costs, compiler: &str) -> Vec<String> {
    let mut found = Vec::new();
    let allowed_pct = if stored.compiler == compiler { 5.0 } else { 20.0 };
    for Work { name: work, in_parts, .. } in WORKS {
        for process in PROCESSES {
            let of = |costs: &Costs| costs.get(work)?.get(process).copied();
            let Some(now) = of(measured) else {
                found.push(format!("{work}, {process}: not measured"));
                continue;
            };
            if now.allocations > 0.0 {
                found.push(format!(
                    "{work}, {process}: {} allocations per request; the I/O path makes none",
                    now.allocations
                ));
            }
            if in_parts {
                continue;
            }
            let Some(then) = of(&stored.costs) else {
                found.push(format!("{work}, {process}: nothing stored to compare with"));
                continue;
            };
            let change_pct = (now.instructions / then.instructions - 1.0) * 100.0;
            if change_pct.abs() > allowed_pct {
                let (now, then) = (now.instructions, then.instructions);
                found.push(format!(
                    "{work}, {process}: {now} instructions per request, stored are {then} ({change_pct:+.1} %, allowed {allowed_pct} %)"
                ));
            }
            // A batch that is woken up for twice costs a few; a call for each request costs one.
            if now.system_calls > then.system_calls * 1.1 + 0.1 {
                found.push(format!(
                    "{work}, {process}: {} system calls per request, stored are {}",
                    now.system_calls, then.system_calls
                ));
            }
        }
    }
    found
}

/// The costs, for people.
#[must_use]
pub fn table(costs: &Costs) -> String {
    let mut out = String::from(
        "| work | process | instructions | system calls | allocations |\n|---|---|---|---|---|\n",
    );
    for Work { name: work, .. } in WORKS {
        for process in PROCESSES {
            let Some(cost) = costs.get(work).and_then(|of_work| of_work.get(process)) else {
                continue;
            };
            let Cost { instructions, system_calls, allocations } = cost;
            out.push_str(&format!(
                "| {work} | {process} | {instructions:.0} | {system_calls:.2} | {allocations} |\n"
            ));
        }
    }
    out
}

/// Starts both processes under callgrind and counts.
pub fn measure(mut progress: impl FnMut(&str)) -> Result<Costs> {
    let stack = Stack::start(&StackConfig {
        kind: Kind::Baton,
        queues: 1,
        bytes: DISK_BYTES,
        // Both on one: on two the server may receive the first part of a batch while the backend still sends the rest.
        cpu: Some(0),
        callgrind: true,
        poll: PollUs::default(),
        ceph: None,
    })?;
    let processes: Vec<(&str, Callgrind)> = PROCESSES.into_iter().zip(stack.callgrinds()).collect();
    let options = Options { memory_bytes: 32 << 20, ..Options::default() };
    let mut frontend = RawFrontend::connect(stack.socket(), options)?;
    let queue = frontend.queue(0);
    let mut costs = Costs::new();
    for work in WORKS {
        progress(work.name);
        let data = vec![0x5a; work.bytes];
        let sectors = work.bytes as u64 / 512;
        let batch = |at: u64| -> Vec<Request<'_>> {
            let place = |i: u64| (at * work.depth as u64 + i) * sectors % (DISK_BYTES / 512);
            (0..work.depth as u64)
                .map(|i| match work.write {
                    true => Request::Write { sector: place(i), data: &data },
                    false => Request::Read { sector: place(i), len: work.bytes },
                })
                .collect()
        };
        let mut run = |batches: u32| -> Result<()> {
            for at in 0..batches {
                queue.submit_batch(&batch(u64::from(at)))?;
                queue.kick()?;
                for _ in 0..work.depth {
                    let done = queue.wait_completion(ANSWER_TIMEOUT)?;
                    done.context("the disk does not answer under callgrind")?.ok()?;
                }
                // The device may look at the ring once more before it sleeps; the next batch is to be found by its kick.
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        };
        run(WARM_UP)?;
        for (_, process) in &processes {
            process.take()?;
        }
        run(work.batches)?;
        let requests = f64::from(work.batches) * work.depth as f64;
        let mut of_work = BTreeMap::new();
        for (name, process) in &processes {
            let Counts { instructions, system_calls, allocations } = process.take()?;
            let each = |count: u64| (count as f64 / requests * 1000.0).round() / 1000.0;
            let cost = Cost {
                instructions: each(instructions).round(),
                system_calls: each(system_calls),
                allocations: each(allocations),
            };
            of_work.insert((*name).to_owned(), cost);
        }
        costs.insert(work.name.to_owned(), of_work);
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(change: impl Fn(&str, &str, &mut Cost)) -> Costs {
        let mut costs = Costs::new();
        for work in WORKS {
            for process in PROCESSES {
                let mut cost = Cost { instructions: 1000.0, system_calls: 1.0, allocations: 0.0 };
                change(work.name, process, &mut cost);
                costs.entry(work.name.to_owned()).or_default().insert(process.to_owned(), cost);
            }
        }
        costs
    }

    fn stored() -> Stored {
        Stored { compiler: "one".to_owned(), costs: costs(|_, _, _| ()) }
    }

    #[test]
    fn noise_is_no_complaint() {
        let measured = costs(|_, _, cost| (cost.instructions, cost.system_calls) = (1049.0, 1.15));
        assert_eq!(complaints(&stored(), &measured, "one"), Vec::<String>::new());
    }

    #[test]
    fn each_kind_of_cost_is_guarded() {
        let cases: [fn(&mut Cost); 4] = [
            |cost| cost.instructions = 1051.0,
            |cost| cost.instructions = 949.0,
            |cost| cost.system_calls = 1.25,
            |cost| cost.allocations = 0.001,
        ];
        for change in cases {
            let measured = costs(|work, process, cost| {
                if (work, process) == ("w4k-d32", "server") {
                    change(cost);
                }
            });
            let said = complaints(&stored(), &measured, "one");
            assert!(said.len() == 1 && said[0].starts_with("w4k-d32, server: "), "{said:?}");
        }
    }

    #[test]
    fn what_was_not_measured_or_not_stored_is_said() {
        let (mut stored, mut measured) = (stored(), costs(|_, _, _| ()));
        measured.remove("r4k-d1");
        stored.costs.remove("w4k-d1");
        assert_eq!(complaints(&stored, &measured, "one").len(), 4);
    }

    #[test]
    fn another_compiler_is_given_some_room() {
        let measured = costs(|_, _, cost| cost.instructions = 1100.0);
        assert!(!complaints(&stored(), &measured, "one").is_empty());
        assert!(complaints(&stored(), &measured, "another").is_empty());
    }
}
