#!/bin/busybox sh
# SPDX-License-Identifier: MIT
#
# First program of a guest: loads what the root file system needs, mounts it, and hands over to
# init.sh in the checkout, which the host shares. Packed into the initrd by vm_images.ts.

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc

# vm.ts asks this way whether the host's KVM can run this kernel at all.
if grep -q ubd.probe /proc/cmdline; then
  echo "ubd: alive"
  reboot -f
fi

while read -r module; do
  insmod "/$module" || echo "ubd: cannot load $module"
done < /modules

# The checkout does not change while a guest looks at it, so whatever was read may be kept.
mount -t ext4 -o noatime /dev/vda /root &&
  mount -t ext4 -o ro,noatime /dev/vdb /root/usr/lib/modules &&
  mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose ubd /root/ubd &&
  umount /proc &&
  mount -o move /dev /root/dev &&
  exec switch_root /root /ubd/tools/guest/init.sh
echo "ubd: cannot mount the root file system"
reboot -f
