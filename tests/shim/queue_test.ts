// SPDX-License-Identifier: MIT
/**
 * core/queue.ts over a real ring without a driver: with charFd -1, FETCH and COMMIT are NOPs, so
 * each fetched tag at once becomes a request described by plain memory, which the test fills.
 *
 * `SpyShim` stands between Queue and ring: it sees each command before the kernel does, and may
 * change each event before the queue does. Needs io_uring.
 */
import assert from "node:assert/strict";
import { closeSync, fstatSync, mkdtempSync, openSync, readSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { ERRNO } from "../../abi/errno.ts";
import {
  UBLK_IO_F_NEED_REG_BUF,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_RES_NEED_GET_DATA as NEED_GET_DATA,
  UBLK_IO_RES_OK as OK,
} from "../../abi/ublk_cmd.ts";
import { AssertionError } from "../../core/assert.ts";
import { UblkError } from "../../core/error.ts";
import { Queue } from "../../core/queue.ts";
import { emptyStats, sumStats } from "../../core/stats.ts";
import type { RequestHandler } from "../../core/target.ts";
import {
  COMMAND_COMMIT,
  COMMAND_FETCH,
  COMMAND_GET_DATA,
  COMMAND_REGISTER,
  COMMAND_UNREGISTER,
  COMMAND_WORDS,
  EVENT_FILE,
  EVENT_REFUSED,
  EVENT_REQUEST,
  EVENT_WORDS,
  type QueueConfig,
  type QueueMemory,
  Shim,
  TAG_BITS,
  type ZeroCopyConfig,
} from "../../ffi/mod.ts";
import { stepUnblocked } from "./block_layer.ts";

const { EIO, EAGAIN, ENOSPC, EINVAL, ENODEV, ENOMEM } = ERRNO;

class SpyShim extends Shim {
  memory!: QueueMemory;
  /** [operation, tag, value] of each command that went to the ring. */
  readonly commands: [number, number, number][] = [];
  /** May change an event. */
  onEvent: (event: { kind: number; tag: number; result: number }) => void = () => {};
  #turns = 0;

  constructor() {
    super();
    const { ubd_step } = this.native;
    const native = { ...this.native, ubd_step: this.#step.bind(this, ubd_step) };
    Object.assign(this, { native });
  }

  override queueInit(config: QueueConfig): QueueMemory | number {
    const memory = super.queueInit(config);
    if (typeof memory !== "number") this.memory = memory;
    return memory;
  }

  #step(step: Shim["native"]["ubd_step"], handle: number, count: number, wait: number): number {
    const words = new Int32Array(this.memory.commands);
    for (let at = 0; at < count * COMMAND_WORDS; at += COMMAND_WORDS) {
      const [head, value] = [words[at]!, words[at + 1]!];
      this.commands.push([head >>> TAG_BITS, head & 0xffff, value]);
    }
    const events = stepUnblocked(step, handle, count, wait);
    if (++this.#turns > 100_000) throw new Error("the queue does not end");
    const eventWords = new Int32Array(this.memory.events, 0, events * EVENT_WORDS);
    for (let at = 0; at < eventWords.length; at += EVENT_WORDS) {
      const [head, result] = [eventWords[at]!, eventWords[at + 1]!];
      const event = { kind: head >>> TAG_BITS, tag: head & 0xffff, result };
      this.onEvent(event);
      if (event.kind === EVENT_REQUEST && event.result !== 0) event.kind = EVENT_REFUSED;
      eventWords.set([event.kind << TAG_BITS | event.tag, event.result], at);
    }
    return events;
  }

  get commits(): [number, number][] {
    return this.commands.filter(([op]) => op === COMMAND_COMMIT)
      .map(([, tag, value]) => [tag, value]);
  }

  describe(tag: number, op: number, sectors: number, startSector = 0): void {
    const view = new DataView(this.memory.descriptors);
    view.setUint32(tag * 24, op, true);
    view.setUint32(tag * 24 + 4, sectors, true);
    view.setBigUint64(tag * 24 + 8, BigInt(startSector), true);
  }
}

/** A queue over `shim`, its wake-up descriptor, and how to leave its loop. */
function setUp(
  shim: Shim,
  depth: number,
  zeroCopy?: ZeroCopyConfig,
  special: Partial<QueueConfig> = {},
) {
  const wakeFd = shim.native.ubd_eventfd(0);
  const queue = new Queue(shim, {
    charFd: -1,
    wakeFd,
    queueId: 0,
    depth,
    ioBytesMax: 65536,
    fetchOpcode: 0,
    commitOpcode: 0,
    sqe128: false,
    descriptorOffset: 0,
    descriptorBytes: Math.ceil(depth * 24 / 4096) * 4096,
    zeroCopy,
    ...special,
  }, special.stats);
  const failures: unknown[] = [];
  return {
    queue,
    failures,
    wake: () => shim.native.ubd_wake(wakeFd),
    run: (handler: RequestHandler) =>
      queue.run(handler, () => true, (error) => failures.push(error)),
    [Symbol.dispose]() {
      queue[Symbol.dispose]();
      shim.native.ubd_close(wakeFd);
    },
  };
}

/** Serves `count` requests by `serve`, parks what comes after them, and leaves the loop. */
function serveSome(
  spy: SpyShim,
  set: ReturnType<typeof setUp>,
  count: number,
  serve: RequestHandler["handle"],
): void {
  let begun = 0;
  set.run({
    handle(queue, tag) {
      if (begun++ < count) serve(queue, tag);
      else if (spy.commits.length >= count) set.wake();
    },
  });
}

test("Queue.run fetches each tag once, then commits each request exactly once", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 8);
  for (let tag = 0; tag < 8; tag++) spy.describe(tag, UBLK_IO_OP_FLUSH, 0);
  const served = new Array(8).fill(0);
  serveSome(spy, set, 1000, (queue, tag) => {
    served[tag]++;
    queue.commit(tag, 0);
  });
  const fetched = spy.commands.filter(([op]) => op === COMMAND_FETCH).map(([, tag]) => tag);
  assert.deepStrictEqual(fetched, [0, 1, 2, 3, 4, 5, 6, 7]);
  const committed = new Array(8).fill(0);
  for (const [tag] of spy.commits) committed[tag]++;
  assert.deepStrictEqual(committed, served);
  assert.strictEqual(spy.commits.length, 1000);
  assert.ok(served.every((count) => count > 0));
  assert.deepStrictEqual(set.failures, []);
});

