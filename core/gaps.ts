// SPDX-License-Identifier: MIT
/**
 * What a driver leaves to those who serve its devices. The mainline driver leaves nothing: its
 * queues are plain ones.
 * @module
 */

import type { Dialect } from "../abi/dialect.ts";
import { ERRNO } from "../abi/errno.ts";
import {
  UBLK_IO_F_FUA,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";
import { movesData, Queue } from "./queue.ts";
import type { DeviceLimits, RequestHandler } from "./target.ts";

/** Structured-cloneable: it goes to the queues' threads. */
export interface Gaps {
  /** It asks neither for FLUSH nor for FUA: every write is to be durable when it is answered. */
  readonly durability: boolean;
  /** It takes any count for all of a READ or WRITE. */
  readonly rest: boolean;
  /** It sends these, UBLK_IO_OP_*, though the target does not offer them. */
  readonly refused: readonly number[];
}

/** @returns undefined: none. */
export function gapsOf(dialect: Dialect, limits: DeviceLimits): Gaps | undefined {
  const { hasVolatileCache, asksForRest, hasParams } = dialect;
  if (hasVolatileCache && asksForRest && hasParams) return undefined;
  const { readOnly, discardBytes, writeZeroes } = limits;
  const refused = [
    ...(readOnly ? [UBLK_IO_OP_WRITE] : []),
    ...(readOnly || discardBytes === 0 ? [UBLK_IO_OP_DISCARD] : []),
    ...(readOnly || !writeZeroes ? [UBLK_IO_OP_WRITE_ZEROES] : []),
  ];
  return {
    durability: !hasVolatileCache,
    rest: !asksForRest,
    refused: hasParams ? [] : refused,
  };
}

/** A queue whose handler need not know of the driver's gaps. */
export class GapQueue extends Queue {
  /** Set after the constructor, whose parameters are Queue's. */
  gaps: Gaps = { durability: false, rest: false, refused: [] };
  /** Is asked for the rest of what it has answered with less than all. */
  handler: RequestHandler | undefined;
  /** Bytes of a tag's request that are done: it is for what comes after them. */
  readonly #done: Float64Array = new Float64Array(this.depth);
  /** What they were, of a READ: their place in the tag's buffer is the rest's for now. */
  readonly #read: Uint8Array[][] = Array.from({ length: this.depth }, () => []);

  override flags(tag: number): number {
    const op = this.op(tag);
    const writes = op === UBLK_IO_OP_WRITE || op === UBLK_IO_OP_WRITE_ZEROES;
    return super.flags(tag) | (this.gaps.durability && writes ? UBLK_IO_F_FUA : 0);
  }

  override bytes(tag: number): number {
    return super.bytes(tag) - this.#done[tag]!;
  }

  override offset(tag: number): number {
    return super.offset(tag) + this.#done[tag]!;
  }

  override commit(tag: number, result: number): void {
    const op = this.op(tag);
    if (!movesData(op) || !this.gaps.rest) return super.commit(tag, result);
    const bytes = this.bytes(tag);
    if (result > 0 && result < bytes) return this.#goOn(tag, op, result, bytes);
    const done = this.#done[tag]!;
    const failed = result !== bytes;
    if (done > 0 && !failed && op === UBLK_IO_OP_READ) this.#join(tag, done, bytes);
    this.#done[tag] = 0;
    this.#read[tag]!.length = 0;
    super.commit(tag, !failed ? done + bytes : result < 0 ? result : -ERRNO.EIO);
  }

  /** The rest begins where the tag's buffer does, as if the driver had asked for it. */
  #goOn(tag: number, op: number, result: number, bytes: number): void {
    const data = this.data(tag, bytes);
    if (op === UBLK_IO_OP_READ) this.#read[tag]!.push(data.slice(0, result));
    else data.copyWithin(0, result);
    this.#done[tag]! += result;
    this.handler!.handle(this, tag);
  }

  #join(tag: number, done: number, bytes: number): void {
    const data = this.data(tag, done + bytes);
    data.copyWithin(done, 0, bytes);
    let at = 0;
    for (const part of this.#read[tag]!) {
      data.set(part, at);
      at += part.length;
    }
  }
}

/**
 * Answers what the target does not offer with EOPNOTSUPP, of which the block layer knows what it
 * means: other errnos that fit, such as EROFS, reach whoever asked as EIO.
 */
export function refusing(handler: RequestHandler, refused: readonly number[]): RequestHandler {
  return {
    handle(queue, tag) {
      if (refused.includes(queue.op(tag))) queue.commit(tag, -ERRNO.EOPNOTSUPP);
      else handler.handle(queue, tag);
    },
    resume: (queue, tag, result) => handler.resume!(queue, tag, result),
    get needsEventLoop() {
      return handler.needsEventLoop ?? false;
    },
    stopping: () => handler.stopping?.(),
  };
}
