// SPDX-License-Identifier: MIT
/** Limits as struct ublk_params: bytes at the header's offsets, and what no device can have. */
import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { pack, unpack } from "../../abi/struct.ts";
import {
  UBLK_PARAM_BASIC,
  UBLK_PARAM_TYPE_BASIC,
  UBLK_PARAM_TYPE_DISCARD,
  UBLK_PARAM_TYPE_DMA_ALIGN,
  UBLK_PARAM_TYPE_SEGMENT,
  UBLK_PARAMS,
} from "../../abi/ublk_cmd.ts";
import { UsageError } from "../../core/error.ts";
import { refuseDroppedParams, refuseOtherLimits, toParams } from "../../core/params.ts";
import type { DeviceLimits } from "../../core/target.ts";

const LIMITS: DeviceLimits = {
  sizeBytes: 250 * 1024 ** 3,
  blockBytes: 512,
  physicalBlockBytes: 4096,
  readOnly: false,
  volatileCache: false,
  discardBytes: 0,
  writeZeroes: false,
};

const IO_BYTES = 512 * 1024;

/** The struct as the kernel reads it, with `len` as Control.setParams sets it. */
function bytesOf(limits: Partial<DeviceLimits>, ioBytesMax = IO_BYTES): DataView {
  const params = toParams({ ...LIMITS, ...limits }, ioBytesMax);
  return new DataView(pack(UBLK_PARAMS, { ...params, len: UBLK_PARAMS.size }).buffer);
}

/** Byte offsets in struct ublk_params, counted from <linux/ublk_cmd.h> by hand. */
const AT = {
  types: 4,
  attrs: 8,
  logicalShift: 12,
  physicalShift: 13,
  optShift: 14,
  minShift: 15,
  maxSectors: 16,
  chunkSectors: 20,
  devSectors: 24,
  discard: 40,
  discardGranularity: 44,
  maxDiscardSectors: 48,
  maxWriteZeroesSectors: 52,
  maxDiscardSegments: 56,
} as const;

test("toParams without DISCARD fills the basic block and leaves all else zero", () => {
  const view = bytesOf({});
  const expected = new DataView(new ArrayBuffer(view.byteLength));
  expected.setUint32(0, view.byteLength, true);
  expected.setUint32(AT.types, 1, true);
  expected.setUint8(AT.logicalShift, 9);
  expected.setUint8(AT.physicalShift, 12);
  expected.setUint8(AT.optShift, 12);
  expected.setUint8(AT.minShift, 12);
  expected.setUint32(AT.maxSectors, 1024, true);
  expected.setBigUint64(AT.devSectors, 524288000n, true);
  assert.deepStrictEqual(new Uint8Array(view.buffer), new Uint8Array(expected.buffer));
});

test("toParams has the block layer split at a chunk's end", () => {
  assert.strictEqual(bytesOf({}).getUint32(AT.chunkSectors, true), 0);
  assert.strictEqual(bytesOf({ chunkBytes: 65536 }).getUint32(AT.chunkSectors, true), 128);
});

test("toParams offers DISCARD and WRITE_ZEROES each by itself", () => {
  const discard = bytesOf({ discardBytes: 4096 });
  assert.strictEqual(discard.getUint32(AT.maxDiscardSectors, true), 8388607);
  assert.strictEqual(discard.getUint32(AT.maxWriteZeroesSectors, true), 0);
  const zeroes = bytesOf({ writeZeroes: true });
  assert.strictEqual(zeroes.getUint32(AT.discardGranularity, true), 512);
  assert.strictEqual(zeroes.getUint32(AT.maxDiscardSectors, true), 0);
  assert.strictEqual(zeroes.getUint32(AT.maxWriteZeroesSectors, true), 8388607);
});

test("toParams asks for aligned memory where the driver's own demand is too weak", () => {
  const dma = (align?: number, limits = {}) => toParams({ ...LIMITS, ...limits }, IO_BYTES, align);
  assert.deepStrictEqual(dma(1), dma());
  assert.strictEqual(dma().types, UBLK_PARAM_TYPE_BASIC);
  const both = UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DMA_ALIGN;
  assert.strictEqual(dma(512).types, both);
  const discarding = dma(512, { discardBytes: 4096 });
  assert.strictEqual(discarding.types, both | UBLK_PARAM_TYPE_DISCARD);
  assert.deepStrictEqual(discarding.dma, { alignment: 511 });
});

