// SPDX-License-Identifier: MIT
/** targets/memory.ts without a queue: a buffer, sparse, shared by threads. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import process from "node:process";
import { test } from "node:test";
import fc from "fast-check";
import { type BlockDevice, toDefinition } from "../../core/define_target.ts";
import { UblkError, UsageError } from "../../core/error.ts";
import { memoryDevice, memoryTarget } from "../../targets/memory.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
const { signal } = new AbortController();

function read(device: BlockDevice, offset: number, length: number): Buffer {
  const buffer = new Uint8Array(length);
  device.read({ offset, length, buffer, signal });
  return Buffer.from(buffer);
}

function write(device: BlockDevice, offset: number, data: Uint8Array<ArrayBuffer>): void {
  device.write!({ offset, length: data.length, buffer: data, fua: false, signal });
}

test("memory is a buffer, also where its parts meet", () => {
  const [size, middle, span] = [257 * MIB, 256 * MIB, 256 * KIB];
  const device = memoryDevice(size, 512);
  const kind = fc.constantFrom("write" as const, "discard" as const, "writeZeroes" as const);
  const step = fc.tuple(kind, fc.nat({ max: 2 * span - 1 }), fc.integer({ min: 1, max: span }));
  fc.assert(
    fc.property(fc.array(step, { minLength: 1, maxLength: 20 }), (steps) => {
      const model = Buffer.alloc(2 * span);
      device.discard!({ offset: 0, length: size, signal });
      for (const [index, [kind, from, wanted]] of steps.entries()) {
        const length = Math.min(wanted, 2 * span - from);
        const offset = middle - span + from;
        model.fill(kind === "write" ? index + 1 : 0, from, from + length);
        if (kind === "write") write(device, offset, new Uint8Array(length).fill(index + 1));
        else device[kind]!({ offset, length, signal, fua: false, mayUnmap: true });
        assert.ok(read(device, offset, length).equals(model.subarray(from, from + length)));
      }
      assert.ok(read(device, middle - span, 2 * span).equals(model));
    }),
    { numRuns: 30 },
  );
});

test("memory is the same for every thread that opens it", async () => {
  const definition = toDefinition(memoryTarget, "memory");
  const options = { size: MIB, blockSize: 4096 } as never; // Its types are gone by now.
  const shared = structuredClone(await definition.share!(options));
  const [one, two] = [
    await definition.open(options, shared, () => {}),
    await definition.open(options, structuredClone(shared), () => {}),
  ];
  assert.deepStrictEqual([one.size, one.blockSize], [MIB, 4096]);
  write(one, 5000, new Uint8Array(1000).fill(7));
  assert.ok(read(two, 5000, 1000).equals(Buffer.alloc(1000, 7)));
  two.discard!({ offset: 5500, length: 100, signal });
  assert.ok(read(one, 5500, 100).equals(Buffer.alloc(100)));
});

test("memory takes none for what was never written, however often it is discarded", () => {
  const size = 2 * 1024 * MIB;
  const device = memoryDevice(size, 512);
  write(device, size - 512, new Uint8Array(512).fill(9));
  const before = process.memoryUsage().rss;
  device.discard!({ offset: 0, length: size - 512, signal });
  device.writeZeroes!({ offset: 0, length: size - 512, signal, fua: false, mayUnmap: true });
  assert.ok(read(device, size / 2, 512).equals(Buffer.alloc(512)));
  const grown = process.memoryUsage().rss - before;
  assert.ok(grown < 256 * MIB, `${grown} bytes more`);
  assert.ok(read(device, size - 512, 512).equals(Buffer.alloc(512, 9)));
});

test("memory refuses a size that it cannot have", () => {
  assert.throws(() => memoryDevice(2 ** 50, 512), UsageError);
  const { SharedArrayBuffer } = globalThis;
  globalThis.SharedArrayBuffer = function () {
    throw new RangeError("Out of memory");
  } as unknown as typeof SharedArrayBuffer;
  try {
    assert.throws(
      () => memoryDevice(MIB, 512),
      (error) => error instanceof UblkError && error.errno === "ENOMEM",
    );
  } finally {
    globalThis.SharedArrayBuffer = SharedArrayBuffer;
  }
});
