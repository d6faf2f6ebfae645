// SPDX-License-Identifier: MIT
/**
 * Looking around in /proc, /sys and the like: what cannot be read, or vanishes meanwhile, counts
 * as not there.
 * @module
 */

import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { pathOf } from "../ffi/path.ts";

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

/** As ffi/path.ts writes names that are no UTF-8; under Deno such a link counts as not there. */
export function linkTarget(path: string): string {
  try {
    const target: Uint8Array | string = readlinkSync(path, "buffer");
    return typeof target === "string" ? target : pathOf(target); // Deno's is a string all the same.
  } catch {
    return "";
  }
}
