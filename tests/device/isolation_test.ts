// SPDX-License-Identifier: MIT
/** The server keeps apart from its surroundings: mounts, memory, descriptors, limits. */

import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { totalmem } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import {
  type Added,
  blockStat,
  cannotRun,
  deviceTest,
  isTold,
  RUNNER,
  Scene,
  sleep,
  until,
} from "./helpers.ts";

const statusOf = (pid: number, key: string) =>
  new RegExp(`^${key}:\\s+(.*)$`, "m").exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1];

/** Flags of a process's threads, by their ids. */
async function threadFlags(scene: Scene, pid: number): Promise<Map<string, number>> {
  const { stdout } = await scene.run(["bash", "-c", `cat /proc/${pid}/task/*/stat`]);
  return new Map(
    stdout.trimEnd().split("\n").map((stat) => {
      const fields = stat.split(") ").pop()!; // Before it is the name, which may hold spaces.
      return [stat.split(" ")[0]!, Number(fields.split(" ")[6])];
    }),
  );
}

const PF_MEMALLOC_NOIO = 0x80000;

deviceTest("the server has its own mounts, and no other's; its threads flush I/O", {
  everywhere: "deno",
  oldest: true,
}, async (scene) => {
  const point = await scene.mount("point", "-t tmpfs tmpfs");
  const device = await scene.add("loop", scene.image("disk", 16 << 20), "-q", "2");
  const { pid } = device;
  const namespaces = readdirSync(`/proc/${pid}/task`)
    .map((tid) => readlinkSync(`/proc/${pid}/task/${tid}/ns/mnt`));
  assert.equal(new Set(namespaces).size, 1, "all threads are in the same namespace");
  assert.notEqual(namespaces[0], readlinkSync("/proc/self/ns/mnt"));
  const mounts = readFileSync(`/proc/${pid}/mountinfo`, "utf8");
  assert.doesNotMatch(mounts, / (shared|master):/);
  assert.ok(!mounts.includes(point), mounts);
  assert.ok(!mounts.includes(scene.directory), mounts);
  assert.ok(readFileSync("/proc/self/mountinfo", "utf8").includes(point), "it is still mounted");

  const tids = [...device.stdout.matchAll(/queue \d+: tid (\d+) /g)].map(([, tid]) => tid!);
  assert.equal(tids.length, 2);
  const threads = await threadFlags(scene, pid);
  assert.ok(tids.every((tid) => threads.has(tid)));
  // The runtime's too: the collector of garbage has all of them wait for each other.
  for (const [tid, flags] of threads) assert.ok(flags & PF_MEMALLOC_NOIO, `thread ${tid}`);
  assert.equal(readFileSync(`/proc/${pid}/oom_score_adj`, "utf8").trim(), "-1000");
  assert.equal(statusOf(pid, "Umask"), "0077");
  assert.equal(readlinkSync(`/proc/${pid}/cwd`), "/");
  // The backing outlives its mount point, and the device serves on.
  await scene.sh(`head -c 1M /dev/urandom > data; dd status=none if=data of=${device.path} \
    bs=64k oflag=direct; cmp -n 1M data ${device.path}`);
  await scene.del(device);
});

deviceTest("a server in the foreground, too, is an I/O flusher with all its threads", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const job = scene.start(["ubd", "add", "null", "--foreground"]);
  assert.ok(await until(() => isTold(job), 60_000), job.output());
  const device = scene.adopt(job.output());
  assert.notEqual(readFileSync(`/proc/${device.pid}/comm`, "utf8").trim(), "exe");
  const threads = await threadFlags(scene, device.pid);
  assert.ok(threads.size > 1);
  for (const [tid, flags] of threads) assert.ok(flags & PF_MEMALLOC_NOIO, `thread ${tid}`);
  job.kill("SIGINT");
  assert.equal((await job.ended).code, 0);
  scene.forget(device);
});

deviceTest("a server with --mlock keeps its memory locked, and serves", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  if (RUNNER === "deno") {
    const { code, stderr } = await scene.ubd("add", "null", "--mlock");
    assert.equal(code, 1);
    assert.match(stderr, /lock memory: EOPNOTSUPP.*Deno.*executable/);
    return;
  }
  const device = await scene.add("loop", scene.image("disk", 32 << 20), "--mlock");
  await scene.sh(`head -c 24M /dev/urandom > data; dd status=none if=data of=${device.path} \
    bs=256k oflag=direct; cmp -n 24M data ${device.path}`);
  const kiB = (key: string) => Number.parseInt(statusOf(device.pid, key)!);
  assert.ok(kiB("VmLck") > kiB("VmRSS") / 2, `${kiB("VmLck")} of ${kiB("VmRSS")} KiB`);
  await scene.del(device);
});

/**
 * A shell with mounts of its own mounts the device that it has added, writes to it, and ends. If
 * the server shares its mounts, the file system now hangs on the server alone.
 */
async function leaveMounted(scene: Scene, env: Record<string, string>): Promise<Added> {
  const image = scene.image("disk", 64 << 20);
  const script = `ubd add loop ${image} && device=$(ls -t /dev/ublkb* | head -1) &&
    mkfs.ext4 -q -E lazy_itable_init=1 $device && mount $device /mnt &&
    head -c 1M /dev/zero | tr '\\0' x > /mnt/file`;
  const command = ["unshare", "-m", "bash", "-euc", script];
  const { code, stdout, stderr } = await scene.run(command, { env });
  assert.equal(code, 0, stderr);
  return scene.adopt(stdout, stderr);
}

