// SPDX-License-Identifier: MIT
/**
 * The driver, the block layer, the ring and a file, played in TypeScript alone, for core/queue.ts:
 * one thing happens after the other, as a script says, and whatever a driver would not bear is an
 * error. Nothing is loaded, mapped or waited for.
 * @module
 */

import assert from "node:assert/strict";
import { ERRNO } from "../../abi/errno.ts";
import {
  UBLK_IO_F_NEED_REG_BUF,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
  UBLK_IO_RES_NEED_GET_DATA,
} from "../../abi/ublk_cmd.ts";
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
  EVENT_REFUSED,
  EVENT_REQUEST,
  EVENT_WAKE,
  EVENT_WORDS,
  type QueueConfig,
  type QueueMemory,
  type Shim,
  TAG_BITS,
  TAG_MASK,
} from "../../ffi/mod.ts";
import { BufferPool } from "../../ffi/buffers.ts";

export const SECTOR = 512;
export const DISK_SECTORS = 64;
export const IO_SECTORS = 8;

/** Of a queue. */
const SPARES = 2;

/** How the data of requests comes and goes. */
export const MODES = ["copied", "asked for", "registered", "automatic"] as const;
export type Mode = typeof MODES[number];

/** One request of the block layer. */
export interface Asked {
  op: number;
  flags: number;
  sector: number;
  sectors: number;
  /** Of WRITE: what is in it. */
  byte: number;
  /** What it was answered with. */
  result?: number;
  /** An operation for it has failed, so that it may. */
  mayFail?: boolean;
  retries?: number;
  /** Zero copy: its pages. */
  pages: Uint8Array;
}

interface Operation {
  tag: number;
  op: number;
  asked: Asked;
  fd: number;
  memory: Uint8Array | undefined;
  length: number;
  offset: number;
  outcome: number;
}

const moves = (op: number) => op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE;

/** Of an operation: all is done, or less, or nothing. */
export const OUTCOMES = ["all", "all", "all", "half", "none", "EAGAIN", "ENOSPC"] as const;

export class PlayedRing implements Disposable {
  readonly mode: Mode;
  /** What READs must find; undefined: anything. */
  readonly model: (number | undefined)[] = new Array(DISK_SECTORS).fill(0);
  readonly disk = new Uint8Array(DISK_SECTORS * SECTOR);
  readonly waiting: Asked[] = [];
  readonly operations: Operation[] = [];
  /** One for each operation in turn. */
  outcomes: readonly number[] = [];
  /** Automatic registration fails for every so-manieth request; 0: never. */
  failsEach = 0;
  answered = 0;
  quiescing = false;
  stopping = false;
  steps = 0;
  /** The last step has found nothing, and asked to be woken. */
  armed = false;
  /** Plays on, when the queue blocks and nothing has completed. @returns false: nothing is left. */
  playOn: () => boolean = () => false;
  private readonly memoryAt = new Map<number, Uint8Array<ArrayBuffer>>();
  private memory!: QueueMemory;
  private depth = 0;
  private address: number[] = [];
  /** Where the driver has each tag's data, since its last command. */
  private place: number[] = [];
  private idle: boolean[] = [];
  private serving: (Asked | undefined)[] = [];
  /** It waits for GET_DATA. */
  private asking: boolean[] = [];
  private registered: (Uint8Array | undefined)[] = [];
  private registeredByQueue: boolean[] = [];
  private completions: [kind: number, tag: number, result: number][] = [];
  private spoilt = false;
  private broken: { error: unknown } | undefined;
  /** All spare buffers are in use, or were. */
  private isShort = false;
  private wakeArmed = false;
  private wakePending = false;
  private signalled: () => void = () => {};
  private next = 0;
  private dispatched = 0;

  constructor(mode: Mode) {
    this.mode = mode;
  }

  /** What a Queue uses of a Shim. */
  get shim(): Shim {
    const native = {
      ubd_step: (_handle: number, count: number, wait: number) => this.step(count, wait),
      ubd_queue_notify: () => 0,
      ubd_queue_exit: () => 0,
      ubd_close: () => 0,
    };
    const shim = {
      native,
      open: () => ZERO_FD,
      queueInit: (config: QueueConfig) => this.init(config),
      watch: (signalled: () => void) => {
        this.signalled = signalled;
        return { fd: 5, close: () => this.signalled = () => {} };
      },
    };
    return shim as unknown as Shim;
  }

  config(depth: number): QueueConfig {
    const zeroCopy = {
      automatic: this.mode === "automatic",
      registerOpcode: 1,
      unregisterOpcode: 1,
    };
    return {
      charFd: 3,
      wakeFd: 4,
      queueId: 0,
      depth,
      ioBytesMax: IO_SECTORS * SECTOR,
      fetchOpcode: 1,
      commitOpcode: 1,
      sqe128: false,
      descriptorOffset: 0,
      descriptorBytes: 4096,
      ...(!this.copies && { zeroCopy }),
    };
  }

