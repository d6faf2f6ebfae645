// SPDX-License-Identifier: MIT
/**
 * Contenders that the guest does not have of its own: built or unpacked once, kept in the cache,
 * and copied into the directory that the guest sees. Called by bench.ts.
 *
 * One that cannot be had is left out, with a notice: the comparison is then poorer, not void.
 */
import { execFileSync } from "node:child_process";
import { copyFileSync, readdirSync, rmSync } from "node:fs";
import { basename, join } from "node:path";
import process from "node:process";
import { cached } from "../tools/cache.ts";
import { ensureHostPackages, newestPackage, unpackPackages } from "../tools/debian.ts";
import { run } from "../tools/run.ts";
import { buildKublk } from "./kublk.ts";
import { GUESTS_PROGRAMS, type GuestsProgram } from "./plan.ts";

export interface Program {
  /** The program, and the libraries it needs beside it. */
  files: string[];
  version: string;
}

const RUBLK_VERSION = "0.2.13";
/** Of what it is written in; Debian 13's is good enough. */
const RUST_OLDEST = 85;

/** From crates.io, with its own lock file. Some minutes the first time. */
async function buildRublk(): Promise<Program> {
  if (!hasCargo()) await ensureHostPackages(["cargo"]);
  // A crate of it reads C headers, with Clang's library.
  await ensureHostPackages(["gcc", "libc6-dev", "libclang-dev", "pkg-config"]);
  if (!hasCargo()) throw new Error(`needs cargo 1.${RUST_OLDEST} or later in PATH`);
  const directory = await cached("rublk", RUBLK_VERSION, async (path) => {
    const what = ["rublk", "--version", RUBLK_VERSION, "--locked", "--quiet"];
    await run("cargo", ["install", ...what, "--root", path]);
  });
  return { files: [join(directory, "bin/rublk")], version: RUBLK_VERSION };
}

function hasCargo(): boolean {
  try {
    const version = execFileSync("cargo", ["--version"], { encoding: "utf8" });
    return Number(version.match(/^cargo 1\.(\d+)/)?.[1]) >= RUST_OLDEST;
  } catch {
    return false;
  }
}

/** What qemu-nbd is linked with and the guest may lack; of a release whose names do not change. */
const QEMU_PACKAGES = [
  ...["qemu-utils", "libaio1t64", "libatomic1", "libblkid1", "libffi8", "libfuse3-4", "libgmp10"],
  ...["libglib2.0-0t64", "libgnutls30t64", "libhogweed6t64", "libidn2-0", "libmount1"],
  ...["libnettle8t64", "libnuma1", "libp11-kit0", "libpcre2-8-0", "libselinux1", "libtasn1-6"],
  ...["libunistring5", "liburing2", "libzstd1", "zlib1g"],
];

async function fetchQemuNbd(): Promise<Program> {
  const suite = "trixie";
  const { version } = await newestPackage({ suite, pattern: /qemu-utils/ });
  const key = [version, ...QEMU_PACKAGES].join(" ");
  const directory = await cached("qemu-nbd", key, async (path) => {
    const unpacked = join(path, "unpacked");
    await unpackPackages({ suite, packages: QEMU_PACKAGES }, unpacked);
    copyFileSync(join(unpacked, "usr/bin/qemu-nbd"), join(path, "qemu-nbd"));
    const libraries = join(unpacked, "usr/lib/x86_64-linux-gnu");
    for (const name of readdirSync(libraries)) {
      // By the names that programs look for: copying follows links.
      if (/^lib[^/]*\.so\.[^.]+$/.test(name)) copyFileSync(join(libraries, name), join(path, name));
    }
    rmSync(unpacked, { recursive: true });
  });
  return { files: readdirSync(directory).map((it) => join(directory, it)), version };
}

const MAKERS: Record<GuestsProgram, () => Promise<Program>> = {
  "kublk": buildKublk,
  "rublk": buildRublk,
  "qemu-nbd": fetchQemuNbd,
};

/** Puts what is `wanted` into `directory`. @returns versions, and who is absent for which reason. */
export async function providePrograms(
  wanted: readonly GuestsProgram[],
  directory: string,
): Promise<{ versions: Record<string, string>; present: GuestsProgram[] }> {
  const versions: Record<string, string> = {};
  const present: GuestsProgram[] = [];
  for (const name of GUESTS_PROGRAMS.filter((it) => wanted.includes(it))) {
    try {
      const { files, version } = await MAKERS[name]();
      for (const file of files) copyFileSync(file, join(directory, basename(file)));
      versions[name] = version;
      present.push(name);
    } catch (error) {
      const reason = (error as Error).message.split("\n")[0]!;
      process.stderr.write(`bench: goes on without ${name}: ${(error as Error).message}\n`);
      versions[name] = `absent: ${reason}`;
    }
  }
  return { versions, present };
}
