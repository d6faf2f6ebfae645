// SPDX-License-Identifier: MIT
/** `checkOptions`, `checkBuffers`: the last value that is taken and the first that is not, for each option. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { UBLK_F_PER_IO_DAEMON } from "../../abi/ublk_cmd.ts";
import { shareOut, threadsFor } from "../../core/attach.ts";
import {
  checkBuffers,
  checkOptions,
  DEPTH_DEFAULT,
  IO_BYTES_DEFAULT,
  QUEUES_DEFAULT,
  refuseQueues,
} from "../../core/device.ts";
import { UsageError } from "../../core/error.ts";

const DEFAULTS = {
  id: -1,
  queues: QUEUES_DEFAULT,
  depth: DEPTH_DEFAULT,
  ioBytesMax: IO_BYTES_DEFAULT,
};

type Options = Partial<Parameters<typeof checkOptions>[0]>;

const takes = (options: Options) => checkOptions({ ...DEFAULTS, ...options });

function refuses(options: Options, message: string): void {
  assert.throws(() => takes(options), new UsageError(message), JSON.stringify(options));
}

test("checkOptions takes the defaults, which are ublk's", () => {
  assert.deepStrictEqual(DEFAULTS, { id: -1, queues: 1, depth: 128, ioBytesMax: 524288 });
  takes({});
});

const RANGES: [keyof typeof DEFAULTS, string, number, number][] = [
  ["id", "Device id", -1, 1048575],
  ["queues", "Number of queues", 1, 4096],
  ["depth", "Queue depth", 1, 4096],
];

for (const [key, name, min, max] of RANGES) {
  test(`checkOptions takes ${key} from ${min} to ${max}, whole numbers only`, () => {
    for (const value of [min, min + 1, max - 1, max]) takes({ [key]: value });
    for (const value of [min - 1, max + 1, min + 0.5, NaN, Infinity, -Infinity]) {
      refuses({ [key]: value }, `${name} ${value}: it must be from ${min} to ${max}`);
    }
  });
}

test("checkOptions takes as many threads as there are tags, with batches as queues", () => {
  for (const threads of [1, 2, 3, 8]) takes({ queues: 2, depth: 4, threads });
  takes({ queues: 2, threads: 1, batch: true });
  takes({ queues: 2, threads: 2, batch: true });
  for (const threads of [0, 9, 1.5, NaN]) {
    const message = `Number of threads ${threads}: it must be from 1 to 8`;
    refuses({ queues: 2, depth: 4, threads }, message);
  }
  refuses({ queues: 64, threads: 1025 }, "Number of threads 1025: it must be from 1 to 1024");
  const batches = "Number of threads 3: with batches, a queue has one thread";
  refuses({ queues: 2, threads: 3, batch: true }, batches);
});

test("where the driver makes fewer queues, or lets none be shared, there are fewer threads", () => {
  const device = { queues: 2, depth: 4, flags: 0n };
  const sharing = { ...device, flags: UBLK_F_PER_IO_DAEMON };
  assert.deepEqual([undefined, 1, 2, 3].map((asked) => threadsFor(device, asked)), [2, 1, 2, 2]);
  assert.deepEqual([undefined, 1, 3, 9].map((asked) => threadsFor(sharing, asked)), [2, 1, 3, 8]);
});

test("refuseQueues counts threads, too", () => {
  refuseQueues(2, {}, 8);
  refuseQueues(2, { queuesMax: 3 }, 3);
  const refused = (queues: number, threads: number | undefined, message: string) =>
    assert.throws(() => refuseQueues(queues, { queuesMax: 1 }, threads), new UsageError(message));
  refused(1, 2, "Number of threads 2: this target can be served by 1");
  refused(2, 1, "Number of queues 2: this target can be served by 1");
  refused(2, undefined, "Number of queues 2: this target can be served by 1");
});

test("what threads have of queues: every tag once, and nearly the same number of each", () => {
  const depth = 7;
  for (let queues = 1; queues <= 5; queues++) {
    for (let threads = 1; threads <= queues * depth; threads++) {
      const shares = shareOut(queues, threads);
      assert.equal(shares.length, threads);
      const held: string[] = [];
      for (const own of shares) {
        for (const { queueId, tags = { first: 0, step: 1 } } of own) {
          assert.ok(tags.first < depth, "a thread has nothing to do");
          for (let tag = tags.first; tag < depth; tag += tags.step) held.push(`${queueId}:${tag}`);
        }
      }
      const all = Array.from({ length: queues * depth }, (_, at) => [at / depth | 0, at % depth]);
      assert.deepEqual(held.sort(), all.map((tag) => tag.join(":")).sort());
      const parts = shares.map((own) => own.length);
      const onePerTag = shares.flat().map(({ tags }) => tags?.step ?? 1);
      for (const counts of [parts, onePerTag]) {
        assert.ok(Math.max(...counts) - Math.min(...counts) <= 1, `${queues} ${threads} ${counts}`);
      }
      if (queues === threads) assert.ok(parts.every((count) => count === 1));
    }
  }
});

test("checkOptions takes ioBytesMax from a page to 32 MiB, in whole pages", () => {
  const most = 33554432;
  for (const ioBytesMax of [4096, 8192, 524288, most - 4096, most]) takes({ ioBytesMax });
  for (const ioBytesMax of [0, -4096, 4095, 512, most + 1, most + 4096, 4096.5, NaN]) {
    refuses(
      { ioBytesMax },
      `Largest I/O in bytes ${ioBytesMax}: it must be from 4096 to ${most}`,
    );
  }
  for (const ioBytesMax of [4097, 8191, 524288 + 512, most - 1]) {
    refuses({ ioBytesMax }, `Largest I/O ${ioBytesMax}: it must be a multiple of 4096 bytes`);
  }
});

test("checkBuffers takes a queue's buffers of 4 GiB, and one page more per tag not", () => {
  const largest: [number, number][] = [[4096, 1048576], [128, 33554432], [1024, 4194304]];
  for (const [depth, ioBytesMax] of largest) {
    checkBuffers(depth, ioBytesMax);
    const more: [number, number][] = [[depth + 1, ioBytesMax], [depth, ioBytesMax + 4096]];
    for (const [tooDeep, tooLarge] of more) {
      assert.throws(
        () => checkBuffers(tooDeep, tooLarge),
        new UsageError(
          `Queue depth ${tooDeep} with ${tooLarge} bytes each: the buffers of a queue may take ` +
            "4294967296 bytes; lower one of the two",
        ),
      );
    }
  }
});
