//! What a person writes to name a volume.
//!
//! Held: a refusal is one line.
#![no_main]

use baton_remote_client::VolumeUri;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = text.parse::<VolumeUri>() {
        assert!(!error.to_string().is_empty());
    }
});
