// SPDX-License-Identifier: MIT
/**
 * One queue of a device, or a share of its tags: fetches requests, hands them to a handler, commits
 * the answers.
 *
 * The calling thread blocks in `run` until the driver has taken every tag back (the device was
 * stopped). One FFI call per batch; nothing is allocated for a request. A handler that has work on
 * the thread's event loop is served by `runOnEventLoop` instead, which never blocks.
 *
 * With zero copy, a request's pages are the ring's buffer with the number of its tag, and only the
 * ring sees them. The driver puts them there, or the queue does: in that mode always, else when the
 * driver could not. What the queue has registered it takes out again before the commit.
 *
 * Invariants, each asserted: a tag is free → fetched → serving → fetched … → retired, with
 * registering before and unregistering after serving where the queue does that; a request
 * gets exactly one commit; a tag has at most one SQE in flight (its io command or one file
 * operation), so commands and events never exceed depth + 1. Whoever throws with an operation in
 * flight is answered for when that has ended: until then it uses the tag's memory.
 *
 * Abort: when the device stops, the driver first waits for requests being served, then answers
 * each waiting FETCH with -ENODEV. So a tag retires only after its last commit, and the loop ends
 * with nothing in flight.
 * @module
 */

import { constants } from "node:fs";
import { setImmediate } from "node:timers";
import { ERRNO } from "../abi/errno.ts";
import {
  UBLK_IO_F_NEED_REG_BUF,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_RES_NEED_GET_DATA,
} from "../abi/ublk_cmd.ts";
import { UBLKSRV_IO_DESC } from "../abi/ublk_structs.ts";
import {
  COMMAND_COMMIT,
  COMMAND_FALLOCATE,
  COMMAND_FETCH,
  COMMAND_FSYNC,
  COMMAND_GET_DATA,
  COMMAND_READ,
  COMMAND_REGISTER,
  COMMAND_UNREGISTER,
  COMMAND_WAKE,
  COMMAND_WORDS,
  COMMAND_WRITE,
  COMMAND_WRITE_ZEROES,
  EVENT_FILE,
  EVENT_REQUEST,
  EVENT_WAKE,
  EVENT_WORDS,
  type QueueConfig,
  type QueueMemory,
  type Shim,
  TAG_BITS,
  TAG_MASK,
  type TagShare,
} from "../ffi/mod.ts";
import { assert, AssertionError } from "./assert.ts";
import { checkpoint, isCheckpoint } from "./checkpoint.ts";
import { UblkError } from "./error.ts";
import { emptyStats } from "./stats.ts";
import type { RequestHandler } from "./target.ts";

const FREE = 0;
const FETCHED = 1;
const SERVING = 2;
const RETIRED = 3;
const REGISTERING = 4;
const UNREGISTERING = 5;
/** Serving a request whose buffer this queue has registered, and unregisters. */
const SERVING_REGISTERED = 6;
/** With SERVING and SERVING_REGISTERED: a file operation is in flight for the request. */
const IN_FLIGHT = 8;
/** With that: the request is answered with EIO when the operation has ended. */
const FAILED = 16;

/** Of a turn: the queue is to end. */
const LEAVE = -1;
/** Of a turn that does not wait: something is about to come for which the ring wakes nobody. */
const SOON = -2;

const DESCRIPTOR_WORDS = 6;
assert(DESCRIPTOR_WORDS * 4 === UBLKSRV_IO_DESC.size, "a descriptor has another size");

export const SECTOR_BYTES = 512;

/** Whether a request with this operation has data. */
export function movesData(op: number): boolean {
  return op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE;
}

const REFUSES: RequestHandler = { handle: (queue, tag) => queue.commit(tag, -ERRNO.EIO) };

export class Queue implements Disposable {
  readonly depth: number;
  /** Bytes of data a request may have. */
  readonly ioBytesMax: number;
  private readonly shim: Shim;
  /** Held while the queue lives: nothing else keeps its `stats`, which the shim writes to. */
  private readonly memory: QueueMemory;
  private readonly commandWords: Int32Array;
  private readonly commandFloats: Float64Array;
  private readonly eventWords: Int32Array;
  /** The driver's: a tag's words stand from its request's arrival until the commit. */
  private descriptors: Int32Array;
  private readonly states: Uint8Array;
  /** Those that are fetched here: the others are never touched. */
  private readonly tags: TagShare;
  /** Every READ and WRITE is to be registered here; else those the driver has marked. */
  private readonly registersAll: boolean;
  private readonly copies: boolean;
  /** /dev/zero, with zero copy. */
  private readonly zeroFd: number;
  /** What a request is answered with once its buffer is unregistered. */
  private readonly results: Int32Array;
  private commandCount = 0;
  private liveTags: number;
  private started = false;
  private closed = false;
  /** Ends the wait of `runOnEventLoop`, when there is one. */
  private goOn: (() => void) | undefined;
  private failure: { error: unknown } | undefined;
  private refusing = false;

