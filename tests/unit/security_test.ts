// SPDX-License-Identifier: MIT
/** SECURITY.md says which variables are read: those that the code reads, and no others of ours. */
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

const ROOT = join(import.meta.dirname!, "..", "..");
const text = readFileSync(join(ROOT, "SECURITY.md"), "utf8");
const sources = ["cli", "core", "ffi", "targets"].flatMap((layer) =>
  readdirSync(join(ROOT, layer)).filter((file) => file.endsWith(".ts"))
    .map((file) => readFileSync(join(ROOT, layer, file), "utf8"))
);

function variablesRead(): Set<string> {
  const names = sources.flatMap((source) => [
    ...[...source.matchAll(/process\.env\.(\w+)/g)].map(([, name]) => name!),
    ...[...source.matchAll(/\{([^{}]*)\} = process\.env\b/g)].flatMap(([, taken]) =>
      taken!.split(",").map((one) => one.split(":")[0]!.trim()).filter(Boolean)
    ),
  ]);
  return new Set(names);
}

test("SECURITY.md names each variable that the code reads", () => {
  const names = variablesRead();
  for (const name of ["UBD_DEBUG_EXIT", "SUDO_UID", "XDG_RUNTIME_DIR"]) {
    assert.ok(names.has(name), `the search does not find ${name}`);
  }
  const unknown = [...names].filter((name) => !text.includes(`\`${name}\``));
  assert.deepStrictEqual(unknown, []);
});

test("SECURITY.md names no variable of ours that no code reads or sets", () => {
  const named = new Set([...text.matchAll(/`(UBD_\w+)`/g)].map(([, name]) => name!));
  const whole = sources.join("\n");
  assert.deepStrictEqual([...named].filter((name) => !whole.includes(name)), []);
});

test("SECURITY.md names what the build takes out of the executable, and that alone", () => {
  const build = readFileSync(join(ROOT, "tools/build.ts"), "utf8");
  const [, list = ""] = /const RUNTIME_VARIABLES = \[([\s\S]*?)\n\];/.exec(build) ?? [];
  const taken = [...list.matchAll(/"(\w+)"/g)].map(([, name]) => name!);
  assert.ok(taken.includes("BUN_OPTIONS"));
  const [, sentence = ""] = /does not take ([\s\S]*?), by which/.exec(text) ?? [];
  const said = [...sentence.matchAll(/`([\w*]+)`/g)]
    .map(([, name]) => new RegExp(`^${name!.replace("*", "\\w+")}$`));
  assert.deepStrictEqual(taken.filter((name) => !said.some((pattern) => pattern.test(name))), []);
  assert.deepStrictEqual(said.filter((pattern) => !taken.some((name) => pattern.test(name))), []);
});
