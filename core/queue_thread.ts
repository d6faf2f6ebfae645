// SPDX-License-Identifier: MIT
/**
 * The thread around a queue: FETCH binds tags to the thread that submits it, so each queue has a
 * Worker of its own, blocked in the ring. `openHere` serves all of them on the calling thread's
 * event loop instead, for targets that live in the program that makes the device.
 *
 * A thread begins by opening its target, and is told its queue once there is a device.
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

/** What a thread is told once there is a device. */
export interface Assignment extends QueueConfig {
  /** Of the device, as /sys/block has it. */
  blockName: string;
  /** CPUs whose I/O the queue gets: a thread of its own stays with them. Default: all. */
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
  /** Serves this queue from now on. @returns the thread's kernel id, once its ring is set up. */
  serve(config: Assignment): Promise<number>;
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
  | { type: "started"; tid: number; queue: number }
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

/** @param entry URL of a module that calls `runQueueThread`. */
export function startQueueThread(
  entry: string,
  target: TargetName,
  queueId: number,
  shim: Shim,
  log: Log,
): QueueThread {
  const orders = new Int32Array(new SharedArrayBuffer(8));
  const stats = emptyStats();
  const data: WorkerData = { [MARK]: true, shimPath: shim.path, target, orders, stats };
  const worker = new Worker(new URL(entry), { workerData: data, name: `ubd-queue-${queueId}` });

  const { opened, started, fetched, ended, fail } = settlements();
  /** The ring of a thread that has not closed it: see `Queue`, which may not while it lives. */
  let open: number | undefined;
  worker.on("message", (message: Message) => {
    if (message.type === "opened") opened.resolve(message.description);
    else if (message.type === "log") log(message.text);
    else if (message.type === "fetched") fetched.resolve();
    else if (message.type === "started") {
      open = message.queue;
      started.resolve(message.tid);
    } else {
      if (message.type === "failed") fail(fromPlainError(message.error));
      else open = void ended.resolve();
      worker.terminate(); // What the target left on the event loop would keep it.
    }
  });
  worker.on("error", fail);
  worker.on("exit", (code) => {
    if (open !== undefined) shim.native.ubd_queue_exit(open);
    const hint = `its thread ended with code ${code}: does the target call process.exit?`;
    fail(new UblkError({ errno: "EIO", operation: `serve queue ${queueId}`, hint }));
  });

  let wakeFd = -1;
  let gone = false;
  ended.promise.catch(() => {}).finally(() => {
    gone = true;
    wakeFd = -1; // Its number may be another's then.
  });
  const order = (what: number) => {
    Atomics.or(orders, 0, what);
    if (wakeFd >= 0) shim.native.ubd_wake(wakeFd);
  };
  return {
    opened: opened.promise,
    ended: ended.promise,
    stats,
    serve(config) {
      wakeFd = config.wakeFd;
      worker.postMessage(config);
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
 * Opens a target in the thread that will serve its first queue.
 *
 * @param spec what `prepare` needs; the other queues' threads get it with what is `shared`.
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
    startThread: (queueId) =>
      queueId === 0 ? first : startQueueThread(entry, { name, spec: complete }, queueId, shim, log),
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
    let handler: RequestHandler | undefined;
    let abandoned = false;
    let wakeFd = -1;
    const serve = async (config: Assignment) => {
      const parts = partsOf(target, shim, config, stats, log);
      using queue = parts.queue;
      handler = parts.handler;
      started.resolve(shim.native.ubd_gettid());
      const woken = () => {
        fetched.resolve();
        return abandoned;
      };
      await queue.runOnEventLoop(handler, woken, logFailure(log), ended.reject);
    };
    return {
      opened: opened.promise,
      ended: ended.promise,
      stats,
      serve(config) {
        wakeFd = config.wakeFd;
        serving++;
        serve(config).finally(() => {
          wakeFd = -1;
          if (--serving === 0) return close();
        }).then(ended.resolve, fail);
        return started.promise;
      },
      fetched() {
        if (wakeFd >= 0) shim.native.ubd_wake(wakeFd);
        return fetched.promise;
      },
      stopping: () => handler?.stopping?.(),
      hears: () => true,
      abandon() {
        abandoned = true;
        if (wakeFd >= 0) shim.native.ubd_wake(wakeFd);
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

/** Serves the queue this thread was made for, and returns when it is done. */
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
    const told = new Promise<Assignment | undefined>((resolve) =>
      parentPort!.once("message", resolve)
    );
    const served = await prepare(target, log);
    try {
      send({ type: "opened", description: served.description });
      const config = await told;
      if (config) await serveQueue(served, config);
    } finally {
      await served.close?.();
    }
    send({ type: "ended" });
  } catch (error) {
    send({ type: "failed", error: toPlainError(error) });
  }

  async function serveQueue(served: ServedTarget, config: Assignment): Promise<void> {
    const shim = new Shim(shimPath);
    shim.native.ubd_io_flusher(1); // Hardening: who may not, serves without it (core/isolation.ts).
    const { queue, handler } = partsOf(served, shim, config, stats, log);
    const woken = () => {
      const told = Atomics.load(orders, 0);
      Atomics.store(orders, 1, told);
      if (told & FETCHING) send({ type: "fetched" });
      if (told & STOPPING) handler.stopping?.();
      return (told & ABANDONED) !== 0;
    };
    if (config.cpus) shim.narrowAffinity(config.cpus);
    send({ type: "started", tid: shim.native.ubd_gettid(), queue: queue.handle });
    if (!queue.run(handler, woken, logFailure(log))) {
      await queue.runOnEventLoop(handler, woken, logFailure(log));
    }
    queue[Symbol.dispose](); // A queue that has failed is closed after the end of its thread.
  }
}

function blockDeviceBytes(name: string): number | undefined {
  try {
    return Number(readFileSync(`/sys/block/${name}/size`, "utf8")) * SECTOR_BYTES;
  } catch {
    return undefined;
  }
}
