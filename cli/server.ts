// SPDX-License-Identifier: MIT
/**
 * The process that serves a device, and how `ubd add` starts it.
 *
 * `startServer` runs this program again, detached: own session, own mounts (core/isolation.ts),
 * `/` as working directory, no inherited descriptors. The spec goes in on standard input, and
 * answers come back on standard output, one JSON object a line: the device's id once it exists,
 * then `live` or `failed`. A server that dies in between leaves a device, which the caller deletes.
 *
 * A caller that needs the device only while it lives itself keeps standard input open, as a leash:
 * when it is let go, also by kill -9, the server deletes the device once nobody uses it.
 * @module
 */

import { type ChildProcess, spawn } from "node:child_process";
import { writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import process from "node:process";
import type { Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import {
  UBLK_F_NO_AUTO_PART_SCAN,
  UBLK_F_QUIESCE,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_URING_CMD_COMP_IN_TASK,
  UBLK_F_USER_RECOVERY,
  UBLK_F_USER_RECOVERY_FAIL_IO,
  UBLK_F_USER_RECOVERY_REISSUE,
} from "../abi/ublk_cmd.ts";
import { Control, lackError } from "../core/control.ts";
import { Device, type DeviceOptions } from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import {
  detachMounts,
  harden,
  hasOwnMounts,
  inPrivateMounts,
  mountNamespace,
} from "../core/isolation.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import { openInThread } from "../core/queue_thread.ts";
import type { OpenTarget } from "../core/target.ts";
import { readState, removeState, writeState } from "../core/state.ts";
import { deviceUsers } from "../core/users.ts";
import { rerunArguments, Shim } from "../ffi/mod.ts";
import { findTarget, isDefined } from "../targets/mod.ts";
import type { ModuleSpec } from "../targets/module.ts";
import { queueThreadEntry } from "../targets/queue_thread.ts";
import { EXIT, type Failure, toFailure } from "./exit.ts";
import { supervise } from "./supervise.ts";
import { surviveShutdown } from "./systemd.ts";
import { watchModule } from "./watch.ts";

/** Everything `ubd add` was told, checked, as plain JSON. */
export interface ServerSpec {
  device: Pick<DeviceOptions, "id" | "queues" | "depth" | "ioBytesMax" | "zeroCopy"> & {
    compInTask: boolean;
    noPartScan: boolean;
  };
  target: { name: string; options: Record<string, unknown> };
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
  /** Take over this device instead of adding one. */
  recover?: number;
  /** Id of the process that supervises this server; undefined: it is still to be started. */
  supervisor?: number;
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

/** How often a server without a leash looks whether its device is still used. */
const USERS_PAUSE_MS = 500;

/** Tells a server that another process is stopping its device. */
export const STOPPING_SIGNAL = "SIGUSR2";

/** The hidden verb that makes a process a server. */
export const SERVE_VERB = "__serve";
const LEASHED = "--leashed";

export interface Live {
  id: number;
  path: string;
  notes: readonly string[];
}

export type Answer =
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
  /** Once it settles, the device is deleted as soon as nobody uses it. */
  unneeded?: Promise<void>;
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
  { daemon, log, onAdded, onLive, unneeded }: ServeOptions,
): Promise<void> {
  const stopOrdered = Promise.withResolvers<"signal">();
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.on(signal, () => stopOrdered.resolve("signal"));
  }
  process.on("SIGHUP", () => daemon || stopOrdered.resolve("signal"));

  if (spec.rootStorage) surviveShutdown();
  using control = await Control.open();
  harden(control.shim, { lockMemory: spec.lockMemory ?? false });
  const { name: targetName } = spec.target;
  const { recover, supervisor, ...lasting } = spec;
  const { compInTask, noPartScan, ...options } = spec.device;
  const predecessor = recover === undefined ? undefined : readState(recover)?.pid;
  if (spec.watch && !quiescible(control)) throw lackError(UBLK_F_QUIESCE, "watch the module");
  const target = await openTarget(control, spec, log);
  const served = { targetName, target, queueThreadEntry, log };
  const device = recover === undefined
    ? await Device.create(control, {
      ...served,
      ...options,
      flags: (compInTask ? UBLK_F_URING_CMD_COMP_IN_TASK : 0n) |
        (noPartScan ? UBLK_F_NO_AUTO_PART_SCAN : 0n) |
        (spec.unprivileged ? UBLK_F_UNPRIVILEGED_DEV : 0n) |
        (spec.recovery ? RECOVERY_FLAGS[spec.recovery] | quiescible(control) : 0n),
      onAdded,
    })
    : await Device.recover(control, recover, {
      ...served,
      confirm() {
        // Patience may have outlasted the device, and another one may have its id.
        if (readState(recover)?.pid === predecessor) return;
        const hint = "another server has taken it over, or it is another device: see ubd list";
        throw new UblkError({ errno: "EBUSY", operation: "recover", device: recover, hint });
      },
    });
  const { id } = device.info;
  process.on(STOPPING_SIGNAL, () => device.stopping());
  if (spec.watch) watchModule(id, (spec.target.options as unknown as ModuleSpec).file, log);
  const notes = [...target.notes, ...device.notes];
  if (device.info.queues < options.queues) {
    notes.push(`${device.info.queues} queues, not ${options.queues}: the kernel has one per CPU`);
  }
  const facts = { name: targetName, dev_size: target.limits.sizeBytes, ...target.facts };
  const state = {
    pid: process.pid,
    ...(supervisor !== undefined && { supervisor }),
    target: facts,
    queues: [...device.queues],
    spec: lasting,
  };
  try {
    writeState(id, state);
  } catch (error) {
    if (recover === undefined) await device.stop();
    if (error instanceof UblkError) throw error;
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    throw new UblkError({ errno: code, operation: "write the state file", hint: message });
  }
  try {
    onLive({ id, path: device.path, notes });
    const { dialect } = control;
    unneeded?.then(() => unused(dialect.blockName(id))).then(() => stopOrdered.resolve("signal"));
    const end = await Promise.race([device.ended, stopOrdered.promise]);
    const quiesced = end !== "signal" && await device.isQuiesced();
    if (end === "signal") await device.stop();
    else device.letGo();
    // The next server needs it.
    if (!quiesced) removeState(id, process.pid);
  } catch (error) {
    // The driver must not wait for a server that cannot go on: this process ends, and with it
    // every request fails, or waits for the next server, which needs the state.
    log(`device ${id} is no longer served: ${(error as Error).message}`);
    if (!spec.recovery) removeState(id, process.pid);
    throw error;
  }
}

/** A device that a server may leave can also be told to be left, where the kernel knows how. */
function quiescible({ features = 0n }: Control): bigint {
  return features & UBLK_F_QUIESCE;
}

async function unused(blockName: string): Promise<void> {
  while ((await deviceUsers(blockName)).length > 0) await sleep(USERS_PAUSE_MS);
}

/**
 * In recovery, the kernel may still be letting go of what the old server had locked, and it knows
 * the device's size: that may have changed since it was added.
 */
async function openTarget(
  control: Control,
  spec: ServerSpec,
  log: (text: string) => void,
): Promise<OpenTarget> {
  const { dialect, shim } = control;
  const { name } = spec.target;
  if (isDefined(name)) {
    const { options } = spec.target;
    const { file, options: given } = options as Partial<ModuleSpec>;
    const facts = { ...(file && { module: file }), ...given } as OpenTarget["facts"];
    return await openInThread(queueThreadEntry, { name, spec: options }, facts, shim, log);
  }
  const options = spec.recover === undefined ? spec.target.options : {
    ...spec.target.options,
    sizeBytes: Number((await control.getParams(spec.recover)).basic.dev_sectors) * SECTOR_BYTES,
  };
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

/** Whether the process that gets this spec is to start the server, and watch it. */
function isSupervisor({ supervise, supervisor }: ServerSpec): boolean {
  return supervise === true && supervisor === undefined;
}

/** The hidden verb's whole program. */
export async function runServer(): Promise<number> {
  const input = createInterface({ input: process.stdin });
  const leashed = process.argv.includes(LEASHED);
  const letGo = new Promise<void>((resolve) => input.once("close", resolve));
  const told = new Promise<string>((resolve) => input.once("line", resolve));
  const line = await Promise.race([told, letGo]);
  if (line === undefined) return EXIT.INTERRUPTED; // The caller died first.
  const spec = JSON.parse(line) as ServerSpec;
  const answer = (message: Answer) => process.stdout.write(`${JSON.stringify(message)}\n`);
  // The caller is gone once it has its answer; what it left open must not end this process.
  process.stdout.on("error", () => {});
  process.stderr.on("error", () => {});
  try {
    if (isSupervisor(spec)) return await supervise(spec, answer);
    await serve(spec, {
      daemon: true,
      log: logToKernel,
      onAdded: (id) => answer({ type: "added", id }),
      onLive: (live) => {
        const [, , , callersNamespace = ""] = process.argv;
        if (!hasOwnMounts(callersNamespace)) {
          logToKernel(
            `device ${live.id}: its server shares the mounts of who started it; ` +
              `unmount ${live.path} there before it ends`,
          );
        } else if (!isDefined(spec.target.name)) {
          detachMounts(new Shim());
        }
        answer({ type: "live", live });
      },
      ...(leashed && { unneeded: letGo }),
    });
    return EXIT.OK;
  } catch (error) {
    const failure = toFailure(error);
    answer({ type: "failed", failure });
    return failure.exitCode;
  }
}

/** A daemon has no terminal; the kernel's log is where people look after a disk misbehaves. */
export function logToKernel(message: string): void {
  try {
    const line = `ubd[${process.pid}]: ${message.replaceAll("\n", " | ")}\n`;
    writeFileSync("/dev/kmsg", line, { flag: "r+" }); // A container's /dev may have none: make none.
  } catch { /* no permission: nobody to tell */ }
}

/**
 * Starts a server process and waits until its device is LIVE.
 *
 * @param hold takes the server's leash: the device lives until it is ended, or this process.
 * @throws {ReportedError} what the server said. @throws {UblkError} it died without a word.
 */
export async function startServer(
  spec: ServerSpec,
  hold?: (leash: Writable) => void,
): Promise<Live> {
  const { live, child } = await spawnServer(spec, () => {}, hold);
  child.unref();
  return live;
}

/** As startServer, for a caller that stays. @param onAdded told of a new device's id. */
export async function spawnServer(
  spec: ServerSpec,
  onAdded: (id: number) => void,
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
    spawn(execPath, args, {
      detached: true,
      cwd: "/",
      stdio: ["pipe", "pipe", "pipe"],
    });
  // A supervisor serves nothing, so nothing waits for it; the servers it starts need to find
  // their files, and a copy of the mounts would keep what others have unmounted.
  const child = isSupervisor(spec) ? start() : inPrivateMounts(shim, start);
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
  child.stdin.write(`${JSON.stringify(spec)}\n`);
  if (hold) hold(child.stdin);
  else child.stdin.end();

  let added: number | undefined;
  const died = Promise.withResolvers<undefined>();
  const unstarted = Promise.withResolvers<never>();
  child.on("error", ({ code = "EIO", message }: NodeJS.ErrnoException) =>
    unstarted.reject(
      new UblkError({ errno: code, operation: "start the server", hint: message }),
    ));
  child.on("exit", () => died.resolve(undefined));
  const answered = (async () => {
    for await (const line of createInterface({ input: child.stdout })) {
      const message = JSON.parse(line) as Answer;
      if (message.type !== "added") return message;
      added = message.id;
      onAdded(added);
    }
    return undefined;
  })();
  // One of them is awaited below; the other one may fail after that.
  for (const late of [answered, unstarted.promise]) late.catch(() => {});
  const outcome = await Promise.race([answered, unstarted.promise]) ?? await died.promise;
  if (outcome?.type === "live" && !interrupted) {
    child.stdout.destroy();
    child.stderr.destroy();
    process.off("SIGINT", interrupt);
    process.off("SIGTERM", interrupt);
    return { live: outcome.live, child };
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
export async function deleteLeftover(id: number): Promise<void> {
  using control = await Control.open();
  try {
    await control.stopDevice(id);
    await control.deleteDevice(id);
  } catch (error) {
    if (!(error instanceof UblkError && error.errno === "ENODEV")) throw error;
  }
}
