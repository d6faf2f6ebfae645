// SPDX-License-Identifier: MIT
/**
 * `memory`: a disk in the server's memory, gone with it.
 *
 * Sparse and shared by the threads of all queues: SharedArrayBuffers, whose pages the kernel gives
 * when they are first written. They cannot be given back, so zeroing touches only what was written
 * before: discarding a new device costs nothing.
 * @module
 */

import {
  type BlockDevice,
  defineTarget,
  type Request,
  type Target,
} from "../core/define_target.ts";
import { UblkError, UsageError } from "../core/error.ts";

/** Bun's largest is 4 GiB; a process may have 65530 mappings. */
const CHUNK_BYTES = 256 * 1024 ** 2;
const SIZE_MAX = 8 * 1024 ** 4;

/** Unit in which it is known what was written. */
const CLUSTER_BYTES = 64 * 1024;

export interface Memory {
  chunks: SharedArrayBuffer[];
  /** A byte for each cluster: 1 once it was written. */
  written: SharedArrayBuffer;
}

/** @returns what the devices of all threads share. @throws {UsageError | UblkError} it is too much. */
export function reserve(size: number): Memory {
  if (size > SIZE_MAX) {
    throw new UsageError(`Size ${size}: memory can have up to ${SIZE_MAX} bytes`);
  }
  try {
    const written = new SharedArrayBuffer(Math.ceil(size / CLUSTER_BYTES));
    const chunks = [];
    for (let at = 0; at < size; at += CHUNK_BYTES) {
      chunks.push(new SharedArrayBuffer(Math.min(CHUNK_BYTES, size - at)));
    }
    return { chunks, written };
  } catch (cause) {
    throw new UblkError({
      errno: "ENOMEM",
      operation: `reserve ${size} bytes`,
      hint: "make it smaller, or see sysctl vm.overcommit_memory and ulimit -v",
      cause,
    });
  }
}

/** @param memory what the devices of all threads share. */
export function memoryDevice(
  size: number,
  blockSize: number,
  memory: Memory = reserve(size),
): BlockDevice {
  const chunks = memory.chunks.map((chunk) => new Uint8Array(chunk));
  const written = new Uint8Array(memory.written);
  /** The bytes from there on, up to `length` or the chunk's end. */
  const bytesAt = (offset: number, length: number) => {
    const from = offset % CHUNK_BYTES;
    return chunks[Math.floor(offset / CHUNK_BYTES)]!.subarray(from, from + length);
  };
  const zero = ({ offset, length }: Request) => {
    for (let at = offset, end = offset + length; at < end;) {
      const cluster = Math.floor(at / CLUSTER_BYTES);
      const next = Math.min(end, (cluster + 1) * CLUSTER_BYTES);
      if (written[cluster]) bytesAt(at, next - at).fill(0);
      at = next;
    }
  };
  return {
    size,
    blockSize,
    read({ offset, length, buffer }) {
      for (let done = 0; done < length;) {
        const bytes = bytesAt(offset + done, length - done);
        buffer.set(bytes, done);
        done += bytes.length;
      }
    },
    write({ offset, length, buffer }) {
      const last = Math.floor((offset + length - 1) / CLUSTER_BYTES);
      written.fill(1, Math.floor(offset / CLUSTER_BYTES), last + 1);
      for (let done = 0; done < length;) {
        const bytes = bytesAt(offset + done, length - done);
        bytes.set(buffer.subarray(done, done + bytes.length));
        done += bytes.length;
      }
    },
    discard: zero,
    writeZeroes: zero,
  };
}

/**
 * `ubd add memory`, for programs: a sparse disk in memory. Options: `size` (default: "1G") and
 * `blockSize` (default: 512), both in bytes.
 *
 * @example
 * ```ts
 * import { createDevice, memoryTarget } from "ubd";
 *
 * await using device = await createDevice(memoryTarget, { options: { size: "64M" } });
 * console.log(device.path);
 * ```
 */
export const memoryTarget: Target<{ size: { type: "size" }; blockSize: { type: "size" } }> =
  defineTarget({
    options: {
      size: { type: "size", default: "1G", description: "size of the device" },
      blockSize: { type: "size", default: 512, description: "logical block: 512, 1K, 2K or 4K" },
    },
    share: ({ size }) => reserve(size),
    open: ({ size, blockSize }, memory) => memoryDevice(size, blockSize, memory),
  });
