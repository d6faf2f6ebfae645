// SPDX-License-Identifier: MIT
/**
 * The shim as core uses it: integers, typed arrays and views in, `>= 0` or `-errno` out.
 *
 * Picks the runtime once. Pointers never leave this folder: rings are handles, memory is an
 * ArrayBuffer, files are descriptors. Layouts of the shared structs are those of
 * shim/layout.zig (Command, Event, QueueConfig, ControlRequest).
 * @module
 */

import { BufferPool } from "./buffers.ts";
import { type LoadedShim, loadShim, unpack } from "./load.ts";
import { pathBytes } from "./path.ts";
export { ShimError } from "./load.ts";
import type { Adapter, Native, Watch } from "./symbols.ts";

const { adapter }: { adapter: Adapter } = "Bun" in globalThis
  ? await import("./bun.ts")
  : "Deno" in globalThis
  ? await import("./deno.ts")
  : await import("./none.ts");

/** Name and version of the runtime, such as "Bun 1.4.5"; one that cannot serve says so. */
export const runtime: string = adapter.runtime;

/** Whether this runtime bears mlockall. */
export const canLockMemory: boolean = adapter.canLockMemory;

/** For a server: see Adapter. */
export const restfulEnvironment: Adapter["restfulEnvironment"] = adapter.restfulEnvironment;

/** Arguments that make process.execPath run this program again. */
export const rerunArguments: () => string[] = adapter.rerunArguments;

/** What imports this file: see Adapter. */
export const specifierOf: Adapter["specifierOf"] = adapter.specifierOf;

/** Lets modules loaded from now on import this library by its names. */
export const provideLibrary: Adapter["provideLibrary"] = adapter.provideLibrary;

/** @param packed one of shim_binary.ts. */
export const unpackBinary = (packed: string): Uint8Array => unpack(adapter, packed);

/** Operation of a command. */
export const COMMAND_FETCH = 0;
export const COMMAND_COMMIT = 1;
export const COMMAND_READ = 2;
export const COMMAND_WRITE = 3;
export const COMMAND_FSYNC = 4;
export const COMMAND_FALLOCATE = 5;
export const COMMAND_WAKE = 6;
export const COMMAND_WRITE_ZEROES = 7;
export const COMMAND_REGISTER = 8;
export const COMMAND_UNREGISTER = 9;
export const COMMAND_GET_DATA = 10;

/**
 * Kind of an event: a request came; a file operation, or the wake-up read, has ended; an io command
 * has, and brought no request.
 */
export const EVENT_REQUEST = 0;
export const EVENT_FILE = 1;
export const EVENT_WAKE = 2;
export const EVENT_REFUSED = 3;

/**
 * The first word of a command is `operation << TAG_BITS | tag`, of an event its kind and the tag;
 * the second is a command's value, an event's result. shim/layout.zig has the others.
 */
export const TAG_BITS = 16;
export const TAG_MASK = 0xffff;
/** Sizes in words of 32 bits. */
export const COMMAND_WORDS = 8;
export const EVENT_WORDS = 2;

/** Size of a control command's payload area, in bytes, and how many there are. */
export const PAYLOAD_BYTES = 8192;
export const PAYLOAD_COUNT = 16;

/** Every `step`-th tag of a queue, from `first`. */
export interface TagShare {
  first: number;
  step: number;
}

export interface QueueConfig {
  /** Descriptor of the character device; -1, and opcodes 0: without a driver, for tests. */
  charFd: number;
  /** An eventfd of ubd_eventfd(). */
  wakeFd: number;
  queueId: number;
  /** Number of the queue's tags. */
  depth: number;
  /** Those that this ring fetches; the others are with other rings. Default: all. */
  tags?: TagShare | undefined;
  /** Bytes of buffer for each tag, a multiple of 4096. */
  ioBytesMax: number;
  fetchOpcode: number;
  commitOpcode: number;
  /** The queue's ring needs 128-byte SQEs. */
  sqe128: boolean;
  /** Where the queue's io descriptors are mapped from, in bytes, and how much is mapped. */
  descriptorOffset: number;
  descriptorBytes: number;
  /** Absent: the driver copies data to and from the tags' buffers. */
  zeroCopy?: ZeroCopyConfig | undefined;
  /** The shim copies data between the tags' buffers and the character device. */
  userCopy?: boolean | undefined;
  /** The driver waits for this command before it copies the data of a WRITE. */
  getDataOpcode?: number | undefined;
  /** Io commands go in batches, by this one and those of fetchOpcode and commitOpcode. */
  prepOpcode?: number | undefined;
  /** Where the queue's requests are counted, see core/stats.ts. */
  stats?: Float64Array | undefined;
}

/** A request's own pages are the ring's registered buffer with the number of its tag. */
export interface ZeroCopyConfig {
  /** The driver registers them with each request; else the queue does, by these commands. */
  automatic: boolean;
  /** For tests: the driver is told to, where it cannot, and the queue does. */
  fallsBack?: boolean;
  registerOpcode: number;
  unregisterOpcode: number;
}

export interface QueueMemory {
  readonly handle: number;
  /** depth + 1 records each. */
  readonly commands: ArrayBuffer;
  readonly events: ArrayBuffer;
  /** For each tag ioBytesMax bytes of data, those of `pool`. Empty with zero copy. */
  readonly buffers: Uint8Array<ArrayBuffer>[];
  readonly pool: BufferPool;
  /** What the driver says of each tag's request: struct ublksrv_io_desc. */
  readonly descriptors: ArrayBuffer;
  /** Of the configuration: here so that it is not collected. */
  readonly stats: Float64Array | undefined;
}

