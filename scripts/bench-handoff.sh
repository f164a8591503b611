#!/usr/bin/env bash
# What a handoff costs, as a table; also written to docs/performance.md. Arguments go to `baton-bench-handoff`
# (--help says which).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "bench-handoff: building (the first time takes minutes)" >&2
# Progress is for people.
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
cargo build --release "${quiet[@]}" -p baton-storage-server -p baton-backend -p baton-integration --bins
command -v strace >/dev/null || echo "bench-handoff: no strace here; calls to the disk are not traced" >&2
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
BATON_BIN_DIR=$target/release exec "$target/release/baton-bench-handoff" --commit "$commit" --write docs/performance.md "$@"
