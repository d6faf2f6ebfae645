// SPDX-License-Identifier: MIT
/**
 * Builds what is shipped: the shim (both architectures), the single executable dist/ubd, the
 * bundles of the npm package, dist/cli.js, dist/mod.js and dist/testing.js, their types, and the
 * packed package.
 *
 *   bun tools/build.ts
 * @module
 */

import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { buildShim } from "./build_shim.ts";

const ROOT = join(import.meta.dirname!, "..");

function run(command: string, args: string[]): void {
  execFileSync(command, args, { cwd: ROOT, stdio: ["ignore", "ignore", "inherit"] });
}

const bun = (...args: string[]) => run("bun", ["build", ...args]);

/** What testing/ takes from whoever uses it. */
const USERS = ["--external", "fast-check"];

/**
 * A root tool must not run code or take settings from the directory it is started in. Packages that
 * a module imports say in their package.json where they begin, so that one is read.
 */
export const EXECUTABLE = [
  ...["--compile", "--minify", "--bytecode", "--format=esm"],
  ...["--no-compile-autoload-dotenv", "--no-compile-autoload-bunfig"],
  ...["--no-compile-autoload-tsconfig", "--compile-autoload-package-json"],
  ...USERS,
];

/**
 * By these variables Bun runs other code than the executable's, opens a debugger, or writes files.
 * An executable reads them as well (Bun 1.4.5), and no option of the build forbids it.
 */
const RUNTIME_VARIABLES = [
  ...["BUN_OPTIONS", "BUN_BE_BUN"],
  ...["BUN_INSPECT", "BUN_INSPECT_CONNECT_TO", "BUN_INSPECT_PRELOAD"],
  ...["BUN_BYTECODE_DIGEST_OUT", "BUN_BYTECODE_ORDER_NAMES_OUT", "BUN_BYTECODE_ORDER_OUT"],
];

/**
 * How the npm package's program is started: of the directory that it is started in, Bun would take
 * bunfig.toml (which may name code), .env, and by tsconfig.json even other modules for node:.
 */
const PROGRAM = "#!/usr/bin/env -S BUN_RUNTIME_TRANSPILER_CACHE_PATH=0 " +
  "bun --no-env-file --config=/dev/null --tsconfig-override=/dev/null";

function replaceFirstLine(file: string, line: string): void {
  const text = readFileSync(file, "utf8");
  writeFileSync(file, `${line}${text.slice(text.indexOf("\n"))}`);
}

/** Takes the variables' names out of an executable: no variable has an empty name. */
function forgetVariables(file: string): void {
  const bytes = readFileSync(file);
  for (const name of RUNTIME_VARIABLES) {
    const at = bytes.indexOf(`\0${name}\0`, 0, "latin1");
    if (at < 0) {
      throw new Error(`${file} has no ${name} to be taken out: look how Bun reads it now`);
    }
    bytes[at + 1] = 0;
  }
  writeFileSync(file, bytes);
}

/** Where dist/mod.js and dist/testing.js have their types. */
const TYPES = "dist/types";

/** For `await using`: the libraries of a compiler's default target may lack it. */
const LIBRARIES = '/// <reference lib="esnext.disposable" />\n';

/** Declarations of the two public modules, and of what they need. */
function declarations(): void {
  const into = mkdtempSync(join(ROOT, "dist", ".types-"));
  try {
    // What tools/check.ts checks is only written down here: tsc knows one runtime at a time.
    const emit = ["--declaration", "--emitDeclarationOnly", "--noCheck", "--rootDir", "."];
    const language = ["--module", "nodenext", "--target", "esnext", "--strict", "--types", "node"];
    const args = [
      ...emit,
      ...language,
      "--allowImportingTsExtensions",
      "--exactOptionalPropertyTypes",
    ];
    run("tsc", [...args, "--outDir", into, "mod.ts", "testing/mod.ts"]);
    const pending = ["mod.d.ts", "testing/mod.d.ts"];
    for (const file of pending) {
      // Each compiler finds x.d.ts by the name of the x.js that would be beside it.
      const text = readFileSync(join(into, file), "utf8").replaceAll(
        /\b(from|import)( |\()"(\.[^"]*)\.ts"/g,
        (_, keyword, space, path) => {
          const needed = join(dirname(file), `${path}.d.ts`);
          if (!pending.includes(needed)) pending.push(needed);
          return `${keyword}${space}"${path}.js"`;
        },
      );
      mkdirSync(join(ROOT, TYPES, dirname(file)), { recursive: true });
      writeFileSync(join(ROOT, TYPES, file), `${LIBRARIES}${text}`);
    }
  } finally {
    rmSync(into, { recursive: true });
  }
}

export async function build(): Promise<void> {
  await buildShim();
  rmSync(join(ROOT, "dist"), { recursive: true, force: true });
  mkdirSync(join(ROOT, "dist"));
  bun(...EXECUTABLE, "cli/main.ts", "--outfile", "dist/ubd");
  forgetVariables(join(ROOT, "dist/ubd"));
  // target=node keeps node: and bun: imports as they are, for both runtimes.
  const bundle = ["--target=node", "--external", "bun:ffi", ...USERS];
  bun(...bundle, "--minify", "cli/main.ts", "--outfile", "dist/cli.js");
  replaceFirstLine(join(ROOT, "dist/cli.js"), PROGRAM);
  bun(...bundle, "mod.ts", "--outfile", "dist/mod.js");
  bun(...bundle, "testing/mod.ts", "--outfile", "dist/testing.js");
  declarations();
  // Without its scripts: prepack is this very build.
  run("npm", ["pack", "--silent", "--ignore-scripts", "--pack-destination", "dist"]);
}

if (import.meta.main) await build();
