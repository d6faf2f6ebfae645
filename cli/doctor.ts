// SPDX-License-Identifier: MIT
/**
 * `ubd doctor`: what on this machine keeps ubd from working, or soon may, and what mends it.
 *
 * It reads files, sets up a ring for a moment and asks the driver about its devices. It changes
 * nothing, loads no module, and works without root and without the driver.
 * @module
 */

import { spawnSync } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { release } from "node:os";
import { basename } from "node:path";
import process from "node:process";
import type { Command } from "commander";
import { chooseDialect, type Dialect, UBLK } from "../abi/dialect.ts";
import { errnoName } from "../abi/errno.ts";
import { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { contents, namesIn, Process } from "../core/proc.ts";
import { swapPaths } from "../core/users.ts";
import { Shim } from "../ffi/mod.ts";
import { describeAll } from "./describe.ts";
import { EXIT } from "./exit.ts";
import { forsaken } from "./quiescing.ts";
import { staleFiles } from "./gc.ts";
import { print, printJson } from "./output.ts";

export interface Finding {
  check: string;
  /** "problem": ubd cannot work. "warning": it works, but something is wrong. */
  level: "ok" | "note" | "warning" | "problem";
  what: string;
  why?: string;
  /** The command, or the deed, that mends it. */
  mend?: string;
}

export function defineDoctor(program: Command): void {
  program.command("doctor")
    .summary("find what keeps ubd from working")
    .description(
      "Looks for what keeps ubd from working on this machine: driver, permissions, io_uring, known " +
        "bugs of the kernel, udev, limits, leftovers. Says what, why it matters, and what mends " +
        "it. Changes nothing.",
    )
    .action(doctor);
}

async function doctor({ json }: { json?: boolean }): Promise<void> {
  const findings = await diagnose();
  const working = !findings.some(({ level }) => level === "problem");
  if (json) printJson({ working, findings });
  else print(findings.map(toText).join(""));
  process.exitCode = working ? EXIT.OK : EXIT.FAILURE;
}

function toText({ check, level, what, why, mend }: Finding): string {
  const indent = " ".repeat(20);
  return `${level.padEnd(9)}${check.padEnd(11)}${what}\n` +
    (why ? `${indent}why: ${why}\n` : "") +
    (mend ? `${indent}do:  ${mend}\n` : "");
}

async function diagnose(): Promise<Finding[]> {
  const dialect = chooseDialect(existsSync);
  const { controlPath, charClass } = dialect;
  const loaded = existsSync(`/sys/module/${dialect.driver}`) || existsSync(controlPath);
  const shim = new Shim();
  const ring = checkRing(shim);
  const node = loaded ? checkControlNode(shim, dialect) : undefined;
  const reachable = node?.level === "ok" && ring.level === "ok";
  const ids = namesIn(`/sys/class/${charClass}`).map((name) => Number(name.replace(/\D+/, "")));
  return [
    ...kernelFindings(release(), inOuterPidNamespace(), dialect),
    loaded ? driverFinding(dialect) : absentDriver(release()),
    ...(node ? [node] : []),
    ring,
    ...checkUdev(dialect),
    ...checkLimits(ids.length, dialect),
    ...(reachable ? await checkDevices() : []),
    ...checkStateFiles(ids),
  ];
}

/** Bugs of kernels as they were reported, with the versions that were reported. */
const BUGS: readonly {
  /** First version that has it, and the first one that does not. */
  from?: string;
  before?: string;
  /** Or these releases only. */
  releases?: RegExp;
  level: "note" | "warning" | "problem";
  what: string;
  why: string;
  mend: string;
}[] = [
  {
    releases: /^6\.18\.[45]([^0-9]|$)|^6\.17\.0-(1015|1018)-azure|^6\.17\.0-1017-aws/,
    level: "problem",
    what: "adding a device crashes the driver",
    why: "ADD_DEV oopses, and whoever sent it cannot even be killed",
    mend: "use Linux 6.18.6 or later, or a newer build of your distribution's kernel",
  },
  {
    releases: /^6\.17\.0([^0-9]|$)/,
    level: "warning",
    what: "a server that is killed may leave stuck processes and nodes until a reboot",
    why: "seen after SIGKILL of a server",
    mend: "use a later kernel",
  },
  {
    releases: /^(6\.18\.40|7\.0\.0|7\.0\.14)([^0-9]|$)/,
    level: "warning",
    what: "adding and deleting many devices can wedge all control commands",
    why: "a command that is handed to a kernel worker never runs; only a reboot helps",
    mend: "use another kernel, or reuse devices rather than adding and deleting them often",
  },
  {
    from: "6.7",
    before: "6.14.6",
    level: "warning",
    what: "the kernel can crash when a server ends under load (CVE-2025-37906)",
    why: "the driver cancels a command that it is about to complete",
    mend:
      "use Linux 6.14.6 or later, unless your distribution has mended it; stop I/O before ubd del",
  },
  {
    from: "6.7",
    before: "6.8",
    level: "warning",
    what: "recovering a device can crash the kernel",
    why: "a null pointer when the driver quiesces a device",
    mend: "use Linux 6.8 or later, or no --recovery",
  },
  {
    releases: /^6\.1[6-9]([^0-9]|$)|^7\.0\.0-rc[1-3]([^0-9]|$)/,
    level: "note",
    what: "resizing a device that is not LIVE can crash the kernel",
    why: "UPDATE_SIZE follows a null pointer; ubd resize sends it to no such device, others may",
    mend: "use Linux 7.0 or later; with other programs, look at the device's state first",
  },
];

/** What is known of this kernel, and of its own driver if that is the one which is spoken to. */
export function kernelFindings(
  kernel: string,
  outerPidNamespace: boolean,
  dialect: Dialect = UBLK,
): Finding[] {
  const check = "kernel";
  if (isBefore(kernel, "6.1")) {
    return [{
      check,
      level: "problem",
      what: `Linux ${kernel} is too old`,
      why: "ublk came with Linux 6.0, and ubd needs 6.1",
      mend: "boot Linux 6.1 or later",
    }];
  }
  if (dialect.name !== UBLK.name) return [{ check, level: "ok", what: `Linux ${kernel}` }];
  const findings: Finding[] = BUGS.filter(({ from, before, releases }) =>
    releases ? releases.test(kernel) : !isBefore(kernel, from!) && isBefore(kernel, before!)
  ).map(({ level, what, why, mend }) => ({ check, level, what, why, mend }));
  if (!outerPidNamespace && /^6\.17\.0([^0-9]|$)/.test(kernel)) {
    findings.push({
      check,
      level: "problem",
      what: "this kernel starts no device from inside a pid namespace",
      why: "START_DEV compares process ids of different namespaces, and answers EINVAL",
      mend: "run ubd in the host's pid namespace (docker run --pid=host), or use a later kernel",
    });
  }
  const known = findings.length > 0 ? "" : ", no known bug";
  return [{ check, level: "ok", what: `Linux ${kernel}${known}` }, ...findings];
}

function isBefore(kernel: string, version: string): boolean {
  const parts = (text: string) => text.split(/[^0-9]+/, 3).map(Number);
  const [ours, theirs] = [parts(kernel), parts(version)];
  for (const [index, part] of theirs.entries()) {
    const mine = ours[index] || 0;
    if (mine !== part) return mine < part;
  }
  return false;
}

function inOuterPidNamespace(): boolean {
  const OUTER = 0xeffffffc; // PROC_PID_INIT_INO
  return statSync("/proc/self/ns/pid").ino === OUTER;
}

/** Of the driver that is there. */
export function driverFinding({ name, driver }: Dialect): Finding {
  const check = "driver";
  if (name === UBLK.name) return { check, level: "ok", what: `${driver} is there` };
  return {
    check,
    level: "note",
    what: `${driver} is there, the driver from which the kernel's own, ${UBLK.driver}, came`,
    why: "it has no recovery, zero copy, resizing, or devices of ordinary users; each write is " +
      "made durable at once; and of a server that is killed while it starts, the device stays",
    mend: `rmmod ${driver}; modprobe ${UBLK.driver}`,
  };
}

function absentDriver(kernel: string): Finding {
  const absent = { check: "driver", level: "problem", what: "ublk_drv is not loaded" } as const;
  const directory = `/lib/modules/${kernel}`;
  if (!existsSync(directory)) {
    return {
      ...absent,
      why: `nothing works without it, and ${directory} is absent: this is a container, or the ` +
        "kernel was replaced and the machine not rebooted since",
      mend: "load it on the host (modprobe ublk_drv), or boot a kernel whose modules are installed",
    };
  }
  const known = contents(`${directory}/modules.dep`) + contents(`${directory}/modules.builtin`);
  if (!/\/ublk_drv\.ko/.test(known)) {
    return {
      ...absent,
      why: "nothing works without it, and this kernel's modules do not have it",
      mend: "use a kernel with CONFIG_BLK_DEV_UBLK (Debian 13 and later have it; on Ubuntu: " +
        `apt install linux-modules-extra-${kernel})`,
    };
  }
  const dry = spawnSync("modprobe", ["--dry-run", "--verbose", "ublk_drv"], { encoding: "utf8" });
  const barred = dry.error ? "" : dry.status === 0 ? forbidding(dry.stdout) : dry.stderr.trim();
  return {
    ...absent,
    why: `nothing works without it${barred ? `, and modprobe would not load it: ${barred}` : ""}`,
    mend: barred
      ? "take the line for ublk_drv out of /etc/modprobe.d, then modprobe ublk_drv"
      : "modprobe ublk_drv; at each boot: echo ublk_drv > /etc/modules-load.d/ubd.conf",
  };
}

/** An `install` line for a module runs something else in its place. */
function forbidding(plan: string): string {
  return plan.split("\n").find((line) => /^install .*\b(false|true)\b/.test(line)) ?? "";
}

function checkControlNode(shim: Shim, dialect: Dialect): Finding {
  const check = "control";
  const { controlPath: path } = dialect;
  const O_RDWR = 2;
  const fd = shim.open(path, O_RDWR);
  if (fd >= 0) {
    shim.native.ubd_close(fd);
    return { check, level: "ok", what: `${path} can be opened` };
  }
  const errno = errnoName(-fd);
  const [major, minor] = contents(`/sys/class/misc/${basename(path)}/dev`).trim().split(":");
  if (errno === "ENOENT") {
    return {
      check,
      level: "problem",
      what: `${path} is absent, though the driver is there`,
      why: "every command goes through it",
      mend:
        `mknod -m 600 ${path} c ${major ?? 10} ${minor ?? "MINOR"}; in a container, pass it in ` +
        `(docker run --device ${path})`,
    };
  }
  return {
    check,
    level: "problem",
    what: `${path} cannot be opened: ${errno}`,
    why: "every command goes through it",
    mend: process.getuid!() === 0
      ? "let the container use its devices (docker run --device), or ask its security module"
      : "run ubd as root" +
        (dialect.name === UBLK.name ? "; for devices of ordinary users: ubd udev install" : ""),
  };
}

function checkRing(shim: Shim): Finding {
  const check = "io_uring";
  const ring = shim.controlInit();
  const disabled = contents("/proc/sys/kernel/io_uring_disabled").trim();
  if (typeof ring !== "number") {
    shim.native.ubd_control_exit(ring.handle);
    return disabled === "1"
      ? {
        check,
        level: "note",
        what: "allowed here, but not to ordinary users (io_uring_disabled)",
      }
      : { check, level: "ok", what: "a ring can be set up" };
  }
  const errno = errnoName(-ring);
  const filtered = /^Seccomp:\s*2$/m.test(contents("/proc/self/status"));
  const [why, mend] = errno === "ENOSYS"
    ? ["this kernel is built without io_uring", "use a kernel with CONFIG_IO_URING"]
    : errno === "ENOMEM"
    ? ["the limit of locked memory is too low", "ulimit -l 65536"]
    : disabled === "2" || disabled === "1"
    ? [`kernel.io_uring_disabled is ${disabled}`, "sysctl kernel.io_uring_disabled=0"]
    : filtered
    ? [
      "a seccomp filter forbids it",
      "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile",
    ]
    : ["a security module may forbid it", "look at dmesg and at the audit log"];
  return { check, level: "problem", what: `a ring cannot be set up: ${errno}`, why, mend };
}

const RULES = ["/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"]
  .map((directory) => `${directory}/udev/rules.d`);

function checkUdev(dialect: Dialect): Finding[] {
  const check = "udev";
  const findings: Finding[] = [];
  const devtmpfs = contents("/proc/self/mounts").split("\n")
    .some((line) => / \/dev devtmpfs /.test(line));
  if (!devtmpfs) {
    findings.push({
      check,
      level: "note",
      what: "/dev is no devtmpfs",
      why: "nodes of new devices do not appear in it by themselves, as in most containers",
      mend: "mount -t devtmpfs dev /dev, or docker run -v /dev:/dev",
    });
  }
  if (!existsSync("/run/udev/control")) {
    return [...findings, {
      check,
      level: "note",
      what: "udevd does not run",
      why: "nobody gives unprivileged devices to their users, nor makes links in /dev/disk",
    }];
  }
  if (dialect.name !== UBLK.name) {
    return [...findings, { check, level: "ok", what: "udevd runs" }];
  }
  const rules = RULES.flatMap((directory) =>
    namesIn(directory).filter((name) => name.endsWith(".rules"))
      .map((name): [string, string] => [name, contents(`${directory}/${name}`)])
  );
  if (!rules.some(([, text]) => text.includes("ublkc"))) {
    findings.push({
      check,
      level: "note",
      what: "there are no rules for unprivileged devices",
      why: "without them only root can open a device",
      mend: "ubd udev install, as root, if ordinary users shall have devices",
    });
  }
  const links = rules.find(([name]) => name === "60-persistent-storage.rules");
  if (links && !links[1].includes("ublk")) {
    findings.push({
      check,
      level: "note",
      what: "this udev (before systemd 257) makes no links in /dev/disk for ublk",
      why: "UUID= and LABEL= in fstab do not find the device, and lsblk lacks columns",
      mend: "name the device by its path, with a fixed id (ubd add -n)",
    });
  }
  const fine = { check, level: "ok", what: "udevd runs and knows ublk" } as const;
  return findings.length > 0 ? findings : [fine];
}

const OPEN_FILES_MIN = 256;
const LOCKED_BYTES_MIN = 64 * 1024 ** 2;

function checkLimits(devices: number, { driver }: Dialect): Finding[] {
  const check = "limits";
  const findings: Finding[] = [];
  const parameter = `/sys/module/${driver}/parameters/ublks_max`;
  const devicesMax = Number(contents(parameter) || Infinity);
  if (devices >= devicesMax) {
    const all = isBefore(release(), "6.15");
    findings.push({
      check,
      level: all ? "problem" : "warning",
      what: `there are ${devices} devices, and ublks_max is ${devicesMax}`,
      why: `adding ${all ? "another" : "another unprivileged one"} fails with EACCES`,
      mend: `echo ${devices + 64} > ${parameter}`,
    });
  }
  const [, files] = /^Max open files\s+(\d+)/m.exec(contents("/proc/self/limits")) ?? [];
  if (files !== undefined && Number(files) < OPEN_FILES_MIN) {
    findings.push({
      check,
      level: "warning",
      what: `a process may open ${files} files`,
      why: "each queue takes several",
      mend: "ulimit -n 1024",
    });
  }
  const [, locked] = /^Max locked memory\s+(\d+)/m.exec(contents("/proc/self/limits")) ?? [];
  const bounded = process.getuid!() !== 0 && locked !== undefined;
  if (bounded && Number(locked) < LOCKED_BYTES_MIN) {
    findings.push({
      check,
      level: "note",
      what: `you may lock ${Math.floor(Number(locked) / 1024)} KiB of memory`,
      why: "locked memory and registered buffers count against it",
      mend: "ulimit -l 65536, or LimitMEMLOCK= in the unit",
    });
  }
  return findings.length > 0 ? findings : [{ check, level: "ok", what: "no limit is near" }];
}

async function checkDevices(): Promise<Finding[]> {
  const check = "devices";
  try {
    using control = await Control.open();
    const devices = await describeAll(control);
    const left = devices.filter(({ state, pid }) => state !== "LIVE" && !isAlive(pid));
    const unlocked = devices.filter(({ pid }) => isAlive(pid) && !isLocked(pid));
    return [
      {
        check,
        level: "ok",
        what: `${devices.length - left.length} served, ${left.length} left over`,
      },
      ...left.map(({ id, path, state }): Finding => ({
        check,
        level: "warning",
        what: `device ${id} is ${state}: nobody serves it`,
        why: state === "DEAD"
          ? "its id and memory stay taken"
          : `${path} ${state === "FAIL_IO" ? "fails" : "holds"} all I/O until it is served again`,
        mend: state === "DEAD" ? `ubd del ${id}, or ubd gc` : `ubd recover ${id}, or ubd del ${id}`,
      })),
      ...devices.filter((device) => device.forsaken).map(({ id }): Finding => ({
        check,
        level: "warning",
        what: forsaken(id).split(";")[0]!,
        why: "the driver calls it LIVE, and answers nobody until its server has let go",
        mend: `ubd recover ${id}`,
      })),
      ...(await Promise.all(unlocked.map(unlockedSwap))).flat(),
    ];
  } catch (error) {
    if (!(error instanceof UblkError)) throw error;
    return [{
      check,
      level: error.errno === "ETIMEDOUT" ? "problem" : "warning",
      what: "the driver does not tell of its devices",
      why: error.message,
    }];
  }
}

async function unlockedSwap({ path, pid }: { path: string; pid: number }): Promise<Finding[]> {
  return (await swapPaths(path.replace("/dev/", ""))).map((swap) => ({
    check: "devices",
    level: "warning",
    what: `${swap} is swap, and its server (process ${pid}) is not locked in memory`,
    why:
      "the server may be swapped out to its own device: all that needs memory then waits for ever",
    mend: `swapoff ${swap}, delete the device and add it with --mlock`,
  }));
}

function isLocked(pid: number): boolean {
  return /^VmLck:\s+[1-9]/m.test(contents(`/proc/${pid}/status`));
}

function isAlive(pid: number): boolean {
  return pid > 0 && Process.find(pid) !== undefined;
}

/** @param ids of the devices there are. */
function checkStateFiles(ids: number[]): Finding[] {
  return staleFiles(ids).map(({ file, why }) => ({
    check: "state",
    level: "warning",
    what: `${file} is stale`,
    why,
    mend: "ubd gc",
  }));
}
