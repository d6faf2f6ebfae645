// SPDX-License-Identifier: MIT
/**
 * What was flushed, or written with FUA, survives the loss of the server and of power.
 *
 * Power is cut where it counts: the file system that holds the image is told to shut down at once
 * (the ioctl that xfstests uses), which throws away all that it has not yet made durable, page
 * cache included. A control shows that unflushed data is indeed lost that way.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { blockStat, deviceTest, killServer, queueSetting, type Scene } from "./helpers.ts";

/** EXT4_IOC_SHUTDOWN, or XFS_IOC_GOINGDOWN, with "do not flush the log". */
const CUT_POWER = `perl -e 'my $how = pack "L", 2; open F, "<", $ARGV[0] or die; ` +
  `ioctl F, 0x8004587d, $how or die "shutdown: $!"'`;

const FLUSHES = 15;

/** A file system of its own for the image, whose power can be cut. @returns mount point, disk. */
async function makeBacking(scene: Scene): Promise<{ point: string; disk: string }> {
  const disk = await scene.losetup(scene.image("backing", 128 << 20));
  await scene.sh(`mkfs.ext4 -q -O ^metadata_csum ${disk}`);
  return { point: await scene.mount("backing-point", disk), disk };
}

for (const mode of ["direct", "buffered"]) {
  deviceTest(`FLUSH and FUA are durable with ${mode} I/O`, {
    anyKernel: mode === "buffered",
  }, async (scene) => {
    // Nothing may reach the disk just because it is old.
    const expire = await scene.sh("cat /proc/sys/vm/dirty_expire_centisecs");
    scene.finally(() => scene.sh(`echo ${expire} > /proc/sys/vm/dirty_expire_centisecs`));
    await scene.sh("echo 100000 > /proc/sys/vm/dirty_expire_centisecs");
    const { point, disk } = await makeBacking(scene);
    const image = `${point}/disk.img`;
    await scene.sh(`truncate -s 48M ${image}; sync -f ${point}
      for n in flushed fua lost; do head -c 2M /dev/urandom > $n; done`);
    const device = await scene.add("loop", image, ...(mode === "buffered" ? ["--buffered"] : []));
    assert.equal(queueSetting(device, "fua"), "1");
    assert.equal(queueSetting(device, "write_cache"), "write back");

    const upper = join(scene.directory, "upper");
    await scene.sh(
      `dd status=none if=flushed of=${device.path} bs=64k seek=32M oflag=seek_bytes conv=fsync
       mkfs.ext4 -q -E lazy_itable_init=0 -O ^has_journal ${device.path} 16M
       mkdir ${upper}; mount -o noinit_itable ${device.path} ${upper}
       dd status=none if=/dev/zero of=${upper}/fua bs=1M count=2 conv=fsync; sync -f ${upper}`,
    );
    // Overwriting in place, the file system needs FUA and nothing else.
    const before = blockStat(device)[FLUSHES];
    await scene.sh(`dd status=none if=fua of=${upper}/fua bs=64k oflag=direct,dsync conv=notrunc`);
    assert.equal(blockStat(device)[FLUSHES], before, "FUA writes need no FLUSH");
    await scene.sh(
      `dd status=none if=lost of=${device.path} bs=64k seek=640 oflag=direct conv=notrunc`,
    );
    assert.equal(blockStat(device)[FLUSHES], before, "nobody else asked for a FLUSH");
    await scene.sh(`${CUT_POWER} ${point}`);
    await killServer(scene, device);
    await scene.run(["umount", upper]);
    await scene.del(device);

    await scene.sh(`umount ${point}; echo 3 > /proc/sys/vm/drop_caches; mount ${disk} ${point}
      cmp -n 2M -i 0:32M flushed ${image}`);
    await scene.sh(`mount -o loop,ro ${image} ${upper}; cmp fua ${upper}/fua; umount ${upper}`);
    const lost = await scene.run(["cmp", "-n", "2M", "-i", "0:40M", "lost", image]);
    if (mode === "buffered") assert.equal(lost.code, 1, "the control: power was really cut");
  });
}