test("a ring fetches its share of a queue's tags, serves these alone, and ends with them", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 8, undefined, { tags: { first: 1, step: 3 } });
  for (let tag = 0; tag < 8; tag++) spy.describe(tag, UBLK_IO_OP_FLUSH, 0);
  let answered = 0;
  spy.onEvent = (event) => {
    if (event.kind === EVENT_REQUEST && answered >= 100) event.result = -ENODEV;
  };
  set.run({
    handle(queue, tag) {
      answered++;
      queue.commit(tag, 0);
    },
  });
  const tags = (op: number) => spy.commands.filter(([done]) => done === op).map(([, tag]) => tag);
  assert.deepStrictEqual(tags(COMMAND_FETCH), [1, 4, 7]);
  assert.deepStrictEqual([...new Set(tags(COMMAND_COMMIT))].sort(), [1, 4, 7]);
  assert.deepStrictEqual(set.failures, []);
});

test("Queue shows a handler operation, flags, bytes and offset of the tag's descriptor", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 3);
  spy.describe(0, UBLK_IO_OP_READ | 1 << 13, 8, 2);
  spy.describe(1, UBLK_IO_OP_DISCARD | 0x8000_0000, 0xffff_ffff, 2 ** 44 - 1);
  spy.describe(2, UBLK_IO_OP_WRITE, 1, 0);
  const seen: unknown[] = [];
  serveSome(spy, set, 3, (queue, tag) => {
    seen[tag] = [queue.op(tag), queue.flags(tag), queue.bytes(tag), queue.offset(tag)];
    queue.commit(tag, -EIO);
  });
  assert.deepStrictEqual(seen, [
    [UBLK_IO_OP_READ, 1 << 13, 4096, 1024],
    [UBLK_IO_OP_DISCARD, 0x8000_0003, 0xffff_ffff * 512, 2 ** 53 - 512],
    [UBLK_IO_OP_WRITE, 1, 512, 0],
  ]);
});

