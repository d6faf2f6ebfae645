// SPDX-License-Identifier: MIT
/**
 * What a server tells others about its device: one JSON file each in /run/ubd, or in the user's
 * runtime directory. The driver's own answers always win over it; the file adds the target.
 *
 * Written whole and renamed, mode 0600 in a 0755 directory, and no symbolic link is followed: a
 * new name is made with O_EXCL, and rename replaces a link rather than what it points at. The
 * directory must be this user's own, and none that others may write to: else nothing is written
 * or removed, and what is there counts as nothing.
 *
 * A file is believed as far as it has the form of `FIELDS`: a regular file of this user's, of a
 * stated size, opened so that nothing waits. Any other counts as none, and is told of
 * (`onStateFault`) once; it costs no other file.
 * @module
 */

import {
  chmodSync,
  closeSync,
  constants,
  existsSync,
  fstatSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readSync,
  renameSync,
  rmSync,
  type Stats,
  statSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { isAbsolute, join } from "node:path";
import process from "node:process";
import type { QueueFacts } from "./attach.ts";
import { UblkError } from "./error.ts";
import { beginningOf } from "./proc.ts";
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
  /** Process that makes the server let go, and has not come to the end of it yet. */
  quiescing?: { pid: number; began: number };
  /** The device lives only as long as another process does: `ubd run`. */
  leashed?: boolean;
  /** Device nodes that its servers have made, since nothing else did. */
  nodes?: readonly string[];
  target: TargetFacts;
  queues: QueueFacts[];
  /** What the server was told, for the next one: cli/start_server.ts knows its form. */
  spec: unknown;
}

/** Of a file. Arguments take 2 MiB at most, and escaped in JSON six times as much. */
const STATE_BYTES_MAX = 16 * 2 ** 20;
/** Objects in objects, before they are no state but an attack on whoever walks through them. */
const DEPTH_MAX = 32;
const PID_MAX = 2 ** 31 - 1;

interface Field {
  form: string;
  fits(value: unknown): boolean;
  optional?: true;
}

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (value: unknown) => typeof value === "string";
const within = (min: number, max: number) => (value: unknown) =>
  Number.isInteger(value) && (value as number) >= min && (value as number) <= max;
const listOf = (fits: (value: unknown) => boolean) => (value: unknown) =>
  Array.isArray(value) && value.every(fits);
const isFact = (value: unknown) =>
  isText(value) || typeof value === "boolean" || Number.isFinite(value) || listOf(isText)(value);
const isQueue = (value: unknown) =>
  isRecord(value) && within(0, 0xffff)(value.qid) && within(0, PID_MAX)(value.tid) &&
  listOf(within(0, 0xffff))(value.affinity);

/** The form of a file, without what another version may have added: that is kept as it is. */
const FIELDS: Readonly<Record<keyof DeviceState, Field>> = {
  version: { form: `${STATE_VERSION}`, fits: (value) => value === STATE_VERSION },
  mark: {
    form: "a device's mark",
    fits: (value) => isText(value) && /^0x[0-9a-f]{1,16}$/.test(value as string),
    optional: true,
  },
  pid: { form: "a process id", fits: within(1, PID_MAX) },
  supervisor: { form: "a process id", fits: within(1, PID_MAX), optional: true },
  quiescing: {
    form: "a process",
    fits: (value) =>
      isRecord(value) && within(1, PID_MAX)(value.pid) && Number.isFinite(value.began),
    optional: true,
  },
  leashed: { form: "true or false", fits: (value) => typeof value === "boolean", optional: true },
  nodes: { form: "a list of paths", fits: listOf(isText), optional: true },
  target: {
    form: "facts of a target",
    fits: (value) =>
      isRecord(value) && Object.values(value).every(isFact) &&
      (value.name === undefined || isText(value.name)),
  },
  queues: { form: "a list of queues", fits: listOf(isQueue) },
  spec: { form: "what a server was told", fits: isRecord },
};

let faultTold: (text: string) => void = () => {};
const faultsTold = new Set<string>();

/** @param tell gets one line for each file or directory that counts as none, once. */
export function onStateFault(tell: (text: string) => void): void {
  faultTold = tell;
  faultsTold.clear();
}

function tellFault(what: string, why: string): void {
  if (faultsTold.has(what)) return;
  faultsTold.add(what);
  faultTold(`${what} counts as none: ${why}`);
}

let directoryForTests: string | undefined;

/** For tests, which share the machine with each other and with real devices. */
export function useStateDirectory(path: string | undefined): void {
  directoryForTests = path;
}

