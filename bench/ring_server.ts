// SPDX-License-Identifier: MIT
/**
 * What bench/ring.ts measures: core/queue.ts in a Worker as in production, without a driver
 * (charFd -1 makes FETCH and COMMIT NOPs), serving as the null target does. loop.c is its twin.
 *
 *   ring_server.ts DEPTH    see loop.c for what goes through stdin and stdout
 */
import { readSync, writeSync } from "node:fs";
import process from "node:process";
import { URL } from "node:url";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { UBLK_IO_OP_READ } from "../abi/ublk_cmd.ts";
import { Engine } from "../core/engine.ts";
import { Queue } from "../core/queue.ts";
import { emptyStats, sumStats } from "../core/stats.ts";
import { type QueueConfig, type QueueMemory, Shim } from "../ffi/mod.ts";
import { nullTarget } from "../targets/null.ts";

const DESCRIPTOR_BYTES = 24;
const SECTORS = 8;

/** Describes a READ of 4 KiB for each tag, as the driver would. */
class DescribedShim extends Shim {
  override queueInit(config: QueueConfig): QueueMemory | number {
    const memory = super.queueInit(config);
    if (typeof memory === "number") return memory;
    const view = new DataView(memory.descriptors);
    for (let tag = 0; tag < config.depth; tag++) {
      view.setUint32(tag * DESCRIPTOR_BYTES, UBLK_IO_OP_READ, true);
      view.setUint32(tag * DESCRIPTOR_BYTES + 4, SECTORS, true);
      view.setUint32(tag * DESCRIPTOR_BYTES + 8, SECTORS * tag, true);
    }
    return memory;
  }
}

const cpuSeconds = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
};

/** Seconds to serve for, from stdin; at its end this thread stands still until it is killed. */
function nextOrder(): number {
  const bytes = new Uint8Array(64);
  const length = readSync(0, bytes);
  if (length === 0) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
  return Number(new TextDecoder().decode(bytes.subarray(0, length)));
}

function serve(depth: number): void {
  const shim = new DescribedShim();
  const wakeFd = shim.native.ubd_eventfd(0);
  const stats = emptyStats();
  const config = {
    charFd: -1,
    wakeFd,
    queueId: 0,
    depth,
    ioBytesMax: 512 * 1024,
    fetchOpcode: 0,
    commitOpcode: 0,
    sqe128: false,
    descriptorOffset: 0,
    descriptorBytes: Math.ceil(depth * DESCRIPTOR_BYTES / 4096) * 4096,
  };
  using queue = new Queue(shim, config, stats);
  const context = {
    depth,
    ioBytesMax: 512 * 1024,
    deviceBytes: () => undefined,
    log: console.error,
  };
  const handler = new Engine(nullTarget.volume(null, context), context);

  // Nothing is done for a request but serving it: the main thread ends the measurement.
  const now = () => ({
    requests: sumStats([stats]).read.requests,
    seconds: performance.now() / 1000,
    cpuSeconds: cpuSeconds(),
  });
  let since: ReturnType<typeof now> | undefined;
  const woken = () => {
    if (since) {
      const until = now();
      const [requests, seconds, cpu] = (["requests", "seconds", "cpuSeconds"] as const)
        .map((name) => until[name] - since![name]);
      writeSync(1, `${requests} ${seconds} ${cpu}\n`);
    }
    parentPort!.postMessage({ wakeFd, seconds: nextOrder() });
    since = now();
    return false;
  };
  shim.native.ubd_wake(wakeFd);
  queue.run(handler, woken, (error) => {
    throw error;
  });
}

if (isMainThread) {
  const { native } = new Shim();
  const worker = new Worker(new URL(import.meta.url), { workerData: Number(process.argv[2]) });
  worker.on("message", ({ wakeFd, seconds }: { wakeFd: number; seconds: number }) => {
    setTimeout(() => native.ubd_wake(wakeFd), seconds * 1000);
  });
  worker.on("error", (error) => {
    console.error(error);
    process.exit(1);
  });
} else {
  serve(workerData as number);
}
