// SPDX-License-Identifier: MIT
/** targets/fault.ts around a buffer: what strikes when, and what a power cut leaves. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import fc from "fast-check";
import type { BlockDevice } from "../../core/define_target.ts";
import { fault, type FaultOptions, type FaultyDevice } from "../../targets/fault.ts";

const BLOCK = 512;
const BLOCKS = 64;
const { signal } = new AbortController();

interface Disk extends BlockDevice {
  bytes: Buffer;
  flushes: number;
}

function disk(): Disk {
  const bytes = Buffer.alloc(BLOCKS * BLOCK);
  return {
    bytes,
    flushes: 0,
    size: bytes.length,
    read: ({ offset, length, buffer }) => buffer.set(bytes.subarray(offset, offset + length)),
    write: ({ offset, buffer }) => bytes.set(buffer, offset),
    flush() {
      this.flushes++;
    },
    discard() {},
    writeZeroes() {},
  };
}

const write = async (
  device: BlockDevice,
  block: number,
  blocks: number,
  value: number,
  fua = false,
) =>
  await device.write!({
    offset: block * BLOCK,
    length: blocks * BLOCK,
    buffer: new Uint8Array(blocks * BLOCK).fill(value),
    fua,
    signal,
  });

async function read(device: BlockDevice, block: number, blocks: number): Promise<Buffer> {
  const [offset, length] = [block * BLOCK, blocks * BLOCK];
  const buffer = new Uint8Array(length).fill(0xee);
  const done = await device.read({ offset, length, buffer, signal }) ?? length;
  return Buffer.from(buffer.subarray(0, done));
}

const flush = async (device: BlockDevice) => await device.flush!({ offset: 0, length: 0, signal });

/** The errno a request fails with, or "ok". */
const fate = (request: Promise<unknown>) =>
  request.then(() => "ok", (error) => (error as { code: string }).code);

async function fates(options: FaultOptions): Promise<string> {
  const device = fault(disk(), options);
  const all = [];
  for (let turn = 0; turn < 200; turn++) all.push(await fate(read(device, turn % BLOCKS, 1)));
  return all.join();
}

test("fault strikes as often as asked, with that errno, and again with the same seed", async () => {
  const half = await fates({ errorRate: 0.5, error: "ENOSPC", seed: 3 });
  const struck = half.split("ENOSPC").length - 1;
  assert.ok(struck > 60 && struck < 140, half);
  assert.strictEqual(await fates({ errorRate: 0.5, error: "ENOSPC", seed: 3 }), half);
  assert.notStrictEqual(await fates({ errorRate: 0.5, error: "ENOSPC", seed: 4 }), half);
  assert.doesNotMatch(await fates({}), /E/);
  assert.doesNotMatch(await fates({ errorRate: 1 }), /ok/);
});

test("fault strikes in its range and its operations only; two are one around another", async () => {
  const inner = fault(disk(), { errorRate: 1, from: 8 * BLOCK, to: 10 * BLOCK });
  const device = fault(inner, { errorRate: 1, error: "ETIMEDOUT", operations: ["flush"] });
  const fateOf = (block: number, blocks: number) => fate(read(device, block, blocks));
  assert.deepStrictEqual(
    await Promise.all([fateOf(0, 8), fateOf(7, 2), fateOf(9, 1), fateOf(10, 54)]),
    ["ok", "EIO", "EIO", "ok"],
  );
  assert.strictEqual(await fate(write(device, 8, 1, 1)), "EIO");
  assert.strictEqual(await fate(flush(device)), "ETIMEDOUT");
  assert.strictEqual(await fate(flush(inner)), "EIO", "a flush has no place");
});

test("fault's delayed requests are overtaken, and do not keep a device from stopping", async () => {
  const device = fault(disk(), { delayRate: 1, delayMs: 30, from: 0, to: BLOCK });
  const order: string[] = [];
  await Promise.all([
    read(device, 0, 1).then(() => order.push("delayed")),
    read(device, 1, 1).then(() => order.push("other")),
  ]);
  assert.deepStrictEqual(order, ["other", "delayed"]);
  const stop = new AbortController();
  const slow = fault(disk(), { delayRate: 1, delayMs: 1e8 });
  const buffer = new Uint8Array(BLOCK);
  const waiting = slow.read({ offset: 0, length: BLOCK, buffer, signal: stop.signal });
  stop.abort();
  await waiting;
});