/** [operation, what the handler commits, what goes to the driver] for requests of 4096 bytes. */
const RESULTS: [number, number, number][] = [
  [UBLK_IO_OP_READ, 4096, 4096],
  [UBLK_IO_OP_READ, 512, 512],
  [UBLK_IO_OP_READ, 0, -EIO],
  [UBLK_IO_OP_READ, 4097, -EIO],
  [UBLK_IO_OP_WRITE, 4096, 4096],
  [UBLK_IO_OP_WRITE, 512, 512],
  [UBLK_IO_OP_WRITE, 0, -EIO],
  [UBLK_IO_OP_WRITE, 4097, -EIO],
  [UBLK_IO_OP_WRITE, -EAGAIN, -EIO],
  [UBLK_IO_OP_WRITE, -ENOSPC, -ENOSPC],
  [UBLK_IO_OP_FLUSH, 0, 0],
  [UBLK_IO_OP_FLUSH, -EAGAIN, -EIO],
  [UBLK_IO_OP_FLUSH, -EIO, -EIO],
  [UBLK_IO_OP_DISCARD, 0, 0],
];

test("Queue.commit hands on results, but no empty, excessive or EAGAIN ones", () => {
  for (const [op, result, expected] of RESULTS) {
    const spy = new SpyShim();
    using set = setUp(spy, 1);
    spy.describe(0, op, 8);
    serveSome(spy, set, 1, (queue, tag) => queue.commit(tag, result));
    assert.deepStrictEqual(spy.commits, [[0, expected]], `op ${op}: ${result}`);
  }
});

test("requests are counted by operation, also several in a step, as what the driver is told", () => {
  const spy = new SpyShim();
  const stats = emptyStats();
  using set = setUp(spy, 4, undefined, { stats });
  const ops = [UBLK_IO_OP_READ, UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_FLUSH];
  for (const [tag, op] of ops.entries()) spy.describe(tag, op, op === UBLK_IO_OP_FLUSH ? 0 : 8);
  const results = [4096, 512, -EAGAIN, 0];
  serveSome(spy, set, 40, (queue, tag) => queue.commit(tag, results[tag]!));
  const of = (tags: number[]) => {
    const told = spy.commits.filter(([tag]) => tags.includes(tag)).map(([, result]) => result);
    const bytes = told.filter((result) => result > 0).reduce((sum, result) => sum + result, 0);
    return { requests: told.length, bytes, errors: told.filter((result) => result < 0).length };
  };
  const { read, write, flush } = sumStats([stats]);
  assert.deepStrictEqual({ read, write, flush }, {
    read: of([0, 1]),
    write: of([2]),
    flush: of([3]),
  });
  assert.deepStrictEqual([read.requests + write.requests + flush.requests, write.errors > 0], [
    40,
    true,
  ]);
});

test("Queue.commit asserts that a request is answered once, and that there is one", () => {
  const noRequest = (error: unknown) =>
    error instanceof AssertionError && /commit of a tag that serves no request/.test(error.message);
  const spy = new SpyShim();
  using set = setUp(spy, 2);
  assert.throws(() => set.queue.commit(0, 0), noRequest, "before the first request");
  let refused = 0;
  serveSome(spy, set, 10, (queue, tag) => {
    queue.commit(tag, -EIO);
    assert.throws(() => queue.commit(tag, -EIO), noRequest, "the second time");
    refused++;
  });
  assert.strictEqual(refused, 10);
  assert.strictEqual(spy.commits.length, 10);
  assert.throws(() => set.queue.commit(2, 0), noRequest, "a tag that is not");
});

test("Queue.run ends with the assertion when a handler commits twice", () => {
  using set = setUp(new SpyShim(), 1);
  const twice = (queue: Queue, tag: number) => {
    queue.commit(tag, -EIO);
    queue.commit(tag, -EIO);
  };
  assert.throws(() => set.run({ handle: twice }), AssertionError);
});

test("Queue.run asserts that a queue runs once", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1);
  serveSome(spy, set, 1, (queue, tag) => queue.commit(tag, -EIO));
  assert.throws(() => set.run({ handle() {} }), /a queue runs once/);
});

test("Queue.run answers EIO once for a handler that throws, and goes on", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 2);
  for (const tag of [0, 1]) spy.describe(tag, UBLK_IO_OP_FLUSH, 0);
  let count = 0;
  const results: number[] = [];
  serveSome(spy, set, 100, (queue, tag) => {
    const fails = count++ % 10 === 3;
    results.push(fails ? -EIO : 0);
    if (fails) throw new Error(`failure ${count}`);
    queue.commit(tag, 0);
  });
  assert.deepStrictEqual(spy.commits.map(([, value]) => value), results);
  assert.strictEqual(set.failures.length, 10);
  assert.strictEqual((set.failures[0] as Error).message, "failure 4");
});

