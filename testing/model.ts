// SPDX-License-Identifier: MIT
/**
 * A model checker: random requests, many at a time, against a plain buffer that says what each read
 * must return.
 *
 * Requests of a batch run concurrently and do not overlap, so that their order does not matter.
 * What was discarded may read as anything until it is written again.
 * @module
 */

import { UsageError } from "../core/error.ts";
import type { BlockDevice, NoOptions, OptionSpecs, Target } from "../core/define_target.ts";
import { openForTesting, type TestDevice, type TestOptions } from "./device.ts";

/** What is used of the package fast-check: pass its default export. */
export interface FastCheck {
  /** Whole numbers. */
  integer(range: { min: number; max: number }): unknown;
  /** Arrays of something. */
  array(one: unknown, range: { minLength: number; maxLength: number }): unknown;
  /** Several things. */
  tuple(...all: unknown[]): unknown;
  /** A statement about something. */
  // deno-lint-ignore no-explicit-any
  asyncProperty(one: unknown, holds: (value: any) => Promise<void>): unknown;
  /** Tries to refute it. */
  // deno-lint-ignore no-explicit-any
  assert(property: any, parameters: Record<string, unknown>): unknown;
}

/** How `checkAgainstModel` checks. */
export interface ModelOptions<Specs extends OptionSpecs = OptionSpecs> extends TestOptions<Specs> {
  /** The package fast-check, 3 or 4. Default: imported by that name. */
  fc?: FastCheck;
  /** Sequences of requests to try, each on a device of its own. Default: 50. */
  runs?: number;
  /** Repeats the sequences of an earlier check. Default: another one each time. */
  seed?: number;
  /** Where among the run's shrunk variants to begin, as a failure reports it. */
  path?: string;
  /** How many bytes, from the device's beginning, are used. Default: 256 KiB. */
  bytes?: number;
}

/** What `checkAgainstModel` has done. */
export interface ModelReport {
  /** Repeats this check as `ModelOptions.seed`. */
  readonly seed: number;
  /** Requests that were answered as they must be. */
  readonly requests: number;
}

const BATCHES_MAX = 12;
const BATCH_MAX = 16;
const BLOCKS_MAX = 32;
const BYTES_DEFAULT = 256 * 1024;

/** Kind, start, length, byte: as random numbers, which fit any device. */
type Draw = [kind: number, start: number, blocks: number, byte: number];

/**
 * Checks a target against a plain buffer: random reads, writes, zeroes, discards and flushes, up to
 * 16 at a time. What the device holds at first is what it must keep. A target without `write` is
 * checked to read the same each time.
 *
 * @throws {Error} a counterexample, made as short as possible, with its seed.
 * @throws {UsageError} there is no fast-check; what `openForTesting` refuses.
 *
 * @example
 * ```ts
 * import fc from "fast-check";
 * import { defineTarget } from "ubd";
 * import { checkAgainstModel } from "ubd/testing";
 *
 * const disk = new Uint8Array(1024 ** 2);
 * const target = defineTarget({
 *   size: disk.length,
 *   read: ({ offset, length, buffer }) => buffer.set(disk.subarray(offset, offset + length)),
 *   write: ({ offset, buffer }) => disk.set(buffer, offset),
 * });
 * await checkAgainstModel(target, { fc, runs: 20 });
 * ```
 */
export async function checkAgainstModel<Specs extends OptionSpecs = NoOptions>(
  target: Target<Specs> | BlockDevice,
  options: ModelOptions<NoInfer<Specs>> = {},
): Promise<ModelReport> {
  const {
    fc = await importFastCheck(),
    runs = 50,
    seed = Math.floor(Math.random() * 0x7fff_ffff),
    path,
    bytes = BYTES_DEFAULT,
    ...testOptions
  } = options;
  let requests = 0;
  const number = fc.integer({ min: 0, max: 0xffff });
  const draw = fc.tuple(number, number, number, fc.integer({ min: 1, max: 255 }));
  const batch = fc.array(draw, { minLength: 1, maxLength: BATCH_MAX });
  const batches = fc.array(batch, { minLength: 1, maxLength: BATCHES_MAX });
  const property = fc.asyncProperty(batches, async (drawn: Draw[][]) => {
    await using device = await openForTesting(target, testOptions);
    requests += await runAgainstModel(device, drawn, bytes, testOptions.ioBytesMax ?? Infinity);
  });
  await fc.assert(property, {
    seed,
    numRuns: runs,
    ...(path !== undefined && { path }),
  });
  return { seed, requests };
}