test("fault's short transfers do a part of the blocks, and say so", async () => {
  const inner = disk();
  const device = fault(inner, { shortRate: 1 });
  const written = await write(device, 0, 8, 7);
  assert.ok(typeof written === "number" && written > 0 && written < 8 * BLOCK);
  assert.strictEqual(written % BLOCK, 0);
  assert.ok(inner.bytes.subarray(0, written).every((byte) => byte === 7));
  assert.ok(inner.bytes.subarray(written).every((byte) => byte === 0));
  const bytes = await read(device, 0, 8);
  assert.ok(bytes.length < 8 * BLOCK && bytes.length % BLOCK === 0);
  assert.strictEqual(await write(device, 0, 1, 7), undefined, "one block is done or not");
});

test("fault offers what the device does; with a cache, no discard", () => {
  const offered = (device: BlockDevice) =>
    ["write", "flush", "discard", "writeZeroes"].filter((name) => name in device);
  assert.deepStrictEqual(offered(fault(disk())), ["write", "flush", "discard", "writeZeroes"]);
  assert.deepStrictEqual(offered(fault(disk(), { cache: true })), ["write", "flush"]);
  assert.deepStrictEqual(offered(fault({ size: BLOCK, read() {} }, { cache: true })), []);
});

test("fault's cache keeps writes from the disk until a flush, and FUA ones not at all", async () => {
  const inner = disk();
  const device = fault(inner, { cache: true });
  await write(device, 0, 4, 1);
  assert.ok(inner.bytes.every((byte) => byte === 0));
  assert.ok((await read(device, 0, 4)).every((byte) => byte === 1));
  await write(device, 1, 1, 2, true);
  assert.deepStrictEqual([0, 1, 2].map((block) => inner.bytes[block * BLOCK]), [0, 2, 0]);
  assert.strictEqual(inner.flushes, 1);
  await flush(device);
  assert.deepStrictEqual([0, 1, 2].map((block) => inner.bytes[block * BLOCK]), [1, 2, 1]);
  assert.strictEqual(inner.flushes, 2);
  await write(device, 0, 1, 3);
  await device.close!();
  assert.strictEqual(inner.bytes[0], 3, "an orderly end loses nothing");
});

/** What a block may hold after a power cut: what it held when flushed, and all written since. */
async function crash(seed: number, steps: [string, number, number, boolean][]): Promise<{
  device: FaultyDevice;
  bytes: Buffer;
  allowed: Set<number>[];
}> {
  const inner = disk();
  const device = fault(inner, { cache: true, seed });
  const allowed = Array.from({ length: BLOCKS }, () => new Set([0]));
  const pending: Promise<unknown>[] = [];
  for (const [index, [operation, block, wanted, fua]] of steps.entries()) {
    const value = index + 1;
    const blocks = Math.min(wanted, BLOCKS - block);
    if (operation === "flush") {
      await Promise.all(pending.splice(0));
      await flush(device);
      for (const values of allowed) {
        const last = [...values].at(-1)!;
        values.clear();
        values.add(last);
      }
      continue;
    }
    pending.push(write(device, block, blocks, value, fua));
    for (const values of allowed.slice(block, block + blocks)) {
      if (fua) values.clear();
      values.add(value);
    }
  }
  await Promise.all(pending);
  for (let block = 0; block < BLOCKS; block++) {
    const bytes = await read(device, block, 1);
    assert.ok(bytes.every((byte) => byte === [...allowed[block]!].at(-1)), "before the cut");
  }
  await device.cutPower();
  return { device, bytes: inner.bytes, allowed };
}

