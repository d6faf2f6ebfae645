// SPDX-License-Identifier: MIT
/**
 * core/function_handler.ts on a bare ring, where FETCH is a NOP and so each tag always has a
 * request: what it costs when nothing happens, and what a request costs the heap.
 *
 * Needs io_uring. Nothing here asserts a time.
 */
import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ERRNO } from "../../abi/errno.ts";
import { UBLK_IO_OP_READ, UBLK_IO_OP_WRITE_ZEROES } from "../../abi/ublk_cmd.ts";
import type { BlockDevice, ReadRequest } from "../../core/define_target.ts";
import { FunctionHandler } from "../../core/function_handler.ts";
import { Queue } from "../../core/queue.ts";
import { type QueueMemory, Shim } from "../../ffi/mod.ts";

/** A queue whose every request is a READ of 512 bytes, or another operation of as many. */
function setUp(device: BlockDevice, depth: number, op = UBLK_IO_OP_READ) {
  const shim = new Shim();
  const wakeFd = shim.native.ubd_eventfd(0);
  let memory!: QueueMemory;
  const queueInit = shim.queueInit.bind(shim);
  shim.queueInit = (config) => memory = queueInit(config) as QueueMemory;
  let steps = 0;
  let batch = 0;
  const { ubd_step } = shim.native;
  const counted = (handle: number, count: number, wait: number) => {
    steps++;
    if (count > 0) batch = count;
    return ubd_step(handle, count, wait);
  };
  Object.assign(shim, { native: { ...shim.native, ubd_step: counted } });
  const queue = new Queue(shim, {
    charFd: -1,
    wakeFd,
    queueId: 0,
    depth,
    ioBytesMax: 4096,
    fetchOpcode: 0,
    commitOpcode: 0,
    sqe128: false,
    descriptorOffset: 0,
    descriptorBytes: Math.ceil(depth * 24 / 4096) * 4096,
  });
  const descriptors = new DataView(memory.descriptors);
  /** From now on each tag's request is for the sector with the tag's number, from `start` on. */
  const ask = (start: number) => {
    for (let tag = 0; tag < depth; tag++) {
      descriptors.setUint32(tag * 24, op, true);
      descriptors.setUint32(tag * 24 + 4, 1, true);
      descriptors.setBigUint64(tag * 24 + 8, BigInt(start + tag), true);
    }
  };
  ask(0);
  const log: string[] = [];
  const context = {
    depth,
    ioBytesMax: 4096,
    log: (text: string) => void log.push(text),
    deviceBytes: () => undefined,
  };
  return {
    queue,
    ask,
    log,
    handler: new FunctionHandler(device, context),
    steps: () => steps,
    /** Commands that last went to the ring together. */
    batch: () => batch,
    leave: () => shim.native.ubd_wake(wakeFd),
    [Symbol.dispose]() {
      queue[Symbol.dispose]();
      shim.native.ubd_close(wakeFd);
    },
  };
}

const fail = (error: unknown) => assert.fail(`${error}`);

test("a queue on the event loop that has nothing to do does not turn", async () => {
  const waiting: (() => void)[] = [];
  const read = () => new Promise<void>((resolve) => waiting.push(resolve));
  using set = setUp({ size: 4096, read }, 4);
  const running = set.queue.runOnEventLoop(set.handler, () => true, fail);
  while (waiting.length < 4) await sleep(1);
  await sleep(20); // What had begun is over.
  const before = set.steps();
  await sleep(300);
  assert.equal(set.steps(), before, "turns while idle");
  waiting.shift()!();
  while (waiting.length < 4) await sleep(1);
  assert.ok(set.steps() > before, "an answer starts it again");
  set.leave();
  await running;
  assert.deepEqual(set.log, []);
});

