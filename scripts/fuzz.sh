#!/usr/bin/env bash
# Fuzzes every decoder, guided by coverage, for a bounded time.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]     SECONDS for each target, 10 unless told
#
# Inputs that were worth keeping stay in $CARGO_TARGET_DIR/fuzz/corpus/TARGET and are where the next run begins.
# A crash fails the run; the input that caused it is kept in $CARGO_TARGET_DIR/fuzz/crashes, and the command that
# repeats it is printed. Works with a stable compiler; needs a C++ compiler for the fuzzer itself.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in
-h | --help)
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
seconds=${1:-10}
case $seconds in
'' | *[!0-9]*)
    echo "fuzz: '$seconds' is not a number of seconds; see scripts/fuzz.sh --help" >&2
    exit 64
    ;;
esac
shift || true
mapfile -t targets < <(cd "$here/fuzz/targets" && printf '%s\n' *.rs | sed 's/\.rs$//')
(($# > 0)) && targets=("$@")

if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    echo "fuzz: the fuzzer needs a C++ compiler; run: apt-get install g++" >&2
    exit 2
fi

base=${CARGO_TARGET_DIR:-$here/target}
case $base in /*) ;; *) base=$here/$base ;; esac
base=$base/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
# With --target given, build scripts are spared these flags, which they could not be linked with.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
cargo build --quiet --release --manifest-path "$here/fuzz/Cargo.toml" --target "$host" --target-dir "$base"

# One target: what it did, or how it failed.
fuzz() {
    local target=$1 corpus=$base/corpus/$1 log=$base/$1.log program=$base/$host/release/$1
    mkdir -p "$corpus"
    # A time limit per input, because a decoder that hangs is as bad as one that crashes.
    if "$program" "$corpus" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=8192 \
        -artifact_prefix="$base/crashes/$target-" >"$log" 2>&1; then
        sed -n 's/^Done \([0-9]*\) runs.*/\1/p' "$log" | sed "s/^/fuzz: $target: /; s/\$/ inputs/"
    else
        tail -n 40 "$log" >&2
        echo "fuzz: $target failed; repeat it with: $program $(ls -t "$base/crashes/$target-"* 2>/dev/null | head -n 1)" >&2
        return 1
    fi
}

mkdir -p "$base/crashes"
# One on each core: a fuzzer has one thread.
failed=() cores=$(nproc)
declare -A running=()
finish_one() {
    local pid status=0
    wait -n -p pid || status=$?
    ((status == 0)) || failed+=("${running[$pid]}")
    unset "running[$pid]"
}
for target in "${targets[@]}"; do
    ((${#running[@]} < cores)) || finish_one
    fuzz "$target" &
    running[$!]=$target
done
while ((${#running[@]})); do finish_one; done
if ((${#failed[@]})); then
    echo "fuzz: failed: ${failed[*]}" >&2
    exit 1
fi
