// SPDX-License-Identifier: MIT
/** memory and fault through the queue's code, against a plain buffer. Needs io_uring. */
import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { checkAgainstModel, openForTesting } from "../../testing/mod.ts";
import { faultTarget } from "../../targets/fault.ts";
import { memoryTarget } from "../../targets/memory.ts";

const TIMEOUT = { timeout: 60_000 };
const CHECK = { fc, runs: 15 };

test("memory is a buffer, with one queue and with two", TIMEOUT, async () => {
  for (const queues of [1, 2]) {
    const options = { size: "1M", blockSize: 4096 };
    const { requests } = await checkAgainstModel(memoryTarget, { ...CHECK, queues, options });
    assert.ok(requests > 0);
  }
});

test(
  "fault's delays, short transfers and cache lose nothing while the power is on",
  TIMEOUT,
  async () => {
    const options = { size: "1M", delayRate: 0.05, delayMs: 1, shortRate: 0.5, cache: true };
    await checkAgainstModel(faultTarget, { ...CHECK, options });
  },
);

test("fault's queues share what it keeps, except with a cache", TIMEOUT, async () => {
  const options = { size: "1M", delayRate: 0.05, delayMs: 1, shortRate: 0.5 };
  const { requests } = await checkAgainstModel(faultTarget, { ...CHECK, queues: 2, options });
  assert.ok(requests > 0);
  const cached = { options: { size: "1M", cache: true }, queues: 2 };
  await assert.rejects(openForTesting(faultTarget, cached), {
    name: "UsageError",
    message: /by 1$/,
  });
});
