// SPDX-License-Identifier: MIT
/**
 * Starts a server as `ubd add` does, and is that server too: one that does what UBD_PLAY says in
 * place of serving. Prints how the start came out, as JSON.
 */
import { spawnSync } from "node:child_process";
import { readFileSync, writeSync } from "node:fs";
import process from "node:process";
import { toFailure } from "../../cli/exit.ts";
import { answer, SERVE_VERB, type ServerSpec, startServer } from "../../cli/start_server.ts";

const LIVE = { type: "live", live: { id: 5, path: "/dev/ublkb5", notes: [] } } as const;

const PLAYS: Record<string, () => void> = {
  /** As a module does that prints what an answer looks like. */
  chatty() {
    console.log(JSON.stringify({ type: "failed", failure: { message: "printed", exitCode: 1 } }));
    console.error("on standard error");
    spawnSync("echo", ["from a child"], { stdio: "inherit" });
    answer(LIVE);
  },
  unknown() {
    writeSync(3, '{"type":"live"}\n');
    setInterval(() => {}, 1000);
  },
  garbage() {
    writeSync(3, "hello\n");
    setInterval(() => {}, 1000);
  },
  failed() {
    console.log("last words");
    answer({ type: "failed", failure: { message: "as it was told", exitCode: 4 } });
    process.exit(4);
  },
  limits() {
    writeSync(2, readFileSync("/proc/self/limits", "utf8"));
    answer({ type: "failed", failure: { message: "limits", exitCode: 1 } });
    process.exit(1);
  },
  crash() {
    writeSync(2, "panic: \n");
    process.kill(process.pid, "SIGKILL");
  },
};

if (process.argv[2] === SERVE_VERB) {
  PLAYS[process.env.UBD_PLAY!]!();
} else {
  const started = startServer({ device: {}, target: {} } as ServerSpec);
  const outcome = await started.then((live) => ({ live }), (error) => ({ ...toFailure(error) }));
  console.log(JSON.stringify(outcome));
  process.exit(0);
}
