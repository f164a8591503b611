//! How long the parts of a switch took, as the two backends measured them. For people:
//! nothing is decided by it.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// Microseconds; null: it was not measured, or its backend did not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Timings {
    /// At the source, from the rings' stop until all their requests are answered.
    pub drain_us: Option<u64>,
    /// At the source, from the first SEAL sent to the last granted.
    pub seal_us: Option<u64>,
    /// At the destination, from ACTIVATE to its grant.
    pub activate_us: Option<u64>,
    /// From the rings' stop at the source to their start at the destination: for so long
    /// the machines' monitors had the VM. By the clocks of two hosts, and as good as these
    /// are synchronised; null where they contradict each other.
    pub vmm_gap_us: Option<u64>,
}

impl Timings {
    /// Of a handoff that the destination has won, from what both backends say of it
    /// (`handoff` of their status).
    #[must_use]
    pub fn of(source: &Value, destination: &Value) -> Self {
        let timing = |side: &Value, key: &str| side["timings"][key].as_u64();
        Self {
            drain_us: timing(source, "drain_us"),
            seal_us: timing(source, "seal_us"),
            activate_us: timing(destination, "activate_us"),
            vmm_gap_us: gap(source, destination),
        }
    }

    /// With what was known before of all that is not known now.
    #[must_use]
    pub fn or(self, before: Self) -> Self {
        Self {
            drain_us: self.drain_us.or(before.drain_us),
            seal_us: self.seal_us.or(before.seal_us),
            activate_us: self.activate_us.or(before.activate_us),
            vmm_gap_us: self.vmm_gap_us.or(before.vmm_gap_us),
        }
    }
}

fn gap(source: &Value, destination: &Value) -> Option<u64> {
    let at = |event: &Value| event["at_unix_us"].as_u64();
    let is = |name: &'static str| move |event: &&Value| event["event"] == name;
    // The source's process may have been stopped before and gone on; the destination's was
    // started for this handoff, and its guest may have reset since.
    let stopped = source["events"].as_array()?.iter().rfind(is("rings-stopped"))?;
    let started = destination["events"].as_array()?.iter().find(is("rings-started"))?;
    at(started)?.checked_sub(at(stopped)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn side(timings: Value, events: &[(&str, u64)]) -> Value {
        let event = |(name, at): &(&str, u64)| json!({"event": name, "at_unix_us": at});
        json!({"timings": timings, "events": events.iter().map(event).collect::<Vec<_>>()})
    }

    #[test]
    fn each_side_tells_its_own_part() {
        // That one was a destination once, and will be a source.
        let source = side(
            json!({"drain_us": 1, "seal_us": 2, "activate_us": 99}),
            &[("rings-started", 10), ("rings-stopped", 20), ("rings-stopped", 100)],
        );
        let destination = side(
            json!({"drain_us": null, "seal_us": 98, "activate_us": 3}),
            &[
                ("rings-started", 104),
                ("activated", 105),
                ("rings-stopped", 200),
                ("rings-started", 201),
            ],
        );
        let all = Timings {
            drain_us: Some(1),
            seal_us: Some(2),
            activate_us: Some(3),
            vmm_gap_us: Some(4),
        };
        assert_eq!(Timings::of(&source, &destination), all);
        // Who is gone takes nothing with it that was known.
        let half = Timings::of(&Value::Null, &destination);
        assert_eq!(half, Timings { activate_us: Some(3), ..Timings::default() });
        assert_eq!(half.or(all.clone()), all);
    }

    #[test]
    fn clocks_that_contradict_each_other_tell_nothing() {
        let source = side(json!({}), &[("rings-stopped", 100)]);
        let destination = side(json!({}), &[("rings-started", 99)]);
        assert_eq!(Timings::of(&source, &destination), Timings::default());
    }
}
