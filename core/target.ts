// SPDX-License-Identifier: MIT
/**
 * What a target is: the thing behind a device.
 *
 * A target is opened once, in the server's main thread, where it looks at its backing and says
 * what the device shall be (`OpenTarget`). Each queue thread then makes its own `Volume` from the
 * plain data in `OpenTarget.spec`, and core/engine.ts carries out what that says.
 * @module
 */

import type { Shim } from "../ffi/mod.ts";
import type { Queue } from "./queue.ts";
import type { QueueThread } from "./queue_thread.ts";
import type { Volume } from "./volume.ts";

/** How the data of requests lies in the memory of clients. Default: as the driver has it. */
export interface MemoryLimits {
  /** It begins at multiples of this; a power of two from 4 to 4096. Default: 4. */
  memoryAlignBytes?: number | undefined;
  /** A request's data is in so many pieces at most, 1 to 65535. Default: 65535. */
  segmentsMax?: number | undefined;
  /** Bytes of a piece, from 4096 on. Default: 4 GiB - 1. */
  segmentBytesMax?: number | undefined;
  /** No piece crosses a multiple of this; a power of two from 4096 on. Default: 4 GiB. */
  segmentBoundaryBytes?: number | undefined;
}

/** What the block layer is told about a device. All sizes in bytes. */
export interface DeviceLimits extends MemoryLimits {
  /** A multiple of blockBytes. */
  sizeBytes: number;
  /** Logical block: the unit of every request. A power of two, 512 or more. */
  blockBytes: number;
  /** What the backing writes at once; a power of two, at least blockBytes. */
  physicalBlockBytes: number;
  readOnly: boolean;
  /** Completed writes may be lost on power failure until a FLUSH. */
  volatileCache: boolean;
  /** Smallest extent that DISCARD frees; 0: DISCARD is not offered. */
  discardBytes: number;
  /** WRITE_ZEROES is offered. */
  writeZeroes: boolean;
  /** No READ or WRITE crosses a multiple of this. Default: they may be anywhere. */
  chunkBytes?: number;
}

/**
 * A target's word on zero copy: requests' bytes then go between ring and backing only (`read` and
 * `write` of Queue), never through this process's memory. They are where a client has them, aligned
 * as said here; or there is an obstacle, in words: "its data is compressed".
 */
export type ZeroCopyOffer =
  | {
    readonly memoryAlignBytes: number;
    /** Only for those who ask for it: it has a price that is no speed. */
    readonly whenAsked?: true;
  }
  | { readonly obstacle: string };

/** Plain JSON. */
export type TargetFacts = Record<string, string | number | boolean | readonly string[]>;

export interface OpenTarget {
  readonly limits: DeviceLimits;
  /** Facts for `list` and `info`, such as {"backing_file": "/a.img"}. */
  readonly facts: TargetFacts;
  /** What a person should know, one line each: "buffered I/O: tmpfs refuses direct I/O". */
  readonly notes: readonly string[];
  /** Structured-cloneable; the queue threads' handlers are made from it. */
  readonly spec: unknown;
  /** Most queues it can be served by. Default: any number. */
  readonly queuesMax?: number;
  /** Paths of the files it has opened by itself: none that were handed over to it. */
  readonly files?: readonly string[];
  /** How a queue of it is served. Default: a thread of its own that makes its handler of `spec`. */
  startThread?(queueId: number): QueueThread;
  /** Absent: the target looks at the bytes of its requests. */
  readonly zeroCopy?: ZeroCopyOffer;
  /**
   * Makes what was written durable and releases the backing. Called once, after the queues.
   *
   * @throws {UblkError} it could not be made durable; it is released all the same.
   */
  close(): void;
}

export interface RequestHandler {
  /**
   * Called for each request. Leads to exactly one `queue.commit(tag, result)`, now or in
   * `resume`. Throwing counts as EIO.
   */
  handle(queue: Queue, tag: number): void;
  /** Optional. A file operation begun for this tag has completed: bytes, 0, or -errno. */
  resume?(queue: Queue, tag: number, result: number): void;
  /** True once it has work on the thread's event loop: the thread then no longer blocks. */
  readonly needsEventLoop?: boolean;
  /** Optional. The device is about to stop; may be called again. */
  stopping?(): void;
}

/** A target in the thread that serves it. */
export interface ServedTarget {
  /** Of a target that is only known there: what the device shall be. Structured-cloneable. */
  readonly description?: TargetDescription;
  /** Called for each queue of the thread. */
  handler(context: ServeContext): RequestHandler;
  /** Makes everything durable and releases it: called once, when the thread's queues are done. */
  close?(): void | Promise<void>;
}

/** What an `OpenTarget` is made of, when the target was opened in the first queue's thread. */
export interface TargetDescription {
  readonly limits: DeviceLimits;
  readonly queuesMax?: number;
  /** Paths of the files it keeps its data in. */
  readonly files?: readonly string[];
  /** For the threads of the other queues. */
  readonly shared: unknown;
}

export interface OpenContext {
  readonly shim: Shim;
  /** A descriptor that holds this file (O_PATH), from the caller's mounts: what to open is that. */
  readonly held?: (path: string) => number | undefined;
  /** False where the driver cannot ask for FLUSH and FUA: each write must then be durable. */
  readonly hasVolatileCache: boolean;
}

export interface ServeContext {
  readonly depth: number;
  readonly ioBytesMax: number;
  /** Reports to the operator, as `limited` of core/log.ts lets it. */
  readonly log: (message: string) => void;
  /**
   * The device's size as the kernel has it now, since `ubd resize` does not ask the server;
   * undefined while the device starts. Reads a file: for rare cases, not for each request.
   */
  readonly deviceBytes: () => number | undefined;
}

/** One file of targets/ each. `Options` is plain JSON: it travels to the server process. */
export interface TargetType<Options = unknown, Spec = unknown> {
  readonly name: string;
  /** @throws {UblkError | UsageError} what is wrong with the backing or the options. */
  open(options: Options, context: OpenContext): OpenTarget & { readonly spec: Spec };
  /**
   * The device's size in bytes, were it opened now: for `ubd resize`, while it is being served.
   *
   * @throws {UblkError | UsageError} why it cannot have that size.
   */
  measure(options: Options, context: OpenContext): number;
  /** Called in the thread of each queue. */
  volume(spec: Spec, context: ServeContext): Volume;
}
