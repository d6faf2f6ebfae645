// SPDX-License-Identifier: MIT
/**
 * The threads around queues: FETCH binds tags to the thread that submits it. A Worker that has one
 * ring to serve, as by default each has, is blocked in it; one that has several serves them on its
 * event loop. `openHere` serves all of them on the calling thread's event loop instead, for targets
 * that live in the program that makes the device.
 *
 * A thread begins by opening its target, and is told its queues once there is a device.
 *
 * The Worker's entry is a module of the layer that knows the targets (targets/queue_thread.ts),
 * or the whole program in a bundle, where every module has the same URL; both end in
 * `runQueueThread`. A blocked Worker is never terminated: it ends when the device stops, or when
 * `abandon` wakes it.
 * @module
 */

import { readFileSync } from "node:fs";
import { URL } from "node:url";
import process from "node:process";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { type QueueConfig, Shim } from "../ffi/mod.ts";
import {
  describeThrown,
  fromPlainError,
  type PlainError,
  toPlainError,
  UblkError,
} from "./error.ts";
import { GapQueue, type Gaps, refusing } from "./gaps.ts";
import { limited, type Log } from "./log.ts";
import { Queue, SECTOR_BYTES } from "./queue.ts";
import { emptyStats } from "./stats.ts";
import type {
  OpenTarget,
  RequestHandler,
  ServeContext,
  ServedTarget,
  TargetDescription,
} from "./target.ts";

/** What a thread needs to open its target: `prepare` of targets/mod.ts knows both. */
export interface TargetName {
  name: string;
  spec: unknown;
}

/** What a thread is told of a queue that it is to serve, or share, once there is a device. */
export interface Assignment extends QueueConfig {
  /** Of the device, as /sys/block has it. */
  blockName: string;
  /** CPUs whose I/O the queue gets: threads for it alone stay with them. Default: all. */
  cpus?: readonly number[];
  /** What the driver leaves to this side. Default: nothing. */
  gaps?: Gaps | undefined;
}

export interface QueueThread {
  /** Settles when the target is open: with what it is, if that is only known there. */
  readonly opened: Promise<TargetDescription | undefined>;
  /**
   * Resolves when the thread is done, after a stop. Rejects when it fails: then it is done, or
   * refuses every request until the device is stopped.
   */
  readonly ended: Promise<void>;
  /** See core/stats.ts. */
  readonly stats: Float64Array;
  /** Serves these from now on. @returns the thread's kernel id, once its rings are set up. */
  serve(...configs: Assignment[]): Promise<number>;
  /** Settles when the driver has taken all FETCHes. After `serve`. */
  fetched(): Promise<void>;
  /** Tells the target that the device is about to stop. */
  stopping(): void;
  /** Whether it has seen what it was told: one that has not is busy with the target's own code. */
  hears(): boolean;
  /** Makes the thread leave now. For devices that never started. */
  abandon(): void;
}

/** What a thread is told by the first i32 of `orders`; the second is what it has seen of it. */
const STOPPING = 1;
const ABANDONED = 2;
/** To say when it comes to read this: the wake-up is submitted after the first FETCHes. */
const FETCHING = 4;

const MARK = "ubdQueueThread";

interface WorkerData {
  readonly [MARK]: true;
  readonly shimPath: string;
  readonly target: TargetName;
  readonly orders: Int32Array<SharedArrayBuffer>;
  readonly stats: Float64Array<SharedArrayBuffer>;
}

type Message =
  | { type: "opened"; description: TargetDescription | undefined }
  | { type: "started"; tid: number; rings: number[] }
  | { type: "fetched" }
  | { type: "log"; text: string }
  | { type: "failed"; error: PlainError }
  | { type: "ended" };

/** The promises of a thread, all without an owner at first: nobody may be waiting. */
function settlements() {
  const opened = Promise.withResolvers<TargetDescription | undefined>();
  const started = Promise.withResolvers<number>();
  const fetched = Promise.withResolvers<void>();
  const ended = Promise.withResolvers<void>();
  const all = [opened, started, fetched, ended];
  for (const { promise } of all) promise.catch(() => {});
  return {
    opened,
    started,
    fetched,
    ended,
    fail: (error: unknown) => all.forEach((one) => one.reject(error)),
  };
}

/**
 * @param entry URL of a module that calls `runQueueThread`.
 * @param index the thread's number among those of its device.
 */
