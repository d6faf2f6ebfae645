// SPDX-License-Identifier: MIT
/** The http target's cache file: what it keeps, what it believes, and what spoils it. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import {
  chmodSync,
  chownSync,
  closeSync,
  copyFileSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { BlockDevice } from "../../core/define_target.ts";
import { UblkError, UsageError } from "../../core/error.ts";
import { tryLock } from "../../core/file_identity.ts";
import { openImage } from "../../targets/http.ts";
import { CacheFile } from "../../targets/http_cache.ts";
import { goodAnswer, type PlayedImage, PlayedWeb } from "../fuzz/played_web.ts";

const BLOCK = 64 * 1024;
const SIZE = 32 * BLOCK + 100;
const URL = "https://host/disk.img";

interface Scene {
  directory: string;
  cache: string;
  map: string;
  image: PlayedImage;
  web: PlayedWeb;
  log: string[];
  open(url?: string): Promise<BlockDevice>;
  /** Reads, and checks each byte. */
  reads(device: BlockDevice, offset: number, length: number): Promise<void>;
  /** A whole life of a device which reads that much of the beginning. */
  served(length: number): Promise<void>;
  [Symbol.dispose](): void;
}

function scene(): Scene {
  const directory = mkdtempSync(join(tmpdir(), "ubd-http-"));
  const cache = join(directory, "cache.img");
  const image: PlayedImage = { bytes: new Uint8Array(randomBytes(SIZE)), etag: '"one"' };
  const log: string[] = [];
  const web = new PlayedWeb((asked) => goodAnswer(image, asked));
  const { signal } = new AbortController();
  const all: Scene = {
    ...{ directory, cache, map: `${cache}.map`, image, web, log },
    open: (url = URL) =>
      openImage(
        { url, cache, readahead: 0, timeout: 9, etag: undefined },
        (text) => log.push(text),
        web,
      ),
    async reads(device, offset, length) {
      const buffer = new Uint8Array(length);
      await device.read({ offset, length, buffer, signal });
      assert.ok(Buffer.from(image.bytes).subarray(offset, offset + length).equals(buffer));
    },
    async served(length) {
      const device = await all.open();
      await all.reads(device, 0, length);
      await device.close!();
      web.asked.length = 0;
    },
    [Symbol.dispose]: () => rmSync(directory, { recursive: true }),
  };
  return all;
}

/** GETs for data so far. */
const gets = ({ web }: Scene) => web.asked.filter(({ end }) => end > 1).length;

test("http: a cache file is the image where it was read, and asks no server again", async () => {
  using all = scene();
  let device = await all.open();
  await all.reads(device, 16 * BLOCK, 4096);
  await device.close!();
  const expected = Buffer.alloc(SIZE);
  expected.set(all.image.bytes.subarray(16 * BLOCK, 17 * BLOCK), 16 * BLOCK);
  assert.ok(readFileSync(all.cache).equals(expected));
  all.web.asked.length = 0;

  device = await all.open();
  await all.reads(device, 16 * BLOCK, 4096);
  assert.strictEqual(gets(all), 0);
  await all.reads(device, 0, SIZE);
  await device.close!();
  assert.ok(readFileSync(all.cache).equals(Buffer.from(all.image.bytes)));
  all.web.asked.length = 0;

  device = await all.open("https://us:er@host/disk.img");
  const tail = new Uint8Array(512);
  const { signal } = new AbortController();
  await device.read({ offset: 32 * BLOCK, length: 512, buffer: tail, signal });
  const end = Buffer.concat([all.image.bytes.subarray(32 * BLOCK), Buffer.alloc(412)]);
  assert.ok(end.equals(tail));
  await device.close!();
  assert.strictEqual(gets(all), 0, "a password does not make it another image");
  for (const file of [all.cache, all.map]) {
    assert.strictEqual(statSync(file).mode & 0o777, 0o600, "as private as the image may be");
    assert.ok(!readFileSync(file, "latin1").includes("us:er"));
  }
});

