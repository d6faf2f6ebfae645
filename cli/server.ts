// SPDX-License-Identifier: MIT
/**
 * The process that serves a device: `ubd add` starts it (cli/start_server.ts), or is it itself with
 * `--foreground`.
 * @module
 */

import process from "node:process";
import { clearTimeout, setTimeout } from "node:timers";
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
} from "../abi/ublk_cmd.ts";
import { checkpoint } from "../core/checkpoint.ts";
import { Control, lackError } from "../core/control.ts";
import { Device } from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import { detachMounts, harden, hasOwnMounts } from "../core/isolation.ts";
import type { OpenTarget } from "../core/target.ts";
import {
  makersMark,
  makeStateDirectory,
  readState,
  removeState,
  writeState,
} from "../core/state.ts";
import { deviceUsers } from "../core/users.ts";
import { Shim } from "../ffi/mod.ts";
import { isDefined } from "../targets/mod.ts";
import { MODULE_TARGET, type ModuleSpec } from "../targets/module.ts";
import { queueThreadEntry } from "../targets/queue_thread.ts";
import { type BackingFile, filesOf, type HeldFiles, heldFiles } from "./backing_files.ts";
import { boundDeviceLog, deviceLogRemover, dropOwnDeviceLog, nameDeviceLog } from "./device_log.ts";
import { EXIT, toFailure } from "./exit.ts";
import { limitNotes, raiseLimits } from "./limits.ts";
import { letServerGo } from "./quiescing.ts";
import { diskWatch } from "./served_by.ts";
import { createServerLog, type ServerLog } from "./server_log.ts";
import {
  answer,
  handedFds,
  interruption,
  isSupervisor,
  LEASHED,
  linesOf,
  type Live,
  type RecoveryMode,
  type ServerSpec,
  START_TIMEOUT_S,
  STOPPING_SIGNAL,
  UNDO,
  undo,
  undoLater,
} from "./start_server.ts";
import { loadTarget, openTarget } from "./open_target.ts";
import { supervise } from "./supervise.ts";
import { surviveShutdown } from "./systemd.ts";
import { watchModule } from "./watch.ts";

const RECOVERY_FLAGS: Record<RecoveryMode, bigint> = {
  wait: UBLK_F_USER_RECOVERY,
  reissue: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
  fail: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
};

/** How long the target's own code may keep a thread that was told that the device stops. */
const DEAF_PATIENCE_MS = 10_000;

/** How long a stop that was announced may take to begin, as STOP_DEV may; and how often to look. */
const GOING_PATIENCE_MS = 60_000;
const GOING_PAUSE_MS = 100;

/** How often a server without a leash looks whether its device is still used. */
const USERS_PAUSE_MS = 500;

export interface ServeOptions {
  /** The files of the spec. */
  held: HeldFiles;
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
 * Until it is LIVE, the target's own code may take `startTimeoutS`, and the caller's end is an order
 * to end too; but a server that lives is made to let go to the end, and then replaced.
 *
 * @throws what kept it from becoming LIVE, or a queue thread's failure; no device is served then.
 */
export async function serve(spec: ServerSpec, options: ServeOptions): Promise<void> {
  const { daemon, log, accepted, unneeded } = options;
  const { recover } = spec;
  let ours = recover === undefined;
  /** What is to become of the device; the first order counts. */
  let order: "delete" | "leave" | undefined;
  const ordered = Promise.withResolvers<"ordered">();
  const starting = new AbortController();
  const interrupt = () => {
    order ??= ours ? "delete" : "leave";
    starting.abort(interruption(spec.quiesce ? undefined : recover)); // upgrade tells its state.
    ordered.resolve("ordered");
  };
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, interrupt);
  process.on("SIGHUP", () => daemon || interrupt());
  let live = false;
  if (!spec.quiesce) (unneeded ?? accepted)?.then(() => live || interrupt());

  if (spec.rootStorage) surviveShutdown();
  using control = await Control.open();
  raiseLimits(control.shim);
  harden(control.shim, { lockMemory: spec.lockMemory ?? false });
  if (spec.watch && !quiescible(control)) throw lackError(UBLK_F_QUIESCE, "watch the module");
  makeStateDirectory(); // Before there is anything to undo.
  const watched = spec.watch ? watch(spec, log) : undefined;
  const { device, facts, files, notes } = await begin(control, spec, options, starting);
  const { id, targetFlags } = device.info;