  /**
   * @param stats counts for others to read, see core/stats.ts.
   * @throws {UblkError} EPERM: io_uring is disabled; ENOMEM; EMFILE.
   */
  constructor(shim: Shim, config: QueueConfig, stats: Float64Array = emptyStats()) {
    const copies = config.zeroCopy === undefined;
    const zeroFd = copies ? -1 : shim.open("/dev/zero", constants.O_RDONLY);
    if (!copies && zeroFd < 0) throw UblkError.from(zeroFd, "open /dev/zero");
    const memory = shim.queueInit({ ...config, stats });
    if (typeof memory === "number") {
      if (!copies) shim.native.ubd_close(zeroFd);
      throw UblkError.from(memory, "set up a ring");
    }
    this.shim = shim;
    this.zeroFd = zeroFd;
    this.memory = memory;
    this.depth = config.depth;
    this.tags = config.tags ?? { first: 0, step: 1 };
    this.liveTags = Math.ceil((this.depth - this.tags.first) / this.tags.step);
    this.ioBytesMax = config.ioBytesMax;
    this.commandWords = new Int32Array(memory.commands);
    this.commandFloats = new Float64Array(memory.commands);
    this.eventWords = new Int32Array(memory.events);
    this.descriptors = new Int32Array(memory.descriptors);
    this.copies = copies;
    this.states = new Uint8Array(config.depth);
    this.registersAll = config.zeroCopy !== undefined && !config.zeroCopy.automatic;
    this.results = new Int32Array(config.depth);
  }

  /** The shim's number for it. */
  get handle(): number {
    return this.memory.handle;
  }

  /** It is closed, or refuses: nothing may be asked of it any more. */
  get disposed(): boolean {
    return this.closed || this.refusing;
  }

  /**
   * Closes the ring; what the driver still holds of it is cancelled. Views of its memory are empty
   * from then on, except those of a request that is being served, or was given up: its function may
   * still use them.
   *
   * Not while there may be requests, unless the thread ends too: 6.12, unlike 7.2, may hand one to
   * the closed ring as long as the thread lives, and then it is never answered.
   */
  [Symbol.dispose](): void {
    if (this.closed) return;
    this.closed = true;
    // A function that is still at work may ask what its request was.
    this.descriptors = this.descriptors.slice();
    this.shim.native.ubd_queue_exit(this.handle);
    if (!this.copies) this.shim.native.ubd_close(this.zeroFd);
    this.memory.pool.close((tag) => this.isServing(tag) || (this.states[tag]! & IN_FLIGHT) !== 0);
  }

  /** The request's operation: UBLK_IO_OP_*. */
  op(tag: number): number {
    return this.descriptors[tag * DESCRIPTOR_WORDS]! & 0xff;
  }

  /** The request's flags as the header defines them: test with UBLK_IO_F_*, never shifted. */
  flags(tag: number): number {
    return this.descriptors[tag * DESCRIPTOR_WORDS]! >>> 0;
  }

  /** Length in bytes. Exact; a DISCARD may have up to 2 TiB. */
  bytes(tag: number): number {
    return (this.descriptors[tag * DESCRIPTOR_WORDS + 1]! >>> 0) * SECTOR_BYTES;
  }

  /** Where on the device the request starts, in bytes. Exact below 2^53. */
  offset(tag: number): number {
    const low = this.descriptors[tag * DESCRIPTOR_WORDS + 2]! >>> 0;
    const high = this.descriptors[tag * DESCRIPTOR_WORDS + 3]!;
    return (high * 2 ** 32 + low) * SECTOR_BYTES;
  }

  /**
   * The first bytes of the tag's buffer: to be filled by a READ, to be taken from by a WRITE. Not
   * with zero copy.
   */
  data(tag: number, bytes: number): Uint8Array<ArrayBuffer> {
    assert(this.copies, "the data is not in this process");
    return this.memory.buffers[tag]!.subarray(0, bytes);
  }

  /** Zeroes a part of the tag's buffer. Not with zero copy. */
  fillZero(tag: number, start: number, end: number): void {
    assert(this.copies, "the data is not in this process");
    this.memory.buffers[tag]!.fill(0, start, end);
  }

