// SPDX-License-Identifier: MIT
/**
 * What is known of a device, and how it is printed: for people and scripts that know `ublk`
 * (dumpDevice, the same lines), and as JSON.
 * @module
 */

import { readdirSync, readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { Dialect } from "../abi/dialect.ts";
import { type Control, isUnlisted } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { contents } from "../core/proc.ts";
import { type DeviceState, quiescerOf, readState } from "../core/state.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import type { TargetFacts } from "../core/target.ts";
import { deletedNodes, findUsers } from "../core/users.ts";
import type { Unpacked } from "../abi/struct.ts";
import {
  UBLK_ATTR_FUA,
  UBLK_ATTR_READ_ONLY,
  UBLK_ATTR_ROTATIONAL,
  UBLK_ATTR_VOLATILE_CACHE,
  UBLK_PARAM_TYPE_DISCARD,
  UBLK_PARAM_TYPE_DMA_ALIGN,
  UBLK_PARAM_TYPE_INTEGRITY,
  UBLK_PARAM_TYPE_SEGMENT,
  UBLK_PARAM_TYPE_ZONED,
  type UBLK_PARAMS,
  UBLK_S_DEV_FAIL_IO,
  UBLK_S_DEV_LIVE,
  UBLK_S_DEV_QUIESCED,
} from "../abi/ublk_cmd.ts";
import { forsaken } from "./quiescing.ts";
import { parseCpus } from "./size.ts";

export interface DeviceFacts {
  id: number;
  path: string;
  charPath: string;
  state: string;
  queues: number;
  depth: number;
  blockBytes: number;
  sizeBytes: number;
  readOnly: boolean;
  maxIoBytes: number;
  /** Process that serves it, -1 when there is none. */
  pid: number;
  /** Process that starts the server again when it dies. */
  supervisor?: number;
  flags: string;
  features: string[];
  char: string;
  block: string;
  owner: { uid: number; gid: number };
  /** LIVE to the driver, which holds all requests back: whoever quiesced it has died. */
  forsaken?: boolean;
  /** A process that makes its server let go. */
  quiescing?: number;
  queueThreads: DeviceState["queues"];
  target: TargetFacts;
  /** Of a device that is deleted: who keeps its id taken, as far as it is known. */
  heldBy?: readonly string[];
}

/** Name and bit, in the order in which `ublk list` prints them. */
const FLAGS: readonly (readonly [string, number])[] = [
  ["SUPPORT_ZERO_COPY", 0],
  ["AUTO_ZC", 11],
  ["URING_CMD_COMP_IN_TASK", 1],
  ["NEED_GET_DATA", 2],
  ["UNPRIVILEGED_DEV", 5],
  ["RECOVERY", 3],
  ["RECOVERY_REISSUE", 4],
  ["CMD_IOCTL_ENCODE", 6],
  ["USER_COPY", 7],
  ["ZONED", 8],
  ["RECOVERY_FAIL_IO", 9],
  ["UPDATE_SIZE", 10],
  ["QUIESCE", 12],
  ["PER_IO_DAEMON", 13],
  ["BUF_REG_OFF_DAEMON", 14],
  ["BATCH_IO", 15],
  ["INTEGRITY", 16],
  ["SAFE_STOP_DEV", 17],
  ["NO_AUTO_PART_SCAN", 18],
  ["SHMEM_ZC", 19],
];

/** `ublk features` calls four of them by another name. */
const FEATURE_NAMES: Record<string, string> = {
  SUPPORT_ZERO_COPY: "ZERO_COPY",
  URING_CMD_COMP_IN_TASK: "COMP_IN_TASK",
  NEED_GET_DATA: "GET_DATA",
  RECOVERY: "USER_RECOVERY",
};

const STATES = ["DEAD", "LIVE", "QUIESCED", "FAIL_IO"];

function setBits(bits: bigint): number[] {
  return Array.from({ length: 64 }, (_, bit) => bit).filter((bit) => bits >> BigInt(bit) & 1n);
}

/** Ids of the devices in the driver, in order. */
export function deviceIds(control: Control): number[] {
  const { charClass } = control.dialect;
  const prefix = control.dialect.charName(0).slice(0, -1);
  try {
    const names = readdirSync(`/sys/class/${charClass}`).filter((name) => name.startsWith(prefix));
    return names.map((name) => Number(name.slice(prefix.length))).sort((a, b) => a - b);
  } catch {
    return [];
  }
}

/** As many ids as are looked at for devices that are deleted and still held: /sys has none. */
const DELETED_IDS = 64;

/** Ids that are taken only because somebody holds the device that had them, and who does. */
export async function deletedDevices(
  control: Control,
): Promise<{ id: number; heldBy: readonly string[] }[]> {
  const there = new Set(deviceIds(control));
  const ids = Array.from({ length: DELETED_IDS }, (_, id) => id).filter((id) => !there.has(id));
  const found = [];
  while (ids.length > 0) {
    const some = ids.splice(0, Math.max(control.room, 1)); // Each has a command at a time.
    // Awaited all: none may be on its way when the control device is closed.
    const answers = await Promise.allSettled(some.map((id) => holders(control, id)));
    for (const [nth, answer] of answers.entries()) {
      if (answer.status === "rejected") throw answer.reason;
      if (answer.value) found.push({ id: some[nth]!, heldBy: answer.value });
    }
  }
  return found;
}

/** @returns who holds a device that is deleted; undefined: there is no such one. */
export async function holders(
  control: Control,
  id: number,
): Promise<readonly string[] | undefined> {
  try {
    await control.getDeviceInfo(id);
  } catch (error) {
    if (isNoneOfOurs(error)) return undefined;
    throw error;
  }
  return await holdersOf(control.dialect, id);
}

/** As `holders`, of a device that the driver knows. */
export async function holdersOf(
  dialect: Dialect,
  id: number,
): Promise<readonly string[] | undefined> {
  if (!(await isDeleted(dialect, id))) return undefined;
  return (await findUsers(await deletedNodes(dialect.blockName(id)))).lines;
}

/** Whether the driver knows a device only because somebody still holds it. */
export async function isDeleted(dialect: Dialect, id: number): Promise<boolean> {
  if (!isUnlisted(dialect, id)) return false;
  await sleep(50); // One that is just being added is not there at once.
  return isUnlisted(dialect, id);
}

/** @param users who hold a device that is deleted */
export function whenFree(users: readonly string[]): string {
  const who = users.length > 0 ? users.join("; ") : "somebody who is not to be seen from here";
  return `its id is free when the last one lets go: ${who}`;
}

/** The id of a device that is deleted is still taken. */
export function takenError(
  errno: string,
  operation: string,
  id: number,
  users: readonly string[],
): UblkError {
  const hint = `a device of that id is deleted, but still held; ${whenFree(users)}`;
  return new UblkError({ errno, operation, device: id, hint });
}

/** Another server may be in the middle of adding the device: it has no parameters yet. */
export async function knownParams(control: Control, id: number) {
  if (!control.dialect.hasParams) return undefined;
  try {
    return await control.getParams(id);
  } catch (error) {
    if (error instanceof UblkError && error.errno === "EINVAL") return undefined;
    throw error;
  }
}

/** Of a device whose driver does not tell them, as 6.1's: "0:0" when it is not there. */
function numbers(directory: string): string {
  return contents(`${directory}/dev`).trim() || "0:0";
}

/** @throws {UblkError} ENODEV: no device has this id. */
export async function describeDevice(control: Control, id: number): Promise<DeviceFacts> {
  const info = await control.getDeviceInfo(id);
  const params = await knownParams(control, id);
  const devt = params?.devt;
  const state = readState(id, info.targetFlags);
  // A device that waits for a server keeps the last one's id: it may be another process's by now.
  const waits = info.state === UBLK_S_DEV_QUIESCED || info.state === UBLK_S_DEV_FAIL_IO;
  const pid = waits ? -1 : info.pid;
  const served = state !== undefined && state.pid === pid;
  const known = state !== undefined && (served || waits);
  const quiescer = served && info.state === UBLK_S_DEV_LIVE ? quiescerOf(state) : undefined;
  const sizeBytes = params ? Number(params.basic.dev_sectors) * 512 : info.sizeBytes ?? 0;
  const heldBy = await holdersOf(control.dialect, id);
  return {
    id,
    path: control.dialect.blockPath(id),
    charPath: control.dialect.charPath(id),
    state: STATES[info.state] ?? "UNKNOWN",
    queues: info.queues,
    depth: info.depth,
    blockBytes: params ? 2 ** params.basic.logical_bs_shift : info.blockBytes ?? 0,
    sizeBytes,
    readOnly: params ? (params.basic.attrs & UBLK_ATTR_READ_ONLY) !== 0 : false,
    maxIoBytes: info.maxIoBytes,
    pid,
    flags: `0x${info.flags.toString(16)}`,
    features: FLAGS.filter(([, bit]) => info.flags >> BigInt(bit) & 1n).map(([name]) => name),
    char: devt?.char_major
      ? `${devt.char_major}:${devt.char_minor}`
      : numbers(`/sys/class/${control.dialect.charClass}/${control.dialect.charName(id)}`),
    block: devt?.disk_major
      ? `${devt.disk_major}:${devt.disk_minor}`
      : numbers(`/sys/block/${control.dialect.blockName(id)}`),
    owner: { uid: info.ownerUid, gid: info.ownerGid },
    queueThreads: served
      ? state.queues.map((queue) => ({
        ...queue,
        affinity: allowedCpus(pid, queue.tid) ?? queue.affinity,
      }))
      : [],
    ...(quiescer && (quiescer.alive ? { quiescing: quiescer.pid } : { forsaken: true })),
    ...(served && state.supervisor !== undefined && { supervisor: state.supervisor }),
    // The server is not told of a resize.
    target: known ? { ...state.target, dev_size: sizeBytes } : {},
    ...(heldBy && { heldBy }),
  };
}

/** Where a thread may run now: `ubd set_affinity` and `taskset` change that. */
function allowedCpus(pid: number, tid: number): number[] | undefined {
  try {
    const status = readFileSync(`/proc/${pid}/task/${tid}/status`, "utf8");
    return parseCpus(/^Cpus_allowed_list:\s*(\S+)$/m.exec(status)![1]!);
  } catch {
    return undefined;
  }
}

const ATTRIBUTES: readonly (readonly [number, string])[] = [
  [UBLK_ATTR_READ_ONLY, "read-only"],
  [UBLK_ATTR_ROTATIONAL, "rotational"],
  [UBLK_ATTR_VOLATILE_CACHE, "volatile cache"],
  [UBLK_ATTR_FUA, "FUA"],
];

/** What GET_PARAMS answers, in bytes and words; the parts that the device has. */
export function describeParams({ types, ...params }: Unpacked<typeof UBLK_PARAMS>) {
  const { basic, discard, zoned, dma, seg, integrity } = params;
  const bytes = (shift: number) => 2 ** shift;
  const has = (type: number) => (types & type) !== 0;
  return {
    attributes: ATTRIBUTES.filter(([bit]) => basic.attrs & bit).map(([, name]) => name),
    logicalBlockBytes: bytes(basic.logical_bs_shift),
    physicalBlockBytes: bytes(basic.physical_bs_shift),
    ioMinBytes: bytes(basic.io_min_shift),
    ioOptBytes: bytes(basic.io_opt_shift),
    requestBytesMax: basic.max_sectors * SECTOR_BYTES,
    chunkBytes: basic.chunk_sectors * SECTOR_BYTES,
    ...(has(UBLK_PARAM_TYPE_DISCARD) && {
      discard: {
        granularityBytes: discard.discard_granularity,
        alignmentBytes: discard.discard_alignment,
        discardBytesMax: discard.max_discard_sectors * SECTOR_BYTES,
        writeZeroesBytesMax: discard.max_write_zeroes_sectors * SECTOR_BYTES,
        segmentsMax: discard.max_discard_segments,
      },
    }),
    ...(has(UBLK_PARAM_TYPE_ZONED) && {
      zoned: {
        openZonesMax: zoned.max_open_zones,
        activeZonesMax: zoned.max_active_zones,
        appendBytesMax: zoned.max_zone_append_sectors * SECTOR_BYTES,
      },
    }),
    // The driver's own default, where nothing is asked for.
    memoryAlignBytes: (has(UBLK_PARAM_TYPE_DMA_ALIGN) ? dma.alignment : 3) + 1,
    ...(has(UBLK_PARAM_TYPE_SEGMENT) && {
      segments: {
        max: seg.max_segments,
        bytesMax: seg.max_segment_size,
        boundaryBytes: Number(seg.seg_boundary_mask) + 1,
      },
    }),
    ...(has(UBLK_PARAM_TYPE_INTEGRITY) && {
      integrity: { metadataBytes: integrity.metadata_size, tagBytes: integrity.tag_size },
    }),
  };
}

/** The caller has no business with the device: it is gone, or another user's. */
export function isNoneOfOurs(error: unknown): boolean {
  return error instanceof UblkError && ["ENODEV", "EACCES", "EPERM"].includes(error.errno);
}

/**
 * Several devices; those of others, and one that vanishes meanwhile, are left out.
 *
 * @param onFailure told of one that the driver does not describe: another command may wait there.
 */
export async function describeAll(
  control: Control,
  onFailure = (error: unknown): void => {
    throw error;
  },
): Promise<DeviceFacts[]> {
  const all = [];
  for (const id of deviceIds(control)) {
    try {
      all.push(await describeDevice(control, id));
    } catch (error) {
      if (!isNoneOfOurs(error)) onFailure(error);
    }
  }
  return all;
}

/** The lines of `ublk list`, to the letter. */
export function dumpDevice(facts: DeviceFacts): string {
  const { owner } = facts;
  const flags = facts.features.map((name) => ` ${name}`).join("");
  const lines = [
    `dev id ${facts.id}: nr_hw_queues ${facts.queues} queue_depth ${facts.depth} ` +
    `block size ${facts.blockBytes} dev_capacity ${facts.sizeBytes / 512}`,
    `\tmax rq size ${facts.maxIoBytes} daemon pid ${facts.pid} state ${facts.state}`,
    `\tflags ${facts.flags} [${flags} ]`,
    `\tublkc: ${facts.char} ublkb: ${facts.block} owner: ${owner.uid}:${owner.gid}`,
    ...facts.queueThreads.map(({ qid, tid, affinity }) =>
      `\tqueue ${qid}: tid ${tid} affinity(${affinity.map((cpu) => `${cpu} `).join("")})`
    ),
  ];
  if (facts.forsaken) lines.push(`\t${forsaken(facts.id)}`);
  if (facts.quiescing !== undefined) {
    lines.push(`\tprocess ${facts.quiescing} is quiescing it: new requests wait`);
  }
  if (facts.target.name !== undefined) {
    const sorted = Object.entries({ ...facts.target, type: 0 }).sort(([a], [b]) => a < b ? -1 : 1);
    lines.push(`\ttarget ${JSON.stringify(Object.fromEntries(sorted))}`);
  }
  return `${lines.join("\n")}\n`;
}

/** Names of the driver's features, as `ublk features` spells them. */
export function featureNames(features: bigint): string[] {
  return setBits(features).map((bit) => {
    const name = FLAGS.find(([, known]) => known === bit)?.[0] ?? "unknown";
    return FEATURE_NAMES[name] ?? name;
  });
}

/** The lines of `ublk features`. */
export function dumpFeatures(features: bigint): string {
  const names = featureNames(features);
  const lines = setBits(features).map((bit, index) =>
    `\t${names[index]!.padEnd(20)}: 0x${(1n << BigInt(bit)).toString(16)}\n`
  );
  return `ublk_drv features: 0x${features.toString(16)}\n${lines.join("")}`;
}
