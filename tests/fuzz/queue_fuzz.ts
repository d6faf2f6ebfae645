// SPDX-License-Identifier: MIT
/**
 * core/queue.ts with the handlers of functions and of `loop`, over played_ring.ts and a clock of its
 * own. A failure is printed as a test to be pasted into tests/shim/queue_test.ts.
 */
import assert from "node:assert/strict";
import { setImmediate } from "node:timers";
import fc from "fast-check";
import {
  UBLK_IO_F_FUA,
  UBLK_IO_F_NOUNMAP,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../../abi/ublk_cmd.ts";
import type { BlockDevice, ReadRequest, Request, WriteRequest } from "../../core/define_target.ts";
import { type Clock, FunctionHandler } from "../../core/function_handler.ts";
import { Queue } from "../../core/queue.ts";
import type { RequestHandler, ServeContext } from "../../core/target.ts";
import { Engine } from "../../core/engine.ts";
import { Files } from "../../targets/files.ts";
import type { Fuzzer } from "./fuzzer.ts";
import {
  type Asked,
  DISK_SECTORS,
  IO_SECTORS,
  type Mode,
  MODES,
  PlayedRing,
  SECTOR,
} from "./played_ring.ts";

/** What the functions of a device do, in turn. */
const MANNERS = [
  "at once",
  "at once",
  "half of it",
  "throws",
  "a microtask later",
  "later",
  "later",
  "half of it, later",
  "rejects later",
  "too late",
  "never",
  "transfers",
  "transfers later",
] as const;

const OPS = [
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_WRITE_ZEROES,
];

type Action =
  | { ask: number; sector: number; sectors: number; flags: number; byte: number }
  | { complete: number }
  | { pass: number }
  | { wake: number }
  | { ring: number }
  | { quiesce: number };

export interface Play {
  handler: "functions" | "loop";
  mode: Mode;
  blocks: boolean;
  depth: number;
  maxConcurrent: number;
  manners: number[];
  outcomes: number[];
  failsEach: number;
  actions: Action[];
}

const TIMEOUT_MS = 100;

class PlayedClock implements Clock {
  private time = 0;
  private readonly timers: { at: number; call: () => void }[] = [];

  now(): number {
    return this.time;
  }

  after(ms: number, call: () => void): void {
    this.timers.push({ at: this.time + ms, call });
    this.timers.sort((a, b) => a.at - b.at);
  }

  /** Until the next timer, or so far. @returns whether one was called. */
  pass(ms: number): boolean {
    const next = this.timers[0];
    if (!next || next.at > this.time + ms) {
      this.time += ms;
      return false;
    }
    this.time = Math.max(this.time, next.at);
    this.timers.shift()!.call();
    return true;
  }
}

/** A disk as functions, with the manners that are drawn. */
function functions(ring: PlayedRing, clock: PlayedClock, play: Play): BlockDevice {
  let calls = 0;
  const later = (ms: number) => new Promise<void>((resolve) => clock.after(ms, resolve));
  const coded = () => Object.assign(new Error("planned"), { code: "ENOSPC" });
  const serve = (request: Request & { buffer?: Uint8Array<ArrayBuffer> }, full: () => void) => {
    const turn = calls++;
    const manner = MANNERS[play.manners[turn % play.manners.length]! % MANNERS.length]!;
    const { offset, length, buffer } = request;
    const asked = ring.servingAt(offset, length)!;
    ring.mustHold(() => {
      assert(asked, "a function is asked what nobody has asked");
      if (buffer?.length) assert.equal(buffer.length, length);
    });
    const mayFail = () => void (asked.mayFail = true);
    const isWrite = asked.op === UBLK_IO_OP_WRITE;
    // FLUSH for a FUA sees the write's request.
    const check = () =>
      ring.mustHold(() => {
        if (isWrite && full === none) return;
        if (isWrite) assert(buffer!.every((one) => one === asked.byte), "another's data");
        assert.deepEqual([request.offset, request.length], [offset, length], "another's request");
      });
    check();
    const half = length > SECTOR && (isWrite || asked.op === UBLK_IO_OP_READ) && full !== none
      ? Math.ceil(length / 2)
      : undefined;
    switch (manner) {
      case "at once":
        return full();
      case "half of it":
        full();
        return half;
      case "throws":
        mayFail();
        throw coded();
      case "a microtask later":
        return Promise.resolve().then(full);
      case "later":
        return later(turn % 7 * 10).then(() => (check(), full()));
      case "half of it, later":
        return later(turn % 7 * 10).then(() => (check(), full(), half));
      case "rejects later":
        mayFail();
        return later(turn % 7 * 10).then(() => Promise.reject(coded()));
      case "too late":
        mayFail();
        return later(TIMEOUT_MS + 1 + turn % 5 * 50).then(() => {
          // At the end of its queue, its memory is still its own.
          check();
          if (asked.op === UBLK_IO_OP_READ) buffer?.fill(0xee);
        });
      case "never":
        mayFail();
        return new Promise<void>(() => {});
      case "transfers":
      case "transfers later": {
        mayFail();
        // Its tag has no memory any more: the next request may find that.
        ring.spoil();
        const lose = () => void buffer?.buffer.transfer();
        if (manner === "transfers") return lose();
        return later(turn % 7 * 10).then(lose);
      }
    }
  };
  const none = () => {};
  return {
    size: DISK_SECTORS * SECTOR,
    timeoutMs: TIMEOUT_MS,
    maxConcurrent: play.maxConcurrent,
    read: (request: ReadRequest) =>
      serve(request, () => {
        const { offset, length, buffer } = request;
        for (let at = 0; at < length; at += SECTOR) {
          const sector = ring.disk.subarray(offset + at, offset + at + SECTOR);
          if (sector[0] !== 0) buffer.set(sector, at); // What it leaves out is zeroes.
        }
      }),
    write: (request: WriteRequest) =>
      serve(request, () => ring.disk.set(request.buffer, request.offset)),
    flush: (request) => serve(request, none),
    discard: (request) => serve(request, none),
    writeZeroes: (request) =>
      serve(request, () => {
        ring.disk.fill(0, request.offset, request.offset + request.length);
      }) as void,
  };
}

function handlerOf(ring: PlayedRing, clock: PlayedClock, play: Play): RequestHandler {
  const context: ServeContext = {
    depth: play.depth,
    ioBytesMax: IO_SECTORS * SECTOR,
    log: () => {},
    deviceBytes: () => undefined,
  };
  if (play.handler === "functions") {
    return new FunctionHandler(functions(ring, clock, play), context, clock);
  }
  const sizeBytes = DISK_SECTORS * SECTOR;
  const file = { fd: 8, offsetBytes: 0, sizeBytes, endBytes: sizeBytes };
  const spec = { files: [file], chunkBytes: 0, blockBytes: 512 };
  return new Engine(new Files(spec, context.deviceBytes), context);
}

/** One thing happens. */
function act(ring: PlayedRing, clock: PlayedClock, action: Action): void {
  if ("ask" in action) {
    const op = OPS[action.ask % OPS.length]!;
    const hasExtent = op !== UBLK_IO_OP_FLUSH;
    const sector = hasExtent ? action.sector % DISK_SECTORS : 0;
    const asked: Asked = {
      op,
      flags: (action.flags & 1 ? UBLK_IO_F_FUA : 0) | (action.flags & 2 ? UBLK_IO_F_NOUNMAP : 0),
      sector,
      sectors: hasExtent ? Math.min(action.sectors, DISK_SECTORS - sector) : 0,
      byte: action.byte,
      pages: new Uint8Array(),
    };
    ring.ask(asked);
  } else if ("complete" in action) ring.completeOne(action.complete);
  else if ("pass" in action) clock.pass(action.pass);
  else if ("wake" in action) ring.wake();
  else if ("ring" in action) ring.ring();
  else ring.quiesce();
}

/** @throws what went wrong. @param breaks plants a bug. */
export async function play(script: Play, breaks: (queue: Queue) => void = () => {}): Promise<void> {
  using ring = new PlayedRing(script.mode);
  ring.outcomes = script.outcomes;
  ring.failsEach = script.failsEach;
  const clock = new PlayedClock();
  const actions = [...script.actions];
  /** Begins one thing: what is left of the script, then whatever is still to come. */
  const step = (): boolean => {
    const action = actions.shift();
    if (action) {
      act(ring, clock, action);
      return true;
    }
    return ring.completeOne(0) || clock.pass(TIMEOUT_MS);
  };
  for (let server = 0;; server++) {
    // A server that was told to go leaves what waits to the next.
    using queue = new Queue(ring.shim, ring.config(script.depth));
    breaks(queue);
    const handler = handlerOf(ring, clock, script);
    const fail = (error: unknown) => {
      throw error;
    };
    ring.playOn = () => {
      if (step()) return true;
      if (ring.unanswered > 0 || ring.stopping || ring.quiescing) return false;
      ring.stop();
      return true;
    };
    if (!script.blocks || !queue.run(handler, () => false, fail)) {
      let isOver = false;
      let failure: { error: unknown } | undefined;
      const running = queue.runOnEventLoop(handler, () => false, fail)
        .catch((error) => failure = { error }).finally(() => isOver = true);
      while (!isOver) {
        await sleeps(ring, () => isOver);
        if (isOver) break;
        assert(!ring.hasCompletions, "it sleeps, and there are completions");
        assert(!ring.hasWakeUp, "it sleeps, and was woken");
        if (step()) continue;
        assert(ring.unanswered === 0 || ring.quiescing, "it sleeps, and requests are not answered");
        assert(
          !ring.stopping && (!ring.quiescing || !ring.isServing),
          "it sleeps, and does not end",
        );
        ring.stop();
      }
      await running;
      if (failure) throw failure.error;
    }
    if (ring.stopping) break;
  }
  assert.equal(ring.unanswered, 0);
  ring.mustHold(() => {});
}

/** Until the queue sleeps. */
async function sleeps(ring: PlayedRing, isOver: () => boolean): Promise<void> {
  let still = 0;
  for (let turns = 0; still < 3 && !isOver(); turns++) {
    assert(turns < 10_000, "it turns, and nothing happens");
    const before = ring.steps;
    await new Promise<void>((resolve) => setImmediate(() => resolve()));
    still = ring.steps === before && ring.armed ? still + 1 : 0;
    if (ring.steps === before && !ring.armed) assert(turns < 100, "it sleeps, and none wakes it");
  }
}

const small = (max: number) => fc.nat({ max });
const action: fc.Arbitrary<Action> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      ask: small(OPS.length - 1),
      sector: small(DISK_SECTORS - 1),
      sectors: fc.integer({ min: 1, max: IO_SECTORS }),
      flags: small(3),
      byte: fc.integer({ min: 1, max: 255 }),
    }),
  },
  { weight: 3, arbitrary: fc.record({ complete: small(7) }) },
  { weight: 3, arbitrary: fc.record({ pass: small(150) }) },
  { weight: 1, arbitrary: fc.record({ wake: fc.constant(1) }) },
  { weight: 1, arbitrary: fc.record({ ring: fc.constant(1) }) },
  { weight: 1, arbitrary: fc.record({ quiesce: fc.constant(1) }) },
);

