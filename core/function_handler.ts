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
import type { Queue } from "./queue.ts";
import type { RequestHandler, ServeContext } from "./target.ts";

const TIMEOUT_DEFAULT_MS = 30_000;

/** A tag's request, as all kinds of handlers see it. */
class TagRequest implements ReadRequest, WriteRequest, ZeroRequest {
  readonly signal: AbortSignal;
  readonly #queue: Queue;
  readonly #tag: number;
  #buffer: Uint8Array<ArrayBuffer>;

  constructor(queue: Queue, tag: number, signal: AbortSignal) {
    this.#queue = queue;
    this.#tag = tag;
    this.#buffer = queue.data(tag, 0);
    this.signal = signal;
  }

  get offset(): number {
    return this.#queue.offset(this.#tag);
  }

  get length(): number {
    return this.#queue.bytes(this.#tag);
  }

  get buffer(): Uint8Array<ArrayBuffer> {
    const { length } = this;
    if (this.#buffer.length !== length) this.#buffer = this.#queue.data(this.#tag, length);
    return this.#buffer;
  }

  get fua(): boolean {
    return (this.#queue.flags(this.#tag) & UBLK_IO_F_FUA) !== 0;
  }

  get mayUnmap(): boolean {
    return (this.#queue.flags(this.#tag) & UBLK_IO_F_NOUNMAP) === 0;
  }
}

export class FunctionHandler implements RequestHandler {
  readonly #device: BlockDevice;
  readonly #log: (text: string) => void;
  readonly #timeoutMs: number;
  readonly #maxConcurrent: number;
  readonly #stop = new AbortController();
  readonly #requests: (TagRequest | undefined)[];
  /** A write is done and waits for `flush`. */
  readonly #syncing: Uint8Array;
  /** Bytes that are done, to be answered after the `flush`. */
  readonly #done: Float64Array;
  /** Counts a tag's promises: one that was given up finds another number here. */
  readonly #turns: Uint32Array;
  /** When a tag's promise is given up, in performance.now(); 0: it has none. */
  readonly #deadlines: Float64Array;
  /** Tags that wait for `maxConcurrent`. */
  readonly #waiting: number[] = [];
  #outstanding = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  needsEventLoop = false;

  constructor(device: BlockDevice, { depth, log }: ServeContext) {
    this.#device = device;
    this.#log = log;
    this.#timeoutMs = device.timeoutMs ?? TIMEOUT_DEFAULT_MS;
    this.#maxConcurrent = device.maxConcurrent ?? depth;
    this.#requests = new Array(depth);
    this.#syncing = new Uint8Array(depth);
    this.#done = new Float64Array(depth);
    this.#turns = new Uint32Array(depth);
    this.#deadlines = new Float64Array(depth);
  }

  stopping(): void {
    this.#stop.abort();
  }

  handle(queue: Queue, tag: number): void {
    if (this.#outstanding < this.#maxConcurrent) this.#begin(queue, tag);
    else this.#waiting.push(tag);
  }

  #begin(queue: Queue, tag: number): void {
    this.#syncing[tag] = 0;
    this.#call(queue, tag);
  }

  #call(queue: Queue, tag: number): void {
    const request = this.#requests[tag] ??= new TagRequest(queue, tag, this.#stop.signal);
    let answer: Answer;
    try {
      answer = this.#ask(queue, tag, request);
    } catch (error) {
      return this.#fail(queue, tag, error);
    }
    if (typeof (answer as Promise<unknown> | undefined)?.then === "function") {
      this.#wait(queue, tag, answer as Promise<void | number>);
    } else {
      this.#answer(queue, tag, answer as void | number);
    }
  }

  #ask(queue: Queue, tag: number, request: TagRequest): Answer {
    const device = this.#device;
    if (this.#syncing[tag]) return device.flush!(request);
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

  #wait(queue: Queue, tag: number, answer: Promise<void | number>): void {
    this.needsEventLoop = true;
    this.#outstanding++;
    const turn = ++this.#turns[tag]!;
    this.#deadlines[tag] = performance.now() + this.#timeoutMs;
    if (!this.#timer) this.#giveUpIn(queue, this.#timeoutMs);
    const settle = (work: () => void) => {
      if (this.#turns[tag] !== turn) return;
      try {
        this.#free(tag);
        work();
        this.#beginWaiting(queue);
      } catch (error) {
        queue.break(error);
      }
    };
    answer.then(
      (value) => settle(() => this.#answer(queue, tag, value)),
      (error) => settle(() => this.#fail(queue, tag, error)),
    );
  }

  #free(tag: number): void {
    this.#turns[tag]!++;
    this.#deadlines[tag] = 0;
    this.#outstanding--;
  }

  #beginWaiting(queue: Queue): void {
    while (this.#waiting.length > 0 && this.#outstanding < this.#maxConcurrent) {
      this.#begin(queue, this.#waiting.shift()!);
    }
  }

  #giveUpIn(queue: Queue, ms: number): void {
    this.#timer = setTimeout(() => this.#giveUp(queue), ms);
    this.#timer.unref();
  }

  /** Answers what is overdue, and comes back for the rest. */
  #giveUp(queue: Queue): void {
    this.#timer = undefined;
    const now = performance.now();
    let next = Infinity;
    try {
      for (const [tag, deadline] of this.#deadlines.entries()) {
        if (deadline === 0) continue;
        if (deadline > now) {
          next = Math.min(next, deadline);
          continue;
        }
        this.#free(tag);
        queue.renewData(tag);
        this.#requests[tag] = undefined;
        const op = OP_NAMES.get(queue.op(tag));
        this.#log(`${op} took more than ${this.#timeoutMs} ms and was given up`);
        queue.commit(tag, -ERRNO.ETIMEDOUT);
      }
      this.#beginWaiting(queue);
    } catch (error) {
      queue.break(error);
    }
    if (next < Infinity) this.#giveUpIn(queue, next - now);
  }

  #answer(queue: Queue, tag: number, value: void | number): void {
    if (this.#syncing[tag]) return queue.commit(tag, this.#done[tag]!);
    const op = queue.op(tag);
    const moves = op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE;
    const bytes = moves ? queue.bytes(tag) : 0;
    const done = value === undefined || !moves ? bytes : value;
    if (!Number.isInteger(done) || done < 0 || done > bytes || moves && done === 0) {
      return this.#fail(queue, tag, new RangeError(`it answered ${value}, of ${bytes} bytes`));
    }
    if (!this.#mustSync(queue, tag, op)) return queue.commit(tag, done);
    this.#done[tag] = done;
    this.#syncing[tag] = 1;
    this.#call(queue, tag);
  }

  #mustSync(queue: Queue, tag: number, op: number): boolean {
    if (this.#device.handlesFua || !this.#device.flush) return false;
    const writes = op === UBLK_IO_OP_WRITE || op === UBLK_IO_OP_WRITE_ZEROES;
    return writes && (queue.flags(tag) & UBLK_IO_F_FUA) !== 0;
  }

  #fail(queue: Queue, tag: number, error: unknown): void {
    const code = (error as { code?: unknown } | null)?.code;
    const errno = typeof code === "string" ? ERRNO[code as keyof typeof ERRNO] : undefined;
    if (errno === undefined) {
      const detail = error instanceof Error ? error.stack ?? error.message : String(error);
      this.#log(`${OP_NAMES.get(queue.op(tag))} fails: ${detail}`);
    }
    queue.commit(tag, -(errno ?? ERRNO.EIO));
  }
}
