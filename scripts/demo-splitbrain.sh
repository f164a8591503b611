#!/usr/bin/env bash
# Two accidents of live migration on real guests: who writes the volume afterwards?
#
#   scripts/demo-splitbrain.sh [--json] [--stack KIND]
#
# Installs what is missing (scripts/setup.sh --demo --bench says what), builds, and runs baton-splitbrain, which
# leaves nothing running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh --demo --bench
command -v cargo >/dev/null || {
    echo "demo-splitbrain: cargo is not installed; get Rust from your distribution or with rustup" >&2
    exit 1
}
echo "demo-splitbrain: building (the first time takes minutes)" >&2
# Progress is for people.
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
cargo build --release "${quiet[@]}" --workspace --bins
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
# Built above; the demo need not ask cargo again.
BATON_BIN_DIR=$target/release exec "$target/release/baton-splitbrain" "$@"
