// SPDX-License-Identifier: MIT
/**
 * Builds what is shipped: the shim (both architectures), the single executable dist/ubd, the
 * bundles of the npm package, dist/cli.js, dist/mod.js and dist/testing.js, and the packed package.
 *
 *   bun tools/build.ts
 * @module
 */

import { execFileSync } from "node:child_process";
import { mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { buildShim } from "./build_shim.ts";

const ROOT = join(import.meta.dirname!, "..");

function bun(...args: string[]): void {
  execFileSync("bun", ["build", ...args], { cwd: ROOT, stdio: ["ignore", "ignore", "inherit"] });
}

/** What testing/ takes from whoever uses it. */
const USERS = ["--external", "fast-check"];

/** A root tool must not run code or take settings from the directory it is started in. */
export const EXECUTABLE = [
  ...["--compile", "--minify", "--bytecode", "--format=esm"],
  ...["--no-compile-autoload-dotenv", "--no-compile-autoload-bunfig"],
  ...USERS,
];

export async function build(): Promise<void> {
  await buildShim();
  rmSync(join(ROOT, "dist"), { recursive: true, force: true });
  mkdirSync(join(ROOT, "dist"));
  bun(...EXECUTABLE, "cli/main.ts", "--outfile", "dist/ubd");
  // target=node keeps node: and bun: imports as they are, for both runtimes.
  const bundle = ["--target=node", "--external", "bun:ffi", ...USERS];
  const tight = ["--minify-whitespace", "--minify-syntax"]; // A stack still has its names.
  bun(...bundle, "--minify", "cli/main.ts", "--outfile", "dist/cli.js");
  bun(...bundle, ...tight, "mod.ts", "--outfile", "dist/mod.js");
  bun(...bundle, ...tight, "testing/mod.ts", "--outfile", "dist/testing.js");
  // Without its scripts: prepack is this very build.
  execFileSync("npm", ["pack", "--ignore-scripts", "--pack-destination", "dist"], {
    cwd: ROOT,
    stdio: ["ignore", "ignore", "ignore"],
  });
}

if (import.meta.main) await build();
