// SPDX-License-Identifier: MIT
/**
 * The device nodes that servers make where nothing else does (an initramfs, a container), and
 * remove again.
 *
 * A node is its type and number, never its name alone: what a name means may have changed since,
 * and names come from state files too. So only what is still the device's own node is removed.
 * @module
 */

import { lstatSync, type Stats, unlinkSync } from "node:fs";
import type { Shim } from "../ffi/mod.ts";
import { pathBytes } from "../ffi/path.ts";
import { contents, deviceNumber } from "./proc.ts";

export const S_IFCHR = 0o020000;
export const S_IFBLK = 0o060000;

/** The node that a device has by its name. */
export interface NodePlace {
  path: string;
  type: typeof S_IFCHR | typeof S_IFBLK;
  /** File that tells "major:minor". */
  sysfs: string;
}

/** Nodes of one device that its servers have made: this one, and those before it. */
export class Nodes {
  readonly #identities = new Map<string, string>();

  get paths(): string[] {
    return [...this.#identities.keys()];
  }

  /** Makes a node from the numbers in sysfs, if permitted and not there. */
  make(shim: Shim, { path, type, sysfs }: NodePlace): void {
    const number = contents(sysfs).trim();
    if (!number) return; // No sysfs: what was tried before fails with its own message.
    const [major, minor] = number.split(":").map(Number);
    if (shim.native.ubd_mknod(pathBytes(path), type | 0o600, major!, minor!) !== 0) return;
    this.#identities.set(path, `${type} ${number}`);
  }

  /**
   * Takes over what an earlier server is said to have made.
   *
   * @param places of the device. @returns those that are none of its nodes.
   */
  adopt(paths: readonly string[], places: readonly NodePlace[]): string[] {
    return paths.filter((path) => {
      if (this.#identities.has(path)) return false;
      const place = places.find((candidate) => candidate.path === path);
      const known = place && identityIn(place);
      if (known === undefined || identityAt(path) !== known) return true;
      this.#identities.set(path, known);
      return false;
    });
  }

  /** @returns a line for each that stays: another device's by now, or not to be removed. */
  remove(): string[] {
    const kept: string[] = [];
    for (const [path, known] of this.#identities) {
      this.#identities.delete(path);
      const found = identityAt(path);
      if (found === undefined) continue;
      if (found !== known) kept.push(`${path} stays: it is no node of this device any more`);
      else {
        try {
          unlinkSync(path);
        } catch (error) {
          kept.push(`${path} stays: ${(error as Error).message}`);
        }
      }
    }
    return kept;
  }
}

/**
 * Where nobody but ubd makes nodes, one may be left of an earlier device, with numbers that are
 * another disk's by now. What is no device node, somebody else has put there: it stays.
 */
export function removeStaleNode(place: NodePlace): void {
  const found = identityAt(place.path);
  const known = identityIn(place);
  if (found === undefined || found === "" || known === undefined || found === known) return;
  try {
    unlinkSync(place.path);
  } catch { /* not permitted: who opens it will see */ }
}

/** @returns undefined: nothing is there; "": no device node is. */
function identityAt(path: string): string | undefined {
  let stats: Stats | undefined;
  try {
    stats = lstatSync(path);
  } catch {
    return undefined;
  }
  const number = deviceNumber(stats);
  if (stats.isBlockDevice()) return `${S_IFBLK} ${number}`;
  return stats.isCharacterDevice() ? `${S_IFCHR} ${number}` : "";
}

function identityIn({ type, sysfs }: NodePlace): string | undefined {
  const number = contents(sysfs).trim();
  return number ? `${type} ${number}` : undefined;
}
