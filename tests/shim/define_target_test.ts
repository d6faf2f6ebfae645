// SPDX-License-Identifier: MIT
/**
 * core/define_target.ts and core/function_handler.ts by means of testing/, which is tested along:
 * whatever a function does becomes one answer, and the device lives on.
 *
 * Needs io_uring. Nothing here asserts a time.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import fc from "fast-check";
import { UBLK_IO_OP_READ } from "../../abi/ublk_cmd.ts";
import {
  type BlockDevice,
  defineTarget,
  MARK,
  openDefinition,
  type ReadRequest,
  type Request,
  type Target,
  type TargetDefinition,
  type WriteRequest,
} from "../../core/define_target.ts";
import { UsageError } from "../../core/error.ts";
import { openHere } from "../../core/queue_thread.ts";
import { PlayedDriver } from "../../testing/driver.ts";
import { checkAgainstModel, openForTesting, RequestError } from "../../testing/mod.ts";

const SIZE = 1024 ** 2;

/** Does `bad` at offset 0, and nothing wrong elsewhere. */
function readsBadly(bad: (request: ReadRequest) => unknown, more: Partial<BlockDevice> = {}) {
  const read = (request: ReadRequest) => {
    if (request.offset === 0) return bad(request) as void;
    request.buffer.fill(1);
  };
  return defineTarget({ size: SIZE, read, ...more });
}

const thrown = (value: unknown) => () => {
  throw value;
};
const coded = (code: string) => Object.assign(new Error(`says ${code}`), { code });
const unprintable = Object.create(null);
const unreadable = {
  get code() {
    throw new Error("no code for you");
  },
};
const badThen = {
  get then() {
    throw new Error("no then for you");
  },
};

/** [what the function does, the errno of its request, what is logged]. */
const MISDEEDS: Record<string, [(request: ReadRequest) => unknown, string, RegExp | undefined]> = {
  "throws": [thrown(new Error("oops")), "EIO", /^READ fails: Error: oops\n +at /],
  "rejects": [() => Promise.reject(new Error("oops")), "EIO", /^READ fails: Error: oops\n +at /],
  "throws a string": [thrown("oops"), "EIO", /^READ fails: oops$/],
  "throws nothing": [thrown(undefined), "EIO", /^READ fails: undefined$/],
  "throws what cannot be printed": [thrown(unprintable), "EIO", /^READ fails: a object that can/],
  "rejects with that": [() => Promise.reject(unprintable), "EIO", /^READ fails: a object that/],
  "throws what cannot be read": [thrown(unreadable), "EIO", /^READ fails: /],
  "rejects with that too": [() => Promise.reject(unreadable), "EIO", /^READ fails: /],
  "throws an errno": [thrown(coded("ENOSPC")), "ENOSPC", undefined],
  "rejects with an errno": [() => Promise.reject(coded("ENOSPC")), "ENOSPC", undefined],
  "throws EAGAIN": [thrown(coded("EAGAIN")), "EIO", undefined],
  "throws another code": [thrown(coded("ERR_X")), "EIO", /^READ fails: Error: says ERR_X/],
  "throws a property's name": [thrown(coded("toString")), "EIO", /^READ fails: /],
  "returns NaN": [() => NaN, "EIO", /it answered NaN, of 4096 bytes/],
  "resolves with NaN": [() => Promise.resolve(NaN), "EIO", /it answered NaN, of 4096 bytes/],
  "returns too much": [({ length }) => length + 1, "EIO", /it answered 4097, of 4096 bytes/],
  "resolves with too much": [({ length }) => Promise.resolve(length + 512), "EIO", /answered 4608/],
  "returns a negative count": [() => -5, "EIO", /it answered -5, of 4096 bytes/],
  "returns a fraction": [() => 512.5, "EIO", /it answered 512.5, of 4096 bytes/],
  "returns nothing done": [() => 0, "EIO", /it answered 0: less than a block/],
  "returns less than a block": [() => 511, "EIO", /it answered 511: less than a block/],
  "returns text": [() => "4096", "EIO", /it answered a string, of 4096 bytes/],
  "returns null": [() => null, "EIO", /it answered a object, of 4096 bytes/],
  "resolves with null": [() => Promise.resolve(null), "EIO", /it answered a object, of 4096/],
  "resolves with a symbol": [() => Promise.resolve(Symbol("x")), "EIO", /it answered a symbol/],
  "resolves with no object": [() => Promise.resolve(unprintable), "EIO", /answered a object/],
  "has a then that throws": [() => badThen, "EIO", /^READ fails: Error: no then for you/],
  "never settles": [() => new Promise(() => {}), "ETIMEDOUT", /^READ took more than 30 ms/],
};

