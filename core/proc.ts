// SPDX-License-Identifier: MIT
/**
 * Looking around in /proc, /sys and the like: what cannot be read, or vanishes meanwhile, counts
 * as not there.
 * @module
 */

import { readdirSync, readFileSync, readlinkSync, type Stats } from "node:fs";
import { constants } from "node:os";
import type { Shim } from "../ffi/mod.ts";
import { pathOf } from "../ffi/path.ts";

export function namesIn(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}

export function contents(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
}

/** As ffi/path.ts writes names that are no UTF-8; under Deno such a link counts as not there. */
export function linkTarget(path: string): string {
  try {
    const target: Uint8Array | string = readlinkSync(path, "buffer");
    return typeof target === "string" ? target : pathOf(target); // Deno's is a string all the same.
  } catch {
    return "";
  }
}

/** What the kernel calls a device, "259:0": the one that a node is for, whatever the node's name. */
export function deviceNumber({ rdev }: Pick<Stats, "rdev">): string {
  // 12 bits of the minor number are around the major one's.
  return `${rdev >>> 8 & 0xfff}:${rdev & 0xff | rdev >>> 12 & 0xfff00}`;
}

export function processIds(): number[] {
  return namesIn("/proc").filter((name) => /^\d+$/.test(name)).map(Number);
}

/** A process that stays itself: its id alone is another one's some day. */
export class Process {
  readonly pid: number;
  /** In ticks since the machine's start, as /proc has it. */
  readonly #started: string;

  private constructor(pid: number, started: string) {
    this.pid = pid;
    this.#started = started;
  }

  /** @returns undefined: there is none that has not ended. */
  static find(pid: number): Process | undefined {
    const found = statOf(pid);
    return found && new Process(pid, found.started);
  }

  /** "R", "S", "D", "T" and so on, see proc(5); undefined: it has ended. */
  get state(): string | undefined {
    const found = statOf(this.pid);
    return found?.started === this.#started ? found.state : undefined;
  }

  /** By SIGSTOP, or by a debugger. */
  get isStopped(): boolean {
    return ["T", "t"].includes(this.state ?? "");
  }

  get lives(): boolean {
    return this.state !== undefined;
  }

  /** Of each of its threads, as `state`. */
  get threadStates(): string[] {
    const tasks = `/proc/${this.pid}/task`;
    const found = namesIn(tasks).flatMap((tid) => statOf(this.pid, tid)?.state ?? []);
    return this.lives ? found : [];
  }

  /** What its threads wait for that no signal ends, such as "folio_wait_bit"; mostly empty. */
  get waitsFor(): string[] {
    const tasks = `/proc/${this.pid}/task`;
    const found = namesIn(tasks).filter((tid) => statOf(this.pid, tid)?.state === "D")
      .map((tid) => contents(`${tasks}/${tid}/wchan`)).filter((name) => !["", "0"].includes(name));
    return this.lives ? [...new Set(found)] : [];
  }

  /** @returns whether it was there to get it, and could be sent it. */
  signal({ native }: Shim, signal: NodeJS.Signals): boolean {
    const pidfd = native.ubd_pidfd_open(this.pid);
    if (pidfd < 0) return false;
    // While the descriptor is open, the id is that process's: what holds now, holds for the signal.
    const sent = this.lives && native.ubd_pidfd_signal(pidfd, constants.signals[signal]) === 0;
    native.ubd_close(pidfd);
    return sent;
  }
}

/** The command's name, in parentheses, may itself hold spaces and parentheses. */
function statOf(pid: number, tid?: string): { state: string; started: string } | undefined {
  const stat = contents(`/proc/${pid}/${tid === undefined ? "" : `task/${tid}/`}stat`);
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const [state, started] = [fields[0]!, fields[19]];
  // What is left of one that has ended holds nothing.
  return started === undefined || /[ZXx]/.test(state) ? undefined : { state, started };
}

/** When a process began, in ticks since boot: with its id, it names one process and no later one. */
export function beginningOf(pid: number): number | undefined {
  const found = statOf(pid);
  return found && Number(found.started);
}
