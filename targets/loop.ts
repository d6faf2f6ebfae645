// SPDX-License-Identifier: MIT
/**
 * `loop`: a regular file or a block device as the device's contents.
 *
 * The device is the file's bytes from `offset`, rounded up to a block: of an image whose size is
 * no multiple of it, the last block reads as zeroes after the end of the file, and writing it
 * lets the file grow. Nothing is cut off.
 *
 * DISCARD punches a hole; WRITE_ZEROES too, or keeps the blocks when asked to (NOUNMAP).
 * @module
 */

import type { TargetType } from "../core/target.ts";
import { type BackingOptions, closeBacking, discardUnit, measure, openBacking } from "./backing.ts";
import { blockNotes, chooseBlock } from "./block_size.ts";
import { Files, type FilesSpec } from "./files.ts";

export const loopTarget: TargetType<BackingOptions, FilesSpec> = {
  name: "loop",

  open(options, context) {
    const path = options.file;
    const choice = chooseBlock(
      { ...options, files: [path], chunkBytes: 0, joined: false },
      context,
    );
    const chosen = { ...options, ...(choice.blockBytes && { blockBytes: choice.blockBytes }) };
    const backing = openBacking(chosen, context);
    try {
      const extent = measure(chosen, backing);
      const readOnly = options.readOnly ?? false;
      const discardBytes = readOnly ? 0 : discardUnit(backing, context);
      return {
        limits: {
          sizeBytes: extent.sizeBytes,
          blockBytes: extent.blockBytes,
          physicalBlockBytes: Math.max(extent.blockBytes, 4096),
          readOnly,
          volatileCache: context.hasVolatileCache && !readOnly,
          discardBytes,
          writeZeroes: discardBytes > 0,
        },
        facts: {
          backing_file: path,
          direct_io: backing.direct ? 1 : 0,
          ...(extent.offsetBytes % 512
            ? { offset_bytes: extent.offsetBytes }
            : { offset: extent.offsetBytes / 512 }),
          read_only: readOnly ? 1 : 0,
        },
        notes: [
          backing.direct ? "direct I/O" : `buffered I/O: ${backing.note}`,
          ...blockNotes(choice, extent.blockBytes),
          ...extent.notes,
        ],
        spec: {
          files: [{
            fd: backing.fd,
            offsetBytes: extent.offsetBytes,
            sizeBytes: extent.sizeBytes,
            endBytes: Math.min(backing.bytes, extent.offsetBytes + extent.sizeBytes),
          }],
          chunkBytes: 0,
          blockBytes: extent.blockBytes,
        },
        zeroCopy: { memoryAlignBytes: backing.direct ? backing.memoryAlignBytes : 1 },
        close() {
          closeBacking(backing, readOnly, context);
        },
      };
    } catch (error) {
      context.shim.native.ubd_close(backing.fd);
      throw error;
    }
  },

  measure(options, context) {
    // Beside the server, which has the lock, and a block device for itself.
    const backing = openBacking({ ...options, readOnly: true, force: true }, context);
    context.shim.native.ubd_close(backing.fd);
    return measure(options, backing).sizeBytes;
  },

  volume: (spec, { deviceBytes }) => new Files(spec, deviceBytes),
};
