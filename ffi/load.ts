// SPDX-License-Identifier: MIT
/**
 * Finds and loads the shim, in the same way from source, from an npm package and from inside a
 * compiled executable: it travels as text in shim_binary.ts (made by tools/build_shim.ts).
 *
 * dlopen needs a file. A private temporary file is written, opened and unlinked, and loaded
 * through /proc/self/fd, so that nothing is left behind and nobody can put another file in its
 * place. The next directory is tried when one is missing, full, read-only or mounted noexec;
 * memory (memfd_create) is last, because it needs libc by name.
 * @module
 */

import { closeSync, mkdtempSync, openSync, rmdirSync, unlinkSync, writeFileSync } from "node:fs";
import { arch, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { SHIM_PACKED } from "./shim_binary.ts";
import { type Adapter, type Native, SYMBOLS } from "./symbols.ts";

/** Raised together with shim_version in shim/shim.zig. */
export const SHIM_VERSION = 10;

export interface LoadedShim {
  readonly native: Native;
  /** Loads the same mapping again in another thread of this process. */
  readonly path: string;
}

/**
 * @param known `path` of a shim that this process has already loaded.
 * @throws {Error} when no directory lets the shim be loaded; the message lists each attempt.
 */
export function loadShim(adapter: Adapter, known?: string): LoadedShim {
  if (known !== undefined) return { native: adapter.load(known, SYMBOLS), path: known };

  const packed = SHIM_PACKED[arch() as keyof typeof SHIM_PACKED];
  if (!packed) throw new Error(`Cannot load the ubd shim: none is built for ${arch()}`);
  const bytes = unpack(adapter, packed);

  const attempts: string[] = [];
  const places = [tmpdir(), "/dev/shm", "/run", "/var/tmp", process.cwd()];
  for (const place of [...new Set(places), undefined]) {
    let fd: number | undefined;
    try {
      fd = place ? unlinkedFile(place, bytes) : memoryFile(adapter, bytes);
      const path = `/proc/self/fd/${fd}`;
      const native = adapter.load(path, SYMBOLS);
      if (native.ubd_version() !== SHIM_VERSION) {
        throw new Error(`version ${native.ubd_version()} where ${SHIM_VERSION} is needed: build`);
      }
      return { native, path };
    } catch (error) {
      attempts.push(`${place ?? "memory"}: ${(error as Error).message}`);
      if (fd !== undefined) closeSync(fd);
    }
  }
  throw new Error(`Cannot load the ubd shim (${attempts.join("; ")})`);
}

/** @param packed one of shim_binary.ts. */
export function unpack({ inflate }: Adapter, packed: string): Uint8Array {
  return inflate(Buffer.from(packed, "base64"));
}

function unlinkedFile(place: string, bytes: Uint8Array): number {
  const directory = mkdtempSync(join(place, ".ubd-"));
  const file = join(directory, "shim.so");
  try {
    writeFileSync(file, bytes, { mode: 0o700, flag: "wx" });
    return openSync(file, "r");
  } finally {
    try {
      unlinkSync(file);
    } catch { /* never written */ }
    rmdirSync(directory);
  }
}

function memoryFile(adapter: Adapter, bytes: Uint8Array): number {
  const libc = adapter.load("libc.so.6", {
    memfd_create: { args: ["buffer", "u32"], result: "i32" },
    close: { args: ["i32"], result: "i32" },
  });
  const closeOnExec = 1;
  const memory = libc.memfd_create(Buffer.from("ubd-shim\0") as Buffer<ArrayBuffer>, closeOnExec);
  const path = `/proc/self/fd/${memory}`;
  try {
    writeFileSync(path, bytes);
    return openSync(path, "r"); // Deno's node:fs closes only what it has opened.
  } finally {
    libc.close(memory);
  }
}