test("toParams with DISCARD adds its block, with the largest extent that fits a u32 of bytes", () => {
  const view = bytesOf({ discardBytes: 4096, writeZeroes: true });
  assert.strictEqual(view.getUint32(AT.types, true), 3);
  assert.strictEqual(view.getUint32(AT.discard, true), 0);
  assert.strictEqual(view.getUint32(AT.discardGranularity, true), 4096);
  assert.strictEqual(view.getUint32(AT.maxDiscardSectors, true), 8388607);
  assert.strictEqual(view.getUint32(AT.maxWriteZeroesSectors, true), 8388607);
  assert.strictEqual(view.getUint16(AT.maxDiscardSegments, true), 1);
  assert.strictEqual(view.getUint16(AT.maxDiscardSegments + 2, true), 0);
});

test("toParams sets READ_ONLY, and VOLATILE_CACHE only together with FUA", () => {
  const attrs = (limits: Partial<DeviceLimits>) => bytesOf(limits).getUint32(AT.attrs, true);
  assert.strictEqual(attrs({}), 0);
  assert.strictEqual(attrs({ readOnly: true }), 1);
  assert.strictEqual(attrs({ volatileCache: true }), 4 | 8);
  assert.strictEqual(attrs({ readOnly: true, volatileCache: true }), 1 | 4 | 8);
});

test("toParams turns any valid limits into shifts and sectors", () => {
  const shift = fc.integer({ min: 9, max: 12 });
  fc.assert(fc.property(shift, shift, fc.maxSafeNat(), fc.integer({ min: 1, max: 8192 }), (
    logical,
    more,
    any,
    pages,
  ) => {
    const physical = Math.max(logical, more);
    const blocks = Math.max(1, Math.floor(any / 2 ** logical));
    const view = bytesOf({
      sizeBytes: blocks * 2 ** logical,
      blockBytes: 2 ** logical,
      physicalBlockBytes: 2 ** physical,
    }, pages * 4096);
    assert.strictEqual(view.getUint8(AT.logicalShift), logical);
    assert.strictEqual(view.getUint8(AT.physicalShift), physical);
    assert.strictEqual(view.getUint32(AT.maxSectors, true), pages * 8);
    const sectors = BigInt(blocks) << BigInt(logical - 9);
    assert.strictEqual(view.getBigUint64(AT.devSectors, true), sectors);
  }));
});

function refuses(limits: Partial<DeviceLimits>, message: RegExp): void {
  assert.throws(
    () => toParams({ ...LIMITS, ...limits }, IO_BYTES),
    (error) => error instanceof UsageError && message.test(error.message),
    JSON.stringify(limits),
  );
}

test("toParams takes the block sizes 512 to 4096, and nothing beside them", () => {
  for (const blockBytes of [512, 1024, 2048, 4096]) {
    toParams({ ...LIMITS, blockBytes, sizeBytes: blockBytes }, IO_BYTES);
  }
  for (const blockBytes of [-512, 0, 1, 256, 511, 513, 768, 4095, 4097, 8192, 512.5, NaN]) {
    refuses({ blockBytes, sizeBytes: 2 ** 40 }, /^Block size .*: it must be 512, 1024, 2048/);
  }
});

test("toParams takes physical blocks that are a power of two and no smaller than the block", () => {
  toParams({ ...LIMITS, blockBytes: 4096, physicalBlockBytes: 4096 }, IO_BYTES);
  toParams({ ...LIMITS, blockBytes: 512, physicalBlockBytes: 512 }, IO_BYTES);
  refuses({ blockBytes: 4096, physicalBlockBytes: 2048 }, /^Physical block size 2048: /);
  refuses({ physicalBlockBytes: 256 }, /^Physical block size 256: /);
  refuses({ physicalBlockBytes: 4608 }, /^Physical block size 4608: /);
  refuses({ physicalBlockBytes: NaN }, /^Physical block size NaN: /);
});

test("toParams takes sizes from one block to 2^53 - 1, in whole blocks", () => {
  const largest = 2 ** 53 - 512;
  for (const sizeBytes of [512, 1024, largest]) {
    assert.strictEqual(
      bytesOf({ sizeBytes }).getBigUint64(AT.devSectors, true),
      BigInt(sizeBytes) / 512n,
    );
  }
  for (const sizeBytes of [0, -512, 511, 513, 256, 1000, NaN]) {
    refuses({ sizeBytes }, /^Size .*: it must be a multiple of the 512-byte block/);
  }
  for (const sizeBytes of [2 ** 53, 2 ** 60, Infinity]) {
    refuses(
      { sizeBytes },
      /^Size .*: a device has less than 8 PiB, .* up to 9007199254740480 bytes/,
    );
  }
  const larger = { blockBytes: 4096, sizeBytes: 2 ** 53 };
  refuses(larger, /blocks of 4096 up to 9007199254736896 bytes/);
  toParams({ ...LIMITS, blockBytes: 4096, sizeBytes: 4096 }, IO_BYTES);
  refuses({ blockBytes: 4096, sizeBytes: 4096 + 512 }, /^Size 4608: .* 4096-byte block/);
  refuses({ blockBytes: 4096, sizeBytes: 512 }, /^Size 512: /);
});

