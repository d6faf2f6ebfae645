// SPDX-License-Identifier: MIT
/**
 * A regular file or block device that a target keeps its data in: how it is opened and locked, and
 * what it can do.
 * @module
 */

import { constants, readFileSync, statSync } from "node:fs";
import { ERRNO, errnoName } from "../abi/errno.ts";
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE } from "../abi/io_uring.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { descriptorPath, holdFile, tryLock } from "../core/file_identity.ts";
import { contents, deviceNumber, namesIn } from "../core/proc.ts";
import type { OpenContext } from "../core/target.ts";

export interface BackingOptions {
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

/**
 * Opens a backing and locks it.
 *
 * @throws {UblkError | UsageError} it cannot be one, or is in use. Nothing is open then.
 */
export function openBacking(options: BackingOptions, context: OpenContext): Backing {
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
function openUnlocked(options: BackingOptions, context: OpenContext): Backing {
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

function openHeld(holding: number, options: BackingOptions, context: OpenContext): Backing {
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

function openError(path: string, result: number, options: BackingOptions): UblkError {
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
  options: BackingOptions,
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
export function measure(options: BackingOptions, backing: Backing) {
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
