// SPDX-License-Identifier: MIT
/**
 * A device's life: add → open its character device → set params → start queues → start → serve →
 * stop → delete. docs/ARCHITECTURE.md draws it.
 *
 * A `Device` owns its character device's descriptor, its queue threads and its target, and
 * releases them in reverse. A failure half-way undoes what was done, device included.
 *
 * The server owns its device until somebody stops it: whoever issues STOP_DEV also deletes. When
 * that was another process, `ended` settles and this side only lets go.
 * @module
 */

import { constants, existsSync } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { DeviceInfo } from "../abi/dialect.ts";
import {
  FEATURE_NAMES,
  UBLK_F_BATCH_IO,
  UBLK_F_PER_IO_DAEMON,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_S_DEV_DEAD,
  UBLK_S_DEV_LIVE,
} from "../abi/ublk_cmd.ts";
import {
  accessible,
  attach,
  nodePlaces,
  once,
  type QueueFacts,
  type Queues,
  type RecoverOptions,
  unwinding,
} from "./attach.ts";
import { checkpoint } from "./checkpoint.ts";
import { type Control, lackError } from "./control.ts";
import { chooseDataMode, type DataWish, notesOf, zeroCopyOf } from "./data_mode.ts";
import { ignoring, UblkError, UsageError } from "./error.ts";
import { removeStaleNode } from "./nodes.ts";
import { refuseDroppedParams, refuseOtherLimits, toParams } from "./params.ts";
import type { QueueThread } from "./queue_thread.ts";
import { DEVICE_ID_MAX } from "./size.ts";
import { makersMark } from "./state.ts";
import { type DeviceStats, sumStats } from "./stats.ts";
import type { MemoryLimits, OpenTarget } from "./target.ts";
import { charDeviceOpeners } from "./users.ts";

export const QUEUES_DEFAULT = 1;
export const QUEUES_MAX = 4096;
/** Each has a ring of its own, and the shim has places for so many. */
export const THREADS_MAX = 1024;
export const DEPTH_DEFAULT = 128;
export const DEPTH_MAX = 4096;
export const IO_BYTES_DEFAULT = 512 * 1024;
/** Where no tag has a buffer, larger requests cost no memory: what sequential readers like. */
export const IO_BYTES_DEFAULT_ZERO_COPY = 1024 * 1024;
/** The driver addresses a request's buffer with 25 bits. */
export const IO_BYTES_MAX = 32 * 1024 * 1024;
/** Of a queue's buffers. A busy device touches all of it: more is taken for a slip. */
const QUEUE_BUFFER_BYTES_MAX = 4 * 1024 ** 3;

const BLKROSET = 0x125d;

/** How long a server may take over the requests it has, when it is to let go. */
export const QUIESCE_DEADLINE_MS = 60_000;

export interface TakeOverOptions extends RecoverOptions {
  /** Those that its servers before this one have made. */
  nodes?: readonly string[];
  /** Throws when the device is another one by now: called when the driver has let us in. */
  confirm?: (info: DeviceInfo) => void;
}

export interface DeviceOptions extends RecoverOptions, DataWish {
  /** -1: the driver chooses. */
  id: number;
  queues: number;
  /** Requests in flight for each queue, 1 to 4096. */
  depth: number;
  /** Largest READ or WRITE in bytes, a multiple of 4096. Default: as the data's way suggests. */
  ioBytesMax?: number | undefined;
  /** In place of those of the target. */
  memory?: MemoryLimits | undefined;
  /** UBLK_F_*, those of the data's way aside. */
  flags: bigint;
  /** Told as soon as the device exists in the driver. */
  onAdded?: (id: number) => void;
}

export class Device {
  readonly info: DeviceInfo;
  readonly queues: readonly QueueFacts[];
  /** What was decided for this device, one line each: "zero copy: off, as asked". */
  readonly notes: readonly string[];
  /** Device nodes that ubd has made, since nothing else did: the next server's, if one follows. */
  readonly nodes: readonly string[];
  /** Settles when every queue has ended: after a stop, whoever ordered it, or by a failure. */
  readonly ended: Promise<void>;
  readonly #control: Control;
  readonly #threads: readonly QueueThread[];
  readonly #queues: Pick<Queues, "deaf" | "stopping" | "heard">;
  /** Releases the character device and the target. */
  readonly #release: (staying: boolean) => void;

