// SPDX-License-Identifier: MIT
/** Which file has which bytes of a device: one behind the other, or by turns. @module */

/** The part of a file that a device uses, in bytes. */
export interface Extent {
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

export interface Place {
  /** Index of the file. */
  file: number;
  /** Where in the file. */
  at: number;
  /** Bytes of the device that follow there. */
  left: number;
}

export class Layout {
  private readonly extents: readonly Extent[];
  private readonly chunkBytes: number;
  /** What all have together. */
  readonly sizeBytes: number;
  /** Where each file starts on the device and ends, when they are one behind the other. */
  private readonly starts: number[] = [];
  private readonly ends: number[] = [];
  /** Every answer of `locate`, as it is called for each request. */
  private readonly place: Place = { file: 0, at: 0, left: 0 };

  /** @param chunkBytes what is on a file before the next one's turn; 0: all of it. */
  constructor(extents: readonly Extent[], chunkBytes: number) {
    this.extents = extents;
    this.chunkBytes = chunkBytes;
    let start = 0;
    for (const { sizeBytes } of extents) {
      this.starts.push(start);
      start += sizeBytes;
      this.ends.push(start);
    }
    this.sizeBytes = start;
    // A device may grow in use.
    this.ends[extents.length - 1] = Infinity;
  }

  /** @returns where a byte of the device is; valid until the next call. */
  locate(offset: number): Place {
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
      place.file = number % this.extents.length;
      place.left = chunk - inChunk;
      inFile = (number - place.file) / this.extents.length * chunk + inChunk;
    }
    place.at = this.extents[place.file]!.offsetBytes + inFile;
    return place;
  }

  /**
   * How much of the device before `offset` is on this file. What a stretch of the device has on a
   * file is one stretch there, from `before` its start to `before` its end.
   */
  before(file: number, offset: number): number {
    const chunk = this.chunkBytes;
    const within = (bytes: number, most: number) => Math.min(Math.max(bytes, 0), most);
    if (chunk === 0) {
      const start = this.starts[file]!;
      return within(offset - start, this.ends[file]! - start);
    }
    const width = chunk * this.extents.length;
    const inTurn = offset % width;
    return (offset - inTurn) / width * chunk + within(inTurn - file * chunk, chunk);
  }
}
