#!/usr/bin/env bash
# What a request costs in instructions, system calls and allocations, against what is stored in integration/costs.json.
# --bless stores what is counted now.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh --cost
echo "bench-cost: building (the first time takes minutes)" >&2
# Progress is for people.
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
cargo build --release "${quiet[@]}" --bin baton-storage --bin baton-backend --bin baton --bin baton-bench
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
how=--check
[[ ${1:-} == --bless ]] && how=--bless
BATON_BIN_DIR=$target/release exec "$target/release/baton-bench" cost "$how" integration/costs.json
