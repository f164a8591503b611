//! Bugs that can be put into the simulator's glue, never into the product's
//! code. Each breaks one rule of the protocol; a run that does not notice it
//! proves nothing.

use std::fmt;
use std::str::FromStr;

/// A broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The server lets in any owner's connection, whatever epoch its requests carry.
    EpochIgnored,
    /// The server says SEALED, and opens a gate, while old requests still run.
    NoDrain,
    /// The destination takes the anchor's seal for everybody's.
    AnchorSealOnly,
    /// A seal is only the source's promise, and a source that resumes breaks it
    /// without asking the anchor.
    NoReclaim,
    /// A server that restarts in the middle of a fast handoff goes on as armed.
    FrozenForgotten,
    /// The server says SEALED without waiting for what the source counted.
    CountsIgnored,
    /// A client that comes back while armed does not move the reserved epochs.
    EpochsKept,
    /// What was carried out is carried out again when it is sent again.
    WindowForgotten,
    /// A flush is answered but makes nothing durable.
    FlushForgotten,
    /// The server arms whatever arrives, however old its plan is.
    LateArm,
    /// The server fences whoever has the volume now, for whomever the fence was
    /// meant.
    LateFence,
    /// A standby is not told its try, and takes the first that it hears of.
    StandbyTakesAnyTry,
    /// Who gives a handoff up has its volumes disarmed, sealed or not.
    DisarmSealed,
    /// A volume stays armed for a handoff that its anchor has forgotten.
    NeverDisarms,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::EpochIgnored,
        Self::NoDrain,
        Self::AnchorSealOnly,
        Self::NoReclaim,
        Self::FrozenForgotten,
        Self::CountsIgnored,
        Self::EpochsKept,
        Self::WindowForgotten,
        Self::FlushForgotten,
        Self::LateArm,
        Self::LateFence,
        Self::StandbyTakesAnyTry,
        Self::DisarmSealed,
        Self::NeverDisarms,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::EpochIgnored => "epoch-ignored",
            Self::NoDrain => "no-drain",
            Self::AnchorSealOnly => "anchor-seal-only",
            Self::NoReclaim => "no-reclaim",
            Self::FrozenForgotten => "frozen-forgotten",
            Self::CountsIgnored => "counts-ignored",
            Self::EpochsKept => "epochs-kept",
            Self::WindowForgotten => "window-forgotten",
            Self::FlushForgotten => "flush-forgotten",
            Self::LateArm => "late-arm",
            Self::LateFence => "late-fence",
            Self::StandbyTakesAnyTry => "standby-takes-any-try",
            Self::DisarmSealed => "disarm-sealed",
            Self::NeverDisarms => "never-disarms",
        }
    }
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|bug| bug.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|bug| bug.name()).collect();
            format!("there is no bug `{text}`; there are: {}", names.join(", "))
        })
    }
}
