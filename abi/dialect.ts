// SPDX-License-Identifier: MIT
/**
 * What differs between the mainline ublk driver and the V2 ubd driver, as data and conversions.
 *
 * Owns the two `Dialect` values. core/ holds one of them and asks it; no other code branches on
 * which driver it talks to. The two share the 24-byte io descriptor, the 16-byte io command and
 * the numbers of the commands both have; the control command has the same 32 bytes, where V2's
 * `data[1]` covers mainline's path length and reserved fields (zero in both uses).
 *
 * Assumes: mainline Linux 6.0 to 7.2 and the V2 patch (see abi/ublk_cmd.ts, abi/ubd_v2.ts).
 */
import { pack, unpack } from "./struct.ts";
import * as ubd from "./ubd_v2.ts";
import * as ublk from "./ublk_cmd.ts";

export type ControlCommand = keyof typeof ublk.COMMANDS;
export type IoCommand = keyof typeof ublk.IO_COMMANDS | "COMMIT_REQ";

/** A device as the driver reports it. */
export interface DeviceInfo {
  id: number;
  queues: number;
  depth: number; // requests of each queue
  state: number; // a key of STATE_NAMES
  maxIoBytes: number;
  pid: number; // of the server; -1 or 0: none, or not visible from this pid namespace
  flags: bigint; // UBLK_F_*
  targetFlags: bigint; // kept for the server, unread by the driver; 0 in V2
  ownerUid: number; // 0 in V2
  ownerGid: number;
  blockBytes?: number; // V2 only; mainline answers them to GET_PARAMS
  sizeBytes?: number;
}

/** What ADD_DEV needs. */
export interface DeviceSpecAbi {
  id: number; // -1: the driver chooses
  queues: number;
  depth: number;
  maxIoBytes: number; // the driver rounds down to pages: read the info back
  flags?: bigint | undefined; // within the dialect's flagsMask
  targetFlags?: bigint | undefined; // mainline only
  blockSize: number; // bytes; in V2 part of ADD_DEV, in mainline of SET_PARAMS
  sizeBytes: bigint | number; // the same; a multiple of blockSize
}

export interface Dialect {
  readonly name: "ublk" | "ubd-v2";
  /** The kernel module. */
  readonly driver: "ublk_drv" | "ubd_drv";
  readonly controlPath: string;
  /** Name of the character devices' class under /sys/class. */
  readonly charClass: "ublk-char" | "ubd-char";
  /** Queue rings need 128-byte SQEs. Rings for control commands always do. */
  readonly sqe128: boolean;
  /** SET_PARAMS and GET_PARAMS exist. */
  readonly hasParams: boolean;
  /** The driver can be told of a volatile cache, and so asks for FLUSH and FUA. */
  readonly hasVolatileCache: boolean;
  /** A READ or WRITE that is answered with less than all of it: the driver asks for the rest. */
  readonly asksForRest: boolean;
  /**
   * The driver itself refuses what a device is in no state for. Else the kernel may crash: by
   * START_DEV or DEL_DEV of a device whose tags were never all fetched, and by any command for one
   * that is deleted and still open.
   */
  readonly checksState: boolean;
  /** An ioctl-encoded form of the opcodes exists (in mainline since 6.4). */
  readonly hasIoctlEncoding: boolean;
  /** Device flags that mean something to the driver. */
  readonly flagsMask: bigint;
  /** Deepest queue that is safe to ask for. */
  readonly depthMax: number;
  /** Bytes of the info struct. */
  readonly infoSize: number;
  charName(id: number): string;
  charPath(id: number): string;
  blockName(id: number): string;
  blockPath(id: number): string;
  /** @throws {RangeError} a value that the driver's struct cannot hold. */
  packInfo(spec: DeviceSpecAbi): Uint8Array<ArrayBuffer>;
  /** @throws {RangeError} fewer than `infoSize` bytes. */
  unpackInfo(bytes: Uint8Array): DeviceInfo;
  /** @param ioctl whether in the encoded form, as of `controlOpcode`. Default: in any. */
  hasCommand(command: ControlCommand | IoCommand, ioctl?: boolean): boolean;
  /**
   * Opcode of a control command. `ioctl` asks for the encoded form, where the dialect has one.
   *
   * @throws {RangeError} the dialect, or its legacy form, lacks the command.
   */
  controlOpcode(command: ControlCommand, ioctl: boolean): number;
  /** Opcode of an io command; as `controlOpcode`. */
  ioOpcode(command: IoCommand, ioctl: boolean): number;
  /** File offset of a queue's descriptors in /dev/…cN. */
  mmapOffset(queueId: number, pageSize: number): number;
  /** Bytes to map there: exactly these, or the driver answers EINVAL. Map read-only and shared. */
  mmapBytes(depth: number, pageSize: number): number;
}

interface Opcodes {
  readonly encoded?: number;
  readonly legacy?: number;
}

