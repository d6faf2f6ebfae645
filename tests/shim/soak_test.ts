// SPDX-License-Identifier: MIT
/** A moment of tools/soak.ts: what would leak a buffer for each device or late request is seen. */
import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { devices, hanging, MIB, type Soak } from "../../tools/soak.ts";

const { Bun } = globalThis as unknown as { Bun?: { gc(force: boolean): void } };
if (!Bun) setFlagsFromString("--expose-gc");
const gc: () => void = Bun ? () => Bun.gc(true) : runInNewContext("gc");

/** By how many MiB a soak has made the process grow, garbage apart. */
async function grown(soak: () => Promise<Soak>): Promise<number> {
  const { before } = await soak();
  for (let round = 0; round < 20; round++) {
    gc();
    await sleep(5);
  }
  return process.memoryUsage.rss() / MIB - before;
}

test("50 devices with 4 MiB each leave no memory behind", { timeout: 120_000 }, async () => {
  const mib = await grown(() => devices(50, () => {}));
  assert.ok(mib < 120, `${mib}`);
});

test("a backend that hangs does not fill the memory", { timeout: 120_000 }, async () => {
  const mib = await grown(() => hanging(2, () => {}));
  assert.ok(mib < 120, `${mib}`);
});
