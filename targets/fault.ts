// SPDX-License-Identifier: MIT
/**
 * `fault`: another device that fails as disks do: errors, delays, short transfers, and a volatile
 * write cache that a power cut leaves lost, torn or kept.
 *
 * For testing what is built on a device. A generator of random numbers for each queue, seeded, is
 * asked when a request arrives: the same requests in the same order meet the same faults. Several faults, or
 * several ranges, are one `fault` around another.
 * @module
 */

import { closeSync, fdatasyncSync, fstatSync, openSync, readSync, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { ERRNO } from "../abi/errno.ts";
import {
  type Answer,
  type BlockDevice,
  defineTarget,
  type ReadRequest,
  type Request,
  type Target,
  type WriteRequest,
  type ZeroRequest,
} from "../core/define_target.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { type Memory, memoryDevice, reserve } from "./memory.ts";

/** What a fault may strike. */
export type FaultOperation = "read" | "write" | "flush" | "discard" | "writeZeroes";

const OPERATIONS: readonly FaultOperation[] = ["read", "write", "flush", "discard", "writeZeroes"];

/** What goes wrong. Rates are probabilities from 0 (default: never) to 1 (always). */
export interface FaultOptions {
  /** A whole number: another seed, other faults. Default: 1. */
  seed?: number;
  /** What is struck by errors, delays and short transfers. Default: everything. */
  operations?: readonly FaultOperation[];
  /** The first byte that they strike. A flush has no place: it is struck anywhere. Default: 0. */
  from?: number;
  /** The first byte behind it that they do not. Default: the device's size. */
  to?: number;
  /** How often a request fails, without having done anything. */
  errorRate?: number;
  /** With this errno. Default: "EIO". */
  error?: string;
  /** How often a request waits before it is served; others overtake it. */
  delayRate?: number;
  /** For so long, in milliseconds. Default: 100. */
  delayMs?: number;
  /** How often a read or write of several blocks does only some of them. */
  shortRate?: number;
  /**
   * Writes are volatile until a flush, or their own FUA, as in a disk's cache of 64 MiB: a power
   * cut may lose them. DISCARD and WRITE_ZEROES are not offered then.
   */
  cache?: boolean;
  /** The power is cut in the middle of the so-manieth write, counted from 1. Implies `cache`. */
  cutAfter?: number;
}

/** What `fault` returns. */
export interface FaultyDevice extends BlockDevice {
  /**
   * Cuts the power: of the writes that were not flushed, some reach the wrapped device, some do
   * not, and of some only some blocks do. From now on every request fails with EIO.
   */
  cutPower(): Promise<void>;
}

/** A disk's cache drains by itself, the oldest writes first, when it holds more. */
const CACHE_BYTES_MAX = 64 * 1024 ** 2;

const { signal: never } = new AbortController();

/** An error that a request fails with. */
function failure(code: string, message: string): Error {
  return Object.assign(new Error(message), { code });
}

/** @returns numbers from 0 to 1, the same for the same seed (mulberry32). */
function generator(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ state >>> 15, 1 | state);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  };
}

/** Repeats a call until all bytes are done. @throws {RangeError} a call did nothing, or too much. */
async function transfer(
  call: (request: WriteRequest) => Answer,
  offset: number,
  buffer: Uint8Array<ArrayBuffer>,
): Promise<void> {
  for (let done = 0; done < buffer.length;) {
    const rest = buffer.subarray(done);
    const { length } = rest;
    const request = { offset: offset + done, length, buffer: rest, signal: never, fua: false };
    const now = await call(request) ?? length;
    if (!(Number.isInteger(now) && now > 0 && now <= length)) {
      throw new RangeError(`the device answered ${now}, of ${length} bytes`);
    }
    done += now;
  }
}

interface CachedWrite {
  readonly offset: number;
  readonly data: Uint8Array<ArrayBuffer>;
  /** It was asked for with FUA. */
  readonly durable: boolean;
}

