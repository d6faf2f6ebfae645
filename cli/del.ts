// SPDX-License-Identifier: MIT
/** `ubd del`: stops and deletes devices, whoever serves them. @module */

import { existsSync } from "node:fs";
import process from "node:process";
import { clearTimeout, setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { type Command, Option } from "commander";
import { UBLK_F_SAFE_STOP_DEV, UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE } from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { checkpoint } from "../core/checkpoint.ts";
import { ignoring, UblkError, UsageError } from "../core/error.ts";
import { readState, removeState } from "../core/state.ts";
import { charDeviceOpeners, deviceUsers } from "../core/users.ts";
import { deviceIds, isNoneOfOurs } from "./describe.ts";
import { deviceLogRemover } from "./device_log.ts";
import { reportFailure, toFailure } from "./exit.ts";
import { printJson } from "./output.ts";
import { STOPPING_SIGNAL } from "./start_server.ts";
import { parseDeviceId } from "./size.ts";

/** The server has let go when DEL_DEV ends; its process needs a moment more. */
const SERVER_EXIT_DEADLINE_MS = 3000;

/** With --force, a server that has not answered its requests by then is killed. */
const FORCE_PATIENCE_MS = 5000;

/** udev opens every device that changes, for a moment: TRY_STOP_DEV is tried again so long. */
const TRY_STOP_PATIENCE_MS = 2000;

/** How long a server may take for the requests in flight before it is told that it stops. */
const STOP_PATIENCE_MS = 1000;

interface DelOptions {
  number?: number;
  all?: boolean;
  force?: boolean;
  ifUnused?: boolean;
  lazy?: boolean;
  async?: boolean;
  json?: boolean;
}

/** How far a deletion may go, and what it waits for. */
export interface Deletion {
  /** Even in use: the users get I/O errors. */
  force?: boolean;
  /** The driver itself is asked whether the device is in use, as it stops. */
  ifUnused?: boolean;
  /** Without waiting until the last one has let go. */
  lazy?: boolean;
}

export function defineDel(program: Command): void {
  program.command("del")
    .summary("stop and delete devices")
    .description(
      "Stops and deletes devices. I/O in flight is finished first. A device that is mounted, " +
        "swap, held by another device or open in a process is refused.\n\n" +
        "  ubd del 0            /dev/ublkb0; the path will do too\n" +
        "  ubd del -a           all of them",
    )
    .argument("[device...]", "ids, or paths such as /dev/ublkb0")
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("-a, --all", "all devices")
    .option("--force", "even in use or hung: its users get I/O errors")
    .option("--if-unused", "let the driver check for users as it stops, where it can (7.0)")
    .option("--lazy", "do not wait until the last one has let go; the kernel finishes (6.9)")
    .addOption(new Option("--async").hideHelp())
    .action(del);
}

async function del(devices: string[], options: DelOptions): Promise<void> {
  const ids = devices.map(parseDeviceId);
  if (options.number !== undefined) ids.push(options.number);
  if (options.all && ids.length > 0) throw new UsageError("Name devices, or say --all: not both");
  if (!options.all && ids.length === 0) {
    throw new UsageError("Which device? ubd del -n ID, or ubd del --all");
  }
  if (options.ifUnused && options.force) {
    throw new UsageError("--if-unused and --force exclude each other");
  }
  const deletion = { ...options, lazy: options.lazy || options.async || false };

  using control = await Control.open();
  const deleted: number[] = [];
  let failed: unknown;
  for (const id of new Set(options.all ? deviceIds(control) : ids)) {
    try {
      await deleteDevice(control, id, deletion);
      deleted.push(id);
    } catch (error) {
      if (options.all && isNoneOfOurs(error)) continue;
      if (failed !== undefined) reportFailure(toFailure(failed), false);
      failed = error;
    }
  }
  if (failed !== undefined) throw failed;
  if (options.json) printJson({ deleted });
}

/** @throws {UblkError} EBUSY: somebody uses it, and `force` is false. */
export async function deleteDevice(
  control: Control,
  id: number,
  { force = false, ifUnused = false, lazy = false }: Deletion,
): Promise<void> {
  const { pid: lastPid, state } = await control.getDeviceInfo(id);
  // A device that nobody serves keeps the last server's: it may be another process's by now.
  const pid = state === UBLK_S_DEV_LIVE ? lastPid : -1;
  if (!force) await refuseUsed(control, id);
  const statePid = readState(id)?.pid;
  const forgetLog = deviceLogRemover(id);
  const canTry = ((control.features ?? 0n) & UBLK_F_SAFE_STOP_DEV) !== 0n;
  const tried = ifUnused && canTry && state !== UBLK_S_DEV_DEAD;
  if (tried) await stopUnused(control, id);
  using _ = hurrying(control, id, pid, force);
  // DEL_DEV stops too: one that the kernel refuses, because it is lazy, must not have stopped.
  if (!tried && !lazy) await control.stopDevice(id);
  checkpoint("stopped");
  // Its server, or another `ubd del`, may have been faster.
  const deleting = lazy
    ? control.deleteDeviceLater(id)
    : force
    ? deleteHeld(control, id)
    : control.deleteDevice(id);
  await ignoring(["ENODEV"], deleting);
  checkpoint("deleted");
  if (statePid !== undefined) removeState(id, statePid);
  forgetLog();
  if (lazy) return;
  const deadline = performance.now() + SERVER_EXIT_DEADLINE_MS;
  while (pid > 0 && existsSync(`/proc/${pid}`) && performance.now() < deadline) await sleep(5);
}

async function stopUnused(control: Control, id: number): Promise<void> {
  const deadline = performance.now() + TRY_STOP_PATIENCE_MS;
  for (;;) {
    try {
      return await control.tryStopDevice(id);
    } catch (error) {
      const busy = error instanceof UblkError && error.errno === "EBUSY";
      if (!busy || performance.now() > deadline) throw error;
    }
    await refuseUsed(control, id);
    await sleep(50);
  }
}

/**
 * The driver waits for requests being served, and these may wait for something far away, or for
 * ever. A server of ours is told, and by --force killed, when that takes long; nobody else is,
 * should it have died since and its process id be in other hands.
 */
function hurrying(control: Control, id: number, pid: number, force: boolean): Disposable {
  const send = (signal: NodeJS.Signals) => {
    if (pid <= 0 || readState(id)?.pid !== pid) return;
    if (!charDeviceOpeners(control.dialect.charName(id)).includes(pid)) return;
    try {
      process.kill(pid, signal);
    } catch { /* it has just ended */ }
  };
  const timers = [setTimeout(send, STOP_PATIENCE_MS, STOPPING_SIGNAL)];
  if (force) timers.push(setTimeout(send, FORCE_PATIENCE_MS, "SIGKILL"));
  return { [Symbol.dispose]: () => timers.forEach((timer) => clearTimeout(timer)) };
}

/** DEL_DEV would wait for whoever still has the device open; the kernel can do that by itself. */
async function deleteHeld(control: Control, id: number): Promise<void> {
  try {
    await control.deleteDeviceLater(id);
  } catch (error) {
    const lacking = error instanceof UblkError && ["EOPNOTSUPP", "EINVAL"].includes(error.errno);
    if (!lacking) throw error; // Kernels before 6.9, and unprivileged devices, lack it.
    await control.deleteDevice(id);
  }
}

async function refuseUsed(control: Control, id: number): Promise<void> {
  const users = await deviceUsers(control.dialect.blockName(id));
  if (users.length === 0) return;
  throw new UblkError({
    errno: "EBUSY",
    operation: "delete",
    device: id,
    hint: `${users.join("; ")}; end that first, or add --force: its users then get I/O errors`,
  });
}
