// SPDX-License-Identifier: MIT
/**
 * The log of a device: ID.log beside its state file, mode 0600. It is standard output and error of
 * the server in the background, so all is in it that server, runtime or module print, a crash's
 * last words too. `ubd log` shows it.
 *
 * Whoever starts a server opens the file. It has a name of its own until the device is LIVE, since
 * the id may be another's before; a server that takes a device over goes on with the device's. The
 * file stays when the server ends by a failure, and goes with the device that somebody deletes.
 *
 * It is bounded: what is older than its last LOG_BYTES_KEPT is punched out of it. So nobody ever
 * waits for a reader, every writer may go on, and a crowd of writers loses nothing new.
 * @module
 */

import {
  chmodSync,
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  readlinkSync,
  readSync,
  renameSync,
  rmSync,
  truncateSync,
  watch,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import process from "node:process";
import { setInterval } from "node:timers";
import { UblkError } from "../core/error.ts";
import {
  hasStateDirectory,
  makeStateDirectory,
  removeStateName,
  stateDirectory,
} from "../core/state.ts";
import type { Shim } from "../ffi/mod.ts";

/** The last bytes of a log that are kept, and shown. */
export const LOG_BYTES_KEPT = 256 * 1024;
/** A log that has grown by so much since it was last cut is cut again. */
const LOG_BYTES_SLACK = 256 * 1024;

/** Standard error of a server in the background. */
export const LOG_FD = 2;

const PUNCH_HOLE = 0x01 | 0x02; // FALLOC_FL_KEEP_SIZE with it.

export function logPath(id: number): string {
  return join(stateDirectory(), `${id}.log`);
}

/** Before there is a device: `gc` removes it once the process that made it is gone. */
function namelessPath(pid: number): string {
  return join(stateDirectory(), `.log.${pid}`);
}

/**
 * Opens the log of a device, or of one that is still to be added.
 *
 * @returns a descriptor that may be handed to a process.
 * @throws {UblkError} there is no place for it.
 */
export function openDeviceLog(id?: number): number {
  const { O_APPEND, O_CREAT, O_EXCL, O_NOFOLLOW, O_NONBLOCK, O_RDWR } = constants;
  const flags = O_RDWR | O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK;
  try {
    makeStateDirectory();
    if (id !== undefined) {
      const fd = openSync(logPath(id), flags, 0o600);
      if (fstatSync(fd).isFile()) return fd;
      closeSync(fd);
      throw new UblkError({
        errno: "EINVAL",
        operation: `write the log ${logPath(id)}`,
        hint: "it is no file: look who has made it, and remove it",
      });
    }
    const path = namelessPath(process.pid);
    rmSync(path, { force: true });
    return openSync(path, flags | O_EXCL, 0o600);
  } catch (error) {
    if (error instanceof UblkError) throw error;
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    const operation = `write a log in ${stateDirectory()}`;
    throw new UblkError({ errno: code, operation, hint: message });
  }
}

function isNameless(path: string): boolean {
  return dirname(path) === stateDirectory() && basename(path).startsWith(".log.");
}

/** Gives this server's log the name of its device. */
export function nameDeviceLog(id: number): void {
  try {
    const path = readlinkSync(`/proc/self/fd/${LOG_FD}`);
    if (!isNameless(path)) return;
    renameSync(path, logPath(id));
    chmodSync(logPath(id), 0o600);
  } catch { /* it goes on without a name */ }
}

/** For a server whose device has not come to be, and whose caller may have died. */
export function dropOwnDeviceLog(): void {
  try {
    const path = readlinkSync(`/proc/self/fd/${LOG_FD}`);
    if (isNameless(path)) rmSync(path);
  } catch { /* somebody else has */ }
}

/** @param fd of openDeviceLog, for a device that has not come to be. */
export function dropDeviceLog(fd: number): void {
  try {
    const path = namelessPath(process.pid);
    if (fileOf(path)?.ino === fstatSync(fd).ino) rmSync(path);
  } catch { /* it has got a name, or is gone */ }
}

/** @returns removes the log that the device has now, and no later one of the same id. */
export function deviceLogRemover(id: number): () => void {
  const before = fileOf(logPath(id));
  return () => {
    const now = fileOf(logPath(id));
    if (before && now && before.dev === now.dev && before.ino === now.ino) {
      removeStateName(basename(logPath(id)));
    }
  };
}

/** @returns undefined: there is none, or something else in its place. */
function fileOf(path: string) {
  const stats = hasStateDirectory() ? lstatSync(path, { throwIfNoEntry: false }) : undefined;
  return stats?.isFile() ? stats : undefined;
}

/** The text of a log from a position on; no more of it than is kept. */
export function readLog(fd: number, from = 0): { text: string; end: number } {
  const end = fstatSync(fd).size;
  const begin = Math.max(from, end - LOG_BYTES_KEPT);
  const bytes = new Uint8Array(Math.max(end - begin, 0));
  let filled = 0;
  while (filled < bytes.length) {
    const count = readSync(fd, bytes, filled, bytes.length - filled, begin + filled);
    if (count === 0) break;
    filled += count;
  }
  // What was cut reads as zeroes, and the first line after it is not a whole one.
  const kept = bytes.subarray(0, filled);
  const hole = kept.lastIndexOf(0) + 1;
  const cut = begin > from || hole > 0 ? kept.indexOf(10, hole) + 1 : 0;
  return { text: new TextDecoder().decode(kept.subarray(cut)), end };
}

/**
 * Keeps this server's log short, whoever writes to it, from now on until the process ends.
 *
 * @returns cuts it at once, if it is time.
 */
export function boundDeviceLog(shim: Shim, watched: boolean): () => void {
  const path = `/proc/self/fd/${LOG_FD}`;
  let cutAt = 0;
  const cut = () => {
    const { size } = fstatSync(LOG_FD);
    if (size < cutAt + LOG_BYTES_KEPT + LOG_BYTES_SLACK) return;
    cutAt = size - LOG_BYTES_KEPT;
    const result = shim.native.ubd_fallocate(LOG_FD, PUNCH_HOLE, 0, cutAt);
    if (result >= 0) return;
    truncateSync(path); // Where files cannot have holes.
    cutAt = 0;
  };
  if (!fstatSync(LOG_FD).isFile()) return () => {};
  cut();
  if (watched) {
    try {
      watch(path, { persistent: false }, cut).on("error", () => {});
    } catch { // No more watches: look from time to time.
      setInterval(cut, 1000).unref();
    }
  }
  return cut;
}
