// SPDX-License-Identifier: MIT
/**
 * What a fuzzer is: tests/fuzz/NAME_fuzz.ts exports one as its default, and nothing else is needed.
 * `npm run fuzz -- NAME` runs it for as long as one likes, tests/shim/fuzz_test.ts for a moment with
 * each `npm test`.
 * @module
 */

import { readdirSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";

export interface Fuzzer {
  /** What is thrown at what, and what must hold: one line. */
  about: string;
  /** How long its smoke takes, where a round is longer than a moment. Default: 1.5 s. */
  smokeMs?: number;
  /**
   * One round. All chance comes from fast-check, so that a seed repeats it and a failure shrinks.
   *
   * @param canary a bug is planted, which the property must find.
   */
  property(canary: boolean): fc.IRawProperty<unknown>;
}

export interface FuzzOptions {
  seed: number;
  /** Where in the seed's tree the counterexample is, as a failure has told it. */
  path?: string;
  timeMs: number;
  canary: boolean;
}

/** @returns the names of all fuzzers. */
export function fuzzerNames(): string[] {
  return readdirSync(import.meta.dirname!).filter((name) => name.endsWith("_fuzz.ts"))
    .map((name) => name.slice(0, -"_fuzz.ts".length)).sort();
}

export async function loadFuzzer(name: string): Promise<Fuzzer> {
  return (await import(join(import.meta.dirname!, `${name}_fuzz.ts`))).default;
}

/** Rounds until the time is over or one has failed. @returns the rounds run, and the failure. */
export async function fuzz(
  fuzzer: Fuzzer,
  { seed, path, timeMs, canary }: FuzzOptions,
): Promise<{ rounds: number; failure: string | undefined }> {
  const details = await fc.check(fuzzer.property(canary), {
    seed,
    ...(path !== undefined && { path }),
    numRuns: 2 ** 31 - 1,
    interruptAfterTimeLimit: timeMs,
    markInterruptAsFailure: false,
    includeErrorInReport: true,
    endOnFailure: canary,
  });
  return {
    rounds: details.numRuns,
    failure: details.failed
      ? `${fc.defaultReportMessage(details)}\n${(details.errorInstance as Error)?.stack ?? ""}`
      : undefined,
  };
}
