// SPDX-License-Identifier: MIT
/** add --supervise: a server that dies is replaced, one that is told to end is not. */

import assert from "node:assert/strict";
import { readFileSync, readlinkSync } from "node:fs";
import process from "node:process";
import {
  type Added,
  deviceTest,
  gone,
  NO_QUIESCE,
  type Scene,
  servers,
  startVerifier,
  statePath,
  until,
} from "./helpers.ts";

interface Facts {
  state: string;
  pid: number;
  supervisor?: number;
  target: Record<string, string | number>;
}

async function facts(scene: Scene, { id }: Added): Promise<Facts> {
  const { stdout } = await scene.ubd("info", `${id}`, "--json");
  return JSON.parse(stdout);
}

function supervisorOf({ id }: Added): number {
  return JSON.parse(readFileSync(statePath(id), "utf8")).supervisor;
}

async function isReplaced(scene: Scene, device: Added, pid: number): Promise<number> {
  let now = await facts(scene, device);
  const replaced = async () => {
    now = await facts(scene, device);
    return now.state === "LIVE" && now.pid > 0 && now.pid !== pid;
  };
  assert.ok(await until(replaced, 60_000), JSON.stringify(now));
  return now.pid;
}

deviceTest("a supervised server that is killed is replaced; I/O only waits", {
  limitS: 240,
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add("loop", scene.image("disk", 16 << 20), "--supervise");
  const fio = startVerifier(scene, device, 16);
  let { pid } = device;
  for (let kill = 0; kill < 2; kill++) {
    await scene.sh("sleep 1");
    fio.goesOn();
    process.kill(pid, "SIGKILL");
    pid = await isReplaced(scene, device, pid);
  }
  const mounts = (who: number | string) => readlinkSync(`/proc/${who}/ns/mnt`);
  assert.equal(mounts(supervisorOf(device)), mounts("self"), "it pins no mounts");
  assert.notEqual(mounts(pid), mounts("self"), "the next server has its own, too");
  await fio.finish();
  assert.equal((await facts(scene, device)).supervisor, supervisorOf(device));
  await scene.del(device);
  assert.ok(await until(() => servers().length === 0), "the supervisor ends");
});

deviceTest("SIGTERM to the supervisor deletes the device; without it the server goes on", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add("null", "--supervise");
  process.kill(supervisorOf(device), "SIGTERM");
  scene.forget(device);
  await gone(device);

  const other = await scene.add("null", "--supervise");
  process.kill(supervisorOf(other), "SIGKILL");
  await until(() => servers().length === 1);
  await scene.sh(`dd if=${other.path} of=/dev/null bs=4k count=1 iflag=direct status=none`);
  assert.equal((await facts(scene, other)).pid, other.pid);
  await scene.del(other);
});

deviceTest("a supervisor gives up after some deaths, and says so", {
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 1 << 20);
  const env = { UBD_DEBUG_EXIT: "recovery started" }; // Each new server dies there.
  const added = await scene.run(["ubd", "add", "loop", image, "--supervise"], { env });
  const device = scene.adopt(added.stdout, added.stderr);
  process.kill(device.pid, "SIGKILL");
  assert.ok(await until(() => servers().length === 0, 60_000), "it tries for ever");
  const lines = scene.kernelLines().filter((line) => line.includes("ubd["));
  assert.match(lines.at(-1)!, new RegExp(`gives up device ${device.id} after 5 .*ubd recover`));
  const { state, pid, target } = await facts(scene, device);
  assert.deepEqual([state, pid, target.backing_file], ["QUIESCED", -1, image]);
  const { code, stdout, stderr } = await scene.ubd("recover", `${device.id}`);
  assert.equal(code, 0, stderr);
  const next = scene.adopt(stdout);
  assert.ok(servers().includes(supervisorOf(next)), "a recovered server has a supervisor again");
  await scene.del(next);
});

deviceTest("what is deleted while its supervised server is dead stays deleted", {
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 1 << 20);
  const env = { UBD_DEBUG_EXIT: "recovery started" };
  const added = await scene.run(["ubd", "add", "loop", image, "--supervise"], { env });
  const device = scene.adopt(added.stdout, added.stderr);
  process.kill(device.pid, "SIGKILL");
  const waits = async () => (await facts(scene, device)).state === "QUIESCED";
  assert.ok(await until(waits, 60_000));
  await scene.del(device);
  assert.ok(await until(() => servers().length === 0), "the supervisor ends");
  assert.equal((await scene.ubd("list", "-n", `${device.id}`)).code, 3);
});

deviceTest("an upgrade replaces the supervisor too", { skip: NO_QUIESCE }, async (scene) => {
  const device = await scene.add("null", "--supervise");
  const before = supervisorOf(device);
  const { code, stdout, stderr } = await scene.ubd("upgrade", `${device.id}`);
  assert.equal(code, 0, stderr);
  const next = scene.adopt(stdout);
  assert.ok(await until(() => !servers().includes(before)), "the old supervisor stays");
  process.kill(next.pid, "SIGKILL");
  await isReplaced(scene, next, next.pid);
  await scene.del(next);
});
