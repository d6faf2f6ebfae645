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

import process from "node:process";
import { isMainThread } from "node:worker_threads";

async function main(): Promise<number> {
  const { SERVE_VERB } = await import("./start_server.ts");
  if (process.argv[2] === SERVE_VERB) return await (await import("./server.ts")).runServer();
  return await (await import("./program.ts")).runProgram();
}

// Nothing may keep the process once the work is done: exit, do not wait for the event loop.
if (isMainThread) main().then((code) => process.exit(code));
else import("../targets/queue_thread.ts");
