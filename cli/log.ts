// SPDX-License-Identifier: MIT
/** `ubd log`: what a device's server, its runtime and its module have said. @module */

import { closeSync, constants, fstatSync, openSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { Command } from "commander";
import { UblkError, UsageError } from "../core/error.ts";
import { hasStateDirectory } from "../core/state.ts";
import { logPath, readLog } from "./device_log.ts";
import { print, printJson, printsInVain } from "./output.ts";
import { oneDeviceId, parseDeviceId } from "./size.ts";

const FOLLOW_PAUSE_MS = 200;

interface LogOptions {
  number?: number;
  follow?: boolean;
  json?: boolean;
}

export function defineLog(program: Command): void {
  program.command("log")
    .summary("show what a device's server has said")
    .description(
      "Shows the last 256 KiB of what the server of a device, its runtime and its module have " +
        "printed: lines of its own, warnings, the stack of an error. The log goes on when a new " +
        "server takes the device over, stays when the last one ends by a failure, and goes when " +
        "the device is deleted. With --foreground, all that is on standard error instead.",
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("-f, --follow", "go on with what is said from now on, until the device is deleted")
    .action(log);
}

async function log(device: number | undefined, options: LogOptions): Promise<void> {
  const id = oneDeviceId("log", device, options.number);
  if (options.follow && options.json) {
    throw new UsageError("--follow and --json exclude each other");
  }
  const fd = open(id);
  try {
    let { text, end } = readLog(fd);
    if (options.json) return printJson({ id, log: text });
    print(text);
    while (options.follow && !printsInVain() && fstatSync(fd).nlink > 0) {
      await sleep(FOLLOW_PAUSE_MS);
      ({ text, end } = readLog(fd, end));
      print(text);
    }
  } finally {
    closeSync(fd);
  }
}

function open(id: number): number {
  const path = logPath(id);
  const operation = `read ${path}`;
  try {
    if (!hasStateDirectory()) throw Object.assign(new Error("no directory"), { code: "ENOENT" });
    const fd = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    if (fstatSync(fd).isFile()) return fd;
    closeSync(fd);
  } catch (error) {
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    const hint = code === "ENOENT"
      ? "no server in the background has this device, or had it last: see ubd list"
      : message;
    throw new UblkError({ errno: code, operation, hint });
  }
  throw new UblkError({ errno: "EINVAL", operation, hint: "it is no file" });
}
