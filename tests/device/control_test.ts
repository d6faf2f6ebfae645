// SPDX-License-Identifier: MIT
/** What can be done to a device that is being served: resize, quiesce, upgrade, and the rest. */

import assert from "node:assert/strict";
import { existsSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import {
  type Added,
  deviceTest,
  gone,
  KERNEL,
  killServer,
  queueSetting,
  scaled,
  type Scene,
  startVerifier,
  statePath,
  until,
} from "./helpers.ts";

async function succeeds(scene: Scene, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await scene.ubd(...args);
  assert.equal(code, 0, `ubd ${args.join(" ")}: ${stderr}`);
  return stdout;
}

async function has(scene: Scene, feature: string): Promise<boolean> {
  return (await scene.ubd("features")).stdout.includes(`\t${feature} `);
}

async function isIn(scene: Scene, { id }: Added, state: string): Promise<void> {
  const told = async () => (await scene.ubd("list", "-n", `${id}`)).stdout.includes(state);
  assert.ok(await until(told, 60_000), `never ${state}`);
}

deviceTest("resize: a mounted device follows its file, and keeps its size when recovered", {
  limitS: 240,
}, async (scene) => {
  const image = scene.image("disk", 32 << 20);
  const device = await scene.add("loop", image, "--recovery", "--size", "32M");
  const [n, size] = [`${device.id}`, `blockdev --getsize64 ${device.path}`];
  if (!await has(scene, "UPDATE_SIZE")) {
    const { code, stderr } = await scene.ubd("resize", "-n", n, "16M");
    assert.equal(code, 1);
    assert.match(stderr, /kernel 6\.12\S* lacks UPDATE_SIZE \(needs 6\.16\)/);
    return;
  }
  await scene.sh(`mkfs.ext4 -q ${device.path}`);
  const point = await scene.mount("point", device.path);
  const larger = await scene.ubd("resize", "-n", n, "64M");
  assert.equal(larger.code, 2);
  assert.match(larger.stderr, /has 33554432 bytes .*truncate -s 67108864/);
  truncateSync(image, 64 << 20);
  await succeeds(scene, "resize", n);
  assert.equal(await scene.sh(size), `${64 << 20}`);
  await scene.sh(`resize2fs -p ${device.path}; head -c 40M /dev/urandom > ${point}/large; sync`);
  await scene.sh(`umount ${point}; fsck.ext4 -f -n ${device.path}`);

  const smaller = await scene.ubd("resize", n, "32M");
  assert.equal(smaller.code, 2);
  assert.match(smaller.stderr, /then add --force/);
  await succeeds(scene, "resize", n, "48M", "--force");
  process.kill(device.pid, "SIGKILL");
  await isIn(scene, device, "QUIESCED");
  const next = scene.adopt(await succeeds(scene, "recover", n));
  assert.equal(await scene.sh(size), `${48 << 20}`);
  assert.match(next.stdout, /"dev_size":50331648/);
  await scene.del(next);
});

deviceTest("upgrade: a running fio sees no error, though it fills the queue", {
  limitS: scaled(240, 600),
}, async (scene) => {
  let device = await scene.add(
    "loop",
    scene.image("disk", 32 << 20),
    "--recovery=wait",
    "-d",
    "32",
  );
  if (!await has(scene, "QUIESCE")) {
    for (const verb of ["quiesce", "upgrade"]) {
      const { code, stderr } = await scene.ubd(verb, `${device.id}`);
      assert.equal(code, 1);
      assert.match(stderr, /kernel 6\.12\S* lacks QUIESCE \(needs 6\.16\)/);
    }
    return;
  }
  const fio = startVerifier(scene, device, 64);
  for (let round = 0; round < scaled(2, 15); round++) {
    await scene.sh("sleep 1");
    fio.goesOn();
    const next = scene.adopt(await succeeds(scene, "upgrade", "-n", `${device.id}`));
    assert.equal(next.path, device.path);
    assert.notEqual(next.pid, device.pid);
    device = next;
  }
  await fio.finish();

  await succeeds(scene, "quiesce", `${device.id}`);
  await isIn(scene, device, "daemon pid -1 state QUIESCED");
  const reader = scene.start([
    "dd",
    `if=${device.path}`,
    "of=/dev/null",
    "count=1",
    "iflag=direct",
  ]);
  await scene.sh("sleep 0.3");
  device = scene.adopt(await succeeds(scene, "recover", `${device.id}`));
  assert.equal((await reader.ended).code, 0, "what waited is served");
  await scene.del(device);
});

deviceTest("what was added without recovery can be neither quiesced nor upgraded", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add("null");
  for (const verb of ["quiesce", "upgrade"]) {
    const { code, stderr } = await scene.ubd(verb, `${device.id}`);
    assert.equal(code, 1);
    assert.match(stderr, /added without --recovery/);
  }
  if (KERNEL === "newest") {
    const batches = await scene.add("null", "--recovery", "--batch");
    const { code, stderr } = await scene.ubd("upgrade", `${batches.id}`);
    assert.equal(code, 1);
    assert.match(stderr, new RegExp(`the driver fails requests .*; kill -9 ${batches.pid}, then`));
    await scene.del(batches);
  }
  await isIn(scene, device, "state LIVE");
  await scene.del(device);
});

