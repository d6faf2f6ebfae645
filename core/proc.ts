// SPDX-License-Identifier: MIT
/**
 * Looking around in /proc, /sys and the like: what cannot be read, or vanishes meanwhile, counts
 * as not there.
 * @module
 */

import { readdirSync, readFileSync, readlinkSync } from "node:fs";

export function namesIn(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}

export function contents(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

export function linkTarget(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return "";
  }
}