  const endIfDeaf = () => {
    setTimeout(() => {
      if (device.deaf.length === 0) return;
      const which = device.deaf.join(", ");
      log(`queue ${which} of device ${id}: the target's own code does not return; it ends`, true);
      // Only with this process. Whoever else stops the device deletes it, too.
      if (order === "delete") undoLater(id, targetFlags);
      process.exit(order === "leave" ? EXIT.INTERRUPTED : EXIT.OK);
    }, DEAF_PATIENCE_MS);
  };
  const isGoing = diskWatch(control.dialect.blockName(id));
  // Whoever sends this may be refused yet, or be another version: the disk itself tells.
  process.on(STOPPING_SIGNAL, async () => {
    if (!(await confirmed(isGoing))) return;
    device.stopping();
    endIfDeaf();
  });
  /** Does what was ordered; a device that is not LIVE to others yet ends as it began. */
  const end = async (what: "delete" | "leave") => {
    order ??= what;
    device.stopping();
    endIfDeaf();
    if (order === "delete") await device.stop();
    else await leave(control, device);
  };
  let forgetLog = () => {};
  try {
    starting.signal.throwIfAborted();
    writeState(id, {
      mark: targetFlags,
      pid: process.pid,
      ...(spec.supervisor !== undefined && { supervisor: spec.supervisor }),
      ...(unneeded && { leashed: true }),
      nodes: device.nodes,
      target: { name: spec.target.name, ...facts },
      queues: [...device.queues],
      spec: { ...lasting(spec), ...(files.length > 0 && { files }) },
    });
    live = true;
    options.onLive({ id, path: device.path, notes });
    if (daemon) forgetLog = deviceLogRemover(id);
    watched?.(id);
  } catch (error) {
    await end(ours ? "delete" : "leave");
    if (live && order === "delete") removeState(id, process.pid);
    throw error;
  }
  try {
    if (accepted) accepted.then(() => ours = true);
    else ours = true;
    unneeded?.then(() => unused(control.dialect.blockName(id))).then(interrupt);
    const why = await Promise.race([device.ended, ordered.promise]);
    if (why === "ordered") {
      await end(order!);
      if (order === "leave") throw interruption(id);
    }
    const quiesced = why !== "ordered" && await device.isQuiesced();
    if (why !== "ordered") device.letGo(quiesced);
    if (!quiesced) { // The next server needs both.
      removeState(id, process.pid);
      forgetLog();
    }
    await device.ended;
  } catch (error) {
    // The driver must not wait for a server that cannot go on: this process ends, and with it
    // every request fails, or waits for the next server, which needs the state.
    // Whoever ordered it to leave its device waits for the answer, and tells of it.
    if (order !== "leave") {
      log(`device ${id} is no longer served: ${(error as Error).message}`, true);
    }
    if (!spec.recovery) removeState(id, process.pid);
    throw error;
  }
}

/** What the next server is told. */
function lasting({ recover: _, supervisor: __, quiesce: ___, ...spec }: ServerSpec) {
  return spec;
}

/** One that is taken over must be served, watched or not. */
function watch(spec: ServerSpec, log: ServerLog): ((id: number) => void) | undefined {
  const { file } = spec.target.options as unknown as ModuleSpec;
  try {
    return watchModule(file, log);
  } catch (error) {
    if (spec.recover === undefined) throw error;
    log(`changes of ${file} are not taken: ${(error as Error).message}`, true);
    return undefined;
  }
}

interface Begun {
  device: Device;
  facts: OpenTarget["facts"];
  /** What it has its data in, for the state file. */
  files: readonly BackingFile[];
  notes: string[];
}

/**
 * Opens the target and makes the device, or takes it over. What fails is undone.
 *
 * @param starting aborted when the server is told to end; this aborts it when it takes too long.
 */
