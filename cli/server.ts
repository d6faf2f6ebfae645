// SPDX-License-Identifier: MIT
/**
 * The process that serves a device: `ubd add` starts it (cli/start_server.ts), or is it itself with
 * `--foreground`.
 * @module
 */

import { existsSync } from "node:fs";
import { stat } from "node:fs/promises";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import {
  UBLK_F_BATCH_IO,
  UBLK_F_NO_AUTO_PART_SCAN,
  UBLK_F_QUIESCE,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_URING_CMD_COMP_IN_TASK,
  UBLK_F_USER_RECOVERY,
  UBLK_F_USER_RECOVERY_FAIL_IO,
  UBLK_F_USER_RECOVERY_REISSUE,
  UBLK_S_DEV_DEAD,
  UBLK_S_DEV_LIVE,
} from "../abi/ublk_cmd.ts";
import { Control, lackError } from "../core/control.ts";
import { Device } from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import { detachMounts, harden, hasOwnMounts } from "../core/isolation.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import { openInThread } from "../core/queue_thread.ts";
import type { OpenTarget } from "../core/target.ts";
import { makeStateDirectory, readState, removeState, writeState } from "../core/state.ts";
import { deviceUsers } from "../core/users.ts";
import { Shim } from "../ffi/mod.ts";
import { findTarget, isDefined } from "../targets/mod.ts";
import type { ModuleSpec } from "../targets/module.ts";
import { queueThreadEntry } from "../targets/queue_thread.ts";
import { deviceIds, isNoneOfOurs } from "./describe.ts";
import { boundDeviceLog, deviceLogRemover, nameDeviceLog } from "./device_log.ts";
import { EXIT, toFailure } from "./exit.ts";
import { createServerLog, type ServerLog } from "./server_log.ts";
import { specOf } from "./spec.ts";
import {
  answer,
  interruption,
  isSupervisor,
  LEASHED,
  linesOf,
  type Live,
  type RecoveryMode,
  type ServerSpec,
  STOPPING_SIGNAL,
} from "./start_server.ts";
import { supervise } from "./supervise.ts";
import { surviveShutdown } from "./systemd.ts";
import { versionOf, watchModule } from "./watch.ts";

const RECOVERY_FLAGS: Record<RecoveryMode, bigint> = {
  wait: UBLK_F_USER_RECOVERY,
  reissue: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
  fail: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
};

const LOCK_PATIENCE_MS = 10_000;
const STAT_PATIENCE_MS = 2000;

/** How often a server without a leash looks whether its device is still used. */
const USERS_PAUSE_MS = 500;

export interface ServeOptions {
  daemon: boolean;
  log: ServerLog;
  /** The device exists in the driver. */
  onAdded: (id: number) => void;
  /** It is LIVE and its state file written. */
  onLive: (live: Live) => void;
  /** Settles when whoever started this server has heard of `onLive`; undefined: nobody waits. */
  accepted?: Promise<void>;
  /** Once it settles, the device is deleted as soon as nobody uses it. */
  unneeded?: Promise<void>;
}

/**
 * Serves one device in this process until it is stopped.
 *
 * SIGINT and SIGTERM stop and delete it; SIGHUP too, unless `daemon`. When another process stops
 * the device, that one deletes it. A device that is being taken over is none of ours before
 * `accepted`: told to end by then, this server leaves it waiting for another, as it was.
 *
 * @throws what kept it from becoming LIVE, or a queue thread's failure; no device is served then.
 */
