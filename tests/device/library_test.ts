// SPDX-License-Identifier: MIT
/** Targets that are somebody's TypeScript: as a program, and by `ubd add ./file.ts`. */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { deviceTest, gone, type Job, NO_QUIESCE, type Scene, until } from "./helpers.ts";

const CHECKOUT = "/ubd";
const EXAMPLE = `${CHECKOUT}/examples/memory.ts`;

const RUNTIMES = {
  bun: ["bun"],
  deno: ["deno", "run", "-A", "-q", "--cached-only", `--config=${CHECKOUT}/deno.json`],
} as const;

/** Writes a module of the test's own. @returns its path. */
function moduleFile(scene: Scene, name: string, lines: string): string {
  const file = join(scene.directory, name);
  writeFileSync(file, lines);
  return file;
}

/** Waits until a program has told the devices it serves. */
async function told(job: Job, count: number): Promise<string[]> {
  const paths = () => job.output().match(/\/dev\/ublkb\d+/g) ?? [];
  assert.ok(await until(() => paths().length >= count, 60_000), job.output());
  return paths();
}

for (const [name, command] of Object.entries(RUNTIMES)) {
  deviceTest(`the README's example is a disk under ${name}; Ctrl-C leaves nothing`, {
    anyKernel: true,
  }, async (scene) => {
    const job = scene.start([...command, EXAMPLE]);
    const [path] = await told(job, 1);
    await scene.sh(`mkfs.ext4 -q ${path}`);
    const point = await scene.mount("mnt", path!);
    await scene.sh(`head -c 4M /dev/urandom > data; cp data ${point}/ && cmp data ${point}/data`);
    await scene.sh(`umount ${point} && fsck.ext4 -fn ${path}`);
    job.kill("SIGINT");
    const { code, stderr } = await job.ended;
    assert.equal(code, 0, stderr);
  });
}

deviceTest("ubd add ./file.ts: a module, its options and its mistakes", {
  anyKernel: true,
}, async (scene) => {
  // Of the scene's own: the checkout may be another user's, whose modules root does not run.
  const disk = await scene.add(moduleFile(scene, "memory.ts", readFileSync(EXAMPLE, "utf8")));
  await scene.sh(`mkfs.ext4 -q ${disk.path}`);
  await scene.del(disk);

  const file = moduleFile(
    scene,
    "pattern.ts",
    `import { defineTarget } from "ubd";
     export default defineTarget({
       options: {
         size: { type: "size", default: "1M", description: "size of the device" },
         byte: { type: "number", required: true },
       },
       open: ({ size, byte }) => ({ size, read: ({ buffer }) => void buffer.fill(byte) }),
     });`,
  );
  const help = await scene.ubd("add", file, "--help");
  assert.match(help.stdout, /--opt size=SIZE +size of the device \(default: 1M\)/);
  assert.match(help.stdout, /--opt byte=NUMBER +\(required\)/);
  const device = await scene.add(file, "--opt", "byte=65", "--opt", "size=64K");
  const read = `dd status=none if=${device.path} bs=64k count=2 iflag=direct | tr -d A | wc -c`;
  assert.equal(await scene.sh(read), "0");
  assert.equal(await scene.sh(`blockdev --getsize64 --getro ${device.path}`), "65536\n1");
  await scene.del(device);
  for (const wrong of [[], ["--opt", "byte=1", "--opt", "bite=2"]]) {
    const { code, stderr } = await scene.ubd("add", file, ...wrong);
    assert.equal(code, 2, stderr);
    assert.match(stderr, /Option "(byte|bite)"/);
  }
});

/** Every function awaits a timer. */
const SLOW = `
import { createDevice, defineTarget } from "${CHECKOUT}/mod.ts";
import { setTimeout as sleep } from "node:timers/promises";
let busy = 0;
let peak = 0;
const make = (ms: number) => {
  const disk = new Uint8Array(16 * 1024 ** 2);
  return defineTarget({
    size: disk.length,
    async read({ offset, length, buffer }) {
      peak = Math.max(peak, ++busy);
      await sleep(ms);
      busy--;
      buffer.set(disk.subarray(offset, offset + length));
    },
    async write({ offset, buffer }) {
      await sleep(ms);
      disk.set(buffer, offset);
    },
    async flush() {
      await sleep(ms);
    },
  });
};
await using one = await createDevice(make(0), { queues: 1 });
await using two = await createDevice(make(50), { queues: 2 });
console.log(one.path);
console.log(two.path);
await Promise.all([one.closed, two.closed]);
console.log(\`peak \${peak}\`);
console.log(one.stats().write.requests > 0 && two.stats().write.requests > 0 ? "both" : "no");
`;

const FIO = "fio --name=t --direct=1 --ioengine=libaio --bs=4k --size=2M --output-format=json";

