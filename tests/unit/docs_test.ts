// SPDX-License-Identifier: MIT
/** What the documentation shows of the library is what runs. tools/check.ts compiles it. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

const ROOT = join(import.meta.dirname!, "..", "..");
const read = (file: string) => readFileSync(join(ROOT, file), "utf8");

test("the README's first library example is examples/memory.ts, of at most 20 lines", () => {
  const [, shown] = /```ts ignore\n([\s\S]*?)```/.exec(read("README.md")) ??
    assert.fail("no example");
  const example = read("examples/memory.ts").split("\n").slice(1).join("\n"); // Its license.
  assert.equal(shown, example);
  assert.ok(example.trimEnd().split("\n").length <= 20);
});