export function stateDirectory(): string {
  if (directoryForTests !== undefined) return directoryForTests;
  const uid = process.getuid!();
  if (uid === 0) return "/run/ubd";
  const { XDG_RUNTIME_DIR: said } = process.env;
  // A server has another working directory than its callers.
  const usable = said && isAbsolute(said);
  if (said && !usable) tellFault(`XDG_RUNTIME_DIR "${said}"`, "it is no absolute path");
  const runtime = usable ? said : `/run/user/${uid}`;
  return existsSync(runtime) ? join(runtime, "ubd") : `/tmp/ubd-${uid}`;
}

function look(path: string): Stats | undefined {
  try {
    return lstatSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** @returns errno and reason when the path is no directory that only this user writes to. */
function directoryFault(stats: Stats): [errno: string, why: string] | undefined {
  if (stats.isSymbolicLink()) return ["ELOOP", "it is a symbolic link"];
  if (!stats.isDirectory()) return ["ENOTDIR", "it is no directory"];
  return ownerFault(stats);
}

function ownerFault({ uid, mode }: Stats): [errno: string, why: string] | undefined {
  if (uid !== process.getuid!()) return ["EPERM", `it belongs to user ${uid}`];
  if (mode & 0o022) return ["EPERM", "others may write to it"];
  return undefined;
}

/** A failure of node:fs in our words. */
function failure(error: unknown, operation: string, hint?: string): UblkError {
  if (error instanceof UblkError) return error;
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === undefined) throw error;
  return new UblkError({ errno: code, operation, hint: hint ?? message });
}

/**
 * Makes the directory, unless it is there.
 *
 * @throws {UblkError} another user has made it, or there is something else in its place.
 */
export function makeStateDirectory(): void {
  const path = stateDirectory();
  const operation = `keep state in ${path}`;
  try {
    if (!look(path)) {
      mkdirSync(path, { recursive: true, mode: 0o755 });
      chmodSync(path, 0o755); // The server's umask is stricter.
    }
    const [errno, why] = directoryFault(lstatSync(path)) ?? [];
    if (errno === undefined) return;
    const hint = `${why}: look who has made it, and remove it`;
    throw new UblkError({ errno, operation, hint });
  } catch (error) {
    throw failure(error, operation);
  }
}

/** Whether the directory is there and to be believed; tells why not. */
export function hasStateDirectory(): boolean {
  const path = stateDirectory();
  try {
    const stats = look(path);
    const [, why] = stats && directoryFault(stats) || [];
    if (why !== undefined) tellFault(path, why);
    return stats !== undefined && why === undefined;
  } catch (error) {
    tellFault(path, (error as Error).message);
    return false;
  }
}

export function statePath(id: number): string {
  return join(stateDirectory(), `${id}.json`);
}

/** @returns the names of all that is in the directory. */
export function stateNames(): string[] {
  if (!hasStateDirectory()) return [];
  try {
    return readdirSync(stateDirectory());
  } catch (error) {
    tellFault(stateDirectory(), (error as Error).message);
    return [];
  }
}

/** @throws {UblkError} it cannot be written; nothing of it is left. */
export function writeState(
  id: number,
  { mark, ...state }: Omit<DeviceState, "version" | "mark"> & { mark: bigint },
): void {
  makeStateDirectory();
  const operation = "write the state file";
  const text = JSON.stringify({ version: STATE_VERSION, mark: toText(mark), ...state }, null, 2);
  if (Buffer.byteLength(text) >= STATE_BYTES_MAX) {
    const hint = `what it was told takes more than ${STATE_BYTES_MAX} bytes`;
    throw new UblkError({ errno: "EFBIG", operation, hint });
  }
  const temporary = join(stateDirectory(), `.${id}.${process.pid}`);
  try {
    rmSync(temporary, { force: true });
    writeFileSync(temporary, `${text}\n`, { mode: 0o600, flag: "wx" });
    renameSync(temporary, statePath(id));
  } catch (error) {
    rmSync(temporary, { force: true });
    throw failure(error, operation);
  }
}

/**
 * @param mark of the device that has this id now: the state of another one, which had the id
 * before and was deleted behind our back, counts as none.
 * @returns undefined when there is none, or none that this version understands: that is told.
 */
export function readState(id: number, mark?: bigint): DeviceState | undefined {
  const { state, fault } = findState(id, mark);
  if (fault !== undefined) tellFault(statePath(id), fault);
  return state;
}

/** As readState. @returns the state, or why what is there is none, or nothing. */
export function findState(id: number, mark?: bigint): { state?: DeviceState; fault?: string } {
  if (!hasStateDirectory()) return {};
  try {
    const text = readOwn(statePath(id));
    if (text === undefined) return {};
    const state = toState(text);
    if (typeof state === "string") return { fault: state };
    const another = mark !== undefined && state.mark !== undefined && state.mark !== toText(mark);
    return another ? {} : { state };
  } catch (error) {
    return { fault: (error as Error).message };
  }
}

/** @returns the text of a regular file of this user's; undefined: there is none. @throws why not. */
function readOwn(path: string): string | undefined {
  const refuse = (stats: Stats) => {
    if (stats.isSymbolicLink()) throw new Error("it is a symbolic link");
    if (!stats.isFile()) throw new Error("it is no regular file");
    const [, why] = ownerFault(stats) ?? [];
    if (why !== undefined) throw new Error(why);
    if (stats.size > STATE_BYTES_MAX) throw new Error(`it has ${stats.size} bytes`);
  };
  const before = look(path);
  if (!before) return undefined;
  refuse(before); // To open a device node can do things.
  const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = constants;
  let fd;
  try {
    fd = openSync(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined; // Just removed.
    throw error;
  }
  try {
    const stats = fstatSync(fd);
    refuse(stats);
    const bytes = Buffer.alloc(stats.size + 1);
    let length = 0;
    for (let count = 1; count > 0 && length < bytes.length; length += count) {
      count = readSync(fd, bytes, length, bytes.length - length, null);
    }
    if (length > stats.size) throw new Error("it grows"); // We write files whole.
    return bytes.toString("utf8", 0, length);
  } finally {
    closeSync(fd);
  }
}

/** @returns why it is none. */
function toState(text: string): DeviceState | string {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return "it is no JSON";
  }
  if (!isRecord(value)) return "it is no JSON object";
  if (value.version !== undefined && value.version !== STATE_VERSION) {
    return "another version of ubd has written it";
  }
  if (isDeep(value, DEPTH_MAX)) return `it has more than ${DEPTH_MAX} levels`;
  for (const [name, { form, fits, optional }] of Object.entries(FIELDS)) {
    const field = Object.hasOwn(value, name) ? value[name] : undefined;
    if (optional && field === undefined) continue;
    if (!fits(field)) return `its "${name}" is not ${form}`;
  }
  return value as unknown as DeviceState;
}

function isDeep(value: unknown, levels: number): boolean {
  if (typeof value !== "object" || value === null) return false;
  return levels === 0 || Object.values(value).some((inner) => isDeep(inner, levels - 1));
}

/**
 * @param pid only a state that this process wrote is removed; undefined: whoever wrote it.
 * @throws {UblkError} it cannot be removed.
 */
export function removeState(id: number, pid?: number): void {
  if (!hasStateDirectory() || (pid !== undefined && readState(id)?.pid !== pid)) return;
  removeStateName(`${id}.json`);
}

/**
 * Notes in a device's state file that this process quiesces it, or is done with that: QUIESCE_DEV
 * holds new requests back, and nothing but the end of the server ends that. Whoever dies in between
 * leaves a device that the driver calls LIVE and that answers nobody.
 */
export function noteQuiescing(id: number, mark: bigint, on: boolean): void {
  const { state } = findState(id, mark);
  if (!state) return;
  const { version: _, mark: __, quiescing: ___, ...rest } = state;
  const { pid } = process;
  writeState(id, {
    ...rest,
    mark,
    ...(on && { quiescing: { pid, began: beginningOf(pid) ?? 0 } }),
  });
}

/** Of a device that is LIVE: who is quiescing it, or has died over that. */
export function quiescerOf(
  { quiescing }: Pick<DeviceState, "quiescing">,
): { pid: number; alive: boolean } | undefined {
  if (!quiescing) return undefined;
  const { pid, began } = quiescing;
  return { pid, alive: beginningOf(pid) === began };
}

/** @throws {UblkError} what has this name in the directory cannot be removed; directories never. */
export function removeStateName(name: string): void {
  const path = join(stateDirectory(), name);
  const operation = `remove ${path}`;
  try {
    const stats = look(path);
    if (stats?.isDirectory()) { // Deno would remove an empty one.
      const hint = "it is a directory: look who has made it";
      throw new UblkError({ errno: "EISDIR", operation, hint });
    }
    if (stats) unlinkSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw failure(error, operation);
  }
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
