// SPDX-License-Identifier: MIT
/**
 * `concat` and `stripe`: several files or block devices as one device, one after the other or by
 * turns.
 *
 * One request may be on several files; the block layer splits what crosses a stripe's chunk. FLUSH
 * and FUA reach every file they are about.
 * @module
 */

import { UblkError, UsageError } from "../core/error.ts";
import type { OpenContext, OpenTarget, TargetType } from "../core/target.ts";
import { type BlockChoice, blockNotes, chooseBlock } from "./block_size.ts";
import {
  type Backing,
  type BackingOptions,
  closeBacking,
  discardUnit,
  measure,
  openBacking,
} from "./backing.ts";
import { type BackingFile, Files, type FilesSpec } from "./files.ts";

export interface ConcatOptions extends Omit<BackingOptions, "file" | "offsetBytes" | "sizeBytes"> {
  /** Absolute paths of regular files or block devices. */
  files: readonly string[];
}

export interface StripeOptions extends ConcatOptions {
  /** What is on a file before the next one's turn: a power of two, 4096 or more. */
  chunkBytes?: number;
}

const CHUNK_BYTES_DEFAULT = 65536;
const CHUNK_BYTES_MAX = 2 ** 30;

export const concatTarget: TargetType<ConcatOptions, FilesSpec> = {
  name: "concat",
  open: (options, context) => openFiles(options, 0, context),
  measure: () => refuseResize(),
  volume: (spec, { deviceBytes }) => new Files(spec, deviceBytes),
};

export const stripeTarget: TargetType<StripeOptions, FilesSpec> = {
  name: "stripe",
  open({ chunkBytes = CHUNK_BYTES_DEFAULT, ...options }, context) {
    const isPowerOfTwo = Number.isInteger(Math.log2(chunkBytes));
    if (!isPowerOfTwo || chunkBytes < 4096 || chunkBytes > CHUNK_BYTES_MAX) {
      throw new UsageError(`Chunk ${chunkBytes}: it must be a power of two from 4K to 1G`);
    }
    return openFiles(options, chunkBytes, context);
  },
  measure: () => refuseResize(),
  volume: (spec, { deviceBytes }) => new Files(spec, deviceBytes),
};

function refuseResize(): never {
  throw new UblkError({
    errno: "EOPNOTSUPP",
    operation: "resize",
    hint: "its size is that of its files: ubd del it, then add it with others",
  });
}

function openFiles(
  { files: paths, ...options }: ConcatOptions,
  chunkBytes: number,
  context: OpenContext,
): OpenTarget & { spec: FilesSpec } {
  const backings: Backing[] = [];
  try {
    const choice = chooseBlock({ ...options, files: paths, chunkBytes, joined: true }, context);
    const chosen = { ...options, ...(choice.blockBytes && { blockBytes: choice.blockBytes }) };
    for (const file of paths) backings.push(openBacking({ ...chosen, file }, context));
    return describe(backings, chosen, chunkBytes, choice, context);
  } catch (error) {
    for (const { fd } of backings) context.shim.native.ubd_close(fd);
    throw error;
  }
}

function describe(
  backings: readonly Backing[],
  options: Omit<BackingOptions, "file">,
  chunkBytes: number,
  choice: BlockChoice,
  context: OpenContext,
): OpenTarget & { spec: FilesSpec } {
  const readOnly = options.readOnly ?? false;
  const blockBytes = options.blockBytes ??
    Math.max(...backings.map(({ sectorBytes }) => sectorBytes));
  const { files, notes } = cut(backings, blockBytes, chunkBytes);
  const units = readOnly ? [0] : backings.map((backing) => discardUnit(backing, context));
  const discardBytes = units.includes(0) ? 0 : Math.max(...units);
  const buffered = backings.filter(({ direct }) => !direct);
  return {
    limits: {
      sizeBytes: files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      blockBytes,
      physicalBlockBytes: Math.max(blockBytes, 4096),
      readOnly,
      volatileCache: context.hasVolatileCache && !readOnly,
      discardBytes,
      writeZeroes: discardBytes > 0,
      ...(chunkBytes > 0 && { chunkBytes }),
    },
    facts: {
      backing_files: backings.map(({ path }) => path),
      direct_io: buffered.length === 0 ? 1 : 0,
      read_only: readOnly ? 1 : 0,
      ...(chunkBytes > 0 && { chunk: chunkBytes }),
    },
    notes: [
      ...(buffered.length === 0 ? ["direct I/O"] : []),
      ...buffered.map(({ path, note }) => `buffered I/O on ${path}: ${note}`),
      ...blockNotes(choice, blockBytes),
      ...notes,
    ],
    spec: {
      files,
      chunkBytes,
      blockBytes,
    },
    zeroCopy: {
      memoryAlignBytes: Math.max(
        ...backings.map(({ direct, memoryAlignBytes }) => direct ? memoryAlignBytes : 1),
      ),
    },
    close() {
      const errors: unknown[] = [];
      for (const backing of backings) {
        try {
          closeBacking(backing, readOnly, context);
        } catch (error) {
          errors.push(error);
        }
      }
      if (errors.length > 0) throw errors[0];
    },
  };
}

/** Cuts the device out of the files. @throws {UsageError} files that cannot be joined. */
function cut(
  backings: readonly Backing[],
  blockBytes: number,
  chunkBytes: number,
): { files: BackingFile[]; notes: string[] } {
  for (const backing of backings) {
    const { path, bytes } = backing;
    const { sizeBytes } = measure({ file: path, blockBytes }, backing);
    if (sizeBytes === bytes) continue;
    throw new UsageError(
      `Cannot join ${path}: its ${bytes} bytes are no multiple of ${blockBytes} ` +
        `(truncate -s %${blockBytes} ${path} rounds up)`,
    );
  }
  const smallest = Math.min(...backings.map(({ bytes }) => bytes));
  const each = chunkBytes > 0 ? Math.floor(smallest / chunkBytes) * chunkBytes : Infinity;
  if (each === 0) {
    throw new UsageError(`Chunk ${chunkBytes}: the smallest file has ${smallest} bytes`);
  }
  const files = backings.map(({ fd, bytes }) => {
    const sizeBytes = Math.min(bytes, each);
    return { fd, offsetBytes: 0, sizeBytes, endBytes: sizeBytes };
  });
  const notes = backings.filter(({ bytes }) => bytes > each)
    .map(({ path, bytes }) => `the last ${bytes - each} bytes of ${path} are not used`);
  return { files, notes };
}