/** A volatile write cache. One request at a time, in the order of their arrival. */
class Cache {
  readonly #device: BlockDevice;
  readonly #blockBytes: number;
  /** Oldest first. */
  readonly #writes: CachedWrite[] = [];
  #bytes = 0;
  #last: Promise<unknown> = Promise.resolve();

  constructor(device: BlockDevice) {
    this.#device = device;
    this.#blockBytes = device.blockSize ?? 512;
  }

  #inTurn(work: () => Promise<void>): Promise<void> {
    const turn = this.#last.then(work);
    this.#last = turn.catch(() => {});
    return turn;
  }

  read({ offset, length, buffer }: ReadRequest): Promise<void> {
    return this.#inTurn(async () => {
      await transfer((request) => this.#device.read(request), offset, buffer);
      for (const write of this.#writes) {
        const from = Math.max(offset, write.offset);
        const to = Math.min(offset + length, write.offset + write.data.length);
        if (from >= to) continue;
        buffer.set(write.data.subarray(from - write.offset, to - write.offset), from - offset);
      }
    });
  }

  write({ offset, buffer, fua }: WriteRequest): Promise<void> {
    return this.#inTurn(async () => {
      const write = { offset, data: buffer.slice(), durable: fua };
      if (fua) {
        await this.#put(write.offset, write.data);
        await this.#sync();
      }
      // One that is durable too: older ones must not cover it when they are written back.
      this.#writes.push(write);
      this.#bytes += write.data.length;
      while (this.#bytes > CACHE_BYTES_MAX) await this.#writeBack();
    });
  }

  flush(): Promise<void> {
    return this.#inTurn(async () => {
      while (this.#writes.length > 0) await this.#writeBack();
      await this.#sync();
    });
  }

  /** The end: decides by `random` what becomes of each write. */
  cut(random: () => number): Promise<void> {
    return this.#inTurn(async () => {
      for (const { offset, data, durable } of this.#writes.splice(0)) {
        const fate = durable ? 1 : random();
        if (fate > 2 / 3) await this.#put(offset, data);
        else if (fate > 1 / 3) await this.#tear(offset, data, random);
      }
      await this.#sync();
    });
  }

  async #tear(offset: number, data: Uint8Array<ArrayBuffer>, random: () => number): Promise<void> {
    for (let at = 0; at < data.length; at += this.#blockBytes) {
      if (random() < 0.5) await this.#put(offset + at, data.subarray(at, at + this.#blockBytes));
    }
  }

  async #writeBack(): Promise<void> {
    const { offset, data } = this.#writes[0]!;
    await this.#put(offset, data);
    this.#writes.shift();
    this.#bytes -= data.length;
  }

  #put(offset: number, data: Uint8Array<ArrayBuffer>): Promise<void> {
    return transfer((request) => this.#device.write!(request), offset, data);
  }

  async #sync(): Promise<void> {
    await this.#device.flush?.({ offset: 0, length: 0, signal: never });
  }
}

/** @throws {UsageError} an option out of range. */
function check(options: FaultOptions, size: number): void {
  const refuse = (name: string, value: unknown, wanted: string) => {
    throw new UsageError(`Option "${name}" is "${value}": say ${wanted}`);
  };
  for (const name of ["errorRate", "delayRate", "shortRate"] as const) {
    const rate = options[name] ?? 0;
    if (!(rate >= 0 && rate <= 1)) refuse(name, rate, "a probability from 0 to 1");
  }
  for (const name of ["seed", "delayMs", "cutAfter"] as const) {
    const value = options[name] ?? 1;
    const least = name === "cutAfter" ? 1 : 0;
    if (!(Number.isSafeInteger(value) && value >= least)) {
      refuse(name, value, `a whole number from ${least} on`);
    }
  }
  const { from = 0, to = size, error = "EIO", operations = [] } = options;
  if (!(from >= 0 && from < to)) refuse("from", from, `a byte before ${to}`);
  if (!Object.hasOwn(ERRNO, error)) refuse("error", error, "an errno such as EIO");
  const unknown = operations.find((operation) => !OPERATIONS.includes(operation));
  if (unknown !== undefined) refuse("operations", unknown, OPERATIONS.join(", "));
}