test("Queue.run answers EIO for a resume that throws", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1);
  const zero = spy.open("/dev/zero", 0);
  spy.describe(0, UBLK_IO_OP_READ, 8);
  let begun = 0;
  set.run({
    handle(queue, tag) {
      if (begun++ === 0) queue.read(tag, zero, 0, 4096, 0);
      else set.wake();
    },
    resume() {
      throw new Error("resume fails");
    },
  });
  assert.deepStrictEqual(spy.commits, [[0, -EIO]]);
  assert.match(String(set.failures), /resume fails/);
  spy.native.ubd_close(zero);
});

test("Queue.run reports a handler that throws after its commit, and commits no second time", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1);
  spy.describe(0, UBLK_IO_OP_FLUSH, 0);
  serveSome(spy, set, 3, (queue, tag) => {
    queue.commit(tag, 0);
    throw new Error("too late");
  });
  assert.deepStrictEqual(spy.commits, [[0, 0], [0, 0], [0, 0]]);
  assert.strictEqual(set.failures.length, 3);
});

test("Queue asserts at once that a request has one operation, and no commit beside it", () => {
  const misdeeds: [string, (queue: Queue, tag: number, fd: number) => void][] = [
    ["two operations", (queue, tag, fd) => queue.read(tag, fd, 0, 512, 0)],
    ["two of different sorts", (queue, tag, fd) => queue.fsync(tag, fd, 0)],
    ["a commit", (queue, tag) => queue.commit(tag, 512)],
  ];
  for (const zeroCopy of [undefined, REGISTERED]) {
    for (const [name, misdeed] of misdeeds) {
      const spy = new SpyShim();
      using set = setUp(spy, 1, zeroCopy);
      const zero = spy.open("/dev/zero", 0);
      spy.describe(0, UBLK_IO_OP_READ, 8);
      let tried = 0;
      set.run({
        handle(queue, tag) {
          queue.read(tag, zero, 0, 4096, 0);
          assert.throws(() => misdeed(queue, tag, zero), AssertionError, name);
          assert.throws(() => queue.read(1, zero, 0, 512, 0), AssertionError, "a tag that is not");
          tried++;
          set.wake();
        },
        resume: (queue, tag, result) => queue.commit(tag, result),
      });
      assert.ok(tried > 0);
      assert.deepStrictEqual(set.failures, []);
      assert.ok(spy.commits.every(([, result]) => result === 4096), name);
      spy.native.ubd_close(zero);
    }
  }
  using idle = setUp(new SpyShim(), 1);
  assert.throws(() => idle.queue.fsync(0, 0, 0), AssertionError, "before the first request");
});

test("a handler that throws with an operation in flight: EIO once that has ended", () => {
  for (const zeroCopy of [undefined, REGISTERED]) {
    const spy = new SpyShim();
    using set = setUp(spy, 1, zeroCopy);
    const zero = spy.open("/dev/zero", 0);
    spy.describe(0, UBLK_IO_OP_READ, 8);
    const order: string[] = [];
    spy.onEvent = ({ kind }) => {
      if (kind === EVENT_FILE) order.push("ended");
    };
    let begun = 0;
    set.run({
      handle(queue, tag) {
        if (begun++ === 1) return set.wake();
        queue.read(tag, zero, 0, 4096, 0);
        order.push("thrown");
        throw new Error("after it was issued");
      },
      resume: () => assert.fail("it has failed"),
    });
    const registering = zeroCopy ? ["ended"] : [];
    assert.deepStrictEqual(order.slice(0, -registering.length || undefined), [
      ...[...registering, "thrown", "ended"],
      ...registering, // Taken out again.
    ]);
    assert.deepStrictEqual(spy.commits, [[0, -EIO]]);
    assert.deepStrictEqual(set.failures, [new Error("after it was issued")]);
    spy.native.ubd_close(zero);
  }
});

test("Queue.run leaves when woken() is true, and asks again at the next wake-up when not", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1);
  const answers: boolean[] = [];
  let requests = 0;
  set.queue.run(
    {
      handle(queue, tag) {
        requests++;
        set.wake();
        queue.commit(tag, -EIO);
      },
    },
    () => {
      answers.push(requests >= 50);
      return requests >= 50;
    },
    () => {},
  );
  assert.strictEqual(answers.at(-1), true);
  assert.ok(answers.length >= 2 && answers.slice(0, -1).every((answer) => !answer), `${answers}`);
});

