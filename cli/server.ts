// SPDX-License-Identifier: MIT
/**
 * The process that serves a device, and how `ubd add` starts it.
 *
 * `startServer` runs this program again, detached: own session, `/` as working directory, no
 * inherited descriptors. The spec goes in on standard input, and answers come back on standard
 * output, one JSON object a line: the device's id once it exists, then `live` or `failed`. A
 * server that dies in between leaves a device, which the caller deletes.
 * @module
 */

import { spawn } from "node:child_process";
import { appendFileSync } from "node:fs";
import { text } from "node:stream/consumers";
import { createInterface } from "node:readline";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import {
  UBLK_F_URING_CMD_COMP_IN_TASK,
  UBLK_F_USER_RECOVERY,
  UBLK_F_USER_RECOVERY_FAIL_IO,
  UBLK_F_USER_RECOVERY_REISSUE,
} from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { Device, type DeviceOptions } from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import { openInThread } from "../core/queue_thread.ts";
import type { OpenTarget } from "../core/target.ts";
import { removeState, writeState } from "../core/state.ts";
import { rerunArguments, Shim } from "../ffi/mod.ts";
import { findTarget, isDefined } from "../targets/mod.ts";
import type { ModuleSpec } from "../targets/module.ts";
import { queueThreadEntry } from "../targets/queue_thread.ts";
import { EXIT, type Failure, toFailure } from "./exit.ts";

/** Everything `ubd add` was told, checked, as plain JSON. */
export interface ServerSpec {
  device: Pick<DeviceOptions, "id" | "queues" | "depth" | "ioBytesMax"> & { compInTask: boolean };
  target: { name: string; options: Record<string, unknown> };
  /** What becomes of I/O when the server dies; undefined: it fails and the device is DEAD. */
  recovery?: RecoveryMode;
  /** Take over this device instead of adding one. */
  recover?: number;
}

/**
 * After the server's death, until there is a new one: "wait" fails requests it was serving and
 * holds the others, "reissue" holds all and serves them again, "fail" fails all.
 */
export type RecoveryMode = "wait" | "reissue" | "fail";

const RECOVERY_FLAGS: Record<RecoveryMode, bigint> = {
  wait: UBLK_F_USER_RECOVERY,
  reissue: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
  fail: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
};

const LOCK_PATIENCE_MS = 10_000;

/** The hidden verb that makes a process a server. */
export const SERVE_VERB = "__serve";

export interface Live {
  id: number;
  path: string;
  notes: readonly string[];
}

type Answer =
  | { type: "added"; id: number }
  | { type: "live"; live: Live }
  | { type: "failed"; failure: Failure };

/** A failure that another process has already put into words. */
export class ReportedError extends Error {
  constructor(readonly failure: Failure) {
    super(failure.message);
  }
}

export interface ServeOptions {
  daemon: boolean;
  log: (text: string) => void;
  /** The device exists in the driver. */
  onAdded: (id: number) => void;
  /** It is LIVE and its state file written. */
  onLive: (live: Live) => void;
}

/**
 * Serves one device in this process until it is stopped.
 *
 * SIGINT and SIGTERM stop and delete it; SIGHUP too, unless `daemon`. When another process stops
 * the device, that one deletes it.
 *
 * @throws what kept it from becoming LIVE, or a queue thread's failure; no device is served then.
 */
export async function serve(
  spec: ServerSpec,
  { daemon, log, onAdded, onLive }: ServeOptions,
): Promise<void> {
  const stopOrdered = Promise.withResolvers<"signal">();
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.on(signal, () => stopOrdered.resolve("signal"));
  }
  process.on("SIGHUP", () => daemon || stopOrdered.resolve("signal"));

  using control = await Control.open();
  const { name: targetName } = spec.target;
  const target = await openTarget(control, spec, log);
  const served = { targetName, target, queueThreadEntry, log };
  const { recover, ...lasting } = spec;
  const { compInTask, ...options } = spec.device;
  const device = recover === undefined
    ? await Device.create(control, {
      ...served,
      ...options,
      flags: (compInTask ? UBLK_F_URING_CMD_COMP_IN_TASK : 0n) |
        (spec.recovery ? RECOVERY_FLAGS[spec.recovery] : 0n),
      onAdded,
    })
    : await Device.recover(control, recover, served);
  const { id } = device.info;
  const notes = [...target.notes];
  if (device.info.queues < options.queues) {
    notes.push(`${device.info.queues} queues, not ${options.queues}: the kernel has one per CPU`);
  }
  const facts = { name: targetName, dev_size: target.limits.sizeBytes, ...target.facts };
  const state = { pid: process.pid, target: facts, queues: [...device.queues], spec: lasting };
  try {
    writeState(id, state);
  } catch (error) {
    if (recover === undefined) await device.stop();
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    throw new UblkError({ errno: code, operation: "write the state file", hint: message });
  }
  try {
    onLive({ id, path: device.path, notes });
    const end = await Promise.race([device.ended, stopOrdered.promise]);
    if (end === "signal") await device.stop();
    else device.letGo();
    removeState(id, process.pid);
  } catch (error) {
    // The driver must not wait for a server that cannot go on: this process ends, and with it
    // every request fails, or waits for the next server, which needs the state.
    log(`device ${id} is no longer served: ${(error as Error).message}`);
    if (!spec.recovery) removeState(id, process.pid);
    throw error;
  }
}