export function startQueueThread(
  entry: string,
  target: TargetName,
  index: number,
  shim: Shim,
  log: Log,
): QueueThread {
  const orders = new Int32Array(new SharedArrayBuffer(8));
  const stats = emptyStats();
  const data: WorkerData = { [MARK]: true, shimPath: shim.path, target, orders, stats };
  const worker = new Worker(new URL(entry), { workerData: data, name: `ubd-queue-${index}` });

  const { opened, started, fetched, ended, fail } = settlements();
  /** The rings of a thread that has not closed them: see `Queue`, which may not while it lives. */
  let open: number[] = [];
  let serves = "";
  worker.on("message", (message: Message) => {
    if (message.type === "opened") opened.resolve(message.description);
    else if (message.type === "log") log(message.text);
    else if (message.type === "fetched") fetched.resolve();
    else if (message.type === "started") {
      open = message.rings;
      started.resolve(message.tid);
    } else {
      if (message.type === "failed") fail(fromPlainError(message.error));
      else {
        open = [];
        ended.resolve();
      }
      worker.terminate(); // What the target left on the event loop would keep it.
    }
  });
  worker.on("error", fail);
  worker.on("exit", (code) => {
    for (const ring of open) shim.native.ubd_queue_exit(ring);
    const hint = `its thread ended with code ${code}: does the target call process.exit?`;
    fail(new UblkError({ errno: "EIO", operation: `serve queue ${serves || index}`, hint }));
  });

  let wakeFds: number[] = [];
  let gone = false;
  ended.promise.catch(() => {}).finally(() => {
    gone = true;
    wakeFds = []; // A number may be another's then.
  });
  const order = (what: number) => {
    Atomics.and(orders, 1, ~what); // Heard before, it is to be heard again.
    Atomics.or(orders, 0, what);
    for (const fd of wakeFds) shim.native.ubd_wake(fd);
  };
  return {
    opened: opened.promise,
    ended: ended.promise,
    stats,
    serve(...configs) {
      wakeFds = configs.map(({ wakeFd }) => wakeFd);
      serves = configs.map(({ queueId }) => queueId).join(", ");
      worker.postMessage(configs);
      return started.promise;
    },
    fetched() {
      order(FETCHING);
      return fetched.promise;
    },
    stopping: () => order(STOPPING),
    hears: () => gone || Atomics.load(orders, 0) === Atomics.load(orders, 1),
    abandon() {
      order(ABANDONED);
      worker.postMessage(undefined);
    },
  };
}

/**
 * Opens a target in the first of the threads that will serve it.
 *
 * @param spec what `prepare` needs; the other threads get it with what is `shared`.
 * @param signal ends the wait for it; its reason is thrown.
 * @throws what opening it threw. The thread is gone then, unless the target's code keeps it.
 */
export async function openInThread(
  entry: string,
  { name, spec }: { name: string; spec: Record<string, unknown> },
  facts: OpenTarget["facts"],
  shim: Shim,
  log: Log,
  signal?: AbortSignal,
): Promise<OpenTarget> {
  const first = startQueueThread(entry, { name, spec }, 0, shim, log);
  const { limits, queuesMax, files = [], shared } =
    (await unless(signal, first.opened).catch((error) => {
      first.abandon();
      throw error;
    }))!;
  const complete = { ...spec, shared };
  return {
    limits,
    ...(queuesMax !== undefined && { queuesMax }),
    facts,
    notes: [],
    files,
    spec: complete,
    startThread: (index) =>
      index === 0 ? first : startQueueThread(entry, { name, spec: complete }, index, shim, log),
    close: () => first.abandon(),
  };
}

