// SPDX-License-Identifier: MIT
/** Device ids as people type them, and the sizes and numbers of core/size.ts. @module */

import { UsageError } from "../core/error.ts";
import { checkDeviceId, parseInteger } from "../core/size.ts";

export { formatSize, parseInteger, parseSize } from "../core/size.ts";

/** As many as the kernel can be built for. */
const CPUS_MAX = 8192;

/** "[0,2]" as `ublk` has it, "0,2", or ranges as the kernel prints them: "0-3,8". */
export function parseCpus(text: string): number[] {
  const trimmed = text.trim();
  const list = trimmed.startsWith("[") && trimmed.endsWith("]") ? trimmed.slice(1, -1) : trimmed;
  const changes = new Int32Array(CPUS_MAX + 1);
  for (const part of list.split(",")) {
    const [, from, to = from] = /^(\d+)(?:-(\d+))?$/.exec(part.trim()) ?? [];
    const [first, last] = [Number(from), Number(to)];
    if (from === undefined || last < first || last >= CPUS_MAX) {
      throw new UsageError(`CPUs "${text}": say [0,2], 0,2 or 0-3; CPUs are below ${CPUS_MAX}`);
    }
    changes[first]!++;
    changes[last + 1]!--;
  }
  let ranges = 0;
  return Array.from({ length: CPUS_MAX }, (_, cpu) => cpu).filter((cpu) =>
    (ranges += changes[cpu]!) > 0
  );
}

/** The device of a verb that takes one: as its argument, or with -n. */
export function oneDeviceId(verb: string, device: number | undefined, number?: number): number {
  if (device !== undefined && number !== undefined) throw new UsageError("Name the device once");
  const id = device ?? number;
  if (id === undefined) throw new UsageError(`Which device? ubd ${verb} -n ID`);
  return id;
}

/** "3", "ublkb3" or "/dev/ublkb3". */
export function parseDeviceId(text: string): number {
  const [, digits] = /^(?:(?:\/dev\/)?(?:ublk|ubd)b)?(\d+)$/.exec(text) ?? [];
  return checkDeviceId(parseInteger(digits ?? text, "Device id"));
}