async function begin(
  control: Control,
  spec: ServerSpec,
  { held, log, onAdded }: ServeOptions,
  starting: AbortController,
): Promise<Begun> {
  const { signal } = starting;
  const { recover } = spec;
  const limitS = spec.startTimeoutS ?? START_TIMEOUT_S;
  const start = () =>
    setTimeout(() => {
      const hint = `its module or target was not ready after ${limitS} s: code that loops, or a ` +
        "promise that never settles? --start-timeout gives it longer";
      const errno = "ETIMEDOUT";
      starting.abort(new UblkError({ errno, operation: "start the server", hint }));
    }, limitS * 1000);
  let timer = start();
  if (recover !== undefined && spec.quiesce) {
    await loadTarget(control, spec, signal, log);
    clearTimeout(timer);
    await letServerGo(control, recover);
    checkpoint("quiesced");
    timer = start();
  }
  const { name: targetName } = spec.target;
  const before = recover === undefined ? undefined : readState(recover);
  let added: { id: number; mark: bigint } | undefined;
  try {
    const { target, files } = await openTarget(control, spec, held, signal, log);
    const served = { targetName, target, queueThreadEntry, log, signal };
    const { compInTask, noPartScan, ...options } = spec.device;
    const making = recover === undefined
      ? Device.create(control, {
        ...served,
        ...options,
        flags: (compInTask ? UBLK_F_URING_CMD_COMP_IN_TASK : 0n) |
          (noPartScan ? UBLK_F_NO_AUTO_PART_SCAN : 0n) |
          (spec.unprivileged ? UBLK_F_UNPRIVILEGED_DEV : 0n) |
          (spec.recovery ? RECOVERY_FLAGS[spec.recovery] | quiescible(control) : 0n),
        onAdded(id) {
          added = { id, mark: makersMark(process.pid) };
          onAdded(id);
        },
      })
      : Device.recover(control, recover, {
        ...served,
        threads: spec.device.threads,
        nodes: before?.nodes ?? [],
        confirm({ targetFlags }) {
          // Patience may have outlasted the device, and another one may have its id.
          if (readState(recover, targetFlags)?.pid === before?.pid) return;
          const hint = "another server has taken it over, or it is another device: see ubd list";
          throw new UblkError({ errno: "EBUSY", operation: "recover", device: recover, hint });
        },
      });
    const device = await undoneInTime(making, signal, () => {
      if (added) undoLater(added.id, added.mark);
    });
    const notes = [...target.notes, ...device.notes, ...limitNotes()];
    const { queues } = device.info;
    if (queues < spec.device.queues) {
      notes.push(`${queues} queues, not ${spec.device.queues}: the driver has one per CPU`);
    }
    const facts = { dev_size: target.limits.sizeBytes, ...target.facts };
    return { device, facts, files, notes };
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Awaits work that ends by itself when it is told to, unless the target's own code keeps it.
 *
 * @param abandon called when it does: the end of this process is then the only one.
 */
async function undoneInTime<T>(
  work: Promise<T>,
  signal: AbortSignal,
  abandon: () => void,
): Promise<T> {
  const told = new Promise<void>((resolve) => {
    if (signal.aborted) resolve();
    signal.addEventListener("abort", () => resolve(), { once: true });
  });
  const late = told.then(() => sleep(DEAF_PATIENCE_MS, undefined, { ref: false })).then(() => {
    throw signal.reason;
  });
  late.catch(() => {});
  let done = false;
  work.then(() => done = true, () => done = true);
  try {
    return await Promise.race([work, late]);
  } catch (error) {
    if (!done) abandon();
    throw error;
  }
}

/** Lets go of a device that was taken over; where no command does that, this process's end does. */
async function leave(control: Control, device: Device): Promise<void> {
  const { id, flags } = device.info;
  // Why not with batches: cli/quiesce.ts.
  if (!(flags & UBLK_F_QUIESCE) || flags & UBLK_F_BATCH_IO) return;
  device.ended.then(() => device.letGo(true), () => {});
  await Device.quiesce(control, id);
}

/** A device that a server may leave can also be told to be left, where the kernel knows how. */
function quiescible({ features = 0n }: Control): bigint {
  return features & UBLK_F_QUIESCE;
}

/** @returns false: the disk that somebody said is being stopped stays. */
async function confirmed(isGoing: () => boolean | undefined): Promise<boolean> {
  const deadline = performance.now() + GOING_PATIENCE_MS;
  while (isGoing() === false) {
    if (performance.now() > deadline) return false;
    await sleep(GOING_PAUSE_MS, undefined, { ref: false });
  }
  return true;
}

async function unused(blockName: string): Promise<void> {
  while ((await deviceUsers(blockName)).length > 0) await sleep(USERS_PAUSE_MS);
}

/** The hidden verb's whole program. */
export async function runServer(): Promise<number> {
  if (process.argv[4] === UNDO) return await undo(process.argv.slice(5));
  const leashed = process.argv.includes(LEASHED);
  const input = linesOf(process.stdin);
  const { value: line } = await input.next();
  if (line === undefined) { // The caller died first.
    dropOwnDeviceLog();
    return EXIT.INTERRUPTED;
  }
  const letGo = input.next().then(() => {}, () => {}); // Nothing more is ever written.
  const spec = JSON.parse(line) as ServerSpec;
  const shim = new Shim();
  shim.native.ubd_close_on_exec(); // What a module starts has no business with the answers.
  const log = createServerLog(boundDeviceLog(shim, isDefined(spec.target.name)));
  try {
    if (isSupervisor(spec)) return await supervise(spec, log);
    await serve(spec, {
      held: heldFiles(shim, filesOf(spec), handedFds(spec)),
      daemon: true,
      log,
      onAdded: (id) => answer({ type: "added", id, mark: `${makersMark(process.pid)}` }),
      onLive: (live) => {
        nameDeviceLog(live.id);
        const [, , , callersNamespace = ""] = process.argv;
        if (!hasOwnMounts(callersNamespace)) {
          log(
            `device ${live.id}: its server shares the mounts of who started it; ` +
              `unmount ${live.path} there before it ends`,
            true,
          );
        } else if (spec.target.name !== MODULE_TARGET) {
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
    dropOwnDeviceLog();
    return failure.exitCode;
  }
}
