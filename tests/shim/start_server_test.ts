// SPDX-License-Identifier: MIT
/** What the process that starts a server makes of its answers, and of all else that it prints. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { stateDirectory } from "../../core/state.ts";
import { runtime } from "../../ffi/mod.ts";

const FILE = join(import.meta.dirname!, "played_server.ts");
const RUN = runtime.startsWith("Deno") ? ["run", "-A", "-q", FILE] : [FILE];

function play(what: string) {
  const env = { ...process.env, UBD_PLAY: what };
  const options = { env, encoding: "utf8", timeout: 60_000 } as const;
  const { pid, stdout, stderr, status } = spawnSync(process.execPath, RUN, options);
  assert.strictEqual(status, 0, stderr);
  return {
    outcome: JSON.parse(stdout) as Record<string, unknown>,
    stderr,
    log: join(stateDirectory(), `.log.${pid}`),
  };
}

test("what a server or its module prints is no answer: it goes to the log", () => {
  const { outcome, log } = play("chatty");
  assert.deepStrictEqual(outcome, { live: { id: 5, path: "/dev/ublkb5", notes: [] } });
  assert.strictEqual(
    readFileSync(log, "utf8"),
    '{"type":"failed","failure":{"message":"printed","exitCode":1}}\n' +
      "on standard error\nfrom a child\n",
  );
  rmSync(log);
});

test("a line that is no answer ends the server, and is told", () => {
  for (const [what, said] of [["unknown", '{\\"type\\":\\"live\\"}'], ["garbage", "hello"]]) {
    const { outcome, log } = play(what!);
    assert.strictEqual(outcome.errno, "EPROTO");
    assert.strictEqual(outcome.exitCode, 1);
    assert.ok(`${outcome.message}`.includes(said!), `${outcome.message}`);
    assert.strictEqual(existsSync(log), false);
  }
});

test("a server that has not come to be is told with what it has printed, and leaves no log", () => {
  const failed = play("failed");
  assert.deepStrictEqual(failed.outcome, { message: "as it was told", exitCode: 4 });
  assert.strictEqual(failed.stderr, "last words\n");
  assert.strictEqual(existsSync(failed.log), false);

  const crash = play("crash");
  assert.strictEqual(crash.outcome.errno, "ECANCELED");
  assert.match(`${crash.outcome.message}`, /the server ended with SIGKILL/);
  assert.strictEqual(crash.stderr, "panic: \n");
});
