// SPDX-License-Identifier: MIT
/** A module's own code that never comes back: no command waits for it without end, nothing is left. */
import assert from "node:assert/strict";
import { existsSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { EXIT } from "../../cli/exit.ts";
import { STOPPING_SIGNAL } from "../../cli/start_server.ts";
import {
  type Added,
  deviceTest,
  FULL,
  gone,
  NO_PARTSCAN,
  NO_QUIESCE,
  RUNNER,
  type Scene,
  servers,
  until,
} from "./helpers.ts";

const LOOP = "for (;;);";
const NEVER = "await new Promise(() => {});";

function writeModule(scene: Scene, name: string, target: string, top = ""): string {
  const file = join(scene.directory, `${name}.ts`);
  const imports = `import { defineTarget } from "ubd";`;
  writeFileSync(file, `${imports}\n${top}\nexport default defineTarget({ ${target} });`);
  return file;
}

const SERVES = "size: 1024 ** 2, read({ buffer }) { buffer.fill(0); }";

function read(scene: Scene, { path }: Added, skip = 0) {
  const dd = `exec dd if=${path} of=/dev/null iflag=direct bs=4k count=1 skip=${skip}`;
  return scene.start(["bash", "-c", dd]);
}

deviceTest("a module that never comes back before its device is LIVE ends with the start's limit", {
  anyKernel: true,
  everywhere: "deno",
  limitS: 400,
}, async (scene) => {
  const modules = [
    [writeModule(scene, "loops", SERVES, LOOP)],
    [writeModule(scene, "open", `async open() { ${NEVER} }`)],
  ];
  for (const args of modules) {
    const { code, stdout, stderr } = await scene.ubd("add", ...args, "--start-timeout", "20");
    assert.deepEqual([code, stdout], [EXIT.TIMEOUT, ""], `${args}: ${stderr}`);
    assert.match(stderr, /start the server: ETIMEDOUT.*after 20 s.*--start-timeout/, `${args}`);
    assert.ok(await until(() => servers().length === 0), `${args}`);
  }
});

deviceTest("who starts such a module may end it by Ctrl-C, and by its own death", {
  anyKernel: true,
  limitS: 300,
}, async (scene) => {
  const marker = join(scene.directory, "loaded");
  const marked = `import { writeFileSync } from "node:fs"; writeFileSync("${marker}", "");`;
  for (const args of [[], ["--foreground"]]) {
    rmSync(marker, { force: true });
    const file = writeModule(scene, "loops", SERVES, `${marked} ${LOOP}`);
    const job = scene.start(["ubd", "add", file, ...args]);
    assert.ok(await until(() => existsSync(marker), 60_000));
    process.kill(job.pid, "SIGINT");
    assert.equal((await job.ended).code, EXIT.INTERRUPTED);
    assert.ok(await until(() => servers().length === 0));
  }
  const job = scene.start(["ubd", "add", writeModule(scene, "open", `async open() { ${NEVER} }`)]);
  assert.ok(await until(() => servers().length > 0));
  process.kill(job.pid, "SIGKILL");
  await job.ended;
  assert.ok(await until(() => servers().length === 0), "the server has outlived its caller");
});

deviceTest("a handler that spins does not keep ubd del, nor a signal to the server", {
  skip: NO_PARTSCAN,
  everywhere: "deno",
  limitS: 300,
}, async (scene) => {
  const spins =
    `size: 1024 ** 2, read({ offset, buffer }) { if (offset === 512 * 1024) ${LOOP} buffer.fill(0); }`;
  const file = writeModule(scene, "spins", spins);
  // Deno from source takes seconds to start in a guest, and each round is six starts.
  const some = <T>(all: T[]) => RUNNER === "deno" && !FULL ? all.slice(-1) : all;
  for (const supervised of some([[], ["--supervise"]])) {
    const device = await scene.add(file, "--no-partscan", ...supervised);
    const reader = read(scene, device, 128);
    await scene.run(["sleep", "2"]);
    await scene.delForced(device);
    assert.notEqual((await reader.ended).code, 0);
    assert.ok(await until(() => servers().length === 0));
  }
  const later = writeModule(
    scene,
    "later",
    spins.replace("read", "async read").replace("{ if", "{ await 0; if"),
  );
  for (const module of some([file, later])) {
    const device = await scene.add(module, "--no-partscan");
    const reader = read(scene, device, 128);
    await scene.run(["sleep", "2"]);
    process.kill(device.pid, "SIGTERM");
    scene.forget(device);
    await gone(device, 60_000);
    await reader.ended;
    assert.ok(await until(() => servers().length === 0));
  }
});

deviceTest("a refused ubd del over a slow request takes nothing from a device that stays", {
  skip: NO_PARTSCAN,
  limitS: 200,
}, async (scene) => {
  const file = writeModule(
    scene,
    "aborts",
    `size: 1024 ** 2, async read({ offset, buffer, signal }) {
      signal.throwIfAborted();
      if (offset === 256 * 1024) await new Promise((resolve) => setTimeout(resolve, 6000));
      buffer.fill(0);
    }`,
  );
  const device = await scene.add(file, "--no-partscan");
  // Who reads the partitions holds the disk's lock, which TRY_STOP_DEV waits for.
  const holder = scene.start(["bash", "-c", `exec 3< ${device.path}; exec sleep 600`]);
  const slow = read(scene, device, 64);
  await scene.run(["sleep", "1"]);
  const scan = scene.start(["blockdev", "--rereadpt", device.path]);
  const { code, stderr } = await scene.ubd("del", `${device.id}`);
  assert.equal(code, EXIT.BUSY, stderr);
  await scan.ended;
  assert.equal((await slow.ended).code, 0);
  // Nor does who announces a stop that does not come.
  process.kill(device.pid, STOPPING_SIGNAL);
  await scene.run(["sleep", "1"]);
  assert.equal((await read(scene, device).ended).code, 0);
  process.kill(holder.pid, "SIGKILL");
  await holder.ended.catch(() => {});
  await scene.del(device);
});

deviceTest("what a module throws in a timer, or does not await, is logged; the device lives", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const file = writeModule(
    scene,
    "stray",
    `size: 1024 ** 2, async read({ offset, buffer }) {
      if (offset === 4096) setTimeout(function inTimer() { throw new Error("thrown in a timer"); }, 1);
      if (offset === 8192) (async function forgotten() { throw new Error("not awaited"); })();
      buffer.fill(0);
    }`,
  );
  const device = await scene.add(file);
  for (const at of [1, 2, 0]) assert.equal((await read(scene, device, at).ended).code, 0);
  const log = async () => (await scene.ubd("log", `${device.id}`)).stdout;
  assert.ok(
    await until(async () =>
      /threw where nothing catches it: Error: thrown in a timer\n\s+at .*stray\.ts:\d+/.test(
        await log(),
      ) &&
      /an await is missing\): Error: not awaited\n\s+at .*stray\.ts:\d+/.test(await log())
    ),
    await log(),
  );
  const kernel = scene.kernelLines().join("\n");
  assert.match(kernel, /thrown in a timer\n.*at .*stray\.ts:\d+/);
  await scene.del(device);
});