test("fault's power cut loses nothing that was flushed, and makes nothing up", async () => {
  const kind = fc.constantFrom("write", "write", "write", "flush");
  const block = fc.nat({ max: BLOCKS - 1 });
  const step = fc.tuple(kind, block, fc.integer({ min: 1, max: 8 }), fc.boolean());
  await fc.assert(
    fc.asyncProperty(fc.nat(), fc.array(step, { maxLength: 40 }), async (seed, steps) => {
      const { device, bytes, allowed } = await crash(seed, steps);
      for (const [block, values] of allowed.entries()) {
        const held = new Set(bytes.subarray(block * BLOCK, (block + 1) * BLOCK));
        assert.ok(
          held.size === 1 && values.has([...held][0]!),
          `block ${block} holds ${[...held]}`,
        );
      }
      assert.strictEqual(await fate(read(device, 0, 1)), "EIO");
      assert.strictEqual(await fate(write(device, 0, 1, 1)), "EIO");
      assert.strictEqual(await fate(flush(device)), "EIO");
    }),
    { numRuns: 100 },
  );
});

test("fault's power cut loses, keeps and tears writes that were not flushed", async () => {
  const ends = new Map<string, number>();
  for (let seed = 0; seed < 60; seed++) {
    const { bytes } = await crash(seed, [["write", 0, 8, false]]);
    const kept = [0, 1, 2, 3, 4, 5, 6, 7].filter((block) => bytes[block * BLOCK] === 1).length;
    const end = kept === 0 ? "lost" : kept === 8 ? "kept" : "torn";
    ends.set(end, (ends.get(end) ?? 0) + 1);
    const again = await crash(seed, [["write", 0, 8, false]]);
    assert.ok(again.bytes.equals(bytes), `seed ${seed} is repeated`);
  }
  for (const end of ["lost", "kept", "torn"]) assert.ok((ends.get(end) ?? 0) >= 8, end);
});

test("fault cuts the power in the middle of the write it was told, FUA or not", async () => {
  let lost = 0;
  for (let seed = 0; seed < 20; seed++) {
    const inner = disk();
    const device = fault(inner, { cutAfter: 3, seed });
    const answers = await Promise.all([
      fate(write(device, 0, 1, 1, true)),
      fate(write(device, 1, 1, 2)),
      fate(write(device, 2, 1, 3, true)),
      fate(write(device, 3, 1, 4)),
    ]);
    assert.deepStrictEqual(answers, ["ok", "ok", "EIO", "EIO"]);
    assert.strictEqual(inner.bytes[0], 1);
    assert.strictEqual(inner.bytes[3 * BLOCK], 0);
    if (inner.bytes[2 * BLOCK] === 0) lost++;
  }
  assert.ok(lost > 3 && lost < 20, `${lost}`);
});

test("what asks while the power is cut does not change what is lost", async () => {
  const left = async (asking: number) => {
    const inner = disk();
    const device = fault(inner, { cache: true, errorRate: 0.1, operations: ["read"], seed: 5 });
    for (let block = 0; block < BLOCKS; block++) await write(device, block, 1, block + 1);
    const cut = device.cutPower();
    const asked = Array.from({ length: asking }, () => fate(read(device, 0, 1)));
    await cut;
    assert.deepStrictEqual(await Promise.all(asked), Array(asking).fill("EIO"));
    return inner.bytes;
  };
  assert.deepStrictEqual(await left(7), await left(0));
});

test("fault's cache fails a request whose device does nothing of it, or too much", async () => {
  for (const answer of [0, -1, NaN, 0.5, BLOCK + 1]) {
    const device = fault({ ...disk(), read: () => answer }, { cache: true });
    await assert.rejects(read(device, 0, 1), RangeError, `${answer}`);
  }
});

test("fault refuses options that mean nothing", () => {
  const refused: [FaultOptions, RegExp][] = [
    [{ errorRate: 1.5 }, /"errorRate" is "1.5": say a probability/],
    [{ shortRate: NaN }, /"shortRate"/],
    [{ delayMs: -1 }, /"delayMs" is "-1": say a whole number/],
    [{ cutAfter: 0 }, /"cutAfter" is "0": say a whole number from 1/],
    [{ from: BLOCKS * BLOCK }, /"from"/],
    [{ error: "EWHAT" }, /"error" is "EWHAT": say an errno/],
    [{ operations: ["trim" as "discard"] }, /"operations" is "trim": say read, write, flush/],
  ];
  for (const [options, message] of refused) {
    assert.throws(() => fault(disk(), options), { name: "UsageError", message });
  }
});
