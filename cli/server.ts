// SPDX-License-Identifier: MIT
/**
 * The process that serves a device: `ubd add` starts it (cli/start_server.ts), or is it itself with
 * `--foreground`.
 * @module
 */

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
} from "../abi/ublk_cmd.ts";
import { Control, lackError } from "../core/control.ts";
import { Device } from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import { detachMounts, harden, hasOwnMounts } from "../core/isolation.ts";
import { makeStateDirectory, readState, removeState, writeState } from "../core/state.ts";
import { deviceUsers } from "../core/users.ts";
import { Shim } from "../ffi/mod.ts";
import { isDefined } from "../targets/mod.ts";
import { MODULE_TARGET, type ModuleSpec } from "../targets/module.ts";
import { queueThreadEntry } from "../targets/queue_thread.ts";
import { filesOf, type HeldFiles, heldFiles } from "./backing_files.ts";
import { boundDeviceLog, deviceLogRemover, nameDeviceLog } from "./device_log.ts";
import { EXIT, toFailure } from "./exit.ts";
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
  STOPPING_SIGNAL,
} from "./start_server.ts";
import { openTarget } from "./open_target.ts";
import { supervise } from "./supervise.ts";
import { surviveShutdown } from "./systemd.ts";
import { versionOf, watchModule } from "./watch.ts";

const RECOVERY_FLAGS: Record<RecoveryMode, bigint> = {
  wait: UBLK_F_USER_RECOVERY,
  reissue: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
  fail: UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
};

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
 * @throws what kept it from becoming LIVE, or a queue thread's failure; no device is served then.
 */
export async function serve(
  spec: ServerSpec,
  { held, daemon, log, onAdded, onLive, accepted, unneeded }: ServeOptions,
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
  const { target, files } = await openTarget(control, spec, held, goOn, log);
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
    spec: { ...lasting, ...(files.length > 0 && { files }) },
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
      held: heldFiles(shim, filesOf(spec), handedFds(spec)),
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
    return failure.exitCode;
  }
}
