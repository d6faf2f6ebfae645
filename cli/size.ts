// SPDX-License-Identifier: MIT
/** Device ids as people type them, and the sizes and numbers of core/size.ts. @module */

import { parseInteger } from "../core/size.ts";

export { formatSize, parseInteger, parseSize } from "../core/size.ts";

/** "3", "ublkb3" or "/dev/ublkb3". */
export function parseDeviceId(text: string): number {
  const [, digits] = /^(?:(?:\/dev\/)?(?:ublk|ubd)b)?(\d+)$/.exec(text) ?? [];
  return parseInteger(digits ?? text, "Device id");
}
