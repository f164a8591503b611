//! What the figures are to be: the targets of a comparison, and whether a median reaches its own.
//!
//! | against | rows | figures |
//! |---|---|---|
//! | qemu-storage-daemon and nbdkit, TCP | 4k d1, 4k d32, 128k d8, 4k d32 on four queues | IOPS, CPU, p99 |
//! | the same over Unix sockets | the same | IOPS |
//! | itself without a dirty log | all | IOPS |
//! | a null volume against null-co | depth 32 | CPU |
//! | a local file against io_uring | all | IOPS |
//! | an NBD client against the peer's | 4k d1, 4k d32 | IOPS, CPU of the backend |
//! | an image of Ceph against the peer's | 4k d1, 4k d32 | IOPS, CPU of the backend |

use crate::bench::compare::CompareConfig;
use crate::bench::stack::Kind;
use crate::bench::stats::Spread;
use std::fmt;

/// Which side of the number is good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// More is better.
    AtLeast(f64),
    /// Less is better.
    AtMost(f64),
}

/// How a figure stands to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Reached by the median and by each round's.
    Met,
    /// Reached by the median, but not in each round.
    MetNotAlways,
    /// Not reached by the median.
    Missed,
    /// There is no such figure, so nothing was reached.
    NotMeasured,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::MetNotAlways => "met, not in every round",
            Self::Missed => "**missed**",
            Self::NotMeasured => "**not measured**",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "at least {bound}"),
            Self::AtMost(bound) => write!(f, "at most {bound}"),
        }
    }
}

impl Target {
    /// The number itself.
    #[must_use]
    pub fn bound(self) -> f64 {
        match self {
            Self::AtLeast(bound) | Self::AtMost(bound) => bound,
        }
    }

    /// Whether the figure reaches it.
    #[must_use]
    pub fn judge(self, figure: Spread) -> Verdict {
        if ![figure.median, figure.low, figure.high].iter().all(|number| number.is_finite()) {
            return Verdict::NotMeasured;
        }
        let reached = |number: f64| match self {
            Self::AtLeast(bound) => number >= bound,
            Self::AtMost(bound) => number <= bound,
        };
        let worst = match self {
            Self::AtLeast(_) => figure.low,
            Self::AtMost(_) => figure.high,
        };
        match (reached(figure.median), reached(worst)) {
            (true, true) => Verdict::Met,
            (true, false) => Verdict::MetNotAlways,
            (false, _) => Verdict::Missed,
        }
    }

    /// "1.88 (at least 1.7): met".
    #[must_use]
    pub fn text(self, figure: Spread) -> String {
        let verdict = self.judge(figure);
        if verdict == Verdict::NotMeasured {
            return verdict.to_string();
        }
        format!("{:.2} ({self}): {verdict}", figure.median)
    }
}

/// A request at depth 1 against the round trips of an eventfd pair and a TCP pair together.
pub const D1_TO_FLOOR: Target = Target::AtMost(1.3);
/// CPU time of backend and server for a 4 KiB request at depth 32, in us.
pub const D32_CPU_US: Target = Target::AtMost(4.0);

/// The targets of one row, each for a ratio A to B.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowTargets {
    /// Requests per second.
    pub iops: Option<Target>,
    /// CPU time per request of backend and server together.
    pub cpu: Option<Target>,
    /// CPU time per request of the backend alone.
    pub backend: Option<Target>,
    /// The latency that one in a hundred exceeds.
    pub p99: Option<Target>,
}

