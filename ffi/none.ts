// SPDX-License-Identifier: MIT
/**
 * Where there is neither Bun nor Deno, as in Node.js. Targets can be defined, and their types and
 * functions used; what needs the kernel says what it needs.
 * @module
 */

import process from "node:process";
import type { Adapter } from "./symbols.ts";

const name = process.versions?.node ? `Node.js ${process.versions.node}` : "another runtime";

function refuse(): never {
  const error = new Error(
    `ubd needs Bun 1.4 or Deno 2.9, and this is ${name}: it calls the kernel through their FFI. ` +
      'Run this under one of them, tests too ("bun test", "deno test"); the executable ubd needs ' +
      "neither",
  );
  error.name = "RuntimeError";
  throw error;
}

export const adapter: Adapter = {
  runtime: `${name}: not supported`,
  canLockMemory: false,
  restfulEnvironment: {},
  rerunArguments: refuse,
  inflate: refuse,
  load: refuse,
  view: refuse,
  specifierOf: refuse,
  provideLibrary: refuse,
  watch: refuse,
};
