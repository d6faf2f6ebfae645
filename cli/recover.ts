// SPDX-License-Identifier: MIT
/** `ubd recover`: serves a device again whose server is gone. @module */

import type { Command } from "commander";
import { UBLK_S_DEV_LIVE } from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { type DeviceState, findState, quiescerOf, statePath } from "../core/state.ts";
import { deviceUsers } from "../core/users.ts";
import { show } from "./add.ts";
import { tell } from "./output.ts";
import { filesOf, holdFiles, lostNames, servedSource } from "./backing_files.ts";
import { quiescedError } from "./quiescing.ts";
import { specOf } from "./spec.ts";
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
    .option("--force", "serve another file that has the name now; for a device that nobody uses")
    .action(recover);
}

async function recover(
  device: number | undefined,
  { number, force, json }: { number?: number; force?: boolean; json?: boolean },
): Promise<void> {
  const id = oneDeviceId("recover", device, number);
  using control = await Control.open();
  control.requireCommand("START_USER_RECOVERY", "recover", id);
  const state = await knownState(control, id, "recover");
  const { state: driverState, pid } = await control.getDeviceInfo(id);
  const quiescer = driverState === UBLK_S_DEV_LIVE ? quiescerOf(state) : undefined;
  if (quiescer?.alive) throw quiescedError(id, quiescer.pid, "recover");
  const spec = { ...state.spec, recover: id, quiesce: quiescer !== undefined };
  const served = quiescer && servedSource(id, pid, spec);
  const source = served?.pid === undefined ? { device: id, force: force ?? false } : served;
  const held = holdFiles(control.shim, filesOf(spec), source);
  if (force && lostNames(control.shim, filesOf(spec)).length > 0) {
    for (const user of await deviceUsers(control.dialect.blockName(id))) {
      tell(`${user}: what it has in memory of the former file goes into the other one`);
    }
  }
  await show(await startServer(spec, { held }), { json: json ?? false });
}

/**
 * What the last server of a device was told, of a form that a new one takes.
 *
 * @throws {UblkError} ENODEV: no such device; ENOENT: nobody knows what it served; EINVAL: what its
 * state file says cannot be served.
 */
export async function knownState(
  control: Control,
  id: number,
  operation: string,
): Promise<DeviceState & { spec: ServerSpec }> {
  const { targetFlags } = await control.getDeviceInfo(id);
  const { state, fault } = findState(id, targetFlags);
  const told = state && specOf(state);
  if (told && "spec" in told) return { ...state, spec: told.spec };
  const why = told?.fault ?? fault;
  const again = `so what it serves is not known: ubd del -n ${id} and add it again`;
  const hint = why === undefined
    ? `it has no state file, ${again}; or it is another program's`
    : `${statePath(id)} cannot be used, ${why}, ${again}`;
  throw new UblkError({
    errno: why === undefined ? "ENOENT" : "EINVAL",
    operation,
    device: id,
    hint,
  });
}
