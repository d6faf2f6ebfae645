// SPDX-License-Identifier: MIT
/**
 * How `ubd add` starts the process that serves a device (cli/server.ts), and what they tell each
 * other.
 *
 * `startServer` runs this program again, detached: own session, own mounts (core/isolation.ts),
 * `/` as working directory, and of descriptors these alone:
 * - 0: the spec goes in, one line of JSON;
 * - 1 and 2: the device's log (cli/device_log.ts), whoever prints there;
 * - 3: answers come back, one JSON object a line: the device's id once it exists, then `live` or
 *   `failed`. What else is written there is an error, and ends the server;
 * - from 4 on: the files of the spec (cli/backing_files.ts).
 * A server that dies in between leaves a device, which the caller deletes.
 * A caller that has heard `live` ends standard input: until then, to interrupt a server that takes
 * a device over is to leave the device waiting.
 *
 * A caller that needs the device only while it lives itself keeps standard input open, as a leash:
 * when it is let go, also by kill -9, the server deletes the device once nobody uses it.
 * @module
 */

import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, writeSync } from "node:fs";
import process from "node:process";
import type { Readable, Writable } from "node:stream";
import { clearTimeout, setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { Control } from "../core/control.ts";
import type { DataWish } from "../core/data_mode.ts";
import { type DeviceOptions, QUIESCE_DEADLINE_MS } from "../core/device.ts";
import type { DeviceInfo } from "../abi/dialect.ts";
import { UblkError } from "../core/error.ts";
import { asFlusher, inPrivateMounts, mountNamespace } from "../core/isolation.ts";
import { rerunArguments, restfulEnvironment, Shim } from "../ffi/mod.ts";
import { beginningOf } from "../core/proc.ts";
import { readState, removeState } from "../core/state.ts";
import { MODULE_TARGET } from "../targets/module.ts";
import { type BackingFile, filesOf, type HeldFiles, holdFiles } from "./backing_files.ts";
import { deviceLogRemover, dropDeviceLog, openDeviceLog, readLog } from "./device_log.ts";
import { EXIT, type Failure, ReportedError } from "./exit.ts";
import { withoutLimits } from "./limits.ts";
import { passOn } from "./output.ts";

/** Everything `ubd add` was told, checked, as plain JSON. */
export interface ServerSpec {
  device:
    & Pick<DeviceOptions, "id" | "queues" | "depth" | "threads" | "ioBytesMax" | "memory">
    & DataWish
    & { compInTask: boolean; noPartScan: boolean };
  target: { name: string; options: Record<string, unknown> };
  /** What the target has its data in, as far as its options tell. */
  files?: readonly BackingFile[];
  /** What becomes of I/O when the server dies; undefined: it fails and the device is DEAD. */
  recovery?: RecoveryMode;
  /** A process of its own starts the server again when it dies. */
  supervise?: boolean;
  /** The module is served anew when it changes. */
  watch?: boolean;
  /** A root file system may lie on it: the server must outlive all other processes. */
  rootStorage?: boolean;
  /** The device of a user without privileges, who alone may open and control it, besides root. */
  unprivileged?: boolean;
  /** Keep the server's memory out of swap. */
  lockMemory?: boolean;
  /** How long the target's own code may take until the device is LIVE, in seconds. */
  startTimeoutS?: number;
  /** Take over this device instead of adding one. */
  recover?: number;
  /** Its server lives, and is first made to let go. */
  quiesce?: boolean;
  /** Id of the process that supervises this server; undefined: it is still to be started. */
  supervisor?: number;
}

/**
 * After the server's death, until there is a new one: "wait" fails requests it was serving and
 * holds the others, "reissue" holds all and serves them again, "fail" fails all.
 */
export type RecoveryMode = "wait" | "reissue" | "fail";

/** Of a server's start, unless it was told another one. */
export const START_TIMEOUT_S = 60;

/** How long a server that was told to end may take before it is killed. */
const END_PATIENCE_MS = 30_000;

/** Tells a server that another process is stopping its device. */
export const STOPPING_SIGNAL = "SIGUSR2";

/** The hidden verb that makes a process a server. */
export const SERVE_VERB = "__serve";
export const LEASHED = "--leashed";
/** In place of serving: deletes what a server has left that could not end otherwise. */
export const UNDO = "--undo";

export interface Live {
  id: number;
  path: string;
  notes: readonly string[];
}

export type Answer =
  | { type: "added"; id: number; mark: string }
  | { type: "live"; live: Live }
  | { type: "failed"; failure: Failure };

/** Whether the process that gets this spec is to start the server, and watch it. */
export function isSupervisor({ supervise, supervisor }: ServerSpec): boolean {
  return supervise === true && supervisor === undefined;
}

/** Lines as they come. Loading node:readline takes a third as long as starting Bun. */
export async function* linesOf(stream: Readable): AsyncGenerator<string, undefined> {
  let rest = "";
  for await (const text of stream.setEncoding("utf8")) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    yield* lines;
  }
}

