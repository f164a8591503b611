#!/usr/bin/env bash
# Tests on the Ceph, etcd, QEMU and NBD servers of Debian 13, on a machine that has others: in a root of its own, which
# holds nothing but Debian's packages and is not booted.
#
#   scripts/on-debian13.sh [TEST...]          test programs by their names; without one, those of engines and of guests
#   scripts/on-debian13.sh --bench [ARG...]   measures images of Ceph there; ARG as `baton-bench compare --help` has it
#
# Needs root and debootstrap. The root (1 GB, a minute) is made once, in $CARGO_TARGET_DIR/debian13 (default:
# target/debian13). The programs are built here and run there; what they said is in debian13-*.log beside the root.
# BATON_TEST_ARGS goes to each test program. Ends with "N passed, N failed".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in /*) ;; *) target=$PWD/$target ;; esac
root=$target/debian13
# Engines, what boots guests, and what tests watch with.
packages=(
    ceph-mon ceph-osd ceph-common librbd1 etcd-server etcd-client nbdkit
    qemu-system-x86 qemu-utils qemu-block-extra e2fsprogs libvirt-daemon libvirt-clients libvirt-daemon-driver-qemu
    iproute2 procps openssl curl strace stunnel4
)
# Debian 13's libfaketime hangs in the start of a program with a malloc of its own, which the backend is.
without=(--skip f13_a_guest_moves_between_hosts_whose_clocks_jump)
bench=0 tests=("$@")
[[ ${1:-} == --bench ]] && bench=1
((${#tests[@]})) || tests=(
    client_on_ceph direct_reads_on_ceph fence_on_ceph maintenance_on_ceph handoff_on_ceph guest_on_ceph
    coordinators_on_etcd journal_on_etcd etcd_partition
    guest_on_nbd cooperative copy
    device guest_on_file guest_on_qsd migration_on_baton cluster handoff_on_baton scenarios storms trouble libvirt_on_baton
)

say() { echo "on-debian13: $*" >&2; }
((EUID == 0)) || { say "only root may make and enter a root: run it as root" && exit 2; }
command -v debootstrap >/dev/null || { say "debootstrap is missing: apt-get install debootstrap" && exit 1; }

# What is mounted here is gone with the namespace, whose last process may be a test's.
if [[ ${BATON_IN_NAMESPACE:-} != $$ ]]; then
    # shellcheck disable=SC2016
    exec unshare --mount sh -c 'BATON_IN_NAMESPACE=$$ exec "$0" "$@"' "scripts/on-debian13.sh" "$@"
fi

inside() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"; }

if [[ ! -e $root/complete ]]; then
    say "making $root"
    rm -rf "$root"
    mkdir -p "$root"
    # The mirror that this machine uses.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -n 1 || true)
    debootstrap --variant=minbase trixie "$root" ${mirror:+"$mirror"} >"$target/debian13.log" 2>&1 ||
        { say "debootstrap failed: $target/debian13.log" && exit 1; }
    # How this machine reaches it. Other settings name programs that are not in there.
    { apt-config dump | grep -E '^Acquire::(https?|Check-)' || true; } >"$root/etc/apt/apt.conf.d/80host"
    # Nothing is started in there but what tests start.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod +x "$root/usr/sbin/policy-rc.d"
    mount -t proc proc "$root/proc"
    { inside apt-get update && inside DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "${packages[@]}"; } >>"$target/debian13.log" 2>&1 ||
        { say "the packages cannot be installed: $target/debian13.log" && exit 1; }
    umount "$root/proc"
    touch "$root/complete"
fi

say "building"
if ((bench)); then
    cargo build --quiet --release --workspace --bins
else
    scripts/setup.sh --demo
    cargo build --quiet --workspace --bins
    flags=()
    for test in "${tests[@]}"; do flags+=(--test "$test"); done
    # "  Executable tests/cluster.rs (target/debug/deps/cluster-0123456789abcdef)", of each test.
    programs=$(cargo test --workspace --no-run "${flags[@]}" 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p') ||
        { say "cannot be built: cargo test --workspace --no-run ${flags[*]}" && exit 1; }
fi

# Its root is a mount, or nothing in there could have mounts of its own.
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mkdir -p "$root$PWD" "$root$target" "$root/run/netns"
mount --bind "$PWD" "$root$PWD"
[[ $target == "$PWD"/* ]] || mount --bind "$target" "$root$target"

if ((bench)); then
    inside sh -c 'ceph --version; qemu-storage-daemon --version | head -n 1'
    inside BATON_BIN_DIR="$target/release" CARGO_TARGET_DIR="$target" sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" \
        "$target/release/baton-bench" compare --a baton-rbd --b qsd-rbd --only 4k --commit "$(git rev-parse --short HEAD)" "${@:2}"
    exit
fi

inside sh -c 'ceph --version; etcd --version | head -n 1; qemu-system-x86_64 --version | head -n 1; nbdkit --version; libvirtd --version'
passed=0 failed=0
for program in $programs; do
    case $program in /*) ;; *) program=$PWD/$program ;; esac
    # With its hash: two crates may have tests of one name.
    log=$target/debian13-$(basename "$program").log
    echo "== $(basename "${program%-*}")"
    status=0
    # shellcheck disable=SC2086
    inside BATON_BIN_DIR="$target/debug" BATON_REQUIRE_QEMU=1 CARGO_TARGET_DIR="$target" \
        sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD/integration" "$program" --test-threads 3 "${without[@]}" ${BATON_TEST_ARGS:-} \
        >"$log" 2>&1 || status=$?
    result=$(sed -n 's/^test result: [a-zA-Z]*\. \([0-9]*\) passed; \([0-9]*\) failed.*/\1 \2/p' "$log" | tail -n 1)
    read -r p f <<<"${result:-0 1}"
    echo "   $p passed, $f failed"
    ((status == 0)) || tail -n 100 "$log"
    passed=$((passed + p)) failed=$((failed + f))
done
echo
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
