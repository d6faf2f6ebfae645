// SPDX-License-Identifier: MIT
/** `ubd quiesce` and `ubd upgrade`: the server lets go of a device that stays. @module */

import process from "node:process";
import type { Command } from "commander";
import {
  UBLK_F_BATCH_IO,
  UBLK_F_QUIESCE,
  UBLK_F_USER_RECOVERY,
  UBLK_F_USER_RECOVERY_FAIL_IO,
  UBLK_F_USER_RECOVERY_REISSUE,
  UBLK_S_DEV_LIVE,
} from "../abi/ublk_cmd.ts";
import { Control, lackError } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { readState } from "../core/state.ts";
import { MODULE_TARGET, type ModuleSpec } from "../targets/module.ts";
import { checkModule } from "../targets/trust.ts";
import { show } from "./add.ts";
import { filesOf, holdFiles, servedSource, tellLostNames } from "./backing_files.ts";
import { EXIT } from "./exit.ts";
import { printJson, tell } from "./output.ts";
import { forsaken, isForsaken, letServerGo } from "./quiescing.ts";
import { knownState } from "./recover.ts";
import { startServer } from "./start_server.ts";
import { oneDeviceId, parseDeviceId } from "./size.ts";

interface QuiesceOptions {
  number?: number;
  force?: boolean;
  json?: boolean;
}

export function defineQuiesce(program: Command): void {
  program.command("quiesce")
    .summary("make a device's server let go, and the device wait for another")
    .description(
      "Makes the server finish what it is doing and end. The device, its mounts and its id stay; " +
        "new requests wait until ubd recover. Needs --recovery when the device was added.",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .action(quiesce);
}

export function defineUpgrade(program: Command): void {
  program.command("upgrade")
    .summary("hand a device to a server of this version")
    .description(
      "Makes the server finish what it is doing and end, and starts a new one from the program " +
        "that you run, with what the old one was told. I/O waits meanwhile and sees no error.",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("--force", "even with --recovery=fail: I/O fails meanwhile")
    .action(upgrade);
}

async function quiesce(device: number | undefined, options: QuiesceOptions): Promise<void> {
  const id = oneDeviceId("quiesce", device, options.number);
  using control = await Control.open();
  await refuseUnquiescible(control, id);
  const interrupted = deferSignals();
  await letServerGo(control, id);
  if (options.json) printJson({ quiesced: id });
  else tell(`device ${id} waits for a server: ubd recover -n ${id}`);
  if (interrupted()) process.exitCode = EXIT.INTERRUPTED;
}

async function upgrade(device: number | undefined, options: QuiesceOptions): Promise<void> {
  const id = oneDeviceId("upgrade", device, options.number);
  using control = await Control.open();
  const { spec, leashed } = await knownState(control, id, "upgrade");
  if (leashed) {
    const hint =
      "ubd run made it for the time of a command, and could not tell a new server when " +
      "that is over";
    throw new UblkError({ errno: "EOPNOTSUPP", operation: "upgrade", device: id, hint });
  }
  const flags = await refuseUnquiescible(control, id);
  if ((flags & UBLK_F_USER_RECOVERY_FAIL_IO) !== 0n && !options.force) {
    const hint = "it was added with --recovery=fail, so I/O fails meanwhile; add --force to accept";
    throw new UblkError({ errno: "EBUSY", operation: "upgrade", device: id, hint });
  }
  const next = { ...spec, recover: id, quiesce: true };
  const { name, options: told } = next.target;
  // What the new server would refuse is to be known while the old one serves.
  if (name === MODULE_TARGET) checkModule((told as unknown as ModuleSpec).file);
  const { pid } = await control.getDeviceInfo(id);
  const held = holdFiles(control.shim, filesOf(next), servedSource(id, pid, next));
  tellLostNames(control.shim, held.known(), control.dialect.blockPath(id));
  // The new server does it, once it has loaded what it is to serve, and whatever becomes of this.
  try {
    await show(await startServer(next, { held }), options);
  } catch (error) {
    await tellState(control, id).catch(() => {}); // It may be gone.
    throw error;
  }
}

/** What has become of a device whose upgrade has failed. */
async function tellState(control: Control, id: number): Promise<void> {
  const { state, targetFlags } = await control.getDeviceInfo(id);
  if (state !== UBLK_S_DEV_LIVE) tell(`device ${id} waits for a server: ubd recover -n ${id}`);
  else if (isForsaken(readState(id, targetFlags))) tell(forsaken(id));
  else tell(`device ${id} is served by its old server`);
}

/** A quiesce that has begun is seen through. @returns whether a signal has come meanwhile. */
function deferSignals(): () => boolean {
  let interrupted = false;
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => interrupted = true);
  }
  return () => interrupted;
}

/** @returns the device's flags. @throws {UblkError} what device or kernel lacks. */
async function refuseUnquiescible(control: Control, id: number): Promise<bigint> {
  const { flags, pid } = await control.getDeviceInfo(id);
  const recoverable = (flags & UBLK_F_USER_RECOVERY) !== 0n;
  const reissued = (flags & UBLK_F_USER_RECOVERY_REISSUE) !== 0n;
  const instead = reissued
    ? `; kill -9 ${pid}, then ubd recover -n ${id}: with recovery=reissue no I/O fails`
    : "";
  if (recoverable && ((control.features ?? 0n) & UBLK_F_QUIESCE) === 0n) {
    const { details } = lackError(UBLK_F_QUIESCE, "QUIESCE_DEV", id);
    throw new UblkError({ ...details, hint: `${details.hint}${instead}` });
  }
  // As of Linux 7.2: what cancels FETCH_IO_CMDS sets what fails requests before the device is gone.
  if (recoverable && (flags & UBLK_F_BATCH_IO) !== 0n) {
    const hint = `with --batch, the driver fails requests that come meanwhile${instead}`;
    throw new UblkError({ errno: "EOPNOTSUPP", operation: "QUIESCE_DEV", device: id, hint });
  }
  if (recoverable && (flags & UBLK_F_QUIESCE) !== 0n) return flags;
  control.requireCommand("QUIESCE_DEV", "QUIESCE_DEV", id);
  throw new UblkError({
    errno: "EOPNOTSUPP",
    operation: "QUIESCE_DEV",
    device: id,
    hint: "it was added without " + (recoverable ? "UBLK_F_QUIESCE" : "--recovery") +
      ": delete it and add it again",
  });
}