test("Queue.run ends when the driver has taken every tag back", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 4);
  let requests = 0;
  spy.onEvent = (event) => {
    if (event.kind === EVENT_REQUEST && requests >= 100) event.result = -ENODEV;
  };
  set.queue.run(
    {
      handle(queue, tag) {
        requests++;
        queue.commit(tag, -EIO);
      },
    },
    () => assert.fail("woken"),
    () => assert.fail("failed"),
  );
  assert.ok(requests >= 100 && requests < 110);
  assert.strictEqual(spy.commits.length, requests);
});

test("Queue.run throws what the driver answers to a FETCH instead of a request", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 2);
  spy.onEvent = (event) => void (event.result = -EINVAL);
  assert.throws(
    () => set.run({ handle: () => assert.fail("a request") }),
    (error) => error instanceof UblkError && error.errno === "EINVAL",
  );
});

test("Queue.run asserts that no event belongs to a tag that waits for none", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 2);
  spy.onEvent = (event) => void (event.tag = 0);
  assert.throws(() => set.run({ handle() {} }), /request on a tag that was not fetched/);
});

test("Queue.fillZero clears its part of the tag's buffer and no other byte", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 2);
  const [first, second] = spy.memory.buffers.map((buffer) => buffer.fill(0xee));
  set.queue.fillZero(1, 10, 20);
  assert.deepStrictEqual(first, new Uint8Array(65536).fill(0xee));
  assert.deepStrictEqual(second, new Uint8Array(65536).fill(0xee).fill(0, 10, 20));
});

const REGISTERED: ZeroCopyConfig = { automatic: false, registerOpcode: 0, unregisterOpcode: 0 };
const AUTOMATIC: ZeroCopyConfig = { ...REGISTERED, automatic: true };

/** [mode, operation and flags, whether the queue registers the tag's buffer itself]. */
const REGISTRATIONS: [string, ZeroCopyConfig | undefined, number, boolean][] = [
  ["copied", undefined, UBLK_IO_OP_READ, false],
  ["automatic", AUTOMATIC, UBLK_IO_OP_READ, false],
  ["automatic, which failed", AUTOMATIC, UBLK_IO_OP_READ | UBLK_IO_F_NEED_REG_BUF, true],
  ["automatic, which failed", AUTOMATIC, UBLK_IO_OP_WRITE | UBLK_IO_F_NEED_REG_BUF, true],
  ["registered", REGISTERED, UBLK_IO_OP_READ, true],
  ["registered", REGISTERED, UBLK_IO_OP_WRITE, true],
  ["registered", REGISTERED, UBLK_IO_OP_FLUSH, false],
  ["registered", REGISTERED, UBLK_IO_OP_DISCARD, false],
];

test("Queue registers a buffer before it serves the request, where nobody else does", () => {
  for (const [mode, zeroCopy, opFlags, registers] of REGISTRATIONS) {
    const spy = new SpyShim();
    using set = setUp(spy, 1, zeroCopy);
    spy.describe(0, opFlags, 8);
    const seen: number[] = [];
    serveSome(spy, set, 2, (queue, tag) => {
      seen.push(spy.commands.filter(([op]) => op === COMMAND_REGISTER).length);
      queue.commit(tag, -EIO);
    });
    const exchange = registers ? [[COMMAND_REGISTER, 0, 0], [COMMAND_UNREGISTER, 0, 0]] : [];
    const expected = [...exchange, [COMMAND_COMMIT, 0, -EIO]];
    const ours = [COMMAND_REGISTER, COMMAND_UNREGISTER, COMMAND_COMMIT];
    const told = spy.commands.filter(([op]) => ours.includes(op)).slice(0, 2 * expected.length);
    assert.deepStrictEqual(told, [...expected, ...expected], `${mode}, ${opFlags}`);
    assert.deepStrictEqual(seen, registers ? [1, 2] : [0, 0]);
  }
});

