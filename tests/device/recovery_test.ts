// SPDX-License-Identifier: MIT
/** Devices that outlive their server. */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import {
  type Added,
  blockStat,
  DATA_MODES,
  deviceTest,
  KERNEL,
  NO_QUIESCE,
  scaled,
  type Scene,
  servers,
  startVerifier,
  statePath,
  until,
} from "./helpers.ts";

/** Kills the server and waits until the driver says so. */
async function kill(scene: Scene, device: Added, state: string): Promise<void> {
  process.kill(device.pid, "SIGKILL");
  await until(() => !servers().includes(device.pid));
  const told = async () => (await scene.ubd("list", "-n", `${device.id}`)).stdout.includes(state);
  assert.ok(await until(told, 60_000), `never ${state}`);
}

async function recover(scene: Scene, device: Added): Promise<Added> {
  const { code, stdout, stderr } = await scene.ubd("recover", "-n", `${device.id}`);
  assert.equal(code, 0, stderr);
  return scene.adopt(stdout, stderr);
}

deviceTest("recover serves the same device again: reissue loses no I/O of a running fio", {
  limitS: scaled(300, 2400),
  everywhere: true,
  oldest: true,
}, async (scene) => {
  let device = await scene.add("loop", scene.image("disk", 64 << 20), "--recovery=reissue");
  const fio = startVerifier(scene, device, 16);
  const kills = scaled(2, 100);
  for (let round = 0; round < kills; round++) {
    await scene.sh(`sleep ${1 + round % 2}`);
    fio.goesOn();
    // Every other time without waiting until the driver has noticed.
    if (round % 2 === 0) await kill(scene, device, "state QUIESCED");
    else process.kill(device.pid, "SIGKILL");
    const next = await recover(scene, device);
    assert.equal(next.path, device.path);
    assert.equal(/flags (\S+)/.exec(next.stdout)![1], /flags (\S+)/.exec(device.stdout)![1]);
    device = next;
  }
  await fio.finish();
  await scene.del(device);
});

const THREADS = [
  { queues: 2, threads: 1 },
  { queues: 1, threads: 3 },
];

for (const { queues, threads } of THREADS) {
  const what = `-q ${queues} --threads ${threads}`;
  deviceTest(`a running fio sees no error with ${what}, nor when it is recovered`, {
    limitS: 240,
  }, async (scene) => {
    const args = ["loop", scene.image("disk", 16 << 20), "--recovery", ...what.split(" ")];
    if (threads > queues && KERNEL !== "newest") {
      const { code, stderr } = await scene.ubd("add", ...args);
      assert.equal(code, 1, stderr);
      assert.match(stderr, /lacks PER_IO_DAEMON \(needs 6\.16\)/);
      return;
    }
    let device = await scene.add(...args);
    const fio = startVerifier(scene, device, 64);
    for (const round of [0, 1]) {
      const lines = [...device.stdout.matchAll(/queue (\d): tid (\d+) /g)];
      assert.equal(lines.length, Math.max(queues, threads), device.stdout);
      assert.equal(new Set(lines.map(([, queue]) => queue)).size, queues, device.stdout);
      const tids = [...new Set(lines.map(([, , tid]) => tid))];
      assert.equal(tids.length, threads, device.stdout);
      const turns = (tid: string | undefined) =>
        Number(readFileSync(`/proc/${device.pid}/task/${tid}/schedstat`, "utf8").split(" ")[2]);
      const before = tids.map(turns);
      const served = () => tids.every((tid, at) => turns(tid) > before[at]! + 10);
      assert.ok(await until(served, 60_000), `${before} and then ${tids.map(turns)}`);
      const moved = await scene.ubd("set_affinity", `${device.id}`, "--cpuset", "1");
      assert.equal(moved.code, 0, moved.stderr);
      const { stdout } = await scene.ubd("list", "-n", `${device.id}`);
      assert.equal(stdout.match(/queue 0: .* affinity\(1 \)/g)!.length, lines.length / queues);
      fio.goesOn();
      if (round > 0) break;
      const info = (await scene.ubd("info", `${device.id}`)).stdout;
      assert.match(info, new RegExp(`^queues .*, served by ${threads} threads?$`, "m"));
      const verbose = JSON.parse((await scene.ubd("list", "-v", "-n", `${device.id}`)).stdout);
      const others = verbose.queues[0].others?.length ?? 0;
      assert.equal(others, lines.length / queues - 1, JSON.stringify(verbose.queues));
      await kill(scene, device, "state QUIESCED");
      device = await recover(scene, device);
    }
    await fio.finish();
    await scene.del(device);
  });
}