test("what is answered in one turn of the event loop goes to the ring together", async () => {
  const waiting: (() => void)[] = [];
  const read = () => new Promise<void>((resolve) => waiting.push(resolve));
  using set = setUp({ size: 4096, read }, 4);
  const running = set.queue.runOnEventLoop(set.handler, () => true, fail);
  while (waiting.length < 4) await sleep(1);
  await sleep(20); // What had begun is over.
  for (const answer of waiting.splice(0)) {
    answer();
    for (let turn = 0; turn < 10; turn++) await undefined; // Others are asked meanwhile.
  }
  while (waiting.length < 4) await sleep(1);
  assert.equal(set.batch(), 4);
  set.leave();
  await running;
});

test("zeroing less than all fails: nobody is told that zeroes are there which are not", () => {
  const committed: number[] = [];
  const writeZeroes = () => [undefined, 512, 511, 0][committed.length];
  using set = setUp({ size: 4096, read() {}, writeZeroes }, 1, UBLK_IO_OP_WRITE_ZEROES);
  const commit = set.queue.commit.bind(set.queue);
  set.queue.commit = (tag, result) => {
    if (committed.push(result) === 4) set.leave();
    commit(tag, result);
  };
  set.queue.run(set.handler, () => true, fail);
  assert.deepEqual(committed.slice(0, 4), [0, 0, -ERRNO.EIO, -ERRNO.EIO]);
  assert.match(set.log[0]!, /it zeroed 511 of 512 bytes/);
});

test("a queue that has failed refuses, and no late function gets at another request", async () => {
  const settle: (() => void)[] = [];
  const requests: ReadRequest[] = [];
  const read = (request: ReadRequest) => {
    requests.push(request);
    return new Promise<void>((resolve) => settle.push(resolve));
  };
  using set = setUp({ size: 4096, read }, 4);
  const committed: [number, number][] = [];
  const commit = set.queue.commit.bind(set.queue);
  set.queue.commit = (tag, result) => {
    committed.push([tag, result]);
    commit(tag, result);
  };
  const told: unknown[] = [];
  const running = set.queue.runOnEventLoop(set.handler, () => true, fail, (e) => told.push(e));
  while (requests.length < 4) await sleep(1);

  const planted = new Error("planted");
  set.queue.break(planted);
  set.queue.break(new Error("another"));
  while (committed.length < 12) await sleep(1);
  assert.deepEqual(committed.slice(0, 4), [0, 1, 2, 3].map((tag) => [tag, -ERRNO.EIO]));
  set.ask(3);
  for (const [tag, { buffer, offset }] of requests.entries()) {
    assert.equal(offset, tag * 512, "it goes on with what it was asked for");
    buffer.fill(1);
    assert.ok(set.queue.data(tag, 512).every((byte) => byte === 0), "in memory of its own");
  }
  for (const answer of settle) answer();
  const before = committed.length;
  while (committed.length < before + 8) await sleep(1);

  set.leave();
  await running;
  assert.ok(committed.every(([, result]) => result === -ERRNO.EIO));
  assert.deepEqual([told, requests.length, set.log], [[planted], 4, []]);
});

/** Until it has turned no more for a while: then it sleeps. */
async function asleep(set: ReturnType<typeof setUp>): Promise<void> {
  for (let before = -1; before !== set.steps();) {
    before = set.steps();
    await sleep(20);
  }
}

test("break wakes a queue that sleeps", async () => {
  using set = setUp({ size: 4096, read: () => new Promise(() => {}) }, 2);
  const running = set.queue.runOnEventLoop(set.handler, () => true, fail);
  await asleep(set);
  const planted = new Error("planted");
  set.queue.break(planted);
  const late = sleep(10_000, "it sleeps on", { ref: false });
  await assert.rejects(Promise.race([running, late]), planted);
});

test("each promise is given up in its time: also one that began when others had", async () => {
  // One never settles; another begins, as late as that, once one has been answered.
  const answers = [() => new Promise<void>(() => {}), () => sleep(30), () => new Promise(() => {})];
  const committed: [number, number][] = [];
  const read = () => answers.shift()?.() as Promise<void> | undefined; // Later ones need no timer.
  const device: BlockDevice = { size: 4096, timeoutMs: 60, read };
  using set = setUp(device, 2);
  const commit = set.queue.commit.bind(set.queue);
  set.queue.commit = (tag, result) => {
    committed.push([tag, result]);
    if (committed.filter(([, one]) => one < 0).length < 2) return commit(tag, result);
    set.leave();
  };
  const running = set.queue.runOnEventLoop(set.handler, () => true, fail);
  const late = sleep(10_000, "it is not given up", { ref: false });
  assert.equal(await Promise.race([running, late]), undefined);
  const failed = committed.filter(([, result]) => result < 0);
  assert.deepEqual(failed.map(([, result]) => result), [-ERRNO.ETIMEDOUT, -ERRNO.ETIMEDOUT]);
});