for (const [name, [bad, code, logged]] of Object.entries(MISDEEDS)) {
  test(`a handler that ${name}: ${code} once, and the device lives on`, async () => {
    await using device = await openForTesting(readsBadly(bad, { timeoutMs: 30 }), { depth: 2 });
    for (let round = 0; round < 3; round++) {
      await assert.rejects(device.read(0, 4096), (error) => {
        return error instanceof RequestError && error.code === code &&
          error.message === `READ of 4096 bytes at 0: ${code}`;
      });
      assert.deepEqual(await device.read(4096, 512), new Uint8Array(512).fill(1));
    }
    assert.deepEqual(device.stats().read, { requests: 6, bytes: 3 * 512, errors: 3 });
    if (!logged) return assert.deepEqual(device.log, []);
    assert.match(device.log[0]!, logged);
    // Those of one place and one kind are the same text, and it is logged once.
    assert.equal(device.log.length, new Set(device.log).size);
    assert.ok(device.log.length === 1 || /oops|ERR_X/.test(name), device.log.join("\n"));
  });
}

test("a log that throws or rejects breaks neither the queue nor the device", async () => {
  const read = ({ offset }: ReadRequest) => {
    if (offset === 0) throw new Error("oops");
    if (offset === 512) return Promise.reject(new Error("oops"));
    if (offset === 1024) return new Promise<void>(() => {});
  };
  const device: BlockDevice = { size: SIZE, timeoutMs: 20, read };
  for (const bad of [thrown(new Error("full")), () => Promise.reject(new Error("full"))]) {
    const driver = new PlayedDriver();
    const log = () => bad() as unknown as void;
    const served = await openDefinition(defineTarget(device)[MARK], {}, undefined, log);
    const thread = openHere(served, driver, log).startThread!(0);
    const wakeFd = driver.native.ubd_eventfd(0);
    await thread.serve({ ...driver.config(0, 2, 4096, wakeFd), blockName: "none" });
    for (const [offset, code] of [[0, "EIO"], [512, "EIO"], [1024, "ETIMEDOUT"]] as const) {
      const reading = driver.submit(UBLK_IO_OP_READ, 0, offset, 512, new Uint8Array(512));
      await assert.rejects(reading, { code });
    }
    await driver.submit(UBLK_IO_OP_READ, 0, 4096, 512, new Uint8Array(512));
    driver.stop();
    await thread.ended;
    driver.native.ubd_close(wakeFd);
  }
});

test("a handler whose promise resolves twice answers once", async () => {
  const twice = {
    then(resolve: (value: number) => void) {
      resolve(4096);
      resolve(512);
      throw new Error("and throws");
    },
  };
  const promise = () => Object.assign(Promise.resolve(4096), { then: twice.then });
  for (const answer of [() => twice, promise]) {
    await using device = await openForTesting(readsBadly(answer), { depth: 1 });
    for (let round = 0; round < 5; round++) await device.read(0, 4096);
    await device.read(4096, 512);
    assert.deepEqual(device.stats().read, { requests: 6, bytes: 5 * 4096 + 512, errors: 0 });
    assert.deepEqual(device.log, []);
  }
});

test("a handler that is late finds its own request, and no other's memory", async () => {
  const gates = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const late = Promise.withResolvers<unknown[]>();
  let calls = 0;
  const target = defineTarget({
    size: SIZE,
    timeoutMs: 200,
    async read(request) {
      if (calls++ === 0) {
        await gates[0]!.promise;
        request.buffer.fill(0xee);
        late.resolve([request.offset, request.length, request.buffer.length]);
      } else {
        gates[0]!.resolve();
        await late.promise;
      }
    },
  });
  await using device = await openForTesting(target, { depth: 1 });
  await assert.rejects(device.read(8192, 4096), { code: "ETIMEDOUT" });
  assert.deepEqual(await device.read(512, 512), new Uint8Array(512));
  assert.deepEqual(await late.promise, [8192, 4096, 4096]);
  assert.deepEqual(await device.read(512, 4096), new Uint8Array(4096));
});

test("a write that is late still has its offset, data and flags", async () => {
  const gate = Promise.withResolvers<void>();
  const late = Promise.withResolvers<unknown[]>();
  let calls = 0;
  const target = defineTarget({
    size: SIZE,
    timeoutMs: 200,
    handlesFua: true,
    read() {},
    flush() {},
    async write(request: WriteRequest) {
      if (calls++ > 0) {
        gate.resolve();
        await late.promise;
        return;
      }
      const before = Buffer.from(request.buffer);
      await gate.promise;
      // Its memory is overwritten by the test kit once it is answered, but not by the next write.
      const others = request.buffer.includes(9);
      late.resolve([request.offset, request.length, request.fua, before[0], others]);
    },
  });
  await using device = await openForTesting(target, { depth: 1 });
  const first = device.write(4096, new Uint8Array(1024).fill(7), { fua: true });
  await assert.rejects(first, { code: "ETIMEDOUT" });
  await device.write(0, new Uint8Array(512).fill(9));
  assert.deepEqual(await late.promise, [4096, 1024, true, 7, false]);
});