  /**
   * Has a part of what a READ gets be zeroes.
   *
   * @returns whether it is done: with zero copy it is an operation, and `resume` gets its result.
   */
  readZeroes(tag: number, start: number, bytes: number): boolean {
    if (this.copies) this.fillZero(tag, start, start + bytes);
    else this.read(tag, this.zeroFd, start, bytes, 0);
    return this.copies;
  }

  /** All of the tag's memory, until `renewData`. Empty if somebody has transferred it. */
  buffer(tag: number): Uint8Array<ArrayBuffer> {
    return this.memory.buffers[tag]!;
  }

  /**
   * Gives a tag other memory, so that whoever was too late for its last request cannot write into
   * the data of the next. What it had before comes back by `giveBack`.
   *
   * @returns false: there is none left. The tag's requests have no data then, and what it has for
   * `data` it shares with others.
   * @throws {UblkError} ENOMEM.
   */
  renewData(tag: number): boolean {
    const renewed = this.memory.pool.renew(tag);
    if (renewed === undefined) {
      throw new UblkError({ errno: "ENOMEM", operation: "renew a buffer" });
    }
    return renewed;
  }

  /** Whoever had a `buffer` that was renewed does not use it any more: also after the end. */
  giveBack(buffer: Uint8Array<ArrayBuffer>): void {
    this.memory.pool.giveBack(buffer);
  }

  /**
   * Answers the request. READ and WRITE: bytes done; the others: 0. A failure: -errno.
   *
   * The driver would requeue a WRITE of 0 bytes for ever and hands EAGAIN to callers that cannot
   * retry, so both become EIO, as does a count that exceeds the request.
   */
  commit(tag: number, result: number): void {
    // Short, so that it is compiled as a part of its caller: what is rare is elsewhere.
    if (result <= 0 || result > this.bytes(tag)) result = this.answerOf(tag, result);
    if (this.states[tag] === SERVING) {
      this.states[tag] = FETCHED;
      this.command(COMMAND_COMMIT, tag, result);
    } else this.unregister(tag, result);
    if (this.goOn) this.goOn();
  }

  /** What a request is to be answered with that has not simply moved data. */
  private answerOf(tag: number, result: number): number {
    if (result < 0) return result === -ERRNO.EAGAIN ? -ERRNO.EIO : result;
    const op = this.op(tag);
    return movesData(op) && (result === 0 || result > this.bytes(tag)) ? -ERRNO.EIO : result;
  }

  /** The first half of a commit where this queue has registered the buffer. */
  private unregister(tag: number, result: number): void {
    assert(
      this.states[tag] === SERVING_REGISTERED,
      "commit of a tag that serves no request, or has an operation",
    );
    this.results[tag] = result;
    this.states[tag] = UNREGISTERING;
    this.command(COMMAND_UNREGISTER, tag, 0);
  }

  /** The queue cannot go on: `run` and `runOnEventLoop` end with this error, or the latter refuses. */
  break(error: unknown): void {
    this.failure ??= { error };
    if (this.goOn) this.goOn();
  }

  /** Answers what is being served with EIO. Whoever serves it may be late, as in `renewData`. */
  private refuse(): void {
    this.refusing = true;
    this.descriptors = this.descriptors.slice();
    for (let tag = 0; tag < this.depth; tag++) {
      if (this.copies && this.isServing(tag)) this.renewData(tag);
      this.fail(tag);
    }
  }

  /** Reads a file into the tag's buffer. `resume` gets bytes or -errno. */
  read(tag: number, fd: number, bufferOffset: number, bytes: number, fileOffset: number): void {
    this.operation(COMMAND_READ, tag, fd, 0, bufferOffset, bytes, fileOffset);
  }

  /** Writes the tag's buffer to a file. @param flags RWF_*. */
  write(
    tag: number,
    fd: number,
    bufferOffset: number,
    bytes: number,
    fileOffset: number,
    flags: number,
  ): void {
    this.operation(COMMAND_WRITE, tag, fd, flags, bufferOffset, bytes, fileOffset);
  }

  /** Writes zeroes to a file, up to `ioBytesMax`. The tag's buffer is not touched. */
  writeZeroes(tag: number, fd: number, bytes: number, fileOffset: number): void {
    this.operation(COMMAND_WRITE_ZEROES, tag, fd, 0, 0, bytes, fileOffset);
  }

