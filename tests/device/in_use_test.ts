// SPDX-License-Identifier: MIT
/** del looks first: a device in use is refused, with the name of its user, until --force. */

import assert from "node:assert/strict";
import { type Added, deviceTest, gone, type Scene } from "./helpers.ts";

async function refuses(scene: Scene, device: Added, user: RegExp): Promise<void> {
  const { code, stderr } = await scene.ubd("del", `${device.id}`);
  assert.equal(code, 4, stderr);
  assert.match(stderr, /^ubd: Cannot delete on device \d+: EBUSY/);
  assert.match(stderr, user);
  const { stdout } = await scene.ubd("list", "-n", `${device.id}`);
  assert.match(stdout, /state LIVE/);
}

deviceTest("del refuses a device that is mounted, swap, held or open, and names who", {
  anyKernel: true,
  limitS: 240,
}, async (scene) => {
  const device = await scene.add("loop", scene.image("disk", 64 << 20));
  await scene.sh(`mkfs.ext4 -q ${device.path}`);

  const point = await scene.mount("point", device.path);
  await refuses(scene, device, new RegExp(`${device.path} is mounted on .*/point`));
  await scene.sh(`umount ${point}`);

  const other = scene.start([
    "unshare",
    "-m",
    "bash",
    "-c",
    `mount ${device.path} /mnt && sleep 60`,
  ]);
  await scene.sh("sleep 2");
  await refuses(scene, device, /is mounted on \/mnt/);
  other.kill("SIGKILL");
  await other.ended;

  const loop = await scene.sh(`losetup --find --show ${device.path}`);
  await refuses(scene, device, new RegExp(`${device.path} is held by ${loop}`));
  await scene.sh(`losetup -d ${loop}`);

  await scene.sh(`modprobe dm_mod
    dmsetup create --noudevsync ubd-linear --table "0 2048 linear ${device.path} 0"`);
  await refuses(scene, device, new RegExp(`${device.path} is held by /dev/dm-\\d+`));
  await scene.sh("dmsetup remove --noudevsync ubd-linear");

  await scene.sh(`mkswap ${device.path}; swapon ${device.path}`);
  await refuses(scene, device, new RegExp(`${device.path} is swap`));
  await scene.sh(`swapoff ${device.path}`);

  // File systems with a part of them on another device: no mount names that one by its number.
  const main = scene.image("main", 400 << 20);
  const mainLoop = await scene.losetup(main);
  await scene.sh(`mke2fs -q -F -b 4096 -O journal_dev ${device.path}
    mkfs.ext4 -q -b 4096 -J device=${device.path} ${mainLoop}`);
  const journaled = await scene.mount("journaled", mainLoop);
  await refuses(scene, device, new RegExp(`${device.path} is the journal of a mounted`));
  await scene.sh(`umount ${journaled}; wipefs -qa ${device.path} ${mainLoop}`);
  await scene.sh(`mkfs.xfs -q -f -l logdev=${device.path} ${mainLoop}`);
  const logged = await scene.mount("logged", "-o", `logdev=${device.path}`, mainLoop);
  await refuses(scene, device, new RegExp(`${device.path} is the logdev of .*/logged`));
  await scene.sh(`umount ${logged}`);

  const reader = scene.start(["bash", "-c", `exec sleep 600 < ${device.path}`]);
  await scene.sh("sleep 0.5");
  await refuses(scene, device, /is open in process \d+ \(sleep\)/);
  const { code, stderr } = await scene.ubd("del", "--force", `${device.id}`);
  assert.equal(code, 0, stderr);
  scene.forget(device);
  await gone(device);
  reader.kill("SIGKILL");
  await reader.ended;
});
