// SPDX-License-Identifier: MIT
/**
 * A local file with what was read of an image: sparse, each byte where the image has it.
 *
 * Beside it, `PATH.map` says which image that is, and which blocks are there, a bit each. Other
 * bits go to the map only after the blocks are on the disk, so that a crash at any moment forgets
 * blocks and never invents them. Both files are made exclusively, the map first, and never emptied:
 * a file that is something else is refused.
 *
 * Several servers may share the files: what they write is the same.
 * @module
 */

import { Buffer } from "node:buffer";
import { type FileHandle, open, rm } from "node:fs/promises";
import { setTimeout } from "node:timers";
import { UblkError, UsageError } from "../core/error.ts";
import type { ImageVersion } from "./http_source.ts";

/** What is fetched and kept as one. */
export const BLOCK_BYTES = 64 * 1024;

/** How a map begins. */
const TITLE = "ubd http cache 1 ";

const PAGE_BYTES = 4096;

/** How long blocks may be on their way to the disk. */
const SYNC_MS = 1000;

export class CacheFile {
  readonly #path: string;
  readonly #log: (text: string) => void;
  readonly #data: FileHandle;
  readonly #map: FileHandle;
  readonly #bits: Uint8Array;
  readonly #headerBytes: number;
  /** Pages of the map to be written. */
  readonly #dirty = new Set<number>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #syncing: Promise<void> | undefined;
  /** It failed: nothing in it is trusted any more. */
  #off = false;

  private constructor(
    path: string,
    data: FileHandle,
    map: FileHandle,
    bits: Uint8Array,
    headerBytes: number,
    log: (text: string) => void,
  ) {
    this.#path = path;
    this.#headerBytes = headerBytes;
    this.#data = data;
    this.#map = map;
    this.#bits = bits;
    this.#log = log;
  }

  /** @throws {UsageError} the file is of something else. @throws {UblkError} it cannot be opened. */
  static async open(
    path: string,
    { url, validator, bytes }: ImageVersion,
    log: (text: string) => void,
  ): Promise<CacheFile> {
    const title = Buffer.from(`${TITLE}${JSON.stringify({ url, validator, bytes })}\n`);
    const header = Buffer.alloc(Math.ceil(title.length / PAGE_BYTES) * PAGE_BYTES);
    title.copy(header);
    const bits = Buffer.alloc(Math.ceil(bytes / BLOCK_BYTES / 8));
    const mapPath = `${path}.map`;
    const handles: FileHandle[] = [];
    const made: string[] = [];
    const tryOpen = async (name: string, flags: "r+" | "wx+") => {
      try {
        const handle = await open(name, flags);
        handles.push(handle);
        if (flags === "wx+") made.push(name);
        return handle;
      } catch (error) {
        if (flags === "r+" && (error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
        throw error;
      }
    };
    try {
      let map = await tryOpen(mapPath, "r+");
      let data = await tryOpen(path, "r+");
      const found = Buffer.alloc(header.length + bits.length);
      const length = map ? await readFully(map, found, 0) : 0;
      const isMap = length === 0 || found.toString("utf8", 0, TITLE.length) === TITLE;
      if (data && !map || !isMap) {
        const what = isMap ? path : mapPath;
        throw new UsageError(`${what} exists and is no cache of ubd: name another file`);
      }
      if (data) {
        if (!found.subarray(0, header.length).equals(header)) {
          throw new UsageError(
            `Cache ${path} is of another image, or of another version of this one: ` +
              `delete it and ${mapPath}, or name another`,
          );
        }
        if (length < found.length || (await data.stat()).size !== bytes) {
          throw new UsageError(`Cache ${path} is damaged: delete it and ${mapPath}`);
        }
        found.copy(bits, 0, header.length);
      } else {
        await map?.close();
        await rm(mapPath, { force: true });
        map = (await tryOpen(mapPath, "wx+"))!;
        await map.writeFile(Buffer.concat([header, bits]));
        data = (await tryOpen(path, "wx+"))!;
        await data.truncate(bytes);
      }
      return new CacheFile(path, data, map!, bits, header.length, log);
    } catch (error) {
      for (const handle of handles) await handle.close();
      for (const name of made) await rm(name, { force: true });
      const { code } = error as NodeJS.ErrnoException;
      if (typeof code !== "string") throw error;
      throw new UblkError({ errno: code, operation: `open the cache ${path}` });
    }
  }

  has(index: number): boolean {
    return !this.#off && (this.#bits[index >> 3]! & 1 << (index & 7)) !== 0;
  }

  /** Reads a part of a block that is there. @returns false: it cannot be read. */
  async read(start: number, into: Uint8Array): Promise<boolean> {
    try {
      if (await readFully(this.#data, into, start) === into.length) return true;
      throw new Error("it was cut short");
    } catch (error) {
      this.#fail(error);
      return false;
    }
  }

  /** Keeps a block. */
  async write(index: number, block: Uint8Array): Promise<void> {
    if (this.#off) return;
    try {
      const start = index * BLOCK_BYTES;
      for (let at = 0; at < block.length;) {
        const length = block.length - at;
        at += (await this.#data.write(block, at, length, start + at)).bytesWritten;
      }
    } catch (error) {
      return this.#fail(error);
    }
    this.#bits[index >> 3]! |= 1 << (index & 7);
    this.#dirty.add(Math.floor((index >> 3) / PAGE_BYTES));
    this.#timer ??= setTimeout(() => void this.#sync(), SYNC_MS).unref();
  }

  async close(): Promise<void> {
    await this.#sync();
    await this.#data.close();
    await this.#map.close();
  }

  /** Makes blocks durable, then their bits. One at a time, so that no older page follows. */
  async #sync(): Promise<void> {
    this.#timer = undefined;
    await this.#syncing;
    this.#syncing = this.#syncNow().catch((error) => this.#fail(error));
    await this.#syncing;
  }

  async #syncNow(): Promise<void> {
    if (this.#off) return;
    const pages = [...this.#dirty].map((page) => {
      const at = page * PAGE_BYTES;
      return { at, bits: this.#bits.slice(at, at + PAGE_BYTES) };
    });
    this.#dirty.clear();
    if (pages.length === 0) return;
    await this.#data.datasync();
    for (const { at, bits } of pages) {
      await this.#map.write(bits, 0, bits.length, this.#headerBytes + at);
    }
  }

  #fail(error: unknown): void {
    if (this.#off) return;
    this.#off = true;
    this.#log(`cache ${this.#path} is not used any more: ${(error as Error).message}`);
  }
}

/** @returns how many bytes there are. */
async function readFully(file: FileHandle, into: Uint8Array, start: number): Promise<number> {
  let at = 0;
  while (at < into.length) {
    const { bytesRead } = await file.read(into, at, into.length - at, start + at);
    if (bytesRead === 0) break;
    at += bytesRead;
  }
  return at;
}
