// SPDX-License-Identifier: MIT
/**
 * The driver and the block layer, played for core/queue.ts over a real ring without a device.
 *
 * With charFd -1 the ring's FETCH and COMMIT are NOPs. This class stands between Queue and ring: it
 * takes FETCH and COMMIT out of a batch before it is submitted, answers the request that was
 * committed, and submits the FETCH of a tag as soon as there is a request for it, described in
 * plain memory as the driver would. What else the queue does is the same as with a device.
 *
 * As the block layer, it asks again for the rest of a short READ or WRITE. As the driver, it takes
 * the tags back with -ENODEV when the device stops and every request is answered.
 *
 * As nobody else, it fills the buffer of a request that is answered with a byte, and looks before
 * the tag's next request, and at the end, whether that is still there.
 * @module
 */

import { Buffer } from "node:buffer";
import { ERRNO, errnoName } from "../abi/errno.ts";
import { OP_NAMES, UBLK_IO_OP_READ, UBLK_IO_OP_WRITE } from "../abi/ublk_cmd.ts";
import { UBLKSRV_IO_DESC } from "../abi/ublk_structs.ts";
import { pack } from "../abi/struct.ts";
import { movesData, SECTOR_BYTES } from "../core/queue.ts";
import { countRequest } from "../core/stats.ts";
import {
  COMMAND_COMMIT,
  COMMAND_FETCH,
  COMMAND_WORDS,
  EVENT_REFUSED,
  EVENT_REQUEST,
  EVENT_WORDS,
  type QueueConfig,
  type QueueMemory,
  Shim,
  TAG_BITS,
  TAG_MASK,
} from "../ffi/mod.ts";

const DESCRIPTOR_BYTES = UBLKSRV_IO_DESC.size;
const PAGE_BYTES = 4096;

/** What is in a buffer that is not to be looked at: it is no zero, and no data of a test. */
const POISON = 0xa5;

/** A request of the device failed. */
export class RequestError extends Error {
  /** Always "RequestError". */
  override readonly name = "RequestError";
  /** Name of the errno that the device answered, such as "ENOSPC". */
  readonly code: string;

  /**
   * Of the request that failed.
   *
   * @param code errno's name.
   * @param operation as the kernel calls it, such as "READ".
   * @param offset of the request, in bytes.
   * @param length of the request, in bytes.
   */
  constructor(code: string, operation: string, offset: number, length: number) {
    super(`${operation} of ${length} bytes at ${offset}: ${code}`);
    this.code = code;
  }
}

/** One request of the block layer, from its submission to its answer. */
interface Submitted {
  readonly op: number;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** Of READ: to be filled; of WRITE: to be written. */
  readonly data: Uint8Array<ArrayBuffer>;
  /** Bytes answered so far. */
  done: number;
  readonly settle: PromiseWithResolvers<void>;
}

interface PlayedQueue {
  readonly config: QueueConfig;
  readonly memory: QueueMemory;
  /** Tags the queue has given to the driver. */
  readonly idle: number[];
  readonly serving: (Submitted | undefined)[];
  readonly submitted: Submitted[];
  /** By tag: its last request, and what is to stay as it is since its answer. */
  readonly answered: ({ request: Submitted; buffer: Uint8Array } | undefined)[];
  /** Tags the driver has taken back. */
  readonly retired: Set<number>;
  /** The eventfd by which the ring wakes the queue's event loop. */
  notifyFd: number;
}

export class PlayedDriver extends Shim {
  readonly #queues = new Map<number, PlayedQueue>();
  /** What was written to buffers of requests that were answered, a line for each. */
  readonly lateWrites: string[] = [];
  #next = 0;
  #stopping = false;

