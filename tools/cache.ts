// SPDX-License-Identifier: MIT
/**
 * The tools' cache: things that are slow to build, kept outside the checkout.
 *
 * Called by debian.ts and the guest's images. Every entry is `<name>-<hash of its key>`, a file or
 * a directory. Invariants:
 * - an entry that exists is complete: it is built under another name and renamed;
 * - one process builds an entry while others wait for it;
 * - a name has one generation: building a new one removes the old.
 */
import { createHash } from "node:crypto";
import {
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";

/** The cache directory: `$UBD_CACHE`, else `ubd` in the user's cache directory. Made if absent. */
export function cacheDir(): string {
  const { UBD_CACHE, XDG_CACHE_HOME } = process.env;
  const directory = UBD_CACHE || join(XDG_CACHE_HOME || join(homedir(), ".cache"), "ubd");
  mkdirSync(directory, { recursive: true });
  return directory;
}

/**
 * The path of the cache entry `name` for `key`, built by `make` when it is missing.
 *
 * @param name file name friendly; one generation of it is kept
 * @param key everything the content depends on
 * @param make builds a file or directory at the path it is given
 */
export async function cached(
  name: string,
  key: string,
  make: (path: string) => void | Promise<void>,
): Promise<string> {
  const hash = createHash("sha256").update(key).digest("hex").slice(0, 12);
  const path = join(cacheDir(), `${name}-${hash}`);
  if (existsSync(path)) return path;
  return await withLock(name, async () => {
    if (existsSync(path)) return path;
    const startMs = Date.now();
    const unfinished = join(cacheDir(), `.${name}-unfinished`);
    rmSync(unfinished, { recursive: true, force: true });
    process.stderr.write(`ubd: building ${name} ...\n`);
    try {
      await make(unfinished);
      removeGenerations(name);
      renameSync(unfinished, path);
    } catch (error) {
      rmSync(unfinished, { recursive: true, force: true });
      throw error;
    }
    const seconds = ((Date.now() - startMs) / 1000).toFixed(1);
    process.stderr.write(`ubd: built ${name} in ${seconds} s\n`);
    return path;
  });
}

function removeGenerations(name: string): void {
  for (const entry of readdirSync(cacheDir())) {
    if (!entry.startsWith(`${name}-`) || !/^[0-9a-f]{12}$/.test(entry.slice(name.length + 1))) {
      continue;
    }
    rmSync(join(cacheDir(), entry), { recursive: true, force: true });
  }
}

/** Runs `action` while no other process (nor another call in this one) holds the lock `name`. */
export async function withLock<T>(name: string, action: () => T | Promise<T>): Promise<T> {
  const lock = join(cacheDir(), `.${name}.lock`);
  while (!tryLock(lock)) await sleep(100);
  try {
    return await action();
  } finally {
    rmSync(lock, { force: true });
  }
}

function tryLock(lock: string): boolean {
  const mine = `${lock}-${process.pid}`;
  writeFileSync(mine, processIdentity(process.pid));
  try {
    // A link appears together with its content, so a lock without an owner is never seen.
    linkSync(mine, lock);
    return true;
  } catch {
    const owner = readIfExists(lock);
    if (owner && !processLives(owner)) rmSync(lock, { force: true });
    return false;
  } finally {
    rmSync(mine, { force: true });
  }
}

/** `<pid>-<start time>`: names a process beyond the reuse of its pid. Empty when it is gone. */
export function processIdentity(pid: number): string {
  // The command name, in parentheses, may itself hold spaces; start time is field 22.
  const fields = readIfExists(`/proc/${pid}/stat`).split(") ").pop()?.split(" ") ?? [];
  return fields[19] ? `${pid}-${fields[19]}` : "";
}

/** Whether the process that {@link processIdentity} named `identity` still exists. */
export function processLives(identity: string): boolean {
  return processIdentity(Number.parseInt(identity)) === identity;
}

function readIfExists(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}
