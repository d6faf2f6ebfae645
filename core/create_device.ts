// SPDX-License-Identifier: MIT
/** Serves a target in the program that made it. @module */

import process from "node:process";
import { Control } from "./control.ts";
import {
  type BlockDevice,
  type GivenOptions,
  type NoOptions,
  openDefinition,
  type OptionSpecs,
  parseOptions,
  type Target,
  toDefinition,
} from "./define_target.ts";
import { DEPTH_DEFAULT, Device, QUEUES_DEFAULT } from "./device.ts";
import { harmless } from "./log.ts";
import { openHere } from "./queue_thread.ts";
import type { DeviceStats } from "./stats.ts";
import { printable } from "./text.ts";

/** What `createDevice` may be told. */
export interface CreateDeviceOptions<Specs extends OptionSpecs = OptionSpecs> {
  /** Device id; the driver answers EEXIST when it is taken. Default: the next free one. */
  id?: number;
  /** Hardware queues, 1 (default) to 4096. All are served by the calling thread. */
  queues?: number;
  /** Requests in flight for each queue, 1 to 4096. Default: 128. */
  depth?: number;
  /** Largest READ or WRITE in bytes, a multiple of 4096. Default: 512 KiB. */
  ioBytesMax?: number;
  /** Values of the target's own options, by name. */
  options?: GivenOptions<Specs>;
  /** SIGINT and SIGTERM stop the device, so that none is left behind. Default: true. */
  stopOnSignals?: boolean;
  /** Told what a person should know, such as a handler that threw. Default: console.error. */
  log?: (text: string) => void;
}

/** A device served by this program. */
export interface ServedDevice extends AsyncDisposable {
  /** Its number in the driver. */
  readonly id: number;
  /** The block device, such as "/dev/ublkb0". */
  readonly path: string;
  /**
   * Settles when it is no longer served: resolves after a stop, whoever ordered it; rejects when
   * the ring or the driver refused to go on, which `log` is told too. The device is gone then.
   */
  readonly closed: Promise<void>;
  /** What was answered so far. */
  stats(): DeviceStats;
  /** Answers what is in flight, then deletes the device. Idempotent. */
  stop(): Promise<void>;
}

/**
 * Makes a block device and serves it on this thread's event loop, as root.
 *
 * The program must not wait for its own device without giving the event loop a turn: a
 * `readFileSync(device.path)` would wait for itself.
 *
 * @throws {UsageError} options out of range, or of the target. @throws {UblkError} what the kernel
 * refused: ENOENT without the driver, EACCES without permission. No device is left then.
 *
 * @example
 * ```ts
 * import { createDevice, defineTarget } from "ubd";
 *
 * const zeroes = defineTarget({ size: 1024 ** 3, read() {} });
 * await using device = await createDevice(zeroes);
 * console.log(device.path);
 * ```
 */
export async function createDevice<Specs extends OptionSpecs = NoOptions>(
  target: Target<Specs> | BlockDevice,
  options: CreateDeviceOptions<NoInfer<Specs>> = {},
): Promise<ServedDevice> {
  const { stopOnSignals = true } = options;
  const log = harmless(options.log ?? logToConsole);
  const definition = toDefinition(target, "This");
  const values = parseOptions(definition, options.options ?? {}, process.cwd());
  const control = await Control.open();
  let device: Device;
  try {
    device = await Device.create(control, {
      id: options.id ?? -1,
      queues: options.queues ?? QUEUES_DEFAULT,
      depth: options.depth ?? DEPTH_DEFAULT,
      ioBytesMax: options.ioBytesMax,
      flags: 0n,
      log,
      targetName: "here",
      queueThreadEntry: "",
      target: openHere(await openDefinition(definition, values, undefined, log), control.shim, log),
    });
  } catch (error) {
    control[Symbol.dispose]();
    throw error;
  }

  let stopped: Promise<void> | undefined;
  const stop = () => stopped ??= device.stop().then(() => device.ended);
  const stopOnSignal = () => void stop().catch((error) => log((error as Error).message));
  if (stopOnSignals) { for (const signal of SIGNALS) process.on(signal, stopOnSignal); }
  const closed = device.ended.then(() => {
    device.letGo();
    return stopped ??= Promise.resolve(); // Whoever else stopped it also deletes it.
  }, async (error) => {
    log(`${device.path} is no longer served: ${(error as Error)?.message ?? error}`);
    await (stopped ??= device.stop()).catch((second) => {
      if (second !== error) log((second as Error).message);
    });
    throw error;
  }).finally(() => {
    for (const signal of SIGNALS) process.off(signal, stopOnSignal);
    control[Symbol.dispose]();
  });
  closed.catch(() => {});
  return {
    id: device.info.id,
    path: device.path,
    closed,
    stats: () => device.stats(),
    stop,
    [Symbol.asyncDispose]: stop,
  };
}

const SIGNALS = ["SIGINT", "SIGTERM"] as const;

function logToConsole(text: string): void {
  console.error(printable(text));
}
