//! Whether there is a QEMU for the tests that drive one.

use std::process::Command;

/// True when a test has to be skipped for want of QEMU; says so, loudly. Never where
/// tests must not be skipped (BATON_REQUIRE_QEMU=1, as in CI).
pub(crate) fn skip_without_qemu(test: &str) -> bool {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_ok() {
        return false;
    }
    assert!(
        std::env::var_os("BATON_REQUIRE_QEMU").is_none_or(|v| v != "1"),
        "BATON_REQUIRE_QEMU=1 forbids to skip {test}: there is no qemu-system-x86_64; run scripts/setup.sh"
    );
    eprintln!("**** SKIPPED: {test}: there is no qemu-system-x86_64 ****");
    true
}
