// SPDX-License-Identifier: MIT
/** Mistakes and failures: each has a message that helps, its exit code, and leaves nothing. */

import assert from "node:assert/strict";
import { readdirSync, statSync } from "node:fs";
import { deviceTest, FULL, inPairs, KERNEL, RUNNER, type Scene, until } from "./helpers.ts";

const EXIT = { FAILURE: 1, USAGE: 2, NO_DEVICE: 3, BUSY: 4, PERMISSION: 5, NO_DRIVER: 6 };

/** Runs a command line that must fail so. `$D` is the scene's directory. */
async function fails(scene: Scene, command: string, code: number, message: RegExp): Promise<void> {
  const script = `D=${scene.directory}; ${command}`;
  const outcome = await scene.run(["bash", "-c", script]);
  const said = `${command}: code ${outcome.code}, ${outcome.stderr}${outcome.stdout}`;
  assert.equal(outcome.code, code, said);
  assert.match(outcome.stderr, message, said);
  assert.match(outcome.stderr, /^ubd: /, said);
  assert.doesNotMatch(outcome.stderr, /\bat .*\(.*:\d+:\d+\)|bug in ubd/, said);
  assert.equal(outcome.stdout, "", said);
}

async function allFail(scene: Scene, cases: [string, number, RegExp][]): Promise<void> {
  await inPairs(cases.length, (round) => fails(scene, ...cases[round]!));
}