deviceTest("recover finds the way of the data: reissue loses no I/O in any of them", {
  limitS: 300,
}, async (scene) => {
  const devices = [];
  for (const { flags } of DATA_MODES) {
    const image = scene.image(`disk-${devices.length}`, 16 << 20);
    devices.push(await scene.add("loop", image, "--recovery", ...flags));
  }
  const verifiers = devices.map((device) => startVerifier(scene, device, 16));
  await scene.sh("sleep 1");
  await Promise.all(devices.map(async (device, index) => {
    verifiers[index]!.goesOn();
    await kill(scene, device, "state QUIESCED");
    const next = await recover(scene, device);
    assert.match(next.stderr, new RegExp(`, ${DATA_MODES[index]!.note}\n`));
    devices[index] = next;
  }));
  for (const verifier of verifiers) await verifier.finish();
  for (const device of devices) await scene.del(device);
});

/** Writes on through errors. @returns how many requests failed, once it is told to end. */
function startStubborn(scene: Scene, { path }: Added, depth: number): () => Promise<number> {
  const fio = scene.start([
    ...["fio", "--name=stubborn", `--filename=${path}`, "--direct=1", "--ioengine=libaio"],
    ...["--rw=randwrite", "--bs=4k", `--iodepth=${depth}`, "--size=8M", "--time_based"],
    ...["--runtime=3600", "--continue_on_error=io", "--output-format=json", "--max-jobs=2"],
  ], { limitMs: 1_200_000 });
  return async () => {
    fio.kill("SIGINT");
    const { stdout, stderr } = await fio.ended;
    const report = stdout.slice(stdout.indexOf("{\n"), stdout.lastIndexOf("}") + 1);
    const { total_err } = JSON.parse(report).jobs[0] as { total_err: number };
    assert.ok(total_err >= 0, stdout + stderr);
    return total_err;
  };
}

for (const mode of ["wait", "fail"] as const) {
  const fails = mode === "wait" ? "only what was in flight" : "all until there is a new server";
  deviceTest(`kills in mode ${mode} fail ${fails}; then all is well`, {
    limitS: scaled(180, 1200),
    anyKernel: mode === "wait",
    skip: mode === "fail" && KERNEL !== "newest" && "USER_RECOVERY_FAIL_IO needs Linux 6.13",
  }, async (scene) => {
    const [depth, kills] = [16, scaled(1, 10)];
    let device = await scene.add("loop", scene.image("disk", 64 << 20), `--recovery=${mode}`);
    let worst = 0;
    for (let round = 0; round < kills; round++) {
      const end = startStubborn(scene, device, depth);
      const writes = () => blockStat(device)[4]!;
      const before = writes();
      assert.ok(await until(() => writes() > before + depth, 60_000), "fio writes nothing");
      await kill(scene, device, mode === "wait" ? "QUIESCED" : "FAIL_IO");
      if (mode === "fail") {
        const late = ["dd", "if=/dev/zero", `of=${device.path}`, "count=1", "oflag=direct"];
        assert.notEqual((await scene.run(late)).code, 0, "without a server, a write succeeds");
      }
      device = await recover(scene, device);
      // When all its writes fail, fio ends by itself.
      const recovered = writes();
      const goesOn = () => mode === "fail" || writes() > recovered + depth;
      assert.ok(await until(goesOn, 60_000), "fio does not go on");
      const failed = await end();
      worst = Math.max(worst, failed);
      if (mode === "wait") assert.ok(failed <= depth, `${failed} failed, ${depth} were in flight`);
      else assert.ok(failed > 0, "what was in flight did not fail");
      await scene.sh(
        "head -c 1M /dev/urandom > data; dd status=none if=data bs=64k oflag=direct " +
          `of=${device.path} seek=512; cmp -n 1M data <(dd status=none if=${device.path} bs=64k ` +
          "skip=512 iflag=direct count=16)",
      );
    }
    console.log(`${kills} kills in mode ${mode}: at most ${worst} requests failed at one`);
    const fio = startVerifier(scene, device, depth);
    await scene.sh("sleep 1");
    await fio.finish();
    await scene.del(device);
  });
}

