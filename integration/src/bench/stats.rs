//! A median, and how far medians of rounds lie apart.

use serde::Serialize;
use std::collections::BTreeSet;

/// A figure over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Median over everything; NaN of nothing.
    pub median: f64,
    /// Lowest median of a round.
    pub low: f64,
    /// Highest median of a round.
    pub high: f64,
}

impl Spread {
    /// Of figures with the round each was measured in.
    #[must_use]
    pub fn of(figures: &[(u32, f64)]) -> Self {
        let rounds: BTreeSet<u32> = figures.iter().map(|&(round, _)| round).collect();
        let of_round = |round: u32| median(figures.iter().filter(|f| f.0 == round).map(|f| f.1));
        Self {
            median: median(figures.iter().map(|f| f.1)),
            low: rounds.iter().map(|&r| of_round(r)).fold(f64::INFINITY, f64::min),
            high: rounds.iter().map(|&r| of_round(r)).fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// "1.23 [1.20 1.30]"; "-" where nothing was measured, or divided by nothing.
    #[must_use]
    pub fn text(&self, digits: usize) -> String {
        let Self { median, low, high } = self;
        if !median.is_finite() {
            return "-".to_owned();
        }
        format!("{median:.digits$} [{low:.digits$} {high:.digits$}]")
    }
}

/// The middle value, or the mean of the two in the middle; NaN of nothing.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_rounds_and_its_median_of_everything() {
        let figures = [(0, 1.0), (0, 3.0), (1, 4.0), (1, 5.0)];
        assert_eq!(Spread::of(&figures), Spread { median: 3.5, low: 2.0, high: 4.5 });
        assert_eq!(Spread::of(&figures).text(2), "3.50 [2.00 4.50]");
    }

    #[test]
    fn nothing_measured_is_no_number() {
        assert_eq!(Spread::of(&[]).text(2), "-");
        assert_eq!(Spread::of(&[(0, 1.0 / 0.0)]).text(2), "-");
    }

    #[test]
    fn medians_of_odd_even_and_no_values() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0]) - 2.5).abs() < 1e-9);
        assert!(median([]).is_nan());
    }
}
