#!/usr/bin/env bun
// SPDX-License-Identifier: MIT
/**
 * The program's entry: the command line, a server that it has started, or, in a bundle, a queue
 * thread of that server. Each loads what it needs and no more: all three are a part of `ubd add`.
 *
 * Nothing is imported at the top that awaits there (ffi/mod.ts does): an executable with bytecode
 * then ends without a word (Bun 1.4.5).
 * @module
 */

import { readFileSync } from "node:fs";
import process from "node:process";
import { isMainThread } from "node:worker_threads";
import { pathOf } from "../ffi/path.ts";

/** File names are bytes; the runtimes have put U+FFFD for what is no UTF-8. */
function restoreArguments(): void {
  const { argv } = process;
  if (!argv.some((word) => word.includes("\ufffd"))) return;
  const line = readFileSync("/proc/self/cmdline");
  const words: string[] = [];
  for (let from = 0, to; (to = line.indexOf(0, from)) >= 0; from = to + 1) {
    words.push(pathOf(line.subarray(from, to)));
  }
  argv.splice(2, argv.length, ...words.slice(words.length - (argv.length - 2)));
}

async function main(): Promise<number> {
  const { SERVE_VERB } = await import("./start_server.ts");
  if (process.argv[2] === SERVE_VERB) return await (await import("./server.ts")).runServer();
  restoreArguments();
  return await (await import("./program.ts")).runProgram();
}

/** @returns the exit code, once all that was printed has gone. */
async function ended(): Promise<number> {
  const { finish, reportFailure, toFailure } = await import("./exit.ts");
  try {
    return await finish(await main());
  } catch (error) {
    const failure = toFailure(error);
    reportFailure(failure, false);
    return failure.exitCode;
  }
}

// Nothing may keep the process once the work is done: exit, do not wait for the event loop.
if (isMainThread) ended().then((code) => process.exit(code));
else import("../targets/queue_thread.ts");
