// SPDX-License-Identifier: MIT
/**
 * What a server in the background says: to its device's log (cli/device_log.ts), all of it, and to
 * the kernel's, where people look after a disk misbehaves, as much as it bears.
 *
 * A record of /dev/kmsg takes about 1000 bytes, and a descriptor of it takes 10 of them in 5
 * seconds: each line is a record of its own, long ones are several, and each opens the file anew.
 * @module
 */

import { Buffer } from "node:buffer";
import { writeFileSync, writeSync } from "node:fs";
import process from "node:process";
import { clearInterval, setInterval } from "node:timers";
import { printable } from "../core/text.ts";

/** Some 100 bytes less than the kernel takes: it puts more in front. */
const RECORD_BYTES_MAX = 900;

/** Lines of a flood that reach the kernel's log, and how many more each minute. */
const LINES_MAX = 40;
const LINES_PER_MINUTE = 10;

/** @param always it is no part of a flood: what ends a device, and the like. */
export type ServerLog = (text: string, always?: boolean) => void;

/** Where the two logs are: other places in tests. */
export interface LogPlaces {
  /** Appends to the device's log. */
  device: (text: string) => void;
  /** Writes one record to the kernel's. */
  kernel: (record: string) => void;
}

const PLACES: LogPlaces = {
  device: (text) => void writeSync(2, text),
  // A container's /dev may have none: make none.
  kernel: (record) => writeFileSync("/dev/kmsg", record, { flag: "r+" }),
};

/** @param afterwards called after each text. */
export function createServerLog(
  afterwards: () => void = () => {},
  places: LogPlaces = PLACES,
): ServerLog {
  const prefix = `ubd[${process.pid}]: `;
  let budget = LINES_MAX;
  let leftOut = 0;
  let minute: ReturnType<typeof setInterval> | undefined;

  const toKernel = (line: string) => {
    try {
      for (const part of split(line, RECORD_BYTES_MAX - prefix.length)) {
        places.kernel(`${prefix}${part}\n`);
      }
    } catch { /* no permission, or none there: the device's log has it */ }
  };
  const everyMinute = () => {
    if (leftOut > 0) toKernel(`${leftOut} more lines are in the device's log: ubd log ID`);
    leftOut = 0;
    budget = Math.min(budget + LINES_PER_MINUTE, LINES_MAX);
    if (budget < LINES_MAX) return;
    clearInterval(minute);
    minute = undefined;
  };
  return (said, always = false) => {
    const text = printable(said);
    try {
      places.device(`${new Date().toISOString()} ubd: ${text.trimEnd()}\n`);
    } catch (error) {
      toKernel(`the device's log cannot be written: ${(error as Error).message}`);
    }
    for (const line of text.split("\n")) {
      if (line.trim() === "") continue;
      if (!always && budget <= 0) {
        leftOut++;
        continue;
      }
      if (!always) budget--;
      toKernel(line);
    }
    if (budget < LINES_MAX) minute ??= setInterval(everyMinute, 60_000).unref();
    afterwards();
  };
}

/** Cuts a line into parts of so many bytes at most, between characters. */
export function split(line: string, bytesMax: number): string[] {
  const parts: string[] = [];
  let part = "";
  let bytes = 0;
  if (line.length * 3 <= bytesMax) return [line];
  for (const character of line) {
    const more = Buffer.byteLength(character);
    if (bytes + more > bytesMax) {
      parts.push(part);
      part = "";
      bytes = 0;
    }
    part += character;
    bytes += more;
  }
  return [...parts, part];
}
