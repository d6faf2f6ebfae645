// SPDX-License-Identifier: MIT
/**
 * Calls the functions of a user's target, and turns whatever they do into one commit each.
 *
 * A request object per tag, made once: a function that returns no promise costs no allocation. A
 * promise sends the queue to the event loop. One that is not settled in time is given up: its
 * request is answered, and its tag gets new memory, since the function still holds the old one.
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
import { UblkError } from "./error.ts";
import { type Queue, SECTOR_BYTES } from "./queue.ts";
import type { RequestHandler, ServeContext } from "./target.ts";

const TIMEOUT_DEFAULT_MS = 30_000;

/** Longer ones fire at once. */
const TIMER_MAX_MS = 2 ** 31 - 1;

/** Calls back once, whatever somebody's promise has for a `then` of its own. */
const { then } = Promise.prototype;

type Settle = (queue: Queue, tag: number, outcome: unknown, rejected: boolean) => void;

/** A tag's request, as all kinds of handlers see it. */
class TagRequest implements ReadRequest, WriteRequest, ZeroRequest {
  readonly signal: AbortSignal;
  /** What its promises are settled with goes here: made once, as it is. */
  readonly fulfilled: (value: void | number) => void;
  readonly rejected: (error: unknown) => void;
  readonly #queue: Queue;
  readonly #tag: number;
  /** All of the tag's memory, as long as the tag has it. */
  readonly #memory: Uint8Array<ArrayBuffer>;
  #buffer: Uint8Array<ArrayBuffer>;
  /** What it was about, once it was given up: the tag serves another request then. */
  #left: { offset: number; length: number; flags: number } | undefined;