/**
 * Wraps a device in faults.
 *
 * @throws {UsageError} an option out of range.
 *
 * @example Every hundredth read fails, and what was not flushed may be lost
 * ```ts
 * import { type BlockDevice, fault } from "ubd";
 *
 * const bytes = new Uint8Array(1024 ** 2);
 * const disk: BlockDevice = {
 *   size: bytes.length,
 *   read: ({ offset, length, buffer }) => buffer.set(bytes.subarray(offset, offset + length)),
 *   write: ({ offset, buffer }) => bytes.set(buffer, offset),
 * };
 * const faulty = fault(disk, { operations: ["read"], errorRate: 0.01, cache: true, seed: 7 });
 * await faulty.cutPower();
 * ```
 */
export function fault(device: BlockDevice, options: FaultOptions = {}): FaultyDevice {
  const { size, blockSize = 512 } = device;
  check(options, size);
  const { operations = OPERATIONS, from = 0, to = size, error = "EIO", delayMs = 100 } = options;
  const { errorRate = 0, delayRate = 0, shortRate = 0, cutAfter = 0 } = options;
  const random = generator(options.seed ?? 1);
  const cache = device.write && (options.cache || cutAfter > 0) ? new Cache(device) : undefined;
  let isOff = false;
  let writes = 0;

  const refuseWhenOff = () => {
    if (isOff) throw failure("EIO", "the power is cut");
  };
  const cutPower = async () => {
    if (isOff) return;
    isOff = true;
    await cache?.cut(random);
  };

  /** Decides at once what strikes a request, and then serves it. */
  const struck = async <Kind extends Request>(
    operation: FaultOperation,
    request: Kind,
    serve: (request: Kind) => Answer,
  ): Promise<void | number> => {
    refuseWhenOff(); // Before the lots: how many come after the cut is not the seed's.
    const { offset, length, signal } = request;
    const within = operation === "flush" || offset < to && offset + length > from;
    const hit = (rate: number) =>
      rate > 0 && within && operations.includes(operation) && random() < rate;
    const [waits, fails] = [hit(delayRate), hit(errorRate)];
    const blocks = operation === "read" || operation === "write" ? length / blockSize : 1;
    const part = blocks > 1 && hit(shortRate)
      ? blockSize * (1 + Math.floor(random() * (blocks - 1)))
      : length;
    if (waits) {
      await sleep(delayMs, undefined, { signal }).catch(() => {}); // The device stops.
      refuseWhenOff();
    }
    if (fails) throw failure(error, `${operation} was made to fail`);
    if (part === length) return await serve(request);
    const { buffer, fua } = request as unknown as WriteRequest;
    const shorter = { offset, length: part, signal, fua, buffer: buffer.subarray(0, part) };
    return await serve(shorter as unknown as Kind) ?? part;
  };

  const write = async (request: WriteRequest) => {
    if (!cache) return await device.write!(request);
    if (++writes !== cutAfter) return await cache.write(request);
    // It is never answered, so it is not durable either.
    const { offset, length, buffer, signal } = request;
    const interrupted = cache.write({ offset, length, buffer, signal, fua: false });
    await Promise.all([interrupted, cutPower()]);
    refuseWhenOff();
  };

  return {
    size,
    blockSize,
    ...(device.maxConcurrent !== undefined && { maxConcurrent: device.maxConcurrent }),
    ...(device.timeoutMs !== undefined && { timeoutMs: device.timeoutMs }),
    ...(device.memory && { memory: device.memory }),
    // What is in a cache, other queues' devices would not see.
    ...(cache
      ? { maxQueues: 1 }
      : device.maxQueues !== undefined && { maxQueues: device.maxQueues }),
    handlesFua: cache !== undefined || device.handlesFua === true,
    cutPower,
    read: (request) =>
      struck("read", request, (part) => cache ? cache.read(part) : device.read(part)),
    ...(device.write && { write: (request) => struck("write", request, write) }),
    ...((cache || device.flush) && {
      flush: (request: Request) =>
        struck("flush", request, (whole) => cache ? cache.flush() : device.flush!(whole)),
    }),
    ...(!cache && device.discard && {
      discard: (request: Request) => struck("discard", request, (whole) => device.discard!(whole)),
    }),
    ...(!cache && device.writeZeroes && {
      writeZeroes: (request: ZeroRequest) =>
        struck("writeZeroes", request, (whole) => device.writeZeroes!(whole)),
    }),
    async close() {
      if (!isOff) await cache?.flush();
      await device.close?.();
    },
  };
}

