// SPDX-License-Identifier: MIT
/** Devices that end while they are busy: by del, by a signal to the server, by its sudden death. */

import assert from "node:assert/strict";
import process from "node:process";
import {
  type Added,
  blockStat,
  DATA_MODES,
  deviceTest,
  gone,
  inPairs,
  type Job,
  killServer,
  scaled,
  type Scene,
  until,
} from "./helpers.ts";

/** Starts fio on the device and returns once it has I/O going. */
async function load(scene: Scene, device: Added): Promise<Job> {
  const job = scene.start([
    ...["fio", "--max-jobs=2", "--name=load", `--filename=${device.path}`, "--direct=1"],
    ...["--ioengine=libaio", "--iodepth=64", "--rw=randrw", "--bs=4k", "--size=64M"],
    ...["--time_based", "--runtime=600", "--group_reporting=1"],
  ]);
  const [reads, writes] = [blockStat(device)[0]!, blockStat(device)[4]!];
  const busy = () => {
    const stat = blockStat(device);
    return stat[0]! > reads + 100 && stat[4]! > writes + 100;
  };
  assert.ok(await until(busy, 60_000), `fio has I/O going: ${job.output()}`);
  return job;
}

/** How many devices were added, by all tests. */
let added = 0;

/** Alternates between the targets, so that both are seen ending, and between the data's ways. */
async function addFor(scene: Scene, round: number): Promise<Added> {
  if (round % 3 === 2) return await scene.add("null", "-q", "2");
  const image = scene.image(`disk-${round}.img`, 64 << 20);
  const flags = [[], ...DATA_MODES.map((mode) => mode.flags)];
  return await scene.add(
    "loop",
    image,
    "-q",
    `${1 + round % 2}`,
    ...flags[added++ % flags.length]!,
  );
}

/** fio gets errors once its device is gone, and must end by itself. */
async function endsByItself(job: Job): Promise<void> {
  const { stderr, code } = await job.ended;
  assert.notEqual(code, 128, `fio was killed: ${stderr}`);
}

deviceTest("del under load ends the I/O, the device and its server", {
  limitS: scaled(240, 3000),
}, async (scene) => {
  await inPairs(scaled(4, 50), async (round) => {
    const device = await addFor(scene, round);
    const job = await load(scene, device);
    await scene.delForced(device);
    await endsByItself(job);
  });
});

deviceTest("SIGTERM to the server under load ends the I/O and deletes the device", {
  anyKernel: true,
  limitS: scaled(180, 900),
}, async (scene) => {
  await inPairs(scaled(2, 10), async (round) => {
    const device = await addFor(scene, round);
    const job = await load(scene, device);
    process.kill(device.pid, "SIGTERM");
    await gone(device, 60_000);
    scene.forget(device);
    await endsByItself(job);
  });
});

deviceTest("kill -9 under load leaves a DEAD device, which list shows and del removes", {
  limitS: scaled(180, 1800),
}, async (scene) => {
  await inPairs(scaled(2, 20), async (round) => {
    const device = await addFor(scene, round);
    const job = await load(scene, device);
    await killServer(scene, device);
    await endsByItself(job);
    await scene.del(device);
  });
});

deviceTest("a handler that answers by promises answers every request of a crowd", {
  everywhere: "deno",
  limitS: scaled(120, 1200),
}, async (scene) => {
  // Answers as fast as can be: the more often the queue goes to sleep between two crowds.
  const fails = ["--opt", "errorRate=1", "--opt", "operations=read"];
  const device = await scene.add("fault", "--size", "16M", ...fails);
  const reads = scaled(32_768, 262_144);
  const { stdout, stderr } = await scene.run([
    ...["fio", "--name=crowd", `--filename=${device.path}`, "--direct=1", "--output-format=json"],
    ...["--ioengine=libaio", "--iodepth=32", "--rw=randread", "--bs=512", "--norandommap"],
    ...["--continue_on_error=all", "--size=16M", `--io_size=${reads * 512}`],
  ], { limitMs: scaled(110_000, 1_100_000) });
  const { jobs } = JSON.parse(stdout.slice(stdout.indexOf("{"))) as {
    jobs: { total_err: number; read: { total_ios: number } }[];
  };
  assert.ok(jobs[0]!.total_err >= reads * 0.99, `${stderr} ${JSON.stringify(jobs[0])}`);
  await scene.del(device);
});