test("a promise that settles after the queue is gone touches nothing", async () => {
  const gate = Promise.withResolvers<void>();
  let held: Uint8Array | undefined;
  const target = defineTarget({
    size: SIZE,
    timeoutMs: 20,
    async read({ buffer }) {
      held = buffer;
      await gate.promise;
    },
  });
  const device = await openForTesting(target);
  await assert.rejects(device.read(0, 512), { code: "ETIMEDOUT" });
  await device.stop();
  held!.fill(1);
  gate.resolve();
  await sleep(1);
  assert.deepEqual(device.stats().read, { requests: 1, bytes: 0, errors: 1 });
});

test("what is written to a buffer after its answer is found out, by name", async () => {
  for (const kind of ["READ", "WRITE"] as const) {
    for (const laterRequests of [0, 3]) {
      const gate = Promise.withResolvers<void>();
      const late = async ({ offset, buffer }: ReadRequest) => {
        if (offset !== 8192) return;
        await gate.promise;
        buffer[17] = 1;
      };
      const read = (request: ReadRequest) => void late(request);
      const device = await openForTesting({ size: SIZE, read, write: read }, { depth: 1 });
      if (kind === "READ") await device.read(8192, 4096);
      else await device.write(8192, new Uint8Array(4096));
      gate.resolve();
      await sleep(1);
      for (let n = 0; n < laterRequests; n++) await device.read(0, 512);
      const text = "byte 17 of a buffer was written after its request had been answered: " +
        `${kind} of 4096 bytes at 8192`;
      await assert.rejects(device.stop(), new Error(text));
      await assert.rejects(device.stop(), new Error(text), "idempotent");
      assert.deepEqual(device.log, [text]);
    }
  }
});

test("of a request in parts, the part is named whose buffer was written late", async () => {
  let last: Uint8Array | undefined;
  const read = ({ offset, buffer }: ReadRequest) => {
    if (offset > 0) last ??= buffer;
    return 512;
  };
  const device = await openForTesting({ size: SIZE, read }, { depth: 1 });
  await device.read(0, 1024);
  last!.fill(0xee);
  await assert.rejects(device.stop(), /: READ of 512 bytes at 512$/);
});

/** Has 3 buffers for its one tag: each larger one is more than is taken for spare ones. */
const FEW_BUFFERS = { depth: 1, ioBytesMax: 32 * 1024 ** 2 };

test("functions that never end hold a few buffers; then requests fail, until one ends", async () => {
  const gates: (() => void)[] = [];
  const written: number[][] = [];
  const stuck = () => new Promise<void>((resolve) => gates.push(resolve));
  let isStuck = true;
  const target = defineTarget({
    size: SIZE,
    timeoutMs: 20,
    read: ({ buffer }) => isStuck ? stuck() : void buffer.fill(1),
    write: ({ offset, buffer }) => isStuck ? stuck() : void written.push([offset, buffer[511]!]),
    flush: () => isStuck ? stuck() : undefined,
  });
  await using device = await openForTesting(target, FEW_BUFFERS);
  const block = new Uint8Array(512).fill(7);
  const late = { code: "ETIMEDOUT" };
  for (let round = 0; round < 20; round++) {
    await assert.rejects(device.read(0, 512), late);
    await assert.rejects(device.write(0, block), late);
    await assert.rejects(device.flush(), late);
  }
  assert.equal(gates.length, 3, "others were not asked");
  assert.match(device.log.join("\n"), /hold all there are: requests fail at once \(ETIMEDOUT\)/);
  isStuck = false;
  await assert.rejects(device.write(0, block), late);
  gates.shift()!();
  await sleep(1);
  await assert.rejects(device.write(0, block), late, "its data has come when there was no place");
  await device.write(512, block);
  assert.deepEqual(await device.read(0, 512), new Uint8Array(512).fill(1));
  for (const open of gates.splice(0)) open();
  await sleep(1);
  isStuck = true;
  for (let round = 0; round < 5; round++) await assert.rejects(device.read(0, 512), late);
  assert.equal(gates.length, 3, "all have come back");
  isStuck = false;
  gates.shift()!();
  await sleep(1);
  assert.deepEqual(
    await device.read(0, 512),
    new Uint8Array(512).fill(1),
    "a READ is served at once",
  );
  assert.deepEqual(written, [[512, 7]]);
  for (const open of gates) open();
});

