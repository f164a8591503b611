//! Has a power loss taken changes that were acknowledged and never synced? Pure but for reading the kernel's boot id.
//!
//! ```text
//!   open: judge the row left behind, write {generation, this boot, clean: false}, then serve
//!   clean close: everything is synced, then {same, same, clean: true}
//!   the pool fails: {same, UNKNOWN, clean: false}; the page cache no longer tells what is on the disk
//! ```
//!
//! A row that is neither clean nor of this boot of the kernel means that page cache was lost with changes in it: the
//! generation rises. Rising once too often costs a guest an error, once too rarely its data, so doubt makes it rise.

use std::fs;

/// Which start of the kernel: as long as it is the same, the page cache has survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(u128);

impl BootId {
    /// Equal to no boot, not even to itself: see `DurabilityRow::next_generation`.
    pub const UNKNOWN: Self = Self(0);

    /// From the text of the kernel's UUID; `UNKNOWN` if it is none.
    pub fn parse(text: &str) -> Self {
        let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
        u128::from_str_radix(&digits, 16).map_or(Self::UNKNOWN, Self)
    }

    /// The running kernel's. Without /proc it is `UNKNOWN`, and each kill then counts as a power loss.
    pub(super) fn of_this_kernel() -> Self {
        let path = "/proc/sys/kernel/random/boot_id";
        let id = fs::read_to_string(path).map_or(Self::UNKNOWN, |text| Self::parse(&text));
        if id == Self::UNKNOWN {
            tracing::warn!(
                "{path} cannot be read, so a killed server counts as a power loss and guests may see failed flushes; let the server read it"
            );
        }
        id
    }
}

/// What the last open, close or failure left in `meta.redb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DurabilityRow {
    pub(super) generation: u64,
    pub(super) boot: BootId,
    /// Everything acknowledged was synced and nothing was acknowledged since.
    pub(super) clean: bool,
}

impl DurabilityRow {
    /// What an open on `boot` writes before it serves, given what it found. `None`: a new pool, or one from before
    /// there were generations.
    pub(super) fn opened(found: Option<Self>, boot: BootId) -> Self {
        let generation = found.map_or(1, |row| row.next_generation(boot));
        Self { generation, boot, clean: false }
    }

    fn next_generation(self, boot: BootId) -> u64 {
        let cache_survived = self.boot == boot && boot != BootId::UNKNOWN;
        if self.clean || cache_survived {
            return self.generation.max(1);
        }
        // Zero means "does not say" on the wire.
        self.generation.checked_add(1).unwrap_or(1)
    }

    pub(super) fn closed(self) -> Self {
        Self { clean: true, ..self }
    }

    pub(super) fn in_use(self) -> Self {
        Self { clean: false, ..self }
    }

    pub(super) fn failed(self) -> Self {
        Self { boot: BootId::UNKNOWN, clean: false, ..self }
    }

    pub(super) fn to_columns(self) -> (u64, u128, bool) {
        (self.generation, self.boot.0, self.clean)
    }

    pub(super) fn from_columns((generation, boot, clean): (u64, u128, bool)) -> Self {
        Self { generation, boot: BootId(boot), clean }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: BootId = BootId(10);
    const B: BootId = BootId(11);

    /// The whole matrix of what can be found and who opens.
    #[test]
    fn the_generation_rises_exactly_when_page_cache_was_lost() {
        let opened = |clean, was, now| {
            let row = DurabilityRow { generation: 7, boot: was, clean };
            DurabilityRow::opened(Some(row), now)
        };
        for (clean, was, now, generation) in [
            (true, A, A, 7),
            (true, A, B, 7),
            (true, A, BootId::UNKNOWN, 7),
            (true, BootId::UNKNOWN, B, 7),
            (false, A, A, 7),
            (false, A, B, 8),
            (false, A, BootId::UNKNOWN, 8),
            (false, BootId::UNKNOWN, A, 8),
            (false, BootId::UNKNOWN, BootId::UNKNOWN, 8),
        ] {
            let expected = DurabilityRow { generation, boot: now, clean: false };
            assert_eq!(opened(clean, was, now), expected, "{clean} {was:?} {now:?}");
        }
        let new = DurabilityRow::opened(None, A);
        assert_eq!(new, DurabilityRow { generation: 1, boot: A, clean: false });
        let last = DurabilityRow { generation: u64::MAX, boot: A, clean: false };
        assert_eq!(DurabilityRow::opened(Some(last), B).generation, 1);
    }

    #[test]
    fn boot_ids_are_read_from_the_kernels_text() {
        let id = BootId::parse("82c37d6d-05a1-4135-ac06-d2fc882d82eb\n");
        assert_eq!(id, BootId(0x82c3_7d6d_05a1_4135_ac06_d2fc_882d_82eb));
        for text in ["", "x", "82c37d6d05a14135ac06d2fc882d82eb00"] {
            assert_eq!(BootId::parse(text), BootId::UNKNOWN, "{text}");
        }
        assert_ne!(BootId::of_this_kernel(), BootId::UNKNOWN);
        assert_eq!(BootId::of_this_kernel(), BootId::of_this_kernel());
    }
}
