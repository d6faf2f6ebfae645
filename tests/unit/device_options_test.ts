// SPDX-License-Identifier: MIT
/** `checkOptions`, `checkBuffers`: the last value that is taken and the first that is not, for each option. */
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  checkBuffers,
  checkOptions,
  DEPTH_DEFAULT,
  IO_BYTES_DEFAULT,
  QUEUES_DEFAULT,
} from "../../core/device.ts";
import { UsageError } from "../../core/error.ts";

const DEFAULTS = {
  id: -1,
  queues: QUEUES_DEFAULT,
  depth: DEPTH_DEFAULT,
  ioBytesMax: IO_BYTES_DEFAULT,
};

type Options = Partial<typeof DEFAULTS>;

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