/** Where a server answers: no file that a module prints to. */
const ANSWERS_FD = 3;

/** The descriptors of a server's files. */
export function handedFds({ files = [] }: ServerSpec): number[] {
  return files.map((_, index) => ANSWERS_FD + 1 + index);
}

/** Tells whoever started this server, unless that one is gone. */
export function answer(message: Answer): void {
  try {
    writeSync(ANSWERS_FD, `${JSON.stringify(message)}\n`);
  } catch { /* nobody reads */ }
}

/** @throws {UblkError} EPROTO: it is no answer of this version's. */
export function parseAnswer(line: string): Answer {
  try {
    const message = JSON.parse(line) as Partial<Record<string, unknown>> | null;
    if (message?.type === "added" && Number.isInteger(message.id) && isMark(message.mark)) {
      return message as Answer;
    }
    if (message?.type === "live" && isObject(message.live)) return message as Answer;
    if (message?.type === "failed" && isObject(message.failure)) return message as Answer;
  } catch { /* no JSON */ }
  throw new UblkError({
    errno: "EPROTO",
    operation: "start the server",
    hint: `it said ${JSON.stringify(line.slice(0, 200))}, which is no answer of this version's: ` +
      "was ubd replaced meanwhile, or does the target write to descriptor 3?",
  });
}

function isMark(value: unknown): boolean {
  return typeof value === "string" && /^\d+$/.test(value);
}

function isObject(value: unknown): boolean {
  return typeof value === "object" && value !== null;
}

/**
 * Starts a server process and waits until its device is LIVE.
 *
 * @param hold takes the server's leash: the device lives until it is ended, or this process.
 * @param held the files of the spec; this function closes them. Default: what has their names now.
 * @throws {ReportedError} what the server said. @throws {UblkError} it died without a word.
 */
export async function startServer(
  spec: ServerSpec,
  { hold, held }: { hold?: (leash: Writable) => void; held?: HeldFiles } = {},
): Promise<Live> {
  const shim = new Shim();
  const { files, fds, close } = held ?? holdFiles(shim, filesOf(spec));
  const log = openDeviceLog(spec.recover);
  const { end } = readLog(log);
  try {
    const known = files.length > 0 ? { ...spec, files } : spec;
    const { live, child } = await spawnServer(known, { log, fds }, () => {}, hold);
    child.unref();
    return live;
  } catch (error) {
    const { text } = readLog(log, end);
    if (text) passOn(text);
    if (spec.recover === undefined) dropDeviceLog(log);
    throw error;
  } finally {
    closeSync(log);
    close();
  }
}

/**
 * As startServer, for a caller that stays.
 *
 * @param handed descriptors: of openDeviceLog, or what the caller has as its own log; and of the
 * files of the spec, in their order.
 * @param onAdded told of a new device.
 */