export async function serve(
  spec: ServerSpec,
  { daemon, log, onAdded, onLive, accepted, unneeded }: ServeOptions,
): Promise<void> {
  const stopOrdered = Promise.withResolvers<"signal">();
  let ours = spec.recover === undefined;
  let leaving = false;
  const interrupt = () => {
    leaving ||= !ours;
    stopOrdered.resolve("signal");
  };
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, interrupt);
  process.on("SIGHUP", () => daemon || interrupt());

  if (spec.rootStorage) surviveShutdown();
  using control = await Control.open();
  harden(control.shim, { lockMemory: spec.lockMemory ?? false });
  const { name: targetName } = spec.target;
  const { recover, supervisor, ...lasting } = spec;
  const { compInTask, noPartScan, ...options } = spec.device;
  const goOn = () => {
    if (leaving) throw interruption(recover);
  };
  const before = recover === undefined ? undefined : readState(recover);
  if (spec.watch && !quiescible(control)) throw lackError(UBLK_F_QUIESCE, "watch the module");
  const watched = spec.watch ? (spec.target.options as unknown as ModuleSpec).file : undefined;
  const loaded = watched === undefined ? 0 : versionOf(watched);
  makeStateDirectory(); // Before there is anything to undo.
  const target = await openTarget(control, spec, goOn, log);
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
      nodes: before?.nodes ?? [],
      goOn,
      confirm({ targetFlags }) {
        // Patience may have outlasted the device, and another one may have its id.
        if (readState(recover, targetFlags)?.pid === before?.pid) return;
        const hint = "another server has taken it over, or it is another device: see ubd list";
        throw new UblkError({ errno: "EBUSY", operation: "recover", device: recover, hint });
      },
    });
  if (leaving) await leave(control, device);
  const { id } = device.info;
  process.on(STOPPING_SIGNAL, () => device.stopping());
  if (watched !== undefined) watchModule(id, watched, loaded, log);
  const notes = [...target.notes, ...device.notes];
  if (device.info.queues < options.queues) {
    notes.push(`${device.info.queues} queues, not ${options.queues}: the driver has one per CPU`);
  }
  const facts = { name: targetName, dev_size: target.limits.sizeBytes, ...target.facts };
  const state = {
    mark: device.info.targetFlags,
    pid: process.pid,
    ...(supervisor !== undefined && { supervisor }),
    ...(unneeded && { leashed: true }),
    nodes: device.nodes,
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
    const forgetLog = daemon ? deviceLogRemover(id) : () => {};
    if (accepted) accepted.then(() => ours = true);
    else ours = true;
    const { dialect } = control;
    unneeded?.then(() => unused(dialect.blockName(id))).then(() => stopOrdered.resolve("signal"));
    const end = await Promise.race([device.ended, stopOrdered.promise]);
    if (end === "signal" && leaving) await leave(control, device);
    const quiesced = end !== "signal" && await device.isQuiesced();
    if (end === "signal") await device.stop();
    else device.letGo(quiesced);
    if (!quiesced) { // The next server needs both.
      removeState(id, process.pid);
      forgetLog();
    }
    await device.ended;
  } catch (error) {
    // The driver must not wait for a server that cannot go on: this process ends, and with it
    // every request fails, or waits for the next server, which needs the state.
    log(`device ${id} is no longer served: ${(error as Error).message}`, true);
    if (!spec.recovery) removeState(id, process.pid);
    throw error;
  }
}

