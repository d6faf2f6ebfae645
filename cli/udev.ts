// SPDX-License-Identifier: MIT
/**
 * `ubd udev`: the rules that let users have devices of their own, and the program they run.
 *
 * The driver checks a command for an unprivileged device by its character device: who may open
 * /dev/ublkcN may control it. So udev gives both nodes of such a device to its owner, whom the
 * driver alone knows: shim/owner.zig asks it. The control device is for everybody: the driver lets
 * users without privileges do nothing there but add such devices.
 * @module
 */

import { spawnSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  renameSync,
  rmdirSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { arch } from "node:os";
import { dirname } from "node:path";
import process from "node:process";
import type { Command } from "commander";
import { UblkError, UsageError } from "../core/error.ts";
import { unpackBinary } from "../ffi/mod.ts";
import { OWNER_PACKED } from "../ffi/shim_binary.ts";
import { print, printJson, tell } from "./output.ts";

const RULES_PATH = "/etc/udev/rules.d/60-ubd.rules";
const OWNER_PATH = "/usr/local/lib/ubd/ubd-owner";
const CONTROL_PATH = "/dev/ublk-control";

interface UdevOptions {
  print?: boolean;
  group?: string;
  json?: boolean;
}

export function defineUdev(program: Command): void {
  program.command("udev")
    .summary("let users have devices of their own")
    .description(
      "Installs or removes the udev rules, and the program they run, that let users without " +
        "privileges have devices of their own: ubd add --unprivileged.\n\n" +
        `  ${RULES_PATH}\n  ${OWNER_PATH}`,
    )
    .argument("[action]", "install or remove")
    .option("--print", "show the rules, change nothing")
    .option("--group <name>", "only for members of this group")
    .action(udev);
}

function udev(action: string | undefined, { print: onlyShow, group, json }: UdevOptions): void {
  if (group !== undefined && !/^[a-z_][a-z0-9_-]*$/i.test(group)) {
    throw new UsageError(`Group "${group}": it must be a name`);
  }
  if (onlyShow && action === undefined) {
    if (json) printJson({ path: RULES_PATH, rules: rules(group) });
    else print(rules(group));
    return;
  }
  if (onlyShow || (action !== "install" && action !== "remove")) {
    throw new UsageError("What to do? ubd udev install, ubd udev remove or ubd udev --print");
  }
  const done = action === "install" ? install(group) : remove();
  const told = tellUdev();
  if (json) printJson({ [action]: done, udevTold: told });
  else for (const path of done) print(`${action} ${path}\n`);
  if (!told) {
    tell("no udevd took notice: is it running? then: udevadm control -R");
  }
}

function rules(group: string | undefined): string {
  // GROUP= takes no groups but the system's own (since systemd 258).
  const access = group === undefined
    ? 'MODE="0666"'
    : `MODE="0660", RUN+="/usr/bin/chgrp ${group} $devnode"`;
  return `# Users without privileges may have ublk devices of their own. Made by: ubd udev install
KERNEL=="ublk-control", ${access}, OPTIONS+="static_node=ublk-control"
ACTION!="remove", KERNEL=="ublk[bc][0-9]*", RUN+="${OWNER_PATH} %k"
`;
}

function install(group: string | undefined): string[] {
  const packed = OWNER_PACKED[arch() as keyof typeof OWNER_PACKED];
  // Not in the middle of a name that udevd may be looking at.
  write(OWNER_PATH, unpackBinary(packed), 0o755);
  write(RULES_PATH, rules(group), 0o644);
  return [OWNER_PATH, RULES_PATH];
}

function write(path: string, content: string | Uint8Array, mode: number): void {
  changing(path, () => {
    mkdirSync(dirname(path), { recursive: true, mode: 0o755 });
    const temporary = `${path}.${process.pid}`;
    try {
      rmSync(temporary, { force: true });
      writeFileSync(temporary, content, { flag: "wx", mode });
      chmodSync(temporary, mode); // The caller's umask may be stricter.
      renameSync(temporary, path);
    } catch (error) {
      rmSync(temporary, { force: true });
      throw error;
    }
  });
}

function remove(): string[] {
  const there = [RULES_PATH, OWNER_PATH].filter((path) => existsSync(path));
  for (const path of there) changing(path, () => rmSync(path));
  try {
    rmdirSync(dirname(OWNER_PATH));
  } catch { /* something else is in it, or it was never there */ }
  // No rule says so any more, and udev changes only what a rule says.
  if (existsSync(CONTROL_PATH)) changing(CONTROL_PATH, () => chmodSync(CONTROL_PATH, 0o600));
  return there;
}

function changing(path: string, work: () => void): void {
  try {
    work();
  } catch (error) {
    const { code = "EIO", message } = error as NodeJS.ErrnoException;
    const hint = process.getuid!() === 0 ? message : "run as root";
    throw new UblkError({ errno: code, operation: `change ${path}`, hint });
  }
}

/** Has udevd read the rules, and apply them to the control device now. */
function tellUdev(): boolean {
  const trigger = ["trigger", "--action=add", "--settle", CONTROL_PATH];
  const steps = [["control", "--reload"], ...(existsSync(CONTROL_PATH) ? [trigger] : [])];
  return steps.every((args) => spawnSync("udevadm", args, { stdio: "ignore" }).status === 0);
}
