// SPDX-License-Identifier: MIT
/** `ubd del`: stops and deletes devices, whoever serves them. @module */

import process from "node:process";
import { clearInterval, clearTimeout, setInterval, setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { type Command, Option } from "commander";
import { UBLK_F_SAFE_STOP_DEV, UBLK_S_DEV_DEAD } from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { checkpoint } from "../core/checkpoint.ts";
import { ignoring, UblkError, UsageError } from "../core/error.ts";
import { readState, removeState } from "../core/state.ts";
import { deviceNodes, findUsers, type Nodes, type Users } from "../core/users.ts";
import { deviceIds, holdersOf, isDeleted, isNoneOfOurs, takenError, whenFree } from "./describe.ts";
import { deviceLogRemover } from "./device_log.ts";
import { EXIT, ReportedError, reportFailure, toFailure } from "./exit.ts";
import { printJson, tell } from "./output.ts";
import { diskWatch, requestsInFlight, ServedBy } from "./served_by.ts";
import { STOPPING_SIGNAL } from "./start_server.ts";
import { oneDeviceId, parseDeviceId } from "./size.ts";

/** The server has let go when DEL_DEV ends; its process needs a moment more. */
const SERVER_EXIT_DEADLINE_MS = 15_000;

/** With --force, a server that has not answered its requests by then is killed. */
const FORCE_PATIENCE_MS = 5000;

/** udev opens every device that changes, for a moment: TRY_STOP_DEV is tried again so long. */
const TRY_STOP_PATIENCE_MS = 2000;

/** How long a server may take for the requests in flight before it is told that it stops. */
const STOP_PATIENCE_MS = 1000;

/** And before the caller is told what is waited for. */
const SILENCE_MS = 2000;

/** How long the driver may take to give an id back when nobody holds its device. */
const ID_PATIENCE_MS = 1000;

interface DelOptions {
  number?: number;
  all?: boolean;
  force?: boolean;
  lazy?: boolean;
  async?: boolean;
  json?: boolean;
}

/** How far a deletion may go, and what it waits for. */
export interface Deletion {
  /** Even in use: the users get I/O errors. */
  force?: boolean;
  /** Without waiting until the last one has let go. */
  lazy?: boolean;
  /** It is only stopped. */
  keep?: boolean;
  /** Told of each step, as what is left of the device when it is interrupted there. */
  onStep?: (left: string) => void;
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
    .option("--force", "even in use or hung: its users get I/O errors, its server is killed")
    .option("--lazy", "do not wait until the last one has let go; the kernel finishes (6.9)")
    .addOption(new Option("--if-unused").hideHelp().conflicts("force")) // What it always does.
    .addOption(new Option("--async").hideHelp())
    .action(del);
}

export function defineStop(program: Command): void {
  program.command("stop")
    .summary("stop a device and keep its id")
    .description(
      "Stops a device as del does, and leaves it in the driver: DEAD, without block device and " +
        "server, until it is deleted. Nothing can start it again; its id stays taken.",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("--force", "even in use or hung: its users get I/O errors, its server is killed")
    .action(stop);
}

async function stop(
  device: number | undefined,
  { number, force = false, json }: DelOptions,
): Promise<void> {
  const id = oneDeviceId("stop", device, number);
  using control = await Control.open();
  const keep = true;
  await interruptible(id, (onStep) => deleteDevice(control, id, { force, keep, onStep }));
  if (json) printJson({ stopped: id });
}

async function del(devices: string[], options: DelOptions): Promise<void> {
  const ids = devices.map(parseDeviceId);
  if (options.number !== undefined) ids.push(options.number);
  if (options.all && ids.length > 0) throw new UsageError("Name devices, or say --all: not both");
  if (!options.all && ids.length === 0) {
    throw new UsageError("Which device? ubd del -n ID, or ubd del --all");
  }
  const lazy = options.lazy || options.async || false;
  const force = options.force ?? false;

  using control = await Control.open();
  const deleted: number[] = [];
  const held: Record<number, readonly string[]> = {};
  let failed: unknown;
  for (const id of new Set(options.all ? deviceIds(control) : ids)) {
    try {
      const users = await interruptible(
        id,
        (onStep) => deleteDevice(control, id, { force, lazy, onStep }),
      );
      deleted.push(id);
      if (users) held[id] = users;
      if (users) tell(`device ${id} is deleted; ${whenFree(users)}`);
    } catch (error) {
      if (options.all && isNoneOfOurs(error)) continue;
      if (error instanceof ReportedError) throw error;
      if (failed !== undefined) reportFailure(toFailure(failed), false);
      failed = error;
    }
  }
  if (failed !== undefined) throw failed;
  if (options.json) printJson({ deleted, ...(Object.keys(held).length > 0 && { held }) });
}

/** Ends the wait at SIGINT and SIGTERM, whatever the driver does: it does it in another process. */
async function interruptible<T>(
  id: number,
  work: (onStep: (left: string) => void) => Promise<T>,
): Promise<T> {
  let left = "is as it was";
  const interrupted = Promise.withResolvers<never>();
  const interrupt = () => {
    const message = `interrupted; device ${id} ${left}`;
    interrupted.reject(new ReportedError({ message, exitCode: EXIT.INTERRUPTED }));
  };
  const signals = ["SIGINT", "SIGTERM"] as const;
  for (const signal of signals) process.on(signal, interrupt);
  try {
    return await Promise.race([work((step) => left = step), interrupted.promise]);
  } finally {
    for (const signal of signals) process.off(signal, interrupt);
  }
}

const ANOTHER = "it was deleted meanwhile, and its id is another device's now";

/**
 * Stops and deletes a device.
 *
 * @returns who keeps its id taken all the same, with `force` or `lazy`; undefined: it is free.
 * @throws {UblkError} EBUSY: somebody uses it, or its server is stopped, and `force` is false;
 * ETIMEDOUT: the driver waits, or the server does not end.
 */
export async function deleteDevice(
  control: Control,
  id: number,
  { force = false, lazy = false, keep = false, onStep = () => {} }: Deletion,
): Promise<readonly string[] | undefined> {
  control.apart = true;
  const info = await control.getDeviceInfo(id);
  const blockName = control.dialect.blockName(id);
  const heldBy = await holdersOf(control.dialect, id);
  if (heldBy) {
    if (!force && !lazy) throw takenError("EBUSY", "delete", id, heldBy);
    return heldBy;
  }
  const nodes = deviceNodes(blockName);
  const server = await ServedBy.find(control, info);
  if (server?.isStopped && !force) throw stoppedError(id, server);
  const statePid = readState(id)?.pid;
  const forgetLog = deviceLogRemover(id);
  const goOn = `ubd del ${id} goes on from there`;
  const kill = force ? "" : `; ubd del --force ${id} kills it`;
  const waiting = <T>(work: Promise<T>) => hurried(control, id, server, { force, kill }, work);

  // DEL_DEV stops too: one that the kernel refuses, because it is lazy, must not have stopped.
  const refusesLazy = lazy && control.isUnprivileged(id);
  const asks = !force && info.state !== UBLK_S_DEV_DEAD && !refusesLazy &&
    ((control.features ?? 0n) & UBLK_F_SAFE_STOP_DEV) !== 0n;
  const stopping = `is being stopped, by the driver, which goes on with that; ${goOn}`;
  if (!asks && !force) refuse(id, (await findUsers(nodes)).lines);
  // To look for users takes a while, and so does a stop: the id may be another device's by then.
  const refuseAnother = async () => {
    if ((await control.getDeviceInfo(id)).targetFlags === info.targetFlags) return;
    throw new UblkError({ errno: "ENODEV", operation: "delete", device: id, hint: ANOTHER });
  };
  await refuseAnother();
  onStep(stopping);
  const isGoing = diskWatch(blockName);
  // What may still be refused must not end anything in a server that then goes on.
  const asking = <T>(work: Promise<T>) =>
    hurried(control, id, server, { force, kill, mayTell: () => isGoing() === true }, work);
  const stopped = asks && await stopUnused(control, id, nodes, asking);
  if (!stopped && !lazy) await waiting(control.stopDevice(id));
  checkpoint("stopped");
  if (!keep) {
    onStep(`is stopped, and the driver deletes it when all have let go; ${goOn}`);
    // Its server, or another `ubd del`, may have been faster.
    const deleting = async () => {
      await refuseAnother();
      if (lazy) await control.deleteDeviceLater(id);
      else if (force) await deleteHeld(control, id);
      else await control.deleteDevice(id);
    };
    await ignoring(["ENODEV"], waiting(deleting()));
    checkpoint("deleted");
  }
  onStep(`is ${keep ? "stopped" : "deleted"}; its server is still to end`);
  if (statePid !== undefined) removeState(id, statePid);
  if (!keep) forgetLog();
  if (server && !lazy) {
    const kill = `; kill -9 ${server.process.pid} ends it`;
    await hurried(control, id, server, { force, kill }, serverGone(id, server));
  }
  return (force || lazy) && !keep ? await keptBy(control, id, nodes) : undefined;
}

/** The driver stops a device only while nobody has it open. @returns false: it is to be told to. */
async function stopUnused(
  control: Control,
  id: number,
  nodes: Nodes,
  waiting: <T>(work: Promise<T>) => Promise<T>,
): Promise<boolean> {
  const deadline = performance.now() + TRY_STOP_PATIENCE_MS;
  for (;;) {
    try {
      await waiting(control.tryStopDevice(id));
      return true;
    } catch (error) {
      if (!(error instanceof UblkError && error.errno === "EBUSY")) throw error;
    }
    const { lines, passing }: Users = await findUsers(nodes);
    refuse(id, lines);
    if (performance.now() > deadline) {
      if (passing) return false; // What udev's helpers wait for, the device does not answer.
      const unseen = "the driver says that somebody has it open, and nobody is to be seen from " +
        "here: a process that this user or pid namespace does not show, a mount whose namespace " +
        "has no process";
      refuse(id, [unseen]);
    }
    await sleep(50);
  }
}

/** @throws {UblkError} EBUSY: there are users. */
function refuse(id: number, users: readonly string[]): void {
  if (users.length === 0) return;
  throw new UblkError({
    errno: "EBUSY",
    operation: "delete",
    device: id,
    hint: `${users.join("; ")}; end that first, or add --force: its users then get I/O errors`,
  });
}

function stoppedError(id: number, server: ServedBy): UblkError {
  const { pid } = server.process;
  return new UblkError({
    errno: "EBUSY",
    operation: "delete",
    device: id,
    hint: `${server}: kill -CONT ${pid} lets it go on; or add --force, which kills it`,
  });
}

/**
 * Waits for work that needs the server. The driver waits for requests being served, and these may
 * wait for something far away, or for ever. A server of ours is told, and by --force killed, when
 * that takes long; nobody else is.
 *
 * @throws {UblkError} ETIMEDOUT, with what is waited for.
 */
async function hurried<T>(
  control: Control,
  id: number,
  server: ServedBy | undefined,
  { force, kill, mayTell = () => true }: {
    force: boolean;
    kill: string;
    /** Whether the device is certain to stop. */
    mayTell?: () => boolean;
  },
  work: Promise<T>,
): Promise<T> {
  const ours = server?.ours ? server : undefined;
  const send = (signal: NodeJS.Signals) => ours?.process.signal(control.shim, signal);
  const wait = () => {
    const requests = requestsInFlight(control.dialect.blockName(id));
    const who = server ? `${server}` : "the driver waits for somebody";
    return `${who}${requests && `; ${requests}`}${server ? kill : ""}`;
  };
  const telling = setInterval(() => {
    if (!mayTell()) return;
    clearInterval(telling);
    send(STOPPING_SIGNAL);
  }, STOP_PATIENCE_MS);
  const timers = [
    setTimeout(() => tell(`device ${id} takes its time: ${wait()}`), SILENCE_MS),
    // One that is stopped will not have answered in a while either.
    ...(force ? [setTimeout(send, ours?.isStopped ? 0 : FORCE_PATIENCE_MS, "SIGKILL")] : []),
  ];
  try {
    return await work;
  } catch (error) {
    if (!(error instanceof UblkError && error.errno === "ETIMEDOUT")) throw error;
    throw new UblkError({ ...error.details, hint: `${wait()}; ${error.hint}` });
  } finally {
    clearInterval(telling);
    for (const timer of timers) clearTimeout(timer);
  }
}

/** @throws {UblkError} ETIMEDOUT: what it has locked stays so. */
async function serverGone(id: number, server: ServedBy): Promise<void> {
  const deadline = performance.now() + SERVER_EXIT_DEADLINE_MS;
  while (!(await server.isGone())) {
    if (performance.now() > deadline) {
      const hint = "the device is deleted; what its server has locked stays so until that ends";
      throw new UblkError({ errno: "ETIMEDOUT", operation: "end the server", device: id, hint });
    }
    await sleep(5);
  }
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

/** @returns who keeps the id of a device that is deleted; undefined: it is free. */
async function keptBy(control: Control, id: number, nodes: Nodes) {
  const deadline = performance.now() + ID_PATIENCE_MS;
  for (;;) {
    try {
      await control.getDeviceInfo(id);
    } catch (error) {
      if (isNoneOfOurs(error)) return undefined;
      throw error;
    }
    if (!(await isDeleted(control.dialect, id))) return undefined; // Another one has it.
    if (performance.now() > deadline) return (await findUsers(nodes)).lines;
    await sleep(20);
  }
}
