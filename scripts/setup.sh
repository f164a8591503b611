#!/usr/bin/env bash
# Installs what the tests, the demo and the benchmark need on a Debian machine, and nothing else.
#
#   scripts/setup.sh [--check] [--demo] [--test] [--bench] [--cost] [--libvirt] [--ceph] [--etcd] [--systemd]
#
#   --demo           a QEMU that boots guests, plus a guest kernel and busybox (unpacked, never installed)
#   --bench          qemu-storage-daemon, nbdkit and qemu-nbd, the peers of the side-by-side benchmark
#   --cost           valgrind, which counts what a request costs
#   --libvirt        libvirtd for QEMU and virsh, without the system's own daemon: tests start theirs
#   --ceph           a monitor, an OSD and the client library of Ceph, for tests that start a cluster of their own; with
#                    --bench also QEMU's driver for it
#   --etcd           etcd and its client, for tests that start a cluster of their own. Where systemd runs, the package
#                    starts a member on port 2379, too: systemctl disable --now etcd
#   --systemd        systemd and systemd-nspawn, for tests that boot hosts whose init it is
#   --test           all seven, for the harness is tested on the peers, a C++ compiler for the fuzzer's runtime,
#                    libfaketime for clocks that jump, strace, curl and stunnel
#   --check          change nothing; list what is missing and exit 1 if anything is
#   (no purpose)     everything
#
# Always: libssl-dev and pkg-config, without which nothing is built.
#
# Safe to repeat, and fast when everything is there. Packages are installed by apt as root; without root the
# exact command is printed and the exit code is 2. The guest's files go to $CARGO_TARGET_DIR/guest
# (default: target/guest), with their checksums beside them.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$here/target}
case $target in /*) ;; *) target=$here/$target ;; esac
guest=$target/guest
backports_file=/etc/apt/sources.list.d/baton-backports.sources

# reconnect-ms, which the crash tests count on, appeared in this QEMU.
qemu_min=9.2
# In the order in which the guest's init loads them: virtio.ko needs virtio_ring.ko.
modules=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk)

check=0 want_guest=0 want_bench=0 want_cost=0 want_fuzz=0 want_clock=0 want_watch=0 want_libvirt=0 want_ceph=0 want_etcd=0 want_systemd=0
for arg in "$@"; do
    case $arg in
    --check) check=1 ;;
    --demo) want_guest=1 ;;
    --test) want_guest=1 want_bench=1 want_cost=1 want_fuzz=1 want_clock=1 want_watch=1 want_libvirt=1 want_ceph=1 want_etcd=1 want_systemd=1 ;;
    --bench) want_bench=1 ;;
    --cost) want_cost=1 ;;
    --libvirt) want_libvirt=1 ;;
    --ceph) want_ceph=1 ;;
    --etcd) want_etcd=1 ;;
    --systemd) want_systemd=1 ;;
    -h | --help)
        sed -n '2,26s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "setup: unknown argument '$arg'; see scripts/setup.sh --help" >&2
        exit 64
        ;;
    esac
done
if ((want_guest + want_bench + want_cost + want_libvirt + want_ceph + want_etcd + want_systemd == 0)); then want_guest=1 want_bench=1 want_cost=1 want_fuzz=1 want_clock=1 want_watch=1 want_libvirt=1 want_ceph=1 want_etcd=1 want_systemd=1; fi

say() { echo "setup: $*" >&2; }
die() {
    say "$*"
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
installed_version() { dpkg-query -W -f='${db:Status-Abbrev}${Version}\n' "$1" 2>/dev/null | sed -n 's/^ii *//p'; }
# "1:10.0.2+ds-2+deb13u1~bpo12+1" -> "10.0.2": upstream's version, by which packages of one QEMU build match.
upstream() { sed -E 's/^[0-9]+://; s/[-+~].*$//' <<<"$1"; }

guest_ok() {
    [[ -f $guest/SHA256SUMS ]] && (cd "$guest" && sha256sum --quiet -c SHA256SUMS >/dev/null 2>&1)
}

# ---- what is missing -------------------------------------------------------------------------------------