deviceTest(
  "del --if-unused leaves an open device alone; --lazy deletes",
  { anyKernel: true },
  async (scene) => {
    const device = await scene.add("null");
    const reader = scene.start(["bash", "-c", `exec sleep 600 < ${device.path}`]);
    await scene.sh("sleep 0.5");
    const { code, stderr } = await scene.ubd("del", "--if-unused", `${device.id}`);
    assert.equal(code, 4, stderr);
    await isIn(scene, device, "state LIVE");
    reader.kill("SIGKILL");
    await reader.ended;
    await succeeds(scene, "del", "--if-unused", `${device.id}`);
    scene.forget(device);
    await gone(device);

    const other = await scene.add("null");
    await succeeds(scene, "del", "--lazy", `${other.id}`);
    scene.forget(other);
    await gone(other);
  },
);

deviceTest("set_affinity moves a queue's thread; info shows the driver's parameters", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add("loop", scene.image("disk", 1 << 20));
  const n = `${device.id}`;
  await succeeds(scene, "set_affinity", "-n", n, "-q", "0", "--cpuset", "[1]");
  assert.match(await succeeds(scene, "list", "-n", n), /queue 0: tid \d+ affinity\(1 \)/);
  const tid = /queue 0: tid (\d+)/.exec(device.stdout)![1]!;
  const status = await scene.sh(`grep Cpus_allowed_list /proc/${device.pid}/task/${tid}/status`);
  assert.match(status, /\t1$/);
  const cases: [string[], number, RegExp][] = [
    [["-q", "7", "--cpuset", "0"], 2, /Queue 7: device \d+ has queues 0 to 0/],
    [["-q", "0", "--cpuset", "8000"], 1, /EINVAL.*none of these CPUs is online/],
    [["-q", "0"], 2, /Which CPUs\?/],
  ];
  for (const [args, code, message] of cases) {
    const outcome = await scene.ubd("set_affinity", "-n", n, ...args);
    assert.equal(outcome.code, code, outcome.stderr);
    assert.match(outcome.stderr, message);
  }
  const info = await succeeds(scene, "info", n);
  assert.match(info, /^discard +in 4 KiB, up to 4 GiB/m);
  assert.match(info, /^attributes +volatile cache, FUA$/m);
  const { params } = JSON.parse(await succeeds(scene, "info", n, "--json"));
  assert.equal(params.discard.granularityBytes, 4096);
  await scene.del(device);
});