export interface ControlRequest {
  controlFd: number;
  opcode: number;
  /** 0xffffffff: the kernel chooses. */
  deviceId: number;
  /** 0xffff: the command is not for a queue. */
  queueId: number;
  payload: number;
  payloadBytes: number;
  /** Length of the character device's path in front of the payload, NUL included. */
  pathBytes: number;
  data: bigint;
  /** Given by a process of its own, which goes on with it when this one ends. */
  apart?: boolean;
}

/** Of this thread: each one loaded without a path would be another copy, and none is ever unloaded. */
let known: LoadedShim | undefined;

/** The loaded shim. One mapping for each process. */
export class Shim {
  /** Give it to `new Shim(path)` in another thread of this process. */
  readonly path: string;
  readonly native: Native;

  constructor(path?: string) {
    const isKnown = known !== undefined && (path === undefined || path === known.path);
    const loaded = isKnown ? known! : loadShim(adapter, path);
    known ??= loaded;
    this.path = loaded.path;
    this.native = loaded.native;
  }

  /** @returns the queue's memory, or -errno. Valid until ubd_queue_exit, but for its buffers. */
  queueInit(config: QueueConfig): QueueMemory | number {
    const bytes = new ArrayBuffer(64);
    const words = new Int32Array(bytes);
    words.set([config.charFd, config.wakeFd, config.queueId, config.depth, config.ioBytesMax]);
    words[5] = config.fetchOpcode;
    words[6] = config.commitOpcode;
    words[7] = config.sqe128 ? 1 : 0;
    words[8] = config.descriptorBytes;
    if (config.zeroCopy) {
      words[9] = !config.zeroCopy.automatic ? 1 : config.zeroCopy.fallsBack ? 4 : 2;
      words[12] = config.zeroCopy.registerOpcode;
      words[13] = config.zeroCopy.unregisterOpcode;
    }
    if (config.userCopy) words[9] = 3;
    words[14] = config.getDataOpcode ?? 0;
    words[15] = config.prepOpcode ?? 0;
    new Float64Array(bytes)[5] = config.descriptorOffset;
    const handle = this.native.ubd_queue_init(words, config.stats ?? null);
    if (handle < 0) return handle;

    const { native } = this;
    const { depth, ioBytesMax } = config;
    const address = (region: number) => native.ubd_queue_address(handle, region);
    const region = (index: number, sizeBytes: number) => adapter.view(address(index), sizeBytes);
    const tags = Array.from({ length: address(3) === 0 ? 0 : depth }, (_, tag) => address(3 + tag));
    const pool = new BufferPool({
      bytes: ioBytesMax,
      map: () => native.ubd_buffer_map(ioBytesMax),
      view: (at) => adapter.view(at, ioBytesMax),
      use: (tag, at) => native.ubd_buffer_use(handle, tag, at),
      drop: (at, unmap) => native.ubd_buffer_drop(at, ioBytesMax, unmap ? 1 : 0),
    }, tags);
    return {
      handle,
      commands: region(0, (depth + 1) * 4 * COMMAND_WORDS),
      events: region(1, (depth + 1) * 4 * EVENT_WORDS),
      descriptors: region(2, config.descriptorBytes),
      buffers: pool.tags,
      pool,
      stats: config.stats,
    };
  }

  /** @returns the ring's handle and its payload areas, or -errno. */
  controlInit(): { handle: number; payloads: ArrayBuffer } | number {
    const handle = this.native.ubd_control_init();
    if (handle < 0) return handle;
    const address = this.native.ubd_control_address(handle);
    return { handle, payloads: adapter.view(address, PAYLOAD_BYTES * PAYLOAD_COUNT) };
  }

  controlSubmit(handle: number, request: ControlRequest): number {
    const words = new BigInt64Array(5);
    const fields = new Int32Array(words.buffer);
    fields.set([request.controlFd, request.opcode, request.deviceId, request.queueId]);
    const { payload, payloadBytes, pathBytes, apart = false } = request;
    fields.set([payload, payloadBytes, pathBytes, Number(apart)], 4);
    words[4] = request.data;
    return this.native.ubd_control_submit(handle, words);
  }

  /** @returns an eventfd whose every write calls `signalled` on the event loop, or -errno. */
  watch(signalled: () => void): Watch | number {
    return adapter.watch(this, signalled);
  }

  /** @param flags O_* of open(2). @returns a descriptor, or -errno. */
  open(path: string, flags: number): number {
    return this.native.ubd_open(pathBytes(path), flags);
  }

  /** Keeps this thread to those of its CPUs that are listed, if there are any. */
  narrowAffinity(cpus: readonly number[]): number {
    const mask = new Uint8Array(1024);
    for (const cpu of cpus) mask[cpu >> 3]! |= 1 << (cpu & 7);
    return this.native.ubd_narrow_affinity(mask);
  }

  /** The shim's struct sizes and offsets: lines "struct SIZE" and "struct.field OFFSET". */
  layout(): string {
    const bytes = new Uint8Array(16384);
    const length = this.native.ubd_layout(bytes, bytes.length);
    return new TextDecoder().decode(bytes.subarray(0, length));
  }
}
