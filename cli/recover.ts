// SPDX-License-Identifier: MIT
/** `ubd recover`: serves a device again whose server is gone. @module */

import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { readState } from "../core/state.ts";
import { show } from "./add.ts";
import { type ServerSpec, startServer } from "./start_server.ts";
import { oneDeviceId, parseDeviceId } from "./size.ts";

export function defineRecover(program: Command): void {
  program.command("recover")
    .summary("serve a device again whose server is gone")
    .description(
      "Starts a new server for a device that was added with --recovery and whose server is gone. " +
        "Id, path and mounts stay; what the server was told is taken from its state file.",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .action(recover);
}

async function recover(
  device: number | undefined,
  { number, json }: { number?: number; json?: boolean },
): Promise<void> {
  const id = oneDeviceId("recover", device, number);
  using control = await Control.open();
  const state = await knownState(control, id, "recover");
  await show(await startServer({ ...state.spec as ServerSpec, recover: id }), {
    json: json ?? false,
  });
}

/** @throws {UblkError} ENODEV: no such device; ENOENT: nobody knows what it served. */
export async function knownState(control: Control, id: number, operation: string) {
  const { targetFlags } = await control.getDeviceInfo(id);
  const state = readState(id, targetFlags);
  if (state) return state;
  throw new UblkError({
    errno: "ENOENT",
    operation,
    device: id,
    hint: "it has no state file, so what it serves is not known: it is another program's, or " +
      "ubd del -n ID and add it again",
  });
}