  /** @param flags IORING_FSYNC_DATASYNC or 0. */
  fsync(tag: number, fd: number, flags: number): void {
    this.operation(COMMAND_FSYNC, tag, fd, flags, 0, 0, 0);
  }

  /** @param mode FALLOC_FL_*. */
  fallocate(tag: number, fd: number, mode: number, fileOffset: number, bytes: number): void {
    this.operation(COMMAND_FALLOCATE, tag, fd, mode, 0, bytes, fileOffset);
  }

  private operation(
    op: number,
    tag: number,
    fd: number,
    flags: number,
    bufferOffset: number,
    bytes: number,
    fileOffset: number,
  ): void {
    assert(this.isServing(tag), "an operation for a tag that serves no request, or has one");
    this.states[tag]! |= IN_FLIGHT;
    const at = this.command(op, tag, fd);
    this.commandWords[at * COMMAND_WORDS + 2] = flags;
    this.commandWords[at * COMMAND_WORDS + 3] = bufferOffset;
    this.commandFloats[at * (COMMAND_WORDS / 2) + 2] = bytes;
    this.commandFloats[at * (COMMAND_WORDS / 2) + 3] = fileOffset;
  }

  /** @returns its number in the batch; what an io command does not need may be anything there. */
  private command(op: number, tag: number, value: number): number {
    const at = this.commandCount++;
    this.commandWords[at * COMMAND_WORDS] = op << TAG_BITS | tag;
    this.commandWords[at * COMMAND_WORDS + 1] = value;
    return at;
  }

  /**
   * Serves until the driver has taken every tag back, or `woken` returns true, or the handler
   * needs the event loop: `runOnEventLoop` then goes on.
   *
   * @param woken called when the wake-up eventfd was written; true leaves at once.
   * @param failed told of a handler that threw; its request is answered with EIO.
   * @returns false when the handler needs the event loop.
   * @throws {UblkError} the ring or the driver refused what a correct server may ask.
   */
  run(handler: RequestHandler, woken: () => boolean, failed: (error: unknown) => void): boolean {
    assert(!this.started, "a queue runs once");
    this.fetchAll();
    while (this.liveTags > 0) {
      if (handler.needsEventLoop) return false;
      if (this.turn(1, handler, woken, failed) === LEAVE) return true;
      if (this.failure) throw this.failure.error;
    }
    return true;
  }

  /**
   * As `run`, without blocking: between two turns the thread's event loop runs, and while there
   * is nothing to do it sleeps until the ring or a commit wakes it.
   *
   * @param broken told of the failure after which every request is refused, until the device is
   * stopped: for a thread that lives on, and handlers without file operations. Without it the
   * failure is thrown at once.
   */
  async runOnEventLoop(
    handler: RequestHandler,
    woken: () => boolean,
    failed: (error: unknown) => void,
    broken?: (error: unknown) => void,
  ): Promise<void> {
    if (!this.started) this.fetchAll();
    const watch = this.shim.watch(() => this.goOn?.());
    if (typeof watch === "number") throw UblkError.from(watch, "set up a ring");
    try {
      const result = this.shim.native.ubd_queue_notify(this.handle, watch.fd);
      if (result < 0) throw UblkError.from(result, "set up a ring");
      while (this.liveTags > 0) {
        const asked = this.commandCount;
        const events = this.turn(0, this.refusing ? REFUSES : handler, woken, failed);
        if (events === LEAVE) return;
        // Only a step that neither takes nor brings anything has the ring wake this queue.
        const idle = asked === 0 && events === 0 && this.commandCount === 0;
        if (idle) await new Promise<void>((resolve) => this.goOn = resolve);
        // Timers and sockets get their turn also under load, and what they answer is one batch.
        if (!idle || this.commandCount > 0) await new Promise(setImmediate);
        if (!this.failure || this.refusing) continue;
        if (!broken) throw this.failure.error;
        broken(this.failure.error);
        this.refuse();
      }
    } finally {
      this.goOn = undefined;
      watch.close();
    }
  }

  /** Has every tag of this ring's fetched. */
  private fetchAll(): void {
    this.started = true;
    const { first, step } = this.tags;
    const half = first + step * (this.liveTags >> 1);
    for (let tag = first; tag < this.depth; tag += step) {
      assert(this.states[tag] === FREE, "a tag is fetched twice");
      if (tag === half && isCheckpoint("fetching")) {
        this.shim.native.ubd_step(this.handle, this.commandCount, 0);
        checkpoint("fetching");
        this.commandCount = 0;
      }
      this.states[tag] = FETCHED;
      this.command(COMMAND_FETCH, tag, 0);
    }
    this.command(COMMAND_WAKE, 0, 0);
  }

