#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Init of a guest: makes the system a command expects, runs the command, reports its exit status,
# and ends the guest. Started by initrd.sh.
#
# /run/host is a directory of the host (see vm.ts): `env` (shell assignments) and `command` come
# from there; `started`, `dmesg` and `status` go there. The command's output goes to the virtio
# port `ubd`, an interactive shell lives on the virtio console; the serial console belongs to the
# kernel.

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mount -t tmpfs -o nosuid,nodev,mode=755 run /run
mount -t tmpfs -o nosuid,nodev tmp /tmp
mkdir -p /dev/pts /dev/shm /run/host
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev shm /dev/shm
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
mount -t 9p -o trans=virtio,version=9p2000.L,cache=none host /run/host
. /run/host/env

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root USER=root
export SHELL=/bin/bash
hostname ubd-guest
ip link set lo up
ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%:*}" "/dev/${n#*:}"; done
ln -sf /ubd/node_modules/.bin/bun /ubd/node_modules/.bin/deno /usr/local/bin
printf '#!/bin/sh\nexec %s "$@"\n' "$UBD_COMMAND" > /usr/local/bin/ubd
chmod +x /usr/local/bin/ubd

/lib/systemd/systemd-udevd --daemon --children-max=4
# On 6.1 the driver of the command's channel is a module.
modprobe -a loop virtio_console $UBD_MODULES
# Not every device there is: drivers for all of the machine would cost seconds to load.
udevadm trigger --action=add --subsystem-match=block --subsystem-match=misc \
  --subsystem-match=virtio-ports
udevadm settle
mount -o noatime,noinit_itable /dev/vdc /scratch
if [ -n "$UBD_RESULTS" ]; then
  mount -t 9p -o trans=virtio,version=9p2000.L,cache=none results /results
fi
cd /scratch

finish() {
  dmesg > /run/host/dmesg
  echo "$1" > /run/host/status
  # Leaves at once, whatever hangs: the host turns the reboot into the end of the guest.
  echo b > /proc/sysrq-trigger
}

# From here on kernel messages are news, and worth having on the host even if the guest dies.
dmesg -n 7
: > /run/host/started
if [ -n "$UBD_SHELL" ]; then
  # The console forgets its size when nobody holds it open.
  setsid -c sh -c "stty $UBD_SHELL; exec bash" < /dev/hvc0 > /dev/hvc0 2>&1
  finish $?
fi
(
  sleep "$UBD_TIMEOUT"
  echo w > /proc/sysrq-trigger
  finish timeout
) &
bash /run/host/command < /dev/null > /dev/virtio-ports/ubd 2>&1
finish $?
