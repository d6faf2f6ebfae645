// SPDX-License-Identifier: MIT
/**
 * The house's rules, one name each: formatter, linter, types, documentation, layers, and the pages
 * of the verbs.
 *
 *   bun tools/check.ts
 *
 * The layer check holds the arrows of docs/ARCHITECTURE.md: dependencies point down only, and
 * nothing outside ffi/ (and tests, tools and bench, which run under one runtime) names a runtime.
 * @module
 */

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { buildShim } from "./build_shim.ts";
import { staleManPages } from "./man.ts";

const ROOT = join(import.meta.dirname!, "..");

/** What each folder may import; its own files always. */
const ARROWS: Record<string, readonly string[]> = {
  abi: [],
  ffi: [],
  core: ["abi", "ffi"],
  targets: ["abi", "core"],
  cli: ["abi", "core", "ffi", "targets"],
  testing: ["abi", "core", "ffi"],
};

/** targets/ speaks to core through its public face, never to its machinery. */
const CORE_FOR_TARGETS = [
  "core/target.ts",
  "core/error.ts",
  "core/file_identity.ts",
  "core/volume.ts",
  "core/define_target.ts",
  "core/proc.ts",
];

/** Files whose purpose is to tie layers together. */
const EXCEPTIONS: Record<string, readonly string[]> = {
  "targets/queue_thread.ts": ["core/queue_thread.ts"],
  "targets/mod.ts": ["core/engine.ts"],
  "targets/module.ts": ["mod.ts", "testing/mod.ts", "ffi/mod.ts"], // User modules import the library itself.
};

function sourceFiles(): string[] {
  const listed = execFileSync("git", ["ls-files", "-co", "--exclude-standard", "*.ts"], {
    cwd: ROOT,
    encoding: "utf8",
  });
  return listed.split("\n").filter(Boolean);
}

/** Files whose examples are to compile. */
const isDocumented = (file: string) => /^(mod|(core|targets|testing)\/\w+)\.ts$/.test(file);

/** @returns one line for each arrow that points up, and each runtime named outside ffi/. */
export function layerFaults(read: (file: string) => string, files: string[]): string[] {
  const faults: string[] = [];
  for (const file of files) {
    const layer = file.split("/")[0]!;
    const allowed = ARROWS[layer];
    if (!allowed) continue;
    const text = read(file);
    for (const [, specifier] of text.matchAll(/(?:from|import)\s*\(?\s*"(\.[^"]+)"/g)) {
      const target = normalize(join(dirname(file), specifier!));
      const to = target.split("/")[0]!;
      if (EXCEPTIONS[file]?.includes(target)) continue;
      if (to !== layer && !allowed.includes(to)) faults.push(`${file} imports ${target}`);
      if (layer === "targets" && to === "core" && !CORE_FOR_TARGETS.includes(target)) {
        faults.push(`${file} imports ${target}`);
      }
    }
    const code = text.replaceAll(/\/\*[\s\S]*?\*\/|\/\/.*/g, "");
    if (layer !== "ffi" && /\b(Bun|Deno)\./.test(code)) faults.push(`${file} names a runtime`);
  }
  return faults;
}

function run(command: string, args: string[]): void {
  const env = { ...process.env, NO_COLOR: "1" };
  execFileSync(command, args, { cwd: ROOT, stdio: "pipe", encoding: "utf8", env });
}

const CHECKS: readonly (readonly [string, () => void])[] = [
  ["format", () => run("deno", ["fmt", "--check", "--quiet"])],
  ["lint", () => run("deno", ["lint", "--quiet"])],
  ["types", () => run("deno", ["check", "--quiet", ...sourceFiles()])],
  ["docs", () => {
    run("deno", ["doc", "--lint", "--quiet", "mod.ts", "testing/mod.ts"]);
    run("deno", ["check", "--quiet", "--doc", ...sourceFiles().filter(isDocumented)]);
    run("deno", ["check", "--quiet", "--doc-only", "README.md", "docs/library.md"]);
  }],
  ["layers", () => {
    const faults = layerFaults((file) => readFileSync(join(ROOT, file), "utf8"), sourceFiles());
    if (faults.length > 0) throw new Error(faults.join("\n"));
  }],
  ["man", () => {
    const stale = staleManPages();
    if (stale.length > 0) throw new Error(`run bun tools/man.ts: ${stale.join(", ")}`);
  }],
];

/** Runs every check. @returns how many passed and failed. */
export async function check(): Promise<{ passed: number; failed: number }> {
  await buildShim(); // The types are those of a tree with its generated module.
  let failed = 0;
  for (const [name, work] of CHECKS) {
    try {
      work();
      console.log(`check ${name}: ok`);
    } catch (error) {
      failed++;
      const { stdout = "", stderr = "", message } = error as Error & Record<string, string>;
      console.log(`check ${name}: FAILED\n${stdout}${stderr}` || message);
      if (!stdout && !stderr) console.log(message);
    }
  }
  return { passed: CHECKS.length - failed, failed };
}

if (import.meta.main) process.exitCode = (await check()).failed ? 1 : 0;
