// SPDX-License-Identifier: MIT
/** Texts of others on their way to a terminal. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { oneLine, printable, shorten } from "../../core/text.ts";

test("printable leaves nothing that moves a cursor or turns a line around", () => {
  const table: [string, string][] = [
    ["\x1b[2J\x07", "\\u001b[2J\\u0007"],
    ["a\rb\x7f\x9b1m\b", "a\\u000db\\u007f\\u009b1m\\u0008"],
    ["gpj.\u202eexe\u2066 \u200f\u2028", "gpj.\\u202eexe\\u2066 \\u200f\\u2028"],
    ["\0", "\\u0000"],
    ["one\n\ttwo, größer, 日本, 🚲, \\u", "one\n\ttwo, größer, 日本, 🚲, \\u"],
  ];
  for (const [text, shown] of table) assert.strictEqual(printable(text), shown);
  for (let code = 0; code < 256; code++) {
    const printed = printable(String.fromCharCode(code));
    const is = (code >= 32 && code < 127) || code >= 160 || code === 9 || code === 10;
    assert.strictEqual(printed.length === 1, is, `${code}`);
  }
});

test("printable keeps the meaning of JSON", () => {
  const value = { name: 'a\x1b\x9b\u202e\x7f\n\t"\\b', list: ["\0", 1, null] };
  for (const space of [0, 4]) {
    const text = printable(JSON.stringify(value, null, space));
    assert.deepStrictEqual(JSON.parse(text), value);
    assert.match(text, /^[\n -~]*$/);
  }
});

test("oneLine is a line, whatever the name", () => {
  assert.strictEqual(
    oneLine("a\nubd: all is well\t\x1b"),
    "a\\u000aubd: all is well\\u0009\\u001b",
  );
});

test("shorten keeps the beginning and the end, and half a character never", () => {
  assert.strictEqual(shorten("x".repeat(2000)), "x".repeat(2000));
  const short = shorten(`${"a".repeat(5000)}${"z".repeat(5000)}`);
  assert.match(short, /^a{1000} \[\.\.\. 8500 more characters \.\.\.\] z{500}$/);
  for (const pad of ["", "x"]) assert.ok(shorten(pad + "\u{1f600}".repeat(3000)).isWellFormed());
});
