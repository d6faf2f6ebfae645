// SPDX-License-Identifier: MIT
/** A device's limits as the driver's parameters, checked. @module */

import { release } from "node:os";
import type { Unpacked, Values } from "../abi/struct.ts";
import {
  UBLK_ATTR_FUA,
  UBLK_ATTR_READ_ONLY,
  UBLK_ATTR_VOLATILE_CACHE,
  UBLK_MIN_SEGMENT_SIZE,
  type UBLK_PARAM_BASIC,
  UBLK_PARAM_TYPE_BASIC,
  UBLK_PARAM_TYPE_DISCARD,
  UBLK_PARAM_TYPE_DMA_ALIGN,
  UBLK_PARAM_TYPE_SEGMENT,
  type UBLK_PARAMS,
} from "../abi/ublk_cmd.ts";
import { UblkError, UsageError } from "./error.ts";
import { SECTOR_BYTES } from "./queue.ts";
import type { DeviceLimits, MemoryLimits } from "./target.ts";

/** Largest request without data, in sectors: what a u32 of bytes can hold. */
const DATALESS_SECTORS_MAX = Math.floor(0xffff_ffff / SECTOR_BYTES);

/** What the driver asks of the memory of requests by itself, in bytes. */
const MEMORY_ALIGN_DEFAULT = 4;
const MEMORY_ALIGN_MAX = 4096;

/** What it asks of their segments by itself. */
const SEGMENTS_DEFAULT = 0xffff;
const SEGMENT_BYTES_DEFAULT = 0xffff_ffff;
const SEGMENT_BOUNDARY_DEFAULT = 2 ** 32;
const SEGMENT_BOUNDARY_MAX = 2 ** 52;

/** Larger than the page, the driver refuses a logical block. */
const BLOCK_BYTES_MAX = 4096;

/**
 * @param ioBytesMax the largest READ or WRITE, in bytes, as ADD_DEV answered it.
 * @param memoryAlignBytes what the data of requests is aligned to in the memory of clients, where
 * the backing gets to see that memory (zero copy); a power of two below the page.
 * @throws {UsageError} a size or block size that no device can have.
 */
export function toParams(
  limits: DeviceLimits,
  ioBytesMax: number,
  memoryAlignBytes = MEMORY_ALIGN_DEFAULT,
): Values<typeof UBLK_PARAMS> {
  checkLimits(limits);
  const { sizeBytes, blockBytes, physicalBlockBytes, discardBytes, writeZeroes } = limits;
  const attrs = (limits.readOnly ? UBLK_ATTR_READ_ONLY : 0) |
    // The driver ignores FUA without a volatile cache.
    (limits.volatileCache ? UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA : 0);
  const basic = {
    attrs,
    logical_bs_shift: Math.log2(blockBytes),
    physical_bs_shift: Math.log2(physicalBlockBytes),
    io_min_shift: Math.log2(physicalBlockBytes),
    io_opt_shift: Math.log2(physicalBlockBytes),
    max_sectors: ioBytesMax / SECTOR_BYTES,
    chunk_sectors: (limits.chunkBytes ?? 0) / SECTOR_BYTES,
    dev_sectors: sizeBytes / SECTOR_BYTES,
  };
  const memory = memoryParams(limits, memoryAlignBytes);
  const types = UBLK_PARAM_TYPE_BASIC | memory.types;
  if (discardBytes === 0 && !writeZeroes) return { ...memory, types, basic };
  const discard = {
    discard_granularity: discardBytes || blockBytes,
    max_discard_sectors: discardBytes === 0 ? 0 : DATALESS_SECTORS_MAX,
    max_write_zeroes_sectors: writeZeroes ? DATALESS_SECTORS_MAX : 0,
    max_discard_segments: 1,
  };
  return { ...memory, types: types | UBLK_PARAM_TYPE_DISCARD, basic, discard };
}

function memoryParams(limits: MemoryLimits, alignBytes: number) {
  const { segmentsMax, segmentBytesMax, segmentBoundaryBytes } = limits;
  const alignment = Math.max(limits.memoryAlignBytes ?? 0, alignBytes);
  const aligned = alignment > MEMORY_ALIGN_DEFAULT;
  const segmented = (segmentsMax ?? segmentBytesMax ?? segmentBoundaryBytes) !== undefined;
  return {
    types: (aligned ? UBLK_PARAM_TYPE_DMA_ALIGN : 0) | (segmented ? UBLK_PARAM_TYPE_SEGMENT : 0),
    ...(aligned && { dma: { alignment: alignment - 1 } }),
    ...(segmented && {
      seg: {
        max_segments: segmentsMax ?? SEGMENTS_DEFAULT,
        max_segment_size: segmentBytesMax ?? SEGMENT_BYTES_DEFAULT,
        seg_boundary_mask: BigInt((segmentBoundaryBytes ?? SEGMENT_BOUNDARY_DEFAULT) - 1),
      },
    }),
  };
}

