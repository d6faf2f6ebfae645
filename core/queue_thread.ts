// SPDX-License-Identifier: MIT
/**
 * The thread around a queue: FETCH binds tags to the thread that submits it, so each queue has a
 * Worker of its own, blocked in the ring.
 *
 * The Worker's entry is a module of the layer that knows the targets (targets/queue_thread.ts),
 * or the whole program in a bundle, where every module has the same URL; both end in
 * `runQueueThread`. A blocked Worker is never terminated: it ends when the device stops, or when
 * `abandon` wakes it.
 * @module
 */

import { URL } from "node:url";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { type QueueConfig, Shim } from "../ffi/mod.ts";
import { UblkError, type UblkErrorDetails } from "./error.ts";
import { Queue } from "./queue.ts";
import type { RequestHandler, ServeContext } from "./target.ts";

export interface QueueThreadSpec {
  shimPath: string;
  config: QueueConfig;
  target: { name: string; spec: unknown };
}

type Message =
  | { type: "started"; tid: number }
  | { type: "log"; text: string }
  | { type: "failed"; error: Error; details: UblkErrorDetails | undefined };

const MARK = "ubdQueueThread";

interface WorkerData extends QueueThreadSpec {
  readonly [MARK]: true;
  /** One i32: not 0 once the thread is to leave without waiting for the driver. */
  readonly abandoned: Int32Array<SharedArrayBuffer>;
}

export interface QueueThread {
  /** The thread's kernel id, once its ring is set up. Rejects when it cannot be. */
  readonly started: Promise<number>;
  /** Settles when the thread has ended: resolves after a stop, rejects after a failure. */
  readonly ended: Promise<void>;
  /** Makes the thread leave its loop now. For devices that never started. */
  abandon(): void;
}

/** @param entry URL of a module that calls `runQueueThread`. */
export function startQueueThread(
  entry: string,
  spec: QueueThreadSpec,
  shim: Shim,
  log: (text: string) => void,
): QueueThread {
  const abandoned = new Int32Array(new SharedArrayBuffer(4));
  const data: WorkerData = { ...spec, [MARK]: true, abandoned };
  const worker = new Worker(new URL(entry), {
    workerData: data,
    name: `ubd-queue-${spec.config.queueId}`,
  });

  const started = Promise.withResolvers<number>();
  const ended = Promise.withResolvers<void>();
  const fail = (error: Error) => {
    started.reject(error);
    ended.reject(error);
  };
  worker.on("message", (message: Message) => {
    if (message.type === "started") started.resolve(message.tid);
    else if (message.type === "log") log(message.text);
    else fail(message.details ? new UblkError(message.details) : message.error);
  });
  worker.on("error", fail);
  worker.on("exit", (code) => {
    if (code !== 0) fail(new Error(`queue thread ${spec.config.queueId} ended with code ${code}`));
    started.reject(new Error("queue thread ended before it started"));
    ended.resolve();
  });
  // Whoever awaits sees the rejection; one that is never awaited must not end the process.
  started.promise.catch(() => {});
  ended.promise.catch(() => {});

  return {
    started: started.promise,
    ended: ended.promise,
    abandon() {
      Atomics.store(abandoned, 0, 1);
      shim.native.ubd_wake(spec.config.wakeFd);
    },
  };
}

/** Whether this thread was made by `startQueueThread`. */
export const isQueueThread: boolean = !isMainThread &&
  (workerData as Partial<WorkerData> | null)?.[MARK] === true;

/** Serves the queue this thread was made for, and returns when it is done. */
export function runQueueThread(
  serve: (name: string, spec: unknown, context: ServeContext) => RequestHandler,
): void {
  const { shimPath, config, target, abandoned } = workerData as WorkerData;
  const send = (message: Message) => parentPort!.postMessage(message);
  const said = new Set<string>();
  const log = (text: string) => {
    if (said.has(text)) return;
    said.add(text);
    send({ type: "log", text });
  };
  try {
    const shim = new Shim(shimPath);
    using queue = new Queue(shim, config);
    const context = { depth: config.depth, ioBytesMax: config.ioBytesMax, log };
    const handler = serve(target.name, target.spec, context);
    send({ type: "started", tid: shim.native.ubd_gettid() });
    queue.run(
      handler,
      () => Atomics.load(abandoned, 0) !== 0,
      (error) => log(`target ${target.name} failed: ${(error as Error)?.stack ?? error}`),
    );
  } catch (error) {
    // Crossing threads, an error keeps its message and stack but not its class.
    const details = error instanceof UblkError ? error.details : undefined;
    send({ type: "failed", error: error as Error, details });
  }
}