/** Refused with a message, and nothing is changed, made or left open. */
async function refused(all: Scene, text: RegExp, url = URL): Promise<void> {
  const facts = () =>
    readdirSync(all.directory).sort().map((name) => {
      const path = join(all.directory, name);
      const { ino, mode, uid, size } = lstatSync(path);
      const content = lstatSync(path).isFile() ? readFileSync(path, "hex") : "";
      return [name, ino, mode, uid, size, content];
    });
  const before = facts();
  const opened = () =>
    readdirSync("/proc/self/fd").filter((fd) => {
      try {
        return statSync(`/proc/self/fd/${fd}`).ino === statSync(all.directory).ino;
      } catch {
        return false;
      }
    }).length;
  const isIt = (error: unknown) => {
    assert.ok(error instanceof UsageError, `${error}`);
    assert.match(error.message, text);
    return true;
  };
  await assert.rejects(all.open(url), isIt);
  assert.deepStrictEqual(facts(), before);
  assert.strictEqual(opened(), 0);
}

test("http: a cache of something else is refused and left alone", async () => {
  using all = scene();
  const { cache, map, image } = all;
  writeFileSync(cache, "precious");
  await refused(all, /cache.img exists and is no cache of ubd/);
  rmSync(cache);
  writeFileSync(map, "precious, and longer than a title");
  await refused(all, /cache.img.map exists and is no cache of ubd/);
  rmSync(map);
  await all.served(16 * BLOCK);
  await refused(all, /is of another image/, "https://host/other.img");
  image.etag = '"two"';
  await refused(all, /another version of this one: delete/);
  image.etag = '"one"';
  image.bytes = image.bytes.slice(0, -1);
  await refused(all, /another version of this one: delete/);
  all.cache = join(all.directory, "no/cache");
  const missing = join(all.directory, "no/cache");
  const version = { url: URL, validator: '"one"', bytes: SIZE };
  await assert.rejects(CacheFile.open(missing, version, () => {}), (error) => {
    assert.ok(error instanceof UblkError && error.errno === "ENOENT");
    return /open the cache/.test(error.message);
  });
});

test("http: a cache is believed only from this user or root, and never through a link", async () => {
  using all = scene();
  const { cache, map, directory } = all;
  await all.served(16 * BLOCK);
  for (const file of [cache, map]) {
    for (const mode of [0o620, 0o602, 0o666]) {
      chmodSync(file, mode);
      await refused(all, /is not used as a cache: others may write to it/);
    }
    chmodSync(file, 0o644);
    const moved = join(directory, "moved");
    renameSync(file, moved);
    symlinkSync(moved, file);
    await refused(all, /is not used as a cache: it is a symbolic link/);
    rmSync(file);
    symlinkSync(join(directory, "nowhere"), file);
    await refused(all, /it is a symbolic link/);
    rmSync(file);
    mkdirSync(file);
    await assert.rejects(all.open(), { errno: "EISDIR" });
    rmSync(file, { recursive: true });
    if (spawnSync("mkfifo", ["-m", "600", file]).status === 0) {
      await refused(all, /it is no regular file/);
      rmSync(file);
    }
    renameSync(moved, file);
    if (process.getuid!() === 0) {
      chownSync(file, 1234, 0);
      await refused(all, /user 1234 owns it/);
      chownSync(file, 0, 0);
    }
  }
  all.web.asked.length = 0;
  const device = await all.open();
  await all.reads(device, 0, 16 * BLOCK);
  await device.close!();
  assert.strictEqual(gets(all), 0);
});

test("http: a file that was put in the cache's place is not believed", async () => {
  using all = scene();
  const { cache, directory } = all;
  await all.served(16 * BLOCK);
  const other = join(directory, "other");
  writeFileSync(other, randomBytes(SIZE), { mode: 0o600 });
  renameSync(other, cache);
  await refused(all, /is not the file that its map is of: delete it and .*cache.img.map/);
});