/// What a row has to reach, by the row's name without its direction ("4k-d1-q1").
#[must_use]
pub fn of_row(config: &CompareConfig, row: &str) -> RowTargets {
    let work = row.get(1..).unwrap_or_default();
    let (at_least, at_most) = (|n| Some(Target::AtLeast(n)), |n| Some(Target::AtMost(n)));
    if config.dirty_log {
        return RowTargets { iops: at_least(0.9), ..RowTargets::default() };
    }
    match (config.a, config.b) {
        (Kind::BatonNull, Kind::QsdNull) if work.contains("-d32-") => {
            RowTargets { cpu: at_most(1.0), ..RowTargets::default() }
        }
        (Kind::BatonFile, Kind::QsdFileUring) => {
            RowTargets { iops: at_least(1.0), ..RowTargets::default() }
        }
        (Kind::Baton, Kind::QsdNbdkit) => {
            let (iops, cpu, p99) = match work {
                "4k-d1-q1" => (1.7, 0.55, 0.6),
                "4k-d32-q1" => (3.0, 0.35, 0.5),
                "128k-d8-q1" => (1.4, 0.7, 0.8),
                "4k-d32-q4" => (4.0, 0.28, 0.4),
                _ => return RowTargets::default(),
            };
            RowTargets { iops: at_least(iops), cpu: at_most(cpu), p99: at_most(p99), backend: None }
        }
        (Kind::BatonUnix, Kind::QsdNbdkitUnix) => {
            let iops = match work {
                "4k-d1-q1" => 1.5,
                "4k-d32-q1" => 2.5,
                "128k-d8-q1" => 1.2,
                "4k-d32-q4" => 3.5,
                _ => return RowTargets::default(),
            };
            RowTargets { iops: at_least(iops), ..RowTargets::default() }
        }
        (Kind::BatonNbd, Kind::QsdNbdkit)
        | (Kind::BatonNbdUnix, Kind::QsdNbdkitUnix)
        | (Kind::BatonNbdTls, Kind::QsdNbdkitTls)
        | (Kind::BatonRbd, Kind::QsdRbd) => {
            // Four queues of depth 1 are depth 4.
            let iops = match work {
                "4k-d32-q1" | "4k-d32-q4" => 1.3,
                "4k-d1-q1" => 1.1,
                _ => return RowTargets::default(),
            };
            RowTargets { iops: at_least(iops), backend: at_most(0.7), ..RowTargets::default() }
        }
        _ => RowTargets::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64, low: f64, high: f64) -> Spread {
        Spread { median, low, high }
    }

    #[test]
    fn the_median_decides_and_the_worst_round_is_said() {
        let more = Target::AtLeast(2.0);
        assert_eq!(more.judge(spread(2.0, 2.0, 3.0)), Verdict::Met);
        assert_eq!(more.judge(spread(2.5, 1.9, 3.0)), Verdict::MetNotAlways);
        assert_eq!(more.judge(spread(1.99, 1.0, 3.0)), Verdict::Missed);
        let less = Target::AtMost(0.5);
        assert_eq!(less.judge(spread(0.5, 0.1, 0.5)), Verdict::Met);
        assert_eq!(less.judge(spread(0.4, 0.1, 0.6)), Verdict::MetNotAlways);
        assert_eq!(less.judge(spread(0.51, 0.1, 0.6)), Verdict::Missed);
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        for nothing in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let figure = spread(nothing, nothing, nothing);
            assert_eq!(Target::AtMost(1.0).judge(figure), Verdict::NotMeasured);
            assert_eq!(Target::AtLeast(1.0).text(figure), "**not measured**");
        }
        // One pair without an end makes a round's median infinite and leaves the whole finite.
        assert_eq!(
            Target::AtLeast(1.0).judge(spread(2.0, 2.0, f64::INFINITY)),
            Verdict::NotMeasured
        );
    }

    fn config(a: Kind, b: Kind) -> CompareConfig {
        CompareConfig {
            a,
            b,
            rounds: 1,
            duration: std::time::Duration::from_secs(1),
            bytes: 1 << 30,
            only: None,
            dirty_log: false,
            pinned: true,
        }
    }

    #[test]
    fn a_row_has_the_targets_of_its_work_in_both_directions() {
        let of = |row| of_row(&config(Kind::Baton, Kind::QsdNbdkit), row);
        assert_eq!(of("r4k-d32-q4"), of("w4k-d32-q4"));
        assert_eq!(of("w128k-d8-q1").iops, Some(Target::AtLeast(1.4)));
        assert_eq!(of("r4k-d1-q1").p99, Some(Target::AtMost(0.6)));
        assert_eq!(of("r4k-d1-q4"), RowTargets::default());
        assert_eq!(of(""), RowTargets::default());
    }

    #[test]
    fn each_comparison_has_its_own() {
        let unix = of_row(&config(Kind::BatonUnix, Kind::QsdNbdkitUnix), "r4k-d32-q1");
        assert_eq!((unix.iops, unix.cpu), (Some(Target::AtLeast(2.5)), None));
        let same = config(Kind::Baton, Kind::Baton);
        assert_eq!(of_row(&same, "r4k-d1-q1"), RowTargets::default());
        let logged = CompareConfig { dirty_log: true, ..same };
        assert_eq!(of_row(&logged, "r4k-d1-q4").iops, Some(Target::AtLeast(0.9)));
        let null = |row| of_row(&config(Kind::BatonNull, Kind::QsdNull), row);
        assert_eq!(null("w4k-d32-q4").cpu, Some(Target::AtMost(1.0)));
        assert_eq!(null("w4k-d1-q4"), RowTargets::default());
        let file = of_row(&config(Kind::BatonFile, Kind::QsdFileUring), "r128k-d8-q1");
        assert_eq!(file.iops, Some(Target::AtLeast(1.0)));
        for (a, b) in [
            (Kind::BatonNbd, Kind::QsdNbdkit),
            (Kind::BatonNbdUnix, Kind::QsdNbdkitUnix),
            (Kind::BatonNbdTls, Kind::QsdNbdkitTls),
            (Kind::BatonRbd, Kind::QsdRbd),
        ] {
            let of = |row| of_row(&config(a, b), row);
            assert_eq!(of("r4k-d32-q1").iops, Some(Target::AtLeast(1.3)));
            assert_eq!(of("w4k-d1-q1").iops, Some(Target::AtLeast(1.1)));
            assert_eq!(of("w4k-d1-q4"), RowTargets::default());
            assert_eq!(of("w4k-d1-q1").backend, Some(Target::AtMost(0.7)));
            assert_eq!(of("r128k-d8-q1"), RowTargets::default());
        }
    }
}
