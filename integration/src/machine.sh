#!/usr/bin/env bash
# Boots systemd in a container on this machine's own root, none of which it can change.
#
#   unshare --mount machine.sh DIR NAME BIN
#
#   DIR   test's directory, the same inside; DIR/NAME/units and DIR/NAME/baton are /etc/systemd/system and /etc/baton
#   BIN   where baton's programs are, which are in /usr/bin inside
#
# Only these units of the system are there: a whole Debian would set this kernel's parameters and empty its /tmp.
# The network is this machine's.
set -euo pipefail
dir=$1 name=$2 bin=$3
system=(sysinit.target basic.target multi-user.target network-online.target sockets.target paths.target timers.target
    slices.target shutdown.target umount.target final.target exit.target systemd-exit.service
    systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket)

# A branch of its own in the tree of cgroups, or units of two machines would be in one.
cgroups=$(findmnt --noheadings --first-only --types cgroup2 --output TARGET)
mkdir "$cgroups/baton-$name-$$"
echo $$ >"$cgroups/baton-$name-$$/cgroup.procs"

mount --make-rprivate /
# On another filesystem than the root, of which it shows the changes.
scratch=$dir/$name/scratch root=$dir/$name/scratch/root
mkdir -p "$scratch"
mount -t tmpfs -o size=512m tmpfs "$scratch"
mkdir "$scratch/changes" "$scratch/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$scratch/changes,workdir=$scratch/work" overlay "$root"
mkdir -p "$root/etc/baton"
for empty in usr/lib/systemd/system usr/lib/systemd/system-generators etc/systemd/system etc/baton var/lib; do
    mount -t tmpfs tmpfs "$root/$empty"
done
for unit in "${system[@]}"; do cp "/usr/lib/systemd/system/$unit" "$root/usr/lib/systemd/system/"; done
mkdir "$root/usr/lib/systemd/system/sysinit.target.wants"
ln -s ../systemd-journald.service "$root/usr/lib/systemd/system/sysinit.target.wants/"
cp -r "$dir/$name/units/." "$root/etc/systemd/system/"
cp -r "$dir/$name/baton/." "$root/etc/baton/"
# Comes with udev.
grep -q ^kvm: "$root/etc/group" || echo 'kvm:x:995:' >>"$root/etc/group"
: >"$root/etc/machine-id"

binds=("--bind=$dir:$dir")
for program in baton baton-agent baton-backend baton-coordinator baton-storage; do
    : >"$root/usr/bin/$program"
    binds+=("--bind-ro=$bin/$program:/usr/bin/$program")
done
# Its own filter of system calls is not what is tested, and forbids io_uring.
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_SECCOMP=0
exec systemd-nspawn --quiet --directory="$root" --machine="$name" --uuid="$(tr -d - </proc/sys/kernel/random/uuid)" \
    --register=no --keep-unit --link-journal=no --console=pipe "${binds[@]}" --boot systemd.unit=multi-user.target