test("http: a damaged cache is refused, one that was only begun is begun anew", async () => {
  using all = scene();
  const { cache, map } = all;
  await all.served(16 * BLOCK);
  const saved = readFileSync(map);
  truncateSync(map, saved.length - 1);
  await refused(all, /is damaged/);
  truncateSync(map, 100);
  await refused(all, /delete/);
  writeFileSync(map, saved);
  truncateSync(cache, 4096);
  await refused(all, /is damaged/);

  // As a power cut leaves it at any step of the beginning.
  const steps: (() => void)[] = [
    () => rmSync(cache),
    () => {
      rmSync(cache);
      truncateSync(map, 0);
    },
    () => {
      truncateSync(cache, 0);
      truncateSync(map, 5000);
    },
    () => truncateSync(cache, 0),
    () => {
      truncateSync(cache, 0);
      rmSync(map);
    },
  ];
  for (const [nth, step] of steps.entries()) {
    step();
    all.web.asked.length = 0;
    const device = await all.open();
    await all.reads(device, 0, 4096);
    assert.strictEqual(gets(all), 1, `step ${nth}: nothing is believed`);
    await device.close!();
    assert.strictEqual(statSync(cache).size, SIZE);
  }
});

/** Blocks that the map names, each of which must be in the file. */
function known({ map, cache, image }: Scene): number {
  const bits = readFileSync(map).subarray(4096);
  const data = readFileSync(cache);
  let count = 0;
  for (let index = 0; index * BLOCK < SIZE; index++) {
    if (!(bits[index >> 3]! & 1 << (index & 7))) continue;
    count++;
    const [start, end] = [index * BLOCK, Math.min(SIZE, (index + 1) * BLOCK)];
    assert.ok(data.subarray(start, end).equals(image.bytes.subarray(start, end)), `${index}`);
  }
  return count;
}

test("http: a crash forgets blocks of the cache and invents none", async () => {
  using all = scene();
  const device = await all.open();
  await Promise.all(Array.from({ length: 33 }, async (_, nth) => {
    await all.reads(device, nth * BLOCK, 100);
    known(all);
  }));
  for (let tries = 0; known(all) < 33 && tries < 400; tries++) await sleep(50);
  assert.strictEqual(known(all), 33);
  await device.close!();
});

test("http: who deletes the cache of a device leaves the next one none that lies", async () => {
  using all = scene();
  const old = await all.open();
  await all.reads(old, 0, 4096);
  rmSync(all.cache);
  const device = await all.open();
  await all.reads(device, BLOCK, 4096);
  await old.close!();
  await device.close!();
  assert.strictEqual(known(all), 1);
});

test("http: several devices make and use one cache at the same time", async () => {
  using all = scene();
  for (let round = 0; round < 8; round++) {
    const devices = await Promise.all(Array.from({ length: 4 }, () => all.open()));
    await Promise.all(devices.map((device, nth) => all.reads(device, nth * 4 * BLOCK, 4 * BLOCK)));
    for (const device of devices) await device.close!();
    assert.ok(known(all) >= 4);
    await all.served(SIZE);
    assert.ok(existsSync(all.map));
    assert.strictEqual(known(all), 33);
    if (round % 2) { for (const file of [all.cache, all.map]) rmSync(file); }
    else rmSync(all.cache);
  }
});

test("http: of several images that begin one cache at once, one has it", async () => {
  using all = scene();
  const urls = ["one", "two", "three", "four"].map((name) => `https://host/${name}.img`);
  for (let round = 0; round < 20; round++) {
    const version = (url: string) => ({ url, validator: '"one"', bytes: SIZE });
    const openings = [...urls, ...urls].map((url) =>
      CacheFile.open(all.cache, version(url), () => {}).then((file) => ({ url, file }))
    );
    const settled = await Promise.allSettled(openings);
    const had = settled.filter((one) => one.status === "fulfilled").map(({ value }) => value);
    const refusals = settled.filter((one) => one.status === "rejected");
    assert.strictEqual(had.length, 2, "both devices of one image");
    assert.strictEqual(had[0]!.url, had[1]!.url);
    for (const { reason } of refusals) {
      assert.ok(reason instanceof UsageError, `${reason}`);
      assert.match(reason.message, /is of another image/);
    }
    assert.deepStrictEqual(readdirSync(all.directory).sort(), ["cache.img", "cache.img.map"]);
    const { url, file } = had[0]!;
    assert.ok(readFileSync(all.map, "latin1").includes(url));
    await file.close();
    await had[1]!.file.close();
    if (round % 2) truncateSync(all.cache, 0);
    else for (const path of [all.cache, all.map]) rmSync(path);
  }
});