/** What a function may do with its buffer, and the error of the request. */
const TRANSFERS: Record<string, (buffer: Uint8Array<ArrayBuffer>) => unknown> = {
  "clones it away": (buffer) => void structuredClone(buffer, { transfer: [buffer.buffer] }),
  "sends it away": ({ buffer }) => {
    const { port1, port2 } = new MessageChannel();
    port1.postMessage(buffer, [buffer]);
    for (const port of [port1, port2]) port.close();
  },
  "transfers it": ({ buffer }) => void buffer.transfer(),
  "transfers it, and then waits": async ({ buffer }) => {
    buffer.transfer();
    await sleep(1);
  },
  "transfers it after a while": async ({ buffer }) => {
    await sleep(1);
    buffer.transfer();
  },
  "transfers it, and throws": ({ buffer }) => {
    buffer.transfer();
    throw coded("ENOSPC");
  },
  "transfers it, and is given up": ({ buffer }) => {
    buffer.transfer();
    return new Promise(() => {});
  },
  "is given up, and transfers it": async ({ buffer }) => {
    await sleep(40);
    buffer.transfer();
  },
};

for (const [name, bad] of Object.entries(TRANSFERS)) {
  test(`a handler that ${name}: an errno, and the next request is served`, async () => {
    const kept = new Map<number, number>();
    const target = defineTarget({
      size: SIZE,
      timeoutMs: 30,
      read: ({ offset, buffer }) => {
        if (offset === 0) return bad(buffer) as void;
        buffer.fill(kept.get(offset) ?? 1);
      },
      write: ({ offset, buffer }) => {
        if (offset === 0) return bad(buffer) as void;
        kept.set(offset, buffer[511]!);
      },
    });
    await using device = await openForTesting(target, { depth: 1 });
    const code = name.includes("given up") ? "ETIMEDOUT" : "EIO";
    for (let round = 0; round < 3; round++) {
      await assert.rejects(device.read(0, 4096), { code });
      assert.deepEqual(await device.read(4096, 512), new Uint8Array(512).fill(1));
      await assert.rejects(device.write(0, new Uint8Array(4096)), { code });
      await device.write(8192, new Uint8Array(512).fill(round + 2));
      assert.equal((await device.read(8192, 512))[0], round + 2);
      await sleep(20); // It may still be at work.
    }
    if (code === "EIO") assert.match(device.log[0]!, /^READ fails: its buffer was transferred/);
  });
}

test("a buffer that is transferred after its answer costs one later request", async () => {
  let last: Uint8Array<ArrayBuffer> | undefined;
  const target = defineTarget({
    size: SIZE,
    read: ({ buffer }) => void (last = buffer.fill(1)),
    write: ({ buffer }) => void (last = buffer),
    flush() {},
  });
  await using device = await openForTesting(target, { depth: 1 });
  const block = new Uint8Array(512).fill(7);
  const requests = [() => device.read(0, 512), () => device.write(0, block), () => device.flush()];
  for (const request of requests) {
    await device.read(0, 512);
    last!.buffer.transfer();
    await assert.rejects(request() as Promise<unknown>, { code: "EIO" });
    await request();
  }
});

test("a handler that transfers each buffer has its requests fail, and nothing worse", async () => {
  const read = ({ buffer }: ReadRequest) => void buffer.buffer.transfer();
  await using device = await openForTesting({ size: SIZE, read }, FEW_BUFFERS);
  for (let round = 0; round < 10; round++) {
    await assert.rejects(device.read(0, 512), { code: round < 3 ? "EIO" : "ETIMEDOUT" });
  }
});

test("a request's properties are its own: a copy of it has them", async () => {
  const seen: unknown[] = [];
  const see = (request: Request) => void seen.push({ ...request, signal: undefined });
  const target = defineTarget({
    size: SIZE,
    handlesFua: true,
    read: (request) => void see(request),
    write: see,
    flush: see,
    writeZeroes: see,
  });
  await using device = await openForTesting(target, { depth: 1 });
  const zeroes = new Uint8Array(512);
  const rest = { signal: undefined, mayUnmap: true, fua: false };
  await device.read(2 ** 19, 512);
  await device.write(512, zeroes, { fua: true });
  await device.flush();
  await device.writeZeroes(1024, 4096, { mayUnmap: false });
  const buffers = seen.map((one) => (one as { buffer: Uint8Array }).buffer);
  assert.deepEqual(buffers.map(({ length }) => length), [512, 512, 0, 0]);
  assert.deepEqual(seen.map((one) => ({ ...one as object, buffer: undefined })), [
    { ...rest, offset: 2 ** 19, length: 512, buffer: undefined },
    { ...rest, offset: 512, length: 512, buffer: undefined, fua: true },
    { ...rest, offset: 0, length: 0, buffer: undefined },
    { ...rest, offset: 1024, length: 4096, buffer: undefined, mayUnmap: false },
  ]);
});

