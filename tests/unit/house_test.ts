// SPDX-License-Identifier: MIT
/** Rules of the house that hold between files: layers, scripts, versions, the shim's symbols. */
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { VERSION } from "../../core/version.ts";
import { SYMBOLS } from "../../ffi/symbols.ts";
import { layerFaults } from "../../tools/check.ts";

const ROOT = join(import.meta.dirname!, "..", "..");
const read = (file: string) => readFileSync(join(ROOT, file), "utf8");

/** Faults of one file with this text. */
const faultsOf = (file: string, text: string) => layerFaults(() => text, [file]);

test("layerFaults finds imports that point up, or past a layer's public face", () => {
  const planted: [string, string, string][] = [
    ["abi/x.ts", 'import { a } from "../core/a.ts";', "abi/x.ts imports core/a.ts"],
    ["ffi/x.ts", 'export * from "../abi/errno.ts";', "ffi/x.ts imports abi/errno.ts"],
    ["core/x.ts", 'import { a } from "../targets/mod.ts";', "core/x.ts imports targets/mod.ts"],
    ["core/x.ts", 'await import("../cli/main.ts");', "core/x.ts imports cli/main.ts"],
    ["core/x.ts", 'import "../tools/run.ts";', "core/x.ts imports tools/run.ts"],
    ["core/x.ts", 'import {\n  a,\n  b,\n} from "../cli/a.ts";', "core/x.ts imports cli/a.ts"],
    ["targets/x.ts", 'import { a } from "../ffi/mod.ts";', "targets/x.ts imports ffi/mod.ts"],
    ["targets/x.ts", 'import "../core/device.ts";', "targets/x.ts imports core/device.ts"],
    [
      "targets/x.ts",
      'import { a } from "../core/queue_thread.ts";',
      "targets/x.ts imports core/queue_thread.ts",
    ],
    ["cli/x.ts", 'import { a } from "../tests/a.ts";', "cli/x.ts imports tests/a.ts"],
  ];
  for (const [file, text, fault] of planted) {
    assert.deepStrictEqual(faultsOf(file, `// x\n${text}\n`), [fault], text);
  }
});

test("layerFaults finds a runtime named outside ffi/", () => {
  assert.deepStrictEqual(faultsOf("core/x.ts", "const n = Bun.nanoseconds();"), [
    "core/x.ts names a runtime",
  ]);
  assert.deepStrictEqual(faultsOf("cli/x.ts", "/** a */ Deno.exit(1); // b"), [
    "cli/x.ts names a runtime",
  ]);
});

test("layerFaults has nothing against what the rules allow", () => {
  const allowed: [string, string][] = [
    ["core/x.ts", 'import { a } from "../abi/a.ts";\nimport { b } from "../ffi/b.ts";'],
    ["core/x.ts", 'import { a } from "./a.ts";\nimport fs from "node:fs";'],
    ["targets/x.ts", 'import { a } from "../core/error.ts";'],
    ["targets/queue_thread.ts", 'import { a } from "../core/queue_thread.ts";'],
    ["cli/x.ts", 'import { a } from "../core/device.ts";'],
    ["core/x.ts", "// Bun.file is slow\n/* Deno.open\n   Deno.close */"],
    ["ffi/x.ts", "Deno.dlopen(a, b);"],
    ["tools/x.ts", 'import { a } from "../core/device.ts"; Bun.file(a);'],
  ];
  for (const [file, text] of allowed) assert.deepStrictEqual(faultsOf(file, text), [], text);
});

test("layerFaults finds none in the tree", () => {
  const files = ["abi", "ffi", "core", "targets", "cli", "testing"].flatMap((layer) =>
    readdirSync(join(ROOT, layer)).filter((name) => name.endsWith(".ts"))
      .map((name) => `${layer}/${name}`)
  );
  assert.ok(files.includes("core/queue.ts") && files.includes("cli/main.ts"));
  assert.deepStrictEqual(layerFaults(read, files), []);
});

const packageJson = JSON.parse(read("package.json"));
const denoJson = JSON.parse(read("deno.json"));

test("package.json's scripts are deno.json's tasks", () => {
  assert.ok(Object.keys(packageJson.scripts).length > 0);
  assert.deepStrictEqual(packageJson.scripts, denoJson.tasks);
});

test("VERSION is package.json's, deno.json's and package-lock.json's", () => {
  const lock = JSON.parse(read("package-lock.json"));
  assert.match(VERSION, /^\d+\.\d+\.\d+/);
  assert.deepStrictEqual(
    [packageJson.version, denoJson.version, lock.version, lock.packages[""].version],
    [VERSION, VERSION, VERSION, VERSION],
  );
});

test("package.json has no dependencies at run time", () => {
  for (const kind of ["dependencies", "peerDependencies", "optionalDependencies"]) {
    assert.strictEqual(packageJson[kind], undefined, kind);
  }
});

function numberIn(file: string, pattern: RegExp): number {
  const [, digits] = pattern.exec(read(file)) ?? assert.fail(`no ${pattern} in ${file}`);
  return Number(digits);
}

test("SHIM_VERSION in ffi/load.ts is shim_version in shim/shim.zig", () => {
  assert.strictEqual(
    numberIn("ffi/load.ts", /^export const SHIM_VERSION = (\d+);$/m),
    numberIn("shim/shim.zig", /^const shim_version = (\d+);$/m),
  );
});

test("SYMBOLS has each export of shim/shim.zig with its types, and no other", () => {
  const neutral = (type: string) => type.startsWith("?") ? "buffer" : type;
  const exported = Object.fromEntries(
    [...read("shim/shim.zig").matchAll(/^export fn (\w+)\(([^)]*)\) (\w+) \{$/gm)].map(
      ([, name, parameters, result]) => {
        const types = parameters!.split(", ").filter(Boolean).map((one) => one.split(": ")[1]!);
        return [name, { args: types.map(neutral), result }];
      },
    ),
  );
  const lines = read("shim/shim.zig").match(/^export /gm) ?? [];
  assert.strictEqual(Object.keys(exported).length, lines.length, "an export in another form");
  assert.deepStrictEqual(exported, JSON.parse(JSON.stringify(SYMBOLS)));
});

test("every source file starts with its license", () => {
  const folders = [
    "abi",
    "ffi",
    "core",
    "targets",
    "testing",
    "cli",
    "shim",
    "tools",
    "tests/unit",
  ];
  for (const folder of [...folders, "tests/shim"]) {
    for (const name of readdirSync(join(ROOT, folder))) {
      if (!/\.(ts|zig|mjs)$/.test(name)) continue;
      const [first, second] = read(`${folder}/${name}`).split("\n");
      const line = first!.startsWith("#!") ? second : first;
      assert.strictEqual(line, "// SPDX-License-Identifier: MIT", `${folder}/${name}`);
    }
  }
});

test("what the command line prints goes through cli/output.ts, and so do names", () => {
  const writes = /console\.|std(?:out|err)\.write/;
  const others = readdirSync(join(ROOT, "cli")).filter((name) => name !== "output.ts");
  const found = others.filter((name) => writes.test(read(join("cli", name))));
  assert.deepStrictEqual(found, []);
});
