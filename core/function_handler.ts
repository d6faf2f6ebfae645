// SPDX-License-Identifier: MIT
/**
 * Calls the functions of a user's target, and turns whatever they do into one commit each.
 *
 * A request object per tag, made once: a function that returns no promise costs no allocation. A
 * promise sends the queue to the event loop. One that is not settled in time is given up: its
 * request is answered, and its tag gets other memory, since the function still holds the old one,
 * until its promise settles. There is a fixed number of spare buffers. When the functions that were
 * given up hold all of them, a tag without one fails its requests at once, until one comes back.
 * @module
 */

import { setTimeout } from "node:timers";
import { ERRNO } from "../abi/errno.ts";
import {
  OP_NAMES,
  UBLK_IO_F_FUA,
  UBLK_IO_F_NOUNMAP,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";
import type {
  Answer,
  BlockDevice,
  ReadRequest,
  WriteRequest,
  ZeroRequest,
} from "./define_target.ts";
import { describeThrown, UblkError } from "./error.ts";
import { movesData, type Queue, SECTOR_BYTES } from "./queue.ts";
import type { RequestHandler, ServeContext } from "./target.ts";

const TIMEOUT_DEFAULT_MS = 30_000;

/** Longer ones fire at once. */
const TIMER_MAX_MS = 2 ** 31 - 1;

/** Calls back once, whatever somebody's promise has for a `then` of its own. */
const { then } = Promise.prototype;

/** The time, so that a test may have one of its own. */
export interface Clock {
  /** In milliseconds. */
  now(): number;
  /** Calls later; nothing waits for that. */
  after(ms: number, call: () => void): void;
}

const CLOCK: Clock = {
  now: () => performance.now(),
  after: (ms, call) => void setTimeout(call, ms).unref(),
};

type Settle = (slot: Slot, outcome: unknown, rejected: boolean) => void;

/**
 * A tag's request, as all kinds of handlers see it: properties of its own, set anew for each request,
 * so that `{ ...request }` has them too. It stays as it is when it is given up.
 */
class TagRequest implements ReadRequest, WriteRequest, ZeroRequest {
  offset = 0;
  length = 0;
  buffer: Uint8Array<ArrayBuffer>;
  readonly signal: AbortSignal;
  fua = false;
  mayUnmap = false;

  constructor(buffer: Uint8Array<ArrayBuffer>, signal: AbortSignal) {
    this.buffer = buffer;
    this.signal = signal;
  }
}

/** What a tag has for its requests, made once; and once more when a function keeps it too long. */
class Slot {
  readonly queue: Queue;
  readonly tag: number;
  /** All of the tag's memory, as long as the tag has it. */
  readonly memory: Uint8Array<ArrayBuffer>;
  readonly request: TagRequest;
  /** What a request's promise is settled with goes here. */
  readonly fulfilled: (value: void | number) => void;
  readonly rejected: (error: unknown) => void;
  /** The last one that was needed. */
  private data: Uint8Array<ArrayBuffer>;
  private readonly none: Uint8Array<ArrayBuffer>;

  constructor(queue: Queue, tag: number, signal: AbortSignal, settle: Settle) {
    this.queue = queue;
    this.tag = tag;
    this.memory = queue.buffer(tag);
    this.none = this.data = this.memory.subarray(0, 0);
    this.request = new TagRequest(this.none, signal);
    this.fulfilled = (value) => settle(this, value, false);
    this.rejected = (error) => settle(this, error, true);
  }

  /** Throws when somebody has detached the memory, or frozen the request. */
  describe(): void {
    const { queue, tag, request } = this;
    const flags = queue.flags(tag);
    const length = queue.bytes(tag);
    request.offset = queue.offset(tag);
    request.length = length;
    request.fua = (flags & UBLK_IO_F_FUA) !== 0;
    request.mayUnmap = (flags & UBLK_IO_F_NOUNMAP) === 0;
    if (!movesData(flags & 0xff)) return void (request.buffer = this.none);
    if (this.data.length !== length) this.data = this.memory.subarray(0, length);
    request.buffer = this.data;
  }

  /** The memory is another thread's now, or nobody's. */
  get isDetached(): boolean {
    return this.memory.length === 0;
  }
}

export class FunctionHandler implements RequestHandler {
  private readonly device: BlockDevice;
  private readonly log: (text: string) => void;
  private readonly timeoutMs: number;
  private readonly maxConcurrent: number;
  private readonly blockSize: number;
  private readonly stop = new AbortController();
  private readonly slots: (Slot | undefined)[];
  /** Tags for which there was no memory. */
  private readonly parked: Uint8Array;
  /** A write is done and waits for `flush`. */
  private readonly syncing: Uint8Array;
  /** Bytes that are done, to be answered after the `flush`. */
  private readonly done: Float64Array;
  /** When a tag's promise is given up, by the clock; 0: it has none. */
  private readonly deadlines: Float64Array;
  /** Tags that wait for `maxConcurrent`. */
  private readonly waiting: number[] = [];
  private outstanding = 0;
  private readonly clock: Clock;
  /** `giveUp` will be called. */
  private armed = false;
  needsEventLoop = false;

  constructor(device: BlockDevice, { depth, log }: ServeContext, clock: Clock = CLOCK) {
    this.clock = clock;
    this.device = device;
    this.log = log;
    this.timeoutMs = device.timeoutMs ?? TIMEOUT_DEFAULT_MS;
    this.maxConcurrent = device.maxConcurrent ?? depth;
    this.blockSize = device.blockSize ?? SECTOR_BYTES;
    this.slots = new Array(depth);
    this.parked = new Uint8Array(depth);
    this.syncing = new Uint8Array(depth);
    this.done = new Float64Array(depth);
    this.deadlines = new Float64Array(depth);
  }

  stopping(): void {
    this.stop.abort();
  }

  handle(queue: Queue, tag: number): void {
    if (this.parked[tag] && !this.unpark(queue, tag)) return;
    if (this.outstanding < this.maxConcurrent) this.begin(queue, tag);
    else this.waiting.push(tag);
  }

  /** @returns whether the request can be served; else it is answered. */
  private unpark(queue: Queue, tag: number): boolean {
    const renewed = queue.renewData(tag);
    this.parked[tag] = renewed ? 0 : 1;
    // What a WRITE came with is lost.
    if (renewed && queue.op(tag) !== UBLK_IO_OP_WRITE) return true;
    queue.commit(tag, -ERRNO.ETIMEDOUT);
    return false;
  }

  private begin(queue: Queue, tag: number): void {
    this.syncing[tag] = 0;
    let slot = this.slots[tag] ?? this.newSlot(queue, tag);
    try {
      slot.describe();
    } catch {
      if (slot.isDetached) return this.replace(slot);
      slot = this.newSlot(queue, tag);
      slot.describe();
    }
    this.call(slot);
  }

  private call(slot: Slot): void {
    const { queue, tag } = slot;
    let answer: Answer;
    let promise: Promise<void | number> | undefined;
    try {
      answer = this.ask(queue, tag, slot.request);
      // Whatever else has a `then` may call back twice, or throw.
      if (isPromise(answer)) promise = Promise.resolve(answer);
    } catch (error) {
      return this.fail(slot, error);
    }
    if (promise) this.wait(slot, promise);
    else this.answer(slot, answer as void | number);
  }

  private newSlot(queue: Queue, tag: number): Slot {
    return this.slots[tag] = new Slot(queue, tag, this.stop.signal, this.settle);
  }

  private ask(queue: Queue, tag: number, request: TagRequest): Answer {
    const device = this.device;
    if (this.syncing[tag]) return device.flush!(request);
    switch (queue.op(tag)) {
      case UBLK_IO_OP_READ:
        // What a function leaves out must not be what another request left behind.
        queue.fillZero(tag, 0, queue.bytes(tag));
        return device.read(request);
      case UBLK_IO_OP_WRITE:
        return device.write!(request);
      case UBLK_IO_OP_FLUSH:
        return device.flush!(request);
      case UBLK_IO_OP_DISCARD:
        return device.discard!(request);
      case UBLK_IO_OP_WRITE_ZEROES:
        return device.writeZeroes!(request);
      default:
        throw Object.assign(new Error("no such operation is offered"), { code: "EOPNOTSUPP" });
    }
  }

  private wait(slot: Slot, answer: Promise<void | number>): void {
    this.needsEventLoop = true;
    this.outstanding++;
    this.deadlines[slot.tag] = this.clock.now() + this.timeoutMs;
    if (!this.armed) this.giveUpIn(slot.queue, this.timeoutMs);
    then.call(answer, slot.fulfilled, slot.rejected);
  }

  private readonly settle: Settle = (slot, outcome, rejected) => {
    const { queue, tag, memory } = slot;
    // It was given up, or all were: only what it holds is of interest.
    if (this.slots[tag] !== slot || queue.disposed) return queue.giveBack(memory);
    try {
      this.free(tag);
      if (rejected) this.fail(slot, outcome);
      else this.answer(slot, outcome as void | number);
      this.beginWaiting(queue);
    } catch (error) {
      queue.break(error);
    }
  };

  private free(tag: number): void {
    this.deadlines[tag] = 0;
    this.outstanding--;
  }

  private beginWaiting(queue: Queue): void {
    while (this.waiting.length > 0 && this.outstanding < this.maxConcurrent) {
      this.begin(queue, this.waiting.shift()!);
    }
  }

  private giveUpIn(queue: Queue, ms: number): void {
    this.armed = true;
    this.clock.after(Math.min(ms, TIMER_MAX_MS), () => this.giveUp(queue));
  }

  /** Answers what is overdue, and comes back for the rest. */
  private giveUp(queue: Queue): void {
    this.armed = false;
    if (queue.disposed) return;
    const now = this.clock.now();
    let next = Infinity;
    try {
      for (const [tag, deadline] of this.deadlines.entries()) {
        if (deadline === 0) continue;
        if (deadline > now) {
          next = Math.min(next, deadline);
          continue;
        }
        this.free(tag);
        const op = OP_NAMES.get(queue.op(tag));
        this.log(`${op} took more than ${this.timeoutMs} ms and was given up`);
        this.renew(queue, tag);
        queue.commit(tag, -ERRNO.ETIMEDOUT);
      }
      if (next < Infinity) this.giveUpIn(queue, next - now);
      this.beginWaiting(queue);
    } catch (error) {
      queue.break(error);
    }
  }

  /** Gives the tag other memory, and leaves the old one and the request to the function. */
  private renew(queue: Queue, tag: number): void {
    this.slots[tag] = undefined;
    if (queue.renewData(tag)) return;
    this.parked[tag] = 1;
    this.log(
      "functions that were given up, or have transferred their buffers, hold all there are: " +
        "requests fail at once (ETIMEDOUT) until one of them ends",
    );
  }

  /** The request's data went where its function has sent it. */
  private replace({ queue, tag }: Slot): void {
    const op = OP_NAMES.get(queue.op(tag));
    this.log(`${op} fails: its buffer was transferred (transfer a copy: buffer.slice().buffer)`);
    this.renew(queue, tag);
    queue.commit(tag, -ERRNO.EIO);
  }

  private answer(slot: Slot, value: void | number): void {
    const { queue, tag } = slot;
    if (this.syncing[tag]) return this.commit(slot, this.done[tag]!);
    const op = queue.op(tag);
    const moves = movesData(op);
    const bytes = queue.bytes(tag);
    if (value !== undefined && !(Number.isInteger(value) && value >= 0 && value <= bytes)) {
      const what = typeof value === "number" ? value : `a ${typeof value}`;
      return this.fail(slot, new RangeError(`it answered ${what}, of ${bytes} bytes`));
    }
    if (op === UBLK_IO_OP_WRITE_ZEROES && value !== undefined && value < bytes) {
      return this.fail(slot, new RangeError(`it zeroed ${value} of ${bytes} bytes`));
    }
    // Whole blocks: the kernel cannot ask again for a part of one.
    const done = moves ? Math.floor((value ?? bytes) / this.blockSize) * this.blockSize : 0;
    if (moves && done === 0) {
      return this.fail(slot, new RangeError(`it answered ${value}: less than a block`));
    }
    if (!this.mustSync(queue, tag, op)) return this.commit(slot, done);
    this.done[tag] = done;
    this.syncing[tag] = 1;
    this.call(slot);
  }

  private mustSync(queue: Queue, tag: number, op: number): boolean {
    if (this.device.handlesFua || !this.device.flush) return false;
    const writes = op === UBLK_IO_OP_WRITE || op === UBLK_IO_OP_WRITE_ZEROES;
    return writes && (queue.flags(tag) & UBLK_IO_F_FUA) !== 0;
  }

  private fail(slot: Slot, error: unknown): void {
    const { queue, tag } = slot;
    if (slot.isDetached) return this.replace(slot); // Whatever it threw comes of that.
    const errno = errnoOf(error);
    if (error instanceof UblkError) this.log(error.message);
    else if (errno === undefined) {
      this.log(`${OP_NAMES.get(queue.op(tag))} fails: ${describeThrown(error)}`);
    }
    this.commit(slot, -(errno ?? ERRNO.EIO));
  }

  private commit(slot: Slot, result: number): void {
    if (slot.isDetached) return this.replace(slot);
    slot.queue.commit(slot.tag, result);
  }
}

function isPromise(answer: Answer): answer is Promise<void | number> {
  return typeof (answer as Promise<unknown> | null | undefined)?.then === "function";
}

/** What was thrown may be anything; nothing of it may throw again. */
function errnoOf(error: unknown): number | undefined {
  try {
    const code = error instanceof UblkError ? error.errno : (error as { code?: unknown }).code;
    return typeof code === "string" && Object.hasOwn(ERRNO, code)
      ? ERRNO[code as keyof typeof ERRNO]
      : undefined;
  } catch {
    return undefined;
  }
}
