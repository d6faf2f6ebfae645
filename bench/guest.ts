// SPDX-License-Identifier: MIT
/**
 * The benchmark's part inside the guest: makes every contender's device, then measures them in
 * turn. Run by bun there; reads a `Plan` from /results and leaves a `Report`.
 *
 * - All devices exist at the same time, so that contenders alternate within a case: the host's
 *   other work then hits each of them, not one.
 * - Each loop device has a file of its own, all made alike, so that no contender finds the page
 *   cache that another one filled.
 * - Each server serves some requests before the first measurement: it is long-lived, and its
 *   compilers (a runtime's, an emulated processor's) are at work in its first seconds.
 * - A contender that fails is reported; the others go on.
 */
import { Buffer } from "node:buffer";
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import {
  type Case,
  type Contender,
  KUBLK_FILE,
  type Measurement,
  type Plan,
  PLAN_FILE,
  type Report,
  REPORT_FILE,
} from "./plan.ts";

const RESULTS = "/results";
const KUBLK = `${RESULTS}/${KUBLK_FILE}`;
const DEPTH = 128;
const NULL_GIB = 250;

/** USER_HZ, the unit of times in /proc/<pid>/stat: 100 on every Debian kernel. */
const TICKS_PER_SECOND = 100;

/** Reads and writes, so that the code of both is compiled and all buffers have their pages. */
const WARM_UP: Case = { name: "warm-up", pattern: "randrw", blockBytes: 4096, depth: 64 };

/** A contender's device, ready to be measured. */
interface Device {
  contender: Contender;
  path: string;
  /** The process that serves it; undefined when the kernel does. */
  pid?: number;
}

/** How a contender makes its device. Servers get the id they shall use. */
interface Recipe extends Contender {
  make(id: number): { path: string; isServed: boolean };
}

