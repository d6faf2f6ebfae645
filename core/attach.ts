// SPDX-License-Identifier: MIT
/**
 * Between a device in the driver and those who serve it: the character device is opened, each queue
 * gets a thread, and what fails half-way is undone.
 * @module
 */

import { accessSync, constants, readFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { DeviceInfo, IoCommand } from "../abi/dialect.ts";
import { ERRNO, errnoName } from "../abi/errno.ts";
import {
  UBLK_F_BATCH_IO,
  UBLK_F_NEED_GET_DATA,
  UBLK_F_PER_IO_DAEMON,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_USER_COPY,
} from "../abi/ublk_cmd.ts";
import { checkpoint } from "./checkpoint.ts";
import type { Control } from "./control.ts";
import { zeroCopyOf } from "./data_mode.ts";
import { UblkError } from "./error.ts";
import { gapsOf } from "./gaps.ts";
import { type NodePlace, Nodes, removeStaleNode, S_IFBLK, S_IFCHR } from "./nodes.ts";
import { type Assignment, type QueueThread, startQueueThread, unless } from "./queue_thread.ts";
import type { OpenTarget } from "./target.ts";

/** How long udev may take to make a device's node, give it to its owner and let go of it. */
const NODE_DEADLINE_MS = 10_000;

const O_RDWR = 2;

/** What serving takes, be the device new or taken over. */
export interface RecoverOptions {
  targetName: string;
  target: OpenTarget;
  /** URL of the module whose evaluation in a Worker serves a queue (targets/queue_thread.ts). */
  queueThreadEntry: string;
  log: (text: string) => void;
  /** Ends what waits for the driver or for the target's own code: its reason is thrown. */
  signal?: AbortSignal;
  /** Threads that serve the device's queues, or share those of a queue. Default: one for each. */
  threads?: number | undefined;
}

/** A queue and a thread that serves it, or a share of its tags. */
export interface QueueFacts {
  qid: number;
  /** Kernel id of the thread. */
  tid: number;
  /** CPUs whose I/O the queue gets. */
  affinity: number[];
}

export type Undo = (() => void | Promise<void>)[];

/** Runs `work`; when it throws, what it pushed is done, last first, and the error goes on. */
export async function unwinding<T>(
  log: (text: string) => void,
  work: (undo: Undo) => Promise<T>,
): Promise<T> {
  const undo: Undo = [];
  try {
    return await work(undo);
  } catch (error) {
    for (const step of undo.reverse()) {
      try {
        await step();
      } catch (second) {
        log(`while undoing: ${(second as Error).message}`);
      }
    }
    throw error;
  }
}

export interface Queues {
  threads: QueueThread[];
  facts: QueueFacts[];
  /** Those whose threads do not hear what they are told: see QueueThread. */
  deaf(): number[];
  /** Tells them that somebody stops the device. */
  stopping(): void;
  /**
   * The same, and waits until all have heard it: a STOP_DEV waits in the driver for a request that
   * the target's own code never answers, and no process can end before its own commands do, nor
   * close the character device, which alone would end that request. Without end: only the end of
   * this process helps, and nothing keeps it from that here.
   *
   * A queue that hears this and then begins to spin is not found. To give the command apart
   * (`Control.apart`) is no way out: a forked process has the io descriptors and the rings mapped,
   * and with them the character device open.
   */
  heard(): Promise<void>;
  ended: Promise<void>;
  /** Device nodes that this process has made, since nothing else did. */
  nodes: Nodes;
  /** Awaits a command that needs every queue; a queue that dies meanwhile ends the wait. */
  during(operation: string, command: Promise<void>): Promise<void>;
  /** Closes what the threads used, once they have ended; removes the nodes, unless they stay. */
  release(staying?: boolean): void;
}

/** What one thread has of a queue. */
export type Share = Pick<Assignment, "queueId" | "tags">;

/**
 * What each of so many threads serves, as evenly as it goes: several queues, one, or a share of one's
 * tags. Every `step`-th: tags in use lie together.
 *
 * @param threads up to as many as there are tags.
 */
export function shareOut(queues: number, threads: number): Share[][] {
  const shares = Array.from({ length: threads }, (): Share[] => []);
  for (let queueId = 0; queueId < queues; queueId++) {
    const start = Math.floor(queueId * threads / queues);
    const step = Math.max(Math.floor((queueId + 1) * threads / queues) - start, 1);
    for (let first = 0; first < step; first++) {
      const tags = threads > queues ? { first, step } : undefined;
      shares[start + first]!.push({ queueId, tags });
    }
  }
  return shares;
}

/** The driver may have made fewer queues than it was asked for: then as many threads as it allows. */
export function threadsFor(
  info: Pick<DeviceInfo, "queues" | "depth" | "flags">,
  threads = info.queues,
): number {
  const sharesTags = (info.flags & UBLK_F_PER_IO_DAEMON) !== 0n;
  return Math.min(threads, info.queues * (sharesTags ? info.depth : 1));
}

/** Starts the threads that serve a device, and opens its character device. */
export async function attach(
  control: Control,
  info: DeviceInfo,
  options: RecoverOptions,
  undo: Undo,
  prepare?: () => Promise<void>,
): Promise<Queues> {
  const { dialect, shim } = control;
  const target = { name: options.targetName, spec: options.target.spec };
  // First: a runtime takes longer to start in a thread than all the rest.
  const shares = shareOut(info.queues, threadsFor(info, options.threads));
  const threads = shares.map((_, index) =>
    options.target.startThread?.(index) ??
      startQueueThread(options.queueThreadEntry, target, index, shim, options.log)
  );
  const nodes = new Nodes();
  const fds: number[] = [];
  const release = once((staying = false) => {
    for (const fd of fds) shim.native.ubd_close(fd);
    if (!staying) { for (const kept of nodes.remove()) options.log(kept); }
  });
  undo.push(async () => {
    for (const thread of threads) thread.abandon();
    await Promise.allSettled(threads.map((thread) => thread.ended));
    release();
  });
  const charFd = await openCharDevice(control, info, nodes);
  fds.push(charFd);
  // An unprivileged device takes commands only from who may open it, so not before now.
  await prepare?.();

  const affinities: number[][] = [];
  for (let queueId = 0; queueId < info.queues; queueId++) {
    affinities.push(await control.getQueueAffinity(info.id, queueId));
  }
  const pageBytes = pageSize();
  const zeroCopy = zeroCopyOf(info.flags);
  const inBatches = (info.flags & UBLK_F_BATCH_IO) !== 0n;
  const ioOpcode = (command: IoCommand) => dialect.ioOpcode(command, control.ioctlEncoded);
  const assignment = ({ queueId, tags }: Share): Assignment => {
    const wakeFd = shim.native.ubd_eventfd(0);
    if (wakeFd < 0) throw UblkError.from(wakeFd, "set up a ring", { device: info.id });
    fds.push(wakeFd);
    return {
      cpus: affinities[queueId]!,
      charFd,
      wakeFd,
      queueId,
      depth: info.depth,
      tags,
      ioBytesMax: info.maxIoBytes,
      fetchOpcode: ioOpcode(inBatches ? "FETCH_IO_CMDS" : "FETCH_REQ"),
      commitOpcode: ioOpcode(inBatches ? "COMMIT_IO_CMDS" : "COMMIT_AND_FETCH_REQ"),
      prepOpcode: inBatches ? ioOpcode("PREP_IO_CMDS") : undefined,
      sqe128: dialect.sqe128,
      descriptorOffset: dialect.mmapOffset(queueId, pageBytes),
      descriptorBytes: dialect.mmapBytes(info.depth, pageBytes),
      blockName: dialect.blockName(info.id),
      zeroCopy: zeroCopy && {
        ...zeroCopy,
        fallsBack: Boolean(process.env.UBD_DEBUG_FALLBACK),
        registerOpcode: ioOpcode("REGISTER_IO_BUF"),
        unregisterOpcode: ioOpcode("UNREGISTER_IO_BUF"),
      },
      userCopy: (info.flags & UBLK_F_USER_COPY) !== 0n,
      getDataOpcode: info.flags & UBLK_F_NEED_GET_DATA ? ioOpcode("NEED_GET_DATA") : undefined,
      gaps: gapsOf(dialect, options.target.limits),
    };
  };
  const started = shares.map((own, index) => threads[index]!.serve(...own.map(assignment)));
  const tids = await unless(options.signal, Promise.all(started));
  const facts = shares.flatMap((own, index) =>
    own.map(({ queueId: qid }) => ({ qid, tid: tids[index]!, affinity: affinities[qid]! }))
  );
  checkpoint("queues started");

  const ended = Promise.all(threads.map((thread) => thread.ended)).then(() => {});
  ended.catch(() => {});
  const during = async (operation: string, command: Promise<void>) => {
    const died = ended.then(() => {
      throw new UblkError({ errno: "ENODEV", operation, device: info.id });
    });
    died.catch(() => {});
    await unless(options.signal, Promise.race([command, died]));
  };
  if (!dialect.checksState) {
    await during("FETCH", Promise.all(threads.map((thread) => thread.fetched())).then(() => {}));
  }
  const deaf = () => {
    const theirs = shares.filter((_, index) => !threads[index]!.hears()).flat();
    return [...new Set(theirs.map(({ queueId }) => queueId))];
  };
  const stopping = () => {
    for (const thread of threads) thread.stopping();
  };
  const heard = async () => {
    stopping();
    for (let pauseMs = 0.25; deaf().length > 0; pauseMs = Math.min(pauseMs * 1.5, 25)) {
      await sleep(pauseMs);
    }
  };
  return { threads, facts, deaf, stopping, heard, ended, nodes, during, release };
}

export function once<A extends unknown[]>(work: (...args: A) => void): (...args: A) => void {
  let done = false;
  return (...args) => {
    if (!done) work(...args);
    done = true;
  };
}

/**
 * Opens /dev/ublkcN. It appears after ADD_DEV, by devtmpfs or udev; udev may still hold it open
 * (the driver lets one in) or may not have set its owner yet. Where nobody makes it (an initramfs,
 * a container), root does.
 *
 * @param nodes gets it if this process has made it.
 */
async function openCharDevice(
  control: Control,
  { id, flags }: DeviceInfo,
  nodes: Nodes,
): Promise<number> {
  const { shim } = control;
  const { char } = nodePlaces(control, id);
  const { path, sysfs } = char;
  const retried: number[] = [ERRNO.ENOENT, ERRNO.EACCES, ERRNO.EBUSY, ERRNO.ENXIO];
  removeStaleNode(char);
  const deadline = performance.now() + NODE_DEADLINE_MS;
  for (let pauseMs = 1;; pauseMs = Math.min(pauseMs * 2, 100)) {
    const fd = shim.open(path, O_RDWR);
    if (fd >= 0) return fd;
    if (fd === -ERRNO.ENOENT && pauseMs === 100 && nodes.paths.length === 0) {
      nodes.make(shim, char);
    }
    if (!retried.includes(-fd) || performance.now() > deadline) {
      const late = `in ${NODE_DEADLINE_MS / 1000} s`;
      const hints: Record<string, string> = {
        ENOENT: `it did not appear ${late}: is /dev a devtmpfs, or udevd running? ` +
          `mknod ${path} c MAJOR MINOR, from ${sysfs}`,
        ...(flags & UBLK_F_UNPRIVILEGED_DEV && {
          EACCES: `udev did not give it to you ${late}: sudo ubd udev install, ` +
            `then sudo ubd del ${id}`,
        }),
      };
      throw UblkError.from(fd, `open ${path}`, {
        device: id,
        hint: hints[errnoName(-fd)] ??
          "look for another process that has it open: fuser -v " + path,
      });
    }
    await sleep(pauseMs);
  }
}

/** Waits until udev has given a node to this user; without end it does not. */
export async function accessible(path: string): Promise<void> {
  const deadline = performance.now() + NODE_DEADLINE_MS;
  while (performance.now() < deadline) {
    try {
      return accessSync(path, constants.R_OK | constants.W_OK);
    } catch {
      await sleep(20);
    }
  }
}

/** Where the nodes of a device are, by their names. */
export function nodePlaces(
  { dialect }: Control,
  id: number,
): { char: NodePlace; block: NodePlace } {
  const charSysfs = `/sys/class/${dialect.charClass}/${dialect.charName(id)}/dev`;
  const blockSysfs = `/sys/block/${dialect.blockName(id)}/dev`;
  return {
    char: { path: dialect.charPath(id), type: S_IFCHR, sysfs: charSysfs },
    block: { path: dialect.blockPath(id), type: S_IFBLK, sysfs: blockSysfs },
  };
}

/** The machine's page size in bytes: AT_PAGESZ of the auxiliary vector. */
function pageSize(): number {
  const vector = readFileSync("/proc/self/auxv");
  const AT_PAGESZ = 6n;
  for (let at = 0; at + 16 <= vector.length; at += 16) {
    if (vector.readBigUInt64LE(at) === AT_PAGESZ) return Number(vector.readBigUInt64LE(at + 8));
  }
  return 4096;
}