test("Queue fails a request whose buffer cannot be registered, and serves the next", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1, REGISTERED);
  spy.describe(0, UBLK_IO_OP_READ, 8);
  let registrations = 0;
  spy.onEvent = (event) => {
    if (event.kind === EVENT_FILE && registrations++ === 0) event.result = -ENOMEM;
  };
  let served = 0;
  set.run({
    handle(queue, tag) {
      if (served++ === 0) queue.commit(tag, 4096);
      else set.wake();
    },
  });
  assert.deepStrictEqual(spy.commits, [[0, -ENOMEM], [0, 4096]]);
  assert.strictEqual(spy.commands.filter(([op]) => op === COMMAND_UNREGISTER).length, 1);
});

test("Queue.run throws when a buffer cannot be unregistered: its request would wait for ever", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1, REGISTERED);
  spy.describe(0, UBLK_IO_OP_READ, 8);
  let exchanges = 0;
  spy.onEvent = (event) => {
    if (event.kind === EVENT_FILE && exchanges++ === 1) event.result = -EINVAL;
  };
  assert.throws(
    () => set.run({ handle: (queue, tag) => queue.commit(tag, 4096) }),
    (error) => error instanceof UblkError && error.operation === "UNREGISTER_IO_BUF",
  );
  assert.deepStrictEqual(spy.commits, []);
});

test("Queue asks for the data of a WRITE that came without, and serves what comes then", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1);
  spy.describe(0, UBLK_IO_OP_WRITE, 8);
  // The third answer is one more time that there is data to be asked for.
  const answers = [NEED_GET_DATA, OK, NEED_GET_DATA, NEED_GET_DATA, OK];
  spy.onEvent = (event) => {
    if (event.kind === EVENT_REQUEST) event.result = answers.shift() ?? OK;
  };
  serveSome(spy, set, 3, (queue, tag) => queue.commit(tag, 4096));
  const ours = [COMMAND_GET_DATA, COMMAND_COMMIT];
  assert.deepStrictEqual(spy.commands.filter(([op]) => ours.includes(op)).slice(0, 6), [
    [COMMAND_GET_DATA, 0, 0],
    [COMMAND_COMMIT, 0, 4096],
    [COMMAND_GET_DATA, 0, 0],
    [COMMAND_GET_DATA, 0, 0],
    [COMMAND_COMMIT, 0, 4096],
    [COMMAND_COMMIT, 0, 4096],
  ]);
});

test("Queue retires a tag that the driver takes back when it is asked for data", () => {
  const spy = new SpyShim();
  using set = setUp(spy, 1);
  const answers = [NEED_GET_DATA, -ENODEV];
  spy.onEvent = (event) => {
    if (event.kind === EVENT_REQUEST) event.result = answers.shift()!;
  };
  set.run({ handle: () => assert.fail("a request without its data") });
  assert.deepStrictEqual(spy.commits, []);
});

test("Queue.fillZero asserts that the data is in this process", () => {
  using set = setUp(new SpyShim(), 1, AUTOMATIC);
  assert.throws(() => set.queue.fillZero(0, 0, 512), AssertionError);
});

/** What stands for a character device: a file with descriptors in front, and data far behind. */
function userCopied(depth: number) {
  const directory = mkdtempSync(join(tmpdir(), "ubd-user-copy-"));
  const path = join(directory, "char");
  const spy = new SpyShim();
  const fd = openSync(path, "w+");
  writeSync(fd, new Uint8Array(4096));
  const special = { charFd: spy.open(path, 2), queueId: 1, userCopy: true };
  const set = setUp(spy, depth, undefined, special);
  return {
    spy,
    set,
    fd,
    describe(tag: number, op: number, sectors: number) {
      writeSync(fd, new Uint32Array([op, sectors, 0, 0, 0, 0]), 0, 24, tag * 24);
    },
    dataOffset: (tag: number) => 0x8000_0000 + 2 ** 41 + tag * 2 ** 25,
    [Symbol.dispose]() {
      set[Symbol.dispose]();
      spy.native.ubd_close(special.charFd);
      closeSync(fd);
      rmSync(directory, { recursive: true });
    },
  };
}

test("with user copy, a WRITE has its data before it is served, or is not served", () => {
  using device = userCopied(2);
  const { set, fd, dataOffset } = device;
  for (const tag of [0, 1]) device.describe(tag, UBLK_IO_OP_WRITE, 8);
  const data = (tag: number) => new Uint8Array(4096).fill(0x70 + tag);
  writeSync(fd, data(0), 0, 4096, dataOffset(0));
  const served = [0, 0];
  set.run({
    handle(queue, tag) {
      assert.deepStrictEqual(queue.data(tag, 4096), data(tag));
      if (tag === 1) return set.wake();
      // Until now, the file has ended before the data of tag 1.
      assert.strictEqual(served[1], 0);
      if (++served[0]! === 5) writeSync(fd, data(1), 0, 4096, dataOffset(1));
      queue.commit(tag, 4096);
    },
  });
  assert.deepStrictEqual(set.failures, []);
});

