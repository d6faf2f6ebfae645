// SPDX-License-Identifier: MIT
/**
 * `ubd add ./my_target.ts --watch`: a module that changes is served by a new server.
 *
 * The server itself watches, and starts `ubd upgrade` on its own device: I/O waits meanwhile and
 * sees no error. The new server loads the module before it makes the old one let go: one that
 * cannot be loaded is told in the log, and the old one goes on.
 * @module
 */

import { execFile } from "node:child_process";
import { statSync, watch } from "node:fs";
import { basename, dirname } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { UblkError } from "../core/error.ts";
import { rerunArguments } from "../ffi/mod.ts";

/** Editors write a file in several steps. */
const SETTLE_MS = 200;

/** What a module's file was when it was loaded. */
function versionOf(file: string): number {
  return statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

/**
 * Watches from now on until the end of the process.
 *
 * @returns call it with the id once the device is served: what has changed by then is taken first.
 * @throws {UblkError} it cannot be watched.
 */
export function watchModule(file: string, log: (text: string) => void): (id: number) => void {
  const loaded = versionOf(file);
  let id: number | undefined;
  let changes = 0;
  const reload = async () => {
    const change = ++changes;
    await sleep(SETTLE_MS);
    if (change !== changes || id === undefined) return;
    const args = [...rerunArguments(), "upgrade", "-n", `${id}`];
    try {
      await promisify(execFile)(process.execPath, args, { cwd: "/" });
    } catch (error) {
      const { stderr, message } = error as Error & { stderr?: string };
      log(`${file} has changed, and is not taken: ${(stderr || message).trim()}`);
    }
  };
  try {
    // The directory, since editors put a new file in the old one's place.
    const watcher = watch(dirname(file), (_, name) => {
      if (name === basename(file)) reload();
    });
    watcher.on("error", (error) => log(`${file} is no longer watched: ${error.message}`));
  } catch (error) {
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    const hint = `${message}: raise fs.inotify.max_user_watches and max_user_instances (sysctl)`;
    throw new UblkError({ errno: code, operation: `watch ${dirname(file)}`, hint });
  }
  return (served) => {
    id = served;
    if (versionOf(file) !== loaded) reload(); // Nobody acted since.
  };
}