/** `dev_id` of ADD_DEV, in the command and in the info, that lets the driver choose. */
export const DEV_ID_AUTO = 0xffff_ffff;
/** `queue_id` of every control command: none is for one queue (GET_QUEUE_AFFINITY has data[0]). */
export const QUEUE_ID_NONE = 0xffff;
const DEV_ID_MAX = 0x7fff_ffff; // the drivers read it as an int

function roundUp(value: number, step: number): number {
  return Math.ceil(value / step) * step;
}

function devId(id: number): number {
  if (!Number.isInteger(id) || id < -1 || id > DEV_ID_MAX) {
    throw new RangeError(`Cannot pack the device id: ${id} is not in -1..${DEV_ID_MAX}`);
  }
  return id === -1 ? DEV_ID_AUTO : id;
}

function checkFlags(dialect: Dialect, flags: bigint): bigint {
  const unknown = flags & ~dialect.flagsMask;
  if (unknown !== 0n) {
    throw new RangeError(
      `Cannot pack the device flags: ${dialect.name} has no 0x${unknown.toString(16)}`,
    );
  }
  return flags;
}

type OpcodeTable = Readonly<Record<string, Opcodes>>;

function findOpcode(
  dialect: Dialect,
  table: OpcodeTable,
  command: string,
  ioctl: boolean,
): number | undefined {
  const entry = Object.hasOwn(table, command) ? table[command] : undefined;
  return ioctl && dialect.hasIoctlEncoding ? entry?.encoded : entry?.legacy;
}

function opcode(dialect: Dialect, table: OpcodeTable, command: string, ioctl: boolean): number {
  const number = findOpcode(dialect, table, command, ioctl);
  if (number === undefined) {
    const form = dialect.hasIoctlEncoding && !ioctl ? " in legacy form" : "";
    throw new RangeError(`Cannot encode ${command}: ${dialect.name} has no such command${form}`);
  }
  return number;
}

function hasCommand(dialect: Dialect, table: OpcodeTable, command: string, ioctl?: boolean) {
  if (ioctl === undefined) return Object.hasOwn(table, command);
  return findOpcode(dialect, table, command, ioctl) !== undefined;
}

const UBLK_COMMANDS: OpcodeTable = { ...ublk.COMMANDS, ...ublk.IO_COMMANDS };

/** The driver of mainline Linux, 6.0 and later. */
export const UBLK: Dialect = {
  name: "ublk",
  driver: "ublk_drv",
  controlPath: "/dev/ublk-control",
  charClass: "ublk-char",
  sqe128: false,
  hasParams: true,
  hasVolatileCache: true,
  asksForRest: true,
  checksState: true,
  hasIoctlEncoding: true,
  flagsMask: 0xffff_ffff_ffff_ffffn,
  depthMax: ublk.UBLK_MAX_QUEUE_DEPTH,
  infoSize: ublk.UBLKSRV_CTRL_DEV_INFO.size,
  charName: (id) => `ublkc${id}`,
  charPath: (id) => `/dev/ublkc${id}`,
  blockName: (id) => `ublkb${id}`,
  blockPath: (id) => `/dev/ublkb${id}`,
  packInfo: (spec) =>
    pack(ublk.UBLKSRV_CTRL_DEV_INFO, {
      nr_hw_queues: spec.queues,
      queue_depth: spec.depth,
      max_io_buf_bytes: spec.maxIoBytes,
      dev_id: devId(spec.id),
      flags: spec.flags ?? 0n,
      ublksrv_flags: spec.targetFlags ?? 0n,
    }),
  unpackInfo: (bytes) => {
    const info = unpack(ublk.UBLKSRV_CTRL_DEV_INFO, bytes);
    return {
      id: info.dev_id,
      queues: info.nr_hw_queues,
      depth: info.queue_depth,
      state: info.state,
      maxIoBytes: info.max_io_buf_bytes,
      pid: info.ublksrv_pid,
      flags: info.flags,
      targetFlags: info.ublksrv_flags,
      ownerUid: info.owner_uid,
      ownerGid: info.owner_gid,
    };
  },
  hasCommand: (command, ioctl) => hasCommand(UBLK, UBLK_COMMANDS, command, ioctl),
  controlOpcode: (command, ioctl) => opcode(UBLK, ublk.COMMANDS, command, ioctl),
  ioOpcode: (command, ioctl) => opcode(UBLK, ublk.IO_COMMANDS, command, ioctl),
  // Kernels without d369735e02ef (November 2024) do not round: it matters with 64 KiB pages only.
  mmapOffset: (queueId, pageSize) =>
    ublk.UBLKSRV_CMD_BUF_OFFSET +
    queueId * roundUp(ublk.UBLK_MAX_QUEUE_DEPTH * ublk.UBLKSRV_IO_DESC.size, pageSize),
  mmapBytes: (depth, pageSize) => roundUp(depth * ublk.UBLKSRV_IO_DESC.size, pageSize),
};