  /** A pool is known until its buffers are collected, and knows this ring: it must not keep them. */
  [Symbol.dispose](): void {
    this.memoryAt.clear();
    this.playOn = () => false;
  }

  private get copies(): boolean {
    return this.mode === "copied" || this.mode === "asked for";
  }

  private init({ depth }: QueueConfig): QueueMemory {
    let made = 0;
    const map = () => {
      this.isShort = ++made > depth + SPARES;
      const address = this.memoryAt.size + 1;
      this.memoryAt.set(address, new Uint8Array(IO_SECTORS * SECTOR));
      return address;
    };
    const tags = Array.from({ length: this.copies ? depth : 0 }, map);
    this.address = [...tags];
    const pool = new BufferPool({
      bytes: 64 * 1024 ** 2 / SPARES,
      map,
      view: (address) => this.memoryAt.get(address)!.buffer,
      use: (tag, address) => void (this.address[tag] = address),
      drop: () => {},
    }, tags);
    this.depth = depth;
    this.idle = new Array(depth).fill(false);
    this.serving = new Array(depth).fill(undefined);
    this.asking = new Array(depth).fill(false);
    this.registered = new Array(depth).fill(undefined);
    this.registeredByQueue = new Array(depth).fill(false);
    this.completions = [];
    this.wakeArmed = false;
    this.quiescing = false;
    return this.memory = {
      handle: 0,
      commands: new ArrayBuffer((depth + 1) * COMMAND_WORDS * 4),
      events: new ArrayBuffer((depth + 1) * EVENT_WORDS * 4),
      descriptors: new ArrayBuffer(4096),
      buffers: pool.tags,
      pool,
      stats: undefined,
    };
  }

  // What the world does.

  /** @returns false: another request is at these sectors, and it is not sent. */
  ask(asked: Asked): boolean {
    const end = (one: Asked) => one.sector + one.sectors;
    const inFlight = [...this.waiting, ...this.serving].filter((one) => one !== undefined);
    const meets = (one: Asked) => one.sector < end(asked) && asked.sector < end(one);
    // Two of FLUSH could not be told apart.
    if (inFlight.some((one) => meets(one) || one.sectors + asked.sectors === 0)) return false;
    if (moves(asked.op)) {
      asked.pages = new Uint8Array(asked.sectors * SECTOR);
      asked.pages.fill(asked.op === UBLK_IO_OP_WRITE ? asked.byte : 0xa5);
    }
    if (this.spoilt) asked.mayFail = true;
    this.waiting.push(asked);
    this.dispatch();
    return true;
  }

  /** Ends one of the operations in flight. */
  completeOne(which: number): boolean {
    if (this.operations.length === 0) return false;
    const [operation] = this.operations.splice(which % this.operations.length, 1);
    this.complete(EVENT_FILE, operation!.tag, this.perform(operation!));
    return true;
  }

  wake(): void {
    this.wakePending = true;
    if (!this.wakeArmed) return;
    this.wakeArmed = this.wakePending = false;
    this.complete(EVENT_WAKE, 0, 8);
  }

  /** Rings without a reason. */
  ring(): void {
    queueMicrotask(() => this.signalled());
  }

  quiesce(): void {
    this.quiescing = true;
    this.takeBack();
  }

  stop(): void {
    this.stopping = true;
    this.takeBack();
  }

  get unanswered(): number {
    return this.waiting.length + this.serving.filter((one) => one !== undefined).length;
  }

  get isServing(): boolean {
    return this.serving.some((one) => one !== undefined);
  }

  /** @returns the request of those that are served that is for this extent. */
  servingAt(offset: number, length: number): Asked | undefined {
    return this.serving.find((one) =>
      one && one.sector * SECTOR === offset && one.sectors * SECTOR === length
    );
  }

  /** A function is about to lose a tag's memory: whatever comes next may fail. */
  spoil(): void {
    this.spoilt = true;
    for (const one of [...this.waiting, ...this.serving]) if (one) one.mayFail = true;
  }

  /** A claim of a function, whose errors would only be one request's. Throws at the next step. */
  mustHold(claim: () => void): void {
    try {
      claim();
    } catch (error) {
      this.broken ??= { error };
      throw error;
    }
    if (this.broken) throw this.broken.error;
  }

  get hasWakeUp(): boolean {
    return this.wakePending && !this.wakeArmed;
  }

  get hasCompletions(): boolean {
    return this.completions.length > 0;
  }

  // The driver.

  private takeBack(): void {
    for (const [tag, isIdle] of this.idle.entries()) {
      if (!isIdle) continue;
      this.idle[tag] = false;
      this.complete(EVENT_REFUSED, tag, -ERRNO.ENODEV);
    }
  }