deviceTest("limits of memory and segments reach the block layer, or are refused by name", {
  anyKernel: true,
}, async (scene) => {
  const given = ["--memory-align", "1K", "--segments", "9", "--segment-size", "8K"];
  const boundary = ["--segment-boundary", "64K"];
  if (!await has(scene, "AUTO_ZC")) { // As old as these parameters.
    const { code, stderr } = await scene.ubd("add", "null", ...given, ...boundary);
    assert.equal(code, 1);
    assert.match(stderr, /lacks limits of segments \(needs 6\.15\)/);
    return;
  }
  const device = await scene.add("null", ...given, ...boundary);
  const settings = ["dma_alignment", "max_segments", "max_segment_size"];
  assert.deepEqual(settings.map((name) => queueSetting(device, name)), ["1023", "9", "8192"]);
  const info = await succeeds(scene, "info", `${device.id}`);
  assert.match(info, /^best I\/O .* memory aligned to 1024 bytes$/m);
  assert.match(info, /^segments +9 of up to 8 KiB, none across a multiple of 64 KiB$/m);
  await scene.sh(`dd if=${device.path} of=/dev/null bs=1M count=8 iflag=direct status=none`);
  await scene.del(device);

  const module = join(scene.directory, "limits.ts");
  const memory = "memory: { segmentsMax: 5, memoryAlignBytes: 512 }";
  writeFileSync(module, `export default { size: 1 << 20, ${memory}, read() {} };\n`);
  const other = await scene.add(module);
  assert.deepEqual(settings.slice(0, 2).map((name) => queueSetting(other, name)), ["511", "5"]);
  await scene.del(other);
});

deviceTest("stop ends a device and keeps its id", { anyKernel: true }, async (scene) => {
  const device = await scene.add("null");
  const n = `${device.id}`;
  await succeeds(scene, "stop", n);
  await isIn(scene, device, "state DEAD");
  assert.equal(existsSync(device.path), false);
  assert.equal(existsSync(statePath(device.id)), false);
  assert.ok(await until(() => !existsSync(`/proc/${device.pid}`)), "its server lives");
  const { code, stderr } = await scene.ubd("add", "null", "-n", n);
  assert.deepEqual([code, /EEXIST/.test(stderr)], [4, true], stderr);
  await succeeds(scene, "stop", n);
  await scene.del(device);
});

deviceTest(
  "a server that dies between FETCHes of one queue leaves a device that can be deleted",
  { skip: KERNEL !== "newest" && "the driver of Linux 6.12 warns of it in the kernel's log" },
  async (scene) => {
    const env = { UBD_DEBUG_EXIT: "fetching" };
    for (const batch of await has(scene, "BATCH_IO") ? [[], ["--batch"]] : [[]]) {
      const add = ["ubd", "add", "null", "-n", "7", "-d", "9", "--foreground", ...batch];
      assert.match((await scene.run(add, { env })).stderr, /SIGKILL/);
      assert.match((await scene.ubd("list", "-n", "7")).stdout, /state DEAD/);
      await succeeds(scene, "del", "7");
      const again = await scene.add("null", "-n", "7");
      await scene.del(again);
    }
  },
);

deviceTest("what the driver cannot register, the queue does", { limitS: 240 }, async (scene) => {
  if (!await has(scene, "AUTO_ZC")) return;
  const tracing = "/sys/kernel/tracing";
  await scene.sh(`mountpoint -q ${tracing} || mount -t tracefs nodev ${tracing}`);
  const events = `${tracing}/events/io_uring/io_uring_submit_req/enable`;
  const reads = 20;
  const commands = async (env: Record<string, string>, ...flags: string[]) => {
    const image = scene.image(`disk${flags.length}${Object.keys(env).length}`, 8 << 20);
    await scene.sh(`head -c 8M /dev/urandom > ${image}`);
    const added = await scene.run(["ubd", "add", "loop", image, ...flags], { env });
    assert.equal(added.code, 0, added.stderr);
    const device = scene.adopt(added.stdout, added.stderr);
    await scene.sh(
      `cmp ${image} ${device.path}; dd if=/dev/zero of=${device.path} bs=64K ` +
        `count=16 oflag=direct status=none; cmp ${image} ${device.path}; echo > ${tracing}/trace; ` +
        `echo 1 > ${events}; dd if=${device.path} of=/dev/null bs=4k count=${reads} iflag=direct ` +
        `status=none; echo 0 > ${events}`,
    );
    const lines = await scene.sh(`grep -c URING_CMD ${tracing}/trace || true`);
    await scene.del(device);
    return Number(lines);
  };
  const batches = await has(scene, "BATCH_IO") ? [[], ["--batch"]] : [[]];
  for (const batch of batches) {
    const usual = await commands({}, ...batch);
    const fallen = await commands({ UBD_DEBUG_FALLBACK: "1" }, ...batch);
    assert.ok(usual < 2 * reads && fallen >= 3 * reads, `${usual}, ${fallen} commands`);
  }
});

