// SPDX-License-Identifier: MIT
/**
 * Builds the shim for x86_64 and aarch64, and the small program that udev runs, and writes them,
 * deflated and in base64, to ffi/shim_binary.ts.
 *
 *   bun tools/build_shim.ts
 *
 * Zig links Debian's static liburing (the field's own ring library) into a shared library that
 * needs no libc, so one file serves glibc and musl. Nothing happens when nothing changed.
 * @module
 */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { deflateRawSync } from "node:zlib";
import { fetchPackages } from "./debian.ts";
import { findZig } from "./zig.ts";

const ROOT = join(import.meta.dirname!, "..");
const SHIM = join(ROOT, "shim");
const OUTPUT = join(ROOT, "ffi", "shim_binary.ts");

const TARGETS = [
  { name: "x64", debian: "amd64", triple: "x86_64-linux-musl", library: "x86_64-linux-gnu" },
  { name: "arm64", debian: "arm64", triple: "aarch64-linux-musl", library: "aarch64-linux-gnu" },
];

/** The library, and the program that udev runs. */
const PARTS = [
  {
    name: "SHIM_PACKED",
    // LLVM and LLD by name: Zig's own linker knows no version scripts.
    args: (file: (name: string) => string) => [
      ...["build-lib", file("shim.zig"), "-dynamic", "-fPIC", "-fllvm", "-flld"],
      ...["--version-script", file("exports.map")],
    ],
  },
  {
    name: "OWNER_PACKED",
    args: (file: (name: string) => string) => [
      // Not -fsingle-threaded: liburing reads its stack canary from the thread's memory.
      ...["build-exe", file("owner.zig"), "-fllvm", "-flld"],
    ],
  },
];

/** Runs Zig with private caches, so that nothing is left in the home directory. */
function compile(
  zig: string,
  part: typeof PARTS[number],
  target: typeof TARGETS[number],
  liburing: string,
): Uint8Array {
  const scratch = mkdtempSync(join(tmpdir(), "ubd-shim-"));
  try {
    const output = join(scratch, "output");
    execFileSync(zig, [
      ...[...part.args((name) => join(SHIM, name)), liburing, "-target", target.triple],
      ...["-mcpu", "baseline", "-O", "ReleaseFast", "-fstrip", "-fno-compiler-rt", "--gc-sections"],
      `-femit-bin=${output}`,
    ], {
      stdio: "inherit",
      env: { ...process.env, ZIG_GLOBAL_CACHE_DIR: scratch, ZIG_LOCAL_CACHE_DIR: scratch },
    });
    return readFileSync(output);
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
}

function sourceHash(): string {
  const hash = createHash("sha256").update(readFileSync(import.meta.filename!));
  for (const name of readdirSync(SHIM).sort()) hash.update(readFileSync(join(SHIM, name)));
  return hash.digest("hex").slice(0, 16);
}

function upToDate(stamp: string): boolean {
  try {
    return readFileSync(OUTPUT, "utf8").includes(stamp);
  } catch {
    return false;
  }
}

/** Builds when shim/ changed since the last build, or when there was none. */
export async function buildShim(): Promise<void> {
  const stamp = `// Source: ${sourceHash()}`;
  if (upToDate(stamp)) return;
  const zig = await findZig();
  const version = execFileSync(zig, ["version"], { encoding: "utf8" }).trim();
  const entries: Record<string, string[]> = {};
  for (const target of TARGETS) {
    const packages = { suite: "trixie", arch: target.debian, packages: ["liburing-dev"] };
    const directory = await fetchPackages(packages);
    const liburing = join(directory, "usr/lib", target.library, "liburing.a");
    for (const part of PARTS) {
      const bytes = compile(zig, part, target, liburing);
      console.error(`ubd: ${part.name} for ${target.triple}: ${bytes.length} (Zig ${version})`);
      // Every bundle of the package carries them.
      const packed = deflateRawSync(bytes, { level: 9 }).toString("base64");
      const entry = `  ${target.name}:\n    "${packed}",\n`;
      (entries[part.name] ??= []).push(entry);
    }
  }
  const constants = Object.entries(entries)
    .map(([name, lines]) => `export const ${name} = {\n${lines.join("")}} as const;\n`);
  writeFileSync(
    OUTPUT,
    "// SPDX-License-Identifier: MIT\n// Made by tools/build_shim.ts. Do not edit.\n" +
      `${stamp}\n${constants.join("")}`,
  );
}

if (import.meta.main) await buildShim();
