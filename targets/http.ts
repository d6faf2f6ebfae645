// SPDX-License-Identifier: MIT
/**
 * `http`: an image on a web server, read-only, over range requests.
 *
 * It is fetched in blocks. A block is missing, on its way, in memory (the recent ones), or in the
 * cache file. Whoever needs one that is missing fetches it with the missing ones behind it, as
 * far as they are needed too; whoever needs one on its way waits for it.
 * @module
 */

import {
  type BlockDevice,
  defineTarget,
  type ReadRequest,
  type Target,
} from "../core/define_target.ts";
import { UsageError } from "../core/error.ts";
import { BLOCK_BYTES, CacheFile } from "./http_cache.ts";
import { GaveUp, ImageSource, type Surroundings } from "./http_source.ts";

/** Blocks kept in memory. */
const RECENT_MAX = 256;

/** Blocks of one GET, when nobody reads ahead further. */
const RUN_BLOCKS_MIN = 16;

/** Places where readers are watched that may be sequential. */
const READERS_MAX = 16;

/** Reads served at a time; each holds one GET's blocks at most. */
const READS_MAX = 32;

const SECTOR_BYTES = 512;

/**
 * `ubd add http`, for programs: an image on a web server, read-only. Options: `url`, and if you
 * like `cache` (a file), `readahead` (bytes), `timeout` (seconds) and `etag`.
 *
 * @example
 * ```ts
 * import { createDevice, httpTarget } from "ubd";
 *
 * const options = { url: "https://example.org/disk.img", cache: "/var/tmp/disk.cache" };
 * await using device = await createDevice(httpTarget, { options });
 * console.log(device.path);
 * ```
 */
export const httpTarget: Target<{
  url: { type: "string" };
  cache: { type: "path" };
  readahead: { type: "size" };
  timeout: { type: "number" };
  etag: { type: "string" };
}> = defineTarget({
  options: {
    url: { type: "string", required: true, description: "of the image: https://... or http://..." },
    cache: { type: "path", description: "local sparse file that keeps what was read" },
    readahead: { type: "size", default: "1M", description: "for sequential readers; 0: none" },
    timeout: { type: "number", default: 300, description: "seconds that I/O waits for the server" },
    etag: { type: "string", description: "refuse the image when its ETag is another" },
  },
  open: (options, _shared, log) => openImage(options, log),
});

/** @param around the network and the clock, when they are not the real ones. */
export async function openImage(
  { url, cache, readahead, timeout, etag }: {
    url: string;
    cache: string | undefined;
    readahead: number;
    timeout: number;
    etag: string | undefined;
  },
  log: (text: string) => void,
  around?: Surroundings,
): Promise<BlockDevice> {
  if (!(timeout > 0 && timeout <= 86_400)) {
    throw new UsageError(`Option "timeout" is ${timeout}: say seconds, up to 86400`);
  }
  const source = await ImageSource.open(url, log, around);
  if (etag !== undefined && etag !== source.validator) {
    throw new UsageError(`Option "etag" is ${etag}: the image's is ${source.validator}`);
  }
  const file = cache === undefined ? undefined : await CacheFile.open(cache, source, log);
  return new HttpImage(source, file, readahead, timeout * 1000);
}

class HttpImage implements BlockDevice {
  readonly size: number;
  readonly maxConcurrent = READS_MAX;
  readonly timeoutMs: number;
  readonly #source: ImageSource;
  readonly #cache: CacheFile | undefined;
  readonly #aheadBytes: number;
  readonly #runBlocks: number;
  readonly #patienceMs: number;
  /** Where readers stopped, the latest last. */
  readonly #readers: number[] = [];
  readonly #coming = new Map<number, Promise<Uint8Array>>();
  /** The latest used last. */
  readonly #recent = new Map<number, Uint8Array>();
  readonly #runs = new Set<Promise<void>>();

  constructor(
    source: ImageSource,
    cache: CacheFile | undefined,
    aheadBytes: number,
    patienceMs: number,
  ) {
    this.size = Math.ceil(source.bytes / SECTOR_BYTES) * SECTOR_BYTES;
    this.#source = source;
    this.#cache = cache;
    // What was read ahead must not push itself out of memory.
    this.#aheadBytes = Math.min(aheadBytes, RECENT_MAX / 4 * BLOCK_BYTES);
    this.#runBlocks = Math.max(RUN_BLOCKS_MIN, Math.ceil(this.#aheadBytes / BLOCK_BYTES));
    this.#patienceMs = patienceMs;
    this.timeoutMs = Math.ceil(patienceMs) + 30_000;
  }

