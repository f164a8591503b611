#!/usr/bin/env bash
# The fault matrix: every process of a migration is killed and frozen at every message boundary.
#
#   scripts/faults.sh [--engine baton|rbd] [--filter TEXT]... [--seconds N] [--cases N] [--seed N] [--skip N] [--jobs N]
#                     [--freeze-ms N] [--list]
#
# Builds the daemons with their points of fault injection into $CARGO_TARGET_DIR/faults (default: target/faults), where the table of cases
# and outcomes is left as report.txt and report.json (report-rbd.* for RBD). Ends with "N passed, N failed".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
export CARGO_TARGET_DIR=$target/faults
scripts/seed-target.sh "$target" "$CARGO_TARGET_DIR"
# A feature of all daemons: the normal programs are built without it, elsewhere.
cargo build --quiet --workspace --bins \
    --features baton-storage-server/fault-points,baton-backend/fault-points,baton-live-migrate/fault-points
BATON_BIN_DIR=$CARGO_TARGET_DIR/debug exec "$CARGO_TARGET_DIR/debug/baton-faults" "$@"