test("http: who locked the cache, and removes it or goes on, is waited for", async () => {
  using all = scene();
  await all.served(BLOCK);
  const old = openSync(all.cache, "r+");
  assert.ok(tryLock(old, "lock the cache"));
  let device: BlockDevice | undefined;
  const opening = all.open().then((opened) => device = opened);
  await sleep(100);
  assert.strictEqual(device, undefined, "it waits");
  rmSync(all.cache);
  closeSync(old);
  device = await opening;
  const free = openSync(all.cache, "r+");
  assert.ok(tryLock(free, "lock the cache"), "nobody has the lock of a cache in use");
  closeSync(free);
  await all.reads(device, 0, 4096);
  await device.close!();
  assert.strictEqual(statSync(all.cache).size, SIZE);
  assert.strictEqual(known(all), 1);
});

test("http: a copy of both files is another cache's", async () => {
  using all = scene();
  await all.served(4 * BLOCK);
  const copy = join(all.directory, "copy.img");
  copyFileSync(all.cache, copy);
  linkSync(all.map, `${copy}.map`);
  const version = { url: URL, validator: '"one"', bytes: SIZE };
  await assert.rejects(CacheFile.open(copy, version, () => {}), /not the file that its map is of/);
});

test("http goes on without a cache that fails", async () => {
  using all = scene();
  await all.served(16 * BLOCK);
  const device = await all.open();
  truncateSync(all.cache, 4096);
  await all.reads(device, 8 * BLOCK, 4096);
  assert.match(all.log.join(), /cache .* is not used any more/);
  await device.close!();
});

test("http: what the cache's map says was on the disk before", async () => {
  using all = scene();
  const version = { url: URL, validator: '"one"', bytes: SIZE };
  // Whatever opens a FileHandle: its class is nowhere to be had.
  const any = await open(all.directory);
  const methods = Object.getPrototypeOf(any) as Record<string, (...args: unknown[]) => unknown>;
  await any.close();
  const done: string[] = [];
  const names = ["sync", "datasync", "truncate", "write"] as const;
  const originals = names.map((name) => [name, methods[name]!] as const);
  for (const [name, original] of originals) {
    methods[name] = function (this: FileHandle, ...args) {
      const file = basename(readlinkSync(`/proc/self/fd/${this.fd}`));
      done.push(`${name} ${/map/.test(file) ? "map" : basename(file)}`);
      return original.apply(this, args);
    };
  }
  try {
    const cache = await CacheFile.open(all.cache, version, () => {});
    const made = done.filter((step) => /^(sync map|truncate cache.img)$/.test(step));
    assert.deepStrictEqual(made, ["sync map", "truncate cache.img"]);
    done.length = 0;
    await cache.write(3, all.image.bytes.subarray(3 * BLOCK, 4 * BLOCK));
    assert.ok(!cache.has(3), "it may not be there after a write-back error");
    await cache.close();
    assert.ok(cache.has(3));
    assert.deepStrictEqual(done, ["write cache.img", "datasync cache.img", "write map"]);
  } finally {
    for (const [name, original] of originals) methods[name] = original;
  }
});

const noFull = process.getuid!() !== 0 && "needs root";

test("http: a cache on a full disk is read from, and keeps no more", { skip: noFull }, async () => {
  using all = scene();
  const disk = join(all.directory, "disk");
  mkdirSync(disk);
  const mounted = spawnSync("mount", ["-t", "tmpfs", "-o", "size=512k", "none", disk]).status;
  if (mounted !== 0) return; // A container that may not mount.
  const path = join(disk, "cache.img");
  const version = { url: URL, validator: '"one"', bytes: SIZE };
  const log: string[] = [];
  const block = all.image.bytes.slice(0, BLOCK);
  const cache = await CacheFile.open(path, version, (text) => log.push(text));
  try {
    await cache.write(0, block);
    for (let tries = 0; !cache.has(0) && tries < 400; tries++) await sleep(50);
    for (let index = 1; index < 24; index++) await cache.write(index, block);
    assert.match(log.join(), /^cache .* takes no more: .*ENOSPC$/);
    const found = new Uint8Array(BLOCK);
    assert.ok(cache.has(0) && await cache.read(0, found));
    assert.deepStrictEqual(found, block);
    assert.ok(!cache.has(20));
  } finally {
    await cache.close();
    spawnSync("umount", [disk]);
  }
});