test("what settles after the queue has ended touches nothing of it", async () => {
  const settle: (() => void)[] = [];
  const requests: ReadRequest[] = [];
  const device: BlockDevice = {
    size: 4096,
    timeoutMs: 50,
    maxConcurrent: 2,
    read(request) {
      requests.push(request);
      return new Promise<void>((resolve) => settle.push(resolve));
    },
  };
  const set = setUp(device, 4);
  set.leave();
  await set.queue.runOnEventLoop(set.handler, () => requests.length > 0, fail);
  set[Symbol.dispose]();
  assert.equal(requests.length, 2);
  for (const [tag, { buffer, offset, length }] of requests.entries()) {
    buffer.fill(1); // Unmapped, this would be the end; as would the next.
    assert.deepEqual([offset, length, buffer[511]], [tag * 512, 512, 1]);
  }
  settle[0]!();
  await sleep(100); // The other one is late, and was given up with its queue.
  settle[1]!();
  await sleep(1);
  assert.equal(requests.length, 2, "no request is begun");
  assert.deepEqual(set.log, []);
});

test("a buffer that is kept is empty when its queue has ended, and harms nobody", () => {
  const kept: Uint8Array<ArrayBuffer>[] = [];
  const read = ({ buffer }: ReadRequest) => {
    if (kept.push(buffer, new Uint8Array(buffer.buffer)) === 16) set.leave();
  };
  const set = setUp({ size: 4096, read }, 4);
  set.queue.run(set.handler, () => true, fail);
  assert.ok(kept.every(({ length }) => length > 0));
  set[Symbol.dispose]();
  for (const view of kept) {
    view[0] = 1;
    assert.deepEqual([view.length, view[0], view.buffer.byteLength], [0, undefined, 0]);
    assert.throws(() => structuredClone(view, { transfer: [view.buffer] }));
  }
});

const REQUESTS = 1_000_000;
const SAMPLE = 5000;

/**
 * Bytes that a million requests of a function put on the heap: the sum of its growths, so that
 * collections in between do not hide them.
 */
function allocated(read: BlockDevice["read"]): number {
  let served = 0;
  let sum = 0;
  let last = 0;
  using set = setUp({
    size: 4096,
    read(request) {
      if (++served % SAMPLE === 0) {
        const { heapUsed } = process.memoryUsage();
        // The first quarter is for the compilers.
        if (served > REQUESTS / 4 && heapUsed > last) sum += heapUsed - last;
        last = heapUsed;
      }
      if (served === REQUESTS) set.leave();
      return read(request);
    },
  }, 64);
  set.queue.run(set.handler, () => true, fail);
  return sum;
}

/** Half of what the smallest object for each request takes. */
const NOISE = REQUESTS * 0.75 * 16 / 2;

const OPTIONS = {
  timeout: 60_000,
  skip: "Bun" in globalThis && "Bun's heap does not tell what was allocated, only what is left",
};
let kept: unknown;

test("a function that returns no promise costs the heap nothing", OPTIONS, () => {
  const bytes = allocated(({ offset, length, buffer }) => {
    buffer[0] = offset + length;
  });
  assert.ok(bytes < NOISE, `${bytes} bytes for ${REQUESTS} requests`);
});

test("the measure above sees an object for each request", OPTIONS, () => {
  const bytes = allocated(({ offset }) => {
    kept = { offset };
  });
  assert.ok(bytes > NOISE, `${bytes} bytes for ${REQUESTS} requests`);
  assert.ok(kept);
});
