// SPDX-License-Identifier: MIT
/** A moment of each fuzzer of tests/fuzz, and the proof that each can find something. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { fuzz, fuzzerNames, loadFuzzer } from "../fuzz/fuzzer.ts";

/** The same rounds each time; `npm run fuzz` takes others. */
const SEED = 1;

for (const name of fuzzerNames()) {
  const fuzzer = await loadFuzzer(name);
  test(`fuzz ${name}: ${fuzzer.about}`, { timeout: 60_000 }, async () => {
    const { rounds, failure } = await fuzz(fuzzer, {
      seed: SEED,
      timeMs: fuzzer.smokeMs ?? 1500,
      canary: false,
    });
    assert.strictEqual(failure, undefined);
    assert.ok(rounds > 0);
  });

  test(`fuzz ${name} finds the bug that is planted`, { timeout: 60_000 }, async () => {
    const { failure } = await fuzz(fuzzer, { seed: SEED, timeMs: 20_000, canary: true });
    assert.ok(failure, "the canary lives");
  });
}