test("a handler that spoils the request object spoils no other request", async () => {
  const spoil: ((request: ReadRequest) => void)[] = [
    (request) => void Object.freeze(request),
    (request) => void Object.assign(request, { offset: 0, length: 0, buffer: undefined }),
    (request) => void Object.defineProperty(request, "offset", { value: 1, writable: false }),
    (request) => void Object.setPrototypeOf(request, null),
  ];
  for (const bad of spoil) {
    const read = (request: ReadRequest) => {
      request.buffer.fill(request.offset / 512);
      bad(request);
    };
    await using device = await openForTesting({ size: SIZE, read }, { depth: 1 });
    for (const n of [1, 2, 3]) {
      assert.deepEqual(await device.read(n * 512, 512), new Uint8Array(512).fill(n));
    }
  }
});

/** Counts how many of its functions' promises are outstanding. */
function counting(more: Partial<BlockDevice>, enough: number) {
  const full = Promise.withResolvers<void>();
  const seen = { now: 0, most: 0 };
  const target = defineTarget({
    size: SIZE,
    timeoutMs: 20_000,
    async read() {
      seen.most = Math.max(seen.most, ++seen.now);
      if (seen.now >= enough) full.resolve();
      await full.promise;
      await sleep(1);
      seen.now--;
    },
    ...more,
  });
  return { target, seen };
}

const many = (count: number, read: (n: number) => Promise<unknown>) =>
  Promise.all(Array.from({ length: count }, (_, n) => read(n)));

test("as many requests are in flight as the queue is deep, and no more", async () => {
  const { target, seen } = counting({}, 64);
  await using device = await openForTesting(target, { depth: 64 });
  await many(200, (n) => device.read(n * 512, 512)); // 63 at a time would never end.
  assert.equal(seen.most, 64);
});

test("maxConcurrent bounds the promises that are outstanding", async () => {
  const { target, seen } = counting({ maxConcurrent: 3 }, 3);
  await using device = await openForTesting(target, { depth: 16 });
  await many(50, (n) => device.read(n * 512, 512));
  assert.equal(seen.most, 3);
  assert.equal(device.stats().read.requests, 50);
});

test("requests that wait for maxConcurrent get their turn after an error and a timeout", async () => {
  let calls = 0;
  const target = defineTarget({
    size: SIZE,
    maxConcurrent: 1,
    timeoutMs: 30,
    read: () =>
      [() => new Promise<void>(() => {}), () => Promise.reject(coded("ENXIO"))][calls++]?.(),
  });
  await using device = await openForTesting(target, { depth: 8 });
  const outcomes = await Promise.allSettled([0, 1, 2, 3].map((n) => device.read(n * 512, 512)));
  const codes = outcomes.map((one) => one.status === "rejected" ? one.reason.code : "done");
  assert.deepEqual(codes, ["ETIMEDOUT", "ENXIO", "done", "done"]);
});

/** A device that tells what it was asked, at once or after `delay`. */
function telling(more: Partial<BlockDevice> = {}, delay?: () => Promise<unknown>) {
  const told: string[] = [];
  const tell = (name: string) => (request: { offset: number; length: number; fua?: boolean }) => {
    const fua = name !== "flush" && request.fua ? " fua" : "";
    const text = `${name} ${request.offset}+${request.length}${fua}`;
    if (!delay) return void told.push(text);
    return delay().then(() => void told.push(text));
  };
  const target = defineTarget({
    size: SIZE,
    read: tell("read"),
    write: tell("write"),
    flush: tell("flush"),
    writeZeroes: tell("zero"),
    ...more,
  });
  return { target, told };
}

const BLOCK = new Uint8Array(1024);

for (const kind of ["sync", "async"] as const) {
  test(`FUA without handlesFua: flush after the write, ${kind}`, async () => {
    const { target, told } = telling({}, kind === "async" ? () => sleep(1) : undefined);
    await using device = await openForTesting(target, { depth: 4 });
    await device.write(0, BLOCK, { fua: true });
    await device.writeZeroes(512, 512, { fua: true });
    await device.write(0, BLOCK);
    assert.deepEqual(told, [
      ...["write 0+1024 fua", "flush 0+1024"],
      ...["zero 512+512 fua", "flush 512+512"],
      "write 0+1024",
    ]);
    // The answer was the write's own byte count: an answer of 0 or less would not do.
    assert.deepEqual(device.stats().write, { requests: 2, bytes: 2048, errors: 0 });
  });
}

