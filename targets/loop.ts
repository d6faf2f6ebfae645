// SPDX-License-Identifier: MIT
/**
 * `loop`: a regular file or a block device as the device's contents.
 *
 * Requests become file operations on the queue's ring; nothing waits in TypeScript. Short reads
 * and writes are continued, errors are passed on. Each tag has one operation in flight, and its
 * progress in two arrays made at start.
 *
 * The device is the file's bytes from `offset`, rounded up to a block: of an image whose size is
 * no multiple of it, the last block reads as zeroes behind the end of the file, and writing it
 * lets the file grow. Nothing is cut off.
 *
 * With zero copy the bytes of requests are never here: the zeroes of that last block are read from
 * /dev/zero.
 *
 * FLUSH is fdatasync and FUA is RWF_DSYNC, both durable for direct and buffered I/O. DISCARD
 * punches a hole; WRITE_ZEROES too, or keeps the blocks when asked to (NOUNMAP), and falls back
 * to writing zeroes where the file system can do neither.
 * @module
 */

import { constants, readFileSync, statSync } from "node:fs";
import { ERRNO, errnoName } from "../abi/errno.ts";
import {
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FALLOC_FL_ZERO_RANGE,
  IORING_FSYNC_DATASYNC,
  RWF_DSYNC,
} from "../abi/io_uring.ts";
import {
  OP_NAMES,
  UBLK_IO_F_FUA,
  UBLK_IO_F_NOUNMAP,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../abi/ublk_cmd.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { descriptorPath, holdFile, tryLock } from "../core/file_identity.ts";
import { contents, deviceNumber, namesIn } from "../core/proc.ts";
import type { Queue } from "../core/queue.ts";
import type { OpenContext, RequestHandler, ServeContext, TargetType } from "../core/target.ts";
import { blockNotes, chooseBlock } from "./block_size.ts";
import { type Extent, Layout, type Place } from "./layout.ts";

export interface LoopOptions {
  /** Absolute path of a regular file or block device. */
  file: string;
  readOnly?: boolean;
  /** Go through the page cache even where direct I/O works. */
  buffered?: boolean;
  /** Where the device starts in the file, in bytes. */
  offsetBytes?: number;
  /** Default: up to the end of the file. */
  sizeBytes?: number;
  /** Default: what a partition table is for, else 512 for files, the backing's own for block devices. */
  blockBytes?: number;
  /** Serve even a file that another process has locked, or a device in use. */
  force?: boolean;
}

/** An open file with a part of the device. */
export interface LoopFile extends Extent {
  fd: number;
  path: string;
  /** Where the file's data ended when it was opened; behind it, reads are zeroes. */
  endBytes: number;
}

export interface LoopSpec {
  files: readonly LoopFile[];
  /** 0: the files are one behind the other; else they take turns, with so many bytes each. */
  chunkBytes: number;
  blockBytes: number;
  /** Without FLUSH from the driver, each change is made durable at once. */
  alwaysDurable: boolean;
  /** Descriptor of /dev/zero. */
  zeroFd: number;
}

/** What statx(STATX_DIOALIGN) or a trial read says. */
export interface Backing {
  fd: number;
  path: string;
  isBlockDevice: boolean;
  bytes: number;
  sectorBytes: number;
  direct: boolean;
  note: string | undefined;
  /** What direct I/O asks of memory. */
  memoryAlignBytes: number;
}

const BLKGETSIZE64 = 0x8008_1272;
const BLKSSZGET = 0x1268;
const STATX_DIOALIGN = 0x2000;
/** Into struct loop_info64: device and inode of the backing file come first. */
const LOOP_GET_STATUS64 = 0x4c05;
const LOOP_INFO64_BYTES = 232;

export const loopTarget: TargetType<LoopOptions, LoopSpec> = {
  name: "loop",

  open(options, context) {
    const path = options.file;
    const choice = chooseBlock(
      { ...options, files: [path], chunkBytes: 0, joined: false },
      context,
    );
    const chosen = { ...options, ...(choice.blockBytes && { blockBytes: choice.blockBytes }) };
    const backing = openBacking(chosen, context);
    try {
      const extent = measure(chosen, backing);
      const readOnly = options.readOnly ?? false;
      const discardBytes = readOnly ? 0 : discardUnit(backing, context);
      const zeroFd = openOrThrow(context.shim.open("/dev/zero", constants.O_RDONLY), "/dev/zero");
      return {
        limits: {
          sizeBytes: extent.sizeBytes,
          blockBytes: extent.blockBytes,
          physicalBlockBytes: Math.max(extent.blockBytes, 4096),
          readOnly,
          volatileCache: context.hasVolatileCache && !readOnly,
          discardBytes,
          writeZeroes: discardBytes > 0,
        },
        facts: {
          backing_file: path,
          direct_io: backing.direct ? 1 : 0,
          ...(extent.offsetBytes % 512
            ? { offset_bytes: extent.offsetBytes }
            : { offset: extent.offsetBytes / 512 }),
          read_only: readOnly ? 1 : 0,
        },
        notes: [
          backing.direct ? "direct I/O" : `buffered I/O: ${backing.note}`,
          ...blockNotes(choice, extent.blockBytes),
          ...extent.notes,
        ],
        spec: {
          files: [{
            fd: backing.fd,
            path,
            offsetBytes: extent.offsetBytes,
            sizeBytes: extent.sizeBytes,
            endBytes: Math.min(backing.bytes, extent.offsetBytes + extent.sizeBytes),
          }],
          chunkBytes: 0,
          blockBytes: extent.blockBytes,
          alwaysDurable: !context.hasVolatileCache,
          zeroFd,
        },
        zeroCopy: { memoryAlignBytes: backing.direct ? backing.memoryAlignBytes : 1 },
        close() {
          context.shim.native.ubd_close(zeroFd);
          closeBacking(backing, readOnly, context);
        },
      };
    } catch (error) {
      context.shim.native.ubd_close(backing.fd);
      throw error;
    }
  },

  measure(options, context) {
    // Beside the server, which has the lock, and a block device for itself.
    const backing = openBacking({ ...options, readOnly: true, force: true }, context);
    context.shim.native.ubd_close(backing.fd);
    return measure(options, backing).sizeBytes;
  },

  serve: (spec, context) => new LoopHandler(spec, context),
};

/**
 * Opens a backing and locks it.
 *
 * @throws {UblkError | UsageError} it cannot be one, or is in use. Nothing is open then.
 */
export function openBacking(options: LoopOptions, context: OpenContext): Backing {
  const backing = openUnlocked(options, context);
  try {
    const { path, fd } = backing;
    const { readOnly = false, force } = options;
    if (!force) lockFile({ path, fd, readOnly }, context.shim, ", or add --force if you are sure");
  } catch (error) {
    context.shim.native.ubd_close(backing.fd);
    throw error;
  }
  return backing;
}

/** @throws {UblkError} what was written could not be made durable; it is closed all the same. */
export function closeBacking(
  { fd, path }: Backing,
  readOnly: boolean,
  { shim }: OpenContext,
): void {
  const synced = readOnly ? 0 : shim.native.ubd_fdatasync(fd);
  shim.native.ubd_close(fd);
  if (synced < 0) throw UblkError.from(synced, `sync ${path}`);
}

/** All of it is asked of one file, though its name may come to mean another meanwhile. */
function openUnlocked(options: LoopOptions, context: OpenContext): Backing {
  const path = options.file;
  const { shim } = context;
  const handed = context.held?.(path);
  const holding = handed ?? openOrThrow(holdFile(shim, path), path);
  try {
    return openHeld(holding, options, context);
  } finally {
    if (handed === undefined) shim.native.ubd_close(holding);
  }
}

function openHeld(holding: number, options: LoopOptions, context: OpenContext): Backing {
  const path = options.file;
  const stat = statSync(descriptorPath(holding));
  const isBlockDevice = stat.isBlockDevice();
  if (stat.isDirectory()) {
    throw new UblkError({ errno: "EISDIR", operation: `open ${path}`, hint: "name a file in it" });
  }
  if (!isBlockDevice && !stat.isFile()) {
    throw new UsageError(`Cannot serve ${path}: it is neither a regular file nor a block device`);
  }
  // O_EXCL without O_CREAT: the kernel refuses a block device that is mounted or held.
  const flags = (options.readOnly ? constants.O_RDONLY : constants.O_RDWR) |
    (isBlockDevice && !options.force ? constants.O_EXCL : 0);
  const open = (more: number) => {
    const fd = context.shim.open(descriptorPath(holding), flags | more);
    if (fd < 0 && fd !== -ERRNO.EINVAL) throw openError(path, fd, options);
    return fd;
  };
  if (!options.buffered) {
    const fd = open(constants.O_DIRECT);
    const note = fd < 0
      ? "the file system refuses direct I/O"
      : directObstacle(fd, options, isBlockDevice, context);
    if (note === undefined) return backingOf(fd, path, true, note, context);
    if (fd >= 0) context.shim.native.ubd_close(fd);
    return backingOf(openOrThrow(open(0), path), path, false, note, context);
  }
  const fd = openOrThrow(open(0), path);
  return backingOf(fd, path, false, "as asked", context);
}

function openOrThrow(fd: number, path: string): number {
  if (fd === -ERRNO.ENOENT) {
    const hint = "check the path; truncate -s 1G FILE makes an image";
    throw UblkError.from(fd, `open ${path}`, { hint });
  }
  if (fd < 0) throw UblkError.from(fd, `open ${path}`);
  return fd;
}

function openError(path: string, result: number, options: LoopOptions): UblkError {
  const errno = errnoName(-result);
  const hints: Record<string, string> = {
    EACCES: options.readOnly ? "check its permissions" : "to serve it read-only, add --ro",
    EPERM: "to serve it read-only, add --ro",
    EROFS: "to serve it read-only, add --ro",
    ETXTBSY: "it is being executed",
    EBUSY: "it is mounted or in use; unmount it, or add --force if you are sure",
  };
  const hint = hints[errno];
  return UblkError.from(result, `open ${path}`, hint ? { hint } : {});
}

function backingOf(
  fd: number,
  path: string,
  direct: boolean,
  note: string | undefined,
  context: OpenContext,
): Backing {
  const { native } = context.shim;
  const stat = statSync(descriptorPath(fd));
  const isBlockDevice = stat.isBlockDevice();
  const answer = new BigUint64Array(1);
  const ask = (request: number) => {
    const result = isBlockDevice ? native.ubd_ioctl(fd, request, answer) : 0;
    if (result < 0) throw UblkError.from(result, "read the size of the block device");
    return Number(answer[0]!);
  };
  const bytes = isBlockDevice ? ask(BLKGETSIZE64) : stat.size;
  answer[0] = 0n;
  const sectorBytes = isBlockDevice ? ask(BLKSSZGET) : 512;
  const memoryAlignBytes = Math.max(512, directAlign(fd, context)?.memory ?? 0);
  return { fd, path, isBlockDevice, bytes, sectorBytes, direct, note, memoryAlignBytes };
}

/** What statx says of direct I/O: alignments in bytes, `offset` 0 without it; undefined: nothing. */
function directAlign(
  fd: number,
  { shim }: OpenContext,
): { memory: number; offset: number } | undefined {
  const statx = new Uint8Array(256);
  const view = new DataView(statx.buffer);
  const known = shim.native.ubd_statx(fd, STATX_DIOALIGN, statx) === 0 &&
    (view.getUint32(0, true) & STATX_DIOALIGN) !== 0;
  return known
    ? { memory: view.getUint32(152, true), offset: view.getUint32(156, true) }
    : undefined;
}

/** Why direct I/O cannot serve every block of this device; undefined when it can. */
function directObstacle(
  fd: number,
  options: LoopOptions,
  isBlockDevice: boolean,
  context: OpenContext,
): string | undefined {
  const { native } = context.shim;
  const align = directAlign(fd, context);
  const unit = options.blockBytes ?? (isBlockDevice ? align?.offset ?? 0 : 512);
  const offset = options.offsetBytes ?? 0;
  if (align) {
    const { memory: memoryAlign, offset: offsetAlign } = align;
    if (offsetAlign === 0) return "the file system refuses direct I/O";
    if (memoryAlign > 4096) return `direct I/O needs memory aligned to ${memoryAlign} bytes`;
    if (offsetAlign > unit) {
      return `direct I/O needs blocks of ${offsetAlign} bytes; --block-size ${offsetAlign} has them`;
    }
    if (offset % offsetAlign) return `the offset is no multiple of ${offsetAlign}`;
  }
  if (offset % 512) return "the offset is no multiple of 512";
  // The proof: some file systems know no better, or answer EINVAL only when it is tried.
  const read = native.ubd_probe_read(fd, unit || 512, offset);
  return read < 0 ? `direct I/O of ${unit || 512} bytes fails: ${errnoName(-read)}` : undefined;
}

/**
 * One writer, or many readers. The lock ends with the server, however it ends.
 *
 * @param sure what else can be done, for the message.
 * @throws {UblkError} EBUSY: another has it; or its file system has no locks.
 */
export function lockFile(
  { path, fd, readOnly }: { path: string; fd: number; readOnly: boolean },
  shim: OpenContext["shim"],
  sure = "",
): void {
  const operation = `lock ${path}`;
  const unseen = "its file system has no locks, so a second writer would not be noticed" +
    (sure && "; see that there is none, and add --force");
  if (!tryLock(fd, operation, { shared: readOnly, hint: unseen, shim })) {
    const whose = lockOwners(fd);
    const who = whose.length > 0 ? whose.join(", ") : "another process";
    const hint = `${who} serves or uses it; stop that one${sure}`;
    throw new UblkError({ errno: "EBUSY", operation, hint });
  }
  const taken = readOnly ? undefined : kernelLoopOn(fd, shim);
  if (taken) {
    const hint = `${taken} has it as backing file; losetup -d ${taken}${sure}`;
    throw new UblkError({ errno: "EBUSY", operation, hint });
  }
}

/** Who has locked the file: "process 12 (ubd)". Those of other pid namespaces are not seen. */
function lockOwners(fd: number): string[] {
  const { ino } = statSync(descriptorPath(fd));
  const pids = contents("/proc/locks").split("\n").flatMap((line) => {
    // "1: FLOCK ADVISORY WRITE 12 08:01:345 0 EOF"; the device is not always what stat says.
    const [, kind, , , pid, file = ""] = line.trim().split(/\s+/);
    return kind === "FLOCK" && file.split(":")[2] === `${ino}` ? [Number(pid)] : [];
  });
  return [...new Set(pids)].filter((pid) => pid > 0 && hasOpen(pid, fd)).map((pid) =>
    `process ${pid} (${contents(`/proc/${pid}/comm`).trim()})`
  );
}

function hasOpen(pid: number, fd: number): boolean {
  const own = statSync(descriptorPath(fd));
  return namesIn(`/proc/${pid}/fd`).some((name) => {
    const stat = statSync(`/proc/${pid}/fd/${name}`, { throwIfNoEntry: false });
    return stat?.dev === own.dev && stat.ino === own.ino;
  });
}

/** The kernel's loop driver takes no lock. @returns /dev/loopN on this very file. */
function kernelLoopOn(fd: number, shim: OpenContext["shim"]): string | undefined {
  const { dev, ino } = statSync(descriptorPath(fd));
  return namesIn("/sys/block").filter((name) => /^loop\d+$/.test(name))
    .filter((name) => namesIn(`/sys/block/${name}/loop`).length > 0).map((name) => `/dev/${name}`)
    .find((path) => {
      const loop = shim.open(path, constants.O_RDONLY | constants.O_NONBLOCK);
      if (loop < 0) return false;
      const info = new BigUint64Array(LOOP_INFO64_BYTES / 8);
      const result = shim.native.ubd_ioctl(loop, LOOP_GET_STATUS64, info);
      shim.native.ubd_close(loop);
      return result === 0 && info[0] === BigInt(dev) && info[1] === BigInt(ino);
    });
}

/** Cuts the device out of the backing. @throws {UsageError} an extent that is not there. */
export function measure(options: LoopOptions, backing: Backing) {
  const { file: path, offsetBytes = 0 } = options;
  const blockBytes = options.blockBytes ?? backing.sectorBytes;
  const notes: string[] = [];
  if (backing.bytes === 0) {
    throw new UsageError(
      `Cannot serve ${path}: it is empty (truncate -s 1G ${path} gives it a size)`,
    );
  }
  const available = backing.bytes - offsetBytes;
  if (available <= 0) {
    throw new UsageError(`Offset ${offsetBytes}: ${path} ends at ${backing.bytes} bytes`);
  }
  if (available < 512) {
    throw new UsageError(
      `Cannot serve ${path}: ${available} bytes from offset ${offsetBytes} are less than a sector`,
    );
  }
  const isCut = backing.isBlockDevice && available % blockBytes !== 0;
  if (isCut && options.sizeBytes === undefined && offsetBytes % blockBytes === 0) {
    throw new UsageError(
      `Block size ${blockBytes}: ${path} has ${available} bytes, no multiple of it`,
    );
  }
  // A file need not fill the last block.
  const sizeMax = backing.isBlockDevice
    ? available - available % blockBytes
    : Math.ceil(available / blockBytes) * blockBytes;
  const sizeBytes = options.sizeBytes ?? sizeMax;
  if (sizeBytes > sizeMax) {
    throw new UsageError(
      `Size ${sizeBytes}: ${path} has ${available} bytes from offset ${offsetBytes} ` +
        `(truncate -s ${offsetBytes + sizeBytes} ${path} makes it larger)`,
    );
  }
  if (sizeBytes === 0 || sizeBytes % blockBytes) {
    throw new UsageError(`Size ${sizeBytes}: it must be a multiple of ${blockBytes} bytes`);
  }
  if (sizeBytes > available) {
    notes.push(
      `the last block has ${
        available % blockBytes
      } bytes of the file and reads as zeroes behind them` +
        (options.readOnly ? "" : "; writing it lets the file grow"),
    );
  }
  return { offsetBytes, sizeBytes, blockBytes, notes };
}

/** Smallest hole the backing can punch, in bytes; 0 when it cannot. */
export function discardUnit(backing: Backing, { shim }: OpenContext): number {
  if (backing.isBlockDevice) {
    const directory = `/sys/dev/block/${deviceNumber(statSync(descriptorPath(backing.fd)))}`;
    const limit = (name: string) => {
      for (const queue of [`${directory}/queue`, `${directory}/../queue`]) {
        try {
          return Number(readFileSync(`${queue}/${name}`, "utf8"));
        } catch { /* a partition has its disk's queue */ }
      }
      return 0;
    };
    // fallocate on a block device zeroes with the device's own command, or refuses.
    const able = limit("discard_max_bytes") > 0 && limit("write_zeroes_max_bytes") > 0;
    return able ? Math.max(limit("discard_granularity"), backing.sectorBytes) : 0;
  }
  // A hole behind the end of the file touches no data.
  const behind = Math.ceil(backing.bytes / 4096) * 4096;
  const mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  return shim.native.ubd_fallocate(backing.fd, mode, behind, 4096) === 0 ? 4096 : 0;
}

/** One file operation is all of a READ or WRITE: nothing else is kept of such a request. */
const WHOLE = 0;
/** Several are. */
const PARTS = 1;
/** A request's second half, when it has one. */
const SYNCING = 2;
const ZEROING = 3;
/** The rest of a READ is behind the file's end. */
const FILLING = 4;

/** Unexpected, but the kernel may ask for patience; more than this is an error. */
const RETRIES_MAX = 64;

/** Serves a device that is one file, or several. */
export class LoopHandler implements RequestHandler {
  private readonly spec: LoopSpec;
  private readonly layout: Layout;
  private readonly log: (text: string) => void;
  private readonly ioBytesMax: number;
  private readonly deviceBytes: ServeContext["deviceBytes"];
  /** Bytes that are done: of the request, or of its part on `file` when it carries no data. */
  private readonly done: Float64Array;
  private readonly phase: Uint8Array;
  private readonly retries: Uint8Array;
  /** The file that a request without data is at. */
  private readonly file: Uint32Array;

  constructor(spec: LoopSpec, { depth, ioBytesMax, log, deviceBytes }: ServeContext) {
    this.spec = spec;
    this.layout = new Layout(spec.files, spec.chunkBytes);
    this.log = log;
    this.ioBytesMax = ioBytesMax;
    this.deviceBytes = deviceBytes;
    this.done = new Float64Array(depth);
    this.phase = new Uint8Array(depth);
    this.retries = new Uint8Array(depth);
    this.file = new Uint32Array(depth);
  }

  handle(queue: Queue, tag: number): void {
    // What most requests are, in one piece; `resume` has the other half of it.
    const op = queue.op(tag);
    if (op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE) {
      const bytes = queue.bytes(tag);
      const { file, at, left } = this.layout.locate(queue.offset(tag));
      if (bytes <= left) {
        this.phase[tag] = WHOLE;
        const { fd } = this.spec.files[file]!;
        if (op === UBLK_IO_OP_READ) return queue.read(tag, fd, 0, bytes, at);
        return queue.write(tag, fd, 0, bytes, at, this.isDurable(queue, tag) ? RWF_DSYNC : 0);
      }
    }
    this.divide(tag);
    this.begin(queue, tag);
  }

  /** The request takes more than one operation, or none that moves data. */
  private divide(tag: number): void {
    this.phase[tag] = PARTS;
    this.done[tag] = 0;
    this.retries[tag] = 0;
    this.file[tag] = 0;
  }

  /** Starts the file operation for what is left of the request. */
  private begin(queue: Queue, tag: number): void {
    if (this.phase[tag] === SYNCING) return this.sync(queue, tag);
    if (this.phase[tag] === FILLING) {
      const done = this.done[tag]!;
      return queue.read(tag, this.spec.zeroFd, done, queue.bytes(tag) - done, 0);
    }
    switch (queue.op(tag)) {
      case UBLK_IO_OP_READ: {
        const { file, left, at } = this.place(queue, tag);
        return queue.read(tag, this.spec.files[file]!.fd, this.done[tag]!, left, at);
      }
      case UBLK_IO_OP_WRITE: {
        const { file, left, at } = this.place(queue, tag);
        const { fd } = this.spec.files[file]!;
        const durable = this.isDurable(queue, tag) ? RWF_DSYNC : 0;
        return queue.write(tag, fd, this.done[tag]!, left, at, durable);
      }
      case UBLK_IO_OP_FLUSH:
        return this.sync(queue, tag);
      case UBLK_IO_OP_DISCARD:
      case UBLK_IO_OP_WRITE_ZEROES:
        return this.clear(queue, tag);
      default:
        return queue.commit(tag, -ERRNO.EOPNOTSUPP);
    }
  }

  resume(queue: Queue, tag: number, result: number): void {
    if (this.phase[tag] === WHOLE) {
      if (result === queue.bytes(tag)) return queue.commit(tag, result);
      this.divide(tag);
    }
    this.goOn(queue, tag, result);
  }

  private goOn(queue: Queue, tag: number, result: number): void {
    if (result === -ERRNO.EAGAIN || result === -ERRNO.EINTR) {
      if (this.retries[tag]!++ < RETRIES_MAX) return this.begin(queue, tag);
    }
    if (this.phase[tag] === SYNCING) return this.synced(queue, tag, result);
    if (this.phase[tag] === ZEROING) return this.zeroed(queue, tag, result);
    switch (queue.op(tag)) {
      case UBLK_IO_OP_READ:
        return this.read(queue, tag, result);
      case UBLK_IO_OP_WRITE:
        return this.wrote(queue, tag, result);
      case UBLK_IO_OP_FLUSH:
        return this.synced(queue, tag, result);
      default:
        return this.cleared(queue, tag, result);
    }
  }

  private read(queue: Queue, tag: number, result: number): void {
    if (result < 0) return this.fail(queue, tag, result);
    const done = this.done[tag]! += result;
    const bytes = queue.bytes(tag);
    if (done === bytes) return queue.commit(tag, bytes);
    if (this.phase[tag] !== FILLING && this.isBehindFile(queue.offset(tag) + done)) {
      this.phase[tag] = FILLING;
      return this.begin(queue, tag);
    }
    if (result > 0) return this.begin(queue, tag);
    const { path } = this.spec.files[this.place(queue, tag).file]!;
    this.log(`${path} was cut short while in use: reads behind its new end fail`);
    queue.commit(tag, -ERRNO.EIO);
  }

  /**
   * Whether a read that ends at this offset may have met the end of the file: it lies in the
   * device's last block, which the file need not fill. A resized device has another last block.
   */
  private isBehindFile(offset: number): boolean {
    const { files, blockBytes } = this.spec;
    const { sizeBytes } = this.layout;
    const sizeNow = this.deviceBytes() ?? sizeBytes;
    if (sizeNow !== sizeBytes) return offset > sizeNow - blockBytes;
    const { file, at } = this.layout.locate(offset);
    return at >= files[file]!.endBytes;
  }

  private wrote(queue: Queue, tag: number, result: number): void {
    if (result <= 0) return this.fail(queue, tag, result === 0 ? -ERRNO.EIO : result);
    const done = this.done[tag]! += result;
    const bytes = queue.bytes(tag);
    if (done < bytes) return this.begin(queue, tag);
    queue.commit(tag, bytes);
  }

  /** Where a READ or WRITE goes on, and for how long; valid until the next call. */
  private place(queue: Queue, tag: number): Place {
    const done = this.done[tag]!;
    const place = this.layout.locate(queue.offset(tag) + done);
    place.left = Math.min(place.left, queue.bytes(tag) - done);
    return place;
  }

  /** Frees or zeroes what the request has on each file, one after the other. */
  private clear(queue: Queue, tag: number): void {
    const { files } = this.spec;
    const offset = queue.offset(tag);
    for (; this.file[tag]! < files.length; this.nextFile(tag)) {
      const file = this.file[tag]!;
      const { fd, offsetBytes } = files[file]!;
      const from = this.layout.before(file, offset) + this.done[tag]!;
      const left = this.layout.before(file, offset + queue.bytes(tag)) - from;
      if (left <= 0) continue;
      const at = offsetBytes + from;
      if (this.phase[tag] === ZEROING) {
        return queue.writeZeroes(tag, fd, Math.min(left, this.ioBytesMax), at);
      }
      const keep = queue.op(tag) === UBLK_IO_OP_WRITE_ZEROES &&
        (queue.flags(tag) & UBLK_IO_F_NOUNMAP) !== 0;
      const mode = keep ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE;
      return queue.fallocate(tag, fd, mode | FALLOC_FL_KEEP_SIZE, at, left);
    }
    if (queue.op(tag) === UBLK_IO_OP_DISCARD || !this.isDurable(queue, tag)) {
      return queue.commit(tag, 0);
    }
    this.phase[tag] = SYNCING;
    this.file[tag] = 0;
    this.sync(queue, tag);
  }

  private nextFile(tag: number): void {
    this.file[tag]!++;
    this.done[tag] = 0;
    this.phase[tag] = PARTS;
  }

  private cleared(queue: Queue, tag: number, result: number): void {
    const isHint = queue.op(tag) === UBLK_IO_OP_DISCARD;
    // A hint: a backing that cannot has kept its data, which is allowed.
    if (result >= 0 || isHint && result === -ERRNO.EOPNOTSUPP) {
      this.nextFile(tag);
    } else if (result === -ERRNO.EOPNOTSUPP) {
      this.phase[tag] = ZEROING;
    } else {
      return this.fail(queue, tag, result);
    }
    this.clear(queue, tag);
  }

  private zeroed(queue: Queue, tag: number, result: number): void {
    if (result <= 0) return this.fail(queue, tag, result === 0 ? -ERRNO.EIO : result);
    this.done[tag]! += result;
    this.clear(queue, tag);
  }

  /** Whether what the request writes must be durable before it is answered. */
  private isDurable(queue: Queue, tag: number): boolean {
    return this.spec.alwaysDurable || (queue.flags(tag) & UBLK_IO_F_FUA) !== 0;
  }

  /** Makes everything on a file durable, and then on the next. */
  private sync(queue: Queue, tag: number): void {
    queue.fsync(tag, this.spec.files[this.file[tag]!]!.fd, IORING_FSYNC_DATASYNC);
  }

  private synced(queue: Queue, tag: number, result: number): void {
    if (result < 0) return this.fail(queue, tag, result);
    this.file[tag]!++;
    if (this.file[tag]! < this.spec.files.length) return this.sync(queue, tag);
    queue.commit(tag, 0);
  }

  private fail(queue: Queue, tag: number, result: number): void {
    const moves = queue.op(tag) === UBLK_IO_OP_READ || queue.op(tag) === UBLK_IO_OP_WRITE;
    const file = moves ? this.place(queue, tag).file : this.file[tag]!;
    const op = OP_NAMES.get(queue.op(tag)) ?? queue.op(tag);
    this.log(`${op} on ${this.spec.files[file]!.path} fails: ${errnoName(-result)}`);
    queue.commit(tag, result);
  }
}
