// SPDX-License-Identifier: MIT
/** Files with a device's bytes: all of it, one after the other, or by turns. @module */

import { ERRNO } from "../abi/errno.ts";
import {
  UBLK_IO_F_NOUNMAP,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";
import type { Plan, Volume } from "../core/volume.ts";

/** The part of a file that a device uses, in bytes. */
export interface Extent {
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

interface Place {
  /** Index of the file. */
  file: number;
  /** Where in the file. */
  at: number;
  /** Bytes of the device that follow there. */
  left: number;
}

/** An open file with a part of the device. */
export interface BackingFile extends Extent {
  readonly fd: number;
  /** Where the file's data ended when it was opened; after it, reads are zeroes. */
  readonly endBytes: number;
}

/** Structured-cloneable: descriptors are the process's, and good in all of its threads. */
export interface FilesSpec {
  readonly files: readonly BackingFile[];
  /** What is on a file before the next one's turn; 0: all of it. */
  readonly chunkBytes: number;
  readonly blockBytes: number;
}

export class Files implements Volume {
  readonly piecesMax: number;
  /** What all have together. */
  readonly sizeBytes: number;
  private readonly files: readonly BackingFile[];
  private readonly chunkBytes: number;
  private readonly blockBytes: number;
  private readonly deviceBytes: () => number | undefined;
  /** Where each file starts on the device and ends, when they are one after the other. */
  private readonly starts: number[] = [];
  private readonly ends: number[] = [];
  /** Every answer of `locate`, as it is called for each request. */
  private readonly place: Place = { file: 0, at: 0, left: 0 };

  /** @param deviceBytes as of ServeContext. */
  constructor(
    { files, chunkBytes, blockBytes }: FilesSpec,
    deviceBytes: () => number | undefined,
  ) {
    this.piecesMax = files.length;
    this.files = files;
    this.chunkBytes = chunkBytes;
    this.blockBytes = blockBytes;
    this.deviceBytes = deviceBytes;
    let start = 0;
    for (const { sizeBytes } of files) {
      this.starts.push(start);
      start += sizeBytes;
      this.ends.push(start);
    }
    this.sizeBytes = start;
    // A device may grow in use.
    this.ends[files.length - 1] = Infinity;
  }

  map(op: number, offset: number, length: number, flags: number, plan: Plan): number {
    switch (op) {
      case UBLK_IO_OP_READ:
      case UBLK_IO_OP_WRITE: {
        const place = this.locate(offset);
        const bytes = length < place.left ? length : place.left;
        plan.file(this.files[place.file]!.fd, place.at, bytes);
        return bytes;
      }
      case UBLK_IO_OP_FLUSH:
        for (const { fd } of this.files) plan.sync(fd);
        return length;
      case UBLK_IO_OP_DISCARD:
      case UBLK_IO_OP_WRITE_ZEROES: {
        const keep = op === UBLK_IO_OP_WRITE_ZEROES && (flags & UBLK_IO_F_NOUNMAP) !== 0;
        for (const [file, { fd, offsetBytes }] of this.files.entries()) {
          const from = this.before(file, offset);
          const bytes = this.before(file, offset + length) - from;
          if (bytes > 0) plan.punch(fd, offsetBytes + from, bytes, keep);
        }
        return length;
      }
      default:
        return -ERRNO.EOPNOTSUPP;
    }
  }

  /** The device's last block need not be full in its file. A resized device has another last block. */
  endsAt(offset: number): boolean {
    const sizeNow = this.deviceBytes() ?? this.sizeBytes;
    if (sizeNow !== this.sizeBytes) return offset > sizeNow - this.blockBytes;
    const { file, at } = this.locate(offset);
    return at >= this.files[file]!.endBytes;
  }

  /** @returns where a byte of the device is; valid until the next call. */
  private locate(offset: number): Place {
    const place = this.place;
    const chunk = this.chunkBytes;
    let inFile: number;
    if (chunk === 0) {
      let file = 0;
      while (offset >= this.ends[file]!) file++;
      place.file = file;
      place.left = this.ends[file]! - offset;
      inFile = offset - this.starts[file]!;
    } else {
      const inChunk = offset % chunk;
      const number = (offset - inChunk) / chunk;
      place.file = number % this.files.length;
      place.left = chunk - inChunk;
      inFile = (number - place.file) / this.files.length * chunk + inChunk;
    }
    place.at = this.files[place.file]!.offsetBytes + inFile;
    return place;
  }

  /**
   * How much of the device before `offset` is on this file. What a stretch of the device has on a
   * file is one stretch there, from `before` its start to `before` its end.
   */
  private before(file: number, offset: number): number {
    const chunk = this.chunkBytes;
    const within = (bytes: number, most: number) => Math.min(Math.max(bytes, 0), most);
    if (chunk === 0) {
      const start = this.starts[file]!;
      return within(offset - start, this.ends[file]! - start);
    }
    const width = chunk * this.files.length;
    const inTurn = offset % width;
    return (offset - inTurn) / width * chunk + within(inTurn - file * chunk, chunk);
  }
}