test("FUA with handlesFua: no flush; without flush: no FUA", async () => {
  const own = telling({ handlesFua: true });
  await using first = await openForTesting(own.target);
  await first.write(0, BLOCK, { fua: true });
  assert.deepEqual(own.told, ["write 0+1024 fua"]);
  const told: boolean[] = [];
  const write = ({ fua }: WriteRequest) => void told.push(fua);
  await using second = await openForTesting(defineTarget({ size: SIZE, read() {}, write }));
  await second.write(0, BLOCK, { fua: true });
  await second.flush();
  assert.deepEqual([told, second.offers.flush], [[false], false]);
});

test("FUA: the flush's failure is the write's", async () => {
  const { target } = telling({ flush: thrown(coded("ENOSPC")) });
  await using device = await openForTesting(target);
  await assert.rejects(device.write(0, BLOCK, { fua: true }), { code: "ENOSPC" });
  await device.write(0, BLOCK);
});

test("a short count has the rest asked for, from the last whole block on", async () => {
  const asked: number[][] = [];
  const target = defineTarget({
    size: SIZE,
    read({ offset, length, buffer }) {
      asked.push([offset, length]);
      const count = Math.min(length, 700);
      for (let i = 0; i < count; i++) buffer[i] = (offset + i) >> 9;
      return count;
    },
    write: ({ offset, length }) => {
      asked.push([offset, length]);
      return Promise.resolve(512);
    },
  });
  await using device = await openForTesting(target);
  const data = await device.read(1024, 2048);
  assert.deepEqual(asked, [[1024, 2048], [1536, 1536], [2048, 1024], [2560, 512]]);
  assert.deepEqual([0, 511, 512, 1024, 2047].map((at) => data[at]), [2, 2, 3, 4, 5]);
  asked.length = 0;
  await device.write(0, BLOCK);
  assert.deepEqual(asked, [[0, 1024], [512, 512]]);
});

test("a READ's buffer is zeroes, whatever was in it before", async () => {
  await using device = await openForTesting(telling().target, { depth: 1 });
  await device.write(0, new Uint8Array(4096).fill(0xdd));
  assert.deepEqual(await device.read(0, 8192), new Uint8Array(8192));
});

test("stop fires the signal, waits for what is in flight, and closes the target once", async () => {
  const events: string[] = [];
  const begun = Promise.withResolvers<void>();
  const target = defineTarget({
    size: SIZE,
    async read({ signal, buffer }) {
      begun.resolve();
      await new Promise((resolve) => signal.addEventListener("abort", resolve));
      await sleep(5);
      buffer[0] = 7;
      events.push("answered");
    },
    close: () => void events.push("closed"),
  });
  const device = await openForTesting(target);
  const reading = device.read(0, 512);
  await begun.promise;
  await Promise.all([device.stop(), device.stop()]);
  assert.deepEqual(events, ["answered", "closed"]);
  assert.equal((await reading)[0], 7);
  await assert.rejects(device.read(0, 512), { code: "ENODEV" });
});

test("what is not given is not offered", async () => {
  await using least = await openForTesting(defineTarget({ size: SIZE, read() {} }));
  assert.deepEqual(least.offers, {
    write: false,
    flush: false,
    discard: false,
    writeZeroes: false,
  });
  await assert.rejects(least.write(0, BLOCK), { code: "EPERM" });
  await assert.rejects(least.discard(0, 512), { code: "EOPNOTSUPP" });
  await assert.rejects(least.read(1, 512), RangeError);
  await assert.rejects(least.read(SIZE - 512, 1024), RangeError);
  await using most = await openForTesting(telling({ discard() {}, blockSize: 4096 }).target);
  assert.deepEqual(most.offers, { write: true, flush: true, discard: true, writeZeroes: true });
  assert.equal(most.blockSize, 4096);
  await assert.rejects(most.read(512, 4096), RangeError);
  await most.discard(0, SIZE);
});

/** A memory disk, with a fault if you like. */
function disk(fault: Partial<BlockDevice> = {}, delay?: () => Promise<unknown>) {
  const bytes = new Uint8Array(SIZE);
  const device: BlockDevice = {
    size: SIZE,
    async read({ offset, length, buffer }) {
      await delay?.();
      buffer.set(bytes.subarray(offset, offset + length));
    },
    async write({ offset, buffer }) {
      await delay?.();
      bytes.set(buffer, offset);
    },
    flush() {},
    writeZeroes: ({ offset, length }) => void bytes.fill(0, offset, offset + length),
    discard: ({ offset, length }) => void bytes.fill(0xd1, offset, offset + length),
    ...fault,
  };
  return { device: defineTarget(device), bytes };
}