const script: fc.Arbitrary<Play> = fc.record({
  handler: fc.constantFrom("functions", "loop"),
  mode: fc.constantFrom(...MODES),
  blocks: fc.boolean(),
  depth: fc.integer({ min: 1, max: 4 }),
  maxConcurrent: fc.integer({ min: 1, max: 4 }),
  manners: fc.array(small(MANNERS.length - 1), { minLength: 1, maxLength: 8 }),
  outcomes: fc.array(small(6), { minLength: 1, maxLength: 8 }),
  failsEach: small(2),
  actions: fc.array(action, { maxLength: 40 }),
}).map((one) => ({
  ...one,
  // Functions look at their data.
  mode: one.handler === "functions" && one.mode !== "asked for" ? "copied" : one.mode,
}));

/** A commit no longer wakes a queue that sleeps. */
function deaf(queue: Queue): void {
  const inside = queue as unknown as { goOn: (() => void) | undefined };
  const commit = queue.commit.bind(queue);
  queue.commit = (tag, result) => {
    const { goOn } = inside;
    inside.goOn = undefined;
    commit(tag, result);
    inside.goOn = goOn;
  };
}

const fuzzer: Fuzzer = {
  about:
    "requests, operations and times in any order: one right answer each, and no sleep before it",
  property: (canary) =>
    fc.asyncProperty(script, async (one) => {
      try {
        await play(one, canary ? deaf : undefined);
      } catch (error) {
        const test = `test("a script of the queue's fuzzer", () => play(${JSON.stringify(one)}));`;
        throw new Error(
          `${(error as Error)?.stack ?? error}\n\n` +
            `import { play } from "../fuzz/queue_fuzz.ts";\n${test}\n`,
        );
      }
    }),
};
export default fuzzer;