/** @throws the signal's reason, once it is aborted, if that comes first. */
export function unless<T>(signal: AbortSignal | undefined, work: Promise<T>): Promise<T> {
  if (!signal) return work;
  work.catch(() => {}); // It may fail after that.
  return new Promise<T>((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) return abort();
    signal.addEventListener("abort", abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}

/** Serves a target on this thread's event loop, with any number of queues. */
export function openHere(target: ServedTarget, shim: Shim, logAny: Log): OpenTarget {
  const log = limited(logAny);
  let serving = 0;
  let closed: Promise<void> | undefined;
  const close = () => closed ??= (async () => await target.close?.())();
  const startThread = (): QueueThread => {
    const { opened, started, fetched, ended, fail } = settlements();
    opened.resolve(undefined);
    const stats = emptyStats();
    const handlers: RequestHandler[] = [];
    let abandoned = false;
    let wakeFds: number[] = [];
    const wake = () => {
      for (const fd of wakeFds) shim.native.ubd_wake(fd);
    };
    const serve = async (config: Assignment) => {
      const parts = partsOf(target, shim, config, stats, log);
      using queue = parts.queue;
      handlers.push(parts.handler);
      started.resolve(shim.native.ubd_gettid());
      const woken = () => {
        fetched.resolve(); // All queues of this thread have submitted theirs by then.
        return abandoned;
      };
      await queue.runOnEventLoop(parts.handler, woken, logFailure(log), ended.reject);
    };
    const done = () => {
      if (--serving === 0) return close();
    };
    return {
      opened: opened.promise,
      ended: ended.promise,
      stats,
      serve(...configs) {
        wakeFds = configs.map(({ wakeFd }) => wakeFd);
        serving += configs.length;
        Promise.all(configs.map((config) => serve(config).finally(done)))
          .finally(() => wakeFds = []).then(() => ended.resolve(), fail);
        return started.promise;
      },
      fetched() {
        wake();
        return fetched.promise;
      },
      stopping() {
        for (const handler of handlers) handler.stopping?.();
      },
      hears: () => true,
      abandon() {
        abandoned = true;
        if (wakeFds.length > 0) wake();
        else ended.resolve();
      },
    };
  };
  return {
    limits: target.description!.limits,
    facts: {},
    notes: [],
    spec: undefined,
    startThread,
    close() {
      close().catch((error) => log((error as Error)?.message ?? String(error)));
    },
  };
}

function partsOf(
  target: ServedTarget,
  shim: Shim,
  config: Assignment,
  stats: Float64Array,
  log: Log,
): { queue: Queue; handler: RequestHandler } {
  const { gaps } = config;
  if (!gaps) {
    const queue = new Queue(shim, config, stats);
    return { queue, handler: target.handler(serveContext(config, log)) };
  }
  const queue = new GapQueue(shim, config, stats);
  const handler = refusing(target.handler(serveContext(config, log)), gaps.refused);
  Object.assign(queue, { gaps, handler });
  return { queue, handler };
}

function serveContext({ depth, ioBytesMax, blockName }: Assignment, log: Log): ServeContext {
  return { depth, ioBytesMax, log, deviceBytes: () => blockDeviceBytes(blockName) };
}

const logFailure = (log: Log) => (error: unknown) =>
  log(`the target failed: ${describeThrown(error)}`);

/** Whether this thread was made by `startQueueThread`. */
export const isQueueThread: boolean = !isMainThread &&
  (workerData as Partial<WorkerData> | null)?.[MARK] === true;

/** Serves the queues this thread is told, and returns when they are done. */
export async function runQueueThread(
  prepare: (target: TargetName, log: Log) => ServedTarget | Promise<ServedTarget>,
): Promise<void> {
  const { shimPath, target, orders, stats } = workerData as WorkerData;
  const send = (message: Message) => parentPort!.postMessage(message);
  const log = limited((text) => send({ type: "log", text }));
  // What nobody awaited, and what a timer threw, is no failure of a request: the device lives.
  const stray = (what: string) => (error: unknown) => log(`${what}: ${describeThrown(error)}`);
  process.on("uncaughtException", stray("the target threw where nothing catches it"));
  process.on("unhandledRejection", stray("the target lost a rejection (an await is missing)"));
  try {
    const told = new Promise<Assignment[] | undefined>((resolve) =>
      parentPort!.once("message", resolve)
    );
    const served = await prepare(target, log);
    try {
      send({ type: "opened", description: served.description });
      const configs = await told;
      if (configs) await serveQueues(served, configs);
    } finally {
      await served.close?.();
    }
    send({ type: "ended" });
  } catch (error) {
    send({ type: "failed", error: toPlainError(error) });
  }

  async function serveQueues(served: ServedTarget, configs: readonly Assignment[]): Promise<void> {
    const shim = new Shim(shimPath);
    shim.native.ubd_io_flusher(1); // Hardening: who may not, serves without it (core/isolation.ts).
    const parts: ReturnType<typeof partsOf>[] = [];
    try {
      for (const config of configs) parts.push(partsOf(served, shim, config, stats, log));
    } catch (error) {
      for (const { queue } of parts) queue[Symbol.dispose](); // Nothing is fetched yet.
      throw error;
    }
    if (configs.every(({ cpus }) => cpus)) {
      shim.narrowAffinity(configs.flatMap(({ cpus }) => cpus!));
    }
    const unwoken = new Set(parts);
    const runs = parts.map((part) => {
      const { queue, handler } = part;
      const woken = () => {
        const told = Atomics.load(orders, 0);
        Atomics.store(orders, 1, told);
        if (told & FETCHING) {
          unwoken.delete(part);
          if (unwoken.size === 0) send({ type: "fetched" });
        }
        if (told & STOPPING) handler.stopping?.();
        return (told & ABANDONED) !== 0;
      };
      return {
        blocked: () => queue.run(handler, woken, logFailure(log)),
        onEventLoop: () => queue.runOnEventLoop(handler, woken, logFailure(log)),
      };
    });
    const rings = parts.map(({ queue }) => queue.handle);
    send({ type: "started", tid: shim.native.ubd_gettid(), rings });
    if (runs.length > 1 || !runs[0]!.blocked()) {
      await Promise.all(runs.map((run) =>
        run.onEventLoop().catch((error) => {
          // The thread ends with it: from here on, nothing is served that would not be answered.
          for (const { queue } of parts) queue.break(error);
          throw error;
        })
      ));
    }
    // Queues that have failed are closed after the end of their thread.
    for (const { queue } of parts) queue[Symbol.dispose]();
  }
}

function blockDeviceBytes(name: string): number | undefined {
  try {
    return Number(readFileSync(`/sys/block/${name}/size`, "utf8")) * SECTOR_BYTES;
  } catch {
    return undefined;
  }
}
