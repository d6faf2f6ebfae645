// SPDX-License-Identifier: MIT
/** `ubd del`: stops and deletes devices, whoever serves them. @module */

import { existsSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { readState, removeState } from "../core/state.ts";
import { deviceUsers } from "../core/users.ts";
import { deviceIds } from "./describe.ts";
import { reportFailure, toFailure } from "./exit.ts";
import { parseDeviceId, parseInteger } from "./size.ts";

/** The server has let go when DEL_DEV ends; its process needs a moment more. */
const SERVER_EXIT_DEADLINE_MS = 3000;

interface DelOptions {
  number?: number;
  all?: boolean;
  force?: boolean;
  json?: boolean;
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
    .option("-n, --number <id>", "device id", (text) => parseInteger(text, "Device id"))
    .option("-a, --all", "all devices")
    .option("--force", "even a device in use: its users get I/O errors")
    .action(del);
}

async function del(devices: string[], options: DelOptions): Promise<void> {
  const ids = devices.map(parseDeviceId);
  if (options.number !== undefined) ids.push(options.number);
  if (options.all && ids.length > 0) throw new UsageError("Name devices, or say --all: not both");
  if (!options.all && ids.length === 0) {
    throw new UsageError("Which device? ubd del -n ID, or ubd del --all");
  }
  const negative = ids.find((id) => id < 0);
  if (negative !== undefined) throw new UsageError(`Device id ${negative}: it must be 0 or more`);

  using control = await Control.open();
  const deleted: number[] = [];
  let failed: unknown;
  for (const id of new Set(options.all ? deviceIds(control) : ids)) {
    try {
      await deleteDevice(control, id, options.force ?? false);
      deleted.push(id);
    } catch (error) {
      const goneMeanwhile = options.all && error instanceof UblkError && error.errno === "ENODEV";
      if (goneMeanwhile) continue;
      if (failed !== undefined) reportFailure(toFailure(failed), false);
      failed = error;
    }
  }
  if (failed !== undefined) throw failed;
  if (options.json) console.log(JSON.stringify({ deleted }));
}

async function deleteDevice(control: Control, id: number, force: boolean): Promise<void> {
  const { pid } = await control.getDeviceInfo(id);
  if (!force) await refuseUsed(control, id);
  const statePid = readState(id)?.pid;
  await control.stopDevice(id);
  await (force ? deleteHeld(control, id) : control.deleteDevice(id));
  if (statePid !== undefined) removeState(id, statePid);
  const deadline = performance.now() + SERVER_EXIT_DEADLINE_MS;
  while (pid > 0 && existsSync(`/proc/${pid}`) && performance.now() < deadline) await sleep(5);
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
