//! What happened, as text: hashed always, so that two runs can be compared, and
//! kept only when somebody wants to read it.

use std::fmt::{self, Write};

use crate::agenda::Time;

/// The lines of one run.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    steps: u64,
    lines: Option<Vec<String>>,
    seed: u64,
}

/// FNV-1a over what is written.
struct Hasher(u64);

impl Write for Hasher {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Ok(())
    }
}

impl Trace {
    pub(crate) fn new(seed: u64, keep: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, steps: 0, lines: keep.then(Vec::new), seed }
    }

    pub(crate) fn line(&mut self, now: Time, what: fmt::Arguments<'_>) {
        let mut hasher = Hasher(self.hash ^ now);
        // Writing to a hash cannot fail.
        let _ = hasher.write_fmt(what);
        self.hash = hasher.0;
        self.steps += 1;
        if let Some(lines) = &mut self.lines {
            let (ms, us) = (now / 1000, now % 1000);
            let (seed, step) = (self.seed, self.steps);
            lines.push(format!("seed={seed} step={step} t={ms}.{us:03}ms {what}"));
        }
    }

    /// The same for two runs in which the same happened.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How many lines there were, kept or not.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The lines, if they were kept.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }
}
