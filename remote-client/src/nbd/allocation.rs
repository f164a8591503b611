//! What an export tells of its holes: the metadata context `base:allocation`, and
//! the answers to BLOCK_STATUS, which are decoded as they arrive: a server may send
//! a million descriptors, of which the asker has room for some.
//!
//! ```text
//!  body    context(4)            { length(4) flags(4) }*      compact
//!          context(4) count(4)   { length(8) flags(8) }*      extended headers
//! ```

use super::wire::{self, u32_at, u64_at};
use crate::volume::Extent;

const CONTEXT: &str = "base:allocation";
/// proto.md: "the block contents read as all zeroes". A hole alone does not say so.
const STATE_ZERO: u64 = 1 << 1;

/// The option that selects the context for an export.
pub(super) fn select(export: &str) -> Vec<u8> {
    let text = |text: &str| {
        let len = u32::try_from(text.len()).expect("an export's name is short");
        [&len.to_be_bytes()[..], text.as_bytes()].concat()
    };
    let data = [text(export), 1u32.to_be_bytes().to_vec(), text(CONTEXT)].concat();
    wire::option(wire::OPT_SET_META_CONTEXT, &data)
}

/// The number that the server gives the context; `None`: the answer is about
/// something else, or is too short.
pub(super) fn selected(body: &[u8]) -> Option<u32> {
    let (number, name) = body.split_at_checked(4)?;
    (name == CONTEXT.as_bytes()).then(|| u32_at(number, 0))
}

/// Form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Compact,
    Extended,
}

impl Form {
    /// Bytes before the descriptors.
    pub(super) fn head_bytes(self) -> usize {
        match self {
            Self::Compact => 4,
            Self::Extended => 8,
        }
    }

    fn descriptor_bytes(self) -> usize {
        match self {
            Self::Compact => 8,
            Self::Extended => 16,
        }
    }

    /// Whether `len` bytes can be an answer.
    pub(super) fn fits(self, len: usize) -> bool {
        len.checked_sub(self.head_bytes())
            .is_some_and(|rest| rest > 0 && rest.is_multiple_of(self.descriptor_bytes()))
    }

    /// The context of an answer whose descriptors have `rest` bytes; `None`: it
    /// contradicts itself.
    pub(super) fn context(self, head: &[u8], rest: usize) -> Option<u32> {
        let counted = match self {
            Self::Compact => true,
            Self::Extended => u32_at(head, 4) as usize == rest / self.descriptor_bytes(),
        };
        counted.then(|| u32_at(head, 0))
    }
}

/// A descriptor on its way.
#[derive(Debug, Default)]
pub(super) struct Partial {
    bytes: [u8; 16],
    filled: usize,
}

impl Partial {
    pub(super) fn reset(&mut self) {
        self.filled = 0;
    }

    /// Takes some of `bytes`; how many, and the extent that is now whole.
    pub(super) fn take(&mut self, form: Form, bytes: &[u8]) -> (usize, Option<Extent>) {
        let n = (form.descriptor_bytes() - self.filled).min(bytes.len());
        self.bytes[self.filled..self.filled + n].copy_from_slice(&bytes[..n]);
        self.filled += n;
        if self.filled < form.descriptor_bytes() {
            return (n, None);
        }
        self.filled = 0;
        let (len, flags) = match form {
            Form::Compact => (u64::from(u32_at(&self.bytes, 0)), u64::from(u32_at(&self.bytes, 4))),
            Form::Extended => (u64_at(&self.bytes, 0), u64_at(&self.bytes, 8)),
        };
        (n, Some(Extent { len, zeros: u64::from(flags & STATE_ZERO != 0) }))
    }
}

/// As the asker's memory holds it.
pub(super) fn bytes_of(extent: Extent) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&extent.len.to_ne_bytes());
    bytes[8..].copy_from_slice(&extent.zeros.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_option() {
        let want = [
            b"IHAVEOPT".as_slice(),
            &[0, 0, 0, 10, 0, 0, 0, 29, 0, 0, 0, 2],
            b"ab",
            &[0, 0, 0, 1, 0, 0, 0, 15],
            b"base:allocation",
        ];
        assert_eq!(select("ab"), want.concat());
        assert_eq!(selected(b"\0\0\0\x07base:allocation"), Some(7));
        assert_eq!(selected(b"\0\0\0\x07base:other"), None);
        assert_eq!(selected(b"\0\0\0"), None);
    }

    #[test]
    fn descriptors_arrive_in_any_pieces() {
        let compact = [0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 16, 0, 0, 0, 0, 1];
        let mut extended = vec![];
        for n in [1u64 << 40, 2, 512, 0] {
            extended.extend(n.to_be_bytes());
        }
        let hole = |len, zeros| Extent { len, zeros };
        for (form, bytes, want) in [
            (Form::Compact, &compact[..], [hole(512, 1), hole(4096, 0)]),
            (Form::Extended, &extended, [hole(1 << 40, 1), hole(512, 0)]),
        ] {
            for step in 1..=bytes.len() {
                let mut partial = Partial::default();
                let mut found = Vec::new();
                for mut piece in bytes.chunks(step) {
                    while !piece.is_empty() {
                        let (n, extent) = partial.take(form, piece);
                        found.extend(extent);
                        piece = &piece[n..];
                    }
                }
                assert_eq!(found, want, "{form:?} in pieces of {step}");
            }
        }
    }

    #[test]
    fn answers_of_a_wrong_length_or_count_are_none() {
        assert!(Form::Compact.fits(12) && Form::Compact.fits(20));
        assert!(!Form::Compact.fits(4) && !Form::Compact.fits(13) && !Form::Compact.fits(3));
        assert!(Form::Extended.fits(24) && !Form::Extended.fits(8) && !Form::Extended.fits(20));
        let head = [0, 0, 0, 9, 0, 0, 0, 2];
        assert_eq!(Form::Extended.context(&head, 32), Some(9));
        assert_eq!(Form::Extended.context(&head, 16), None);
        assert_eq!(Form::Compact.context(&head[..4], 16), Some(9));
    }
}
