//! What a comparison writes into docs/performance.md.

use crate::bench::compare::{CompareConfig, Report, RowResult, ratio};
use crate::bench::cpu::Usage;
use crate::bench::floor::{Floors, multiples, spread};
use crate::bench::outcome::Outcome;
use crate::bench::stack::Kind;
use crate::bench::stats::{Spread, median};
use crate::bench::targets::{D1_TO_FLOOR, D32_CPU_US, Target, of_row};
use std::fmt::Write as _;

/// The section's name for a comparison.
#[must_use]
pub fn name(config: &CompareConfig) -> String {
    if config.dirty_log {
        return "bench-dirty-log".to_owned();
    }
    format!("bench-{}-{}", config.a, config.b)
}

/// The section: each report's ratios, and the first's against their targets.
#[must_use]
pub fn section(facts: &str, reports: &[Report]) -> String {
    let Some(first) = reports.first() else { return String::new() };
    let CompareConfig { rounds, duration, bytes, .. } = &first.config;
    let [a, b] = first.config.names();
    let mut text = format!(
        "{facts}. A: {a}, B: {b}; {rounds} rounds of 2 pairs of {:.1} s on {} MiB in memory.\n",
        duration.as_secs_f64(),
        bytes >> 20,
    );
    for report in reports {
        text.push_str(&ratios(report));
    }
    text.push_str(&verdicts(first));
    text.push_str(&distance(first));
    text
}

fn ratios(report: &Report) -> String {
    let mut text = format!(
        "\n{}, A/B, median of all pairs [lowest and highest median of a round]:\n\n\
         | row | IOPS (more is better) | p50 (less) | p99 (less) | CPU per I/O, backend and server (less) | backend | server | noisy pairs |\n\
         |---|---|---|---|---|---|---|---|\n",
        if report.pinned { "Front-end on CPU 0, stacks on CPU 1" } else { "Nobody bound to a CPU" },
    );
    for RowResult { row, pairs } in &report.rows {
        let cell = |figure: &dyn Fn(&Outcome) -> f64| ratio(pairs, figure).text(2);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} of {} |",
            row.name,
            cell(&|o| o.iops),
            cell(&|o| o.p50_us),
            cell(&|o| o.p99_us),
            cell(&Outcome::cpu_us_per_io_of_all),
            cell(&|o| o.cpu_us_per_io(0)),
            cell(&|o| o.cpu_us_per_io(1)),
            pairs.iter().filter(|p| p.noisy).count(),
            pairs.len()
        );
    }
    if report.rows.iter().any(|r| r.pairs.iter().any(|p| p.noisy)) {
        let _ = writeln!(
            text,
            "\nNoisy: others or the hypervisor took more than {} % of the CPUs in every try; these pairs are in the medians.",
            Usage::NOISE_MAX_PCT
        );
    }
    text
}

/// Each row that has targets, against them. Empty where none has.
#[must_use]
pub fn verdicts(report: &Report) -> String {
    let mut lines = String::new();
    for RowResult { row, pairs } in &report.rows {
        let targets = of_row(&report.config, row.name);
        let cell = |target: Option<Target>, figure: &dyn Fn(&Outcome) -> f64| {
            target.map_or(String::new(), |target| target.text(ratio(pairs, figure)))
        };
        let cells = [
            cell(targets.iops, &|o| o.iops),
            cell(targets.cpu, &Outcome::cpu_us_per_io_of_all),
            cell(targets.backend, &|o| o.cpu_us_per_io(0)),
            cell(targets.p99, &|o| o.p99_us),
        ];
        if cells.iter().any(|cell| !cell.is_empty()) {
            let _ = writeln!(lines, "| {} | {} |", row.name, cells.join(" | "));
        }
    }
    if lines.is_empty() {
        return lines;
    }
    format!(
        "\nAgainst the targets{}:\n\n| row | IOPS | CPU per I/O, backend and server | backend | p99 |\n|---|---|---|---|---|\n{lines}",
        if report.pinned { "" } else { ", which are for processes bound to CPUs" }
    )
}

