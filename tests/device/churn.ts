// SPDX-License-Identifier: MIT
/**
 * Adds and deletes a device many times in one process, through the library: `churn.ts COUNT FILE`.
 *
 * Run by life_cycle_test.ts, on Bun or Deno. Prints what the process holds after the third round,
 * when everything lazy has been loaded, and after the last one, as JSON. A runtime lets go of an
 * ended worker's thread and descriptors some time after it has said so, hence the waits.
 * @module
 */

import { closeSync, openSync, readdirSync, readSync } from "node:fs";
import process from "node:process";
import { setTimeout } from "node:timers/promises";
import { Control } from "../../core/control.ts";
import { Device } from "../../core/device.ts";
import { findTarget } from "../../targets/mod.ts";
import { queueThreadEntry } from "../../targets/queue_thread.ts";

const WARM_UP_ROUNDS = 3;
const SETTLE_LIMIT_MS = 30_000;

type Holdings = ReturnType<typeof holdings>;

function holdings() {
  const count = (what: string) => readdirSync(`/proc/self/${what}`).length;
  return { descriptors: count("fd"), threads: count("task") };
}

/** What is held once it satisfies `settled`, or when the limit has passed. */
async function holdingsOnce(settled: (now: Holdings, before: Holdings) => boolean) {
  let now = holdings();
  for (let waitedMs = 0; waitedMs < SETTLE_LIMIT_MS; waitedMs += 1000) {
    const before = now;
    await setTimeout(1000);
    now = holdings();
    if (settled(now, before)) break;
  }
  return now;
}

async function cycle(control: Control, file: string, round: number): Promise<void> {
  const type = findTarget(round % 2 ? "loop" : "null");
  const options = round % 2 ? { file } : {};
  const { hasVolatileCache } = control.dialect;
  const target = type.open(options, { shim: control.shim, hasVolatileCache });
  const device = await Device.create(control, {
    id: -1,
    queues: 1 + round % 3,
    depth: 16,
    ioBytesMax: 65536,
    flags: 0n,
    targetName: type.name,
    target,
    queueThreadEntry,
    log: (text) => process.stderr.write(`${text}\n`),
  });
  const fd = openSync(device.path, "r");
  readSync(fd, new Uint8Array(4096));
  closeSync(fd);
  await device.stop();
}

async function main(): Promise<void> {
  const [count, file] = [Number(process.argv[2]), process.argv[3]!];
  using control = await Control.open();
  for (let round = 0; round < WARM_UP_ROUNDS; round++) await cycle(control, file, round);
  const first = await holdingsOnce((now, before) =>
    now.descriptors === before.descriptors && now.threads === before.threads
  );
  for (let round = WARM_UP_ROUNDS; round < count; round++) await cycle(control, file, round);
  const last = await holdingsOnce((now) =>
    now.descriptors <= first.descriptors && now.threads <= first.threads
  );
  console.log(JSON.stringify({ first, last }));
}

main().then(() => process.exit(0), (error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exit(1);
});