  constructor(path?: string) {
    super(path);
    const { ubd_step, ubd_queue_notify } = this.native;
    const native = {
      ...this.native,
      ubd_queue_notify: (handle: number, fd: number) => {
        this.#queues.get(handle)!.notifyFd = fd;
        return ubd_queue_notify(handle, fd);
      },
      ubd_step: (handle: number, count: number, wait: number) => {
        const queue = this.#queues.get(handle)!;
        const events = ubd_step(handle, this.#takeCommands(queue, count), wait);
        this.#giveEvents(queue, events);
        return events;
      },
    };
    Object.assign(this, { native });
  }

  /** The configuration of a queue without a device. */
  config(queueId: number, depth: number, ioBytesMax: number, wakeFd: number): QueueConfig {
    return {
      charFd: -1,
      wakeFd,
      queueId,
      depth,
      ioBytesMax,
      fetchOpcode: 0,
      commitOpcode: 0,
      sqe128: false,
      descriptorOffset: 0,
      descriptorBytes: Math.ceil(depth * DESCRIPTOR_BYTES / PAGE_BYTES) * PAGE_BYTES,
    };
  }

  override queueInit(config: QueueConfig): QueueMemory | number {
    const memory = super.queueInit(config);
    if (typeof memory === "number") return memory;
    this.#queues.set(memory.handle, {
      config,
      memory,
      idle: [],
      serving: new Array(config.depth),
      answered: new Array(config.depth),
      submitted: [],
      retired: new Set(),
      notifyFd: -1,
    });
    return memory;
  }

  /**
   * Sends a request to the next queue in turn, where it waits for a free tag.
   *
   * @throws {RequestError} what the device answered; ENODEV after `stop`.
   */
  submit(
    op: number,
    flags: number,
    offset: number,
    length: number,
    data: Uint8Array<ArrayBuffer>,
  ): Promise<void> {
    if (this.#stopping) throw new RequestError("ENODEV", OP_NAMES.get(op)!, offset, length);
    const queues = [...this.#queues.values()];
    const queue = queues[this.#next++ % queues.length]!;
    const settle = Promise.withResolvers<void>();
    queue.submitted.push({ op, flags, offset, length, data, done: 0, settle });
    this.#wake(queue);
    return settle.promise;
  }

  /** Takes the tags back once every request is answered. */
  stop(): void {
    this.#stopping = true;
    for (const queue of this.#queues.values()) this.#wake(queue);
  }

  /** The queues are gone: whatever still waits fails. */
  fail(error: unknown): void {
    this.#stopping = true;
    for (const { serving, submitted } of this.#queues.values()) {
      for (const request of [...serving, ...submitted]) request?.settle.reject(error);
    }
  }

  /** As the ring does when the driver completes a FETCH. */
  #wake({ notifyFd }: PlayedQueue): void {
    if (notifyFd >= 0) this.native.ubd_wake(notifyFd);
  }

  /** @returns how many commands are left for the ring. */
  #takeCommands(queue: PlayedQueue, count: number): number {
    const words = new Int32Array(queue.memory.commands);
    let kept = 0;
    for (let at = 0; at < count * COMMAND_WORDS; at += COMMAND_WORDS) {
      const [op, tag] = [words[at]! >>> TAG_BITS, words[at]! & TAG_MASK];
      if (op === COMMAND_FETCH || op === COMMAND_COMMIT) {
        if (op === COMMAND_COMMIT) this.#answered(queue, tag, words[at + 1]!);
        queue.idle.push(tag);
      } else {
        words.copyWithin(kept++ * COMMAND_WORDS, at, at + COMMAND_WORDS);
      }
    }
    const fetch = (tag: number) => {
      words.set([COMMAND_FETCH << TAG_BITS | tag, 0], kept++ * COMMAND_WORDS);
    };
    while (queue.submitted.length > 0 && queue.idle.length > 0) {
      const tag = queue.idle.shift()!;
      this.#describe(queue, tag, queue.submitted.shift()!);
      fetch(tag);
    }
    if (this.#stopping && queue.idle.length === queue.config.depth) {
      for (const tag of queue.idle.splice(0)) {
        this.#lookForLateWrite(queue, tag);
        queue.retired.add(tag);
        fetch(tag);
      }
    }
    return kept;
  }

  #describe(queue: PlayedQueue, tag: number, request: Submitted): void {
    const { op, flags, offset, length, data, done } = request;
    this.#lookForLateWrite(queue, tag);
    queue.serving[tag] = request;
    const buffer = queue.memory.buffers[tag]!;
    // The driver does not mind whose memory that is by now.
    if (op === UBLK_IO_OP_READ && !isDetached(buffer)) buffer.fill(POISON, 0, length - done);
    if (op === UBLK_IO_OP_WRITE && !isDetached(buffer)) buffer.set(data.subarray(done));
    const descriptor = pack(UBLKSRV_IO_DESC, {
      op_flags: (op | flags) >>> 0,
      nr_sectors: (length - done) / SECTOR_BYTES,
      start_sector: (offset + done) / SECTOR_BYTES,
    });
    new Uint8Array(queue.memory.descriptors).set(descriptor, tag * DESCRIPTOR_BYTES);
  }

  #answered(queue: PlayedQueue, tag: number, result: number): void {
    const request = queue.serving[tag]!;
    queue.serving[tag] = undefined;
    const { op, offset, length, data, settle } = request;
    countRequest(queue.config.stats!, op, result);
    if (op === UBLK_IO_OP_READ && result > 0) {
      data.set(queue.memory.buffers[tag]!.subarray(0, result), request.done);
    }
    // Whoever still looks at a request that is answered shall see that it is.
    if (movesData(op)) {
      const buffer = queue.memory.buffers[tag]!.subarray(0, length - request.done).fill(POISON);
      queue.answered[tag] = { request: { ...request }, buffer };
    }
    if (result < 0) {
      settle.reject(new RequestError(errnoName(-result), OP_NAMES.get(op)!, offset, length));
      return;
    }
    request.done += result;
    if (movesData(op) && request.done < length) queue.submitted.unshift(request);
    else settle.resolve();
  }

  #lookForLateWrite(queue: PlayedQueue, tag: number): void {
    const last = queue.answered[tag];
    queue.answered[tag] = undefined;
    if (!last || isDetached(last.buffer) || isPoison(last.buffer)) return;
    const at = last.buffer.findIndex((byte) => byte !== POISON);
    const { op, offset, length, done } = last.request;
    this.lateWrites.push(
      `byte ${at} of a buffer was written after its request had been answered: ` +
        `${OP_NAMES.get(op)} of ${length - done} bytes at ${offset + done}`,
    );
  }

  #giveEvents(queue: PlayedQueue, count: number): void {
    const words = new Int32Array(queue.memory.events);
    for (let at = 0; at < count * EVENT_WORDS; at += EVENT_WORDS) {
      const [kind, tag] = [words[at]! >>> TAG_BITS, words[at]! & TAG_MASK];
      if (kind !== EVENT_REQUEST || !queue.retired.has(tag)) continue;
      words.set([EVENT_REFUSED << TAG_BITS | tag, -ERRNO.ENODEV], at);
    }
  }
}

function isDetached({ length }: Uint8Array): boolean {
  return length === 0;
}

let poison = Buffer.alloc(0);

/** Quicker than a look at each byte. */
function isPoison(buffer: Uint8Array): boolean {
  if (poison.length < buffer.length) poison = Buffer.alloc(buffer.length, POISON);
  return Buffer.compare(buffer, poison.subarray(0, buffer.length)) === 0;
}
