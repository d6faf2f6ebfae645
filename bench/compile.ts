// SPDX-License-Identifier: MIT
/**
 * Compiles C for the benchmark: statically, against the liburing and the kernel headers of the
 * guest's suite, so that a program needs nothing of the guest, and of the host only a C compiler
 * with its libc. Called by kublk.ts and ring.ts.
 */
import { join } from "node:path";
import { ensureHostPackages, fetchPackages } from "../tools/debian.ts";
import { run } from "../tools/run.ts";

export const SUITE = "sid";
const TRIPLE = "x86_64-linux-gnu";

/** Where liburing and the kernel headers are; the path changes with their versions. */
export function fetchLibraries(): Promise<string> {
  return fetchPackages({ suite: SUITE, packages: ["liburing-dev", "linux-libc-dev"] });
}

/** @throws {Error} with what the compiler said. */
export async function compile(sources: string[], libraries: string, output: string): Promise<void> {
  await ensureHostPackages(["gcc", "libc6-dev"]);
  await run("gcc", [
    // The kernel's own Makefile says -O3. The newer headers go in front of the host's.
    ...["-D_GNU_SOURCE", "-O3", "-w", "-static"],
    ...["include", `include/${TRIPLE}`].flatMap((it) => ["-isystem", join(libraries, "usr", it)]),
    ...sources,
    ...[join(libraries, "usr/lib", TRIPLE, "liburing.a"), "-lpthread", "-lm"],
    ...["-o", output],
  ]);
}
