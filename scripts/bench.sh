#!/usr/bin/env bash
# Baton and qemu-storage-daemon side by side, as tables of ratios: bound to CPUs and not. Arguments go to
# `baton-bench compare` (--help says which); --quick is a short run, --write-docs writes docs/performance.md.
# With `fair`, `tenants`, `polling` or `dirty-log` as the first argument it runs that command instead; with `engine` it may need
# Ceph, and nobody runs unbound: a cluster would have the CPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

needs=(--bench)
[[ ${1:-} == engine ]] && needs+=(--ceph)
scripts/setup.sh "${needs[@]}"
echo "bench: building (the first time takes minutes)" >&2
# Progress is for people.
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
cargo build --release "${quiet[@]}" --workspace --bins
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
command=(compare --unpinned)
case ${1:-} in
fair | tenants | polling | dirty-log) command=("$1") && shift ;;
engine) command=(compare) && shift ;;
esac
BATON_BIN_DIR=$target/release exec "$target/release/baton-bench" "${command[@]}" --commit "$commit" "$@"