# True for a QEMU that was made by hand, or is new enough.
new_enough() {
    local v
    v=$(installed_version "$1")
    [[ -z $v ]] || dpkg --compare-versions "$(upstream "$v")" ge "$qemu_min"
}

missing=()
# Whatever is wanted is built first, and TLS for NBD is OpenSSL's.
have pkg-config || missing+=(pkg-config)
have pkg-config && pkg-config --exists openssl || [[ -e /usr/include/openssl/ssl.h ]] || missing+=(libssl-dev)
((want_guest)) && { ! have qemu-system-x86_64 || ! new_enough qemu-system-x86; } && missing+=(qemu-system-x86)
((want_bench)) && { ! have qemu-storage-daemon || ! have qemu-nbd; } && missing+=(qemu-utils)
((want_bench)) && ! have nbdkit && missing+=(nbdkit)
((want_cost)) && ! have valgrind && missing+=(valgrind)
((want_fuzz)) && ! have c++ && ! have g++ && ! have clang++ && missing+=(g++)
((want_clock)) && ! compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' >/dev/null && missing+=(libfaketime)
if ((want_watch)); then
    have strace || missing+=(strace)
    have curl || missing+=(curl)
    have stunnel4 || missing+=(stunnel4)
fi
if ((want_libvirt)); then
    # Its folder is not in everybody's PATH.
    have libvirtd || [[ -x /usr/sbin/libvirtd ]] || missing+=(libvirt-daemon)
    have virsh || missing+=(libvirt-clients)
    compgen -G '/usr/lib*/*/libvirt/connection-driver/libvirt_driver_qemu.so' >/dev/null ||
        compgen -G '/usr/lib*/libvirt/connection-driver/libvirt_driver_qemu.so' >/dev/null ||
        missing+=(libvirt-daemon-driver-qemu)
fi
if ((want_ceph)); then
    have ceph-mon || missing+=(ceph-mon)
    have ceph-osd || missing+=(ceph-osd)
    { have ceph && have rbd && have ceph-authtool; } || missing+=(ceph-common)
    # Loaded by the backend at run time.
    compgen -G '/usr/lib*/*/librbd.so.1' >/dev/null || compgen -G '/usr/lib*/librbd.so.1' >/dev/null || missing+=(librbd1)
fi
# The peer's driver for Ceph.
((want_ceph && want_bench)) && ! compgen -G '/usr/lib*/*/qemu/block-rbd.so' >/dev/null && missing+=(qemu-block-extra)
if ((want_etcd)); then
    have etcd || missing+=(etcd-server)
    have etcdctl || missing+=(etcd-client)
    have ip || missing+=(iproute2)
    have sysctl || missing+=(procps)
    # Makes the certificates of a test.
    have openssl || missing+=(openssl)
fi
if ((want_systemd)); then
    [[ -x /usr/lib/systemd/systemd ]] || missing+=(systemd)
    have systemd-nspawn || missing+=(systemd-container)
fi
need_guest=0
((want_guest)) && ! guest_ok && need_guest=1
if ((need_guest)); then
    have xz || missing+=(xz-utils)
fi
# The guest makes its filesystem with the host's own mke2fs, which the test copies with its libraries.
((want_guest)) && [[ ! -x /sbin/mke2fs ]] && missing+=(e2fsprogs)

