// SPDX-License-Identifier: MIT
/**
 * A thread that serves several queues, over bare rings: with charFd -1, FETCH and COMMIT are NOPs, so
 * each tag is at once a READ of nothing, again and again. Needs io_uring.
 */
import assert from "node:assert/strict";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { parseCpus } from "../../cli/size.ts";
import { type Assignment, type QueueThread, startQueueThread } from "../../core/queue_thread.ts";
import { sumStats } from "../../core/stats.ts";
import { Shim } from "../../ffi/mod.ts";
import { MODULE_TARGET } from "../../targets/module.ts";
import { queueThreadEntry } from "../../targets/queue_thread.ts";

const TIMEOUT = { timeout: 30_000 };

/** Slow to close, which nothing may be served after; while "hold" is there, it spins. */
const MODULE = `import { existsSync, writeFileSync } from "node:fs";
const [hold, spins] = ["hold", "spins"].map((name) => import.meta.dirname + "/" + name);
let closed = false;
export default {
  size: 1024 ** 2,
  read() {
    if (closed) throw new Error("read after close");
    while (existsSync(hold)) writeFileSync(spins, "");
  },
  async close() {
    closed = true;
    await new Promise((resolve) => setTimeout(resolve, 50));
  },
};`;

/** Where a thread of this process may run. */
function cpus(tid = process.pid): number[] {
  const status = readFileSync(`/proc/self/task/${tid}/status`, "utf8");
  return parseCpus(/^Cpus_allowed_list:\s*(\S+)$/m.exec(status)![1]!);
}

/** A thread with a module's target, told of these queues. */
async function serving(
  log: string[],
  special: readonly Partial<Assignment>[],
  check: (thread: QueueThread, tid: number, directory: string) => Promise<void>,
): Promise<void> {
  const shim = new Shim();
  const directory = mkdtempSync(join(tmpdir(), "ubd-queue-thread-"));
  const file = join(directory, "module.mjs");
  writeFileSync(file, MODULE);
  const target = { name: MODULE_TARGET, spec: { file, options: {}, directory } };
  const tell = (text: string) => void log.push(text);
  const thread = startQueueThread(queueThreadEntry, target, 0, shim, tell);
  const configs = special.map((own, queueId): Assignment => ({
    charFd: -1,
    wakeFd: shim.native.ubd_eventfd(0),
    queueId,
    depth: 4,
    ioBytesMax: 4096,
    fetchOpcode: 0,
    commitOpcode: 0,
    sqe128: false,
    descriptorOffset: 0,
    descriptorBytes: 4096,
    blockName: "none",
    ...own,
  }));
  try {
    await thread.opened;
    await check(thread, await thread.serve(...configs), directory);
  } finally {
    thread.abandon();
    await thread.ended.catch(() => {});
    for (const { wakeFd } of configs) shim.native.ubd_close(wakeFd);
    rmSync(directory, { recursive: true });
  }
}

test(
  "a thread serves several queues on the CPUs of all, until it is to leave",
  TIMEOUT,
  async () => {
    const log: string[] = [];
    const [first, last] = [cpus()[0]!, cpus().at(-1)!];
    const half = { first: 1, step: 2 };
    const queues = [{ cpus: [first] }, { cpus: [last] }, { cpus: [last], tags: half }];
    await serving(log, queues, async (thread, tid) => {
      assert.deepEqual(cpus(tid), [...new Set([first, last])]);
      await thread.fetched(); // Each of them has read its wake-up.
      while (sumStats([thread.stats]).read.requests === 0) await sleep(1);
      thread.abandon();
      await thread.ended;
    });
    assert.deepEqual(log.filter((text) => /after close/.test(text)), []);
  },
);

test(
  "a queue that fails ends the others of its thread, before the target is closed",
  TIMEOUT,
  async () => {
    const log: string[] = [];
    await serving(log, [{}, { fetchOpcode: 1 }], async (thread) => {
      await assert.rejects(thread.ended, { errno: "EBADF" });
    });
    assert.deepEqual(log.filter((text) => /after close/.test(text)), []);
  },
);

test(
  "a thread that has heard of a stop, and spins now, does not hear of the next",
  TIMEOUT,
  async () => {
    await serving([], [{}], async (thread, _tid, directory) => {
      const hold = join(directory, "hold");
      thread.stopping();
      while (!thread.hears()) await sleep(1);
      writeFileSync(hold, "");
      while (!existsSync(join(directory, "spins"))) await sleep(1);
      thread.stopping();
      assert.equal(thread.hears(), false);
      rmSync(hold);
      while (!thread.hears()) await sleep(1);
    });
  },
);
