#!/usr/bin/env bash
# A target directory beside the usual one, for a build that differs in this workspace only: what was compiled of other
# people's crates is taken over, not compiled again. Nothing is done when it is there, or when there is nothing to take.
#
#   scripts/seed-target.sh TARGET_DIR NEW_TARGET_DIR
set -euo pipefail

from=$1/debug to=$2/debug
[[ -d $from/.fingerprint && ! -e $to ]] || exit 0
mkdir -p "$2"
# Whoever is ended on the way leaves nothing that looks whole.
part=$(mktemp -d "$2/seed.XXXXXX")
mkdir "$part/deps"
cp -a "$from/.fingerprint" "$from/build" "$part/"
compiled=(-maxdepth 1 \( -name '*.rlib' -o -name '*.rmeta' -o -name '*.d' -o -name '*.so' \))
# Links take no space, and nobody writes to these files again; ours are compiled again and are copies.
find "$from/deps" "${compiled[@]}" ! -name '*baton*' -exec cp -al -t "$part/deps" {} +
find "$from/deps" "${compiled[@]}" -name '*baton*' -exec cp -a -t "$part/deps" {} +
mv "$part" "$to"
chmod 755 "$to"