if ((${#missing[@]} == 0 && need_guest == 0)); then
    say "everything is there"
    exit 0
fi
if ((check)); then
    for p in "${missing[@]}"; do say "missing: $p"; done
    ((need_guest)) && say "missing: the guest kernel in $guest"
    exit 1
fi
have apt-get || die "this script knows Debian's apt only; install by hand: ${missing[*]} and see the head of scripts/setup.sh"

# ---- packages --------------------------------------------------------------------------------------------

sudo=()
root=1
if ((EUID != 0)); then
    root=0
    if have sudo && sudo -n true 2>/dev/null; then sudo=(sudo) root=1; fi
fi

lists_present() { [[ -n $(apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: *//p' | grep -v '(none)') ]]; }
versions_of() { apt-cache madison "$1" 2>/dev/null | awk -F' *[|] *' '{print $2}'; }

# The machine's own Debian source with the suite replaced, so that mirrors and snapshots are kept.
backports_source() {
    local codename=$1 uris
    uris=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        awk -v c="$codename" '$1 == "deb" { i = 2; if ($2 ~ /^\[/) { while ($i !~ /\]$/) i++; i++ } if ($(i + 1) == c) print $i }' | head -n 1)
    local key=
    if [[ -z $uris ]]; then
        local out
        out=$(cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk -v c="$codename" '
            function flush() { if (uri != "" && (" " suites " ") ~ (" " c " ") && !done) { print uri "\t" key; done = 1 } uri = suites = key = "" }
            /^[ \t]*$/ { flush(); next }
            /^#/ { next }
            tolower($1) == "uris:" { uri = $2 }
            tolower($1) == "suites:" { $1 = ""; suites = $0 }
            tolower($1) == "signed-by:" { key = $2 }
            END { flush() }')
        uris=${out%%$'\t'*}
        key=${out#*$'\t'}
    fi
    [[ -n $uris ]] || return 1
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$uris" "$codename"
    if [[ -n $key ]]; then printf 'Signed-By: %s\n' "$key"; fi
}

apt_update() {
    if ((root)); then
        say "refreshing apt's package lists"
        "${sudo[@]}" apt-get update -qq || say "apt-get update reported a problem; going on with what it has"
    fi
}

# The name=version words for one QEMU package: the version of an installed sibling, so that the packages
# agree; else the newest.
pick_qemu() {
    local pkg=$1 sibling v
    for sibling in qemu-utils qemu-system-common qemu-system-x86; do
        v=$(installed_version "$sibling")
        # One that is too old is replaced with the rest.
        [[ -n $v ]] && new_enough "$sibling" || continue
        versions_of "$pkg" | awk -v want="$(upstream "$v")" '{ u = $0; sub(/^[0-9]+:/, "", u); sub(/[-+~].*$/, "", u); if (u == want) { print; exit } }'
        return
    done
    local best=
    for v in $(versions_of "$pkg"); do
        if [[ -z $best ]] || dpkg --compare-versions "$v" gt "$best"; then best=$v; fi
    done
    echo "$best"
}

qemu_good() {
    local v
    v=$(pick_qemu "$1")
    [[ -n $v ]] && dpkg --compare-versions "$(upstream "$v")" ge "$qemu_min"
}

if ((${#missing[@]})); then
    say "missing: ${missing[*]}"
    lists_present "${missing[0]}" || apt_update
    # What QEMU needs may come from backports; everything else comes from where the machine gets it anyway.
    words=() plain=()
    for p in "${missing[@]}"; do
        if [[ $p != qemu-* ]]; then
            plain+=("$p")
            continue
        fi
        if ! qemu_good "$p"; then
            codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
            if [[ ! -e $backports_file ]] && src=$(backports_source "$codename"); then
                if ((root)); then
                    say "adding $codename-backports (from this machine's own Debian source) to get a QEMU of at least $qemu_min: $backports_file"
                    printf '%s\n' "$src" | "${sudo[@]}" tee "$backports_file" >/dev/null
                    apt_update
                else
                    say "this needs $codename-backports; as root, write this to $backports_file and run 'apt-get update':"
                    printf '%s\n' "$src" >&2
                fi
            fi
        fi
        v=$(pick_qemu "$p")
        if [[ -n $v ]]; then
            words+=("$p=$v")
            # What it depends on must come from the same build, which apt's default pinning would not choose, and what
            # is installed of an older build gives way.
            [[ $p != qemu-system-x86 ]] || words+=("qemu-system-common=$v" "qemu-system-data=$v")
            for other in qemu-utils qemu-block-extra qemu-system-gui; do
                [[ $other == "$p" || -z $(installed_version $other) ]] || new_enough $other || words+=("$other=$v")
            done
        else
            words+=("$p")
        fi
    done
    opts=(--no-install-recommends -y)
    backports=()
    [[ -e $backports_file ]] && backports=(-t "$(sed -n 's/^Suites: //p' "$backports_file")")
    # -t lets the dependencies follow.
    cmd=(apt-get install "${opts[@]}" "${backports[@]}" "${words[@]}")
    plain_cmd=(apt-get install "${opts[@]}" "${plain[@]}")
    if ((!root)); then
        say "root is needed. Run:"
        echo "    sudo apt-get update" >&2
        if ((${#words[@]})); then echo "    sudo ${cmd[*]}" >&2; fi
        if ((${#plain[@]})); then echo "    sudo ${plain_cmd[*]}" >&2; fi
        exit 2
    fi
    apt_install() {
        local log
        log=$(mktemp)
        if ! DEBIAN_FRONTEND=noninteractive "${sudo[@]}" "$@" </dev/null >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            rm -f "$log"
            die "apt could not install this; the lines above say why. The command was: $*"
        fi
        rm -f "$log"
    }
    say "installing: ${words[*]} ${plain[*]}"
    if ((${#words[@]})); then apt_install "${cmd[@]}"; fi
    if ((${#plain[@]})); then apt_install "${plain_cmd[@]}"; fi
fi

# ---- the guest's kernel, modules and busybox -------------------------------------------------------------

# Unpacks package $1 into directory $2. apt checks the signature chain and the checksum of what it downloads.
fetch_deb() {
    local pkg=$1 into=$2 dl
    dl=$(mktemp -d "$target/fetch.XXXXXX")
    # apt downloads as the user _apt where it can, which must be able to write here.
    chmod 755 "$dl"
    if ! (cd "$dl" && apt-get download -qq -o APT::Sandbox::User=root "$pkg" >/dev/null 2>"$dl/err"); then
        cat "$dl/err" >&2
        rm -rf "$dl"
        die "apt could not download $pkg; run 'apt-get update' as root and try again"
    fi
    dpkg-deb -x "$dl"/*.deb "$into"
    rm -rf "$dl"
}

if ((need_guest)); then
    mkdir -p "$target"
    # Two runs at once would tread on each other; the second finds the work done.
    exec 9>"$target/.guest.lock"
    flock 9
    if ! guest_ok; then
        lists_present linux-image-cloud-amd64 || apt_update
        kernel=$(apt-cache depends --no-recommends --no-suggests linux-image-cloud-amd64 2>/dev/null |
            sed -n 's/^ *Depends: *\(linux-image-[0-9][^ ]*\).*/\1/p' | head -n 1)
        [[ -n $kernel ]] || die "apt knows no linux-image-cloud-amd64; run 'apt-get update' as root and try again"
        say "unpacking a guest into $guest (nothing is installed): $kernel, busybox-static"
        tmp=$(mktemp -d "$target/guest.XXXXXX")
        trap 'rm -rf "$tmp"' EXIT
        mkdir "$tmp/root" "$tmp/out" "$tmp/out/modules"
        fetch_deb "$kernel" "$tmp/root"
        fetch_deb busybox-static "$tmp/root"
        cp "$tmp"/root/boot/vmlinuz-* "$tmp/out/vmlinuz"
        for m in "${modules[@]}"; do
            f=$(find "$tmp/root" -name "$m.ko*" -print -quit)
            case $f in
            *.ko) cp "$f" "$tmp/out/modules/$m.ko" ;;
            *.ko.xz) xz -dc "$f" >"$tmp/out/modules/$m.ko" ;;
            *.ko.zst) zstd -qdc "$f" >"$tmp/out/modules/$m.ko" ;;
            # A kernel with the driver built in has no module for it.
            '') : ;;
            *) die "$kernel has $m in a form this script does not know: $f" ;;
            esac
        done
        printf '%s\n' "${modules[@]}" >"$tmp/out/modules.order"
        cp "$(find "$tmp/root" -path '*/bin/busybox' -print -quit)" "$tmp/out/busybox"
        echo "$kernel" >"$tmp/out/KERNEL"
        (cd "$tmp/out" && find . -type f ! -name SHA256SUMS | sort | xargs sha256sum >SHA256SUMS)
        rm -rf "$guest"
        mv "$tmp/out" "$guest"
    fi
    say "guest ready: $(cat "$guest/KERNEL")"
fi
