// SPDX-License-Identifier: MIT
/** Steps at which tests end a process. @module */

import process from "node:process";
import { isMainThread } from "node:worker_threads";

/** Whether a process is to be ended or interrupted at this step. */
export function isCheckpoint(step: string): boolean {
  return process.env.UBD_DEBUG_INTERRUPT === step || process.env.UBD_DEBUG_EXIT === step;
}

/**
 * So that tests can see what is left behind: UBD_DEBUG_EXIT=STEP, die at that step;
 * UBD_DEBUG_INTERRUPT=STEP, interrupt the command that has started this server.
 */
export function checkpoint(step: string): void {
  if (process.env.UBD_DEBUG_INTERRUPT === step) process.kill(process.ppid, "SIGINT");
  if (process.env.UBD_DEBUG_EXIT !== step) return;
  if (isMainThread) process.exit(70);
  process.kill(process.pid, "SIGKILL"); // There, process.exit ends the thread.
}
