// SPDX-License-Identifier: MIT
/**
 * Exit codes, and how failures are told: one line on standard error, and with --json an object on
 * standard output too. The codes are a contract with scripts (README, "Shell scripting").
 * @module
 */

import { plainPaths, UblkError, type UblkErrorDetails, UsageError } from "../core/error.ts";
import { shorten } from "../core/text.ts";
import { finishOutput, printJson, tell } from "./output.ts";

export const EXIT = {
  OK: 0,
  FAILURE: 1,
  USAGE: 2,
  NO_DEVICE: 3,
  BUSY: 4,
  PERMISSION: 5,
  NO_DRIVER: 6,
  TIMEOUT: 7,
  BUG: 70,
  INTERRUPTED: 130,
  PIPE: 141,
} as const;

/** `ubd run` could not start its command: what shells, env and timeout say then. */
export const COMMAND_EXIT = { REFUSED: 126, ABSENT: 127 } as const;

/** For `ubd help` and the README. */
export const EXIT_MEANINGS: readonly (readonly [number, string])[] = [
  [EXIT.OK, "done"],
  [EXIT.FAILURE, "the kernel or the backing refused"],
  [EXIT.USAGE, "wrong arguments, or a backing that cannot be one; nothing was changed"],
  [EXIT.NO_DEVICE, "no device with that id"],
  [EXIT.BUSY, "in use: image locked, id taken, device held"],
  [EXIT.PERMISSION, "not allowed: run as root"],
  [EXIT.NO_DRIVER, "no driver, or io_uring is off"],
  [EXIT.TIMEOUT, "the kernel did not answer in time"],
  [EXIT.BUG, "a bug in ubd"],
  [EXIT.INTERRUPTED, "interrupted; nothing half-made is left"],
  [EXIT.PIPE, "done, but who read standard output has gone before its end"],
];

/** What a verb means besides these, or instead. */
export const VERB_EXIT_MEANINGS: Readonly<
  Record<string, readonly (readonly [number | string, string])[]>
> = {
  doctor: [[EXIT.OK, "nothing keeps ubd from working"], [EXIT.FAILURE, "something does"]],
  run: [
    ["any", "the command's exit code; 128 + n when signal n ended it"],
    [EXIT.BUSY, "image locked or id taken; or the command succeeded, and its device is in use"],
    [COMMAND_EXIT.REFUSED, "the command cannot be started"],
    [COMMAND_EXIT.ABSENT, "there is no such command"],
  ],
};

const BY_ERRNO: Record<string, number> = {
  ENODEV: EXIT.NO_DEVICE,
  EBUSY: EXIT.BUSY,
  EEXIST: EXIT.BUSY,
  EPERM: EXIT.PERMISSION,
  EACCES: EXIT.PERMISSION,
  ETIMEDOUT: EXIT.TIMEOUT,
};

function exitCode(error: unknown): number {
  if (error instanceof UsageError || (error as Error)?.name === "RuntimeError") return EXIT.USAGE;
  if ((error as Error)?.name === "ShimError") return EXIT.FAILURE;
  if (!(error instanceof UblkError)) return EXIT.BUG;
  const absent = ["ENOENT", "ENXIO", "ENODEV"].includes(error.errno);
  if (error.operation === "open the control device" && absent) return EXIT.NO_DRIVER;
  const off = ["EPERM", "ENOSYS"].includes(error.errno);
  if (error.operation === "set up a ring" && off) return EXIT.NO_DRIVER;
  return BY_ERRNO[error.errno] ?? EXIT.FAILURE;
}

/** A failure as plain JSON, so that the server process can hand it to `ubd add`. */
export interface Failure extends Partial<UblkErrorDetails> {
  message: string;
  exitCode: number;
}

/** A failure that has already been put into words, mostly by another process. */
export class ReportedError extends Error {
  constructor(readonly failure: Failure) {
    super(failure.message);
  }
}

export function toFailure(error: unknown): Failure {
  if (error instanceof ReportedError) return error.failure;
  const code = exitCode(error);
  if (code === EXIT.BUG) {
    const detail = error instanceof Error ? error.stack ?? error.message : String(error);
    const message = `this is a bug in ubd, please report it: ${plainPaths(detail)}`;
    return { message, exitCode: code };
  }
  const failure = { message: (error as Error).message, exitCode: code };
  return error instanceof UblkError ? { ...failure, ...error.details } : failure;
}

export function reportFailure(failure: Failure, json: boolean): void {
  const short = (_: string, value: unknown) => typeof value === "string" ? shorten(value) : value;
  if (json) printJson({ error: JSON.parse(JSON.stringify(failure, short)) });
  tell(failure.message);
}

/**
 * The last that a program does: what it has printed has gone, or it is no success.
 *
 * @param code of its work. @returns the exit code.
 */
export async function finish(code: number): Promise<number> {
  const errno = await finishOutput();
  if (errno === undefined || code !== EXIT.OK) return code;
  if (errno === "EPIPE") return EXIT.PIPE; // As a shell has it of a program that SIGPIPE ended.
  const hint = "the work is done; only what was to be printed is lost";
  const error = new UblkError({ errno, operation: "write to standard output", hint });
  reportFailure(toFailure(error), false);
  await finishOutput();
  return EXIT.FAILURE;
}
