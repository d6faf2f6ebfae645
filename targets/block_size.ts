// SPDX-License-Identifier: MIT
/**
 * The logical block of a device that is made of files: what its partition table counts in, unless
 * something else was asked for. It is not what is on the device that changes by that, only how it
 * may be asked for.
 * @module
 */

import { closeSync, openSync, readSync, type Stats, statSync } from "node:fs";
import { descriptorPath } from "../core/file_identity.ts";
import { contents, deviceNumber } from "../core/proc.ts";
import type { OpenContext } from "../core/target.ts";
import { findPartitionTable, type PartitionTable } from "./partition_table.ts";

export interface BlockWish {
  /** Of the device, in order. */
  files: readonly string[];
  /** As Layout has it. */
  chunkBytes: number;
  offsetBytes?: number | undefined;
  sizeBytes?: number | undefined;
  blockBytes?: number | undefined;
  /** The files are joined: each must have whole blocks. */
  joined: boolean;
}

/** A table whose sectors are known, and whether the device's blocks are to be such sectors. */
export interface BlockChoice {
  readonly table?: PartitionTable;
  readonly blockBytes?: number;
}

/** Looks at the beginning of the device before its files are opened to be served. */
export function chooseBlock(wish: BlockWish, context: OpenContext): BlockChoice {
  const { files, chunkBytes, offsetBytes = 0, blockBytes } = wish;
  const paths = files.map((path) => {
    const held = context.held?.(path);
    return held === undefined ? path : descriptorPath(held);
  });
  const table = findPartitionTable((at, length) => {
    // One behind the other: what matters is in the first. By turns: chunk by chunk.
    const parts: Uint8Array[] = [];
    for (let from = at; from < at + length;) {
      const chunk = Math.floor(from / (chunkBytes || Infinity));
      const end = chunkBytes ? Math.min(at + length, (chunk + 1) * chunkBytes) : at + length;
      const inFile = chunkBytes
        ? Math.floor(chunk / paths.length) * chunkBytes + from % chunkBytes
        : from + offsetBytes;
      const part = read(paths[chunkBytes ? chunk % paths.length : 0]!, inFile, end - from);
      if (!part) return undefined;
      parts.push(part);
      from = end;
    }
    return join(parts);
  });
  if (!table) return {};
  const own = blockBytes === undefined && table.sectorBytes > 512 && fits(wish, paths, table);
  return { table, ...(own && { blockBytes: table.sectorBytes }) };
}

/** @param blockBytes what the device has. @param choice what was chosen for it. */
export function blockNotes({ table, blockBytes: own }: BlockChoice, blockBytes: number): string[] {
  if (!table) return [];
  const { kind, sectorBytes } = table;
  if (own !== undefined) {
    return [`blocks of ${own} bytes, which its ${kind} partition table is for`];
  }
  if (sectorBytes === blockBytes) return [];
  return [
    `its ${kind} partition table is for sectors of ${sectorBytes} bytes, so its partitions do not ` +
    `appear in blocks of ${blockBytes}: --block-size ${sectorBytes}`,
  ];
}

/** What has no whole number of such blocks keeps those that it can have. */
function fits(
  { offsetBytes = 0, sizeBytes, joined }: BlockWish,
  paths: readonly string[],
  { sectorBytes }: PartitionTable,
): boolean {
  if (sizeBytes !== undefined) return sizeBytes % sectorBytes === 0;
  return paths.every((path) => {
    const stats = statSync(path);
    const isBlockDevice = stats.isBlockDevice();
    if (!joined && !isBlockDevice) return true; // A file need not fill the last block.
    return ((isBlockDevice ? diskBytes(stats) : stats.size) - offsetBytes) % sectorBytes === 0;
  });
}

function diskBytes(stats: Stats): number {
  return Number(contents(`/sys/dev/block/${deviceNumber(stats)}/size`)) * 512;
}

/** @returns undefined also for what cannot be read: it is opened later, and told of then. */
function read(path: string, at: number, length: number): Uint8Array | undefined {
  try {
    const stats = statSync(path);
    if (!stats.isFile() && !stats.isBlockDevice()) return undefined;
    const fd = openSync(path, "r");
    try {
      const bytes = new Uint8Array(length);
      return readSync(fd, bytes, 0, length, at) === length ? bytes : undefined;
    } finally {
      closeSync(fd);
    }
  } catch {
    return undefined;
  }
}

function join(parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
