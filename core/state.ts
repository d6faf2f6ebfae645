// SPDX-License-Identifier: MIT
/**
 * What a server tells others about its device: one JSON file each in /run/ubd, or in the user's
 * runtime directory. The driver's own answers always win over it; the file adds the target.
 *
 * Written whole and renamed, mode 0600 in a 0755 directory, and no symbolic link is followed: a
 * new name is made with O_EXCL, and rename replaces a link rather than what it points at. The
 * directory must be this user's own, and none that others may write to: else nothing is written,
 * and what is there counts as nothing.
 * @module
 */

import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { QueueFacts } from "./attach.ts";
import { UblkError } from "./error.ts";
import type { TargetFacts } from "./target.ts";

const STATE_VERSION = 1;

export interface DeviceState {
  version: number;
  /** The device's mark, as the driver tells it; earlier versions wrote none. */
  mark?: string;
  /** Process that serves the device. */
  pid: number;
  /** Process that starts the server again when it dies, if there is one. */
  supervisor?: number;
  /** The device lives only as long as another process does: `ubd run`. */
  leashed?: boolean;
  /** Device nodes that its servers have made, since nothing else did. */
  nodes?: readonly string[];
  target: TargetFacts;
  queues: QueueFacts[];
  /** What the server was told, for the next one: cli/start_server.ts knows its form. */
  spec: unknown;
}

export function stateDirectory(): string {
  const uid = process.getuid!();
  if (uid === 0) return "/run/ubd";
  const runtime = process.env.XDG_RUNTIME_DIR ?? `/run/user/${uid}`;
  return existsSync(runtime) ? join(runtime, "ubd") : `/tmp/ubd-${uid}`;
}

/** @throws {UblkError} another user has made the directory, or a link in its place. */
function checkDirectory(path: string): void {
  const stats = lstatSync(path);
  const [errno, what] = stats.isSymbolicLink()
    ? ["ELOOP", "it is a symbolic link"]
    : !stats.isDirectory()
    ? ["ENOTDIR", "it is no directory"]
    : stats.uid !== process.getuid!()
    ? ["EPERM", `it belongs to user ${stats.uid}`]
    : stats.mode & 0o022
    ? ["EPERM", "others may write to it"]
    : [undefined, undefined];
  if (errno === undefined) return;
  const hint = `${what}: look who has made it, and remove it`;
  throw new UblkError({ errno, operation: `keep state in ${path}`, hint });
}

export function statePath(id: number): string {
  return join(stateDirectory(), `${id}.json`);
}

export function writeState(
  id: number,
  { mark, ...state }: Omit<DeviceState, "version" | "mark"> & { mark: bigint },
): void {
  const made = mkdirSync(stateDirectory(), { recursive: true, mode: 0o755 });
  if (made !== undefined) chmodSync(stateDirectory(), 0o755); // The server's umask is stricter.
  checkDirectory(stateDirectory());
  const temporary = join(stateDirectory(), `.${id}.${process.pid}`);
  rmSync(temporary, { force: true });
  const text = JSON.stringify({ version: STATE_VERSION, mark: toText(mark), ...state }, null, 2);
  writeFileSync(temporary, `${text}\n`, { mode: 0o600, flag: "wx" });
  renameSync(temporary, statePath(id));
}

/**
 * @param mark of the device that has this id now: the state of another one, which had the id
 * before and was deleted behind our back, counts as none.
 * @returns undefined when there is none, or none that this version understands.
 */
export function readState(id: number, mark?: bigint): DeviceState | undefined {
  try {
    checkDirectory(stateDirectory());
    const state = JSON.parse(readFileSync(statePath(id), "utf8")) as DeviceState;
    if (state.version !== STATE_VERSION) return undefined;
    const another = mark !== undefined && state.mark !== undefined && state.mark !== toText(mark);
    return another ? undefined : state;
  } catch {
    return undefined;
  }
}

/** @param pid only a state that this process wrote is removed; undefined: whoever wrote it. */
export function removeState(id: number, pid?: number): void {
  if (pid !== undefined && readState(id)?.pid !== pid) return;
  rmSync(statePath(id), { force: true });
}

/** Bits 22 to 31 of a mark; below them is room for the largest process id. */
const MARK = 0x2bdn << 22n;
const MARK_PID = (1n << 22n) - 1n;

/**
 * What a new device is marked with, in the field that the driver keeps for servers: a device
 * exists before its state file does, and whoever was killed in between can only be found by this.
 * It stays the device's in a recovery, and tells a device from another that had its id before.
 */
export function makersMark(pid: number): bigint {
  return pidNamespace() << 32n | MARK | BigInt(pid);
}

/** @returns the process that added the device; undefined: another program's, or not to be seen. */
export function makerOf(mark: bigint): number | undefined {
  const pid = Number(mark & MARK_PID);
  return mark === makersMark(pid) ? pid : undefined;
}

/** More than a number of JSON holds. */
function toText(mark: bigint): string {
  return `0x${mark.toString(16)}`;
}

/** A process id means nothing outside of its namespace. */
function pidNamespace(): bigint {
  return BigInt(statSync("/proc/self/ns/pid").ino) & 0xffff_ffffn;
}