async function importFastCheck(): Promise<FastCheck> {
  const name = "fast-check"; // Not a literal: it is no dependency of this package.
  try {
    return (await import(name)).default;
  } catch (error) {
    throw new UsageError(
      "checkAgainstModel needs the package fast-check: install it (npm install -D fast-check), " +
        `or pass it as \`fc\`: ${(error as Error)?.message ?? error}`,
    );
  }
}

/** @returns how many requests there were. */
async function runAgainstModel(
  device: TestDevice,
  batches: Draw[][],
  bytes: number,
  ioBytesMax: number,
): Promise<number> {
  const { blockSize } = device;
  const blocks = Math.max(1, Math.floor(Math.min(bytes, device.size) / blockSize));
  const blocksMax = Math.min(BLOCKS_MAX, Math.floor(ioBytesMax / blockSize));
  const model = new Model(blocks * blockSize);
  const readAll = async (see: (at: number, data: Uint8Array) => void) => {
    for (let at = 0; at < blocks; at += blocksMax) {
      const length = Math.min(blocksMax, blocks - at) * blockSize;
      see(at * blockSize, await device.read(at * blockSize, length));
    }
  };
  await readAll((at, data) => model.write(at, data));
  let requests = 0;
  for (const batch of batches) {
    const taken = new Uint8Array(blocks);
    const ready: (() => Promise<void>)[] = [];
    for (const [kind, start, count, byte] of batch) {
      const first = start % blocks;
      const end = Math.min(blocks, first + 1 + count % blocksMax);
      if (taken.subarray(first, end).includes(1)) continue;
      taken.fill(1, first, end);
      const [at, length] = [first * blockSize, (end - first) * blockSize];
      ready.push(() => request(device, model, kind, at, length, byte));
    }
    await allDone(ready.map((begin) => begin()));
    requests += ready.length;
  }
  await readAll((at, data) => model.compare(at, data));
  return requests;
}

/** Awaits all of them, also when one fails: the device must be free of requests then. */
async function allDone(promises: Promise<void>[]): Promise<void> {
  const outcomes = await Promise.allSettled(promises);
  for (const outcome of outcomes) if (outcome.status === "rejected") throw outcome.reason;
}

/** A request of some kind, and what it does to the model. */
async function request(
  device: TestDevice,
  model: Model,
  kind: number,
  at: number,
  length: number,
  byte: number,
): Promise<void> {
  const { offers } = device;
  const fua = (kind & 0x100) !== 0;
  const choice = kind % 8;
  if (choice < 3 && offers.write) {
    const data = new Uint8Array(length);
    for (let i = 0; i < length; i++) data[i] = byte + (i >> 9) * 7 + i;
    await device.write(at, data, { fua });
    model.write(at, data);
  } else if (choice === 3 && offers.write) {
    await device.writeZeroes(at, length, { fua, mayUnmap: (kind & 0x200) !== 0 });
    model.write(at, new Uint8Array(length));
  } else if (choice === 4 && offers.discard) {
    await device.discard(at, length);
    model.forget(at, length);
  } else if (choice === 5 && offers.flush) {
    await device.flush();
  } else {
    model.compare(at, await device.read(at, length));
  }
}

/** What must be read, as far as it is known. */
class Model {
  readonly #data: Uint8Array;
  readonly #known: Uint8Array;

  constructor(bytes: number) {
    this.#data = new Uint8Array(bytes);
    this.#known = new Uint8Array(bytes);
  }

  write(at: number, data: Uint8Array): void {
    this.#data.set(data, at);
    this.#known.fill(1, at, at + data.length);
  }

  forget(at: number, length: number): void {
    this.#known.fill(0, at, at + length);
  }

  /** @throws what differs first. */
  compare(at: number, data: Uint8Array): void {
    for (let i = 0; i < data.length; i++) {
      const expected = this.#data[at + i]!;
      if (data[i] === expected || !this.#known[at + i]) continue;
      const extent = `in the READ of ${data.length} bytes at ${at}`;
      throw new Error(`byte ${at + i} is ${data[i]}, not ${expected}, ${extent}`);
    }
  }
}
