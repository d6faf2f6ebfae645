// SPDX-License-Identifier: MIT
/** Steps at which tests end a process. @module */

import process from "node:process";

/**
 * So that tests can see what is left behind: UBD_DEBUG_EXIT=STEP, die at that step;
 * UBD_DEBUG_INTERRUPT=STEP, interrupt the command that has started this server.
 */
export function checkpoint(step: string): void {
  if (process.env.UBD_DEBUG_INTERRUPT === step) process.kill(process.ppid, "SIGINT");
  if (process.env.UBD_DEBUG_EXIT === step) process.exit(70);
}
