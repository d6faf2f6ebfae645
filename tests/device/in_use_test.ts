// SPDX-License-Identifier: MIT
/** del looks first: a device in use is refused, with the name of its user, until --force. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import process from "node:process";
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
  const logged = await scene.mount("logged", "-t xfs -o", `logdev=${device.path}`, mainLoop);
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

deviceTest("del sees users under any other name of the device, and never stops it under them", {
  anyKernel: true,
  limitS: 300,
}, async (scene) => {
  const device = await scene.add("loop", scene.image("disk", 64 << 20));
  const node = `${scene.directory}/node`;
  const mknod = () => scene.sh(`mknod ${node} b $(tr : ' ' < /sys/block/ublkb${device.id}/dev)`);
  await mknod();
  await scene.sh(`mkswap ${node}; swapon ${node}`);
  await refuses(scene, device, new RegExp(`${device.path} is swap, as ${node}`));
  await scene.sh(`rm ${node}`);
  await refuses(scene, device, /may be the swap .*whose node is not found|somebody has it open/);
  await mknod();
  await scene.sh(`swapoff ${node}; mkfs.ext4 -q ${node}`);

  const inChroot = scene.start([
    "unshare",
    "-m",
    "bash",
    "-c",
    `mkdir -p root/dev; mount --bind / root; mount --bind /dev root/dev
    exec chroot root bash -c 'mount ${device.path} /mnt && exec sleep 600'`,
  ]);
  await scene.sh("sleep 2");
  await refuses(scene, device, /is mounted on \/mnt|is mounted on \S*root\/mnt/);
  inChroot.kill("SIGKILL");
  await inChroot.ended;

  const reader = scene.start(["bash", "-c", `exec 5< ${node}; rm ${node}; exec sleep 600`]);
  await scene.sh("sleep 0.5");
  await refuses(scene, device, new RegExp(`is open as ${node} \\(deleted\\) in process \\d+`));

  // Its id stays taken as long as that reader lives, and everybody says so.
  const forced = await scene.ubd("del", "--force", `${device.id}`);
  assert.equal(forced.code, 0, forced.stderr);
  scene.forget(device);
  const taken = /is deleted.*its id is free when the last one lets go: .*process \d+ \(sleep\)/;
  assert.match(forced.stderr, taken);
  await mknod().catch(() => {}); // It is in /sys no more.
  for (
    const command of [["list"], ["del", `${device.id}`], ["add", "null", "-n", `${device.id}`]]
  ) {
    const { code, stderr } = await scene.ubd(...command);
    assert.equal(code, command[0] === "list" ? 0 : 4, stderr);
    assert.match(stderr, /its id is free when the last one lets go/);
    assert.doesNotMatch(stderr, /delete that device/);
  }
  const info = await scene.ubd("info", `${device.id}`);
  assert.match(info.stdout, /^deleted +its id is free when the last one lets go/m);
  reader.kill("SIGKILL");
  await reader.ended;
  const again = await scene.add("null", "-n", `${device.id}`);
  await scene.del(again);
});

deviceTest("a stopped server: del says so at once, and --force ends it before it says success", {
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 16 << 20);
  const device = await scene.add("loop", image);
  process.kill(device.pid, "SIGSTOP");
  const refused = await scene.ubd("del", `${device.id}`);
  assert.equal(refused.code, 4, refused.stderr);
  assert.match(refused.stderr, new RegExp(`is stopped.*kill -CONT ${device.pid} .*--force`));
  const forced = await scene.ubd("del", "--force", `${device.id}`);
  assert.equal(forced.code, 0, forced.stderr);
  assert.ok(!existsSync(`/proc/${device.pid}`), "success before the server was gone");
  scene.forget(device);
  await scene.del(await scene.add("loop", image)); // Its lock has gone, too.
});

deviceTest("del ends at SIGTERM, whatever is waited for, and says how the device is", {
  anyKernel: true,
  limitS: 240,
}, async (scene) => {
  // A disk that answers nothing for a while: who has asked it cannot even be killed.
  const disk = await scene.losetup(scene.image("disk", 16 << 20));
  await scene.sh(`modprobe dm_mod
    dmsetup create --noudevsync ubd-slow --table "0 32768 linear ${disk} 0"`);
  const resume = () => scene.sh("dmsetup resume --noudevsync ubd-slow");
  const device = await scene.add("loop", "/dev/mapper/ubd-slow");
  await scene.sh("dmsetup suspend --noudevsync ubd-slow");
  try {
    const read = ["dd", `if=${device.path}`, "of=/dev/null", "bs=4k", "count=1", "iflag=direct"];
    const reader = scene.start(read);
    await scene.sh("sleep 1");
    const said = await scene.sh(`ubd del --force ${device.id} 2> told & pid=$!
      until grep -q 'takes its time' told; do sleep 0.2; done
      kill -TERM $pid; wait $pid && false || echo "exit $?"; cat told`);
    assert.match(
      said,
      /takes its time: its server, process \d+, .*one request waits for an answer/,
    );
    assert.match(said, /^exit 130$/m);
    assert.match(said, new RegExp(`interrupted; device ${device.id} is being stopped`));
    const again = scene.ubd("del", "--force", `${device.id}`);
    await scene.sh("sleep 3");
    await resume();
    const { code, stderr } = await again;
    assert.equal(code, 0, stderr);
    scene.forget(device);
    await reader.ended;
  } finally {
    await resume();
    await scene.sh("dmsetup remove --retry --noudevsync ubd-slow");
  }
});
