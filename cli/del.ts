// SPDX-License-Identifier: MIT
/** `ubd del`: stops and deletes devices, whoever serves them. @module */

import { existsSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { removeState } from "../core/state.ts";
import { deviceIds } from "./describe.ts";
import { reportFailure, toFailure } from "./exit.ts";
import { parseDeviceId, parseInteger } from "./size.ts";

/** The server has let go when DEL_DEV ends; its process needs a moment more. */
const SERVER_EXIT_DEADLINE_MS = 3000;

interface DelOptions {
  number?: number;
  all?: boolean;
  json?: boolean;
}

export function defineDel(program: Command): void {
  program.command("del")
    .summary("stop and delete devices")
    .description(
      "Stops and deletes devices. I/O in flight is finished first.\n\n" +
        "  ubd del 0            /dev/ublkb0; the path will do too\n" +
        "  ubd del -a           all of them",
    )
    .argument("[device...]", "ids, or paths such as /dev/ublkb0")
    .option("-n, --number <id>", "device id", (text) => parseInteger(text, "Device id"))
    .option("-a, --all", "all devices")
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
      await deleteDevice(control, id);
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

async function deleteDevice(control: Control, id: number): Promise<void> {
  const { pid } = await control.getDeviceInfo(id);
  await control.stopDevice(id);
  await control.deleteDevice(id);
  removeState(id, pid);
  const deadline = performance.now() + SERVER_EXIT_DEADLINE_MS;
  while (pid > 0 && existsSync(`/proc/${pid}`) && performance.now() < deadline) await sleep(5);
}