  private dispatch(): void {
    if (this.quiescing || this.stopping) return;
    for (let tag = 0; tag < this.depth && this.waiting.length > 0; tag++) {
      if (!this.idle[tag]) continue;
      const asked = this.waiting.shift()!;
      this.idle[tag] = false;
      this.serving[tag] = asked;
      let flags = (asked.op | asked.flags) >>> 0;
      if (this.mode === "automatic" && moves(asked.op)) {
        const fails = this.failsEach > 0 && ++this.dispatched % this.failsEach === 0;
        if (fails) flags |= UBLK_IO_F_NEED_REG_BUF;
        else this.registered[tag] = asked.pages;
      }
      const words = new Uint32Array(this.memory.descriptors, tag * 24, 6);
      words.set([flags, asked.sectors, asked.sector, 0]);
      if (this.mode === "asked for" && asked.op === UBLK_IO_OP_WRITE) {
        this.asking[tag] = true;
        this.complete(EVENT_REFUSED, tag, UBLK_IO_RES_NEED_GET_DATA);
      } else this.give(tag, asked);
    }
  }

  private give(tag: number, asked: Asked): void {
    const memory = this.memoryAt.get(this.place[tag]!);
    // Whose ArrayBuffer is detached, nobody can see.
    if (this.copies && asked.op === UBLK_IO_OP_WRITE && memory!.length) memory!.set(asked.pages);
    if (this.copies && asked.op === UBLK_IO_OP_READ && memory!.length) memory!.fill(0x5a);
    this.complete(EVENT_REQUEST, tag, 0);
  }

  private complete(kind: number, tag: number, result: number): void {
    this.completions.push([kind, tag, result]);
    if (this.armed) queueMicrotask(() => this.signalled());
  }

  private commit(tag: number, result: number): void {
    const asked = this.serving[tag];
    assert(asked && !this.asking[tag], `tag ${tag} is committed, which serves nothing`);
    assert(!this.registeredByQueue[tag], `tag ${tag} is committed with its buffer registered`);
    assert(
      !this.operations.some((one) => one.tag === tag),
      `tag ${tag} is committed in an operation`,
    );
    assert(!this.hasCompletion(tag), `tag ${tag} is committed before its event was seen`);
    this.serving[tag] = undefined;
    this.registered[tag] = undefined;
    const bytes = asked.sectors * SECTOR;
    if (moves(asked.op)) assert(result !== 0 && result <= bytes, `answered ${result} of ${bytes}`);
    assert(result !== -ERRNO.EAGAIN, "answered EAGAIN");
    if (asked.op === UBLK_IO_OP_READ && result > 0 && this.copies) {
      asked.pages.set(this.memoryAt.get(this.place[tag]!)!.subarray(0, result));
    }
    if (moves(asked.op) && result > 0 && result < bytes) {
      // The block layer asks again for the rest.
      assert(result % SECTOR === 0, `${result} bytes are no sectors`);
      this.check({ ...asked, sectors: result / SECTOR }, result);
      asked.sector += result / SECTOR;
      asked.sectors -= result / SECTOR;
      asked.pages = asked.pages.slice(result);
      this.waiting.unshift(asked);
      return;
    }
    assert(asked.result === undefined, "a request is answered twice");
    asked.result = result;
    this.answered++;
    this.check(asked, result);
  }

  /** Whether the answer is right, and what the disk holds since then. */
  private check({ op, sector, sectors, pages, byte, mayFail }: Asked, result: number): void {
    const isRefused = result === -ERRNO.ETIMEDOUT && this.isShort;
    if (result < 0) assert(mayFail || isRefused, `a request fails (${result}) without a reason`);
    for (let at = sector; at < sector + sectors; at++) {
      if (op === UBLK_IO_OP_READ) {
        const known = this.model[at];
        const found = pages.subarray((at - sector) * SECTOR, (at - sector + 1) * SECTOR);
        if (result < 0 || known === undefined) continue;
        assert(found.every((one) => one === known), `sector ${at} reads ${found[0]}, not ${known}`);
      } else if (op === UBLK_IO_OP_WRITE) this.model[at] = result < 0 ? undefined : byte;
      else if (op === UBLK_IO_OP_WRITE_ZEROES) this.model[at] = result < 0 ? undefined : 0;
      else if (op === UBLK_IO_OP_DISCARD) this.model[at] = undefined;
    }
  }

  private hasCompletion(tag: number): boolean {
    return this.completions.some(([kind, other]) => kind !== EVENT_WAKE && other === tag);
  }

  // The ring.

