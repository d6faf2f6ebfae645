// SPDX-License-Identifier: MIT
/** All that is printed: nothing else writes to standard output or error (tests/unit/house_test.ts). @module */

import process from "node:process";
import { printable } from "../core/text.ts";

/** What was asked for, on standard output. */
export function print(text: string): void {
  process.stdout.write(printable(text));
}

/** @param space as JSON.stringify has it; none: all in a line */
export function printJson(value: unknown, space?: number): void {
  const plain = (_: string, one: unknown) => typeof one === "bigint" ? Number(one) : one;
  print(`${JSON.stringify(value, plain, space)}\n`);
}

/** What others have printed, on standard error. */
export function passOn(text: string): void {
  process.stderr.write(printable(text.endsWith("\n") ? text : `${text}\n`));
}

/** What a person should know, on standard error. */
export function tell(text: string): void {
  process.stderr.write(printable(`ubd: ${text}\n`));
}