/// The floors, and how far A is above them. Only for Baton over TCP: what is under others is something else.
#[must_use]
pub fn distance(report: &Report) -> String {
    let floors = &report.floors;
    let a = report.config.a;
    if a != Kind::Baton || report.config.dirty_log {
        return String::new();
    }
    let mut text = format!(
        "\nDistance of {a} to the floor, which was measured in each round of the same run; median [lowest and highest round]:\n\n\
         | what | read | write |\n|---|---|---|\n\
         | eventfd round trip{} | {} us | |\n\
         | TCP round trip, 4 KiB one way and 32 bytes the other{} | {} us | {} us |\n\
         | CPU of both ends of a batched TCP pair, 32 under way, per message | {} us | {} us |\n",
        if report.pinned { ", CPU 0 and 1" } else { "" },
        spread(floors, |f| f.eventfd_us).text(2),
        if report.pinned { ", both ends on CPU 1" } else { "" },
        spread(floors, |f| f.tcp_read_us).text(2),
        spread(floors, |f| f.tcp_write_us).text(2),
        spread(floors, |f| f.batched_read_us).text(2),
        spread(floors, |f| f.batched_write_us).text(2),
    );
    let pairs = |name: &str| {
        report.rows.iter().find(|r| r.row.name == name).map_or(&[][..], |r| r.pairs.as_slice())
    };
    let of_a = |name: &str, figure: &dyn Fn(&Outcome) -> f64| -> Vec<(u32, f64)> {
        pairs(name).iter().map(|pair| (pair.round, figure(&pair.a))).collect()
    };
    let depth_1 = |name: &str, is_read: bool| {
        let p50 = of_a(name, &|o| o.p50_us);
        let multiple = multiples(floors, &p50, is_read);
        (median(p50.iter().map(|p| p.1)), D1_TO_FLOOR.text(multiple))
    };
    let depth_32 = |name: &str| {
        let cpu = of_a(name, &Outcome::cpu_us_per_io_of_all);
        D32_CPU_US.text(Spread::of(&cpu))
    };
    let ((read, read_multiple), (write, write_multiple)) =
        (depth_1("r4k-d1-q1", true), depth_1("w4k-d1-q1", false));
    let us = |p50: f64| if p50.is_finite() { format!("{p50:.2} us") } else { "-".to_owned() };
    let _ = writeln!(text, "| p50 of 4 KiB at depth 1 | {} | {} |", us(read), us(write));
    let _ = writeln!(
        text,
        "| - as a multiple of eventfd and TCP round trip together | {read_multiple} | {write_multiple} |"
    );
    let _ = writeln!(
        text,
        "| CPU of backend and server per 4 KiB request at depth 32, us | {} | {} |",
        depth_32("r4k-d32-q1"),
        depth_32("w4k-d32-q1")
    );
    let chain = |name: &str, of: &dyn Fn(&Floors) -> f64| {
        let ratios = pairs(name).iter().filter_map(|pair| {
            let floor = floors.get(usize::try_from(pair.round).ok()?)?;
            Some((pair.round, of(floor) / pair.b.iops))
        });
        Spread::of(&ratios.collect::<Vec<_>>()).text(2)
    };
    let b = report.config.b;
    let _ = writeln!(
        text,
        "| plain programs that make the system calls of one request and do nothing else, p50 | {} us | {} us |\n\
         | - their IOPS, of {b}'s: more than any stack that makes these calls can have | {} | {} |",
        spread(floors, |f| f.chain_read.p50_us).text(2),
        spread(floors, |f| f.chain_write.p50_us).text(2),
        chain("r4k-d1-q1", &|f| f.chain_read.iops),
        chain("w4k-d1-q1", &|f| f.chain_write.iops),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::chain::Chain;
    use crate::bench::compare::{Pair, ROWS};
    use std::time::Duration;

    fn outcome(iops: f64, p99_us: f64, cpu_s: [f64; 2]) -> Outcome {
        let usage = Usage { processes_s: cpu_s.to_vec(), ..Usage::default() };
        Outcome { ios: 1_000_000, iops, p99_us, usage, ..Outcome::default() }
    }

    fn report(rows: &[usize], pair: &Pair, pinned: bool) -> Report {
        let config = CompareConfig {
            a: Kind::Baton,
            b: Kind::QsdNbdkit,
            rounds: 5,
            duration: Duration::from_secs(1),
            bytes: 1 << 30,
            only: None,
            dirty_log: false,
            pinned,
        };
        let rows = rows
            .iter()
            .map(|&row| RowResult { row: ROWS[row], pairs: vec![pair.clone(); 2] })
            .collect();
        let floors = Floors {
            eventfd_us: 4.0,
            tcp_read_us: 5.0,
            tcp_write_us: 6.0,
            batched_read_us: 0.5,
            batched_write_us: 0.6,
            chain_read: Chain { p50_us: 7.0, iops: 1.5 },
            chain_write: Chain { p50_us: 8.0, iops: 3.0 },
        };
        Report { config, pinned, awake: true, floors: vec![floors], rows }
    }

    #[test]
    fn both_tables_have_the_ratios_and_only_the_first_is_judged() {
        let pair = Pair {
            round: 0,
            repeats: 0,
            noisy: true,
            a: outcome(20.0, 1.0, [1.0, 2.0]),
            b: outcome(10.0, 2.0, [4.0, 1.0]),
        };
        // r4k-d1-q1, r4k-d32-q1, and r4k-d1-q4, which has no target.
        let reports = [report(&[0, 2, 6], &pair, true), report(&[0], &pair, false)];
        let text = section("M, commit abc", &reports);
        for part in [
            "M, commit abc. A: baton, B: qsd-nbdkit; 5 rounds of 2 pairs of 1.0 s on 1024 MiB",
            "Front-end on CPU 0, stacks on CPU 1, A/B",
            "Nobody bound to a CPU, A/B",
            // The sum of both: 3 us to 5 us, not a mean of 0.25 and 2.
            "| r4k-d1-q1 | 2.00 [2.00 2.00] | - | 0.50 [0.50 0.50] | 0.60 [0.60 0.60] | 0.25 [0.25 0.25] | 2.00 [2.00 2.00] | 2 of 2 |",
            "| r4k-d1-q1 | 2.00 (at least 1.7): met | 0.60 (at most 0.55): **missed** |  | 0.50 (at most 0.6): met |",
            "| r4k-d32-q1 | 2.00 (at least 3): **missed** | 0.60 (at most 0.35): **missed** |  | 0.50 (at most 0.5): met |",
            "Noisy: others",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("| r4k-d1-q4 | 2.00 (at"), "{text}");
        assert_eq!(text.matches("Against the targets").count(), 1);
        assert_eq!(name(&reports[0].config), "bench-baton-qsd-nbdkit");
    }

    #[test]
    fn a_dirty_log_is_named_and_judged_as_one() {
        let pair = Pair {
            round: 0,
            repeats: 0,
            noisy: false,
            a: outcome(8.9, 1.0, [1.0, 1.0]),
            b: outcome(10.0, 1.0, [1.0, 1.0]),
        };
        let mut logged = report(&[0], &pair, true);
        logged.config = CompareConfig { b: Kind::Baton, dirty_log: true, ..logged.config };
        let text = section("M", &[logged.clone()]);
        assert!(text.contains("A: baton with a dirty log, B: baton without;"), "{text}");
        assert!(text.contains("| 0.89 (at least 0.9): **missed** |"), "{text}");
        assert!(!text.contains("floor"), "{text}");
        assert_eq!(name(&logged.config), "bench-dirty-log");
    }

    #[test]
    fn the_distance_to_the_floor_is_of_a_alone_and_what_lacks_is_said() {
        let a = Outcome { p50_us: 18.0, ..outcome(20.0, 1.0, [1.0, 2.0]) };
        let pair = Pair { round: 0, repeats: 0, noisy: false, a, b: outcome(1.0, 1.0, [9.0, 9.0]) };
        let text = distance(&report(&[0, 2], &pair, true));
        for part in [
            "| eventfd round trip, CPU 0 and 1 | 4.00 [4.00 4.00] us | |",
            "| p50 of 4 KiB at depth 1 | 18.00 us | - |",
            "| 2.00 (at most 1.3): **missed** | **not measured** |",
            "| 3.00 (at most 4): met | **not measured** |",
            "nothing else, p50 | 7.00 [7.00 7.00] us | 8.00 [8.00 8.00] us |",
            "- their IOPS, of qsd-nbdkit's: more than any stack that makes these calls can have | 1.50 [1.50 1.50] | - |",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let unix = Report {
            config: CompareConfig { a: Kind::BatonUnix, ..report(&[0], &pair, true).config },
            ..report(&[0], &pair, true)
        };
        assert_eq!(distance(&unix), "", "that floor is of TCP");
    }
}
