// SPDX-License-Identifier: MIT
/** The examples in the documentation of ubd/testing and defineTarget run, as they stand. */
import { execFileSync } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";

const FILES = ["testing/mod.ts", "testing/device.ts", "testing/model.ts", "core/define_target.ts"];
const skip = "Bun" in globalThis && "they are run by deno test --doc";

test("the examples run that need no driver", { skip, timeout: 60_000 }, () => {
  const cwd = join(import.meta.dirname!, "..", "..");
  const args = ["test", "-A", "-q", "--no-check", "--doc", ...FILES];
  execFileSync(process.execPath, args, { cwd, stdio: "pipe" });
});
