// SPDX-License-Identifier: MIT
/** Lines in columns. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { formatTable } from "../../cli/table.ts";

test("formatTable keeps to the terminal's width, and both ends of a long name", () => {
  const path = `/srv/${"images/".repeat(12)}disk.img`;
  const rows = [["DEVICE", "SIZE", "WHAT"], ["/dev/ublkb0", "64 MiB", path], [
    "/dev/ublkb12",
    "1 GiB",
    "",
  ]];
  assert.deepStrictEqual(formatTable(rows, 200).split("\n"), [
    "DEVICE        SIZE    WHAT",
    `/dev/ublkb0   64 MiB  ${path}`,
    "/dev/ublkb12  1 GiB",
    "",
  ]);
  for (const width of [80, 60, 40]) {
    const lines = formatTable(rows, width).trimEnd().split("\n");
    for (const line of lines) assert.ok([...line].length <= width, line);
    assert.match(lines[1]!, /^\/dev\/ublkb0 {3}64 MiB {2}\/srv\S*….*disk\.img$/);
    assert.strictEqual([...lines[1]!].length, width);
  }
  assert.match(formatTable(rows, 1), /…\S*disk\.img$/m, "too narrow for anything");
});

test("formatTable makes one line of each row, whatever is in it", () => {
  const text = formatTable([["A", "B"], ["\x1b[2J", "x\ny"]], 80);
  assert.strictEqual(text, "A          B\n\\u001b[2J  x\\u000ay\n");
});
