#!/usr/bin/env bash
# The whole of Baton once: a storage server, a backend and a real guest, with accidents; ends with a report.
#
# Installs what is missing (scripts/setup.sh --demo says what, and asks apt only for that), builds, and runs
# baton-demo, which cleans up after itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh --demo
command -v cargo >/dev/null || {
    echo "demo: cargo is not installed; get Rust from your distribution or with rustup" >&2
    exit 1
}
echo "demo: building (the first time takes minutes)" >&2
# Progress is for people.
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
cargo build --release "${quiet[@]}" --workspace --bins
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
# Built above; the demo need not ask cargo again.
BATON_BIN_DIR=$target/release exec "$target/release/baton-demo"