  private constructor(
    control: Control,
    info: DeviceInfo,
    queues: QueueFacts[],
    notes: readonly string[],
    served: Queues,
    release: (staying: boolean) => void,
  ) {
    this.#control = control;
    this.info = info;
    this.queues = queues;
    this.notes = notes;
    this.nodes = served.nodes.paths;
    this.ended = served.ended;
    this.#threads = served.threads;
    this.#queues = served;
    this.#release = once(release);
  }

  get path(): string {
    return this.#control.dialect.blockPath(this.info.id);
  }

  /** What was answered since this server began. */
  stats(): DeviceStats {
    return sumStats(this.#threads.map(({ stats }) => stats));
  }

  /**
   * Adds and starts a device. When this returns it is LIVE.
   *
   * @throws {UsageError} options out of range. @throws {UblkError} what the kernel refused; the
   * device is gone again, and the target closed.
   */
  static create(control: Control, options: DeviceOptions): Promise<Device> {
    return unwinding(options.log, async (undo) => {
      undo.push(() => options.target.close());
      checkOptions(options);
      if (options.depth > control.dialect.depthMax) {
        const { depthMax } = control.dialect;
        throw new UsageError(`Queue depth ${options.depth}: this driver takes up to ${depthMax}`);
      }
      const { zeroCopy } = options.target;
      const limits = { ...options.target.limits, ...options.memory };
      refuseQueues(options.queues, options.target, options.threads);
      const features = (control.features ?? 0n) & control.dialect.flagsMask;
      const mode = chooseDataMode(options, zeroCopy, options.flags, features);
      const sharesTags = (options.threads ?? 1) > options.queues;
      const flags = options.flags | mode.flags | (sharesTags ? UBLK_F_PER_IO_DAEMON : 0n);
      if (flags & UBLK_F_BATCH_IO && options.depth < 2) {
        throw new UsageError("Queue depth 1: the driver wants 2 or more for batches");
      }
      const lacking = flags & ~control.dialect.flagsMask;
      if (lacking) throw lackError(lacking, "ADD_DEV", undefined, control.dialect);
      const ioBytesMax = options.ioBytesMax ??
        (zeroCopyOf(flags) ? IO_BYTES_DEFAULT_ZERO_COPY : IO_BYTES_DEFAULT);
      if (!zeroCopyOf(flags)) checkBuffers(options.depth, ioBytesMax);
      toParams(limits, ioBytesMax); // Refuse bad limits before there is a device.

      const info = await control.addDevice({
        id: options.id,
        queues: options.queues,
        depth: options.depth,
        maxIoBytes: ioBytesMax,
        flags,
        targetFlags: makersMark(process.pid),
        blockSize: limits.blockBytes,
        sizeBytes: limits.sizeBytes,
      });
      undo.push(() => control.deleteDevice(info.id));
      options.onAdded?.(info.id);
      refuseLackingFeatures(flags & ~info.flags);
      checkpoint("added");
      const queues = await attach(control, info, options, undo, async () => {
        if (!control.dialect.hasParams) return;
        const align = zeroCopyOf(mode.flags) && zeroCopy && "memoryAlignBytes" in zeroCopy
          ? zeroCopy.memoryAlignBytes
          : undefined;
        const params = toParams(limits, info.maxIoBytes, align);
        await control.setParams(info.id, params);
        refuseDroppedParams(params.types!, (await control.getParams(info.id)).types, info.id);
      });
      undo.push(async () => {
        await queues.heard();
        await control.stopDevice(info.id);
      });
      await queues.during("START_DEV", control.startDevice(info.id, process.pid));
      checkpoint("started");
      return await Device.#live(control, info.id, queues, mode.notes, options);
    });
  }

  /**
   * Takes over a device whose server is gone and which was added for recovery. When this returns
   * it is LIVE again; on failure it stays as it was.
   *
   * @throws {UblkError} EBUSY: its server still lives, or lets go too slowly; EINVAL: it was not
   * added for recovery.
   */
  static recover(control: Control, id: number, options: TakeOverOptions): Promise<Device> {
    return unwinding(options.log, async (undo) => {
      undo.push(() => options.target.close());
      const goOn = () => options.signal?.throwIfAborted();
      const { anew } = await control.startUserRecovery(id, goOn);
      if (!anew && (await charDeviceOpeners(control.dialect, id)).length > 0) {
        const hint = "another server is taking it over: see ubd list";
        throw new UblkError({ errno: "EBUSY", operation: "recover", device: id, hint });
      }
      goOn();
      const info = await control.getDeviceInfo(id);
      options.confirm?.(info);
      checkpoint("recovery started");
      const { basic } = await control.getParams(id);
      refuseOtherLimits(id, basic, options.target.limits);
      refuseQueues(info.queues, options.target, options.threads);
      const offer = options.target.zeroCopy;
      if (zeroCopyOf(info.flags) && (!offer || "obstacle" in offer)) {
        throw new UsageError(
          `Device ${id} has zero copy, and its target can no longer do it` +
            (offer ? `: ${offer.obstacle}` : ""),
        );
      }
      const notes = notesOf(info.flags, offer);
      const queues = await attach(control, info, options, undo).catch((error) => {
        if (anew || (error as UblkError).errno !== "EINVAL") throw error;
        // The driver knows the address space of the server that died, and lets no other in.
        const hint = "a server died while it took the device over, and this driver lets no other " +
          "begin: ubd del --force -n ID";
        throw new UblkError({ errno: "EINVAL", operation: "recover", device: id, hint });
      });
      await queues.during("END_USER_RECOVERY", control.endUserRecovery(id, process.pid));
      checkpoint("recovered");
      const { char, block } = nodePlaces(control, id);
      for (const path of queues.nodes.adopt(options.nodes ?? [], [char, block])) {
        options.log(
          `${path} stays: the state file of device ${id} has it, but it is none of its nodes`,
        );
      }
      return await Device.#live(control, id, queues, notes, options);
    });
  }

  /**
   * Makes the server of a device that was added for recovery let go: it finishes what it has, new
   * requests wait (or fail, if that is the device's mode), and the device is ready to be recovered.
   *
   * One QUIESCE_DEV cancels idle tags only; a tag that carries a request fetches again after it,
   * and the server would wait there for ever. So it is repeated until the server is gone.
   *
   * @throws {UblkError} ETIMEDOUT: new requests wait until this is tried again, or the device is
   * deleted.
   */
  static async quiesce(control: Control, id: number): Promise<void> {
    const deadline = performance.now() + QUIESCE_DEADLINE_MS;
    for (;;) {
      const { state } = await control.getDeviceInfo(id);
      if (state === UBLK_S_DEV_DEAD) {
        const hint = "it is not LIVE: see ubd list";
        throw new UblkError({ errno: "EINVAL", operation: "QUIESCE_DEV", device: id, hint });
      }
      if (state !== UBLK_S_DEV_LIVE) return;
      if (performance.now() > deadline) {
        const hint = "its server still has requests; requests since then wait: do it again, or " +
          "ubd del --force";
        throw new UblkError({ errno: "ETIMEDOUT", operation: "QUIESCE_DEV", device: id, hint });
      }
      await ignoring(["EBUSY", "EINTR"], control.quiesceDevice(id, 1000));
      checkpoint("quiescing");
      await sleep(20);
    }
  }

  static async #live(
    control: Control,
    id: number,
    queues: Queues,
    notes: readonly string[],
    options: RecoverOptions,
  ): Promise<Device> {
    const { block } = nodePlaces(control, id);
    removeStaleNode(block);
    if (!existsSync(block.path)) queues.nodes.make(control.shim, block);
    if (control.isUnprivileged(id)) await accessible(block.path);
    if (!control.dialect.hasParams && options.target.limits.readOnly) {
      await setReadOnly(control, block.path);
    }
    const info = await control.getDeviceInfo(id); // The kernel changes flags silently.
    return new Device(control, info, queues.facts, notes, queues, (staying) => {
      // The target first: whoever waits for the character device then finds everything durable.
      try {
        options.target.close();
      } catch (error) {
        options.log((error as Error).message);
      }
      queues.release(staying);
    });
  }