deviceTest("--no-partscan shows no partitions, or is refused by name", {}, async (scene) => {
  const image = scene.image("disk", 8 << 20);
  await scene.sh(`echo '1M,2M' | sfdisk -q ${image}`);
  if (!await has(scene, "NO_AUTO_PART_SCAN")) {
    const { code, stderr } = await scene.ubd("add", "loop", image, "--no-partscan");
    assert.equal(code, 1);
    assert.match(stderr, /kernel 6\.12\S* lacks NO_AUTO_PART_SCAN \(needs 7\.0\)/);
    return;
  }
  const device = await scene.add("loop", image, "--no-partscan");
  const parts = () => scene.sh(`cat /proc/partitions | grep -c ${device.name}p || true`);
  assert.equal(await parts(), "0");
  await scene.sh(`blockdev --rereadpt ${device.path}`);
  assert.equal(await parts(), "1");
  await scene.del(device);
});

deviceTest(
  "gc removes what is left behind, and nothing else",
  { anyKernel: true },
  async (scene) => {
    const live = await scene.add("null");
    const dead = await scene.add("null");
    const recoverable = await scene.add("null", "--recovery");
    const unnamed = await scene.add("null");
    await killServer(scene, dead);
    await killServer(scene, unnamed);
    rmSync(statePath(unnamed.id));
    // Half-made, by a process whose number means nothing outside of its namespace.
    const unknown = { ...dead, id: 77, path: "/dev/ublkb77" };
    const container = ["unshare", "--pid", "--fork", "--mount-proc"];
    const { code: died } = await scene.run(
      [...container, "ubd", "add", "null", "-n", "77", "--foreground"],
      { env: { UBD_DEBUG_EXIT: "added" } },
    );
    assert.equal(died, 70);
    await isIn(scene, unknown, "DEAD");
    process.kill(recoverable.pid, "SIGKILL");
    await isIn(scene, recoverable, "QUIESCED");
    const stale = [statePath(1000), join(statePath(0), "..", ".7.99999999")];
    for (const path of stale) writeFileSync(path, "{}", { mode: 0o600 });

    const expected = (verb: string) => [
      ...[dead, unnamed].map(({ id, pid }) =>
        `${verb} device ${id}: it is DEAD, its server (process ${pid}) is gone`
      ),
      `${verb} ${stale[0]}: there is no device 1000`,
      `${verb} ${stale[1]}: process 99999999 is gone`,
    ];
    const dry = await succeeds(scene, "gc", "--dry-run");
    assert.deepEqual(dry.trim().split("\n").sort(), expected("would remove").sort());
    const { code, stdout, stderr } = await scene.ubd("gc");
    assert.equal(code, 0, stderr);
    assert.deepEqual(stdout.trim().split("\n").sort(), expected("removed").sort());
    assert.match(stderr, new RegExp(`kept device ${recoverable.id}: .*; --force removes it`));
    assert.match(stderr, new RegExp(`kept device ${unknown.id}: .*; --all removes it`));
    await gone(dead);

    const { removed } = JSON.parse(await succeeds(scene, "gc", "--all", "--force", "--json"));
    const ids = removed.map(({ device }: { device: number }) => device).sort();
    assert.deepEqual(ids, [recoverable.id, unknown.id].sort());
    for (const device of [dead, unnamed, recoverable, unknown]) scene.forget(device);
    await isIn(scene, live, "state LIVE");
    await scene.del(live);
  },
);

