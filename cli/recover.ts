// SPDX-License-Identifier: MIT
/** `ubd recover`: serves a device again whose server is gone. @module */

import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { readState } from "../core/state.ts";
import { show } from "./add.ts";
import { type ServerSpec, startServer } from "./server.ts";
import { parseDeviceId, parseInteger } from "./size.ts";

export function defineRecover(program: Command): void {
  program.command("recover")
    .summary("serve a device again whose server is gone")
    .description(
      "Starts a new server for a device that was added with --recovery and whose server is gone. " +
        "Id, path and mounts stay; what the server was told is taken from its state file.",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", (text) => parseInteger(text, "Device id"))
    .action(recover);
}

async function recover(
  device: number | undefined,
  { number, json }: { number?: number; json?: boolean },
): Promise<void> {
  const id = device ?? number;
  if (id === undefined) throw new UsageError("Which device? ubd recover -n ID");
  if (device !== undefined && number !== undefined) throw new UsageError("Name the device once");
  const state = await knownState(id);
  await show(await startServer({ ...state.spec as ServerSpec, recover: id }), {
    json: json ?? false,
  });
}

/** @throws {UblkError} ENODEV: no such device; ENOENT: nobody knows what it served. */
async function knownState(id: number) {
  using control = await Control.open();
  await control.getDeviceInfo(id);
  const state = readState(id);
  if (state) return state;
  throw new UblkError({
    errno: "ENOENT",
    operation: "recover",
    device: id,
    hint:
      "its state file is gone, so what it served is not known: ubd del -n ID, then add it again",
  });
}