  /** Tells the target that somebody stops the device: requests that wait for something end. */
  stopping(): void {
    this.#queues.stopping();
  }

  /** Queues whose threads have not heard of that: the target's own code keeps them. */
  get deaf(): number[] {
    return this.#queues.deaf();
  }

  /**
   * Stops, drains and deletes. I/O in flight is answered first. Idempotent on the driver's side.
   * What a queue has failed with, `ended` tells. While a queue is `deaf`, nothing is asked of the
   * driver, so that this process can end.
   */
  async stop(): Promise<void> {
    await this.#queues.heard();
    await ignoring(["ENODEV"], this.#control.stopDevice(this.info.id));
    await Promise.allSettled(this.#threads.map((thread) => thread.ended));
    this.letGo();
    await ignoring(["ENODEV"], this.#control.deleteDevice(this.info.id));
  }

  /** After `ended`, before `letGo`: true when it was quiesced, false when it was stopped. */
  async isQuiesced(): Promise<boolean> {
    try {
      const { state } = await this.#control.getDeviceInfo(this.info.id);
      return state !== UBLK_S_DEV_DEAD;
    } catch (error) {
      if (error instanceof UblkError && error.errno === "ENODEV") return false;
      throw error;
    }
  }

  /**
   * Lets go of device and target after `ended`, so that whoever stopped it can delete it.
   *
   * @param staying it was quiesced: its nodes stay, too.
   */
  letGo(staying = false): void {
    this.#release(staying);
  }
}

/** As SET_PARAMS does it, where there is none: also root cannot write then. */
async function setReadOnly(control: Control, blockPath: string): Promise<void> {
  const { native } = control.shim;
  const fd = await control.openFile(blockPath, constants.O_RDONLY);
  const result = native.ubd_ioctl(fd, BLKROSET, new Int32Array([1, 0]));
  native.ubd_close(fd);
  if (result < 0) throw UblkError.from(result, `make ${blockPath} read-only`);
}

/** The driver drops flags it does not know, silently: a device must not promise less than asked. */
function refuseLackingFeatures(lacking: bigint): void {
  if (lacking & UBLK_F_UNPRIVILEGED_DEV) {
    throw new UsageError("Who has CAP_SYS_ADMIN gets no unprivileged device: be another user");
  }
  if ([...FEATURE_NAMES.keys()].some((bit) => bit & lacking)) throw lackError(lacking, "ADD_DEV");
}

/** @throws {UsageError} naming the option, its range and its value. */
export function checkOptions(
  options: Pick<DeviceOptions, "id" | "queues" | "depth" | "ioBytesMax" | "threads" | "batch">,
) {
  const within = (name: string, value: number, min: number, max: number) => {
    if (!Number.isInteger(value) || value < min || value > max) {
      throw new UsageError(`${name} ${value}: it must be from ${min} to ${max}`);
    }
  };
  within("Device id", options.id, -1, DEVICE_ID_MAX);
  within("Number of queues", options.queues, 1, QUEUES_MAX);
  within("Queue depth", options.depth, 1, DEPTH_MAX);
  const { queues, depth, threads = 1, batch } = options;
  within("Number of threads", threads, 1, Math.min(queues * depth, THREADS_MAX));
  if (batch && threads > queues) {
    throw new UsageError(`Number of threads ${threads}: with batches, a queue has one thread`);
  }
  const { ioBytesMax = IO_BYTES_DEFAULT } = options;
  within("Largest I/O in bytes", ioBytesMax, 4096, IO_BYTES_MAX);
  if (ioBytesMax % 4096) {
    throw new UsageError(`Largest I/O ${ioBytesMax}: it must be a multiple of 4096 bytes`);
  }
}

/** @throws {UsageError} the target cannot be served by so many. */
export function refuseQueues(
  queues: number,
  { queuesMax = QUEUES_MAX }: Pick<OpenTarget, "queuesMax">,
  threads = queues,
): void {
  const most = Math.max(queues, threads);
  if (most <= queuesMax) return;
  const what = most > queues ? "threads" : "queues";
  throw new UsageError(`Number of ${what} ${most}: this target can be served by ${queuesMax}`);
}

/** For a device that copies. @throws {UsageError} one queue's buffers would take too much. */
export function checkBuffers(depth: number, ioBytesMax: number): void {
  if (depth * ioBytesMax > QUEUE_BUFFER_BYTES_MAX) {
    throw new UsageError(
      `Queue depth ${depth} with ${ioBytesMax} bytes each: the buffers of a ` +
        `queue may take ${QUEUE_BUFFER_BYTES_MAX} bytes; lower one of the two`,
    );
  }
}