/** What anybody gets wrong sooner or later. */
const USAGE_CASES: [string, RegExp][] = [
  ["ubd add null --frob", /unknown option '--frob'/],
  ["ubd add null -q 0", /Number of queues 0: it must be from 1 to 4096/],
  ["ubd add null --size 10Q", /Size "10Q": say bytes, or a number with K/],
  ["ubd add loop $D/disk --ro --offset 2M", /Offset 2097152: .*ends at 1048576 bytes/],
  ["ubd add loop $D/empty", /it is empty \(truncate -s/],
  ["ubd add loop $D/small", /511 bytes .* less than a sector/],
];

/** The same, where the device has no part in it: for the large run. */
const MORE_USAGE_CASES: [string, RegExp][] = [
  ["ubd frobnicate", /unknown command 'frobnicate'/],
  ["ubd add", /Which target\? ubd add null/],
  ["ubd add nill", /Unknown target "nill": there are null, loop, /],
  ["ubd add loop", /Which file\? ubd add loop FILE/],
  ["ubd add null $D/small", /for loop/],
  ["ubd add null -d 4097", /Queue depth 4097: it must be from 1 to 4096/],
  ["ubd add null -d many", /Queue depth "many": it must be a whole number/],
  ["ubd add null --size 1000", /Size 1000: it must be a multiple of the 512-byte block/],
  ["ubd add null --block-size 8192", /Block size 8192: it must be 512, 1024, 2048 or 4096/],
  ["ubd add loop $D/disk --ro --size 2M", /Size 2097152: .* has 1048576 bytes/],
  ["ubd add loop /dev/null", /neither a regular file nor a block device/],
  ["ubd del -n 0 -a", /not both/],
  ["ubd del --number", /argument missing/],
];

const OTHER_CASES: [string, number, RegExp][] = [
  ["ubd add loop $D/absent", EXIT.FAILURE, /open .*absent: ENOENT.*check the path/],
  ["ubd add loop $D/absent --supervise", EXIT.FAILURE, /open .*absent: ENOENT.*check the path/],
  ["ubd add loop $D", EXIT.FAILURE, /EISDIR/],
  ["ubd add loop $D/fixed", EXIT.PERMISSION, /open .*fixed: EPERM.*add --ro/],
  ["ubd del -n 999", EXIT.NO_DEVICE, /GET_DEV_INFO on device 999: ENODEV.*ubd list shows all/],
  ["ubd list -n 999", EXIT.NO_DEVICE, /device 999: ENODEV/],
  ["ubd info /dev/ublkb999", EXIT.NO_DEVICE, /device 999: ENODEV/],
  [
    "setpriv --reuid 65534 --regid 65534 --clear-groups ubd list",
    EXIT.PERMISSION,
    /open the control device: EACCES.*run as root/,
  ],
  ["UBD_DEBUG_EXIT=added ubd add null", EXIT.FAILURE, /server ended with code 70/],
  ["UBD_DEBUG_EXIT='queues started' ubd add null", EXIT.FAILURE, /server ended with code 70/],
  ["UBD_DEBUG_EXIT=started ubd add null", EXIT.FAILURE, /server ended with code 70/],
];

/** The driver of Linux 6.12 warns of it in the kernel's log. */
const DIES_FETCHING: [string, number, RegExp] = [
  "UBD_DEBUG_EXIT=fetching ubd add null -d 9",
  EXIT.FAILURE,
  /server ended with SIGKILL/,
];

deviceTest("what cannot start says why, with its exit code, and leaves nothing", {
  limitS: 300,
  anyKernel: true,
}, async (scene) => {
  await scene.sh("truncate -s 1M disk fixed; : > empty; truncate -s 511 small; chattr +i fixed");
  scene.finally(() => scene.sh("chattr -i fixed"));
  // Ten seconds of waiting, while the others are tried: a /dev where no node ever appears.
  const bare = "unshare -m bash -c 'cp -a /dev/{ublk-control,null,zero,urandom,kmsg} $D && " +
    "mount -t tmpfs tmpfs /dev && cp -a $D/{ublk-control,null,zero,urandom,kmsg} /dev && " +
    "exec setpriv --bounding-set -mknod ubd add null -n 40'";
  const nodeless = /open \/dev\/ublkc40 on device 40: ENOENT.*did not appear in 10 s.*mknod/;
  const usage = [...USAGE_CASES, ...(FULL ? MORE_USAGE_CASES : [])]
    .map(([command, message]): [string, number, RegExp] => [command, EXIT.USAGE, message]);
  await Promise.all([
    fails(scene, bare.replaceAll("$D", scene.directory), EXIT.FAILURE, nodeless),
    allFail(scene, [...usage, ...OTHER_CASES, ...(KERNEL === "newest" ? [DIES_FETCHING] : [])]),
  ]);
  const { code, stdout } = await scene.ubd();
  assert.equal(code, EXIT.USAGE);
  assert.match(stdout, /^Usage: ubd/);
  assert.deepEqual(readdirSync("/sys/class/ublk-char"), []);
});

deviceTest(
  "what is in use is refused with exit code 4, unless forced",
  { anyKernel: true },
  async (scene) => {
    const image = scene.image("disk", 16 << 20);
    const other = scene.image("other", 16 << 20);
    const disk = await scene.losetup(other);
    await scene.sh(`mkfs.ext4 -q ${disk}`);
    await scene.mount("point", disk);
    const device = await scene.add("loop", image);
    await allFail(scene, [
      ["ubd add loop $D/disk", EXIT.BUSY, /Cannot lock .*disk: EBUSY.*add --force/],
      ["ubd add loop $D/disk --ro", EXIT.BUSY, /Cannot lock .*disk: EBUSY/],
      ["ubd add loop $D/other", EXIT.BUSY, /has it as backing file; losetup -d \/dev\/loop/],
      [`ubd add loop ${disk}`, EXIT.BUSY, /EBUSY.*mounted or in use/],
      [`ubd add null -n ${device.id}`, EXIT.BUSY, /ADD_DEV on device \d+: EEXIST.*another id/],
    ]);
    const forced = await scene.add("loop", image, "--force");
    await scene.sh(`dd status=none if=${forced.path} of=/dev/null bs=4k count=1`);
    await scene.del(forced);
    await scene.sh(`dd status=none if=${device.path} of=/dev/null bs=4k count=1`);
  },
);

deviceTest(
  "a read-only file system needs --ro, and gets it",
  { anyKernel: true },
  async (scene) => {
    await scene.sh("mkdir files; truncate -s 1M files/disk");
    const point = await scene.mount("point", "--bind", `${scene.directory}/files`);
    await scene.sh(`mount -o remount,bind,ro ${point}`);
    await fails(scene, `ubd add loop ${point}/disk`, EXIT.FAILURE, /EROFS.*add --ro/);
    const device = await scene.add("loop", `${point}/disk`, "--ro");
    await scene.sh(`cmp -n 1M ${device.path} /dev/zero`);
  },
);

deviceTest("a full or shortened backing fails its requests, and the device lives on", {
  anyKernel: true,
  limitS: 240,
}, async (scene) => {
  const point = await scene.mount("point", "-t tmpfs -o size=4M tmpfs");
  await scene.sh(`truncate -s 16M ${point}/disk; head -c 8M /dev/urandom > disk`);
  const full = await scene.add("loop", `${point}/disk`);
  const dd = await scene.run(
    ["dd", "if=/dev/zero", `of=${full.path}`, "bs=64k", "oflag=direct"],
    { env: { LC_ALL: "C" } },
  );
  assert.notEqual(dd.code, 0);
  assert.match(dd.stderr, /No space left on device/);
  assert.ok(await until(() => scene.kernelLines().some((line) => / fails: ENOSPC/.test(line))));
  await scene.sh(
    `dd status=none if=${full.path} iflag=direct bs=1M count=16 | cmp -n 16M - /dev/zero
     dd status=none if=disk of=${full.path} bs=64k count=1 oflag=direct
     dd status=none if=${full.path} iflag=direct bs=64k count=1 | cmp -n 64k - disk`,
  );
  assert.ok(statSync(full.path).isBlockDevice());

  const short = await scene.add("loop", `${scene.directory}/disk`);
  await scene.sh("cp disk copy; truncate -s 1M disk");
  const read = await scene.run(["dd", `if=${short.path}`, "of=/dev/null", "bs=4k", "skip=1024"], {
    env: { LC_ALL: "C" },
  });
  assert.notEqual(read.code, 0);
  assert.match(read.stderr, /Input\/output error/);
  const cut = () => scene.kernelLines().some((line) => /disk was cut short while/.test(line));
  assert.ok(await until(cut), "the kernel's log has it");
  await scene.sh(
    `dd status=none if=${short.path} iflag=direct bs=64k count=16 | cmp -n 1M - copy
     truncate -s 8M disk
     dd status=none if=${short.path} iflag=direct bs=64k skip=64 count=1 | cmp -n 64k - /dev/zero`,
  );
});

deviceTest(
  "no io_uring and no driver each have a message of their own",
  { anyKernel: true },
  async (scene) => {
    const sysctl = "/proc/sys/kernel/io_uring_disabled";
    scene.finally(() => scene.sh(`echo 0 > ${sysctl}; modprobe ublk_drv`));
    await scene.sh(`echo 2 > ${sysctl}`);
    const disabled = /set up a ring: EPERM.*sysctl kernel\.io_uring_disabled=0/;
    await allFail(scene, [
      ["ubd add null", EXIT.NO_DRIVER, disabled],
      ["ubd list", EXIT.NO_DRIVER, disabled],
    ]);
    await scene.sh(`echo 0 > ${sysctl}; rmmod ublk_drv`);
    const absent = /open the control device: ENOENT.*modprobe ublk_drv/;
    await allFail(scene, [
      ["ubd add null", EXIT.NO_DRIVER, absent],
      ["ubd del -a", EXIT.NO_DRIVER, absent],
    ]);
    await scene.sh("modprobe ublk_drv; udevadm settle");
    if (FULL) await scene.add("null");
  },
);

deviceTest("ids with nothing behind them are not id 0", { anyKernel: true }, async (scene) => {
  const device = await scene.add("null", "-n", "0");
  await allFail(scene, [
    ["ubd del", EXIT.USAGE, /Which device/],
    ["ubd del -n foo", EXIT.USAGE, /whole number/],
    ["ubd del ''", EXIT.USAGE, /whole number/],
    ["ubd del 0x0", EXIT.USAGE, /whole number/],
    ["ubd del -n -1", EXIT.USAGE, /must be from 0 to 1048575/],
    ["ubd del 4294967296", EXIT.USAGE, /must be from 0 to 1048575/],
    ["ubd del --force -n 4294967296", EXIT.USAGE, /must be from 0 to 1048575/],
    ["ubd info 4294967296", EXIT.USAGE, /must be from 0 to 1048575/],
  ]);
  const { stdout } = await scene.ubd("list", "-n", "0");
  assert.match(stdout, / state LIVE\n/, `${RUNNER}: the device is still there`);
  // One that exists goes, though the other does not.
  const { code, stderr } = await scene.ubd("del", "0", "999");
  assert.equal(code, EXIT.NO_DEVICE);
  assert.match(stderr, /device 999: ENODEV/);
  scene.forget(device);
});