deviceTest("asynchronous devices, two in a process: fio verify, and many requests in flight", {
  anyKernel: true,
}, async (scene) => {
  const job = scene.start([...RUNTIMES.bun, moduleFile(scene, "slow.ts", SLOW)]);
  const [one, two] = await told(job, 2);
  for (const path of [one, two]) {
    const verify = "--rw=randwrite --verify=crc32c --do_verify=1 --iodepth=32 --fsync=64";
    await scene.sh(`${FIO} --filename=${path} ${verify}`);
  }
  const iops = async (depth: number) => {
    const options = `--rw=randread --time_based --runtime=3 --iodepth=${depth}`;
    const report = JSON.parse(await scene.sh(`${FIO} --filename=${two} ${options}`));
    return report.jobs[0].read.iops as number;
  };
  const [alone, many] = [await iops(1), await iops(64)];
  console.log(`  QD 64 serves ${(many / alone).toFixed(1)} times the rate of QD 1 (${alone} 1/s)`);
  job.kill("SIGINT");
  const { code, stdout, stderr } = await job.ended;
  assert.equal(code, 0, stderr);
  assert.match(stdout, /both$/m);
  const peak = Number(/^peak (\d+)$/m.exec(stdout)?.[1]);
  assert.ok(peak >= 40, `at most ${peak} requests were in flight at once`);
});

/** One of its two queues fails when it is to answer for the middle of the device. */
const FAILS = `
import { createDevice, defineTarget } from "${CHECKOUT}/mod.ts";
import { Queue } from "${CHECKOUT}/core/queue.ts";
const { commit } = Queue.prototype;
Queue.prototype.commit = function (tag, result) {
  const failing = !this.disposed && this.offset(tag) === 512 * 1024 ** 2;
  if (failing) this.break(new Error("planted"));
  else commit.call(this, tag, result);
};
const zeroes = defineTarget({ size: 1024 ** 3, read() {} });
await using device = await createDevice(zeroes, { queues: 2 });
console.log(device.path);
await device.closed.catch((error) => console.log(\`closed: \${error.message}\`));
`;

deviceTest(
  "a program whose queue fails has its device deleted",
  { anyKernel: true },
  async (scene) => {
    const job = scene.start([...RUNTIMES.bun, moduleFile(scene, "fails.ts", FAILS)]);
    const [path] = await told(job, 1);
    const read = `if=${path} of=/dev/null bs=4k count=1 skip=131072 iflag=direct`;
    assert.equal((await scene.run(["dd", ...read.split(" ")])).code, 1);
    const { code, stdout, stderr } = await job.ended;
    assert.equal(code, 0, stderr);
    assert.match(stdout, /^closed: planted$/m);
    assert.match(stderr, /is no longer served: planted/);
  },
);

/** What a read does in each block of 64 KiB from the device's middle on, and what dd is told. */
const MISDEEDS = [
  ['throw Object.assign(new Error("full"), { code: "ENOSPC" });', "No space left on device"],
  ['return Promise.reject(new Error("oops"));', "Input/output error"],
  ["return NaN;", "Input/output error"],
  ["return length + 1;", "Input/output error"],
  ["return new Promise(() => {});", "Connection timed out"],
] as const;

const MISBEHAVES = `
export default {
  size: 64 * 1024 ** 2,
  timeoutMs: 500,
  read({ offset, length, buffer }) {
    switch (offset / 65536 - 512) {
      ${MISDEEDS.map(([deed], index) => `case ${index}: ${deed}`).join("\n      ")}
    }
    buffer.fill(97);
  },
};`;

deviceTest(
  "a handler that throws, rejects, answers nonsense or never: one errno, and it lives on",
  {
    anyKernel: true,
  },
  async (scene) => {
    const device = await scene.add(moduleFile(scene, "misbehaves.ts", MISBEHAVES));
    const read = (block: number) =>
      scene.run(["dd", `if=${device.path}`, "bs=64k", "count=1", `skip=${block}`, "iflag=direct"]);
    for (const [index, [deed, told]] of MISDEEDS.entries()) {
      const { code, stderr } = await read(512 + index);
      assert.equal(code, 1, deed);
      assert.match(stderr, new RegExp(`error reading .*: ${told}`), deed);
      assert.equal((await read(0)).stdout, "a".repeat(65536), deed);
    }
    assert.match((await scene.ubd("list", "-n", `${device.id}`)).stdout, / state LIVE\n/);
    await scene.del(device);
  },
);

/** Does something bad when it is asked for its middle, which nobody looks at by himself. */
const bad = (deed: string) => `
import process from "node:process";
import { defineTarget } from "ubd";
export default defineTarget({
  size: 1024 ** 3,
  read({ offset }) {
    if (offset === 512 * 1024 ** 2) { ${deed} }
  },
});`;

const READ_BAD = "if=%s of=/dev/null bs=4k count=1 skip=131072 iflag=direct";

deviceTest("a handler that calls process.exit leaves a device that list and del know", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add(moduleFile(scene, "exits.ts", bad("process.exit(3);")));
  // A thread that is told to end may come to the end of the handler first: the read fails, or not.
  await scene.run(["dd", ...READ_BAD.replace("%s", device.path).split(" ")]);
  let list = "";
  const dead = async () => {
    list = (await scene.ubd("list", "-n", `${device.id}`)).stdout;
    return / state DEAD\n/.test(list);
  };
  assert.ok(await until(dead, 60_000), list);
  await scene.del(device);
});

