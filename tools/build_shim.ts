// SPDX-License-Identifier: MIT
/**
 * Builds the shim for x86_64 and aarch64 and writes both, as base64, to ffi/shim_binary.ts.
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
import { fetchPackages } from "./debian.ts";
import { findZig } from "./zig.ts";

const ROOT = join(import.meta.dirname!, "..");
const SHIM = join(ROOT, "shim");
const OUTPUT = join(ROOT, "ffi", "shim_binary.ts");

const TARGETS = [
  { name: "x64", debian: "amd64", triple: "x86_64-linux-musl", library: "x86_64-linux-gnu" },
  { name: "arm64", debian: "arm64", triple: "aarch64-linux-musl", library: "aarch64-linux-gnu" },
];

/** Runs Zig with private caches, so that nothing is left in the home directory. */
export function compile(zig: string, target: typeof TARGETS[number], liburing: string): Uint8Array {
  const scratch = mkdtempSync(join(tmpdir(), "ubd-shim-"));
  try {
    const output = join(scratch, "shim.so");
    // LLVM and LLD by name: Zig's own linker knows no version scripts.
    execFileSync(zig, [
      ...["build-lib", join(SHIM, "shim.zig"), liburing, "-dynamic", "-target", target.triple],
      ...["-mcpu", "baseline", "-O", "ReleaseFast", "-fstrip", "-fPIC", "-fno-compiler-rt"],
      ...["-fllvm", "-flld", "--gc-sections", "--version-script", join(SHIM, "exports.map")],
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
  const libraries = [];
  for (const target of TARGETS) {
    const packages = { suite: "trixie", arch: target.debian, packages: ["liburing-dev"] };
    const directory = await fetchPackages(packages);
    const liburing = join(directory, "usr/lib", target.library, "liburing.a");
    const bytes = compile(zig, target, liburing);
    console.error(`ubd: shim for ${target.triple}: ${bytes.length} bytes (Zig ${version})`);
    libraries.push(`  ${target.name}:\n    "${Buffer.from(bytes).toString("base64")}",\n`);
  }
  writeFileSync(
    OUTPUT,
    "// SPDX-License-Identifier: MIT\n// Made by tools/build_shim.ts. Do not edit.\n" +
      `${stamp}\nexport const SHIM_BASE64 = {\n${libraries.join("")}} as const;\n`,
  );
}

if (import.meta.main) await buildShim();