/** In recovery, the kernel may still be letting go of what the old server had locked. */
async function openTarget(
  { dialect, shim }: Control,
  spec: ServerSpec,
  log: (text: string) => void,
): Promise<OpenTarget> {
  const { name, options } = spec.target;
  if (isDefined(name)) {
    const { file, options: given } = options as Partial<ModuleSpec>;
    const facts = { ...(file && { module: file }), ...given } as OpenTarget["facts"];
    return await openInThread(queueThreadEntry, { name, spec: options }, facts, shim, log);
  }
  const context = { shim, hasVolatileCache: dialect.hasVolatileCache };
  const deadline = performance.now() + (spec.recover === undefined ? 0 : LOCK_PATIENCE_MS);
  for (;;) {
    try {
      return findTarget(name).open(options, context);
    } catch (error) {
      const busy = error instanceof UblkError && error.errno === "EBUSY";
      if (!busy || performance.now() > deadline) throw error;
      await sleep(100);
    }
  }
}

/** The hidden verb's whole program. */
export async function runServer(): Promise<number> {
  const spec = JSON.parse(await text(process.stdin)) as ServerSpec;
  const answer = (message: Answer) => process.stdout.write(`${JSON.stringify(message)}\n`);
  // The caller is gone once it has its answer; what it left open must not end this process.
  process.stdout.on("error", () => {});
  process.stderr.on("error", () => {});
  try {
    await serve(spec, {
      daemon: true,
      log: logToKernel,
      onAdded: (id) => answer({ type: "added", id }),
      onLive: (live) => answer({ type: "live", live }),
    });
    return EXIT.OK;
  } catch (error) {
    const failure = toFailure(error);
    answer({ type: "failed", failure });
    return failure.exitCode;
  }
}

/** A daemon has no terminal; the kernel's log is where people look after a disk misbehaves. */
function logToKernel(message: string): void {
  try {
    appendFileSync("/dev/kmsg", `ubd[${process.pid}]: ${message.replaceAll("\n", " | ")}\n`);
  } catch { /* no permission: nobody to tell */ }
}

/**
 * Starts a server process and waits until its device is LIVE.
 *
 * @throws {ReportedError} what the server said. @throws {UblkError} it died without a word.
 */
export async function startServer(spec: ServerSpec): Promise<Live> {
  // Deno hands inherited descriptors on: a lock of the caller's would live as long as the device.
  new Shim().native.ubd_close_on_exec();
  const child = spawn(process.execPath, [...rerunArguments(), SERVE_VERB], {
    detached: true,
    cwd: "/",
    stdio: ["pipe", "pipe", "pipe"],
  });
  let interrupted = false;
  const interrupt = () => {
    interrupted = true;
    child.kill("SIGTERM");
  };
  process.on("SIGINT", interrupt);
  process.on("SIGTERM", interrupt);

  let complaint = "";
  child.stderr.on("data", (data) => complaint = `${complaint}${data}`.slice(-2000));
  child.stdin.on("error", () => {});
  child.stdin.end(JSON.stringify(spec));

  let added: number | undefined;
  const died = Promise.withResolvers<undefined>();
  child.on("error", () => died.resolve(undefined));
  child.on("exit", () => died.resolve(undefined));
  const answered = (async () => {
    for await (const line of createInterface({ input: child.stdout })) {
      const message = JSON.parse(line) as Answer;
      if (message.type !== "added") return message;
      added = message.id;
    }
    return undefined;
  })();
  const outcome = await answered ?? await died.promise;
  if (outcome?.type === "live" && !interrupted) {
    child.stdout.destroy();
    child.stderr.destroy();
    child.unref();
    return outcome.live;
  }
  await died.promise;
  // Only one that died without a word: whoever undid its work may see the id in other hands now.
  if (outcome === undefined && added !== undefined) await deleteLeftover(added);
  if (outcome?.type === "failed") throw new ReportedError(outcome.failure);
  if (interrupted) {
    throw new ReportedError({ message: "interrupted", exitCode: EXIT.INTERRUPTED });
  }
  throw new UblkError({
    errno: "ECANCELED",
    operation: "start the server",
    hint: `the server ended with ${child.signalCode ?? `code ${child.exitCode}`}` +
      (complaint ? `: ${complaint.trim()}` : ""),
  });
}

/** A server that failed has undone what it did; one that was killed has not. */
async function deleteLeftover(id: number): Promise<void> {
  using control = await Control.open();
  try {
    await control.stopDevice(id);
    await control.deleteDevice(id);
  } catch (error) {
    if (!(error instanceof UblkError && error.errno === "ENODEV")) throw error;
  }
}
