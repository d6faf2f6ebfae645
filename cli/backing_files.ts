// SPDX-License-Identifier: MIT
/**
 * The files that a target has its data in, on their way to the server.
 *
 * Whoever starts a server holds them first (O_PATH), in its own mounts, and hands the descriptors
 * over; the server opens what they stand for. So a path means what it means to the caller, also
 * `/dev/stdin` and `/proc/self/fd/7`; what is served cannot be unmounted; and nothing that happens to
 * the name in between matters. The state file keeps which file each one is. A server that takes a
 * device over gets them from the one before it, if that lives, else by their names: what is another
 * file by now is refused.
 * @module
 */

import { realpathSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { ERRNO } from "../abi/errno.ts";
import { type FileIdentity, holdFile, identify, isSameFile } from "../core/file_identity.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { linkTarget, namesIn } from "../core/proc.ts";
import type { Shim } from "../ffi/mod.ts";
import { MODULE_TARGET } from "../targets/module.ts";
import { tell } from "./output.ts";

/** A file of a target's. Plain JSON. */
export interface BackingFile {
  /** Absolute: what it is called. */
  path: string;
  /** What the caller called it: may mean another file to any other process. */
  typed?: string;
  /** It need not be there yet, nor be the same later on: a cache. */
  optional?: boolean;
  /** Which file it is. State files of 0.1.0 do not tell. */
  identity?: FileIdentity;
}

/** Where it is looked for when a device is taken over. */
export interface Source {
  device: number;
  /** The server that has it now: its descriptors are the truth. */
  pid?: number;
  /** Take what has the name now, whatever it is. */
  force?: boolean;
}

/** Of a device that process `pid` serves, if that is above 0; a module opens its files by name. */
export function servedSource(
  device: number,
  pid: number,
  { target: { name } }: { target: { name: string } },
): Source {
  return { device, ...(pid > 0 && name !== MODULE_TARGET && { pid }) };
}

/**
 * @param path as the caller typed it.
 * @throws {UsageError} it names a descriptor that the caller does not have.
 */
export function backingFile(path: string): BackingFile {
  const absolute = resolve(linkTarget("/proc/self/cwd"), path);
  const fd = descriptorNumber(absolute);
  if (fd === undefined) return { path: absolute, typed: path };
  const target = linkTarget(`/proc/self/fd/${fd}`);
  if (!target) {
    throw new UsageError(`Cannot serve ${path}: EBADF, this command was given no descriptor ${fd}`);
  }
  return { path: target, typed: `/proc/self/fd/${fd}` };
}

/** Of /dev/stdin, /dev/fd/7, /proc/self/fd/7 and links to them. */
export function descriptorNumber(path: string): number | undefined {
  for (let links = 0; links < 8; links++) {
    const directory = real(dirname(path));
    const name = path.slice(path.lastIndexOf("/") + 1);
    if (/^\d+$/.test(name) && /^\/proc\/(\d+)(\/task\/\d+)?\/fd$/.exec(directory)?.[1] === self()) {
      return Number(name);
    }
    const target = linkTarget(join(directory, name));
    if (!target) return undefined;
    path = resolve(directory, target);
  }
  return undefined;
}

function real(directory: string): string {
  try {
    return realpathSync(directory);
  } catch {
    return directory;
  }
}

function self(): string {
  return linkTarget("/proc/self");
}

/** Files that are held, whatever becomes of their names. */
export interface HeldFiles {
  /** As they were when they were held. */
  readonly files: readonly BackingFile[];
  /** As they are now, for the state file: on an overlay, to open a file for writing makes it another. */
  known(): readonly BackingFile[];
  /** A descriptor for each (O_PATH), in their order. */
  readonly fds: readonly number[];
  /** @returns the descriptor of what is in this file, unless it need not be the same. */
  find(path: string): number | undefined;
  close(): void;
}

/**
 * Holds each file, and notes which one it is.
 *
 * @param source of a device that is taken over.
 * @throws {UblkError} one is not there: ENOENT, EACCES ...; or it is another one: ESTALE. Nothing is
 * held then.
 */
export function holdFiles(
  shim: Shim,
  files: readonly BackingFile[],
  source?: Source,
): HeldFiles {
  const fds: number[] = [];
  try {
    const known = files.map(({ typed, ...file }) => {
      const fd = hold(shim, typed === undefined ? file : { ...file, typed }, source);
      fds.push(fd);
      return file.optional ? file : { ...file, identity: identify(shim, fd) };
    });
    return heldFiles(shim, known, fds);
  } catch (error) {
    for (const fd of fds) shim.native.ubd_close(fd);
    throw error;
  }
}

/** Those that another process has held, and handed over. */
export function heldFiles(
  shim: Shim,
  files: readonly BackingFile[],
  fds: readonly number[],
): HeldFiles {
  return {
    files,
    known: () =>
      files.map((file, index) =>
        file.optional ? file : { ...file, identity: identify(shim, fds[index]!) }
      ),
    fds,
    find: (path) => fds[files.findIndex((file) => file.path === path && !file.optional)],
    close() {
      for (const fd of fds) shim.native.ubd_close(fd);
    },
  };
}

/** The files of a spec, also of one that a state file of 0.1.0 has. */
export function filesOf(
  { files, target: { name, options } }: {
    files?: readonly BackingFile[];
    target: { name: string; options: object };
  },
): readonly BackingFile[] {
  if (files || !["loop", "concat", "stripe"].includes(name)) return files ?? [];
  const { file, files: several = [] } = options as { file?: string; files?: string[] };
  return [...(file === undefined ? [] : [file]), ...several].map((path) => ({ path }));
}

function hold(shim: Shim, file: BackingFile, source?: Source): number {
  const { path, typed = path, optional, identity } = file;
  const served = source?.pid === undefined ? undefined : findDescriptor(shim, source.pid, file);
  let fd = holdFile(shim, served ?? typed);
  // Its mount is to stay, though it is not there yet.
  if (fd === -ERRNO.ENOENT && optional) fd = holdFile(shim, dirname(path));
  if (fd < 0) throw UblkError.from(fd, `open ${path}`, hintFor(fd, source));
  if (!source || source.force || !identity || served !== undefined) return fd;
  if (isSameFile(identity, identify(shim, fd))) return fd;
  shim.native.ubd_close(fd);
  throw new UblkError({
    errno: "ESTALE",
    operation: `serve ${path}`,
    device: source.device,
    hint: "it is another file than the one that the device was made of, which has been replaced. " +
      `If that one still has a name${
        inodeHint(identity)
      }, put it back under this one. Else it is ` +
      `gone: ubd del --force ${source.device} ends the device, and whoever uses it gets I/O ` +
      `errors; ubd recover --force ${source.device} serves the other file, for a device that ` +
      "nobody uses",
  });
}

function inodeHint({ inode }: FileIdentity): string {
  return inode === undefined ? "" : ` (find -inum ${inode})`;
}

/** @returns names that mean another file by now, or none. */
export function lostNames(shim: Shim, files: readonly BackingFile[]): string[] {
  return files.filter(({ path, optional, identity }) => {
    if (optional || !identity) return false;
    const fd = holdFile(shim, path);
    if (fd < 0) return true;
    const same = isSameFile(identity, identify(shim, fd));
    shim.native.ubd_close(fd);
    return !same;
  }).map(({ path }) => path);
}

/** Tells of names that are lost while the file is served: with the device it may end for good. */
export function tellLostNames(shim: Shim, files: readonly BackingFile[], blockPath: string): void {
  for (const path of lostNames(shim, files)) {
    tell(
      `${path} is another file by now, or none: ${blockPath} stays with the one that it was made ` +
        `of, whose contents are gone with the device if it has no other name; cp ${blockPath} FILE ` +
        "keeps them",
    );
  }
}

function hintFor(result: number, source?: Source): { hint?: string } {
  if (result !== -ERRNO.ENOENT) return {};
  return {
    hint: source
      ? "what the device was made of is no longer there: put it back under this name, or " +
        `ubd del ${source.device}`
      : "check the path; truncate -s 1G FILE makes an image",
  };
}

/** @returns the path of a descriptor of that process which is this file. */
function findDescriptor(shim: Shim, pid: number, { path, identity }: BackingFile) {
  const directory = `/proc/${pid}/fd`;
  const candidates = namesIn(directory).map((name) => `${directory}/${name}`)
    .map((candidate) => ({ candidate, target: linkTarget(candidate) }))
    .filter(({ target }) => target.startsWith("/")); // No socket, pipe ...
  const same = candidates.find(({ candidate }) => {
    const fd = identity ? holdFile(shim, candidate) : -1;
    if (fd < 0) return false;
    const isSame = isSameFile(identity!, identify(shim, fd));
    shim.native.ubd_close(fd);
    return isSame;
  });
  // By the name that it was opened by: version 0.1.0 kept no more; and what the file is may change on
  // an overlay.
  const named = () =>
    candidates.find(({ target }) => target === path || target === `${path} (deleted)`);
  return (same ?? named())?.candidate;
}
