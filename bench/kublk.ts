// SPDX-License-Identifier: MIT
/**
 * Builds `kublk`, the kernel's own ublk server, as the yardstick for the benchmark.
 *
 * Its source is in the kernel's selftests, in the Debian package of the kernel's source; no
 * package carries the program. Called by bench.ts, calls tools/. The program is linked statically
 * against the liburing and the kernel headers of the guest's suite, so it needs nothing of the
 * guest, and of the host only a C compiler with its libc.
 */
import { chmodSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { cached } from "../tools/cache.ts";
import {
  ensureHostPackages,
  fetchPackages,
  newestPackage,
  retryWithFreshIndex,
  unpackPackages,
} from "../tools/debian.ts";
import { run } from "../tools/run.ts";

const SUITE = "sid";
const SOURCE_PACKAGE = /linux-source-[0-9]+\.[0-9]+/;

/** A program that is no part of kublk but lies in its directory. */
const STRANGER = "metadata_size.c";

/** What {@link buildKublk} made. */
export interface Kublk {
  path: string;
  /** Of the kernel's source, as Debian numbers it. */
  version: string;
}

/**
 * The program, from the cache or built now.
 *
 * @throws {Error} when Debian's package of the source cannot be had or does not compile.
 */
export async function buildKublk(): Promise<Kublk> {
  await ensureHostPackages(["gcc", "libc6-dev", "xz-utils"]);
  const libraries = await fetchPackages({
    suite: SUITE,
    packages: ["liburing-dev", "linux-libc-dev"],
  });
  return await retryWithFreshIndex({ suite: SUITE }, async () => {
    const { name, version } = await newestPackage({ suite: SUITE, pattern: SOURCE_PACKAGE });
    const directory = await cached("kublk", `${name} ${version} ${libraries}`, async (path) => {
      const unpacked = join(path, "unpacked");
      const source = await unpackSelftests(name, unpacked);
      await compile(source, libraries, join(path, "kublk"));
      rmSync(unpacked, { recursive: true });
    });
    return { path: join(directory, "kublk"), version };
  });
}

/** The directory of kublk's source, the only one taken out of the kernel's. */
async function unpackSelftests(name: string, directory: string): Promise<string> {
  const tree = join(directory, "tree");
  mkdirSync(tree, { recursive: true });
  await unpackPackages({ suite: SUITE, packages: [name] }, directory);
  const archive = join(directory, "usr/src", `${name}.tar.xz`);
  const selftests = "tools/testing/selftests/ublk";
  await run("tar", ["-xJf", archive, "-C", tree, "--wildcards", `*/${selftests}/*`]);
  return join(tree, name, selftests);
}

async function compile(source: string, libraries: string, output: string): Promise<void> {
  const files = readdirSync(source).filter((it) => it.endsWith(".c") && it !== STRANGER);
  const triple = "x86_64-linux-gnu";
  await run("gcc", [
    // The kernel's own Makefile says -O3. The newer headers go in front of the host's.
    ...["-D_GNU_SOURCE", "-O3", "-w", "-static"],
    ...["include", `include/${triple}`].flatMap((it) => ["-isystem", join(libraries, "usr", it)]),
    ...files.map((it) => join(source, it)),
    ...[join(libraries, "usr/lib", triple, "liburing.a"), "-lpthread", "-lm"],
    ...["-o", output],
  ]);
  chmodSync(output, 0o755);
}
