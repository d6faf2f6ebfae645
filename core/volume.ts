// SPDX-License-Identifier: MIT
/**
 * What a device serves, as core/engine.ts asks for it: where the bytes of a request are. Sizes and
 * offsets in bytes.
 * @module
 */

/** READ or WRITE the piece's bytes there. */
export const PIECE_FILE = 0;
/** The piece reads as zeroes. */
export const PIECE_ZEROES = 1;
/** Free the piece's bytes, which then read as zeroes. */
export const PIECE_PUNCH = 2;
/** Have them read as zeroes, and keep their blocks. */
export const PIECE_KEEP = 3;
/** Make everything on the file durable. */
export const PIECE_SYNC = 4;

/**
 * Where the bytes of requests are: for each tag the pieces of its request, one after the other. Made
 * once for a queue.
 */
export class Plan {
  readonly kinds: Uint8Array;
  readonly fds: Int32Array;
  /** Where in the file. */
  readonly ats: Float64Array;
  readonly bytes: Float64Array;
  /** Where the next piece goes. */
  end = 0;
  private readonly piecesMax: number;
  private full = 0;

  /** @param piecesMax most of one request. */
  constructor(depth: number, piecesMax: number) {
    this.piecesMax = piecesMax;
    this.kinds = new Uint8Array(depth * piecesMax);
    this.fds = new Int32Array(depth * piecesMax);
    this.ats = new Float64Array(depth * piecesMax);
    this.bytes = new Float64Array(depth * piecesMax);
  }

  /** Where the tag's first piece is. */
  first(tag: number): number {
    return tag * this.piecesMax;
  }

  /** Forgets the tag's pieces. @returns where its first one goes. */
  begin(tag: number): number {
    const first = this.end = tag * this.piecesMax;
    this.full = first + this.piecesMax;
    return first;
  }

  /** READs and WRITEs: the next bytes of the request are in this file, from `at` on. */
  file(fd: number, at: number, bytes: number): void {
    this.add(PIECE_FILE, fd, at, bytes);
  }

  /** READs: the next bytes of the request are zeroes. */
  zeroes(bytes: number): void {
    this.add(PIECE_ZEROES, -1, 0, bytes);
  }

  /** DISCARD and WRITE_ZEROES: bytes of the request, in any order. @param keep their blocks. */
  punch(fd: number, at: number, bytes: number, keep: boolean): void {
    this.add(keep ? PIECE_KEEP : PIECE_PUNCH, fd, at, bytes);
  }

  /** FLUSH: a file that has some of what was written. */
  sync(fd: number): void {
    this.add(PIECE_SYNC, fd, 0, 0);
  }

  private add(kind: number, fd: number, at: number, bytes: number): void {
    const index = this.end++;
    if (index >= this.full) throw new RangeError(`more pieces than ${this.piecesMax}`);
    this.kinds[index] = kind;
    this.fds[index] = fd;
    this.ats[index] = at;
    this.bytes[index] = bytes;
  }
}

/** What a device serves. Made in each queue's thread. */
export interface Volume {
  /** Most pieces that `map` answers with. Default: 1. */
  readonly piecesMax?: number;
  /**
   * Says where the bytes of a request are. It looks at no data and allocates nothing. No piece:
   * there is nothing to be done.
   *
   * @param op UBLK_IO_OP_*.
   * @param length 0 for a FLUSH.
   * @param flags as Queue.flags.
   * @returns how many bytes of the request the pieces are about, from its start: the engine asks
   * for the rest when they are done; or -errno.
   */
  map(op: number, offset: number, length: number, flags: number, plan: Plan): number;
  /**
   * A READ of a file came to its end here: whether the rest of the request is zeroes. Default: no
   * file ends inside a volume.
   */
  endsAt?(offset: number): boolean;
}
