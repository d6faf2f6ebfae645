// SPDX-License-Identifier: MIT
/**
 * `ubd resize`: changes the size of a device in use.
 *
 * One command to the driver is all: there is nothing to undo, and no server to tell. Its next
 * server takes the size from the driver, and this one looks there when it must know
 * (ServeContext.deviceBytes).
 * @module
 */

import type { Command } from "commander";
import { UBLK_F_UPDATE_SIZE, UBLK_S_DEV_DEAD } from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { checkpoint } from "../core/checkpoint.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import { findTarget, isDefined } from "../targets/mod.ts";
import { printJson, tell } from "./output.ts";
import { filesOf, holdFiles, servedSource, tellLostNames } from "./backing_files.ts";
import { knownState } from "./recover.ts";
import { formatSize, oneDeviceId, parseDeviceId, parseSize } from "./size.ts";

interface ResizeOptions {
  number?: number;
  force?: boolean;
  json?: boolean;
}

export function defineResize(program: Command): void {
  program.command("resize")
    .summary("change the size of a device in use")
    .description(
      "Changes the size of a device, mounted or not. Without a size, loop follows its file.\n\n" +
        "  truncate -s 2G disk.img; ubd resize -n 0\n" +
        "  resize2fs /dev/ublkb0     the file system is a matter of its own",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0; or -n")
    .argument("[size]", "the new size, such as 2G; default: what the file has")
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("--force", "also make it smaller: what lies behind the new end is out of reach")
    .action(resize);
}

async function resize(
  first: string | undefined,
  second: string | undefined,
  { number, force, json }: ResizeOptions,
): Promise<void> {
  const [device, size] = number === undefined ? [first, second] : [undefined, first];
  if (number !== undefined && second !== undefined) throw new UsageError("Name the device once");
  const id = oneDeviceId(
    "resize",
    device === undefined ? undefined : parseDeviceId(device),
    number,
  );
  const wanted = size === undefined ? undefined : parseSize(size, "Size");

  using control = await Control.open();
  const { spec } = await knownState(control, id, "resize");
  control.require(UBLK_F_UPDATE_SIZE, "UPDATE_SIZE", id);
  // Kernels before 7.0 fall over a device that was never started.
  const { state, pid } = await control.getDeviceInfo(id);
  if (state === UBLK_S_DEV_DEAD) {
    const hint = "it is not LIVE: see ubd list";
    throw new UblkError({ errno: "EINVAL", operation: "UPDATE_SIZE", device: id, hint });
  }
  const { basic } = await control.getParams(id);
  const before = Number(basic.dev_sectors) * SECTOR_BYTES;
  const { name, options } = spec.target;
  if (isDefined(name)) {
    const hint = "a target of your own has the size that its open() said, as long as it is served";
    throw new UblkError({ errno: "EOPNOTSUPP", operation: "resize", device: id, hint });
  }
  const { sizeBytes: _, ...others } = options;
  // Whatever was chosen when it was added.
  const rest = { ...others, blockBytes: 2 ** basic.logical_bs_shift };
  const { shim, dialect } = control;
  // What its server has open is the device's, whatever has the name by now.
  const held = holdFiles(shim, filesOf(spec), servedSource(id, pid, spec));
  const sizeBytes = findTarget(name).measure(
    wanted === undefined ? rest : { ...rest, sizeBytes: wanted },
    { shim, hasVolatileCache: dialect.hasVolatileCache, held: held.find },
  );
  tellLostNames(shim, held.known(), dialect.blockPath(id));
  held.close();
  if (sizeBytes < before && !force) {
    throw new UsageError(
      `Size ${sizeBytes}: device ${id} has ${before} bytes. Make what is on it smaller first, ` +
        "then add --force",
    );
  }
  checkpoint("measured");
  await control.updateSize(id, sizeBytes / SECTOR_BYTES);
  checkpoint("resized");
  const path = control.dialect.blockPath(id);
  if (json) printJson({ id, path, sizeBytes, before });
  else {
    const [now, then] = [formatSize(sizeBytes), formatSize(before)];
    tell(`${path} has ${now}${now === then ? "" : `, before ${then}`}`);
  }
}