  constructor(queue: Queue, tag: number, signal: AbortSignal, settle: Settle) {
    this.#queue = queue;
    this.#tag = tag;
    this.#memory = queue.data(tag, queue.ioBytesMax);
    this.#buffer = queue.data(tag, 0);
    this.signal = signal;
    this.fulfilled = (value) => {
      if (!this.#left) settle(queue, tag, value, false);
    };
    this.rejected = (error) => {
      if (!this.#left) settle(queue, tag, error, true);
    };
  }

  get offset(): number {
    return this.#left?.offset ?? this.#queue.offset(this.#tag);
  }

  get length(): number {
    return this.#left?.length ?? this.#queue.bytes(this.#tag);
  }

  get buffer(): Uint8Array<ArrayBuffer> {
    const { length } = this;
    if (this.#buffer.length !== length) this.#buffer = this.#memory.subarray(0, length);
    return this.#buffer;
  }

  get fua(): boolean {
    return (this.#flags & UBLK_IO_F_FUA) !== 0;
  }

  get mayUnmap(): boolean {
    return (this.#flags & UBLK_IO_F_NOUNMAP) === 0;
  }

  get #flags(): number {
    return this.#left?.flags ?? this.#queue.flags(this.#tag);
  }

  /** The function that still holds it shall go on with what it was asked for. */
  leave(): void {
    this.#left = { offset: this.offset, length: this.length, flags: this.#flags };
  }
}

export class FunctionHandler implements RequestHandler {
  private readonly device: BlockDevice;
  private readonly log: (text: string) => void;
  private readonly timeoutMs: number;
  private readonly maxConcurrent: number;
  private readonly blockSize: number;
  private readonly stop = new AbortController();
  private readonly requests: (TagRequest | undefined)[];
  /** A write is done and waits for `flush`. */
  private readonly syncing: Uint8Array;
  /** Bytes that are done, to be answered after the `flush`. */
  private readonly done: Float64Array;
  /** When a tag's promise is given up, in performance.now(); 0: it has none. */
  private readonly deadlines: Float64Array;
  /** Tags that wait for `maxConcurrent`. */
  private readonly waiting: number[] = [];
  private outstanding = 0;
  private timer: ReturnType<typeof setTimeout> | undefined;
  needsEventLoop = false;

  constructor(device: BlockDevice, { depth, log }: ServeContext) {
    this.device = device;
    this.log = log;
    this.timeoutMs = device.timeoutMs ?? TIMEOUT_DEFAULT_MS;
    this.maxConcurrent = device.maxConcurrent ?? depth;
    this.blockSize = device.blockSize ?? SECTOR_BYTES;
    this.requests = new Array(depth);
    this.syncing = new Uint8Array(depth);
    this.done = new Float64Array(depth);
    this.deadlines = new Float64Array(depth);
  }

  stopping(): void {
    this.stop.abort();
  }

  handle(queue: Queue, tag: number): void {
    if (this.outstanding < this.maxConcurrent) this.begin(queue, tag);
    else this.waiting.push(tag);
  }

  private begin(queue: Queue, tag: number): void {
    this.syncing[tag] = 0;
    this.call(queue, tag);
  }

  private call(queue: Queue, tag: number): void {
    const request = this.requests[tag] ?? this.newRequest(queue, tag);
    let answer: Answer;
    let promise: Promise<void | number> | undefined;
    try {
      answer = this.ask(queue, tag, request);
      // Whatever else has a `then` may call back twice, or throw.
      if (isPromise(answer)) promise = Promise.resolve(answer);
    } catch (error) {
      return this.fail(queue, tag, error);
    }
    if (promise) this.wait(queue, tag, promise);
    else this.answer(queue, tag, answer as void | number);
  }

  private newRequest(queue: Queue, tag: number): TagRequest {
    return this.requests[tag] = new TagRequest(queue, tag, this.stop.signal, this.settle);
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

  private wait(queue: Queue, tag: number, answer: Promise<void | number>): void {
    this.needsEventLoop = true;
    this.outstanding++;
    this.deadlines[tag] = performance.now() + this.timeoutMs;
    if (!this.timer) this.giveUpIn(queue, this.timeoutMs);
    const { fulfilled, rejected } = this.requests[tag]!;
    then.call(answer, fulfilled, rejected);
  }

  private readonly settle: Settle = (queue, tag, outcome, rejected) => {
    if (queue.disposed) return;
    try {
      this.free(tag);
      if (rejected) this.fail(queue, tag, outcome);
      else this.answer(queue, tag, outcome as void | number);
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
    this.timer = setTimeout(() => this.giveUp(queue), Math.min(ms, TIMER_MAX_MS));
    this.timer.unref();
  }

  /** Answers what is overdue, and comes back for the rest. */
  private giveUp(queue: Queue): void {
    this.timer = undefined;
    if (queue.disposed) return;
    const now = performance.now();
    let next = Infinity;
    try {
      for (const [tag, deadline] of this.deadlines.entries()) {
        if (deadline === 0) continue;
        if (deadline > now) {
          next = Math.min(next, deadline);
          continue;
        }
        this.free(tag);
        this.requests[tag]!.leave();
        this.requests[tag] = undefined;
        queue.renewData(tag);
        const op = OP_NAMES.get(queue.op(tag));
        this.log(`${op} took more than ${this.timeoutMs} ms and was given up`);
        queue.commit(tag, -ERRNO.ETIMEDOUT);
      }
      this.beginWaiting(queue);
    } catch (error) {
      queue.break(error);
    }
    if (next < Infinity) this.giveUpIn(queue, next - now);
  }

  private answer(queue: Queue, tag: number, value: void | number): void {
    if (this.syncing[tag]) return queue.commit(tag, this.done[tag]!);
    const op = queue.op(tag);
    const moves = op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE;
    const bytes = queue.bytes(tag);
    if (value !== undefined && !(Number.isInteger(value) && value >= 0 && value <= bytes)) {
      const what = typeof value === "number" ? value : `a ${typeof value}`;
      return this.fail(queue, tag, new RangeError(`it answered ${what}, of ${bytes} bytes`));
    }
    if (op === UBLK_IO_OP_WRITE_ZEROES && value !== undefined && value < bytes) {
      return this.fail(queue, tag, new RangeError(`it zeroed ${value} of ${bytes} bytes`));
    }
    // Whole blocks: the kernel cannot ask again for a part of one.
    const done = moves ? Math.floor((value ?? bytes) / this.blockSize) * this.blockSize : 0;
    if (moves && done === 0) {
      return this.fail(queue, tag, new RangeError(`it answered ${value}: less than a block`));
    }
    if (!this.mustSync(queue, tag, op)) return queue.commit(tag, done);
    this.done[tag] = done;
    this.syncing[tag] = 1;
    this.call(queue, tag);
  }

  private mustSync(queue: Queue, tag: number, op: number): boolean {
    if (this.device.handlesFua || !this.device.flush) return false;
    const writes = op === UBLK_IO_OP_WRITE || op === UBLK_IO_OP_WRITE_ZEROES;
    return writes && (queue.flags(tag) & UBLK_IO_F_FUA) !== 0;
  }

  private fail(queue: Queue, tag: number, error: unknown): void {
    const errno = errnoOf(error);
    if (error instanceof UblkError) this.log(error.message);
    else if (errno === undefined) {
      this.log(`${OP_NAMES.get(queue.op(tag))} fails: ${describe(error)}`);
    }
    queue.commit(tag, -(errno ?? ERRNO.EIO));
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

function describe(error: unknown): string {
  try {
    return error instanceof Error ? error.stack ?? error.message : String(error);
  } catch {
    return `a ${typeof error} that cannot be shown`;
  }
}
