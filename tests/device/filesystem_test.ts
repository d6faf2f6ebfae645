// SPDX-License-Identifier: MIT
/** File systems on a loop device, and what others then find in the image. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { deviceTest, scaled, type Scene } from "./helpers.ts";

const MAKE = { ext4: "mkfs.ext4 -q", xfs: "mkfs.xfs -q" };

async function sums(scene: Scene, point: string): Promise<string> {
  return await scene.sh(`cd ${point} && sha256sum data copies/*`);
}

async function surviveUnmounts(scene: Scene, type: keyof typeof MAKE): Promise<void> {
  const image = scene.image(`${type}.img`, type === "xfs" ? 320 << 20 : scaled(64, 192) << 20);
  const device = await scene.add("loop", image, "-q", "2");
  assert.match(device.stdout, /ublkc: [1-9]\d*:\d+ ublkb: [1-9]\d*:\d+/);
  await scene.sh(`${MAKE[type]} ${device.path}`);
  const point = join(scene.directory, "point");
  const written = await scene.sh(
    `mkdir ${point}; mount ${device.path} ${point}; cd ${point}; mkdir copies
     head -c ${scaled(6, 64)}M /dev/urandom > data
     for n in 1 2 3 4; do head -c 300001 data > copies/$n; done
     truncate -s 7 copies/4
     sha256sum data copies/*; cd /; umount ${point}`,
  );
  await scene.sh(`mount ${device.path} ${point}`);
  assert.equal(await sums(scene, point), written, "after a remount");
  await scene.sh(`fstrim ${point}; umount ${point}; mount ${device.path} ${point}`);
  assert.equal(await sums(scene, point), written, "after fstrim");
  await scene.sh(`umount ${point}`);
  await scene.del(device);

  const direct = await scene.mount("direct", "-o loop,ro", image);
  assert.equal(await sums(scene, direct), written, "in the image itself");
  if (type === "ext4") await scene.sh(`umount ${direct}; fsck.ext4 -f -n ${image}`);
}

deviceTest("ext4 on a loop device keeps its files, through remounts and in the image", {
  limitS: 300,
  oldest: true,
}, (scene) => surviveUnmounts(scene, "ext4"));

deviceTest("xfs on a loop device keeps its files, through remounts and in the image", {
  limitS: 300,
  skip: scaled<string | false>("only at full scale", false),
}, (scene) => surviveUnmounts(scene, "xfs"));