/** Verb, step at which it dies, and what brings the device back, or the system to order. */
const KILLS: [string, string, string[][]][] = [
  ["add", "queues started", [["gc"]]],
  ["resize", "measured", [["resize"]]],
  ["resize", "resized", [["resize"]]],
  ["upgrade", "quiescing", [["upgrade"]]],
  ["upgrade", "quiesced", [["recover"]]],
  ["upgrade", "recovery started", [["upgrade"]]],
  ["upgrade", "queues started", [["recover"]]],
  ["upgrade", "recovered", [["recover"]]],
  ["recover", "recovery started", [["recover"]]],
  ["del", "stopped", [["del"]]],
  ["del", "deleted", []],
];
const MORE_KILLS: typeof KILLS = [
  ["add", "added", [["gc"]]],
  ["add", "started", [["gc", "--force"]]],
  ["recover", "queues started", [["recover"]]],
  ["recover", "recovered", [["recover"]]],
];

deviceTest("a command that is killed at any step leaves what the next one mends", {
  limitS: scaled(240, 600),
}, async (scene) => {
  const lacking = [
    ...await has(scene, "QUIESCE") ? [] : ["upgrade"],
    ...await has(scene, "UPDATE_SIZE") ? [] : ["resize"],
  ];
  const image = scene.image("disk", 8 << 20);
  await scene.sh(`head -c 8M /dev/urandom > ${image}; cp ${image} copy`);
  let device: Added | undefined;
  const dies = async (verb: string, step: string, ...args: string[]) => {
    const { code, stderr } = await scene.run(["ubd", verb, ...args], {
      env: { UBD_DEBUG_EXIT: step },
    });
    assert.notEqual(code, 0, `${verb} does not come to: ${step}`);
    assert.doesNotMatch(stderr, /bug in ubd/);
    return code;
  };
  for (const [verb, step, mend] of scaled(KILLS, [...KILLS, ...MORE_KILLS])) {
    if (lacking.includes(verb)) continue;
    if (verb === "add") {
      // Nobody stays who could clean up, as `ubd add` does for a server in the background.
      const words = ["loop", image, "--recovery", "--foreground", "-n", "61"];
      assert.equal(await dies("add", step, ...words), 70);
      const left = { id: 61 } as Added; // The driver needs a moment to notice.
      await isIn(scene, left, step === "started" ? "QUIESCED" : "DEAD");
      for (const words of mend) assert.match(await succeeds(scene, ...words), /^removed device/);
      assert.equal(await succeeds(scene, "list"), "");
      continue;
    }
    device ??= await scene.add("loop", image, "--recovery");
    const n = `${device.id}`;
    if (verb === "recover") {
      process.kill(JSON.parse(readFileSync(statePath(device.id), "utf8")).pid, "SIGKILL");
      await isIn(scene, device, "QUIESCED");
    }
    await dies(verb, step, n);
    let deleted = verb === "del";
    for (const words of mend) {
      const { code, stderr } = await scene.ubd(...words, n);
      if (code === 0) continue;
      // The driver of 6.12 knows the dead server by its memory, and waits for it alone.
      assert.ok(KERNEL === "6.12" && step === "queues started", `${verb}, ${step}: ${stderr}`);
      assert.match(stderr, /this kernel lets no other begin: ubd del --force -n ID/);
      await succeeds(scene, "del", "--force", n);
      deleted = true;
    }
    if (deleted) {
      scene.forget(device);
      await gone(device);
      device = undefined;
    } else {
      await scene.sh(`cmp -n 1M copy ${device.path}`);
    }
  }
});
