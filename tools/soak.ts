// SPDX-License-Identifier: MIT
/**
 * `bun tools/soak.ts hanging [SECONDS]`: memory of a queue whose backend hangs, natively.
 * `bun tools/soak.ts devices [COUNT]`: memory of a program that opens and stops devices.
 *
 * Both play the driver (testing/) and need io_uring. They print the resident set as it goes, and end
 * with how much it has grown since a tenth was over: tests/shim/soak_test.ts has a bound for that.
 * @module
 */

import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { defineTarget } from "../core/define_target.ts";
import { openForTesting } from "../testing/device.ts";

export const MIB = 1024 ** 2;
const IO_BYTES = 512 * 1024;

/** What a soak has come to, all in MiB. */
export interface Soak {
  /** When a tenth was over. */
  before: number;
  most: number;
  after: number;
  /** Requests, or devices. */
  count: number;
}

type Tell = (text: string) => void;

const resident = () => Math.round(process.memoryUsage.rss() / MIB);

class Watch {
  private before = 0;
  private most = 0;
  private told = 0;

  /** @param share how much is over, 0 to 1. */
  look(share: number, count: number, tell: Tell): void {
    const now = resident();
    if (share < 0.1) this.before = now;
    this.most = Math.max(this.most, now);
    if (share * 20 < this.told) return;
    this.told++;
    tell(`${Math.round(share * 100)} %: ${now} MiB resident, ${count}`);
  }

  end(count: number): Soak {
    return { before: this.before, most: this.most, after: resident(), count };
  }
}

/** Of four requests one is answered, one is late, and two never end; each has 512 KiB. */
export async function hanging(seconds: number, tell: Tell): Promise<Soak> {
  let calls = 0;
  const target = defineTarget({
    size: 1024 * MIB,
    timeoutMs: 20,
    async read({ buffer }) {
      const turn = calls++ % 4;
      if (turn === 0) await new Promise(() => {});
      if (turn === 1) await sleep(50);
      if (turn === 2) await new Promise(() => buffer);
      buffer.fill(1);
    },
  });
  const watch = new Watch();
  const began = performance.now();
  const share = () => (performance.now() - began) / 1000 / seconds;
  let requests = 0;
  {
    await using device = await openForTesting(target, { depth: 32, ioBytesMax: IO_BYTES });
    const asking = Array.from({ length: 40 }, async (_, n) => {
      while (share() < 1) {
        await device.read(n * IO_BYTES, IO_BYTES).catch(() => {});
        requests++;
        // Also when requests fail at once, it is no busy loop.
        await sleep(1);
      }
    });
    while (share() < 1) {
      watch.look(share(), requests, tell);
      await sleep(Math.min(1000, seconds * 50));
    }
    await Promise.all(asking);
    tell(
      `${device.stats().read.requests - device.stats().read.errors} of ${requests} were answered`,
    );
  }
  return watch.end(requests);
}

/** Devices of 4 MiB of buffers, all of it used, of each of which a view is kept for a while. */
export async function devices(count: number, tell: Tell): Promise<Soak> {
  const kept: Uint8Array[] = [];
  const watch = new Watch();
  for (let n = 0; n < count; n++) {
    const target = defineTarget({
      size: 16 * MIB,
      read: ({ buffer }) => void (kept[n % 8] = buffer),
    });
    await using device = await openForTesting(target, { depth: 8, ioBytesMax: IO_BYTES });
    const all = Array.from({ length: 8 }, (_, tag) => device.read(tag * IO_BYTES, IO_BYTES));
    await Promise.all(all);
    watch.look(n / count, n, tell);
  }
  await sleep(1);
  return watch.end(count);
}

if (import.meta.main) {
  const [what, amount] = process.argv.slice(2);
  const soak = { hanging: () => hanging(Number(amount ?? 1800), console.log) }[what!] ??
    (() => devices(Number(amount ?? 10_000), console.log));
  const { before, most, after, count } = await soak();
  console.log(
    `${what}: ${count}; ${before} MiB resident after a tenth, ${most} at most, ${after} at the end`,
  );
  process.exit(0);
}
