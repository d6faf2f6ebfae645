// SPDX-License-Identifier: MIT
/** Sizes and numbers as people type them. @module */

import { UsageError } from "./error.ts";

const UNITS: Record<string, number> = { "": 1, B: 1, s: 512 };
for (const [index, letter] of [..."KMGTP"].entries()) {
  UNITS[letter] = UNITS[`${letter}iB`] = 1024 ** (index + 1);
  UNITS[`${letter}B`] = 1000 ** (index + 1);
}
UNITS.k = UNITS.K!;
UNITS.kB = UNITS.KB!;
for (const letter of "mgtp") UNITS[letter] = UNITS[letter.toUpperCase()]!;

/** Of a size or number as it is typed, with room to spare. */
const LENGTH_MAX = 100;

/**
 * "64M" and "64MiB" are 64 x 1024 x 1024 bytes, "64MB" is 64 million (as in dd and truncate),
 * "2048s" is 2048 sectors of 512 bytes; a bare number is bytes.
 *
 * @throws {UsageError} anything else, fractions of a byte, and what is not below 2^53.
 */
export function parseSize(text: string, what: string): number {
  // To read thousands of digits takes long.
  const [, digits, unit] = text.length > LENGTH_MAX
    ? []
    : /^(\d+(?:\.\d+)?)\s*([A-Za-z]*)$/.exec(text.trim()) ?? [];
  const factor = unit !== undefined && Object.hasOwn(UNITS, unit) ? UNITS[unit] : undefined;
  if (digits === undefined || factor === undefined) {
    throw new UsageError(
      `${what} "${text}": say bytes, or a number with K, M, G or T (x 1024), KB, MB, GB or TB ` +
        "(x 1000), or s (sectors of 512 bytes), such as 64M",
    );
  }
  // Exact, where a float would lose "1.005KB" and round a fraction away near 2^53.
  const [whole, fraction = ""] = digits.split(".");
  const scaled = BigInt(whole + fraction) * BigInt(factor);
  const scale = 10n ** BigInt(fraction.length);
  const bytes = scaled / scale;
  if (scaled % scale) throw new UsageError(`${what} "${text}": it is no whole number of bytes`);
  if (bytes > Number.MAX_SAFE_INTEGER) {
    throw new UsageError(`${what} "${text}": it must be less than 8 PiB (2^53 bytes)`);
  }
  return Number(bytes);
}

/** A whole number, strictly: "foo", "1x" and "" are mistakes, not 0. */
export function parseInteger(text: string, what: string): number {
  if (!/^-?\d+$/.test(text) || !Number.isSafeInteger(Number(text))) {
    throw new UsageError(`${what} "${text}": it must be a whole number`);
  }
  return Number(text);
}

/** As many minor numbers as the driver has. */
export const DEVICE_ID_MAX = 2 ** 20 - 1;

/** @throws {UsageError} no device can have this id: in a command's 32 bits it may be another's. */
export function checkDeviceId(id: number): number {
  if (Number.isInteger(id) && id >= 0 && id <= DEVICE_ID_MAX) return id;
  throw new UsageError(`Device id ${id}: it must be from 0 to ${DEVICE_ID_MAX}`);
}

/** 250 GiB, 64.5 MiB, 512 bytes. */
export function formatSize(bytes: number): string {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let index = 0;
  let value = bytes;
  while (Number(value.toFixed(1)) >= 1024 && index < units.length - 1) {
    value /= 1024;
    index++;
  }
  return `${Number(value.toFixed(value < 100 ? 2 : 1))} ${units[index]}`;
}