/** Lets go of a device that was taken over; where no command does that, this process's end does. */
async function leave(control: Control, device: Device): Promise<never> {
  const { id, flags } = device.info;
  // Why not with batches: cli/quiesce.ts.
  if (flags & UBLK_F_QUIESCE && !(flags & UBLK_F_BATCH_IO)) {
    device.ended.then(() => device.letGo(true));
    await Device.quiesce(control, id);
  }
  throw interruption(id);
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
 *
 * @param goOn called before each try; may throw.
 */
async function openTarget(
  control: Control,
  spec: ServerSpec,
  goOn: () => void,
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
  if (spec.recover === undefined) await refuseAwaited(control, spec);
  const options = spec.recover === undefined ? spec.target.options : {
    ...spec.target.options,
    sizeBytes: Number((await control.getParams(spec.recover)).basic.dev_sectors) * SECTOR_BYTES,
  };
  const context = { shim, hasVolatileCache: dialect.hasVolatileCache };
  const deadline = performance.now() + (spec.recover === undefined ? 0 : LOCK_PATIENCE_MS);
  for (;;) {
    goOn();
    try {
      return findTarget(name).open(options, context);
    } catch (error) {
      const busy = error instanceof UblkError && error.errno === "EBUSY";
      if (!busy) throw error;
      if (performance.now() > deadline) throw (await hasServer(control, spec.recover)) ?? error;
      await sleep(100);
    }
  }
}

/** What to say when the files of a device that is to be recovered stay locked: mostly this. */
async function hasServer(control: Control, id?: number): Promise<UblkError | undefined> {
  if (id === undefined) return undefined;
  const { pid } = await control.getDeviceInfo(id);
  if (pid <= 0 || !existsSync(`/proc/${pid}`)) return undefined;
  const hint = `its server, process ${pid}, is alive; ubd upgrade -n ID replaces it by another`;
  return new UblkError({ errno: "EBUSY", operation: "recover", device: id, hint });
}

/**
 * A device that waits for its next server keeps no lock on its files, and yet may be mounted: who
 * served them a second time would write behind its back.
 *
 * @throws {UblkError} EBUSY: such a device has one of these files.
 */
async function refuseAwaited(control: Control, spec: ServerSpec): Promise<void> {
  if (spec.target.options.force) return;
  const files = await filesOf(spec);
  if (files.length === 0) return;
  for (const id of deviceIds(control)) {
    const known = readState(id);
    const told = known && specOf(known);
    if (!told || !("spec" in told)) continue; // The next server of that device cannot be told it, too.
    const other = told.spec;
    if (!other.recovery || (spec.target.options.readOnly && other.target.options.readOnly)) {
      continue;
    }
    if (!(await awaitsServer(control, id))) continue;
    const shared = (await filesOf(other)).find(({ key }) => files.some((file) => file.key === key));
    if (!shared) continue;
    throw new UblkError({
      errno: "EBUSY",
      operation: `serve ${shared.path}`,
      hint: `device ${id} has it, and waits for a server: ubd recover -n ${id}, or ` +
        `ubd del -n ${id}; add --force if you are sure`,
    });
  }
}

/** While the last server of a device lives, its lock is enough. */
async function awaitsServer(control: Control, id: number): Promise<boolean> {
  try {
    const { state, targetFlags } = await control.getDeviceInfo(id);
    const known = readState(id, targetFlags);
    if (!known) return false; // It is another device.
    if (state === UBLK_S_DEV_LIVE) return !existsSync(`/proc/${known.pid}`);
    return state !== UBLK_S_DEV_DEAD;
  } catch (error) {
    if (isNoneOfOurs(error)) return false;
    throw error;
  }
}

/** What a built-in target has its data in, as far as it is there and answers. */
async function filesOf({ target: { name, options } }: ServerSpec) {
  if (isDefined(name)) return [];
  const { file, files = [] } = options as { file?: string; files?: string[] };
  const found: { path: string; key: string }[] = [];
  for (const path of [...(file === undefined ? [] : [file]), ...files]) {
    // A network's mount may be what that server died of; a new one must not wait for it as well.
    const late = sleep(STAT_PATIENCE_MS, undefined, { ref: false });
    const stats = await Promise.race([stat(path).catch(() => undefined), late]);
    if (stats) found.push({ path, key: `${stats.dev}:${stats.ino}` });
  }
  return found;
}

/** The hidden verb's whole program. */
export async function runServer(): Promise<number> {
  const leashed = process.argv.includes(LEASHED);
  const input = linesOf(process.stdin);
  const { value: line } = await input.next();
  if (line === undefined) return EXIT.INTERRUPTED; // The caller died first.
  const letGo = input.next().then(() => {}, () => {}); // Nothing more is ever written.
  const spec = JSON.parse(line) as ServerSpec;
  const shim = new Shim();
  shim.native.ubd_close_on_exec(); // What a module starts has no business with the answers.
  const log = createServerLog(boundDeviceLog(shim, isDefined(spec.target.name)));
  try {
    if (isSupervisor(spec)) return await supervise(spec, log);
    await serve(spec, {
      daemon: true,
      log,
      onAdded: (id) => answer({ type: "added", id }),
      onLive: (live) => {
        nameDeviceLog(live.id);
        const [, , , callersNamespace = ""] = process.argv;
        if (!hasOwnMounts(callersNamespace)) {
          log(
            `device ${live.id}: its server shares the mounts of who started it; ` +
              `unmount ${live.path} there before it ends`,
            true,
          );
        } else if (!isDefined(spec.target.name)) {
          detachMounts(shim);
        }
        answer({ type: "live", live });
      },
      ...(leashed ? { unneeded: letGo } : { accepted: letGo }),
    });
    return EXIT.OK;
  } catch (error) {
    const failure = toFailure(error);
    answer({ type: "failed", failure });
    return failure.exitCode;
  }
}