/**
 * The driver drops the types of parameters that it does not know, silently.
 *
 * @param types what was set. @param kept what the driver has.
 * @throws {UblkError} EOPNOTSUPP: it dropped some.
 */
export function refuseDroppedParams(types: number, kept: number, device: number): void {
  const dropped = types & ~kept;
  if (dropped === 0) return;
  const what = dropped & UBLK_PARAM_TYPE_SEGMENT ? "limits of segments" : "an alignment of memory";
  const hint = `kernel ${release()} lacks ${what} (needs 6.15)`;
  throw new UblkError({ errno: "EOPNOTSUPP", operation: "SET_PARAMS", device, hint });
}

/**
 * Whether a target can go on with a device that another one was opened for: the kernel knows its
 * limits from then, and sends no FLUSH where there was no cache, and writes where they were allowed.
 *
 * @param basic what the driver has.
 * @throws {UsageError} it cannot.
 */
export function refuseOtherLimits(
  id: number,
  { attrs, logical_bs_shift, dev_sectors }: Unpacked<typeof UBLK_PARAM_BASIC>,
  limits: DeviceLimits,
): void {
  const blockBytes = 2 ** logical_bs_shift;
  const sizeBytes = Number(dev_sectors) * SECTOR_BYTES;
  const has = (attr: number) => (attrs & attr) !== 0;
  const writable = (readOnly: boolean) => readOnly ? "read-only" : "writable";
  const cached = (cache: boolean) => cache ? "a volatile cache" : "no volatile cache";
  const changes = [
    ...(limits.sizeBytes < sizeBytes ? [[`${sizeBytes} bytes`, `${limits.sizeBytes}`]] : []),
    ...(limits.blockBytes !== blockBytes
      ? [[`blocks of ${blockBytes} bytes`, `${limits.blockBytes}`]]
      : []),
    ...(limits.readOnly !== has(UBLK_ATTR_READ_ONLY)
      ? [[`been ${writable(!limits.readOnly)}`, writable(limits.readOnly)]]
      : []),
    ...(limits.volatileCache !== has(UBLK_ATTR_VOLATILE_CACHE)
      ? [[cached(!limits.volatileCache), cached(limits.volatileCache)]]
      : []),
  ];
  if (changes.length === 0) return;
  const [was, is] = changes[0]!;
  throw new UsageError(
    `Device ${id} has ${was}, its target now ${is}: ` +
      "make it as it was, or delete the device and add it again",
  );
}

/**
 * What the driver would refuse, in words.
 *
 * @throws {UsageError} naming the limit, its range and its value.
 */
export function checkMemoryLimits(limits: MemoryLimits): void {
  const { memoryAlignBytes, segmentsMax, segmentBytesMax, segmentBoundaryBytes } = limits;
  const within = (
    what: string,
    value: number | undefined,
    min: number,
    max: number,
    power = false,
  ) => {
    if (value === undefined) return;
    const fits = Number.isInteger(value) && value >= min && value <= max;
    if (fits && (!power || Number.isInteger(Math.log2(value)))) return;
    const wanted = `${power ? "a power of two " : ""}from ${min} to ${max}`;
    throw new UsageError(`${what} ${value}: it must be ${wanted}`);
  };
  const min = UBLK_MIN_SEGMENT_SIZE;
  within("Memory alignment", memoryAlignBytes, MEMORY_ALIGN_DEFAULT, MEMORY_ALIGN_MAX, true);
  within("Number of segments", segmentsMax, 1, SEGMENTS_DEFAULT);
  within("Segment size", segmentBytesMax, min, SEGMENT_BYTES_DEFAULT);
  within("Segment boundary", segmentBoundaryBytes, min, SEGMENT_BOUNDARY_MAX, true);
}

function checkLimits(limits: DeviceLimits): void {
  const { sizeBytes, blockBytes, physicalBlockBytes } = limits;
  checkMemoryLimits(limits);
  const isBlock = (bytes: number) => bytes >= SECTOR_BYTES && Number.isInteger(Math.log2(bytes));
  if (!isBlock(blockBytes) || blockBytes > BLOCK_BYTES_MAX) {
    throw new UsageError(`Block size ${blockBytes}: it must be 512, 1024, 2048 or 4096`);
  }
  if (!isBlock(physicalBlockBytes) || physicalBlockBytes < blockBytes) {
    throw new UsageError(`Physical block size ${physicalBlockBytes}: no multiple of ${blockBytes}`);
  }
  const sizeMax = Number.MAX_SAFE_INTEGER - Number.MAX_SAFE_INTEGER % blockBytes;
  if (sizeBytes > sizeMax) {
    throw new UsageError(
      `Size ${sizeBytes}: a device has less than 8 PiB, in blocks of ${blockBytes} up to ` +
        `${sizeMax} bytes`,
    );
  }
  if (!(sizeBytes >= blockBytes) || sizeBytes % blockBytes) {
    throw new UsageError(
      `Size ${sizeBytes}: it must be a multiple of the ${blockBytes}-byte block, and one block at least`,
    );
  }
}
