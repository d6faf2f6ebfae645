// SPDX-License-Identifier: MIT
/**
 * Carries out what a volume has planned, on the queue's ring: nothing waits in TypeScript.
 *
 * A request is served piece by piece, each with one operation in flight. Short transfers are
 * continued, errors are passed on. FLUSH is fdatasync and FUA is RWF_DSYNC, both durable for direct
 * and buffered I/O; what WRITE_ZEROES did to files is synced when FUA asks for it. A file that can
 * neither punch a hole nor zero a range is written with zeroes.
 *
 * With zero copy the bytes of requests are never here.
 * @module
 */

import { readlinkSync } from "node:fs";
import { ERRNO, errnoName } from "../abi/errno.ts";
import {
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FALLOC_FL_ZERO_RANGE,
  IORING_FSYNC_DATASYNC,
  RWF_DSYNC,
} from "../abi/io_uring.ts";
import {
  OP_NAMES,
  UBLK_IO_F_FUA,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";
import { descriptorPath } from "./file_identity.ts";
import { movesData, type Queue } from "./queue.ts";
import type { RequestHandler, ServeContext } from "./target.ts";
import {
  PIECE_FILE,
  PIECE_KEEP,
  PIECE_PUNCH,
  PIECE_SYNC,
  PIECE_ZEROES,
  Plan,
  type Volume,
} from "./volume.ts";

/** One file operation is all of a READ or WRITE: nothing else is kept of such a request. */
const WHOLE = 0;
/** Its pieces are carried out. */
const PIECES = 1;
/** A piece could not be punched, and is written with zeroes. */
const ZEROING = 2;
/** The pieces are done, and their files are synced. */
const SYNCING = 3;

/** Unexpected, but the kernel may ask for patience; more than this is an error. */
const RETRIES_MAX = 64;

export class Engine implements RequestHandler {
  private readonly volume: Volume;
  private readonly plan: Plan;
  private readonly log: (text: string) => void;
  private readonly ioBytesMax: number;
  private readonly phase: Uint8Array;
  private readonly retries: Uint8Array;
  /** Where in the request the piece begins that it is at; without data: the first of its pieces. */
  private readonly done: Float64Array;
  /** Bytes of that piece that are done. */
  private readonly part: Float64Array;
  /** Where in the request its pieces end. */
  private readonly covered: Float64Array;
  /** In the plan: the piece it is at, and the one after its last. */
  private readonly piece: Uint32Array;
  private readonly end: Uint32Array;

  constructor(volume: Volume, { depth, log, ioBytesMax }: ServeContext) {
    this.volume = volume;
    this.plan = new Plan(depth, volume.piecesMax ?? 1);
    this.log = log;
    this.ioBytesMax = ioBytesMax;
    this.phase = new Uint8Array(depth);
    this.retries = new Uint8Array(depth);
    this.done = new Float64Array(depth);
    this.part = new Float64Array(depth);
    this.covered = new Float64Array(depth);
    this.piece = new Uint32Array(depth);
    this.end = new Uint32Array(depth);
  }

  handle(queue: Queue, tag: number): void {
    // What most requests are, in one piece; `resume` has the other half of it.
    const { plan } = this;
    const op = queue.op(tag);
    const bytes = queue.bytes(tag);
    const first = plan.begin(tag);
    const mapped = this.volume.map(op, queue.offset(tag), bytes, queue.flags(tag), plan);
    if (mapped === bytes) {
      if (plan.end === first) return queue.commit(tag, movesData(op) ? bytes : 0);
      if (
        plan.end === first + 1 && plan.kinds[first] === PIECE_FILE && plan.bytes[first] === bytes
      ) {
        this.phase[tag] = WHOLE;
        const fd = plan.fds[first]!;
        const at = plan.ats[first]!;
        if (op === UBLK_IO_OP_READ) return queue.read(tag, fd, 0, bytes, at);
        if (op === UBLK_IO_OP_WRITE) {
          return queue.write(tag, fd, 0, bytes, at, isDurable(queue, tag) ? RWF_DSYNC : 0);
        }
      }
    }
    this.divide(tag);
    this.take(queue, tag, mapped);
  }

  resume(queue: Queue, tag: number, result: number): void {
    if (this.phase[tag] === WHOLE) {
      const bytes = queue.bytes(tag);
      if (result === bytes) return queue.commit(tag, result);
      this.divide(tag);
      this.phase[tag] = PIECES;
      this.piece[tag] = this.plan.first(tag);
      this.covered[tag] = bytes;
      this.end[tag] = this.piece[tag]! + 1;
    }
    if (result === -ERRNO.EAGAIN || result === -ERRNO.EINTR) {
      if (this.retries[tag]!++ < RETRIES_MAX) return this.go(queue, tag);
    }
    if (this.phase[tag] === SYNCING) return this.synced(queue, tag, result);
    switch (this.plan.kinds[this.piece[tag]!]) {
      case PIECE_PUNCH:
      case PIECE_KEEP:
        return this.cleared(queue, tag, result);
      case PIECE_SYNC:
        return result < 0 ? this.fail(queue, tag, result) : this.next(queue, tag);
      default:
        return this.moved(queue, tag, result);
    }
  }

  /** The request takes more than one operation, or none that moves data. */
  private divide(tag: number): void {
    this.retries[tag] = 0;
    this.done[tag] = 0;
    this.part[tag] = 0;
  }

  /** Begins with what the volume has planned for what is left of the request. */
  private take(queue: Queue, tag: number, mapped: number): void {
    const done = this.done[tag]!;
    const left = queue.bytes(tag) - done;
    if (mapped < 0) return queue.commit(tag, movesData(queue.op(tag)) && done > 0 ? done : mapped);
    if (mapped > left || (mapped === 0 && left > 0)) {
      throw new RangeError(`the volume has planned ${mapped} bytes of ${left}`);
    }
    this.phase[tag] = PIECES;
    this.covered[tag] = done + mapped;
    this.piece[tag] = this.plan.first(tag);
    this.end[tag] = this.plan.end;
    this.go(queue, tag);
  }

  /** Begins the operation for what is left of the piece, or of the request after the last one. */
  private go(queue: Queue, tag: number): void {
    if (this.phase[tag] === SYNCING) return this.sync(queue, tag);
    const index = this.piece[tag]!;
    if (index === this.end[tag]) return this.ended(queue, tag);
    const { plan } = this;
    const part = this.part[tag]!;
    const fd = plan.fds[index]!;
    const at = plan.ats[index]! + part;
    const left = plan.bytes[index]! - part;
    const kind = plan.kinds[index]!;
    const op = queue.op(tag);
    switch (kind) {
      case PIECE_FILE:
      case PIECE_ZEROES: {
        const from = this.done[tag]! + part;
        // Memory after the request's is another's.
        if (from + left > this.covered[tag]!) throw new RangeError("a piece of more than was said");
        if (op === UBLK_IO_OP_READ) {
          if (kind === PIECE_FILE) return queue.read(tag, fd, from, left, at);
          if (!queue.readZeroes(tag, from, left)) return;
          return this.moved(queue, tag, left);
        }
        if (op === UBLK_IO_OP_WRITE && kind === PIECE_FILE) {
          const flags = isDurable(queue, tag) ? RWF_DSYNC : 0;
          return queue.write(tag, fd, from, left, at, flags);
        }
        break;
      }
      case PIECE_PUNCH:
      case PIECE_KEEP: {
        if (op !== UBLK_IO_OP_DISCARD && op !== UBLK_IO_OP_WRITE_ZEROES) break;
        if (this.phase[tag] === ZEROING) {
          return queue.writeZeroes(tag, fd, Math.min(left, this.ioBytesMax), at);
        }
        const mode = kind === PIECE_KEEP ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE;
        return queue.fallocate(tag, fd, mode | FALLOC_FL_KEEP_SIZE, at, left);
      }
      case PIECE_SYNC:
        return queue.fsync(tag, fd, IORING_FSYNC_DATASYNC);
    }
    throw new RangeError(`the volume has planned what is no part of a ${OP_NAMES.get(op)}`);
  }

  private next(queue: Queue, tag: number): void {
    this.piece[tag]!++;
    this.part[tag] = 0;
    this.phase[tag] = PIECES;
    this.go(queue, tag);
  }

  /** Of a READ or WRITE. */
  private moved(queue: Queue, tag: number, result: number): void {
    const { plan } = this;
    const op = queue.op(tag);
    if (result < 0) return this.fail(queue, tag, result);
    const index = this.piece[tag]!;
    const part = this.part[tag]! += result;
    if (part === plan.bytes[index]) {
      this.done[tag]! += part;
      return this.next(queue, tag);
    }
    const isFile = plan.kinds[index] === PIECE_FILE;
    const reached = this.done[tag]! + part;
    if (op === UBLK_IO_OP_READ && isFile && this.volume.endsAt?.(queue.offset(tag) + reached)) {
      this.done[tag] = reached;
      this.part[tag] = 0;
      this.covered[tag] = queue.bytes(tag);
      plan.kinds[index] = PIECE_ZEROES;
      plan.bytes[index] = queue.bytes(tag) - reached;
      this.end[tag] = index + 1;
      return this.go(queue, tag);
    }
    if (result > 0) return this.go(queue, tag);
    if (op === UBLK_IO_OP_READ && isFile) {
      this.log(`${this.name(tag)} was cut short while in use: reads after its new end fail`);
      return queue.commit(tag, -ERRNO.EIO);
    }
    this.fail(queue, tag, -ERRNO.EIO);
  }

  /** Of a DISCARD or WRITE_ZEROES. */
  private cleared(queue: Queue, tag: number, result: number): void {
    if (this.phase[tag] === ZEROING) {
      if (result <= 0) return this.fail(queue, tag, result === 0 ? -ERRNO.EIO : result);
      const part = this.part[tag]! += result;
      return part < this.plan.bytes[this.piece[tag]!]!
        ? this.go(queue, tag)
        : this.next(queue, tag);
    }
    const isHint = queue.op(tag) === UBLK_IO_OP_DISCARD;
    // A hint: a backing that cannot has kept its data, which is allowed.
    if (result >= 0 || isHint && result === -ERRNO.EOPNOTSUPP) return this.next(queue, tag);
    if (result !== -ERRNO.EOPNOTSUPP) return this.fail(queue, tag, result);
    this.phase[tag] = ZEROING;
    this.go(queue, tag);
  }

  /** All pieces are done. */
  private ended(queue: Queue, tag: number): void {
    const op = queue.op(tag);
    if (op === UBLK_IO_OP_WRITE_ZEROES && isDurable(queue, tag)) {
      this.phase[tag] = SYNCING;
      this.piece[tag] = this.plan.first(tag);
      return this.sync(queue, tag);
    }
    this.goOn(queue, tag);
  }

  /** Makes everything on the piece's file durable, and then on the next one's. */
  private sync(queue: Queue, tag: number): void {
    const { plan } = this;
    for (; this.piece[tag]! < this.end[tag]!; this.piece[tag]!++) {
      const index = this.piece[tag]!;
      const isOther = index === plan.first(tag) || plan.fds[index] !== plan.fds[index - 1];
      if (isOther) return queue.fsync(tag, plan.fds[index]!, IORING_FSYNC_DATASYNC);
    }
    this.goOn(queue, tag);
  }

  private synced(queue: Queue, tag: number, result: number): void {
    if (result < 0) return this.fail(queue, tag, result);
    this.piece[tag]!++;
    this.sync(queue, tag);
  }

  /** With what is left of the request. */
  private goOn(queue: Queue, tag: number): void {
    const op = queue.op(tag);
    const bytes = queue.bytes(tag);
    const covered = this.covered[tag]!;
    if (movesData(op) && this.done[tag] !== covered) {
      throw new RangeError("the volume's pieces are less than it has said");
    }
    if (covered === bytes) return queue.commit(tag, movesData(op) ? bytes : 0);
    this.done[tag] = covered;
    this.plan.begin(tag);
    const { volume, plan } = this;
    const left = bytes - covered;
    const mapped = volume.map(op, queue.offset(tag) + covered, left, queue.flags(tag), plan);
    this.take(queue, tag, mapped);
  }

  private fail(queue: Queue, tag: number, result: number): void {
    const op = OP_NAMES.get(queue.op(tag));
    this.log(`${op} on ${this.name(tag)} fails: ${errnoName(-result)}`);
    queue.commit(tag, result);
  }

  /** The file that the request is at, as it is called now. */
  private name(tag: number): string {
    const fd = this.plan.fds[this.piece[tag]!]!;
    try {
      return readlinkSync(descriptorPath(fd));
    } catch {
      return `descriptor ${fd}`;
    }
  }
}

/** Whether what the request writes must be durable before it is answered. */
function isDurable(queue: Queue, tag: number): boolean {
  return (queue.flags(tag) & UBLK_IO_F_FUA) !== 0;
}