  async read({ offset, length, buffer, signal }: ReadRequest): Promise<void> {
    if (signal.aborted) this.#source.stop();
    else signal.addEventListener("abort", this.#source.stop);
    const deadline = this.#source.deadline(this.#patienceMs);
    const end = Math.min(offset + length, this.#source.bytes);
    const wanted = Math.min(end + this.#aheadOf(offset, end), this.#source.bytes);
    for (let at = offset; at < end;) {
      const index = Math.floor(at / BLOCK_BYTES);
      const blockStart = index * BLOCK_BYTES;
      const stop = Math.min(end, blockStart + BLOCK_BYTES);
      const into = buffer.subarray(at - offset, stop - offset);
      const inFile = !this.#recent.has(index) && this.#cache?.has(index);
      if (!inFile || !await this.#cache!.read(at, into)) {
        const block = await this.#block(index, wanted, deadline);
        into.set(block.subarray(at - blockStart, stop - blockStart));
      }
      at = stop;
    }
    this.#fetchAhead(end, wanted, deadline);
  }

  async close(): Promise<void> {
    this.#source.stop();
    await Promise.all(this.#runs);
    await this.#cache?.close();
  }

  /** How much to read ahead of a reader: something, if it goes on where one stopped. */
  #aheadOf(offset: number, end: number): number {
    const known = this.#readers.indexOf(offset);
    if (known >= 0) this.#readers.splice(known, 1);
    if (this.#readers.push(end) > READERS_MAX) this.#readers.shift();
    return known >= 0 ? this.#aheadBytes : 0;
  }

  /** Fetches what is missing, once half of what was read ahead is used up. */
  #fetchAhead(end: number, wanted: number, deadline: number): void {
    const [from, to] = [Math.ceil(end / BLOCK_BYTES), Math.ceil(wanted / BLOCK_BYTES)];
    let index = from;
    while (index < to && !this.#isMissing(index)) index++;
    if (index < to && index - from <= (to - from) / 2) this.#fetch(index, wanted, deadline);
  }

  #isMissing(index: number): boolean {
    return !this.#recent.has(index) && !this.#coming.has(index) && !this.#cache?.has(index);
  }

  async #block(index: number, wanted: number, deadline: number): Promise<Uint8Array> {
    for (;;) {
      const block = this.#recent.get(index);
      if (block) {
        this.#keep(index, block);
        return block;
      }
      const isAnothers = this.#coming.has(index);
      if (!isAnothers) this.#fetch(index, wanted, deadline);
      const coming = this.#coming.get(index)!;
      if (!isAnothers) return await coming;
      try {
        return await this.#source.within(coming, deadline);
      } catch (error) {
        // Who began earlier gives up earlier.
        if (!(error instanceof GaveUp) || this.#source.isOver(deadline)) throw error;
      }
    }
  }

  #keep(index: number, block: Uint8Array): void {
    this.#recent.delete(index);
    this.#recent.set(index, block);
    if (this.#recent.size > RECENT_MAX) this.#recent.delete(this.#recent.keys().next().value!);
  }

  /** Has this block come, and the missing ones behind it up to the byte `wanted`. */
  #fetch(index: number, wanted: number, deadline: number): void {
    const limit = Math.min(index + this.#runBlocks, Math.ceil(wanted / BLOCK_BYTES));
    let stop = index + 1;
    while (stop < limit && this.#isMissing(stop)) stop++;
    const settlers = Array.from({ length: stop - index }, (_, nth) => {
      const settler = Promise.withResolvers<Uint8Array>();
      settler.promise.catch(() => {}); // Nobody may be waiting.
      this.#coming.set(index + nth, settler.promise);
      return settler;
    });

    const start = index * BLOCK_BYTES;
    const end = Math.min(stop * BLOCK_BYTES, this.#source.bytes);
    let next = index;
    let block: Uint8Array | undefined;
    let filled = 0;
    const sink = async (piece: Uint8Array) => {
      for (let at = 0; at < piece.length;) {
        block ??= new Uint8Array(Math.min(BLOCK_BYTES, end - next * BLOCK_BYTES));
        const part = piece.subarray(at, at + block.length - filled);
        block.set(part, filled);
        at += part.length;
        filled += part.length;
        if (filled < block.length) break;
        const [kept, whole] = [next++, block];
        [block, filled] = [undefined, 0];
        this.#keep(kept, whole);
        this.#coming.delete(kept);
        settlers[kept - index]!.resolve(whole);
        await this.#cache?.write(kept, whole);
      }
    };
    const run = this.#source.read(start, end, deadline, sink).catch((error) => {
      for (; next < stop; next++) {
        this.#coming.delete(next);
        settlers[next - index]!.reject(error);
      }
    }).finally(() => this.#runs.delete(run));
    this.#runs.add(run);
  }
}
