// SPDX-License-Identifier: MIT
/** Which of the caller's limits a device's notes tell of. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { execFileSync } from "node:child_process";
import { limitNotes, withoutLimits } from "../../cli/limits.ts";
import { Shim } from "../../ffi/mod.ts";

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

test("a server is started without its caller's limits, and the caller keeps them", () => {
  const shim = new Shim();
  const RLIMIT_CPU = 0;
  const before = new BigUint64Array(2);
  assert.ok(shim.native.ubd_raise_limit(RLIMIT_CPU, before) >= 0);
  const seen = () => execFileSync("sh", ["-c", "ulimit -S -t"], { encoding: "utf8" }).trim();
  try {
    shim.native.ubd_set_limit(RLIMIT_CPU, BigUint64Array.of(50_000n, before[1]!));
    assert.strictEqual(seen(), "50000");
    assert.notStrictEqual(withoutLimits(shim, seen), "50000");
    assert.strictEqual(seen(), "50000");
    assert.throws(() => withoutLimits(shim, () => assert.fail("it cannot be started")));
    assert.strictEqual(seen(), "50000");
  } finally {
    shim.native.ubd_set_limit(RLIMIT_CPU, before);
  }
});