const EXITS_AT_ONCE = `
import process from "node:process";
export default { size: 1024 ** 2, read() { process.exit(3); } };`;

// 6.12 reads the partition table while START_DEV holds the device's lock; 7.2 reads it later.
deviceTest(
  "a handler that calls process.exit at the first read holds nothing up",
  { anyKernel: true },
  async (scene) => {
    const { code, stderr } = await scene.ubd("add", moduleFile(scene, "exits.ts", EXITS_AT_ONCE));
    if (code !== 0) {
      assert.equal(code, 1, stderr);
      assert.match(stderr, /^ubd: Cannot serve queue 0: EIO, .*ended with code 3/m);
      assert.equal((await scene.ubd("list")).stdout, "");
      return;
    }
    const removed = async () => / it is DEAD, /.test((await scene.ubd("gc")).stdout);
    assert.ok(await until(removed, 60_000));
    assert.equal((await scene.ubd("list")).stdout, "");
  },
);

deviceTest("a handler that loops for ever: list says LIVE, and del --force removes it", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add(moduleFile(scene, "loops.ts", bad("for (;;);")));
  const reader = scene.start(["dd", ...READ_BAD.replace("%s", device.path).split(" ")]);
  await scene.sh("sleep 1");
  const list = (await scene.ubd("list", "-n", `${device.id}`)).stdout;
  assert.match(list, new RegExp(`daemon pid ${device.pid} state LIVE`));
  const { code, stderr } = await scene.ubd("del", "--force", `${device.id}`);
  assert.equal(code, 0, stderr);
  assert.equal((await reader.ended).code, 1);
  await gone(device);
  scene.forget(device);
});

/** One of its blocks takes its time, unless it is told that the device stops. */
const SLOW_READS = `
import { setTimeout as sleep } from "node:timers/promises";
export default {
  size: 1024 ** 2,
  async read({ offset, buffer, signal }) {
    if (offset === 512 * 1024) await sleep(5000, undefined, { signal });
    buffer.fill(5);
  },
  write() {},
};`;

deviceTest("an upgrade aborts no request, and takes no module that is another device", {
  skip: NO_QUIESCE,
}, async (scene) => {
  const file = moduleFile(scene, "slow_reads.ts", SLOW_READS);
  const device = await scene.add(file, "--recovery");
  const fives =
    `dd if=${device.path} bs=4k skip=128 count=1 iflag=direct status=none | tr -d '\\5' | wc -c`;
  const reader = scene.start(["bash", "-euo", "pipefail", "-c", fives]);
  const inflight = `/sys/block/${basename(device.path)}/inflight`;
  assert.ok(await until(() => !/^ +0 /.test(readFileSync(inflight, "utf8")), 60_000));
  scene.adopt((await scene.ubd("upgrade", `${device.id}`)).stdout);
  const { code, stdout, stderr } = await reader.ended;
  assert.deepEqual([code, stdout, stderr], [0, "0\n", ""]);

  writeFileSync(file, SLOW_READS.replace("write() {},", ""));
  const refused = await scene.ubd("upgrade", `${device.id}`);
  assert.equal(refused.code, 2);
  assert.match(refused.stderr, /has been writable, its target now read-only: make it as it was/);
  writeFileSync(file, SLOW_READS);
  const last = scene.adopt((await scene.ubd("recover", `${device.id}`)).stdout);
  await scene.del(last);
});

deviceTest("--watch serves a changed module, a broken one is not taken, and no I/O fails", {
  skip: NO_QUIESCE,
}, async (scene) => {
  const filled = (byte: number) =>
    `export default { size: 1024 ** 2, read: ({ buffer }) => void buffer.fill(${byte}) };`;
  const file = moduleFile(scene, "watched.ts", filled(1));
  const device = await scene.add(file, "--watch");
  const read = () =>
    scene.sh(
      `dd if=${device.path} bs=4k count=1 iflag=direct status=none | od -An -tx1 | head -1 | cut -c2-3`,
    );
  const reader = scene.start([
    ..."fio --name=r --rw=randread --bs=4k --iodepth=4 --ioengine=libaio --direct=1".split(" "),
    ...["--time_based", "--runtime=600", `--filename=${device.path}`],
  ]);
  let running = true;
  reader.ended.finally(() => running = false);
  assert.equal(await read(), "01");

  moduleFile(scene, "watched.ts", filled(2));
  assert.ok(await until(async () => await read() === "02", 60_000), "never served anew");
  moduleFile(scene, "watched.ts", "export default {");
  const refused = async () => (await scene.sh("dmesg")).includes("has changed, and is not taken");
  assert.ok(await until(refused, 60_000), "nobody told");
  assert.equal(await read(), "02");
  moduleFile(scene, "watched.ts", filled(3));
  assert.ok(await until(async () => await read() === "03", 60_000), "not after a mistake");
  assert.ok(running, reader.output());
  reader.kill("SIGTERM");
  await reader.ended;
  await scene.del(device);
});
