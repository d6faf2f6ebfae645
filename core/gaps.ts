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
import { Queue } from "./queue.ts";
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

  override flags(tag: number): number {
    const op = this.op(tag);
    const writes = op === UBLK_IO_OP_WRITE || op === UBLK_IO_OP_WRITE_ZEROES;
    return super.flags(tag) | (this.gaps.durability && writes ? UBLK_IO_F_FUA : 0);
  }

  override commit(tag: number, result: number): void {
    const op = this.op(tag);
    const moves = op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE;
    const short = moves && result >= 0 && result < this.bytes(tag);
    super.commit(tag, short && this.gaps.rest ? -ERRNO.EIO : result);
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