deviceTest("an upgrade to a module that never comes back leaves the old server serving", {
  limitS: 300,
  skip: NO_QUIESCE,
}, async (scene) => {
  const file = writeModule(scene, "changes", SERVES);
  const device = await scene.add(file, "--recovery", "--start-timeout", "20");
  for (const top of [NEVER, "syntax error"]) {
    writeModule(scene, "changes", SERVES, top);
    const { code, stderr } = await scene.ubd("upgrade", `${device.id}`);
    assert.ok(
      ([EXIT.TIMEOUT, EXIT.USAGE] as number[]).includes(code),
      `${top}: ${code}, ${stderr}`,
    );
    assert.match(stderr, /served by its old server/);
    assert.equal((await read(scene, device).ended).code, 0);
  }
  writeModule(scene, "changes", `async open() { ${NEVER} }`);
  const late = await scene.ubd("upgrade", `${device.id}`);
  assert.equal(late.code, EXIT.TIMEOUT, late.stderr);
  assert.match(late.stderr, /waits for a server: ubd recover/);
  writeModule(scene, "changes", SERVES);
  const { code, stderr } = await scene.ubd("recover", `${device.id}`);
  assert.equal(code, 0, stderr);
  assert.equal((await read(scene, device).ended).code, 0);
  await scene.ubd("del", `${device.id}`);
  scene.forget(device);
});