test("checkAgainstModel is content with disks that are right", { timeout: 60_000 }, async () => {
  const { requests } = await checkAgainstModel(disk().device, { fc, runs: 15, depth: 8 });
  assert.ok(requests > 15);
  const slow = disk({}, () => new Promise((resolve) => setTimeout(resolve, Math.random() * 2)));
  await checkAgainstModel(slow.device, { fc, runs: 5, queues: 2, bytes: 65536 });
  await checkAgainstModel({ size: SIZE, read() {} }, { fc, runs: 3 }); // Read-only.
});

test("checkAgainstModel finds planted faults, and says the seed", { timeout: 60_000 }, async () => {
  const kept = new Map<number, Uint8Array>();
  const faults: Record<string, Partial<BlockDevice>> = {
    "a write is lost": { write() {} },
    "zeroes are forgotten": { writeZeroes() {} },
    "a buffer is kept after its answer": {
      write({ offset, buffer }) {
        for (let at = 0; at < buffer.length; at += 512) {
          kept.set(offset + at, buffer.subarray(at, at + 512));
        }
      },
      read({ offset, buffer }) {
        for (let at = 0; at < buffer.length; at += 512) {
          const block = kept.get(offset + at);
          if (block) buffer.set(block, at);
        }
      },
      writeZeroes: ({ offset, length }) => {
        for (let at = 0; at < length; at += 512) kept.delete(offset + at);
      },
    },
  };
  for (const [name, fault] of Object.entries(faults)) {
    kept.clear();
    await assert.rejects(
      checkAgainstModel(disk(fault).device, { fc, runs: 50, seed: 3, bytes: 65536 }),
      (error) => /seed: 3/.test((error as Error).message),
      name,
    );
  }
});

test("options: text and values are parsed, defaults taken, paths made absolute", async () => {
  let seen: unknown;
  const target = defineTarget({
    options: {
      size: { type: "size", default: "64K" },
      file: { type: "path", required: true },
      ratio: { type: "number", default: 0.5 },
      quick: { type: "boolean", default: false },
      label: { type: "string" },
      constructor: { type: "string" },
    },
    open(options) {
      seen = options;
      return { size: options.size, read() {} };
    },
  });
  const open = async (options: Record<string, string | number | boolean>) => {
    await using device = await openForTesting(target as Target, { options });
    return device.size;
  };
  const absolute = `${process.cwd()}/a.img`;
  assert.equal(await open({ file: "a.img" }), 65536);
  const label = undefined;
  const defaults = { ratio: 0.5, quick: false, label, constructor: label };
  assert.deepEqual(seen, { ...defaults, size: 65536, file: absolute });
  const given = { file: "/x/y", size: "8s", ratio: "2e-1", quick: "yes", label: "a=b" };
  assert.equal(await open(given), 4096);
  assert.deepEqual(seen, { ...defaults, ...given, size: 4096, ratio: 0.2, quick: true });
  await open({ file: "a.img", size: 512, ratio: 1, quick: true, label: "" });
  const values = { size: 512, file: absolute, ratio: 1, quick: true, label: "" };
  assert.deepEqual(seen, { ...defaults, ...values });

  const refused: [Record<string, string | number>, string | RegExp][] = [
    [{}, 'Option "file" is missing: --opt file=PATH'],
    [{ file: "a", sise: "1" }, /^Option "sise": there are size, file, ratio, quick, label, /],
    [{ file: "a", size: "lots" }, /^Option "size": "lots": say bytes, or a number with K/],
    [{ file: "a", ratio: "" }, 'Option "ratio" is "": say a number'],
    [{ file: "a", ratio: "1x" }, 'Option "ratio" is "1x": say a number'],
    [{ file: "a", ratio: "Infinity" }, 'Option "ratio" is "Infinity": say a number'],
    [{ file: "a", quick: "maybe" }, 'Option "quick" is "maybe": say true or false'],
  ];
  for (const [options, message] of refused) {
    seen = undefined;
    await assert.rejects(openForTesting(target as Target, { options }), (error: Error) => {
      assert.ok(error instanceof UsageError, `${error}`);
      if (typeof message === "string") assert.equal(error.message, message);
      else assert.match(error.message, message);
      return true;
    });
    assert.equal(seen, undefined, "it was opened");
  }
  const without = defineTarget({ size: SIZE, read() {} }) as Target;
  const none = openForTesting(without, { options: { x: 1 } });
  await assert.rejects(none, new UsageError('Option "x": this target has none'));
});