test("another server takes a device only as it is: size, block, writability and cache", () => {
  const limits = { ...LIMITS, sizeBytes: 1024 ** 2, volatileCache: true };
  const { basic } = toParams(limits, 4096);
  const driver = unpack(UBLK_PARAM_BASIC, pack(UBLK_PARAM_BASIC, basic!));
  const check = (change: Partial<typeof limits>) =>
    refuseOtherLimits(3, driver, { ...limits, ...change });
  check({});
  check({ sizeBytes: 2 * 1024 ** 2, discardBytes: 4096 });
  const refused: [Partial<typeof limits>, RegExp][] = [
    [{ sizeBytes: 1024 ** 2 - 512 }, /Device 3 has 1048576 bytes, its target now 1048064: make it/],
    [{ blockBytes: 4096 }, /has blocks of 512 bytes, its target now 4096/],
    [{ readOnly: true }, /has been writable, its target now read-only/],
    [{ volatileCache: false }, /has a volatile cache, its target now no volatile cache/],
  ];
  for (const [change, message] of refused) {
    assert.throws(() => check(change), { name: "UsageError", message });
  }
});

test("toParams: a chosen alignment holds beside what zero copy asks, whichever is more", () => {
  const dma = (chosen?: number, asked?: number) =>
    toParams({ ...LIMITS, memoryAlignBytes: chosen }, IO_BYTES, asked).dma;
  assert.deepStrictEqual(dma(512, 4), { alignment: 511 });
  assert.deepStrictEqual(dma(512, 4096), { alignment: 4095 });
  assert.deepStrictEqual(dma(4096), { alignment: 4095 });
  assert.strictEqual(dma(4), undefined, "the driver's own");
});

test("toParams: of segments, what is not said is the driver's own", () => {
  const own = {
    max_segments: 65535,
    max_segment_size: 0xffff_ffff,
    seg_boundary_mask: 0xffff_ffffn,
  };
  const params = (limits: Partial<DeviceLimits>) => toParams({ ...LIMITS, ...limits }, IO_BYTES);
  assert.deepStrictEqual(params({}).seg, undefined);
  for (
    const [limits, seg] of [
      [{ segmentsMax: 7 }, { max_segments: 7 }],
      [{ segmentBytesMax: 4096 }, { max_segment_size: 4096 }],
      [{ segmentBoundaryBytes: 8192 }, { seg_boundary_mask: 8191n }],
    ] as const
  ) {
    const { types, ...rest } = params(limits);
    assert.deepStrictEqual(rest.seg, { ...own, ...seg });
    assert.strictEqual(types, UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_SEGMENT);
  }
});

test("toParams refuses what the driver would, naming it", () => {
  for (
    const [limits, message] of [
      [{ memoryAlignBytes: 2 }, "Memory alignment 2: it must be a power of two from 4 to 4096"],
      [{ memoryAlignBytes: 513 }, /alignment 513/],
      [{ memoryAlignBytes: 8192 }, /alignment 8192/],
      [{ segmentsMax: 0 }, "Number of segments 0: it must be from 1 to 65535"],
      [{ segmentsMax: 65536 }, /65536/],
      [{ segmentsMax: 1.5 }, /1\.5/],
      [{ segmentBytesMax: 4095 }, "Segment size 4095: it must be from 4096 to 4294967295"],
      [{ segmentBoundaryBytes: 2048 }, /boundary 2048: it must be a power of two from 4096 to/],
      [{ segmentBoundaryBytes: 12288 }, /12288/],
    ] as const
  ) {
    const refuse = () => toParams({ ...LIMITS, ...limits }, IO_BYTES);
    assert.throws(refuse, { name: "UsageError", message });
  }
});

test("refuseDroppedParams tells what an older kernel has dropped", () => {
  const all = UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_SEGMENT | UBLK_PARAM_TYPE_DMA_ALIGN;
  refuseDroppedParams(all, all, 0);
  refuseDroppedParams(UBLK_PARAM_TYPE_BASIC, all, 0);
  const refused = (kept: number) => () => refuseDroppedParams(all, kept, 3);
  const errno = "EOPNOTSUPP";
  assert.throws(refused(all & ~UBLK_PARAM_TYPE_SEGMENT), {
    errno,
    message: /lacks limits of segm/,
  });
  assert.throws(refused(all & ~UBLK_PARAM_TYPE_DMA_ALIGN), {
    errno,
    message: /lacks an alignment/,
  });
});
