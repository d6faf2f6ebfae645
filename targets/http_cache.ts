// SPDX-License-Identifier: MIT
/**
 * A local file with what was read of an image: sparse, each byte where the image has it.
 *
 * Beside it, `PATH.map` says which image that is, which file has it, and which blocks are there, a
 * bit each. Bits are set only after the blocks are on the disk, so that a crash at any moment
 * forgets blocks and never invents them. A data file that is not empty has a whole map, which is
 * renamed to its place. Neither file is ever emptied: one that is something else is refused.
 *
 * What is in the files is believed, so nobody else may have written it: each must be a regular file
 * of this user or of root, that others may not write to, and under its own name, which no link is.
 * Whoever owns the directory can exchange files; the map knows its own by its inode.
 *
 * Several servers may share the files: what they write is the same. Whoever finds nothing in them
 * begins with another map, and leaves the old one to those that still write to it. The data file
 * is locked from the first look until there is something in it, so that only one begins.
 * @module
 */

import { Buffer } from "node:buffer";
import { constants } from "node:fs";
import { type FileHandle, lstat, open, rename, rm } from "node:fs/promises";
import { basename, dirname } from "node:path";
import process from "node:process";
import { setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { UblkError, UsageError } from "../core/error.ts";
import { tryLock, unlock } from "../core/file_identity.ts";
import type { ImageVersion } from "./http_source.ts";

/** What is fetched and kept as one. */
export const BLOCK_BYTES = 64 * 1024;

/** How a map begins, in every version of ubd. */
const TITLE = "ubd http cache ";
const VERSION = 2;

const PAGE_BYTES = 4096;

/** How long blocks may be on their way to the disk. */
const SYNC_MS = 1000;

/** How long another server may take to begin or look at the files. */
const LOCK_DEADLINE_MS = 15_000;
const LOCK_PAUSE_MS = 5;

const { O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW, O_NONBLOCK, O_RDONLY, O_RDWR } = constants;

export class CacheFile {
  readonly #path: string;
  readonly #log: (text: string) => void;
  readonly #data: FileHandle;
  readonly #map: FileHandle;
  readonly #bits: Uint8Array;
  readonly #headerBytes: number;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #syncing: Promise<void> | undefined;
  /** Written, and not known to be on the disk. */
  readonly #pending = new Set<number>();
  /** Nothing more can be written. */
  #isFull = false;
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

  /**
   * @throws {UsageError} the file is of something else, or others may have written it.
   * @throws {UblkError} it cannot be opened.
   */
  static async open(
    path: string,
    version: ImageVersion,
    log: (text: string) => void,
  ): Promise<CacheFile> {
    const files = new CacheFiles(path);
    try {
      const { data, map, bits, headerBytes } = await files.openPair(version);
      return new CacheFile(path, data, map, bits, headerBytes, log);
    } catch (error) {
      await files.undo();
      const { code } = error as NodeJS.ErrnoException;
      if (typeof code !== "string") throw error;
      throw new UblkError({ errno: code, operation: `open the cache ${path}` });
    } finally {
      await files.close();
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

  /** Keeps a block. It is there for `read` once it is on the disk. */
  async write(index: number, block: Uint8Array): Promise<void> {
    if (this.#off || this.#isFull) return;
    try {
      const start = index * BLOCK_BYTES;
      for (let at = 0; at < block.length;) {
        const length = block.length - at;
        at += (await this.#data.write(block, at, length, start + at)).bytesWritten;
      }
    } catch (error) {
      this.#isFull = true;
      this.#log(`cache ${this.#path} takes no more: ${why(error)}`);
      return;
    }
    this.#pending.add(index);
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
    if (this.#off || this.#pending.size === 0) return;
    const written = [...this.#pending];
    await this.#data.datasync();
    const pages = new Set<number>();
    for (const index of written) {
      this.#bits[index >> 3]! |= 1 << (index & 7);
      this.#pending.delete(index);
      pages.add(Math.floor((index >> 3) / PAGE_BYTES));
    }
    for (const page of pages) {
      const at = page * PAGE_BYTES;
      const bits = this.#bits.subarray(at, at + PAGE_BYTES);
      await this.#map.write(bits, 0, bits.length, this.#headerBytes + at);
    }
  }

  #fail(error: unknown): void {
    if (this.#off) return;
    this.#off = true;
    this.#log(`cache ${this.#path} is not used any more: ${why(error)}`);
  }
}

interface Pair {
  data: FileHandle;
  map: FileHandle;
  bits: Uint8Array;
  headerBytes: number;
}

/** The two files while they are opened or made: by one directory, whatever its name means later. */
class CacheFiles {
  readonly #path: string;
  readonly #mapPath: string;
  readonly #opened = new Set<FileHandle>();
  /** By path. */
  readonly #made = new Map<string, FileHandle>();
  #directory: FileHandle | undefined;
  #locked: FileHandle | undefined;

  constructor(path: string) {
    this.#path = path;
    this.#mapPath = `${path}.map`;
  }

  /**
   * The data first: when there is something in it, its map is there, and whole, also after a power
   * cut and while others make the same files.
   */
  async openPair({ url, validator, bytes }: ImageVersion): Promise<Pair> {
    this.#directory = await this.#keep(open(dirname(this.#path), O_RDONLY | O_DIRECTORY));
    const data = await this.#lockData();
    const { size } = await data.stat();
    if (size > 0) this.#made.delete(this.#path); // Another has begun it before the lock.
    const oldMap = await this.#open(this.#mapPath);
    const start = Buffer.alloc(TITLE.length);
    const isEmpty = !oldMap || await readFully(oldMap, start, 0) === 0;
    const isMap = isEmpty || start.toString("latin1") === TITLE;
    if (size > 0 && !oldMap || !isMap) {
      const what = isMap ? this.#path : this.#mapPath;
      throw new UsageError(`${what} exists and is no cache of ubd: name another file`);
    }
    const title = `${TITLE}${VERSION} ${JSON.stringify({ url, validator, bytes })}\n`;
    const header = padded(`${title}inode ${(await data.stat({ bigint: true })).ino}\n`);
    const bits = Buffer.alloc(Math.ceil(bytes / BLOCK_BYTES / 8));
    if (oldMap && size > 0) {
      const content = Buffer.alloc(header.length + bits.length);
      const length = await readFully(oldMap, content, 0);
      const both = `it and ${this.#mapPath}`;
      if (!content.subarray(0, title.length).equals(Buffer.from(title))) {
        throw new UsageError(
          `Cache ${this.#path} is of another image, or of another version of this one: delete ` +
            `${both}, or name another`,
        );
      }
      if (!content.subarray(0, header.length).equals(header)) {
        throw new UsageError(
          `Cache ${this.#path} is not the file that its map is of: delete ${both}`,
        );
      }
      if (length < content.length || size !== bytes) {
        throw new UsageError(`Cache ${this.#path} is damaged: delete ${both}`);
      }
      content.copy(bits, 0, header.length);
      return this.#handOver({ data, map: oldMap, bits, headerBytes: header.length });
    }
    const temporary = `${this.#mapPath}.${process.pid}-${Math.random().toString(36).slice(2)}`;
    const map = (await this.#make(temporary))!; // No other has this name.
    await map.writeFile(Buffer.concat([header, bits]));
    await map.sync();
    await rename(this.#inside(temporary), this.#inside(this.#mapPath));
    this.#made.delete(temporary);
    this.#made.set(this.#mapPath, map);
    await this.#directory.sync().catch(() => {}); // Not every file system can.
    await data.truncate(bytes);
    return this.#handOver({ data, map, bits, headerBytes: header.length });
  }

  /** Removes what was made for nothing. */
  async undo(): Promise<void> {
    for (const [path, file] of this.#made) {
      if (await this.#isThere(path, file)) await rm(this.#inside(path), { force: true });
    }
  }

  async close(): Promise<void> {
    if (this.#locked) unlock(this.#locked.fd);
    for (const file of this.#opened) await file.close();
  }

  /** Found or made, and nobody else's until `close`. */
  async #lockData(): Promise<FileHandle> {
    const deadline = performance.now() + LOCK_DEADLINE_MS;
    const operation = `lock the cache ${this.#path}`;
    for (;;) {
      const file = await this.#open(this.#path) ?? await this.#make(this.#path);
      if (!file) continue; // Made by another meanwhile.
      while (!tryLock(file.fd, operation)) {
        if (performance.now() > deadline) {
          this.#made.delete(this.#path);
          const hint = "another process holds its lock: name another file";
          throw new UblkError({ errno: "EBUSY", operation, hint });
        }
        await sleep(LOCK_PAUSE_MS);
      }
      // Whoever had the lock may have failed, and removed it.
      if (await this.#isThere(this.#path, file)) return this.#locked = file;
      this.#made.delete(this.#path);
      this.#opened.delete(file);
      await file.close();
    }
  }

  #handOver(pair: Pair): Pair {
    this.#opened.delete(pair.data);
    this.#opened.delete(pair.map);
    return pair;
  }

  async #keep(opening: Promise<FileHandle>): Promise<FileHandle> {
    const file = await opening;
    this.#opened.add(file);
    return file;
  }

  /** Whether a name still means this file. */
  async #isThere(path: string, file: FileHandle): Promise<boolean> {
    const there = await lstat(this.#inside(path)).catch(() => undefined);
    return there?.ino === (await file.stat()).ino;
  }

  #inside(path: string): string {
    return `/proc/self/fd/${this.#directory!.fd}/${basename(path)}`;
  }

  /** @returns undefined: there is none. @throws {UsageError} it is not to be believed. */
  async #open(path: string): Promise<FileHandle | undefined> {
    const refuse = (why: string) =>
      new UsageError(`${path} is not used as a cache: ${why}: name another file`);
    let file: FileHandle;
    try {
      file = await this.#keep(open(this.#inside(path), O_RDWR | O_NOFOLLOW | O_NONBLOCK));
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "ENOENT") return undefined;
      if (code === "ELOOP") throw refuse("it is a symbolic link");
      if (code === "ENXIO") throw refuse("it is no regular file");
      throw error;
    }
    const stat = await file.stat();
    if (!stat.isFile()) throw refuse("it is no regular file");
    if (![0, process.getuid!()].includes(stat.uid)) throw refuse(`user ${stat.uid} owns it`);
    if (stat.mode & 0o022) throw refuse("others may write to it, see chmod");
    return file;
  }

  /** @returns undefined: there is one. */
  async #make(path: string): Promise<FileHandle | undefined> {
    const flags = O_RDWR | O_NOFOLLOW | O_CREAT | O_EXCL;
    try {
      // The image may be for this user only.
      const file = await this.#keep(open(this.#inside(path), flags, 0o600));
      this.#made.set(path, file);
      return file;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EEXIST") return undefined;
      throw error;
    }
  }
}

function padded(text: string): Buffer {
  const bytes = Buffer.from(text);
  return Buffer.concat([bytes], Math.ceil(bytes.length / PAGE_BYTES) * PAGE_BYTES);
}

function why(error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException;
  return code ?? message;
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
