#!/usr/bin/env bash
# Baton and qemu-storage-daemon side by side, as tables of ratios: bound to CPUs and not. Arguments go to
# `baton-bench compare` (--help says which); --quick is a short run, --write-docs writes docs/performance.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh --bench
echo "bench: building (the first time takes minutes)" >&2
# Progress is for people.
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
cargo build --release "${quiet[@]}" --workspace --bins
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
BATON_BIN_DIR=$target/release exec "$target/release/baton-bench" compare --unpinned --commit "$commit" "$@"
