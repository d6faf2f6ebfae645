// SPDX-License-Identifier: MIT
/** A server is not bound by the limits of the shell that started it. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { runtime } from "../../ffi/mod.ts";

const FILE = join(import.meta.dirname!, "played_server.ts");
const RUN = runtime.startsWith("Deno") ? `run -A -q ${FILE}` : FILE;

function limitsWith(ulimits: string): string {
  const { status, stderr } = spawnSync("bash", [
    "-c",
    `${ulimits}; exec ${process.execPath} ${RUN}`,
  ], { env: { ...process.env, UBD_PLAY: "limits" }, encoding: "utf8", timeout: 60_000 });
  assert.strictEqual(status, 0, stderr);
  return stderr;
}

test("a server has no limit of file size, CPU time or processes but a hard one", () => {
  const limits = limitsWith("ulimit -Sf 40960; ulimit -St 3000; ulimit -Su 5000");
  for (const name of ["Max file size", "Max cpu time"]) {
    assert.match(limits, new RegExp(`^${name} +unlimited +unlimited`, "m"), name);
  }
});
