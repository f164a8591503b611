//! The table of a run: each case and what came of it, which points were passed, and whether that is enough.

use super::case::{Case, Engine, POINTS, Point};
use super::run::Outcome;
use anyhow::Result;
use serde::Serialize;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which.
    pub case: Case,
    /// Text form, for `--filter`.
    pub name: String,
    /// What came of it; `None` when a promise was broken.
    pub outcome: Option<Outcome>,
    /// Which promise.
    pub failure: Option<String>,
    /// How long it took.
    pub took_ms: u128,
}

impl Row {
    /// Of a finished case.
    #[must_use]
    pub fn new(case: Case, result: Result<Outcome>, took: Duration) -> Self {
        let (outcome, failure) = match result {
            Ok(outcome) => (Some(outcome), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Self { case, name: case.to_string(), outcome, failure, took_ms: took.as_millis() }
    }

    /// As a person reads it.
    #[must_use]
    pub fn line(&self) -> String {
        let rest = match (&self.outcome, &self.failure) {
            (Some(it), _) => format!(
                "{:7} {:11} {:8} {:>6} ms  {}",
                it.accident, it.winner, it.guest, it.recovery_ms, it.story
            ),
            (None, failure) => format!("FAILED  {}", failure.as_deref().unwrap_or("?")),
        };
        format!("{:72} {}", self.name, first_line(&rest))
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// All of it.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Seed of the order.
    pub seed: u64,
    /// Rows, in the order in which the cases ended.
    pub rows: Vec<Row>,
    /// How often each point was passed, by all processes.
    pub hits: BTreeMap<String, u64>,
}

impl Report {
    /// Counts points that processes passed, a line each.
    pub fn count_hits(&mut self, lines: &str) {
        for line in lines.lines() {
            *self.hits.entry(line.to_owned()).or_default() += 1;
        }
    }

    /// Whether the victim of any case of this point was hurt.
    #[must_use]
    pub fn has_hurt_at(&self, point: &str) -> bool {
        let outcome = |row: &Row| row.outcome.as_ref().map(|outcome| outcome.accident);
        let of_point = self.rows.iter().filter(|row| row.case.point == point);
        of_point.filter_map(outcome).any(|accident| accident == "hurt")
    }

    /// Why the run is no proof; empty when it is one. `points` are the names that it was to pass.
    #[must_use]
    pub fn complaints(&self, points: &[&str]) -> Vec<String> {
        let failed = self.rows.iter().filter(|row| row.outcome.is_none()).map(Row::line);
        let passed = |name: &str| self.hits.contains_key(name);
        let missed =
            points.iter().filter_map(|name| match (passed(name), self.has_hurt_at(name)) {
                (false, _) => Some(format!("the point {name} was never passed")),
                (true, false) => Some(format!("nobody was hurt at the point {name}")),
                (true, true) => None,
            });
        failed.chain(missed).collect()
    }

    /// The table.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("seed {}\n", self.seed);
        for row in &self.rows {
            let _ = writeln!(text, "{}", row.line());
        }
        let count = |test: fn(&Row) -> bool| self.rows.iter().filter(|row| test(row)).count();
        let _ = writeln!(
            text,
            "\n{} cases: {} kept every promise, {} did not",
            self.rows.len(),
            count(|row| row.outcome.is_some()),
            count(|row| row.outcome.is_none()),
        );
        let accidents = |what: &'static str| {
            let outcomes = self.rows.iter().filter_map(|row| row.outcome.as_ref());
            outcomes.filter(|outcome| outcome.accident == what).count()
        };
        let _ = writeln!(
            text,
            "the victim was hurt in {}, not there in {}, and the point was missed in {}",
            accidents("hurt"),
            accidents("absent"),
            accidents("missed"),
        );
        let _ = writeln!(text, "points passed:");
        let engines: Vec<Engine> = self.rows.iter().map(|row| row.case.engine).collect();
        let of_these = |point: &&Point| point.engines.iter().any(|e| engines.contains(e));
        let mut told = BTreeSet::new();
        // Some have a line of their own for each owner.
        for point in POINTS.iter().filter(of_these).filter(|point| told.insert(point.name)) {
            let hits = self.hits.get(point.name).copied().unwrap_or(0);
            let _ = writeln!(text, "  {:20} {hits}", point.name);
        }
        text
    }

    /// Writes `NAME.txt` and `NAME.json`.
    pub fn write(&self, dir: &Path, name: &str) -> Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join(format!("{name}.txt")), self.text())?;
        fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(&json!(self))?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::all;
    use super::*;

    #[test]
    fn a_broken_promise_and_a_point_never_passed_are_complaints() {
        let case = all(Engine::Baton)[0];
        let took = Duration::from_millis(5);
        let good = Outcome {
            accident: "hurt",
            winner: "source",
            story: "done".into(),
            guest: "went on",
            recovery_ms: 1,
            answers: 2,
        };
        let hits = BTreeMap::from([("arm.stored".to_owned(), 3)]);
        let missed = Outcome { accident: "missed", ..good.clone() };
        let of = |outcome| vec![Row::new(case, Ok(outcome), took)];
        let mut report = Report { seed: 1, rows: of(missed), hits };
        assert_eq!(case.point, "arm.stored");
        assert_eq!(report.complaints(&["arm.stored"]), ["nobody was hurt at the point arm.stored"]);
        report.rows = of(good);
        assert!(report.complaints(&["arm.stored"]).is_empty());
        assert_eq!(report.complaints(&["arm.stored", "seal.sent"]).len(), 1);
        report.rows.push(Row::new(case, Err(anyhow::anyhow!("stale read")), took));
        let complaints = report.complaints(&[]);
        assert!(complaints[0].contains("stale read") && complaints[0].contains(case.point));
        assert!(report.text().contains("1 kept every promise, 1 did not"));
    }
}
