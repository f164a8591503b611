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
    /// An answer to a question for `offset`, a multiple of `block`; `end` is the volume's. False: it says nothing of
    /// that place, or ends within a block, where the next question could not begin. Whoever asks on would ask for ever.
    #[must_use]
    pub(super) fn learn(&mut self, offset: u64, answer: &[Extent], end: u64, block: u64) -> bool {
        if self.end() != offset {
            *self = Self { from: offset, ..Self::default() };
        }
        let mut at = offset;
        for extent in answer.iter().take_while(|extent| extent.len > 0) {
            at = at.saturating_add(extent.len).min(end);
            self.extents.push_back((at, extent.zeros != 0));
        }
        at > offset && (at == end || at.is_multiple_of(block))
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
        let answer = [extent(15, 1), extent(10, 0), extent(10, 1), extent(0, 0), extent(9, 9)];
        assert!(map.learn(0, &answer, 100, 1));
        assert_eq!(map.look(0, 10), Known::Zeros);
        assert_eq!(map.look(10, 20), Known::Data);
        assert_eq!(map.look(20, 30), Known::Data);
        assert_eq!(map.look(30, 40), Known::Ask(35), "zeros as far as it is known");
        assert!(map.learn(35, &[extent(u64::MAX, 1)], 100, 1));
        assert_eq!(map.look(30, 40), Known::Zeros);
        assert_eq!(map.look(90, 100), Known::Zeros);
        assert_eq!(map.look(0, 10), Known::Ask(0), "it was forgotten");
        assert!(map.learn(0, &[extent(5, 0)], 100, 1));
        assert_eq!(map.look(0, 10), Known::Data);
        assert_eq!(map.look(5, 10), Known::Ask(5));
    }

    #[test]
    fn an_answer_that_leads_nowhere_is_told() {
        let extent = |len, zeros| Extent { len, zeros };
        let learn = |answer: &[Extent]| Map::default().learn(512, answer, 5000, 512);
        assert!(!learn(&[]), "nothing");
        assert!(!learn(&[extent(0, 1), extent(512, 1)]), "nothing");
        assert!(!learn(&[extent(100, 1)]), "less than a block");
        assert!(!learn(&[extent(512, 0), extent(700, 1)]), "into a block");
        assert!(learn(&[extent(100, 1), extent(412, 0)]));
        assert!(learn(&[extent(5000 - 512, 1)]), "the volume's end is in a block");
    }
}
