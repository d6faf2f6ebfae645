// SPDX-License-Identifier: MIT
/**
 * `null`: every request succeeds at once, data is not kept. For measuring and trying out.
 *
 * A READ answers with whatever its buffer holds: zeroes, or data written to this device before.
 * @module
 */

import { UsageError } from "../core/error.ts";
import type { TargetType } from "../core/target.ts";

export const NULL_SIZE_DEFAULT = 250 * 1024 ** 3;

export interface NullOptions {
  sizeBytes?: number;
  blockBytes?: number;
}

export const nullTarget: TargetType<NullOptions, null> = {
  name: "null",

  open({ sizeBytes = NULL_SIZE_DEFAULT, blockBytes = 512 }) {
    return {
      limits: {
        sizeBytes,
        blockBytes,
        physicalBlockBytes: Math.max(blockBytes, 4096),
        readOnly: false,
        volatileCache: false,
        discardBytes: blockBytes,
        writeZeroes: true,
      },
      facts: {},
      notes: [],
      spec: null,
      // A READ then shows what is in its caller's memory: whatever the kernel had there before.
      zeroCopy: { memoryAlignBytes: 1, whenAsked: true },
      close() {},
    };
  },

  measure({ sizeBytes, blockBytes = 512 }) {
    if (sizeBytes === undefined) {
      throw new UsageError("Which size? null has no file to follow: ubd resize -n ID SIZE");
    }
    if (sizeBytes === 0 || sizeBytes % blockBytes) {
      throw new UsageError(`Size ${sizeBytes}: it must be a multiple of ${blockBytes} bytes`);
    }
    return sizeBytes;
  },

  volume: () => ({ map: (_op, _offset, length) => length }),
};
