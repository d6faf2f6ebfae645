#!/bin/sh
# SPDX-License-Identifier: MIT
#
# The demo's steps, on the host or in a guest: a file becomes a block device, is formatted,
# mounted, written, read back three ways, and everything is gone afterwards. Needs `ubd` in PATH.
set -eu

say() { printf '\n# %s\n' "$*"; }
run() { printf '$ %s\n' "$*" && "$@"; }
sum() { sha256sum | cut -d ' ' -f 1; }

directory=$(mktemp -d "${TMPDIR:-/var/tmp}/ubd-demo-XXXXXX")
id=
clean_up() {
  status=$?
  trap - EXIT
  mountpoint -q "$directory/mnt" && umount "$directory/mnt"
  [ -z "$id" ] || ubd del -n "$id"
  rm -rf "$directory"
  exit "$status"
}
trap clean_up EXIT
cd "$directory"
mkdir mnt

say "A file of 256 MiB becomes a block device"
run truncate -s 256M disk.img
run ubd add loop disk.img | tee added
id=$(sed -n 's/^dev id \([0-9]*\):.*/\1/p' added)
device=/dev/ublkb$id

say "Format it, mount it, write 64 MiB of random data"
run mkfs.ext4 -q "$device"
run mount "$device" mnt
printf '$ head -c 64M /dev/urandom | tee mnt/data | sha256sum\n'
written=$(head -c 64M /dev/urandom | tee mnt/data | sum)
echo "$written  as written"

say "Unmount, mount again, read back"
run umount mnt
run mount "$device" mnt
read_back=$(sum < mnt/data)
echo "$read_back  after the second mount"
run findmnt -no SOURCE,TARGET,FSTYPE,SIZE mnt
run umount mnt

say "Delete the device; read the same file straight from the image"
run ubd del -n "$id"
deleted=$id
id=
from_image=$(debugfs -R "cat /data" disk.img 2>/dev/null | sum)
echo "$from_image  from disk.img itself"

[ "$written" = "$read_back" ] && [ "$written" = "$from_image" ] || {
  echo "The three sums differ." >&2
  exit 1
}

say "Nothing is left"
for trace in "$device" "/dev/ublkc$deleted" "/run/ubd/$deleted.json"; do
  [ ! -e "$trace" ] || { echo "$trace is still there" >&2; exit 1; }
  echo "gone: $trace"
done
if pgrep -f '__serve$' >/dev/null && [ -z "$(ubd list)" ]; then
  echo "a server process is still there" >&2
  exit 1
fi
echo "gone: the server process"
