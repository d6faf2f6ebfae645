// SPDX-License-Identifier: MIT
/**
 * The block layer, played for a volume over a real ring without a driver: one list of requests at a
 * time, answered with results and data. Needs io_uring.
 * @module
 */

import assert from "node:assert/strict";
import { ERRNO } from "../../abi/errno.ts";
import { UBLK_IO_OP_READ, UBLK_IO_OP_WRITE } from "../../abi/ublk_cmd.ts";
import { Engine } from "../../core/engine.ts";
import { GapQueue, type Gaps } from "../../core/gaps.ts";
import type { Volume } from "../../core/volume.ts";
import {
  COMMAND_COMMIT,
  COMMAND_FALLOCATE,
  COMMAND_FETCH,
  COMMAND_FSYNC,
  COMMAND_READ,
  COMMAND_WORDS,
  COMMAND_WRITE,
  COMMAND_WRITE_ZEROES,
  EVENT_FILE,
  EVENT_WORDS,
  type QueueConfig,
  type QueueMemory,
  Shim,
  TAG_BITS,
  type ZeroCopyConfig,
} from "../../ffi/mod.ts";

const [READ, WRITE] = [UBLK_IO_OP_READ, UBLK_IO_OP_WRITE];
export const IO_BYTES = 65536;
const FILE_COMMANDS: number[] = [
  COMMAND_READ,
  COMMAND_WRITE,
  COMMAND_FSYNC,
  COMMAND_FALLOCATE,
  COMMAND_WRITE_ZEROES,
];

export const shim = new Shim();

export interface Request {
  op: number;
  flags?: number;
  sector?: number;
  sectors?: number;
  data?: Uint8Array;
}

export interface Answer {
  result: number;
  /** The tag's buffer after the commit, as long as the request. */
  data: Uint8Array;
}

/** Serves a list of requests, several at once when depth allows, and records what happens. */
export class BlockLayer extends Shim {
  readonly answers: Answer[] = [];
  /** [operation, flags] of each command for a file. */
  readonly fileCommands: [number, number][] = [];
  /** May change the result of a file operation. */
  onResult: (result: number) => number = (result) => result;
  readonly #requests: readonly Request[];
  readonly #requestOfTag: number[] = [];
  #memory!: QueueMemory;
  #next = 0;
  #wakeFd = -1;

  constructor(requests: readonly Request[]) {
    super(shim.path);
    this.#requests = requests;
    const { ubd_step } = this.native;
    const native = { ...this.native, ubd_step: this.#step.bind(this, ubd_step) };
    Object.assign(this, { native });
  }

  override queueInit(config: QueueConfig): QueueMemory | number {
    this.#wakeFd = config.wakeFd;
    const memory = super.queueInit(config);
    if (typeof memory !== "number") this.#memory = memory;
    return memory;
  }

  /** Whether the tag has a request, and is not waiting for the end. */
  isServing(tag: number): boolean {
    return this.#requestOfTag[tag]! < this.#requests.length;
  }

  #step(step: Shim["native"]["ubd_step"], handle: number, count: number, wait: number): number {
    const words = new Int32Array(this.#memory.commands);
    for (let at = 0; at < count * COMMAND_WORDS; at += COMMAND_WORDS) {
      const [head, value, flags] = [words[at]!, words[at + 1]!, words[at + 2]!];
      const [op, tag] = [head >>> TAG_BITS, head & 0xffff];
      if (op === COMMAND_COMMIT) this.#answer(tag, value);
      if (op === COMMAND_COMMIT || op === COMMAND_FETCH) this.#prepare(tag);
      else if (FILE_COMMANDS.includes(op)) this.fileCommands.push([op, flags]);
    }
    if (this.answers.filter(Boolean).length === this.#requests.length) {
      this.native.ubd_wake(this.#wakeFd);
    }
    const events = stepUnblocked(step, handle, count, wait);
    for (let index = 0; index < events; index++) {
      const event = new Int32Array(this.#memory.events, index * 4 * EVENT_WORDS, 2);
      if (event[0]! >>> TAG_BITS === EVENT_FILE) event[1] = this.onResult(event[1]!);
    }
    return events;
  }

  #buffer(tag: number, request: Request): Uint8Array {
    const bytes = request.op === READ || request.op === WRITE ? (request.sectors ?? 0) * 512 : 0;
    return this.#memory.buffers[tag]!.subarray(0, bytes);
  }

  #prepare(tag: number): void {
    const number = this.#requestOfTag[tag] = this.#next++;
    const request = this.#requests[number];
    if (!request) return;
    const { op, flags = 0, sector = 0, sectors = 0, data } = request;
    const view = new DataView(this.#memory.descriptors, tag * 24, 24);
    view.setUint32(0, op | flags, true);
    view.setUint32(4, sectors, true);
    view.setBigUint64(8, BigInt(sector), true);
    // What an earlier request left in the buffer must never be answered.
    this.#memory.buffers[tag]!.fill(0xee);
    if (data) this.#buffer(tag, request).set(data);
  }

  #answer(tag: number, result: number): void {
    const number = this.#requestOfTag[tag]!;
    assert.ok(number < this.#requests.length && !this.answers[number], "answered twice");
    const data = this.#buffer(tag, this.#requests[number]!).slice();
    this.answers[number] = { result, data };
  }
}

export interface ServeOptions {
  depth?: number;
  zeroCopy?: ZeroCopyConfig | undefined;
  onResult?: (result: number) => number;
  logs?: string[];
  gaps?: Gaps | undefined;
}

/** A step that never blocks, so that a lost commit is a failed test and not one that hangs. */
export function stepUnblocked(
  step: Shim["native"]["ubd_step"],
  handle: number,
  count: number,
  wait: number,
): number {
  const deadline = performance.now() + 20_000;
  let events = step(handle, count, 0);
  while (events === -ERRNO.EAGAIN || (wait && events === 0)) {
    if (performance.now() > deadline) throw new Error("the queue waits for nothing");
    events = step(handle, 0, 0);
  }
  return events;
}

/** Has `requests` served by the engine with this volume. */
export function serveVolume(
  volume: Volume,
  requests: Request[],
  { depth = 1, logs = [], zeroCopy, onResult, gaps }: ServeOptions = {},
): BlockLayer {
  const layer = new BlockLayer(requests);
  if (onResult) layer.onResult = onResult;
  const log = (text: string) => void logs.push(text);
  const context = { depth, ioBytesMax: IO_BYTES, log, deviceBytes: () => undefined };
  const engine = new Engine(volume, context);
  const wakeFd = shim.native.ubd_eventfd(0);
  try {
    using queue = new GapQueue(layer, {
      charFd: -1,
      wakeFd,
      queueId: 0,
      depth,
      ioBytesMax: IO_BYTES,
      fetchOpcode: 0,
      commitOpcode: 0,
      sqe128: false,
      descriptorOffset: 0,
      descriptorBytes: 4096,
      zeroCopy,
    });
    if (gaps) queue.gaps = gaps;
    queue.run(
      {
        handle: (queue, tag) => layer.isServing(tag) && engine.handle(queue, tag),
        resume: (queue, tag, result) => engine.resume(queue, tag, result),
      },
      () => true,
      (error) => logs.push(String(error)),
    );
  } finally {
    shim.native.ubd_close(wakeFd);
  }
  return layer;
}
