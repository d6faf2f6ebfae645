// SPDX-License-Identifier: MIT
/**
 * Builds `kublk`, the kernel's own ublk server, as the yardstick for the benchmark.
 *
 * Its source is in the kernel's selftests, in the Debian package of the kernel's source; no
 * package carries the program. Called by programs.ts, calls tools/.
 */
import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { cached } from "../tools/cache.ts";
import {
  ensureHostPackages,
  newestPackage,
  retryWithFreshIndex,
  unpackPackages,
} from "../tools/debian.ts";
import { run } from "../tools/run.ts";
import type { Program } from "./programs.ts";
import { compile, fetchLibraries, SUITE } from "./compile.ts";

const SOURCE_PACKAGE = /linux-source-[0-9]+\.[0-9]+/;

/** A program that is no part of kublk but lies in its directory. */
const STRANGER = "metadata_size.c";

/**
 * The program, from the cache or built now.
 *
 * @throws {Error} when Debian's package of the source cannot be had or does not compile.
 */
export async function buildKublk(): Promise<Program> {
  await ensureHostPackages(["xz-utils"]);
  const libraries = await fetchLibraries();
  return await retryWithFreshIndex({ suite: SUITE }, async () => {
    const { name, version } = await newestPackage({ suite: SUITE, pattern: SOURCE_PACKAGE });
    const directory = await cached("kublk", `${name} ${version} ${libraries}`, async (path) => {
      const unpacked = join(path, "unpacked");
      const source = await unpackSelftests(name, unpacked);
      const files = readdirSync(source).filter((it) => it.endsWith(".c") && it !== STRANGER);
      await compile(files.map((it) => join(source, it)), libraries, join(path, "kublk"));
      rmSync(unpacked, { recursive: true });
    });
    // The version is that of the kernel's source, as Debian numbers it.
    return { files: [join(directory, "kublk")], version };
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