/** A regular file as a device. */
function fileDevice(path: string): BlockDevice {
  let fd: number;
  try {
    fd = openSync(path, "r+");
  } catch (cause) {
    const errno = (cause as NodeJS.ErrnoException).code ?? "EIO";
    throw new UblkError({ errno, operation: `open ${path}`, cause });
  }
  const stat = fstatSync(fd);
  if (!stat.isFile()) {
    closeSync(fd);
    throw new UsageError(`Cannot serve ${path}: it is no regular file`);
  }
  return {
    size: stat.size,
    read: ({ offset, length, buffer }) => readSync(fd, buffer, 0, length, offset),
    write: ({ offset, length, buffer }) => writeSync(fd, buffer, 0, length, offset),
    flush: () => fdatasyncSync(fd),
    close() {
      fdatasyncSync(fd);
      closeSync(fd);
    },
  };
}

const rate = (what: string) => ({
  type: "number" as const,
  default: 0,
  description: `probability from 0 to 1 that ${what}`,
});

/**
 * `ubd add fault`, for programs: a device in memory, or in the `file` given, around which are the
 * faults that the other options say, by the names of {@linkcode FaultOptions}. To wrap a device of
 * your own, call {@linkcode fault}.
 *
 * @example
 * ```ts
 * import { createDevice, faultTarget } from "ubd";
 *
 * const options = { size: "64M", errorRate: 0.01, operations: "write" };
 * await using device = await createDevice(faultTarget, { options });
 * console.log(device.path);
 * ```
 */
export const faultTarget: Target<{
  file: { type: "file" };
  size: { type: "size" };
  seed: { type: "number" };
  operations: { type: "string" };
  from: { type: "size" };
  to: { type: "size" };
  errorRate: { type: "number" };
  error: { type: "string" };
  delayRate: { type: "number" };
  delayMs: { type: "number" };
  shortRate: { type: "number" };
  cache: { type: "boolean" };
  cutAfter: { type: "number" };
}> = defineTarget({
  options: {
    file: { type: "file", description: "what it keeps its data in; without: in memory" },
    size: { type: "size", default: "1G", description: "size of the device in memory" },
    seed: { type: "number", default: 1, description: "another seed, other faults" },
    operations: {
      type: "string",
      default: OPERATIONS.join(","),
      description: "what errors, delays and short transfers strike",
    },
    from: { type: "size", default: 0, description: "where they begin on the device" },
    to: { type: "size", description: "where they end; without: at the device's end" },
    errorRate: rate("a request fails"),
    error: { type: "string", default: "EIO", description: "with this errno" },
    delayRate: rate("a request waits"),
    delayMs: { type: "number", default: 100, description: "for so many milliseconds" },
    shortRate: rate("a read or write does not all"),
    cache: {
      type: "boolean",
      default: false,
      description: "writes may be lost by a power cut until they are flushed",
    },
    cutAfter: { type: "number", description: "the power is cut in the so-manieth write" },
  },
  share: ({ file, size }) => file === undefined ? reserve(size) : undefined,
  open({ file, size, operations, to, cutAfter, ...rest }, memory: Memory | undefined) {
    const device = file === undefined ? memoryDevice(size, 512, memory) : fileDevice(file);
    return fault(device, {
      ...rest,
      operations: operations.split(",") as FaultOperation[],
      ...(to !== undefined && { to }),
      ...(cutAfter !== undefined && { cutAfter }),
    });
  },
});