  private step(count: number, wait: number): number {
    this.steps++;
    this.armed = false;
    if (this.broken) throw this.broken.error;
    const words = new Int32Array(this.memory.commands);
    const floats = new Float64Array(this.memory.commands);
    assert(count <= this.depth + 1, "more commands than tags");
    for (let i = 0; i < count; i++) {
      const at = i * COMMAND_WORDS;
      const [op, tag, value] = [words[at]! >>> TAG_BITS, words[at]! & TAG_MASK, words[at + 1]!];
      this.take(op, tag, value, words[at + 3]!, floats[at / 2 + 2]!, floats[at / 2 + 3]!);
    }
    if (this.quiescing || this.stopping) this.takeBack();
    else this.dispatch();
    while (wait && this.completions.length === 0) {
      assert(this.playOn(), "the queue is blocked for ever");
    }
    const events = this.completions.splice(0, this.depth + 1);
    const out = new Int32Array(this.memory.events);
    for (const [i, [kind, tag, result]] of events.entries()) {
      out.set([kind << TAG_BITS | tag, result], i * EVENT_WORDS);
    }
    this.armed = !wait && count === 0 && events.length === 0;
    return events.length;
  }

  private take(
    op: number,
    tag: number,
    value: number,
    bufferOffset: number,
    length: number,
    offset: number,
  ): void {
    if (op === COMMAND_WAKE) {
      assert(!this.wakeArmed, "two wake-up reads");
      this.wakeArmed = true;
      if (this.wakePending) this.wake();
      return;
    }
    const asked = this.serving[tag];
    assert(!this.idle[tag], `a command for tag ${tag}, which the driver has`);
    if (op === COMMAND_FETCH || op === COMMAND_COMMIT) {
      // The driver looks at the address first: what a READ got is taken from there.
      this.place[tag] = this.address[tag]!;
      if (op === COMMAND_COMMIT) this.commit(tag, value);
      else assert(!asked, `tag ${tag} is fetched while it serves`);
      this.idle[tag] = true;
      return;
    }
    assert(asked, `a command for tag ${tag}, which serves nothing`);
    assert(!this.hasCompletion(tag), `a command for tag ${tag} before its event was seen`);
    if (op === COMMAND_GET_DATA) {
      assert(this.asking[tag], "data is asked for that is there");
      this.asking[tag] = false;
      this.place[tag] = this.address[tag]!;
      return this.give(tag, asked);
    }
    assert(!this.asking[tag], "its data has not come");
    assert(!this.operations.some((one) => one.tag === tag), `two operations for tag ${tag}`);
    const memory = this.copies ? this.memoryAt.get(this.address[tag]!)! : this.registered[tag];
    if (op === COMMAND_READ || op === COMMAND_WRITE) {
      assert(memory, "an operation without a buffer");
      assert(bufferOffset + length <= asked.sectors * SECTOR, "outside of the request");
    }
    this.operations.push({
      tag,
      op,
      asked,
      fd: value,
      memory: memory?.subarray(bufferOffset, bufferOffset + length),
      length,
      offset,
      outcome: this.outcomes[this.next++ % this.outcomes.length] ?? 0,
    });
  }

  private perform({ tag, op, asked, fd, memory, length, offset, outcome }: Operation): number {
    const chosen = OUTCOMES[outcome % OUTCOMES.length]!;
    if (op === COMMAND_REGISTER || op === COMMAND_UNREGISTER) {
      const registers = op === COMMAND_REGISTER;
      assert(this.registeredByQueue[tag] !== registers, "registered, or taken out, twice");
      if (registers && chosen === "ENOSPC") {
        asked.mayFail = true;
        return -ERRNO.ENOMEM;
      }
      this.registeredByQueue[tag] = registers;
      this.registered[tag] = registers ? asked.pages : undefined;
      return 0;
    }
    if (chosen === "EAGAIN") {
      asked.retries = (asked.retries ?? 0) + 1;
      if (asked.retries > 60) asked.mayFail = true; // The target has had enough.
      return -ERRNO.EAGAIN;
    }
    const errno = chosen === "ENOSPC" ? ERRNO.ENOSPC : 0;
    if (errno) {
      asked.mayFail = true;
      return -errno;
    }
    if (op === COMMAND_FSYNC) return 0;
    if (op === COMMAND_FALLOCATE) {
      this.disk.fill(0, offset, offset + length);
      return 0;
    }
    if (chosen === "none") asked.mayFail = true;
    const share = chosen === "half" ? 0.5 : chosen === "none" ? 0 : 1;
    // No whole sectors: the rest is asked for all the same.
    const done = Math.min(length, Math.ceil(length * share));
    if (op === COMMAND_WRITE_ZEROES) this.disk.fill(0, offset, offset + done);
    else if (op === COMMAND_WRITE) this.disk.set(memory!.subarray(0, done), offset);
    else if (fd !== ZERO_FD) memory!.set(this.disk.subarray(offset, offset + done));
    else memory!.fill(0, 0, done);
    return done;
  }
}

/** Stands for /dev/zero. */
const ZERO_FD = 9;
