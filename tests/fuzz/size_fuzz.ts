// SPDX-License-Identifier: MIT
/** Sizes as they are typed. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { formatSize, parseSize } from "../../cli/size.ts";
import { UsageError } from "../../core/error.ts";
import type { Fuzzer } from "./fuzzer.ts";

const word = fc.oneof(
  fc.string({ unit: fc.constantFrom(..."0123456789.KMGTPEBiks -+e_"), maxLength: 24 }),
  fc.string({ maxLength: 8 }),
);

const fuzzer: Fuzzer = {
  about: "words as sizes: a safe integer of bytes that reads back as itself, or a UsageError",
  property: (canary) =>
    fc.property(word, (text) => {
      let bytes;
      try {
        bytes = canary ? Number.parseFloat(text) : parseSize(text, "Size");
      } catch (error) {
        assert.ok(error instanceof UsageError, `${error}`);
        return;
      }
      assert.ok(Number.isSafeInteger(bytes) && bytes >= 0, `${bytes}`);
      assert.ok(formatSize(bytes).length < 24);
    }),
};
export default fuzzer;
