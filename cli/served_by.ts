// SPDX-License-Identifier: MIT
/** The process that serves a device: what it does, and how it is made to end. @module */

import { existsSync } from "node:fs";
import type { DeviceInfo } from "../abi/dialect.ts";
import { UBLK_S_DEV_LIVE } from "../abi/ublk_cmd.ts";
import type { Control } from "../core/control.ts";
import { contents, Process } from "../core/proc.ts";
import { readState } from "../core/state.ts";
import { charDeviceNumber, openersOf } from "../core/users.ts";

/** How a process is, by the letter that /proc has for it. */
const STATES: Record<string, string> = {
  R: "is running",
  S: "sleeps",
  D: "waits in the kernel",
  T: "is stopped (SIGSTOP)",
  t: "is stopped by a debugger",
};

export class ServedBy {
  readonly process: Process;
  /** A server of ubd's, and for this device alone: it may be told to end. */
  readonly ours: boolean;
  readonly #charDevice: string;

  private constructor(process: Process, ours: boolean, charDevice: string) {
    this.process = process;
    this.ours = ours;
    this.#charDevice = charDevice;
  }

  /** @returns undefined: nobody has the device, as far as this user may see. */
  static async find(
    { dialect }: Pick<Control, "dialect">,
    info: Pick<DeviceInfo, "id" | "pid" | "state" | "targetFlags">,
  ): Promise<ServedBy | undefined> {
    const number = charDeviceNumber(dialect, info.id);
    const openers = number === undefined ? [] : await openersOf(number);
    const known = readState(info.id, info.targetFlags)?.pid;
    // The id of who only was its server may be another process's by now, so it must have it open.
    const told = info.state === UBLK_S_DEV_LIVE ? info.pid : -1;
    const pid = [told, known].find((one) => one !== undefined && openers.includes(one)) ??
      openers[0];
    const process = pid === undefined ? undefined : Process.find(pid);
    return process && new ServedBy(process, pid === known, number!);
  }

  get isStopped(): boolean {
    return this.process.isStopped;
  }

  /** Ended; one that is not ours goes on with something else when it has let go of the device. */
  async isGone(): Promise<boolean> {
    if (!this.process.lives) return true;
    return !this.ours && !(await openersOf(this.#charDevice)).includes(this.process.pid);
  }

  /** "its server, process 12, waits in the kernel (folio_wait_bit_common)". */
  toString(): string {
    const { pid, state = "", threadStates, waitsFor } = this.process;
    // Of all its threads: one that computes, or waits for a file, is what others wait for.
    const worst = this.isStopped ? state : ["D", "R"].find((one) => threadStates.includes(one));
    const where = worst === "D" && waitsFor.length > 0 ? ` (${waitsFor.join(", ")})` : "";
    return `its server, process ${pid}, ${STATES[worst ?? state] ?? "has ended"}${where}`;
  }
}

/**
 * Watches whether the kernel takes a disk away: nothing can refuse or undo that any more, though
 * requests may still wait for an answer, and the driver calls the device LIVE until they have it.
 *
 * @returns what tells that; it tells undefined where the disk was not to be seen in the first place.
 */
export function diskWatch(blockName: string): () => boolean | undefined {
  // What the kernel removes before it waits for requests; the disk itself goes after that.
  const early = `/sys/block/${blockName}/bdi`;
  const visible = existsSync(early);
  return () => visible ? !existsSync(early) : undefined;
}

/** "3 requests wait for an answer"; empty when none does, or the disk is gone. */
export function requestsInFlight(blockName: string): string {
  const [reads = 0, writes = 0] = contents(`/sys/block/${blockName}/inflight`).trim().split(/\s+/)
    .map(Number);
  const count = reads + writes;
  if (!count) return "";
  return count === 1 ? "one request waits for an answer" : `${count} requests wait for an answer`;
}
