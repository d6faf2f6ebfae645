// SPDX-License-Identifier: MIT
/**
 * `ubd add ./my_target.ts --watch`: a module that changes is served by a new server.
 *
 * The server itself watches, and starts `ubd upgrade` on its own device: I/O waits meanwhile and
 * sees no error. A module that cannot even be loaded is told in the log, and the old one goes on.
 * @module
 */

import { execFile } from "node:child_process";
import { statSync, watch } from "node:fs";
import { basename, dirname } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { rerunArguments } from "../ffi/mod.ts";

/** Editors write a file in several steps. */
const SETTLE_MS = 200;

/** What a module's file was when it was loaded. */
export function versionOf(file: string): number {
  return statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

/** Ends with the process. @param loaded the version that is served. */
export function watchModule(
  id: number,
  file: string,
  loaded: number,
  log: (text: string) => void,
): void {
  const ubd = (...args: string[]) =>
    promisify(execFile)(process.execPath, [...rerunArguments(), ...args], { cwd: "/" });
  let changes = 0;
  const reload = async () => {
    const change = ++changes;
    await sleep(SETTLE_MS);
    if (change !== changes) return;
    try {
      await ubd("add", file, "--help");
      await ubd("upgrade", "-n", `${id}`);
    } catch (error) {
      const { stderr, message } = error as Error & { stderr?: string };
      log(`${file} has changed, and is not taken: ${(stderr || message).trim()}`);
    }
  };
  // The directory, since editors put a new file in the old one's place.
  watch(dirname(file), (_, name) => {
    if (name === basename(file)) reload();
  });
  if (versionOf(file) !== loaded) reload(); // Nobody watched since.
}