test("options that are declared wrong are refused before anything is opened", async () => {
  const refused: [unknown, string][] = [
    [
      { type: "int" },
      'The target declares option "n" with type "int": there are string, number, boolean, size, path, file',
    ],
    [
      {},
      'The target declares option "n" with type undefined: there are string, number, boolean, ' +
      "size, path, file",
    ],
    [
      undefined,
      'The target declares option "n" with type undefined: there are string, number, ' +
      "boolean, size, path, file",
    ],
    [
      { type: "size", requird: true },
      'The target declares option "n" with "requird": there are type, description, default, required',
    ],
  ];
  for (const [spec, message] of refused) {
    const wrong = { options: { n: spec }, open: () => assert.fail("it was opened") };
    for (const target of [wrong, defineTarget(wrong as TargetDefinition)]) {
      await assert.rejects(openForTesting(target as Target), new UsageError(message));
    }
  }
});

test("a device may have members of its own, also such as are called nearly as others", async () => {
  const own = { reads: 0, writes: 0, closed: false, discards: [], help() {} };
  const device = { size: SIZE, read: () => void own.reads++, ...own };
  await using _ = await openForTesting(device);
});

test("what is no target, and what can be no device, is refused by name", async () => {
  const refused: [unknown, string | RegExp][] = [
    [undefined, /^This is no target: its default export must be defineTarget/],
    [null, /^This is no target/],
    [{ size: SIZE }, /^This is no target/],
    [{ read: 5, size: SIZE }, /^This is no target/],
    [() => {}, /^This is no target/],
    [
      defineTarget({ size: SIZE } as BlockDevice),
      "A target's read must be a function, not undefined",
    ],
    [{ open: () => undefined }, "A target's read must be a function, not undefined"],
    [
      defineTarget({ size: SIZE, raed() {} } as unknown as BlockDevice),
      'A device has no "raed": did you mean "read"?',
    ],
    [{ size: SIZE, read() {}, wirte() {} }, 'A device has no "wirte": did you mean "write"?'],
    [{ size: SIZE, read() {}, discrd() {} }, 'A device has no "discrd": did you mean "discard"?'],
    [
      { size: SIZE, read() {}, writezeroes() {} },
      'A device has no "writezeroes": did you mean "writeZeroes"?',
    ],
    [{ sizes: SIZE, read() {} }, 'A device has no "sizes": did you mean "size"?'],
    [{ size: SIZE, read() {}, write: 1 }, "A target's write must be a function, not number"],
    [{ size: SIZE, read() {}, flush: {} }, "A target's flush must be a function, not object"],
    [{ read() {} }, "A target's size must be its bytes, not undefined"],
    [{ size: "1G", read() {} }, "A target's size must be its bytes, not string"],
    [{ size: 1000, read() {} }, /^Size 1000: it must be a multiple of the 512-byte block/],
    [{ size: NaN, read() {} }, /^Size NaN: /],
    [{ size: 0, read() {} }, /^Size 0: /],
    [{ size: SIZE, blockSize: 100, read() {} }, /^Block size 100: it must be 512, 1024, 2048 or/],
    [{ size: SIZE, blockSize: 8192, read() {} }, /^Block size 8192: /],
    [
      { size: SIZE, read() {}, maxConcurrent: 0 },
      "A target's maxConcurrent must be a whole number above 0, not 0",
    ],
    [
      { size: SIZE, read() {}, timeoutMs: Infinity },
      "A target's timeoutMs must be a whole number above 0, not Infinity",
    ],
  ];
  for (const [target, message] of refused) {
    await assert.rejects(openForTesting(target as BlockDevice), (error: Error) => {
      assert.ok(error instanceof UsageError, `${error}`);
      if (typeof message === "string") assert.equal(error.message, message);
      else assert.match(error.message, message);
      return true;
    });
  }
  const failing = defineTarget({ open: () => Promise.reject(new Error("no network")) });
  await assert.rejects(openForTesting(failing), /^Error: no network$/);
});

test("with share, each queue has an open of its own that gets what is shared", async () => {
  const opened: unknown[] = [];
  let closed = 0;
  const target = defineTarget({
    options: { bytes: { type: "size", default: SIZE } },
    share: ({ bytes }) => new SharedArrayBuffer(bytes),
    open({ bytes }, shared, log) {
      opened.push(shared);
      log("opened");
      const disk = new Uint8Array(shared);
      return {
        size: bytes,
        async read({ offset, length, buffer }) {
          await sleep(0);
          buffer.set(disk.subarray(offset, offset + length));
        },
        write: ({ offset, buffer }) => disk.set(buffer, offset),
        close: () => void closed++,
      };
    },
  });
  {
    await using device = await openForTesting(target, { queues: 3, depth: 4 });
    await many(30, (n) => device.write(n * 512, new Uint8Array(512).fill(n)));
    const read = await many(30, async (n) => (await device.read(n * 512, 512))[511]);
    assert.deepEqual(read, Array.from({ length: 30 }, (_, n) => n));
    assert.deepEqual(device.log, ["opened", "opened", "opened"]);
  }
  assert.deepEqual([opened.length, closed], [3, 3]);
});
