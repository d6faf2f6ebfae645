// SPDX-License-Identifier: MIT
/** A target as a device, without a kernel: its requests come from the test. @module */

import process from "node:process";
import {
  UBLK_IO_F_FUA,
  UBLK_IO_F_NOUNMAP,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";
import {
  type BlockDevice,
  type GivenOptions,
  type NoOptions,
  openDefinition,
  type OptionSpecs,
  parseOptions,
  type Target,
  type TargetDefinition,
  toDefinition,
} from "../core/define_target.ts";
import {
  checkOptions,
  DEPTH_DEFAULT,
  IO_BYTES_DEFAULT,
  QUEUES_DEFAULT,
  refuseQueues,
} from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import { toParams } from "../core/params.ts";
import { openHere } from "../core/queue_thread.ts";
import { type DeviceStats, sumStats } from "../core/stats.ts";
import type { ServedTarget } from "../core/target.ts";
import { PlayedDriver, RequestError } from "./driver.ts";

/** How `openForTesting` opens a target. */
export interface TestOptions<Specs extends OptionSpecs = OptionSpecs> {
  /** Values of the target's own options, by name: as text, or as what they are. */
  options?: GivenOptions<Specs>;
  /** Queues, 1 (default) to 4096. Each has an `open` of its own where the target has `share`. */
  queues?: number;
  /** Requests in flight for each queue, 1 to 4096; further ones wait. Default: 128. */
  depth?: number;
  /** Largest READ or WRITE in bytes, a multiple of 4096. Default: 512 KiB. */
  ioBytesMax?: number;
}

/**
 * A device whose requests come from its methods. Offsets and lengths are in bytes, multiples of
 * `blockSize`, below `size`; else a method rejects with a RangeError. A request that failed
 * rejects with a {@linkcode RequestError}, which has the errno's name as `code`.
 */
export interface TestDevice extends AsyncDisposable {
  /** Bytes. */
  readonly size: number;
  /** Bytes. */
  readonly blockSize: number;
  /** What the kernel is told that the device can. */
  readonly offers: {
    /** Without: the device is read-only, and a write fails with EPERM. */
    readonly write: boolean;
    /** Without: a flush succeeds, and no FUA is asked for. */
    readonly flush: boolean;
    /** Without: a discard fails with EOPNOTSUPP. */
    readonly discard: boolean;
    /** Without: zeroes are written, as the kernel does. */
    readonly writeZeroes: boolean;
  };
  /** What the operator would be told: the stack of an error without a code, what `open` logs. */
  readonly log: readonly string[];
  /** Reads at most `ioBytesMax` bytes. */
  read(offset: number, length: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Writes at most `ioBytesMax` bytes, which it copies first. */
  write(offset: number, bytes: Uint8Array, options?: { fua?: boolean }): Promise<void>;
  /** Makes durable what was answered before. */
  flush(): Promise<void>;
  /** Says that an extent is not needed any more. */
  discard(offset: number, length: number): Promise<void>;
  /** Has an extent read as zeroes. `mayUnmap` is true unless given. */
  writeZeroes(
    offset: number,
    length: number,
    options?: { fua?: boolean; mayUnmap?: boolean },
  ): Promise<void>;
  /** Requests answered so far. */
  stats(): DeviceStats;
  /**
   * Stops the device as `ubd del` does: aborts the signal of requests, waits for what is in flight,
   * then closes the target. Later requests fail with ENODEV. Idempotent. Rejects when the target
   * has written to a buffer after its request was answered.
   */
  stop(): Promise<void>;
}

/**
 * Opens a target without a kernel driver: its functions are called by the same code as with one,
 * and asked by the methods of the device this returns. Needs io_uring, and no privileges.
 *
 * To find bugs that a device would show only now and then, a buffer belongs to its request only
 * until that is answered: then it is overwritten. Whoever writes to it later is found out when the
 * device stops, at the latest: `stop`, and so `await using`, rejects with an Error that names the
 * request.
 *
 * @throws {UsageError} what `createDevice` would refuse: a size, an option, a missing function.
 * @throws {UblkError} there is no io_uring.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { defineTarget } from "ubd";
 * import { openForTesting } from "ubd/testing";
 *
 * const ones = defineTarget({ size: 1024 ** 2, read: ({ buffer }) => void buffer.fill(1) });
 *
 * await using device = await openForTesting(ones);
 * const [first, second] = await Promise.all([device.read(0, 512), device.read(4096, 1024)]);
 * assert.deepEqual([first[0], second.length], [1, 1024]);
 * await assert.rejects(device.write(0, new Uint8Array(512)), { code: "EPERM" });
 * ```
 */
export async function openForTesting<Specs extends OptionSpecs = NoOptions>(
  target: Target<Specs> | BlockDevice,
  options: TestOptions<NoInfer<Specs>> = {},
): Promise<TestDevice> {
  const {
    queues = QUEUES_DEFAULT,
    depth = DEPTH_DEFAULT,
    ioBytesMax = IO_BYTES_DEFAULT,
  } = options;
  checkOptions({ id: -1, queues, depth, ioBytesMax });
  const definition = toDefinition(target, "This");
  const values = parseOptions(definition, options.options ?? {}, process.cwd());
  const driver = new PlayedDriver();
  const log: string[] = [];
  const tell = (text: string) => void log.push(text);
  const opened = await openServed(definition, values, queues, tell);
  const targets = opened.map((served) => openHere(served, driver, tell));
  const { limits } = targets[0]!;

  const threads = Array.from(
    { length: queues },
    (_, queueId) => targets[queueId % targets.length]!.startThread!(queueId),
  );
  const wakeFds: number[] = [];
  const ended = () => Promise.all(threads.map((thread) => thread.ended)).then(() => {});
  const release = () => {
    for (const fd of wakeFds.splice(0)) driver.native.ubd_close(fd);
  };
  try {
    toParams(limits, ioBytesMax);
    for (const [queueId, thread] of threads.entries()) {
      const wakeFd = driver.native.ubd_eventfd(0);
      if (wakeFd < 0) throw UblkError.from(wakeFd, "set up a ring");
      wakeFds.push(wakeFd);
      // The kernel knows no device of this name, so its size is the target's.
      await thread.serve({
        ...driver.config(queueId, depth, ioBytesMax, wakeFd),
        blockName: "none",
      });
    }
  } catch (error) {
    for (const thread of threads) thread.abandon();
    await Promise.allSettled(threads.map((thread) => thread.ended));
    for (const one of targets) one.close();
    release();
    throw error;
  }
  ended().catch((error) => driver.fail(error));

  let stopped: Promise<void> | undefined;
  const stop = () =>
    stopped ??= (async () => {
      for (const thread of threads) thread.stopping();
      driver.stop();
      await ended().finally(release);
      for (const text of driver.lateWrites) tell(text);
      if (driver.lateWrites.length > 0) throw new Error(driver.lateWrites[0]);
    })();

  const { sizeBytes: size, blockBytes: blockSize } = limits;
  const offers = {
    write: !limits.readOnly,
    flush: limits.volatileCache,
    discard: limits.discardBytes > 0,
    writeZeroes: limits.writeZeroes,
  };
  const check = (offset: number, length: number, lengthMax: number) => {
    const aligned = Number.isInteger(offset / blockSize) && Number.isInteger(length / blockSize);
    if (!aligned || offset < 0 || length <= 0 || length > lengthMax || offset + length > size) {
      throw new RangeError(
        `${length} bytes at ${offset}: multiples of ${blockSize}, up to ${lengthMax} bytes, ` +
          `of a device of ${size}`,
      );
    }
  };
  const forceAccess = (fua: boolean | undefined) => fua && offers.flush ? UBLK_IO_F_FUA : 0;
  const none = new Uint8Array();
  const device: TestDevice = {
    size,
    blockSize,
    offers,
    log,
    async read(offset, length) {
      check(offset, length, ioBytesMax);
      const data = new Uint8Array(length);
      await driver.submit(UBLK_IO_OP_READ, 0, offset, length, data);
      return data;
    },
    async write(offset, bytes, { fua } = {}) {
      check(offset, bytes.length, ioBytesMax);
      if (!offers.write) throw new RequestError("EPERM", "WRITE", offset, bytes.length);
      const data = new Uint8Array(bytes);
      await driver.submit(UBLK_IO_OP_WRITE, forceAccess(fua), offset, data.length, data);
    },
    async flush() {
      if (offers.flush) await driver.submit(UBLK_IO_OP_FLUSH, 0, 0, 0, none);
    },
    async discard(offset, length) {
      check(offset, length, size);
      if (!offers.discard) throw new RequestError("EOPNOTSUPP", "DISCARD", offset, length);
      await driver.submit(UBLK_IO_OP_DISCARD, 0, offset, length, none);
    },
    async writeZeroes(offset, length, { fua, mayUnmap = true } = {}) {
      check(offset, length, size);
      if (offers.writeZeroes) {
        const flags = forceAccess(fua) | (mayUnmap ? 0 : UBLK_IO_F_NOUNMAP);
        await driver.submit(UBLK_IO_OP_WRITE_ZEROES, flags, offset, length, none);
        return;
      }
      for (let at = 0; at < length; at += ioBytesMax) {
        const zeroes = new Uint8Array(Math.min(ioBytesMax, length - at));
        await device.write(offset + at, zeroes, { fua: fua ?? false });
      }
    },
    stats: () => sumStats(threads.map((thread) => thread.stats)),
    stop,
    [Symbol.asyncDispose]: stop,
  };
  return device;
}

/** As the device's threads do: an `open` for each queue where there is `share`, else one. */
async function openServed(
  definition: TargetDefinition,
  values: Record<string, unknown>,
  queues: number,
  log: (text: string) => void,
): Promise<ServedTarget[]> {
  const first = await openDefinition(definition, values, undefined, log);
  const all = [first];
  if (!definition.share) return all;
  try {
    refuseQueues(queues, first.description!);
    while (all.length < queues) {
      const shared = structuredClone(first.description!.shared);
      all.push(await openDefinition(definition, values, shared, log));
    }
    return all;
  } catch (error) {
    for (const served of all) await served.close?.();
    throw error;
  }
}