deviceTest("a file system that was mounted where the server started goes with its shell", {
  anyKernel: true,
  oldest: true,
}, async (scene) => {
  const device = await leaveMounted(scene, {});
  const image = `${scene.directory}/disk`;
  await scene.del(device); // Not --force: nobody has it mounted any more.
  await scene.sh(`fsck.ext4 -fn ${image} > /dev/null
    debugfs -R 'cat /file' ${image} 2> /dev/null | tr -d x | cmp - /dev/null
    test $(debugfs -R 'cat /file' ${image} 2> /dev/null | wc -c) = 1048576`);

  const killed = await leaveMounted(scene, {});
  process.kill(killed.pid, "SIGKILL");
  assert.ok(await until(() => !existsSync(`/proc/${killed.pid}`)), "the server does not end");
  await scene.del(killed);
});

/** It leaves a device that nothing but a reboot removes: only in a guest of its own. */
test("with shared mounts the same deadlocks (in a guest of its own: UBD_DEADLOCK=1)", {
  skip: cannotRun || process.env.UBD_DEADLOCK !== "1",
  timeout: 120_000,
}, async () => {
  const scene = new Scene();
  const device = await leaveMounted(scene, { UBD_DEBUG_SHARED_MOUNTS: "1" });
  await sleep(1000);
  process.kill(device.pid, "SIGKILL");
  assert.equal(await until(() => !existsSync(`/proc/${device.pid}`), 30_000), false);
  const stacks = readdirSync(`/proc/${device.pid}/task`)
    .map((tid) => readFileSync(`/proc/${device.pid}/task/${tid}/stack`, "utf8")).join("");
  assert.match(stacks, /cleanup_mnt|generic_shutdown_super/, stacks);
});

deviceTest("swap on a loop device survives memory pressure", { anyKernel: true }, async (scene) => {
  const device = await scene.add("loop", scene.image("disk", 512 << 20));
  await scene.sh(`mkswap ${device.path} > /dev/null; swapon ${device.path}
    echo +memory > /sys/fs/cgroup/cgroup.subtree_control
    mkdir /sys/fs/cgroup/tight; echo 16M > /sys/fs/cgroup/tight/memory.max`);
  scene.finally(() => scene.sh(`swapoff ${device.path} || true; rmdir /sys/fs/cgroup/tight`));
  // tail keeps all of it in memory, more than twice what its group may have.
  await scene.sh(`head -c 40M /dev/urandom > data
    { echo 0 > /sys/fs/cgroup/tight/cgroup.procs; tail -c 40M < <(cat data); } | cmp - data`);
  assert.equal(counters("/sys/fs/cgroup/tight/memory.events").oom_kill, 0);
  const sectors = blockStat(device)[6]!;
  assert.ok(sectors * 512 > 20 << 20, `only ${sectors} sectors were swapped out`);
  await scene.sh(`swapoff ${device.path}`);
  await scene.del(device);
});

const GIB_MIB = 1024;

deviceTest("1 GiB of swap carries a guest of 1 GiB through five minutes of pressure", {
  limitS: 1200,
  skip: totalmem() > GIB_MIB << 20 && "needs a guest of 1 GiB (docs/HACKING.md)",
}, async (scene) => {
  const image = scene.image("disk", 0);
  await scene.sh(`fallocate -l ${GIB_MIB}M ${image}`);
  // Without --mlock the server is swapped out to its own device, and never comes back.
  const device = await scene.add("loop", image, "--mlock");
  await scene.sh(`mkswap ${device.path} > /dev/null; swapon ${device.path}`);
  scene.finally(() => scene.run(["swapoff", device.path]));
  const before = counters("/proc/vmstat");
  let [swapFreeLeast, swapTotal] = [Infinity, 0];
  const look = setInterval(() => {
    const { "SwapFree:": free, "SwapTotal:": total } = counters("/proc/meminfo");
    [swapFreeLeast, swapTotal] = [Math.min(swapFreeLeast, free!), total!];
  }, 1000);
  const hog = ["bun", join(import.meta.dirname!, "hog.ts"), `${GIB_MIB + 256}`, "300"];
  const { code, stdout, stderr } = await scene.run(hog, { limitMs: 1_100_000 });
  clearInterval(look);
  assert.equal(code, 0, stderr);
  const after = counters("/proc/vmstat");
  const since = (key: string) => after[key]! - before[key]!;
  const usedMiB = Math.round((swapTotal - swapFreeLeast) / 1024);
  console.log(
    `${stdout.trim()}, pages out ${since("pswpout")}, in ${since("pswpin")}, ` +
      `most swap used ${usedMiB} MiB, OOM kills ${since("oom_kill")}`,
  );
  assert.equal(since("oom_kill"), 0);
  assert.ok(since("pswpout") > GIB_MIB << 8, "it was never short of memory");
  assert.ok(existsSync(`/proc/${device.pid}`), "the server is gone");
  await scene.sh(`swapoff ${device.path}`);
  await scene.del(device);
});

/** The numbers by name of a file such as /proc/vmstat. */
function counters(path: string): Record<string, number> {
  return Object.fromEntries(
    readFileSync(path, "utf8").trim().split("\n").map((line) => line.split(/\s+/))
      .map(([name, value]) => [name, Number(value)]),
  );
}