for (const how of ["kill -9 and recover", "upgrade"]) {
  deviceTest(`a mounted ext4 outlives ${how}: fio sees no error, files whole, fsck content`, {
    limitS: 300,
    anyKernel: how !== "upgrade",
    skip: how === "upgrade" && NO_QUIESCE,
  }, async (scene) => {
    let device = await scene.add("loop", scene.image("disk", 96 << 20), "--recovery");
    await scene.sh(`mkfs.ext4 -q ${device.path}`);
    const point = await scene.mount("point", device.path);
    await scene.sh("head -c 4M /dev/urandom > data");
    const fio = startVerifier(scene, { path: `${point}/fio` }, 16);
    const copy = `for i in {1..6}; do cp data ${point}/$i; sync; sleep 0.3; done`;
    const writer = scene.start(["bash", "-c", copy]);
    for (let round = 0; round < scaled(1, 10); round++) {
      await scene.sh("sleep 1");
      fio.goesOn();
      if (how === "upgrade") {
        const { code, stdout, stderr } = await scene.ubd("upgrade", `${device.id}`);
        assert.equal(code, 0, stderr);
        device = scene.adopt(stdout);
      } else {
        await kill(scene, device, "state QUIESCED");
        device = await recover(scene, device);
      }
    }
    assert.equal((await writer.ended).code, 0);
    await fio.finish();
    await scene.sh(`for i in {1..6}; do cmp data ${point}/$i; done`);
    await scene.sh(`umount ${point}; fsck.ext4 -f -n ${device.path}`);
    await scene.del(device);
  });
}

for (const [mode, state] of [["wait", "QUIESCED"], ["fail", "FAIL_IO"]] as const) {
  deviceTest(
    `recover in mode ${mode}: what was written before is read after`,
    {},
    async (scene) => {
      const { stdout: features } = await scene.ubd("features");
      if (mode === "fail" && !features.includes("RECOVERY_FAIL_IO")) {
        const refused = await scene.ubd("add", "null", "--recovery=fail");
        assert.equal(refused.code, 1);
        assert.match(refused.stderr, /kernel 6\.12\S* lacks USER_RECOVERY_FAIL_IO \(needs 6\.13\)/);
        return;
      }
      const device = await scene.add("loop", scene.image("disk", 16 << 20), `--recovery=${mode}`);
      await scene.sh(`head -c 1M /dev/urandom > data; dd status=none if=data of=${device.path} \
      bs=64k oflag=direct`);
      await kill(scene, device, `state ${state}`);
      if (mode === "fail") {
        const read = await scene.run(["dd", `if=${device.path}`, "of=/dev/null", "iflag=direct"]);
        assert.notEqual(read.code, 0, "I/O fails until there is a server");
      }
      const waiting = mode === "wait" &&
        scene.start(["dd", `if=${device.path}`, "of=/dev/null", "count=1", "iflag=direct"]);
      const next = await recover(scene, device);
      if (waiting) assert.equal((await waiting.ended).code, 0, "later I/O waits for a server");
      await scene.sh(`cmp -n 1M data ${next.path}`);
      await scene.del(next);
    },
  );
}

deviceTest("the file of a device that waits for a server is spoken for", {
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 16 << 20);
  const device = await scene.add("loop", image, "--recovery");
  await kill(scene, device, "state QUIESCED");
  await scene.sh("ln disk other-name");
  for (const words of [["loop", image], ["concat", scene.image("first", 1 << 20), "other-name"]]) {
    const { code, stderr } = await scene.ubd("add", ...words);
    assert.equal(code, 4, stderr);
    const reason =
      /^ubd: Cannot serve \S+\/(disk|other-name): EBUSY, .*\(device \d+ has it, and waits/;
    assert.match(stderr, reason);
  }
  const forced = await scene.add("loop", image, "--ro", "--force");
  await scene.del(forced);
  const recovered = await recover(scene, device);
  await scene.del(recovered);
  await scene.del(await scene.add("loop", image));
});

