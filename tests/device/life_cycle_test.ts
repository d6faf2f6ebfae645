// SPDX-License-Identifier: MIT
/** A device's life as the CLI tells it: add, list, info, del; output formats; ids; shapes. */

import assert from "node:assert/strict";
import { existsSync, readFileSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { deviceTest, gone, isTold, RUNNER, scaled, sleep, statePath, until } from "./helpers.ts";

/** The lines that `ublk` prints and scripts parse. */
const DUMP = new RegExp(
  "^dev id \\d+: nr_hw_queues \\d+ queue_depth \\d+ block size \\d+ dev_capacity \\d+\\n" +
    "\\tmax rq size \\d+ daemon pid \\d+ state LIVE\\n" +
    "\\tflags 0x[0-9a-f]+ \\[( [A-Z_0-9]+)+ \\]\\n" +
    "\\tublkc: \\d+:\\d+ ublkb: \\d+:\\d+ owner: 0:0\\n" +
    "(\\tqueue \\d+: tid \\d+ affinity\\((\\d+ )+\\)\\n)+" +
    '\\ttarget \\{.*"type":0\\}\\n$',
);

deviceTest(
  "a device is told in ublk's format, as JSON and in words",
  {},
  async (scene) => {
    const version = JSON.parse((await scene.ubd("version", "--json")).stdout);
    console.log(`ubd ${version.version}, ${version.runtime}, Linux ${version.kernel}, ${RUNNER}`);

    const image = scene.image("disk.img", 8 << 20);
    const zero = await scene.add("null", "--size", "1G");
    const loop = await scene.add("-t", "loop", "-f", "disk.img");
    assert.match(zero.stdout, DUMP);
    assert.match(zero.stdout, /block size 512 dev_capacity 2097152\n/);
    assert.match(zero.stderr, /^ubd: \/dev\/ublkb\d+ is live: 1 GiB\n$/);
    assert.match(loop.stdout, DUMP);
    assert.match(loop.stderr, /is live: 8 MiB, direct I\/O, zero copy.*\n$/);
    const target = JSON.parse(/\ttarget (.*)\n/.exec(loop.stdout)![1]!);
    assert.equal(target.backing_file, image);
    assert.equal(target.dev_size, 8 << 20);
    assert.equal(target.direct_io, 1);
    assert.equal(target.name, "loop");
    assert.equal(target.offset, 0);
    for (const { id, pid } of [zero, loop]) {
      assert.equal(statSync(statePath(id)).mode & 0o777, 0o600);
      assert.equal(JSON.parse(readFileSync(statePath(id), "utf8")).pid, pid);
    }

    const [all, one, verbose, info] = await Promise.all([
      scene.ubd("list"),
      scene.ubd("list", "-n", `${loop.id}`),
      scene.ubd("list", "--number", `${loop.id}`, "-v"),
      scene.ubd("info", loop.path),
    ]);
    assert.equal(all.stdout, zero.stdout + loop.stdout);
    assert.equal(one.stdout, loop.stdout);
    const whole = JSON.parse(verbose.stdout);
    assert.match(verbose.stdout, /^\{\n {4}"/);
    assert.equal(whole.target.backing_file, image);
    assert.equal(whole.params.basic.dev_sectors, 16384);
    assert.equal(whole.queues["0"].qid, 0);
    assert.match(info.stdout, /^state +LIVE$/m);
    assert.match(info.stdout, new RegExp(`^served by +process ${loop.pid}$`, "m"));
    assert.match(info.stdout, new RegExp(`^backing_file +${image}$`, "m"));
    await scene.del(zero, loop);
    assert.equal((await scene.ubd("list")).stdout, "");
  },
);

deviceTest("--json of every verb is one line of JSON", { anyKernel: true }, async (scene) => {
  const json = async (...args: string[]) => {
    const { code, stdout, stderr } = await scene.ubd(...args, "--json");
    assert.equal(code, 0, stderr);
    assert.match(stdout, /^.+\n$/, `${args}`);
    return JSON.parse(stdout);
  };
  const facts = await json("add", "null", "-n", "7");
  assert.equal(facts.id, 7);
  assert.equal(facts.path, "/dev/ublkb7");
  assert.deepEqual(facts.notes, []);
  const [list, one, info, features, help] = await Promise.all([
    json("list"),
    json("list", "-n", "7"),
    json("info", "7"),
    json("features"),
    json("help"),
  ]);
  const { notes: _, ...same } = facts;
  assert.deepEqual(list, [same]);
  assert.deepEqual(one, [same]);
  const { params, ...known } = info;
  assert.deepEqual(known, same);
  assert.equal(params.logicalBlockBytes, same.blockBytes);
  assert.match(features.features, /^0x[0-9a-f]+$/);
  assert.ok(features.names.includes("CMD_IOCTL_ENCODE"));
  assert.ok(help.commands.length >= 7);
  assert.deepEqual(await json("del", "/dev/ublkb7"), { deleted: [7] });

  const { code, stdout, stderr } = await scene.ubd("info", "7", "--json");
  assert.equal(code, 3);
  assert.equal(JSON.parse(stdout).error.errno, "ENODEV");
  assert.match(stderr, /^ubd: Cannot GET_DEV_INFO on device 7: ENODEV/);
});

deviceTest("features are told in ublk's format", {}, async (scene) => {
  const { stdout } = await scene.ubd("features");
  assert.match(stdout, /^ublk_drv features: 0x[0-9a-f]+\n(\t[A-Z_a-z]+ *: 0x[0-9a-f]+\n)+$/);
  assert.match(stdout, /^\tUSER_RECOVERY {7}: 0x8$/m);
});

deviceTest("queues and depth are as the driver made them, and all serve", {}, async (scene) => {
  const image = scene.image("disk.img", 32 << 20);
  for (const [queues, depth] of scaled([[4, 4096], [2, 1]], [[4, 4096], [2, 1], [1, 128]])) {
    const device = await scene.add("loop", image, "-q", `${queues}`, "-d", `${depth}`);
    assert.ok(device.queues >= 1 && device.queues <= queues!);
    assert.equal(device.depth, depth);
    const threads = [...device.stdout.matchAll(/\tqueue (\d+): tid (\d+)/g)];
    assert.deepEqual(threads.map(([, queue]) => Number(queue)), [...Array(device.queues).keys()]);
    for (const [, , tid] of threads) assert.ok(existsSync(`/proc/${device.pid}/task/${tid}`));
    await scene.sh(
      `fio --max-jobs=4 --name=shape --filename=${device.path} --direct=1 --ioengine=libaio --iodepth=128 ` +
        "--rw=randwrite --bs=4k --size=4M --verify=crc32c --numjobs=2 --offset_increment=16M",
    );
    await scene.del(device);
  }
});

deviceTest("many devices live side by side, with ids chosen or automatic", {
  limitS: 600,
  anyKernel: true,
}, async (scene) => {
  const count = scaled(8, 64);
  const chosen = await scene.add("null", "-n", "3", "-d", "4");
  assert.equal(chosen.id, 3);
  const devices = [chosen];
  const addSome = async () => {
    while (devices.length < count) {
      const slot = devices.push(chosen) - 1; // Claimed before the wait.
      devices[slot] = await scene.add("null", "-d", "4", "--max-io-size", "64K");
    }
  };
  await Promise.all([addSome(), addSome()]);
  const ids = devices.map(({ id }) => id).sort((a, b) => a - b);
  assert.deepEqual(ids, [...Array(count).keys()]);
  for (const { path } of devices) await scene.sh(`dd status=none if=${path} of=/dev/null count=8`);
  const { stdout } = await scene.ubd("list");
  assert.deepEqual([...stdout.matchAll(/^dev id (\d+)/gm)].map(([, id]) => Number(id)), ids);

  const { code, stderr } = await scene.ubd("del", "--all");
  assert.equal(code, 0, stderr);
  for (const device of devices) {
    await gone(device);
    scene.forget(device);
  }
});

deviceTest("a device added again and again leaks nothing in its process", {
  limitS: 900,
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk.img", 1 << 20);
  const script = join(import.meta.dirname!, "churn.ts");
  const deno = ["deno", "run", "-A", "-q", "--cached-only", "--config", "/ubd/deno.json"];
  const runtime = RUNNER === "deno" ? deno : ["bun"];
  const count = scaled(10, 200);
  const { code, stdout, stderr } = await scene.run([...runtime, script, `${count}`, image], {
    limitMs: 800_000,
  });
  assert.equal(code, 0, stderr);
  const { first, last } = JSON.parse(stdout);
  assert.ok(last.descriptors <= first.descriptors, `descriptors: ${stdout}`);
  assert.ok(last.threads <= first.threads + 2, `threads: ${stdout}`);

  for (let round = 0; round < scaled(0, 20); round++) await scene.del(await scene.add("null"));
});

deviceTest("--foreground serves until Ctrl-C, deletes its device, exits 0", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const job = scene.start(["ubd", "add", "null", "--foreground"]);
  assert.ok(await until(() => isTold(job), 60_000), job.output());
  const device = scene.adopt(job.output());
  assert.ok(existsSync(device.path) && existsSync(statePath(device.id)));
  job.kill("SIGINT");
  const { code, stderr } = await job.ended;
  assert.equal(code, 0, stderr);
  await gone(device);
  scene.forget(device);
});

deviceTest("--foreground outlives who reads its standard error", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const file = join(scene.directory, "throws.ts");
  writeFileSync(
    file,
    `import { defineTarget } from "ubd";
export default defineTarget({ size: 2 ** 20, read({ offset, buffer }) {
  if (offset >= 8192) throw new Error("told to a reader that is gone");
  buffer.fill(0);
} });`,
  );
  const job = scene.start([
    "bash",
    "-c",
    `exec 3> out; { ubd add ${file} -n 31 --foreground 2>&1 >&3; echo $? >code; } | ` +
    "grep --max-count=1 live",
  ], { cwd: scene.directory });
  const out = join(scene.directory, "out");
  assert.ok(await until(() => existsSync(out) && /31/.test(readFileSync(out, "utf8")), 60_000));
  const device = scene.adopt(readFileSync(out, "utf8"));
  for (let round = 0; round < 3; round++) {
    const words = [`if=${device.path}`, "of=/dev/null", "bs=4k", "skip=2", "count=1"];
    assert.notEqual((await scene.run(["dd", "iflag=direct", ...words])).code, 0);
    await sleep(200);
  }
  assert.match((await scene.ubd("list", "-n", "31")).stdout, /state LIVE/);
  await scene.del(device);
  await job.ended;
  assert.equal(readFileSync(join(scene.directory, "code"), "utf8"), "0\n");
});

deviceTest("who interrupts an add gets no device, unless it was LIVE by then", {
  limitS: 240,
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 1 << 20);
  for (const flags of [[], ["--recovery"], ["--supervise"]]) {
    for (const step of ["added", "queues started", "started"]) {
      const { code, stdout, stderr } = await scene.run(["ubd", "add", "loop", image, ...flags], {
        env: { UBD_DEBUG_INTERRUPT: step },
      });
      const said = `${flags} ${step}: ${stderr}`;
      if (code === 0) await scene.del(scene.adopt(stdout));
      else assert.deepEqual([code, stderr], [130, "ubd: interrupted\n"], said);
      assert.equal((await scene.ubd("list")).stdout, "", said);
    }
  }
});

deviceTest("$(ubd add) returns; the server holds nothing of its caller's", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const victim = join(scene.directory, "victim");
  writeFileSync(victim, "precious");
  await scene.sh("mkdir -p -m 755 /run/ubd");
  symlinkSync(victim, statePath(11));
  const dump = await scene.sh(
    `exec 9> ${scene.directory}/lock; out=$(ubd add null -n 11 2>&1 9>&9); echo "$out"`,
  );
  const device = scene.adopt(dump);
  const held = await scene.sh(`ls -l /proc/${device.pid}/fd; readlink /proc/${device.pid}/cwd`);
  assert.doesNotMatch(held, new RegExp(scene.directory));
  assert.match(held, /\n\/$/);
  assert.equal(await scene.sh(`ps -o sid= -p ${device.pid} | tr -d ' '`), `${device.pid}`);
  await scene.del(device);
  assert.equal(readFileSync(victim, "utf8"), "precious", "a planted link is not followed");
});
