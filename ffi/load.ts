// SPDX-License-Identifier: MIT
/**
 * Finds and loads the shim, in the same way from source, from an npm package and from inside a
 * compiled executable: it travels as text in shim_binary.ts (made by tools/build_shim.ts).
 *
 * dlopen needs a file: an anonymous one in memory (memfd_create), loaded through /proc/self/fd. No
 * directory is involved, so none can be missing, full, read-only or noexec, and nobody who owns one
 * can put another file in its place.
 * @module
 */

import { closeSync, openSync, readFileSync, writeFileSync } from "node:fs";
import { arch } from "node:os";
import { SHIM_PACKED } from "./shim_binary.ts";
import { type Adapter, type Native, SYMBOLS } from "./symbols.ts";

/** Raised together with shim_version in shim/shim.zig. */
export const SHIM_VERSION = 12;

export interface LoadedShim {
  readonly native: Native;
  /** Loads the same mapping again in another thread of this process. */
  readonly path: string;
}

/**
 * @param known `path` of a shim that this process has already loaded.
 * @throws {ShimError} when it cannot be loaded.
 */
export function loadShim(adapter: Adapter, known?: string): LoadedShim {
  if (known !== undefined) return { native: adapter.load(known, SYMBOLS), path: known };

  const packed = SHIM_PACKED[arch() as keyof typeof SHIM_PACKED];
  if (!packed) throw new Error(`Cannot load the ubd shim: none is built for ${arch()}`);
  const bytes = unpack(adapter, packed);

  let fd: number | undefined;
  try {
    fd = memoryFile(adapter, bytes);
    const path = `/proc/self/fd/${fd}`;
    const native = adapter.load(path, SYMBOLS);
    const version = native.ubd_version();
    if (version === SHIM_VERSION) return { native, path };
    throw new Error(`version ${version} where ${SHIM_VERSION} is needed: build`);
  } catch (error) {
    if (fd !== undefined) closeSync(fd);
    throw new ShimError(`Cannot load the ubd shim: ${(error as Error).message}${addressSpace()}`);
  }
}

/** The library cannot be loaded here. */
export class ShimError extends Error {
  override readonly name = "ShimError";
}

/** A runtime that lacks it has no FFI, and says something else. */
function addressSpace(): string {
  try {
    const [, bytes] =
      /^Max address space\s+(\d+)/m.exec(readFileSync("/proc/self/limits", "utf8")) ?? [];
    return bytes === undefined
      ? ""
      : `: ulimit -v leaves it ${bytes} bytes; it needs 16 GiB or more`;
  } catch {
    return "";
  }
}

/** @param packed one of shim_binary.ts. */
export function unpack({ inflate }: Adapter, packed: string): Uint8Array {
  return inflate(Buffer.from(packed, "base64"));
}

const MFD_CLOEXEC = 1;
/** A system may insist on it (vm.memfd_noexec); it forbids execve, not dlopen. From Linux 6.3. */
const MFD_NOEXEC_SEAL = 8;

function memoryFile(adapter: Adapter, bytes: Uint8Array): number {
  // By any name that begins with "libc.", musl answers too.
  const libc = adapter.load("libc.so.6", {
    memfd_create: { args: ["buffer", "u32"], result: "i32" },
    close: { args: ["i32"], result: "i32" },
  });
  const name = new TextEncoder().encode("ubd-shim\0");
  let memory = libc.memfd_create(name, MFD_CLOEXEC | MFD_NOEXEC_SEAL);
  if (memory < 0) memory = libc.memfd_create(name, MFD_CLOEXEC);
  if (memory < 0) throw new Error("memfd_create is refused");
  const path = `/proc/self/fd/${memory}`;
  try {
    writeFileSync(path, bytes);
    return openSync(path, "r"); // Deno's node:fs closes only what it has opened.
  } finally {
    libc.close(memory);
  }
}
