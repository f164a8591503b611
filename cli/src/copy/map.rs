//! What a volume has told of its holes. Pure.

use baton_remote_client::Extent;

/// What is known of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing; this place is to be asked for.
    Ask(u64),
    /// The whole range reads as zeros.
    Zeros,
    /// Some of it may be data.
    Data,
}

/// One window of answers, which follows the copy.
#[derive(Debug, Default)]
pub(super) struct Map {
    /// First byte that is known, and what follows: end, and whether it is zeros.
    from: u64,
    extents: std::collections::VecDeque<(u64, bool)>,
}

impl Map {
    /// An answer to a question for `offset`; `end` is the volume's.
    pub(super) fn learn(&mut self, offset: u64, answer: &[Extent], end: u64) {
        if self.end() != offset {
            *self = Self { from: offset, ..Self::default() };
        }
        let mut at = offset;
        for extent in answer.iter().take_while(|extent| extent.len > 0) {
            at = at.saturating_add(extent.len).min(end);
            self.extents.push_back((at, extent.zeros != 0));
        }
    }

    fn end(&self) -> u64 {
        self.extents.back().map_or(self.from, |(end, _)| *end)
    }

    /// What is known of `from..to`. What is before `from` is forgotten.
    pub(super) fn look(&mut self, from: u64, to: u64) -> Known {
        while let Some((end, _)) = self.extents.front()
            && *end <= from
        {
            self.from = *end;
            self.extents.pop_front();
        }
        if from < self.from || self.extents.is_empty() {
            return Known::Ask(from);
        }
        let mut zeros = true;
        for (end, is_zero) in &self.extents {
            zeros &= is_zero;
            if !zeros {
                return Known::Data;
            }
            if *end >= to {
                return Known::Zeros;
            }
        }
        Known::Ask(self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_follows_the_copy() {
        let extent = |len, zeros| Extent { len, zeros };
        let mut map = Map::default();
        assert_eq!(map.look(0, 10), Known::Ask(0));
        map.learn(
            0,
            &[extent(15, 1), extent(10, 0), extent(10, 1), extent(0, 0), extent(9, 9)],
            100,
        );
        assert_eq!(map.look(0, 10), Known::Zeros);
        assert_eq!(map.look(10, 20), Known::Data);
        assert_eq!(map.look(20, 30), Known::Data);
        assert_eq!(map.look(30, 40), Known::Ask(35), "zeros as far as it is known");
        map.learn(35, &[extent(u64::MAX, 1)], 100);
        assert_eq!(map.look(30, 40), Known::Zeros);
        assert_eq!(map.look(90, 100), Known::Zeros);
        assert_eq!(map.look(0, 10), Known::Ask(0), "it was forgotten");
        map.learn(0, &[extent(5, 0)], 100);
        assert_eq!(map.look(0, 10), Known::Data);
        assert_eq!(map.look(5, 10), Known::Ask(5));
    }
}
