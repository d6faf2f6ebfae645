// SPDX-License-Identifier: MIT

/** A broken assertion is a bug of ours, never the user's mistake nor the system's failure. */
export class AssertionError extends Error {
  override readonly name = "AssertionError";
}

/** @param message a literal: building a string on each call would cost more than the check. */
export function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new AssertionError(message);
}
