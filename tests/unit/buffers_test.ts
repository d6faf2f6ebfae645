// SPDX-License-Identifier: MIT
/** ffi/buffers.ts over plain memory: who gets which buffer, and what becomes of it. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { BufferPool } from "../../ffi/buffers.ts";

const BYTES = 4096;

/** A pool whose addresses are numbers, and what it did with them. */
function setUp(tags: number, bytes = 32 * 1024 ** 2, mapsMax = Infinity) {
  let next = 1;
  const used: [tag: number, address: number][] = [];
  const dropped: [address: number, unmap: boolean][] = [];
  const initial = Array.from({ length: tags }, () => next++);
  const pool = new BufferPool({
    bytes,
    map: () => next - initial.length > mapsMax ? -1 : next++,
    view: () => new ArrayBuffer(BYTES),
    use: (tag, address) => void used.push([tag, address]),
    drop: (address, unmap) => void dropped.push([address, unmap]),
  }, initial);
  return { pool, used, dropped, mapped: () => next - 1 };
}

/** Runs the collector. */
const { Bun } = globalThis as unknown as { Bun?: { gc(force: boolean): void } };
if (!Bun) setFlagsFromString("--expose-gc");
const gc: () => void = Bun ? () => Bun.gc(true) : runInNewContext("gc");

/** Has the collector run until that is so, or for a while. */
async function collect(isDone: () => boolean): Promise<void> {
  for (let round = 0; round < 100 && !isDone(); round++) {
    gc();
    await sleep(1);
  }
}

test("there are 64 spare buffers, or 64 MiB of them; then tags share a place", () => {
  for (const [bytes, spares] of [[4096, 64], [1024 ** 2, 64], [4 * 1024 ** 2, 16], [2 ** 25, 2]]) {
    const { pool, used, mapped } = setUp(3, bytes!);
    const first = [...pool.tags];
    for (let n = 0; n < spares!; n++) assert.equal(pool.renew(n % 2), true, `${bytes}: ${n}`);
    assert.equal(new Set(used.map(([, address]) => address)).size, spares);
    assert.equal(pool.renew(0), false);
    assert.equal(pool.renew(1), false);
    assert.equal(pool.tags[0], pool.tags[1]);
    assert.equal(pool.renew(0), false, "and stays there");
    assert.deepEqual(used.slice(-3), [[0, mapped()], [1, mapped()], [0, mapped()]]);
    assert.equal(mapped(), 3 + spares! + 1);
    pool.giveBack(first[1]!);
    assert.equal(pool.renew(1), true);
    assert.equal(pool.tags[1], first[1], "what comes back is used again");
    assert.deepEqual(used.at(-1), [1, 2]);
    assert.equal(pool.tags[2], first[2], "a tag that is not renewed has what it had");
  }
});

test("without memory there is less; without any at all, that is told", () => {
  const none = setUp(1, BYTES, 0);
  const [only] = none.pool.tags;
  assert.equal(none.pool.renew(0), undefined);
  assert.equal(none.pool.tags[0], only);
  const one = setUp(1, BYTES, 1);
  assert.equal(one.pool.renew(0), true);
  assert.equal(one.pool.renew(0), undefined);
});

test("a buffer that was handed on is never used again", () => {
  const { pool, mapped } = setUp(1);
  const [first] = pool.tags;
  const theirs = structuredClone(first!, { transfer: [first!.buffer] });
  assert.equal(pool.renew(0), true);
  pool.giveBack(first!);
  assert.equal(pool.renew(0), true);
  assert.equal(pool.renew(0), false, "it is lost");
  assert.equal(mapped(), 4);
  assert.equal(theirs.length, BYTES);
});

test("at the end, views of what is unused are empty, and what is used comes back later", async () => {
  const { pool, dropped } = setUp(3);
  const [unused, used, given] = pool.tags;
  const kept = unused!.subarray(5, 10);
  pool.renew(2);
  pool.close((tag) => tag === 1);
  assert.deepEqual([unused!.length, kept.length, kept[0], pool.tags.length], [0, 0, undefined, 0]);
  assert.throws(() => structuredClone(unused, { transfer: [unused!.buffer] }));
  assert.deepEqual([used!.length, given!.length], [BYTES, BYTES]);
  used!.fill(1);
  pool.giveBack(used!);
  pool.giveBack(given!);
  assert.deepEqual([used!.length, given!.length], [0, 0]);
  await collect(() => dropped.length > 0);
  assert.ok(dropped.every(([address]) => address > 3), "views are left of the others");
  assert.deepEqual([kept.length, used!.length, given!.length], [0, 0, 0]);
});

test("what nobody sees any more is unmapped; what was lent only loses its pages", async () => {
  const { pool, dropped } = setUp(4);
  const held = pool.tags[3]!.subarray(1);
  const givenBack = pool.tags[0]!;
  pool.renew(0);
  pool.giveBack(givenBack);
  pool.renew(2); // Has that one now. What it had, nobody has, but it may have been handed on.
  await collect(() => dropped.length > 0);
  assert.deepEqual(dropped.splice(0), [[3, false]]);
  assert.equal(pool.renew(1), true, "for each that was lent there may be another");
  assert.equal(pool.renew(1), true);
  await collect(() => dropped.length >= 2);
  assert.ok(dropped.length > 0 && dropped.splice(0).every(([, unmap]) => !unmap));

  pool.close(() => false);
  assert.equal(held.length, 0);
  await collect(() => dropped.length >= 2);
  assert.ok(dropped.length >= 2 && dropped.every(([, unmap]) => unmap), `${dropped}`);
  assert.ok(dropped.every(([address]) => address !== 4), "a view of it is left");
});

test("what tags have shared is unmapped, too, when the pool is closed", async () => {
  const { pool, dropped, mapped } = setUp(1);
  while (pool.renew(0)) { /* until there are no more */ }
  const shared = mapped();
  pool.close(() => true);
  await collect(() => dropped.some(([address]) => address === shared));
  assert.ok(dropped.some(([address, unmap]) => address === shared && unmap));
});