deviceTest("recover refuses what it cannot recover", {}, async (scene) => {
  const device = await scene.add("null");
  const alive = await scene.ubd("recover", `${device.id}`);
  assert.notEqual(alive.code, 0);
  assert.match(alive.stderr, /START_USER_RECOVERY on device \d+: E(INVAL|BUSY)/);
  const file = await scene.add("loop", scene.image("disk", 1 << 20), "--recovery");
  const locked = await scene.ubd("recover", `${file.id}`);
  assert.equal(locked.code, 4);
  assert.match(locked.stderr, new RegExp(`process ${file.pid}, is alive; ubd upgrade`));
  await scene.del(file);
  assert.equal((await scene.ubd("recover", "999")).code, 3);
  assert.equal((await scene.ubd("recover")).code, 2);
  await scene.del(device);
});

deviceTest("who interrupts a recovery leaves the device waiting, with its state", {
  limitS: 300,
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 4 << 20);
  await scene.sh(`head -c 4M /dev/urandom > ${image}; cp ${image} copy`);
  let device = await scene.add("loop", image, "--recovery=wait");
  const waits = async () => {
    await until(() => servers().length === 0);
    const { stdout } = await scene.ubd("list", "-n", `${device.id}`);
    return stdout.includes("state QUIESCED") && stdout.includes(image);
  };
  await kill(scene, device, "QUIESCED");

  // While it waits for its file.
  const lock = scene.start(["flock", image, "sleep", "600"]);
  assert.ok(await until(async () => (await scene.run(["flock", "-n", image, "true"])).code !== 0));
  const typed = scene.start(["ubd", "recover", `${device.id}`]);
  assert.ok(await until(() => servers().length === 1));
  await scene.sh("sleep 1");
  typed.kill("SIGINT");
  const { code, stderr } = await typed.ended;
  lock.kill("SIGKILL");
  await lock.ended;
  assert.equal(code, 130, stderr);
  assert.ok(await until(waits), "interrupted while it waits for its file");

  for (const step of ["recovery started", "queues started", "recovered"]) {
    // A reader that finds a server for a moment gets its answer then, or from the next one.
    const reader = scene.start(["cmp", "-n", "1M", "copy", device.path]);
    const told = await scene.run(["ubd", "recover", `${device.id}`], {
      env: { UBD_DEBUG_INTERRUPT: step },
    });
    if (told.code === 130) {
      const message = /^ubd: interrupted; device \d+ waits for a server: ubd recover -n \d+\n$/;
      assert.match(told.stderr, message);
      assert.ok(await until(waits), step);
      device = await recover(scene, device);
    } else {
      // It has heard that the device is LIVE before it came to hear of the signal.
      assert.deepEqual([told.code, step === "recovery started"], [0, false], told.stderr);
      device = scene.adopt(told.stdout);
    }
    assert.equal((await reader.ended).code, 0, step);
    await kill(scene, device, "QUIESCED");
  }
  device = await recover(scene, device);
  await scene.del(device);
});

deviceTest("the state of another device that had the id before counts as none", {
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 1 << 20);
  const first = await scene.add("loop", image, "-n", "57", "--recovery");
  const stale = readFileSync(statePath(57), "utf8");
  await scene.del(first);
  const device = await scene.add("loop", scene.image("other", 1 << 20), "-n", "57", "--recovery");
  const own = readFileSync(statePath(57), "utf8");
  await kill(scene, device, "QUIESCED");
  writeFileSync(statePath(57), stale);
  assert.doesNotMatch((await scene.ubd("list", "-n", "57")).stdout, /backing_file/);
  const { code, stderr } = await scene.ubd("recover", "57");
  assert.equal(code, 1, stderr);
  assert.match(stderr, /^ubd: Cannot recover on device 57: ENOENT.*it has no state file/);
  // Its file is not spoken for.
  await scene.del(await scene.add("loop", image));
  writeFileSync(statePath(57), own);
  await scene.del(await recover(scene, device));
});