/** Runs a program; its failure carries what it said. */
function run(command: string, ...args: string[]): string {
  try {
    return execFileSync(command, args, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
  } catch (error) {
    const { stdout, stderr, message } = error as Error & { stdout?: string; stderr?: string };
    throw new Error(
      `${stderr || stdout || message}`.trim().split("\n").slice(-5).join("\n").slice(-500),
    );
  }
}

/** Makes a device with a ublk server's `add`. */
function server(command: string[], args: string[]): Recipe["make"] {
  return (id) => {
    const [program, ...first] = command;
    run(program!, ...first, "add", "-n", `${id}`, "-q", "1", "-d", `${DEPTH}`, ...args);
    return { path: `/dev/ublkb${id}`, isServed: true };
  };
}

function nullBlock(): { path: string; isServed: boolean } {
  run(
    "modprobe",
    ...["null_blk", "nr_devices=1", "submit_queues=1", `hw_queue_depth=${DEPTH}`],
    ...["queue_mode=2", "irqmode=0", `gb=${NULL_GIB}`, "bs=512"],
  );
  return { path: "/dev/nullb0", isServed: false };
}

function kernelLoop(direct: "on" | "off", file: string): Recipe["make"] {
  return () => {
    const path = run("losetup", "--find", "--show", `--direct-io=${direct}`, file).trim();
    // What works through the page cache is measured with it warm, as it is after some use.
    if (direct === "off") run("dd", `if=${path}`, "of=/dev/null", "bs=4M", "status=none");
    return { path, isServed: false };
  };
}

/** A file with every block written, kept out of the page cache. */
function makeFile(name: string, sizeMiB: number): string {
  const path = `/scratch/${name}.img`;
  run("fallocate", "-l", `${sizeMiB}M`, path);
  run(
    "dd",
    ...["if=/dev/zero", `of=${path}`, "bs=4M", `count=${sizeMiB / 4}`],
    ...["oflag=direct", "conv=notrunc", "status=none"],
  );
  return path;
}

function recipes(plan: Plan): Recipe[] {
  const deno = ["deno", "run", "-A", "-q", "--cached-only"];
  const ubdOnDeno = [...deno, "--config", "/ubd/deno.json", "/ubd/cli/main.ts"];
  const kublk = (group: "null" | "loop", args: () => string[]): Recipe[] =>
    plan.hasKublk
      ? [{
        group,
        name: "kublk",
        make: (id) => server([KUBLK], ["-t", group, ...args()])(id),
      }]
      : [];
  const file = (name: string) => makeFile(name, plan.fileMiB);
  return [
    { group: "null", name: "ubd", make: server(["ubd"], ["null"]) },
    { group: "null", name: "ubd on Deno", make: server(ubdOnDeno, ["null"]) },
    ...kublk("null", () => []),
    { group: "null", name: "null_blk", make: nullBlock },
    { group: "loop", name: "ubd", make: (id) => server(["ubd"], ["loop", file("ubd")])(id) },
    ...kublk("loop", () => [file("kublk")]),
    {
      group: "loop",
      name: "kernel, direct",
      make: (id) => kernelLoop("on", file("direct"))(id),
    },
    {
      group: "loop",
      name: "kernel, buffered",
      make: (id) => kernelLoop("off", file("buffered"))(id),
    },
  ];
}

/** The driver knows the server of every device, whoever's it is. */
function serverPid(id: number): number {
  const [device] = JSON.parse(run("ubd", "list", "-n", `${id}`, "--json")) as { pid: number }[];
  if (!device || device.pid <= 0) throw new Error(`Nobody serves device ${id}`);
  return device.pid;
}

function prepare(recipe: Recipe, id: number): Device {
  const { group, name } = recipe;
  process.stdout.write(`making ${group}: ${name}\n`);
  const { path, isServed } = recipe.make(id);
  // udev and the kernel choose a scheduler by the driver; here all get the same, none.
  writeFileSync(`/sys/class/block/${path.slice("/dev/".length)}/queue/scheduler`, "none");
  const device = { contender: { group, name }, path };
  return isServed ? { ...device, pid: serverPid(id) } : device;
}

/** User and system time of a process and its threads so far. */
function cpuSeconds(pid: number): number {
  const text = readFileSync(`/proc/${pid}/stat`, "utf8");
  // The command name, in parentheses, may hold spaces; fields 14 and 15 are utime and stime.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

/** Requests that the device has completed so far. */
function requests(path: string): number {
  const text = readFileSync(`/sys/class/block/${path.slice("/dev/".length)}/stat`, "utf8");
  const fields = text.trim().split(/\s+/).map(Number);
  return fields[0]! + fields[4]!;
}

/** The part of fio's answer that is used. */
interface FioJob {
  error: number;
  read: FioDirection;
  write: FioDirection;
}
interface FioDirection {
  iops: number;
  bw_bytes: number;
  total_ios: number;
  clat_ns: { percentile?: Record<string, number> };
}

function fio(load: Case, path: string, seconds: number, rampSeconds: number): FioDirection {
  const output = run(
    "fio",
    ...["--name=bench", `--filename=${path}`, `--rw=${load.pattern}`, `--bs=${load.blockBytes}`],
    ...[`--iodepth=${load.depth}`, "--ioengine=io_uring", "--direct=1", "--time_based"],
    ...[`--runtime=${seconds}`, `--ramp_time=${rampSeconds}`],
    ...["--randrepeat=1", "--norandommap", "--output-format=json"],
  );
  // Warnings come before the answer.
  const { jobs } = JSON.parse(output.slice(output.search(/^\{/m))) as { jobs: FioJob[] };
  const job = jobs[0]!;
  const direction = load.pattern === "randwrite" ? job.write : job.read;
  if (job.error !== 0) throw new Error(`fio failed: error ${job.error}`);
  if (!(direction.total_ios > 0)) throw new Error("fio completed no request");
  return direction;
}

function measure(plan: Plan, load: Case, device: Device, repeat: number): Measurement {
  const { pid, path, contender } = device;
  const cpuBefore = pid ? cpuSeconds(pid) : 0;
  const requestsBefore = requests(path);
  const direction = fio(load, path, plan.seconds, plan.rampSeconds);
  // Ramp included on both sides of the division.
  const served = requests(path) - requestsBefore;
  const percentile = direction.clat_ns.percentile ?? {};
  return {
    ...contender,
    case: load.name,
    repeat,
    iops: direction.iops,
    bytesPerSecond: direction.bw_bytes,
    latencyP50Us: (percentile["50.000000"] ?? 0) / 1000,
    latencyP99Us: (percentile["99.000000"] ?? 0) / 1000,
    serverCpuUs: pid ? (cpuSeconds(pid) - cpuBefore) * 1e6 / served : null,
  };
}

function versions(): Record<string, string> {
  const processor = readFileSync("/proc/cpuinfo", "utf8").match(/^model name\s*: (.*)$/m)?.[1];
  return {
    kernel: run("uname", "-r").trim(),
    processors: `${run("nproc").trim()} x ${processor ?? "unknown"}`,
    ubd: run("ubd", "--version").trim(),
    deno: run("deno", "--version").split("\n")[0]!.replace(/^deno /, ""),
    fio: run("fio", "--version").trim(),
  };
}

/** Every repeat starts with another contender, so that none is always first. */
function inTurn<T>(items: readonly T[], repeat: number): T[] {
  const start = repeat % items.length;
  return [...items.slice(start), ...items.slice(0, start)];
}

function main(): void {
  const plan = JSON.parse(readFileSync(`${RESULTS}/${PLAN_FILE}`, "utf8")) as Plan;
  const report: Report = { versions: versions(), measurements: [], failures: [] };
  const attempt = <T>(contender: Contender, load: string | undefined, work: () => T) => {
    try {
      return work();
    } catch (error) {
      const { group, name } = contender;
      const message = (error as Error).message;
      report.failures.push({ group, name, ...(load !== undefined && { case: load }), message });
      return undefined;
    }
  };

  const devices = recipes(plan)
    .map((recipe, id) => attempt(recipe, undefined, () => prepare(recipe, id)))
    .filter((device) => device !== undefined);
  if (plan.warmUpSeconds > 0) {
    for (const { path, contender } of devices.filter(({ pid }) => pid !== undefined)) {
      process.stdout.write(`warming ${contender.group}: ${contender.name}\n`);
      attempt(contender, WARM_UP.name, () => fio(WARM_UP, path, plan.warmUpSeconds, 0));
    }
  }
  const total = plan.repeats * plan.cases.length * devices.length;
  let count = 0;
  for (let repeat = 0; repeat < plan.repeats; repeat++) {
    for (const load of plan.cases) {
      for (const device of inTurn(devices, repeat)) {
        const { contender } = device;
        const result = attempt(contender, load.name, () => measure(plan, load, device, repeat));
        if (result) report.measurements.push(result);
        const iops = result ? `${Math.round(result.iops)} IOPS` : "FAILED";
        const what = `${contender.group}: ${contender.name}, ${load.name}: ${iops}`;
        process.stdout.write(`${++count}/${total} ${what}\n`);
      }
    }
  }
  writeFileSync(`${RESULTS}/${REPORT_FILE}`, Buffer.from(JSON.stringify(report)));
}

main();