export async function spawnServer(
  spec: ServerSpec,
  { log, fds }: { log: number; fds: readonly number[] },
  onAdded: (added: Answer & { type: "added" }) => void,
  hold?: (leash: Writable) => void,
): Promise<{ live: Live; child: ChildProcess }> {
  // Deno hands inherited descriptors on: a lock of the caller's would live as long as the device.
  const shim = new Shim();
  shim.native.ubd_close_on_exec();
  const verb = [SERVE_VERB, mountNamespace(), ...(hold ? [LEASHED] : [])];
  const args = [...rerunArguments(), ...verb];
  // Looked up here: from other mounts, in a chroot, its path is another one.
  const { execPath } = process;
  const start = () =>
    withoutLimits(shim, () =>
      spawn(execPath, args, {
        detached: true,
        cwd: "/",
        env: { ...process.env, ...restfulEnvironment },
        stdio: ["pipe", log, log, "pipe", ...fds],
      }));
  // A supervisor serves nothing, so nothing waits for it; the servers it starts need to find
  // their files, and a copy of the mounts would keep what others have unmounted.
  const copied = spec.target.name !== MODULE_TARGET || spec.rootStorage === true;
  const child = isSupervisor(spec)
    ? start()
    : asFlusher(shim, () => inPrivateMounts(shim, copied, start));
  // One that makes another let go must see that through, or nobody serves the device.
  const patienceMs = END_PATIENCE_MS + (spec.quiesce ? QUIESCE_DEADLINE_MS : 0);
  let interrupted = false;
  let patience: ReturnType<typeof setTimeout> | undefined;
  const interrupt = () => {
    interrupted = true;
    child.kill("SIGTERM");
    patience ??= setTimeout(() => child.kill("SIGKILL"), patienceMs).unref();
  };
  process.on("SIGINT", interrupt);
  process.on("SIGTERM", interrupt);

  const { stdin } = child;
  if (!stdin) throw new Error("the server has no standard input");
  const answers = child.stdio[ANSWERS_FD] as Readable;
  stdin.on("error", () => {});
  stdin.write(`${JSON.stringify(spec)}\n`);
  hold?.(stdin);

  let added: { id: number; mark: string } | undefined;
  const died = Promise.withResolvers<undefined>();
  const unstarted = Promise.withResolvers<never>();
  child.on("error", ({ code = "EIO", message }: NodeJS.ErrnoException) =>
    unstarted.reject(
      new UblkError({ errno: code, operation: "start the server", hint: message }),
    ));
  child.on("exit", () => died.resolve(undefined));
  const answered = (async () => {
    for await (const line of linesOf(answers)) {
      const message = parseAnswer(line);
      if (message.type !== "added") return message;
      added = message;
      onAdded(message);
    }
    return undefined;
  })();
  // One of them is awaited below; the other one may fail after that.
  for (const late of [answered, unstarted.promise]) late.catch(() => {});
  let outcome: Answer | undefined;
  let unknown: unknown;
  try {
    outcome = await Promise.race([answered, unstarted.promise]) ?? await died.promise;
  } catch (error) {
    if (child.pid === undefined) throw error;
    unknown = error;
    child.kill("SIGKILL"); // Nobody knows what it is doing.
  }
  if (outcome?.type === "live" && !interrupted) {
    if (!hold) stdin.end(); // It knows by this that its answer has come.
    answers.destroy();
    process.off("SIGINT", interrupt);
    process.off("SIGTERM", interrupt);
    return { live: outcome.live, child };
  }
  await died.promise;
  clearTimeout(patience);
  process.off("SIGINT", interrupt);
  process.off("SIGTERM", interrupt);
  // One that has undone its work may see the id in other hands now: the mark tells.
  if (added) {
    const mark = BigInt(added.mark);
    await deleteLeftover(added.id, ({ targetFlags }) => targetFlags === mark)
      .catch((error) => unknown ??= error); // Why it failed, the server knows best.
  }
  if (outcome?.type === "failed") throw new ReportedError(outcome.failure);
  if (interrupted) throw interruption(spec.quiesce ? undefined : spec.recover);
  if (unknown !== undefined) throw unknown;
  throw new UblkError({
    errno: "ECANCELED",
    operation: "start the server",
    hint: `the server ended with ${child.signalCode ?? `code ${child.exitCode}`}`,
  });
}

/**
 * Has another process delete this server's device once this one has ended: the target's own code
 * keeps a queue's thread, and the driver waits for that.
 */
export function undoLater(id: number, mark: bigint): void {
  const args = [
    SERVE_VERB,
    "",
    UNDO,
    `${id}`,
    `${mark}`,
    `${process.pid}`,
    `${beginningOf(process.pid)}`,
  ];
  const options = { detached: true, cwd: "/", stdio: "ignore" } as const;
  spawn(process.execPath, [...rerunArguments(), ...args], options).on("error", () => {}).unref();
}

/** The whole of that other process. */
export async function undo([id, mark, pid, began]: readonly string[]): Promise<number> {
  const deadline = performance.now() + END_PATIENCE_MS;
  const lives = () => beginningOf(Number(pid)) === Number(began);
  while (lives() && performance.now() < deadline) await sleep(20);
  await deleteLeftover(Number(id), ({ targetFlags }) => targetFlags === BigInt(mark!));
  return EXIT.OK;
}

/** @param recover a device that was to be taken over, and waits for a server as it did before. */
export function interruption(recover?: number): ReportedError {
  const waits = `; device ${recover} waits for a server: ubd recover -n ${recover}`;
  const message = `interrupted${recover === undefined ? "" : waits}`;
  return new ReportedError({ message, exitCode: EXIT.INTERRUPTED });
}

/**
 * A server that failed has undone what it did, if it could; one that was killed has not.
 *
 * @param isOurs whether the device that has the id now is still the one.
 */
export async function deleteLeftover(
  id: number,
  isOurs: (info: DeviceInfo) => boolean,
): Promise<void> {
  using control = await Control.open();
  try {
    if (!isOurs(await control.getDeviceInfo(id))) return;
    const pid = readState(id)?.pid;
    const forgetLog = deviceLogRemover(id);
    await control.stopDevice(id);
    await control.deleteDevice(id);
    if (pid === undefined) return;
    removeState(id, pid);
    forgetLog();
  } catch (error) {
    if (!(error instanceof UblkError && error.errno === "ENODEV")) throw error;
  }
}
