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
import { isMainThread, Worker, workerData } from "node:worker_threads";
import { UBLK_IO_OP_READ } from "../abi/ublk_cmd.ts";
import { Queue } from "../core/queue.ts";
import { type QueueConfig, type QueueMemory, Shim } from "../ffi/mod.ts";
import { nullTarget } from "../targets/null.ts";

const CHUNK = 10_000;
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
  using queue = new Queue(shim, {
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
  });
  const { handle } = nullTarget.serve(null, {
    depth,
    ioBytesMax: 512 * 1024,
    deviceBytes: () => undefined,
    log: console.error,
  });

  let left = CHUNK;
  let served = 0;
  let sinceMs = 0;
  let untilMs = 0;
  let cpuSince = 0;
  const lookAtTheClock = () => {
    left = CHUNK;
    served += CHUNK;
    const nowMs = performance.now();
    if (nowMs < untilMs) return;
    if (untilMs > 0) {
      writeSync(1, `${served} ${(nowMs - sinceMs) / 1000} ${cpuSeconds() - cpuSince}\n`);
    }
    const seconds = nextOrder();
    served = 0;
    cpuSince = cpuSeconds();
    sinceMs = performance.now();
    untilMs = sinceMs + seconds * 1000;
  };
  lookAtTheClock();
  queue.run(
    {
      handle(queue, tag) {
        if (--left === 0) lookAtTheClock();
        handle(queue, tag);
      },
    },
    () => true,
    (error) => {
      throw error;
    },
  );
}

if (isMainThread) {
  const worker = new Worker(new URL(import.meta.url), { workerData: Number(process.argv[2]) });
  worker.on("error", (error) => {
    console.error(error);
    process.exit(1);
  });
} else {
  serve(workerData as number);
}
