// SPDX-License-Identifier: MIT
/**
 * All that is printed: nothing else writes to standard output or error (tests/unit/house_test.ts).
 *
 * A command writes at once and to the end, however slow the reader is and whether or not the pipe
 * is told to wait: what is printed has gone when `print` returns, and the program may end. A server
 * must not wait for who reads it (`neverWait`): it keeps some lines and drops the rest.
 *
 * Nobody throws here: the work is what counts, and it goes on. That standard output could not be
 * written is told at the program's end (`finishOutput`).
 * @module
 */

import { constants, openSync, write, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { printable, shorten } from "../core/text.ts";

/** Between two looks at a pipe that is full and does not wait by itself; doubled up to the last. */
const PAUSE_MS = { first: 1, last: 50 };
/** What a server keeps for a reader that does not read, and how long it waits for it at its end. */
const KEPT_BYTES_MAX = 1 << 20;
const END_PATIENCE_MS = 1000;

/**
 * What goes out in one call. A pipe takes so much whole or not at all (PIPE_BUF): Deno's calls begin
 * again by themselves after a part, and do not tell how far they came before they failed.
 */
const PART_BYTES = 4096;

/** Again: the pipe is full; the call was interrupted. */
const AGAIN = ["EAGAIN", "EWOULDBLOCK", "EINTR"];

class Stream {
  /** Errno name of the first write that failed: nothing is written after it. */
  failure: string | undefined;
  #kept: Uint8Array[] = [];
  #keptBytes = 0;
  #lost = 0;
  #emptied: Promise<void> | undefined;

  #fd: number;

  constructor(fd: number) {
    this.#fd = fd;
  }

  /**
   * From here on, a full pipe says so. Not by a flag of the descriptor, which others share; who
   * cannot open it anew (a socket, another user's terminal) leaves it to the runtime not to wait.
   */
  neverWait(): void {
    const { O_WRONLY, O_APPEND, O_NONBLOCK } = constants;
    try {
      this.#fd = openSync(`/proc/self/fd/${this.#fd}`, O_WRONLY | O_APPEND | O_NONBLOCK);
    } catch { /* as said */ }
  }

  writeNow(text: string): void {
    const bytes = new TextEncoder().encode(text);
    let pauseMs = PAUSE_MS.first;
    for (let at = 0; at < bytes.length && this.failure === undefined;) {
      try {
        at += writeSync(this.#fd, bytes, at, Math.min(bytes.length - at, PART_BYTES));
        pauseMs = PAUSE_MS.first;
      } catch (error) {
        const errno = errnoOf(error);
        if (!AGAIN.includes(errno)) this.failure = errno;
        else Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, pauseMs);
        pauseMs = Math.min(pauseMs * 2, PAUSE_MS.last);
      }
    }
  }

  writeLater(text: string): void {
    const lost = this.#lost > 0 ? `ubd: ${this.#lost} messages lost: nobody read them\n` : "";
    const bytes = new TextEncoder().encode(`${lost}${text}`);
    if (this.#keptBytes + bytes.length > KEPT_BYTES_MAX) {
      this.#lost++;
      return;
    }
    this.#lost = 0;
    this.#kept.push(bytes);
    this.#keptBytes += bytes.length;
    this.#emptied ??= this.#empty();
  }

  async #empty(): Promise<void> {
    for (let bytes; (bytes = this.#kept[0]) !== undefined;) {
      for (let at = 0; at < bytes.length;) {
        const { promise, resolve } = Promise.withResolvers<number | string>();
        write(
          this.#fd,
          bytes,
          at,
          bytes.length - at,
          null,
          (error, count) => resolve(error ? errnoOf(error) : count),
        );
        const result = await promise;
        if (typeof result === "number") at += result;
        else if (AGAIN.includes(result)) await sleep(PAUSE_MS.last);
        else {
          this.failure ??= result;
          break; // The next line is tried: a full disk may be emptied.
        }
      }
      this.#kept.shift();
      this.#keptBytes -= bytes.length;
    }
    this.#emptied = undefined;
  }

  async ended(): Promise<void> {
    const late = sleep(END_PATIENCE_MS, undefined, { ref: false });
    await Promise.race([this.#emptied, late]);
  }
}

const out = new Stream(1);
const err = new Stream(2);
let waits = true;

function errnoOf(error: unknown): string {
  const { code } = error as NodeJS.ErrnoException;
  return typeof code === "string" ? code : "EIO";
}

/** For a server: from here on, nothing waits for who reads what is printed. */
export function neverWait(): void {
  waits = false;
  for (const stream of [out, err]) stream.neverWait();
}

type Diversion = (fd: 1 | 2, text: string) => void;
let diversion: Diversion | undefined;

/** For tests: what is printed goes there instead. */
export function divertOutput(to: Diversion | undefined): void {
  diversion = to;
}

function send(stream: Stream, text: string): void {
  if (diversion) diversion(stream === out ? 1 : 2, text);
  else if (waits) stream.writeNow(text);
  else stream.writeLater(text);
}

/** What was asked for, on standard output. */
export function print(text: string): void {
  send(out, printable(text));
}

/** @param space as JSON.stringify has it; none: all in a line */
export function printJson(value: unknown, space?: number): void {
  const plain = (_: string, one: unknown) => typeof one === "bigint" ? Number(one) : one;
  print(`${JSON.stringify(value, plain, space)}\n`);
}

/** What others have printed, on standard error. */
export function passOn(text: string): void {
  send(err, printable(text.endsWith("\n") ? text : `${text}\n`));
}

/** What a person should know, on standard error; shortened when it echoes what is too long. */
export function tell(text: string): void {
  send(err, printable(`ubd: ${shorten(text)}\n`));
}

/** Whether to go on printing is in vain. */
export function printsInVain(): boolean {
  return out.failure !== undefined;
}

/**
 * At the program's end.
 *
 * @returns errno name of what kept standard output from being written; undefined: nothing did.
 */
export async function finishOutput(): Promise<string | undefined> {
  await Promise.all([out.ended(), err.ended()]);
  return out.failure;
}
