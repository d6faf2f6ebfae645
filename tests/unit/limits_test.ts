// SPDX-License-Identifier: MIT
/** Which of the caller's limits a device's notes tell of. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { limitNotes } from "../../cli/limits.ts";

const LIMITS = (fileSize: string, processes: string) =>
  `Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max file size             ${fileSize.padEnd(21)}unlimited            bytes
Max data size             unlimited            unlimited            bytes
Max processes             ${processes.padEnd(21)}63000                processes
Max address space         unlimited            unlimited            bytes
`;

test("a limit that is in a server's way is told with its option and what it does", () => {
  assert.deepStrictEqual(limitNotes(LIMITS("unlimited", "63000")), []);
  assert.deepStrictEqual(limitNotes(LIMITS("41943040", "63000")), [
    "ulimit -f limits it to 41943040 bytes: writes beyond that fail (EFBIG); raise it before ubd add",
  ]);
  assert.match(limitNotes(LIMITS("unlimited", "50"))[0]!, /^ulimit -u limits it to 50 processes: /);
  assert.deepStrictEqual(limitNotes(""), []);
});