const V2_COMMANDS: Readonly<Partial<Record<ControlCommand, Opcodes>>> = {
  GET_QUEUE_AFFINITY: { legacy: ubd.UBD_CMD_GET_QUEUE_AFFINITY },
  GET_DEV_INFO: { legacy: ubd.UBD_CMD_GET_DEV_INFO },
  ADD_DEV: { legacy: ubd.UBD_CMD_ADD_DEV },
  DEL_DEV: { legacy: ubd.UBD_CMD_DEL_DEV },
  START_DEV: { legacy: ubd.UBD_CMD_START_DEV },
  STOP_DEV: { legacy: ubd.UBD_CMD_STOP_DEV },
};

const V2_IO_COMMANDS: Readonly<Partial<Record<IoCommand, Opcodes>>> = {
  FETCH_REQ: { legacy: ubd.UBD_IO_FETCH_REQ },
  COMMIT_AND_FETCH_REQ: { legacy: ubd.UBD_IO_COMMIT_AND_FETCH_REQ },
  COMMIT_REQ: { legacy: ubd.UBD_IO_COMMIT_REQ },
};

const V2_ALL_COMMANDS = { ...V2_COMMANDS, ...V2_IO_COMMANDS } as OpcodeTable;

/** The driver of the V2 patch, where it is loaded. */
export const UBD_V2: Dialect = {
  name: "ubd-v2",
  driver: "ubd_drv",
  controlPath: "/dev/ubd-control",
  charClass: "ubd-char",
  sqe128: true,
  hasParams: false,
  hasVolatileCache: false,
  asksForRest: false,
  checksState: false,
  hasIoctlEncoding: false,
  flagsMask: 0n, // The header has UBD_F_SUPPORT_ZERO_COPY, and the driver clears it.
  // The header says 4096, but the driver keeps a queue's bytes (about 100, and 24 for each tag) in
  // 16 bits, and finds queue 1 in the middle of queue 0 when that overflows.
  depthMax: 2048,
  infoSize: ubd.UBDSRV_CTRL_DEV_INFO.size,
  charName: (id) => `ubdc${id}`,
  charPath: (id) => `/dev/ubdc${id}`,
  blockName: (id) => `ubdb${id}`,
  blockPath: (id) => `/dev/ubdb${id}`,
  packInfo: packV2Info,
  unpackInfo: (bytes) => {
    const info = unpack(ubd.UBDSRV_CTRL_DEV_INFO, bytes);
    return {
      id: info.dev_id,
      queues: info.nr_hw_queues,
      depth: info.queue_depth,
      state: info.state, // DEAD and LIVE have mainline's numbers
      maxIoBytes: info.rq_max_blocks * info.block_size,
      pid: info.ubdsrv_pid,
      flags: info.flags[0] ?? 0n,
      targetFlags: 0n,
      ownerUid: 0,
      ownerGid: 0,
      blockBytes: info.block_size,
      sizeBytes: Number(info.dev_blocks) * info.block_size,
    };
  },
  hasCommand: (command, ioctl) => hasCommand(UBD_V2, V2_ALL_COMMANDS, command, ioctl),
  controlOpcode: (command, ioctl) => opcode(UBD_V2, V2_COMMANDS, command, ioctl),
  ioOpcode: (command, ioctl) => opcode(UBD_V2, V2_IO_COMMANDS, command, ioctl),
  // This driver divides by the unrounded size, so the next page boundary belongs to the queue.
  mmapOffset: (queueId, pageSize) =>
    ubd.UBDSRV_CMD_BUF_OFFSET +
    roundUp(queueId * ubd.UBD_MAX_QUEUE_DEPTH * ubd.UBDSRV_IO_DESC.size, pageSize),
  mmapBytes: (depth, pageSize) => roundUp(depth * ubd.UBDSRV_IO_DESC.size, pageSize),
};

function packV2Info(spec: DeviceSpecAbi): Uint8Array<ArrayBuffer> {
  const { blockSize } = spec;
  // The driver takes ilog2 of it unchecked: anything but a power of two would be another size.
  if (!Number.isInteger(Math.log2(blockSize)) || blockSize < 512) {
    throw new RangeError(`Cannot pack the block size: ${blockSize} is no power of 2 from 512`);
  }
  const sizeBytes = BigInt(spec.sizeBytes);
  if (sizeBytes % BigInt(blockSize) !== 0n) {
    throw new RangeError(
      `Cannot pack the device size: ${sizeBytes} bytes are no whole blocks of ${blockSize}`,
    );
  }
  return pack(ubd.UBDSRV_CTRL_DEV_INFO, {
    nr_hw_queues: spec.queues,
    queue_depth: spec.depth,
    block_size: blockSize,
    rq_max_blocks: Math.floor(spec.maxIoBytes / blockSize),
    dev_id: devId(spec.id),
    dev_blocks: sizeBytes / BigInt(blockSize),
    flags: [checkFlags(UBD_V2, spec.flags ?? 0n)],
  });
}

/**
 * The dialect of this machine: V2 only when its control device is the one that is there.
 *
 * @param exists whether a path is there, such as `node:fs`'s `existsSync`.
 */
export function chooseDialect(exists: (path: string) => boolean): Dialect {
  return exists(UBD_V2.controlPath) && !exists(UBLK.controlPath) ? UBD_V2 : UBLK;
}
