// SPDX-License-Identifier: MIT
/**
 * How a server opens its target, and sees to it that nobody else serves its files.
 * @module
 */

import { constants } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE } from "../abi/ublk_cmd.ts";
import type { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { descriptorPath, isSameFile } from "../core/file_identity.ts";
import { Process } from "../core/proc.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import { openInThread, startQueueThread, unless } from "../core/queue_thread.ts";
import { readState } from "../core/state.ts";
import type { OpenTarget } from "../core/target.ts";
import type { Shim } from "../ffi/mod.ts";
import { lockFile } from "../targets/backing.ts";
import { findTarget, isDefined } from "../targets/mod.ts";
import { MODULE_TARGET, type ModuleSpec } from "../targets/module.ts";
import { queueThreadEntry } from "../targets/queue_thread.ts";
import { type BackingFile, filesOf, type HeldFiles, holdFiles } from "./backing_files.ts";
import { deviceIds, isNoneOfOurs } from "./describe.ts";
import { specOf } from "./spec.ts";
import type { ServerSpec } from "./start_server.ts";

const LOCK_PATIENCE_MS = 10_000;

/**
 * In recovery, the kernel may still be letting go of what the old server had locked, and it knows
 * the device's size: that may have changed since it was added.
 *
 * @param held the files of the spec.
 * @param signal ends the wait.
 * @returns the target, and its files, for the state file.
 */
export async function openTarget(
  control: Control,
  spec: ServerSpec,
  held: HeldFiles,
  signal: AbortSignal,
  log: (text: string) => void,
): Promise<{ target: OpenTarget; files: readonly BackingFile[] }> {
  const { dialect, shim } = control;
  const { name } = spec.target;
  if (spec.recover === undefined) await refuseAwaited(control, spec, held.files);
  const patiently = async <T>(work: () => T): Promise<T> => {
    const deadline = performance.now() + (spec.recover === undefined ? 0 : LOCK_PATIENCE_MS);
    for (;;) {
      signal.throwIfAborted();
      try {
        return work();
      } catch (error) {
        const busy = error instanceof UblkError && error.errno === "EBUSY";
        if (!busy) throw error;
        if (performance.now() > deadline) throw (await hasServer(control, spec.recover)) ?? error;
        await sleep(100);
      }
    }
  };
  if (isDefined(name)) {
    const locked = name === MODULE_TARGET ? held : await patiently(() => lockHeld(held, shim));
    return await openDefined(control, spec, locked, signal, log);
  }
  const known = spec.recover === undefined ? undefined : await control.getParams(spec.recover);
  const options = {
    ...spec.target.options,
    // A partition table that was written meanwhile must not change its blocks.
    ...(known && {
      sizeBytes: Number(known.basic.dev_sectors) * SECTOR_BYTES,
      blockBytes: 2 ** known.basic.logical_bs_shift,
    }),
  };
  const context = { shim, hasVolatileCache: dialect.hasVolatileCache, held: held.find };
  const target = await patiently(() => findTarget(name).open(options, context));
  return { target: letsGo(target, held), files: held.known() };
}

/**
 * Locks what a target keeps its data in: it opens that itself, in each of its queues. A module has
 * locks of its own, or none.
 *
 * @returns the same files, whose locks end when they are closed. @throws {UblkError} EBUSY.
 */
export function lockHeld(held: HeldFiles, shim: Shim): HeldFiles {
  const locks: number[] = [];
  const unlock = () => {
    for (const fd of locks) shim.native.ubd_close(fd);
  };
  try {
    for (const [nth, { path, optional }] of held.files.entries()) {
      const flags = constants.O_RDWR | constants.O_NONBLOCK;
      const fd = optional ? -1 : shim.open(descriptorPath(held.fds[nth]!), flags);
      if (fd < 0) continue; // What is wrong with it, the target will say.
      locks.push(fd);
      lockFile({ path, fd, readOnly: false }, shim);
    }
  } catch (error) {
    unlock();
    throw error;
  }
  return {
    ...held,
    close() {
      unlock();
      held.close();
    },
  };
}

/** In the thread that serves it. What files a module keeps its data in is known only then. */
async function openDefined(
  { shim }: Control,
  spec: ServerSpec,
  held: HeldFiles,
  signal: AbortSignal,
  log: (text: string) => void,
): Promise<{ target: OpenTarget; files: readonly BackingFile[] }> {
  const { name, options } = spec.target;
  const { file: module, options: given = {}, ...rest } = options as Partial<ModuleSpec>;
  const facts = { ...(module && { module }), ...given } as OpenTarget["facts"];
  const handed = Object.entries(given).map(([option, value]) => {
    const fd = typeof value === "string" && !module ? held.find(value) : undefined;
    return [option, fd === undefined ? value : descriptorPath(fd)];
  });
  const ownOptions = {
    ...rest,
    ...(module && { file: module }),
    options: Object.fromEntries(handed),
  };
  const target = await openInThread(
    queueThreadEntry,
    { name, spec: ownOptions },
    facts,
    shim,
    log,
    signal,
  );
  if (!module) return { target: letsGo(target, held), files: held.known() };
  try {
    const known = new Map(spec.files?.map((file) => [file.path, file]));
    const files = target.files!.map((path) => known.get(path) ?? { path });
    const again = holdFiles(
      shim,
      files,
      spec.recover === undefined ? undefined : { device: spec.recover },
    );
    held.close();
    return { target: letsGo(target, again), files: again.known() };
  } catch (error) {
    target.close();
    throw error;
  }
}

/** That a module can be loaded is seen before the old server lets go. */
export async function loadTarget(
  { shim }: Control,
  { target: { name, options } }: ServerSpec,
  signal: AbortSignal,
  log: (text: string) => void,
): Promise<void> {
  if (name !== MODULE_TARGET) return;
  const target = { name, spec: { ...options, loadOnly: true } };
  const thread = startQueueThread(queueThreadEntry, target, 0, shim, log);
  try {
    await unless(signal, thread.opened);
  } finally {
    thread.abandon();
  }
}

/** Whoever waits for the device's end may unmount what its files were on. */
function letsGo(target: OpenTarget, held: HeldFiles): OpenTarget {
  return {
    ...target,
    close() {
      held.close();
      target.close();
    },
  };
}

/** What to say when the files of a device that is to be recovered stay locked: mostly this. */
async function hasServer(control: Control, id?: number): Promise<UblkError | undefined> {
  if (id === undefined) return undefined;
  const { pid } = await control.getDeviceInfo(id);
  if (pid <= 0 || !Process.find(pid)) return undefined;
  const hint = `its server, process ${pid}, is alive; ubd upgrade -n ID replaces it by another`;
  return new UblkError({ errno: "EBUSY", operation: "recover", device: id, hint });
}

/**
 * A device that waits for its next server keeps no lock on its files, and yet may be mounted: who
 * served them a second time would write behind its back.
 *
 * @throws {UblkError} EBUSY: such a device has one of these files.
 */
export async function refuseAwaited(
  control: Control,
  spec: ServerSpec,
  files: readonly BackingFile[],
): Promise<void> {
  if (spec.target.options.force || files.length === 0) return;
  for (const id of deviceIds(control)) {
    const known = readState(id);
    const told = known && specOf(known);
    if (!told || !("spec" in told)) continue; // The next server of that device cannot be told it, too.
    const other = told.spec;
    if (!other.recovery || (spec.target.options.readOnly && other.target.options.readOnly)) {
      continue;
    }
    if (!(await awaitsServer(control, id))) continue;
    const others = filesOf(other);
    const shared = files.find((file) => others.some((known) => areSame(file, known)));
    if (!shared) continue;
    throw new UblkError({
      errno: "EBUSY",
      operation: `serve ${shared.path}`,
      hint: `device ${id} has it, and waits for a server: ubd recover -n ${id}, or ` +
        `ubd del -n ${id}; add --force if you are sure`,
    });
  }
}

function areSame(one: BackingFile, other: BackingFile): boolean {
  if (one.optional || other.optional) return false;
  if (one.identity && other.identity) return isSameFile(one.identity, other.identity);
  return one.path === other.path;
}

/** While the last server of a device lives, its lock is enough. */
async function awaitsServer(control: Control, id: number): Promise<boolean> {
  try {
    const { state, targetFlags } = await control.getDeviceInfo(id);
    const known = readState(id, targetFlags);
    if (!known) return false; // It is another device.
    if (state === UBLK_S_DEV_LIVE) return !Process.find(known.pid);
    return state !== UBLK_S_DEV_DEAD;
  } catch (error) {
    if (isNoneOfOurs(error)) return false;
    throw error;
  }
}
