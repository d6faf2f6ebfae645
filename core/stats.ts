// SPDX-License-Identifier: MIT
/**
 * What a queue has done, counted by the shim, when it tells the driver, in memory that the device's
 * owner shares with the queue's thread: a Float64Array of three counts for each operation. Reading
 * takes no lock; the counts of one operation may be a request apart.
 * @module
 */

import {
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";

const COUNTS = 3;
const OPS = 32;

/** Of one operation. */
export interface OperationStats {
  /** Requests answered, failed ones included. */
  requests: number;
  /** Bytes moved: of READ and WRITE only. */
  bytes: number;
  /** Requests answered with an errno. */
  errors: number;
}

/** Requests answered since the device was started, by operation. */
export interface DeviceStats {
  /** READ. */
  read: OperationStats;
  /** WRITE. */
  write: OperationStats;
  /** FLUSH, without those that a FUA led to. */
  flush: OperationStats;
  /** DISCARD. */
  discard: OperationStats;
  /** WRITE_ZEROES. */
  writeZeroes: OperationStats;
}

/** @returns zeroes, in memory that can be handed to another thread. */
export function emptyStats(): Float64Array<SharedArrayBuffer> {
  return new Float64Array(new SharedArrayBuffer(COUNTS * OPS * 8));
}

/** As the shim does, for who takes its place. @param result bytes of READ and WRITE, or -errno. */
export function countRequest(stats: Float64Array, op: number, result: number): void {
  const at = (op & OPS - 1) * COUNTS;
  stats[at]!++;
  if (result >= 0) stats[at + 1]! += result;
  else stats[at + 2]!++;
}

/** Adds up the queues of a device. */
export function sumStats(queues: readonly Float64Array[]): DeviceStats {
  const sum = (op: number, count: number) =>
    queues.reduce((total, stats) => total + stats[op * COUNTS + count]!, 0);
  const of = (op: number) => ({
    requests: sum(op, 0),
    bytes: sum(op, 1),
    errors: sum(op, 2),
  });
  return {
    read: of(UBLK_IO_OP_READ),
    write: of(UBLK_IO_OP_WRITE),
    flush: of(UBLK_IO_OP_FLUSH),
    discard: of(UBLK_IO_OP_DISCARD),
    writeZeroes: of(UBLK_IO_OP_WRITE_ZEROES),
  };
}
