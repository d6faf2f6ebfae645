// SPDX-License-Identifier: MIT
/**
 * `ubd add --supervise`: the process that stays when the server starts, and starts it again.
 *
 * It only waits for its child. A server that ends by itself with success was stopped, deleted or
 * quiesced on purpose, and the supervisor ends too. One that dies is replaced by a new one that
 * recovers the device, ever later; after some deaths in a row nobody serves it any more, which
 * the kernel's log and `ubd list` say. Without the supervisor the server goes on.
 * @module
 */

import type { ChildProcess } from "node:child_process";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { DeviceInfo } from "../abi/dialect.ts";
import { harden } from "../core/isolation.ts";
import { readState } from "../core/state.ts";
import { Shim } from "../ffi/mod.ts";
import { EXIT } from "./exit.ts";
import { LOG_FD } from "./device_log.ts";
import type { ServerLog } from "./server_log.ts";
import { answer, deleteLeftover, handedFds, type ServerSpec, spawnServer } from "./start_server.ts";
import { surviveShutdown } from "./systemd.ts";

/** New servers in a row that may die before the device is left alone. */
const DEATHS_MAX = 5;
/** A server that lived so long has not died in a row with the one before. */
const STEADY_MS = 10_000;
/** Pause before the first new server; it doubles with each death. */
const PAUSE_MS = 100;

/** @throws what kept the first server from becoming LIVE. @returns the exit code. */
export async function supervise(
  spec: ServerSpec,
  log: ServerLog,
): Promise<number> {
  // While there is no server, memory must be had without writing to its device.
  if (spec.rootStorage) surviveShutdown();
  harden(new Shim(), { lockMemory: spec.lockMemory ?? false });
  const supervised = { ...spec, supervisor: process.pid };
  const stop = new AbortController();
  let child: ChildProcess | undefined;
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.on(signal, () => {
      stop.abort();
      child?.kill("SIGTERM"); // It deletes the device.
    });
  }
  process.on("SIGHUP", () => {});

  // Each server serves the files that the first one got, whatever becomes of their names.
  const handed = { log: LOG_FD, fds: handedFds(spec) };
  const first = await spawnServer(supervised, handed, answer);
  const { id } = first.live;
  answer({ type: "live", live: first.live });

  let server: { child: ChildProcess } | undefined = first;
  for (let deaths = 0;;) {
    if (server) {
      const started = performance.now();
      child = server.child;
      if (stop.signal.aborted) child.kill("SIGTERM"); // The signal came while it started.
      const end = await ended(child);
      child = undefined;
      if (end === 0) return EXIT.OK;
      log(`server of device ${id} died (${end})`, true);
      if (performance.now() - started > STEADY_MS) deaths = 0;
    }
    if (deaths === DEATHS_MAX && !stop.signal.aborted) {
      log(
        `gives up device ${id} after ${deaths} new servers in a row: ubd recover -n ${id} tries ` +
          `again, ubd del -n ${id} deletes it`,
        true,
      );
      return EXIT.FAILURE;
    }
    const pauseMs = PAUSE_MS * 2 ** deaths++;
    await sleep(pauseMs, undefined, { signal: stop.signal }).catch(() => {});
    // Whoever deleted the device, or recovered it, has put an end to this.
    if (readState(id)?.supervisor !== process.pid) return EXIT.OK;
    if (stop.signal.aborted) {
      const ours = ({ targetFlags }: DeviceInfo) =>
        readState(id, targetFlags)?.supervisor === process.pid;
      await deleteLeftover(id, ours);
      return EXIT.OK;
    }
    const anew = { ...supervised, recover: id, quiesce: false };
    const next = spawnServer(anew, handed, () => {});
    server = await next.catch((error) => {
      log(`no new server for device ${id}: ${(error as Error).message}`, true);
      return undefined;
    });
  }
}

/** @returns the exit code, or the signal's name. */
function ended(child: ChildProcess): Promise<number | string> {
  return new Promise((resolve) => {
    const { exitCode, signalCode } = child;
    if (exitCode !== null || signalCode !== null) resolve(exitCode ?? signalCode!);
    child.on("exit", (code, signal) => resolve(code ?? signal!));
  });
}
