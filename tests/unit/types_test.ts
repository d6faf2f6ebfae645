// SPDX-License-Identifier: MIT
/**
 * The types that users meet: what must compile does, and what must not is marked, so that
 * `deno check` (tools/check.ts) complains about a mark without an error. Nothing here is served.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  type BlockDevice,
  createDevice,
  defineTarget,
  fault,
  faultTarget,
  httpTarget,
  memoryTarget,
  type Target,
} from "../../mod.ts";
import { checkAgainstModel, type FastCheck, openForTesting } from "../../testing/mod.ts";
import fc from "fast-check";

const size = 4096;
const read = () => {};

test("devices that are right compile", () => {
  const targets: Target[] = [
    defineTarget({ size, read }),
    defineTarget({ size, read: ({ buffer }) => void buffer.fill(1), timeoutMs: 5 }),
    defineTarget({ size, read: ({ length }) => length }),
    defineTarget({ size, read: ({ length }) => Promise.resolve(length) }),
    defineTarget({ size, async read() {}, async write() {}, async flush() {} }),
    defineTarget({ size, read, write: ({ fua, buffer }) => fua ? buffer.length : undefined }),
    defineTarget({ size, read, writeZeroes: ({ mayUnmap, fua }) => void (mayUnmap && fua) }),
    defineTarget({ size, read: ({ signal }) => signal.throwIfAborted() }),
    defineTarget({ open: () => ({ size, read }) }),
    defineTarget({ open: () => Promise.resolve({ size, read }) }),
    defineTarget({
      options: {
        size: { type: "size", default: "1G" },
        file: { type: "path", required: true },
        label: { type: "string" },
        fast: { type: "boolean", default: true },
        ratio: { type: "number" },
      },
      share: ({ size }) => new SharedArrayBuffer(size),
      open({ size, file, label, fast, ratio }, shared) {
        const known: [number, string, boolean, SharedArrayBuffer] = [size, file, fast, shared];
        const unknown: [string | undefined, number | undefined] = [label, ratio];
        // @ts-expect-error it has no default and is not required
        const text: string = label;
        // @ts-expect-error a size is a number of bytes
        file = size;
        return { size: known[0] + unknown.length + text.length, read };
      },
    }),
  ];
  assert.equal(targets.length, 11);
  const checker: FastCheck = fc;
  assert.ok(checker);
});

test("devices that are wrong do not compile", () => {
  const wrong: unknown[] = [
    // @ts-expect-error no read
    defineTarget({ size }),
    // @ts-expect-error no size
    defineTarget({ read }),
    // @ts-expect-error a size is bytes
    defineTarget({ size: "1G", read }),
    // @ts-expect-error an answer is a count
    defineTarget({ size, read: () => "done" }),
    // @ts-expect-error an answer is no array
    defineTarget({ size, read: ({ buffer }) => buffer.fill(1) }),
    // @ts-expect-error nor a promise of one
    defineTarget({ size, read: ({ buffer }) => Promise.resolve(buffer) }),
    // @ts-expect-error it gets one request
    defineTarget({ size, read: (_offset: number, _length: number) => {} }),
    // @ts-expect-error a read has no fua
    defineTarget({ size, read: ({ fua }) => void fua }),
    // @ts-expect-error a discard has no buffer
    defineTarget({ size, read, discard: ({ buffer }) => void buffer }),
    // @ts-expect-error a flush has no buffer
    defineTarget({ size, read, flush: ({ buffer }) => void buffer }),
    // @ts-expect-error offsets are read-only
    defineTarget({ size, read: (request) => void (request.offset = 0) }),
    // @ts-expect-error a misspelt name
    defineTarget({ size, read, wirte() {} }),
    // @ts-expect-error no such type of option
    defineTarget({ options: { a: { type: "date" } }, open: () => ({ size, read }) }),
    // @ts-expect-error no such option
    defineTarget({ options: { a: { type: "size" } }, open: ({ b }) => ({ size: b, read }) }),
    // @ts-expect-error open makes a device
    defineTarget({ open: () => 5 }),
  ];
  assert.equal(wrong.length, 15);
  const specs: unknown[] = [
    // @ts-expect-error no such type of option
    defineTarget({ options: { a: { type: "int", default: 5 } }, open: () => ({ size, read }) }),
    // @ts-expect-error a default is of its option's type, or text
    defineTarget({ options: { a: { type: "size", default: true } }, open: () => ({ size, read }) }),
  ];
  assert.equal(specs.length, 2);
  // @ts-expect-error a device has a read
  const device: BlockDevice = { size };
  assert.ok(device);
});

test("ready-made targets are targets, with values for options", () => {
  const sized = defineTarget({
    options: {
      size: { type: "size", default: "1G" },
      label: { type: "string" },
      fast: { type: "boolean", default: true },
    },
    open: ({ size }) => ({ size, read }),
  });
  const serve = () => [
    createDevice(memoryTarget, { options: { size: "64M", blockSize: 4096 } }),
    createDevice(httpTarget, { queues: 1, options: { url: "https://example.org/disk.img" } }),
    createDevice(faultTarget, { options: { cache: true } }),
    createDevice(fault({ size, read }, { errorRate: 0.5 })),
    createDevice(sized, { options: { size: 4096, label: "a", fast: "yes" } }),
    createDevice(sized as Target, { options: { whatever: 5 } }),
    createDevice(sized, {}),
    openForTesting(sized, { depth: 1, options: { size: "64M" } }),
    checkAgainstModel(sized, { fc, runs: 1, options: { size: "64M" } }),
    // @ts-expect-error a misspelt option
    createDevice(sized, { options: { sizze: 5 } }),
    // @ts-expect-error a misspelt option
    openForTesting(sized, { options: { sizze: 5 } }),
    // @ts-expect-error a misspelt option
    checkAgainstModel(sized, { fc, options: { sizze: 5 } }),
    // @ts-expect-error a misspelt option
    createDevice(memoryTarget, { options: { sizze: 5 } }),
    // @ts-expect-error a misspelt option
    createDevice(httpTarget, { options: { uri: "https://example.org" } }),
    // @ts-expect-error a misspelt option
    createDevice(faultTarget, { options: { cash: true } }),
    // @ts-expect-error a size is bytes, or text
    createDevice(sized, { options: { size: true } }),
    // @ts-expect-error a switch is no number
    createDevice(sized, { options: { fast: 1 } }),
    // @ts-expect-error it has no options
    createDevice(defineTarget({ size, read }), { options: { size: 5 } }),
    // @ts-expect-error it has none either
    createDevice({ size, read }, { options: { size: 5 } }),
    // @ts-expect-error nor does this one
    createDevice(defineTarget({ open: () => ({ size, read }) }), { options: { size: 5 } }),
    // @ts-expect-error an option is text, a number or a boolean
    createDevice(httpTarget, { options: { url: new URL("https://example.org") } }),
    // @ts-expect-error a target is no device
    createDevice(fault(memoryTarget, { errorRate: 0.5 })),
  ];
  assert.ok(serve); // Not called: nothing is served here.
});
