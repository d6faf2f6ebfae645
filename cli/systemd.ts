// SPDX-License-Identifier: MIT
/** What systemd wants of a service: a word when it is ready, and a mark to be spared. @module */

import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import process from "node:process";
import { UblkError } from "../core/error.ts";
import { Shim } from "../ffi/mod.ts";
import { tell } from "./output.ts";

/**
 * Tells the service manager, when there is one (sd_notify).
 *
 * @param state lines such as "READY=1".
 */
export function notify(state: string): void {
  const name = process.env.NOTIFY_SOCKET;
  if (!name) return;
  const address = Buffer.from(name.replace(/^@/, "\0"));
  const data = Buffer.from(state);
  const { ubd_send_datagram } = new Shim().native;
  const sent = ubd_send_datagram(address, address.length, data, data.length);
  // The device is served all the same; whoever waits for the word gives up in time.
  if (sent < 0) tell(UblkError.from(sent, `notify ${name}`).message);
}

/**
 * Marks this process as the server of a root file system: systemd kills nothing at shutdown whose
 * argv[0] starts with "@". The kernel shows argv from the stack where it put it.
 *
 * @throws {UblkError} the process may not write to its own memory.
 */
export function surviveShutdown(): void {
  const stat = readFileSync("/proc/self/stat", "utf8");
  const ARG_START = 48 - 3; // Counted from 1; the first one behind the name is 3.
  const address = Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[ARG_START]);
  try {
    const memory = openSync("/proc/self/mem", "r+");
    try {
      writeSync(memory, Buffer.from("@"), 0, 1, address);
    } finally {
      closeSync(memory);
    }
  } catch (error) {
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    throw new UblkError({
      errno: code,
      operation: "mark the server as root storage",
      hint: message,
    });
  }
}