  /** Submits what there is and serves what completed. @returns how much that was, LEAVE or SOON. */
  private turn(
    wait: 0 | 1,
    handler: RequestHandler,
    woken: () => boolean,
    failed: (error: unknown) => void,
  ): number {
    const count = this.commandCount;
    // What did not fit was written nowhere.
    if (count > this.depth + 1) throw new AssertionError("more commands than tags");
    this.commandCount = 0;
    const events = this.shim.native.ubd_step(this.handle, count, wait);
    if (events < 0) {
      if (events === -ERRNO.EAGAIN) return SOON;
      throw UblkError.from(events, "enter the ring");
    }
    const { copies } = this;
    for (let index = 0; index < events; index++) {
      const word = this.eventWords[index * EVENT_WORDS]!;
      const kind = word >>> TAG_BITS;
      const tag = word & TAG_MASK;
      if (kind === EVENT_WAKE) {
        if (woken()) return LEAVE;
        this.command(COMMAND_WAKE, 0, 0);
        continue;
      }
      try {
        if (kind !== EVENT_REQUEST) {
          const result = this.eventWords[index * EVENT_WORDS + 1]!;
          if (kind === EVENT_FILE) {
            if (this.states[tag] === (SERVING | IN_FLIGHT)) {
              this.states[tag] = SERVING;
              handler.resume!(this, tag, result);
            } else this.completed(tag, result, handler);
          } else this.refused(tag, result);
        } else if (this.states[tag] !== FETCHED) {
          throw new AssertionError("request on a tag that was not fetched");
        } else if (!copies && this.mustRegister(tag)) {
          this.states[tag] = REGISTERING;
          this.command(COMMAND_REGISTER, tag, 0);
        } else {
          this.states[tag] = SERVING;
          handler.handle(this, tag);
        }
      } catch (error) {
        if (error instanceof AssertionError || error instanceof UblkError) {
          this.break(error);
          continue;
        }
        this.fail(tag);
        failed(error);
      }
    }
    return events;
  }

  /** The driver takes the tag back, or waits for something. */
  private refused(tag: number, result: number): void {
    assert(this.states[tag] === FETCHED, "a tag that was not fetched is refused");
    // A WRITE whose data is to be asked for. The answer is as that of a FETCH: the driver may
    // have put the request back, and come with another.
    if (result === UBLK_IO_RES_NEED_GET_DATA) return void this.command(COMMAND_GET_DATA, tag, 0);
    this.states[tag] = RETIRED;
    this.liveTags--;
    // It stops, or is only to have another server: what is being served goes on either way.
    if (result !== -ERRNO.ENODEV) throw UblkError.from(result, "FETCH a request");
  }

  /** Answers what the tag serves, if anything, with EIO: now, or when its operation has ended. */
  private fail(tag: number): void {
    if (this.isServing(tag)) this.commit(tag, -ERRNO.EIO);
    else if ((this.states[tag]! & IN_FLIGHT) !== 0) this.states[tag]! |= FAILED;
  }

  /** A file operation has ended whose tag has a registered buffer or has failed, or what registers. */
  private completed(tag: number, result: number, handler: RequestHandler): void {
    const state = this.states[tag]!;
    switch (state) {
      case REGISTERING:
        this.states[tag] = result < 0 ? SERVING : SERVING_REGISTERED;
        if (result < 0) this.commit(tag, result);
        else handler.handle(this, tag);
        break;
      case UNREGISTERING:
        // The driver ends no request whose pages are still registered: it would wait for ever.
        if (result < 0) throw UblkError.from(result, "UNREGISTER_IO_BUF");
        this.states[tag] = FETCHED;
        this.command(COMMAND_COMMIT, tag, this.results[tag]!);
        break;
      default:
        assert((state & IN_FLIGHT) !== 0, "completion for a tag that has no operation in flight");
        this.states[tag] = state & ~(IN_FLIGHT | FAILED);
        if ((state & FAILED) !== 0) this.commit(tag, -ERRNO.EIO);
        else handler.resume!(this, tag, result);
    }
  }

  /** And has no operation in flight. */
  private isServing(tag: number): boolean {
    return this.states[tag] === SERVING || this.states[tag] === SERVING_REGISTERED;
  }

  private mustRegister(tag: number): boolean {
    if (!this.registersAll) return (this.flags(tag) & UBLK_IO_F_NEED_REG_BUF) !== 0;
    return movesData(this.op(tag));
  }
}