deviceTest("an upgrade that is interrupted, or dies, over a slow request freezes nothing", {
  limitS: 600,
  skip: NO_QUIESCE || !FULL && "at full scale only: it takes minutes",
}, async (scene) => {
  const gate = join(scene.directory, "gate");
  const file = writeModule(
    scene,
    "slow",
    `size: 1024 ** 2, timeoutMs: 300_000, async read({ offset, buffer }) {
      const { existsSync } = await import("node:fs");
      while (offset === 512 * 1024 && !existsSync(${JSON.stringify(gate)})) {
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
      buffer.fill(0);
    }`,
  );
  const device = await scene.add(file, "--recovery");
  const ask = async (...args: string[]) => {
    const { code, stdout, stderr } = await scene.ubd(...args, `${device.id}`);
    return { code, text: stdout + stderr };
  };
  const release = () => writeFileSync(gate, "");
  /** @param then what is done to the slow request once `act` has been done. */
  const during = async (verb: string, act: (pid: number) => void, then = release) => {
    rmSync(gate, { force: true });
    const slow = read(scene, device, 128);
    await scene.run(["sleep", "1"]);
    const job = scene.start(["ubd", verb, `${device.id}`]);
    const noted = async () => (await ask("info")).text.includes("quiescing");
    assert.ok(await until(noted, 100_000), "it does not begin");
    act(job.pid);
    then();
    const { code } = await job.ended.catch(() => ({ code: -1 }));
    return { code, slow };
  };
  const works = async () => {
    const quick = read(scene, device);
    let ended = false;
    quick.ended.finally(() => ended = true);
    return await until(() => ended, 60_000) && (await quick.ended).code === 0;
  };
  // Interrupted: seen through, then the device waits, and says so.
  for (const verb of ["upgrade", "quiesce"]) {
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      const { code, slow } = await during(verb, (pid) => process.kill(pid, signal));
      assert.equal(code, EXIT.INTERRUPTED, `${verb}, ${signal}`);
      assert.equal((await slow.ended).code, 0);
      assert.match((await ask("info")).text, /QUIESCED/);
      assert.equal((await ask("recover")).code, 0);
      assert.ok(await works());
    }
  }
  // Killed: the new server goes on without its caller.
  const killed = await during("upgrade", (pid) => process.kill(pid, "SIGKILL"));
  assert.equal((await killed.slow.ended).code, 0);
  assert.ok(await works());
  // All of it killed: whoever looks sees it, and recover mends it.
  const dead = await during("quiesce", (pid) => process.kill(pid, "SIGKILL"), () => {});
  for (const verb of ["list", "info"]) {
    const { stdout, stderr } = await scene.ubd(verb, `${device.id}`);
    assert.match(stdout, /holds all requests.*ubd recover/, `${verb}: ${stdout}${stderr}`);
  }
  assert.match((await scene.ubd("doctor")).stdout, /holds all requests/);
  release();
  assert.equal((await ask("recover")).code, 0);
  assert.equal((await dead.slow.ended).code, 0);
  assert.ok(await works());
  await ask("del");
  scene.forget(device);
});

deviceTest(
  "a module that cannot be watched is not added, and one that is served is served on",
  { skip: NO_QUIESCE },
  async (scene) => {
    const file = writeModule(scene, "watched", SERVES);
    const device = await scene.add(file, "--watch");
    const setting = "/proc/sys/fs/inotify/max_user_watches";
    const before = await scene.sh(`cat ${setting}`);
    scene.finally(() => scene.sh(`echo ${before} > ${setting}`));
    await scene.sh(`echo 0 > ${setting}`);
    const { code, stderr } = await scene.ubd("add", file, "--watch");
    assert.equal(code, EXIT.FAILURE, stderr);
    assert.match(stderr, /watch .*ENOSPC.*inotify/);
    const upgraded = await scene.ubd("upgrade", `${device.id}`);
    assert.equal(upgraded.code, 0, upgraded.stderr);
    assert.match((await scene.ubd("log", `${device.id}`)).stdout, /changes of .* are not taken/);
    await scene.ubd("del", `${device.id}`);
    scene.forget(device);
  },
);
