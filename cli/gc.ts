// SPDX-License-Identifier: MIT
/**
 * `ubd gc`: removes what servers that were killed have left behind.
 *
 * A device counts as served when it is LIVE, or when a process has its character device open: one
 * that is just being added, or recovered. What looks abandoned is looked at again after a while,
 * since an add, a del or a recover may be in a step that looks the same.
 * @module
 */

import { basename, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { Command } from "commander";
import { STATE_NAMES, UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE } from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { Process } from "../core/proc.ts";
import { makerOf, readState, removeStateName, stateDirectory, stateNames } from "../core/state.ts";
import { charDeviceOpeners } from "../core/users.ts";
import { deleteDevice } from "./del.ts";
import { deviceIds } from "./describe.ts";
import { reportFailure, toFailure } from "./exit.ts";
import { print, printJson, tell } from "./output.ts";

/** Between the two looks. */
const GRACE_MS = 1000;

interface GcOptions {
  all?: boolean;
  force?: boolean;
  dryRun?: boolean;
  json?: boolean;
}

/** A device or a file that nobody looks after. */
export interface Leftover {
  device?: number;
  file?: string;
  why: string;
  /** Which options let it be removed. */
  needs: ("--all" | "--force")[];
}

export function defineGc(program: Command): void {
  program.command("gc")
    .summary("remove devices whose server is gone, and stale state files")
    .description(
      "Removes dead devices that ubd had served, and state files without a device. It never " +
        "touches a device that is served.",
    )
    .option("--force", "also devices that could be recovered: their unfinished I/O fails")
    .option("--all", "also dead devices of other programs")
    .option("--dry-run", "only say what would be removed")
    .action(gc);
}

async function gc(options: GcOptions): Promise<void> {
  using control = await Control.open();
  let found = await leftovers(control);
  if (found.length > 0) {
    await sleep(GRACE_MS);
    const before = new Set(found.map(nameOf));
    found = (await leftovers(control)).filter((leftover) => before.has(nameOf(leftover)));
  }
  const given = { "--all": options.all, "--force": options.force };
  const may = ({ needs }: Leftover) => needs.every((option) => given[option]);
  const removable = found.filter(may);
  const kept = found.filter((leftover) => !may(leftover));
  const { removed, failures } = options.dryRun
    ? { removed: removable, failures: [] }
    : await removeAll(control, removable, may);
  const verb = options.dryRun ? "would remove" : "removed";
  for (const leftover of removed) {
    if (!options.json) print(`${verb} ${nameOf(leftover)}: ${leftover.why}\n`);
  }
  for (const leftover of kept) {
    tell(`kept ${nameOf(leftover)}: ${leftover.why}; ${leftover.needs.join(" ")} removes it`);
  }
  for (const failure of failures.slice(1)) reportFailure(toFailure(failure), false);
  if (failures.length > 0) throw failures[0];
  if (options.json) printJson({ removed, kept, dryRun: options.dryRun ?? false });
}

function nameOf({ device, file }: Leftover): string {
  return device === undefined ? file! : `device ${device}`;
}

async function leftovers(control: Control): Promise<Leftover[]> {
  const devices = deviceIds(control);
  const found: Leftover[] = [];
  for (const id of devices) {
    const leftover = await abandoned(control, id);
    if (leftover) found.push(leftover);
  }
  return [...found, ...staleFiles(devices)];
}

async function abandoned(control: Control, id: number): Promise<Leftover | undefined> {
  let info;
  try {
    info = await control.getDeviceInfo(id);
  } catch (error) {
    if (error instanceof UblkError && ["ENODEV", "EACCES", "EPERM"].includes(error.errno)) return;
    throw error;
  }
  const { state, targetFlags } = info;
  if (state === UBLK_S_DEV_LIVE) return undefined;
  if ((await charDeviceOpeners(control.dialect, id)).length > 0) return undefined;
  const known = readState(id, targetFlags);
  const server = known?.pid ?? makerOf(targetFlags);
  const needs: Leftover["needs"] = [];
  // One that still runs may be waiting for udev; whoever knows better can say so.
  const gone = known || server !== undefined && !Process.find(server);
  if (!gone) needs.push("--all");
  if (state !== UBLK_S_DEV_DEAD) needs.push("--force");
  const who = gone
    ? `its server (process ${server}) is gone`
    : server === undefined
    ? "a server that is not known to ubd is gone"
    : `process ${server}, which added it, does not serve it`;
  const more = state === UBLK_S_DEV_DEAD
    ? ""
    : gone && !known
    ? "; what it served is not known"
    : "; it can be recovered";
  return { device: id, why: `it is ${STATE_NAMES.get(state)}, ${who}${more}`, needs };
}

/**
 * State files and logs without a device, and those that a killed process was about to write. Other
 * names in the directory are none of ours, such as 007.json.
 */
export function staleFiles(devices: readonly number[]): (Leftover & { file: string })[] {
  return stateNames().flatMap((name) => {
    const [, id] = /^(0|[1-9]\d*)\.(?:json|log)$/.exec(name) ?? [];
    const [, writer] = /^\.(?:\d+|log)\.(\d+)$/.exec(name) ?? [];
    const file = join(stateDirectory(), name);
    if (id !== undefined && !devices.includes(Number(id))) {
      return [{ file, why: `there is no device ${id}`, needs: [] }];
    }
    if (writer !== undefined && !Process.find(Number(writer))) {
      return [{ file, why: `process ${writer} is gone`, needs: [] }];
    }
    return [];
  });
}

/**
 * Looks at each once more right before it removes it: to remove those before it may have taken
 * long, and a server have come meanwhile. One that cannot be removed does not keep the others.
 */
export async function removeAll(
  control: Control,
  leftovers: readonly Leftover[],
  may: (leftover: Leftover) => boolean,
): Promise<{ removed: Leftover[]; failures: unknown[] }> {
  const removed: Leftover[] = [];
  const failures: unknown[] = [];
  for (const leftover of leftovers) {
    const { device, file } = leftover;
    try {
      if (file !== undefined) {
        if (!staleFiles(deviceIds(control)).some((stale) => stale.file === file)) continue;
        removeStateName(basename(file));
      } else {
        const now = await abandoned(control, device!);
        if (!now || !may(now)) continue;
        await deleteDevice(control, device!, { force: true });
      }
      removed.push(leftover);
    } catch (error) {
      const gone = error instanceof UblkError && error.errno === "ENODEV";
      if (!gone) failures.push(error);
    }
  }
  return { removed, failures };
}
