// SPDX-License-Identifier: MIT
/**
 * What keeps a server from waiting for itself.
 *
 * - Mounts. A process that ends gives up its mount namespace; when it was the last one there, the
 *   kernel unmounts what is mounted there first. If a file system on the device that this process
 *   serves is among that, both wait for ever. So a server lives in a namespace of its own
 *   (`inPrivateMounts`). A built-in target has its files handed over, open, and needs little else: its
 *   namespace is a copy, of which it drops the rest once it is LIVE (`detachMounts`), so that it lives
 *   on when a container ends or an initramfs is left. A target of somebody's own may open files at
 *   any time, and means those of whoever has added it: its namespace is empty, and its root is theirs.
 * - Memory. Looking for free memory, the kernel may write to the device; the server must not be
 *   the one who waits for that: not in a queue's thread, nor in one of the runtime's, for which
 *   the collector of garbage waits (`asFlusher`, `becomeFlusher`, `harden`).
 * @module
 */

import { Buffer } from "node:buffer";
import { readFileSync, readlinkSync, writeFileSync } from "node:fs";
import process from "node:process";
import {
  canLockMemory,
  rerunArguments,
  restfulEnvironment,
  runtime,
  type Shim,
} from "../ffi/mod.ts";
import { pathBytes } from "../ffi/path.ts";
import { UblkError } from "./error.ts";

/** Names this thread's mount namespace; the main thread's children are born in it. */
export function mountNamespace(): string {
  try {
    return readlinkSync("/proc/thread-self/ns/mnt");
  } catch {
    return "";
  }
}

/**
 * Runs `start`, which starts a process, so that the process has a mount namespace of its own. Where
 * that is not permitted, it has the caller's. UBD_DEBUG_SHARED_MOUNTS=1 asks for that.
 *
 * @param copy the namespace has a copy of the caller's mounts, and the process its root there; else
 * it is empty, and the process has the caller's root.
 */
export function inPrivateMounts<T>(shim: Shim, copy: boolean, start: () => T): T {
  const left = new Int32Array(3);
  const shared = process.env.UBD_DEBUG_SHARED_MOUNTS === "1";
  if (shared || shim.native.ubd_leave_mounts(left, copy ? 1 : 0) < 0) return start();
  try {
    return start();
  } finally {
    shim.native.ubd_rejoin_mounts(left);
  }
}

/**
 * Runs `start`, which starts a process, so that all threads of the process are I/O flushers from
 * their birth. Where that is not permitted, they are not.
 */
export function asFlusher<T>(shim: Shim, start: () => T): T {
  const before = shim.native.ubd_io_flusher(1);
  try {
    return start();
  } finally {
    if (before === 0) shim.native.ubd_io_flusher(0);
  }
}

/**
 * For a process that is to serve but was not started with `asFlusher`: starts it anew, in its
 * place, as one that was. Of the descriptors that it inherited only the first three stay, and those
 * in `kept`. Returns where that is not permitted, or was done.
 *
 * @throws {UblkError} its program is no longer where it was.
 */
export function becomeFlusher(shim: Shim, kept: readonly number[] = []): void {
  if (shim.native.ubd_io_flusher(1) !== 0) return;
  const bytes = (text: string) => new TextEncoder().encode(`${text}\0`);
  const own = bytes([process.execPath, ...rerunArguments()].join("\0"));
  const given = readFileSync("/proc/self/cmdline");
  // As bytes: a name of a file may be no text.
  const from = process.argv.slice(2).reduce((at) => given.lastIndexOf(0, at - 2) + 1, given.length);
  const words = Buffer.concat([own, given.subarray(from)]);
  const settings = Object.entries({ ...process.env, ...restfulEnvironment })
    .map(([name, value]) => `${name}=${value}`);
  const environment = bytes(settings.join("\0"));
  const program = bytes(process.execPath);
  const { ubd_close_on_exec, ubd_keep_on_exec, ubd_execute } = shim.native;
  ubd_close_on_exec();
  for (const fd of kept) ubd_keep_on_exec(fd);
  const result = ubd_execute(program, words, words.length, environment, environment.length);
  throw UblkError.from(result, `start ${process.execPath}`);
}

/** Where a running server still opens files: all else it has open, mapped or loaded. */
const NEEDED = ["/dev", "/etc", "/proc", "/run", "/sys", "/usr"];

/** @param callersNamespace what `mountNamespace` said to the process that started this one */
export function hasOwnMounts(callersNamespace: string): boolean {
  const own = mountNamespace();
  return own !== "" && callersNamespace !== "" && own !== callersNamespace;
}

/** Drops the mounts that a built-in target does not need. Only for who `hasOwnMounts`. */
export function detachMounts(shim: Shim): void {
  const keep = [...NEEDED, process.execPath];
  const points = readFileSync("/proc/thread-self/mountinfo", "utf8").trimEnd().split("\n")
    .map((line) => unescapeMount(line.split(" ")[4]!));
  const leads = (point: string, path: string) =>
    point === "/" || `${path}/`.startsWith(`${point}/`);
  for (const point of points.reverse()) {
    if (keep.some((path) => leads(point, path))) continue;
    shim.native.ubd_detach_mount(pathBytes(point));
  }
}

/** mountinfo writes space, tab, newline and backslash as octal. */
export function unescapeMount(path: string): string {
  return path.replaceAll(/\\([0-7]{3})/g, (_, digits) => String.fromCharCode(parseInt(digits, 8)));
}

/**
 * Makes the kernel spare this process when memory is short. What is not permitted is left out.
 *
 * @throws {UblkError} memory cannot be locked, though that was asked for.
 */
export function harden(shim: Shim, { lockMemory }: { lockMemory: boolean }): void {
  process.umask(0o077);
  // As other daemons that serve storage: without this process, nothing can be written back.
  try {
    writeFileSync("/proc/self/oom_score_adj", "-1000");
  } catch { /* lowering it takes CAP_SYS_RESOURCE */ }
  shim.native.ubd_io_flusher(1); // So that threads started from here on inherit it.
  if (!lockMemory) return;
  if (!canLockMemory) {
    const hint = `${runtime} cannot run in locked memory; use the executable or Bun`;
    throw new UblkError({ errno: "EOPNOTSUPP", operation: "lock memory", hint });
  }
  const result = shim.native.ubd_lock_memory();
  if (result < 0) {
    const hint = "raise ulimit -l, run as root, or leave out --mlock";
    throw UblkError.from(result, "lock memory", { hint });
  }
}