test("with user copy, what was done of a READ is given before the commit, and no more", () => {
  using device = userCopied(2);
  const { spy, set, fd, dataOffset } = device;
  device.describe(1, UBLK_IO_OP_READ, 8);
  let served = 0;
  set.run({
    handle(queue, tag) {
      if (tag === 0) return; // It only waits.
      queue.data(tag, 4096).fill(7);
      if (served++ === 0) return queue.commit(tag, -EIO);
      if (served === 3) return set.wake();
      assert.strictEqual(fstatSync(fd).size, 4096, "a failed READ gives nothing");
      queue.commit(tag, 512);
    },
  });
  assert.deepStrictEqual(spy.commits, [[1, -EIO], [1, 512]]);
  assert.strictEqual(fstatSync(fd).size, dataOffset(1) + 512);
  const given = new Uint8Array(512);
  readSync(fd, given, 0, 512, dataOffset(1));
  assert.deepStrictEqual(given, new Uint8Array(512).fill(7));
});

test("Queue's disposal is idempotent, and its constructor throws where there is no ring", () => {
  const spy = new SpyShim();
  const set = setUp(spy, 1);
  set.queue[Symbol.dispose]();
  set.queue[Symbol.dispose]();
  assert.strictEqual(spy.native.ubd_queue_exit(spy.memory.handle), -ERRNO.EBADF);
  set[Symbol.dispose]();
  assert.throws(() => setUp(spy, 0), (error) => {
    return error instanceof UblkError && error.operation === "set up a ring";
  });
});

/** Objects or bytes that live after a collection, as the runtime can tell. */
async function heap(): Promise<number> {
  if ("Bun" in globalThis) {
    const { heapStats } = await import("bun:jsc");
    (globalThis as unknown as { Bun: { gc(force: boolean): void } }).Bun.gc(true);
    return heapStats().objectCount;
  }
  return process.memoryUsage().heapUsed;
}

/** Growth that 100 000 retained objects cannot hide in: objects under Bun, bytes under Deno. */
const HEAP_SLACK = "Bun" in globalThis ? 20_000 : 2_000_000;

/** How much more is on the heap after 100 000 requests. */
async function growth(onRequest: (tag: number) => void): Promise<number> {
  const shim = new Shim();
  const measure = async (count: number) => {
    using set = setUp(shim, 64);
    const before = await heap();
    let served = 0;
    set.run({
      handle(queue, tag) {
        onRequest(tag);
        if (++served === count) set.wake();
        queue.commit(tag, -EIO);
      },
    });
    return await heap() - before;
  };
  await measure(100_000);
  return await measure(100_000);
}

test("Queue.run keeps nothing on the heap for 100 000 requests", { timeout: 60_000 }, async () => {
  const grown = await growth(() => {});
  assert.ok(grown < HEAP_SLACK, `${grown}`);
});

test(
  "the measure above sees one object retained for each request",
  { timeout: 60_000 },
  async () => {
    const kept: unknown[] = [];
    const grown = await growth((tag) => kept.push({ tag, sectors: kept.length }));
    assert.ok(grown > HEAP_SLACK, `${grown}`);
    assert.ok(kept.length >= 200_000);
  },
);

test("a queue on the event loop does not sleep while something is about to come", {
  timeout: 20_000,
}, async () => {
  const shim = new SpyShim();
  using fixture = setUp(shim, 2);
  let steps = 0;
  const ubd_step = (_handle: number, count: number) => {
    if (count > 0) return 0;
    if (++steps <= 3) return -EAGAIN;
    const words = new Int32Array(shim.memory.events);
    for (const tag of [0, 1]) {
      words.set([EVENT_REFUSED << TAG_BITS | tag, -ENODEV], tag * EVENT_WORDS);
    }
    return 2; // And nothing has rung.
  };
  Object.assign(shim.native, { ubd_step });
  const handler = { handle: () => assert.fail("no request was made") };
  await fixture.queue.runOnEventLoop(handler, () => true, (error) => {
    throw error;
  });
  assert.strictEqual(steps, 4);
});
