// SPDX-License-Identifier: MIT
/**
 * The memory for the data of a queue's requests: a buffer for each tag, and a few spare ones for
 * tags whose own is still used by somebody who was given up.
 *
 * The kernel reads and writes it, so it is native memory, and users' functions get views of it,
 * which they may keep, hand to another thread, or use long after. It is unmapped only when nobody
 * can: what is not used any more is revoked (its ArrayBuffer is detached here, so that nobody can
 * hand it on), and unmapped once the collector has found that no view of it is left; native code
 * that still reads or writes it holds one, too. What a function has handed on before that is never
 * unmapped. What is still lent when the collector finds that no view is left may have been handed
 * on: its pages are given back, its addresses never used again.
 * @module
 */

/** So many spare buffers for a queue, and less of large ones: memory that a stuck target may hold. */
const SPARES_MAX = 64;
const SPARE_BYTES_MAX = 64 * 1024 ** 2;

type Buffer = Uint8Array<ArrayBuffer>;

/** What a pool needs of the shim. */
export interface BufferMemory {
  /** Bytes of each buffer. */
  readonly bytes: number;
  /** @returns the address of a new one, or -1. */
  map(): number;
  view(address: number): ArrayBuffer;
  /** From the tag's next FETCH or COMMIT on, its data is there. */
  use(tag: number, address: number): void;
  /** Gives the pages back, and the addresses too if nobody can have them. */
  drop(address: number, unmap: boolean): void;
}

interface Held {
  readonly pool: BufferPool;
  readonly address: number;
  readonly revoked: boolean;
}

const addresses = new WeakMap<ArrayBuffer, number>();
const collected = new FinalizationRegistry<Held>(({ pool, address, revoked }) =>
  pool.collected(address, revoked)
);

export class BufferPool {
  /** By tag: what the driver fills and empties. */
  readonly tags: Buffer[];
  private readonly memory: BufferMemory;
  private readonly spare: Buffer[] = [];
  /** How many more may be made. */
  private credit: number;
  /** Of all tags for which there is none. */
  private sink: Buffer | undefined;
  private closed = false;

  constructor(memory: BufferMemory, tagAddresses: readonly number[]) {
    this.memory = memory;
    this.tags = tagAddresses.map((address) => this.see(address));
    this.credit = Math.min(SPARES_MAX, Math.floor(SPARE_BYTES_MAX / memory.bytes));
  }

  private see(address: number): Buffer {
    const buffer = this.memory.view(address);
    addresses.set(buffer, address);
    return new Uint8Array(buffer);
  }

  /**
   * Puts another buffer in the tag's place. Whoever has the old one may use it until `giveBack`.
   *
   * @returns whether there is one; else what comes for the tag shares its place with others.
   * Undefined: there is no memory even for that place.
   */
  renew(tag: number): boolean | undefined {
    const old = this.tags[tag]!;
    const buffer = this.spare.pop() ?? this.make();
    const next = buffer ?? (this.sink ??= this.map());
    if (!next) return undefined;
    if (old !== this.sink) this.lend(old);
    this.tags[tag] = next;
    this.memory.use(tag, addresses.get(next.buffer)!);
    return buffer !== undefined;
  }

  /** The one who was given up has ended. */
  giveBack(buffer: Buffer): void {
    collected.unregister(buffer.buffer);
    if (this.closed) this.revoke(buffer);
    else if (!isGone(buffer)) this.spare.push(buffer);
  }

  /** The kernel uses none any more. @param isUsed by a function, or an operation in flight. */
  close(isUsed: (tag: number) => boolean): void {
    this.closed = true;
    const unused = new Set(this.spare.splice(0));
    if (this.sink) unused.add(this.sink);
    for (const [tag, buffer] of this.tags.entries()) {
      if (isUsed(tag) && buffer !== this.sink) this.lend(buffer);
      else unused.add(buffer);
    }
    // Whoever waits for a buffer's collection knows the pool: it must not keep one.
    this.tags.length = 0;
    this.sink = undefined;
    for (const buffer of unused) this.revoke(buffer);
  }

  /** No view is left. */
  collected(address: number, revoked: boolean): void {
    this.memory.drop(address, revoked);
    this.credit++;
  }

  private make(): Buffer | undefined {
    if (this.credit === 0) return undefined;
    const buffer = this.map();
    if (buffer) this.credit--;
    return buffer;
  }

  private map(): Buffer | undefined {
    const address = this.memory.map();
    return address < 0 ? undefined : this.see(address);
  }

  private lend(buffer: Buffer): void {
    if (!isGone(buffer)) this.watch(buffer.buffer, false);
  }

  private revoke(buffer: Buffer): void {
    if (isGone(buffer)) return;
    buffer.buffer.transfer();
    if (isGone(buffer)) this.watch(buffer.buffer, true);
  }

  private watch(buffer: ArrayBuffer, revoked: boolean): void {
    const held = { pool: this, address: addresses.get(buffer)!, revoked };
    collected.register(buffer, held, buffer);
  }
}

/** A function has handed it on: it is another thread's now, or nobody's. */
function isGone({ length }: Buffer): boolean {
  return length === 0;
}
