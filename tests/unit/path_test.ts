// SPDX-License-Identifier: MIT
/** ffi/path.ts: names that are no text. */
import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { join } from "node:path";
import { pathBytes, pathOf, shownPath } from "../../ffi/path.ts";

test("any bytes become a string and the same bytes again, through JSON too", () => {
  const bytes = fc.uint8Array({ maxLength: 40 }).map((it) => it.map((byte) => byte || 1));
  fc.assert(fc.property(bytes, (name) => {
    const text = JSON.parse(JSON.stringify(pathOf(name)));
    assert.deepStrictEqual(pathBytes(text), Uint8Array.from([...name, 0]));
  }));
});

test("UTF-8 is text, and what is none stands for itself", () => {
  assert.strictEqual(pathOf(new TextEncoder().encode("/Bücher/日本/🙂")), "/Bücher/日本/🙂");
  const latin1 = pathOf(Uint8Array.of(0x63, 0xe9, 0x2e, 0x69));
  assert.strictEqual(latin1, "c\u{10ffe9}.i");
  assert.strictEqual(shownPath(latin1), "c\\xE9.i");
  assert.deepStrictEqual(
    pathBytes(join("/", latin1)),
    Uint8Array.of(0x2f, 0x63, 0xe9, 0x2e, 0x69, 0),
  );
  // An encoded surrogate, and one byte too few, are no UTF-8.
  assert.strictEqual(pathOf(Uint8Array.of(0xed, 0xb3, 0xa9)), "\u{10ffed}\u{10ffb3}\u{10ffa9}");
  assert.strictEqual(pathOf(Uint8Array.of(0xe6, 0x97)), "\u{10ffe6}\u{10ff97}");
  assert.deepStrictEqual(pathBytes("é"), Uint8Array.of(0xc3, 0xa9, 0));
});

test("a name that has what stands for a byte is not the name that has the byte", () => {
  const sly = new TextEncoder().encode("c\u{10ffe9}.i");
  assert.notStrictEqual(pathOf(sly), pathOf(Uint8Array.of(0x63, 0xe9, 0x2e, 0x69)));
  assert.deepStrictEqual(pathBytes(pathOf(sly)), Uint8Array.from([...sly, 0]));
});
