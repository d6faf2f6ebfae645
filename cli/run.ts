// SPDX-License-Identifier: MIT
/**
 * `ubd run`: a device for as long as a command runs.
 *
 * The device has a server process of its own, as with `ubd add`: the command may mount the device
 * where everybody sees it, and the server never waits for itself. This process holds the server's
 * leash, so the device goes too when this process is killed.
 * @module
 */

import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import process from "node:process";
import type { Writable } from "node:stream";
import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { deviceUsers } from "../core/users.ts";
import { Shim } from "../ffi/mod.ts";
import { type AddOptions, defineDeviceOptions, explainingTaken, toSpec } from "./add.ts";
import { deleteDevice } from "./del.ts";
import { COMMAND_EXIT, reportFailure, toFailure } from "./exit.ts";
import { tell } from "./output.ts";
import { type Live, startServer } from "./start_server.ts";

export function defineRun(program: Command): void {
  const command = program.command("run")
    .summary("make a device, run a command on it, delete it")
    .usage("[options] TARGET [FILES] -- COMMAND [ARGS]")
    .description(
      "Makes a device as `ubd add` does, runs a command, and deletes the device when the command " +
        "has ended. The device's path is in UBD_DEVICE, and in place of each {} in the command.\n\n" +
        "  ubd run loop disk.img -- mkfs.ext4 {}\n" +
        "  ubd run loop disk.img --ro -- sh -c 'fsck -n $UBD_DEVICE'\n\n" +
        "A device that is still in use then, mounted for instance, stays until it is not.",
    )
    .argument("[words...]", "the target, its files, and behind -- the command")
    .action(run);
  defineDeviceOptions(command);
}

/** What stands behind the first `--`. */
export function commandOf(words: readonly string[]): string[] {
  const at = words.indexOf("--");
  return at < 0 ? [] : words.slice(at + 1);
}

async function run(words: string[], options: AddOptions): Promise<void> {
  const command = commandOf(process.argv);
  const [target, ...files] = words.slice(0, words.length - command.length);
  if (command.length === 0) {
    throw new UsageError("Which command? ubd run loop disk.img -- mkfs.ext4 {}");
  }
  const spec = toSpec(target, files, options);

  let leash: Writable | undefined;
  const starting = startServer(spec, { hold: (held) => leash = held });
  const live = await explainingTaken(spec, starting);
  try {
    process.exitCode = await runCommand(command, live);
  } finally {
    await takeDown(live, options);
    leash?.end();
  }
}

/** @returns its exit code, 128 + n for a signal; 126 or 127 when it cannot be started. */
async function runCommand(command: string[], { path }: Live): Promise<number> {
  // The leash must end with this process, not with the command.
  new Shim().native.ubd_close_on_exec();
  const [program, ...args] = command.map((word) => word.replaceAll("{}", path));
  const child = spawn(program!, args, {
    stdio: "inherit",
    env: { ...process.env, UBD_DEVICE: path },
  });
  // A terminal gives Ctrl-C to the command too; a second one could mean something else to it.
  const typed = hasTerminal() ? ["SIGINT", "SIGQUIT"] : [];
  for (const signal of ["SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => typed.includes(signal) || child.kill(signal));
  }
  return await new Promise((resolve) => {
    child.on("error", (error: NodeJS.ErrnoException) => {
      tell(`Cannot run ${program}: ${error.message}`);
      resolve(error.code === "ENOENT" ? COMMAND_EXIT.ABSENT : COMMAND_EXIT.REFUSED);
    });
    child.on("exit", (code, signal) => resolve(code ?? 128 + constants.signals[signal!]));
  });
}

function hasTerminal(): boolean {
  const stat = readFileSync("/proc/self/stat", "utf8");
  const [, , , , terminal] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return terminal !== "0";
}

/** Tells what keeps the device, but never hides the exit code of a command that failed. */
async function takeDown({ id, path }: Live, { json }: AddOptions): Promise<void> {
  try {
    using control = await Control.open();
    const users = await deviceUsers(control.dialect.blockName(id));
    if (users.length > 0) {
      throw new UblkError({
        errno: "EBUSY",
        operation: "delete",
        device: id,
        hint: `${users.join("; ")}; ${path} goes when that ends, or now: ubd del --force ${id}`,
      });
    }
    await deleteDevice(control, id, {});
  } catch (error) {
    if (error instanceof UblkError && error.errno === "ENODEV") return; // Somebody was faster.
    const failure = toFailure(error);
    reportFailure(failure, json ?? false);
    process.exitCode ||= failure.exitCode;
  }
}
