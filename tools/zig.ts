// SPDX-License-Identifier: MIT
/**
 * Finds a Zig compiler: `zig` on PATH when it is 0.15 or later, else the pinned wheel from PyPI,
 * unpacked into the cache.
 *
 * The shim was compiled with Zig 0.15.2, 0.16.0 and 0.17.1.
 * @module
 */

import { execFileSync } from "node:child_process";
import { chmodSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { cached } from "./cache.ts";
import { ensureHostPackages } from "./debian.ts";

const PINNED = "0.17.1";
const OLDEST = [0, 15];

/** @returns the path of a usable compiler. */
export async function findZig(): Promise<string> {
  try {
    const [major, minor] = execFileSync("zig", ["version"], { encoding: "utf8" }).split(".");
    if (Number(major) > OLDEST[0]! || Number(minor) >= OLDEST[1]!) return "zig";
  } catch { /* none on PATH */ }

  const directory = await cached("zig", PINNED, async (into) => {
    await ensureHostPackages(["python3", "python3-pip"]);
    mkdirSync(into);
    const run = (args: string[]) => execFileSync("python3", args, { cwd: into, stdio: "ignore" });
    run(["-m", "pip", "download", "--no-deps", "--quiet", `ziglang==${PINNED}`]);
    const wheel = readdirSync(into).find((name) => name.endsWith(".whl"))!;
    run(["-m", "zipfile", "-e", wheel, "."]);
    run(["-c", `import os; os.remove(${JSON.stringify(wheel)})`]);
    chmodSync(join(into, "ziglang", "zig"), 0o755);
  });
  return join(directory, "ziglang", "zig");
}
