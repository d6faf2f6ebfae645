// SPDX-License-Identifier: MIT
/**
 * Which file it is, whatever it is called: a name may mean another file by now. And whose it is
 * for the moment.
 * @module
 */

import { constants } from "node:fs";
import { ERRNO } from "../abi/errno.ts";
import { Shim } from "../ffi/mod.ts";
import { UblkError } from "./error.ts";
import { contents } from "./proc.ts";

/** Plain JSON. What is not known is left out. */
export interface FileIdentity {
  /** "8:1": the device of its file system; of a block device, its own. */
  device: string;
  inode?: string;
  /** When the inode was made, in nanoseconds since 1970. */
  born?: string;
  /** Which file it is of those that have had this inode, one after the other. */
  generation?: number;
  /** Which disk it is of those that have had this number. */
  diskSequence?: string;
}

const O_PATH = 0o10000000;
const STATX_BASIC_STATS = 0x7ff;
const STATX_BTIME = 0x800;
const S_IFMT = 0o170000;
const S_IFBLK = 0o060000;
const S_IFREG = 0o100000;
const LOCK_SH = 1;
const LOCK_EX = 2;
const LOCK_NB = 4;
const LOCK_UN = 8;
const NO_LOCKS = "its file system may have no locks: name a file on another one";
const FS_IOC_GETVERSION = 0x8008_7601;

/** Names what a descriptor is, so that a path leads there: to open it with other flags. */
export function descriptorPath(fd: number): string {
  return `/proc/self/fd/${fd}`;
}

/** Holds a file without opening it. @returns a descriptor, or -errno. */
export function holdFile(shim: Shim, path: string): number {
  return shim.open(path, O_PATH);
}

/** @param fd may be one that only holds the file. @throws {UblkError} the kernel cannot tell. */
export function identify(shim: Shim, fd: number): FileIdentity {
  const statx = new DataView(new ArrayBuffer(256));
  const bytes = new Uint8Array(statx.buffer);
  const result = shim.native.ubd_statx(fd, STATX_BASIC_STATS | STATX_BTIME, bytes);
  if (result < 0) throw UblkError.from(result, "look at a file");
  const u32 = (offset: number) => statx.getUint32(offset, true);
  if ((statx.getUint16(28, true) & S_IFMT) === S_IFBLK) {
    const device = `${u32(128)}:${u32(132)}`;
    const disk = `/sys/dev/block/${device}`;
    const diskSequence = (contents(`${disk}/diskseq`) || contents(`${disk}/../diskseq`)).trim();
    return { device, ...(diskSequence && { diskSequence }) };
  }
  const born = statx.getBigInt64(80, true) * 1_000_000_000n + BigInt(u32(88));
  const isRegular = (statx.getUint16(28, true) & S_IFMT) === S_IFREG; // To open others may do more.
  const generation = isRegular ? generationOf(shim, fd) : undefined;
  return {
    device: `${u32(136)}:${u32(140)}`,
    inode: `${statx.getBigUint64(32, true)}`,
    ...((u32(0) & STATX_BTIME) !== 0 && { born: `${born}` }),
    ...(generation !== undefined && { generation }),
  };
}

/** Not all file systems count them, and it takes the right to read the file. */
function generationOf(shim: Shim, fd: number): number | undefined {
  const { O_RDONLY, O_NONBLOCK } = constants;
  const open = shim.open(descriptorPath(fd), O_RDONLY | O_NONBLOCK);
  if (open < 0) return undefined;
  const answer = new Uint32Array(2); // A long by its name; the kernel writes 32 bits.
  const result = shim.native.ubd_ioctl(open, FS_IOC_GETVERSION, answer);
  shim.native.ubd_close(open);
  return result < 0 ? undefined : answer[0]!;
}

/**
 * Locks an open file for this process's opening of it alone, without waiting. The lock ends with
 * `unlock`, or with the last descriptor of that opening.
 *
 * @param operation names it in an error, and `hint` says what to do next.
 * @param shared with others that ask for that.
 * @returns false: another opening has it locked. @throws {UblkError} it cannot be locked at all.
 */
export function tryLock(
  fd: number,
  operation: string,
  { shared = false, hint = NO_LOCKS, shim = new Shim() }: {
    shared?: boolean;
    hint?: string;
    shim?: Shim;
  } = {},
): boolean {
  const result = shim.native.ubd_flock(fd, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB);
  if (result === -ERRNO.EAGAIN) return false;
  if (result < 0) throw UblkError.from(result, operation, { hint });
  return true;
}

/** What `tryLock` has locked. */
export function unlock(fd: number, { native } = new Shim()): void {
  native.ubd_flock(fd, LOCK_UN);
}

/** Whether both are the same file, by all that is known of both. */
export function isSameFile(one: FileIdentity, other: FileIdentity): boolean {
  const keys = ["device", "inode", "born", "generation", "diskSequence"] as const;
  return keys.every((key) =>
    one[key] === other[key] || key !== "device" && key !== "inode" &&
      (one[key] === undefined || other[key] === undefined)
  );
}
