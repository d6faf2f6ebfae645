// SPDX-License-Identifier: MIT
/**
 * The benchmark's part inside the guest: makes every contender's device, then measures them in
 * turn. Run by bun there; reads a `Plan` from /results and leaves a `Report`.
 *
 * - All devices of a group exist at the same time, so that contenders alternate within a case: the
 *   host's other work then hits each of them, not one.
 * - Each loop device has a file of its own, all made alike, so that no contender finds the page
 *   cache that another one filled.
 * - Each server serves some requests before the first measurement: it is long-lived, and its
 *   compilers (a runtime's, an emulated processor's) are at work in its first seconds.
 * - A contender that fails is reported; the others go on.
 */
import { Buffer } from "node:buffer";
import { spawn, spawnSync } from "node:child_process";
import { closeSync, existsSync, openSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { writeFileSync } from "node:fs";
import { once } from "node:events";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import {
  type Case,
  type Contender,
  type Group,
  inTurn,
  type Measurement,
  type Plan,
  PLAN_FILE,
  type Report,
  REPORT_FILE,
  settleSeconds,
} from "./plan.ts";

const RESULTS = "/results";
const DEPTH = 128;
const NULL_GIB = 250;
const MIB = 1024 ** 2;

/** USER_HZ, the unit of times in /proc/<pid>/stat: 100 on every Debian kernel. */
const TICKS_PER_SECOND = 100;

/** Reads and writes, so that the code of both is compiled. */
const WARM_UP: Case = { name: "warm-up", pattern: "randrw", blockBytes: 4096, depth: 64 };
/** And then large ones for a moment, so that all buffers have their pages. */
const FILL: Case = { name: "warm-up with 1M", pattern: "rw", blockBytes: MIB, depth: 16 };
const FILL_SHARE = 1 / 7;

/** A contender's device, ready to be measured. */
interface Device {
  contender: Contender;
  path: string;
  /** The process that serves it; undefined when the kernel does. */
  pid?: number;
  remove(): void;
}

/** How a contender makes its device. Servers of ublk get the id they shall use. */
interface Recipe {
  name: string;
  make(id: number, queues: number): Omit<Device, "contender">;
}

/** A program does not know what it was asked for: no failure of the contender. */
class Refusal extends Error {}

/** Runs a program; its failure carries what it said. */
function run(command: string, ...args: string[]): string {
  // A server that goes on in the background may keep what it was given: files, then, not pipes.
  const file = `/tmp/bench-output-${process.pid}`;
  const fd = openSync(file, "w+");
  try {
    const { status, error } = spawnSync(command, args, { stdio: ["ignore", fd, fd], env: ENV });
    const output = readFileSync(file, "utf8");
    if (status === 0) return output;
    const words = (error?.message ?? output).trim().split("\n").slice(-5).join("\n").slice(-500);
    const message = words || `${command} ended with ${status}`;
    throw status === 2 && command === "ubd" ? new Refusal(message) : new Error(message);
  } finally {
    closeSync(fd);
    rmSync(file);
  }
}

const ENV = { ...process.env };

const UBD = ["ubd"];
const DENO = ["deno", "run", "-A", "-q", "--cached-only", "--config", "/ubd/deno.json"];
const UBD_ON_DENO = [...DENO, "/ubd/cli/main.ts"];
const KUBLK = [`${RESULTS}/kublk`];
const RUBLK = [`${RESULTS}/rublk`];
// Its libraries lie beside it, and must not become other programs'.
const QEMU_NBD = ["env", `LD_LIBRARY_PATH=${RESULTS}`, `${RESULTS}/qemu-nbd`];

function call([program, ...first]: string[], ...args: string[]): string {
  return run(program!, ...first, ...args);
}

/** Makes a device with a ublk server's `add`. */
function server(command: string[], args: () => string[]): Recipe["make"] {
  return (id, queues) => {
    call(command, "add", "-n", `${id}`, "-q", `${queues}`, "-d", `${DEPTH}`, ...args());
    return { path: `/dev/ublkb${id}`, pid: serverPid(id), remove: () => removeUblk(id) };
  };
}

/** The driver knows the server of every device, whoever's it is. */
function serverPid(id: number): number {
  const [device] = JSON.parse(run("ubd", "list", "-n", `${id}`, "--json")) as { pid: number }[];
  if (!device || device.pid <= 0) throw new Error(`Nobody serves device ${id}`);
  return device.pid;
}

function removeUblk(id: number): void {
  run("ubd", "del", "-n", `${id}`);
}

function nullBlock(): Recipe["make"] {
  return (_, queues) => {
    run(
      "modprobe",
      ...["null_blk", "nr_devices=1", `submit_queues=${queues}`, `hw_queue_depth=${DEPTH}`],
      ...["queue_mode=2", "irqmode=0", `gb=${NULL_GIB}`, "bs=512"],
    );
    return { path: "/dev/nullb0", remove: () => void run("modprobe", "-r", "null_blk") };
  };
}

function kernelLoop(direct: "on" | "off", file: () => string): Recipe["make"] {
  return () => {
    const path = run("losetup", "--find", "--show", `--direct-io=${direct}`, file()).trim();
    // What works through the page cache is measured with it warm, as it is after some use.
    if (direct === "off") run("dd", `if=${path}`, "of=/dev/null", "bs=4M", "status=none");
    return { path, remove: () => void run("losetup", "-d", path) };
  };
}

function qemuNbd(args: () => string[]): Recipe["make"] {
  return () => {
    run("modprobe", "nbd", "nbds_max=2", "max_part=0");
    const path = "/dev/nbd0";
    // Its own choice of a socket is in /var/lock, which this guest lacks.
    const socket = "--socket=/run/bench-nbd.sock";
    call(QEMU_NBD, `--connect=${path}`, socket, "--fork", ...args());
    const pid = Number(run("pgrep", "-n", "-x", "qemu-nbd").trim());
    return { path, pid, remove: () => void call(QEMU_NBD, "--disconnect", path) };
  };
}

/** A file with every block written, kept out of the page cache. */
function makeFile(name: string, sizeMiB: number): string {
  const path = `/scratch/${name.replaceAll(/\W+/g, "-")}.img`;
  run("fallocate", "-l", `${sizeMiB}M`, path);
  run(
    "dd",
    ...["if=/dev/zero", `of=${path}`, "bs=4M", `count=${sizeMiB / 4}`],
    ...["oflag=direct", "conv=notrunc", "status=none"],
  );
  return path;
}

function recipes(plan: Plan, { target, contenders }: Group): Recipe[] {
  const isNull = target === "null";
  const file = (name: string) => () => makeFile(name, plan.fileMiB);
  const ubd = (name: string, command: string[], ...options: string[]): Recipe => ({
    name,
    make: server(command, () => [...options, ...(isNull ? ["null"] : ["loop", file(name)()])]),
  });
  const kublk = (name: string, ...options: string[]): Recipe => ({
    name,
    make: server(KUBLK, () => ["-t", target, ...options, ...(isNull ? [] : [file(name)()])]),
  });
  // Its `add` wants the target before the options.
  const rublk = (name: string, ...options: string[]): Recipe => ({
    name,
    make(id, queues) {
      const backing = isNull ? [] : ["-f", file(name)()];
      const make = ["add", target, "-n", `${id}`, "-q", `${queues}`, "-d", `${DEPTH}`];
      call(RUBLK, ...make, ...options, ...backing);
      return { path: `/dev/ublkb${id}`, pid: serverPid(id), remove: () => removeUblk(id) };
    },
  });
  const has = (program: Plan["programs"][number], own: Recipe[]) =>
    plan.programs.includes(program) ? own : [];
  const all: Recipe[] = [
    ubd("ubd", UBD),
    ...(isNull
      ? [ubd("ubd, zero copy", UBD, "-z"), ubd("ubd on Deno", UBD_ON_DENO)]
      : [ubd("ubd, copying", UBD, "--zero-copy=off", "--max-io-size", "1M")]),
    ...has("kublk", [kublk("kublk"), kublk("kublk, zero copy", "--auto_zc")]),
    ...has("rublk", [rublk("rublk"), rublk("rublk, zero copy", "-z")]),
    ...has("qemu-nbd", [{
      name: "qemu-nbd",
      make: isNull
        ? qemuNbd(() => ["--image-opts", `driver=null-co,size=${NULL_GIB}G,read-zeroes=off`])
        : qemuNbd(() => ["--format=raw", "--cache=none", "--aio=io_uring", file("qemu-nbd")()]),
    }]),
    ...(isNull ? [{ name: "null_blk", make: nullBlock() }] : [
      { name: "kernel, direct", make: kernelLoop("on", file("direct")) },
      { name: "kernel, buffered", make: kernelLoop("off", file("buffered")) },
    ]),
  ];
  return all.filter(({ name }) => !contenders || contenders.includes(name));
}

function prepare(recipe: Recipe, group: Group, id: number): Device {
  const { name } = recipe;
  say(`making ${group.name}: ${name}`);
  const made = recipe.make(id, group.queues);
  // udev and the kernel choose a scheduler by the driver; here all get the same, none.
  writeFileSync(`/sys/class/block/${made.path.slice("/dev/".length)}/queue/scheduler`, "none");
  return { contender: { group: group.name, name }, ...made };
}

function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

/** User and system time of a process and its threads so far. */
function cpuSeconds(pid: number): number {
  const text = readFileSync(`/proc/${pid}/stat`, "utf8");
  // The command name, in parentheses, may hold spaces; fields 14 and 15 are utime and stime.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

/** Processor time of each thread in ms, without ticks: for a process that does next to nothing. */
function threadsCpuMs(pid: number): Map<string, number> {
  return new Map(
    readdirSync(`/proc/${pid}/task`).map((tid) => {
      const [onCpuNs] = readFileSync(`/proc/${pid}/task/${tid}/schedstat`, "utf8").split(" ");
      return [tid, Number(onCpuNs) / 1e6];
    }),
  );
}

function sysfs(path: string, attribute: string): string {
  return readFileSync(`/sys/class/block/${path.slice("/dev/".length)}/${attribute}`, "utf8").trim();
}

/** Bytes that the device has read and written so far. */
function transferred(path: string): number {
  const fields = sysfs(path, "stat").split(/\s+/).map(Number);
  return (fields[2]! + fields[6]!) * 512;
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
  const { pattern, jobs: count = 1 } = load;
  const output = run(
    "fio",
    ...["--name=bench", `--filename=${path}`, `--rw=${pattern}`, `--bs=${load.blockBytes}`],
    ...[`--iodepth=${load.depth}`, "--ioengine=io_uring", "--direct=1", "--time_based"],
    ...[`--numjobs=${count}`, "--group_reporting", "--unified_rw_reporting=1"],
    ...[`--runtime=${Math.round(seconds * 1000)}ms`, `--ramp_time=${rampSeconds * 1000}ms`],
    ...["--randrepeat=1", "--norandommap", "--output-format=json"],
  );
  // Warnings come before the answer.
  const { jobs } = JSON.parse(output.slice(output.search(/^\{/m))) as {
    jobs: (FioJob & { mixed?: FioDirection })[];
  };
  const job = jobs[0]!;
  if (job.error !== 0) throw new Error(`fio failed: error ${job.error}`);
  const direction = job.mixed ?? job.read;
  if (!(direction.total_ios > 0)) throw new Error("fio completed no request");
  return direction;
}

function measure(plan: Plan, load: Case, device: Device, repeat: number): Measurement {
  const { pid, path, contender } = device;
  run("sync"); // What the last one left in the page cache is not this one's to write.
  const cpuBefore = pid ? cpuSeconds(pid) : 0;
  const before = transferred(path);
  const direction = fio(load, path, plan.seconds, plan.rampSeconds);
  // fio's, however the driver splits them; ramp included on both sides of the division.
  const served = (transferred(path) - before) / load.blockBytes;
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
    requestKiBMax: Number(sysfs(path, "queue/max_sectors_kb")),
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

/** Does a contender's work; what goes wrong is written down. */
function attempt<T>(
  report: Report,
  { group, name }: Contender,
  load: string | undefined,
  work: () => T,
): T | undefined {
  try {
    return work();
  } catch (error) {
    const list = error instanceof Refusal ? report.absent : report.failures;
    const message = (error as Error).message;
    list.push({ group, name, ...(load !== undefined && { case: load }), message });
    say(`${group}: ${name}: ${message}`);
    return undefined;
  }
}

function measureGroup(plan: Plan, group: Group, report: Report): void {
  const own = recipes(plan, group);
  const contender = ({ name }: Recipe) => ({ group: group.name, name });
  const devices = own
    .map((recipe, id) =>
      attempt(report, contender(recipe), undefined, () => prepare(recipe, group, id))
    )
    .filter((device) => device !== undefined);
  if (plan.warmUpSeconds > 0) {
    for (const { path, contender } of devices.filter(({ pid }) => pid !== undefined)) {
      say(`warming ${contender.group}: ${contender.name}`);
      for (const [load, share] of [[WARM_UP, 1], [FILL, FILL_SHARE]] as const) {
        attempt(report, contender, load.name, () => fio(load, path, plan.warmUpSeconds * share, 0));
      }
    }
  }
  const total = plan.repeats * group.cases.length * devices.length;
  let count = 0;
  for (let repeat = 0; repeat < plan.repeats; repeat++) {
    for (const load of group.cases) {
      for (const device of inTurn(devices, repeat)) {
        const { contender } = device;
        const result = attempt(
          report,
          contender,
          load.name,
          () => measure(plan, load, device, repeat),
        );
        if (result) report.measurements.push(result);
        const iops = result ? `${Math.round(result.iops)} IOPS` : "FAILED";
        say(`${++count}/${total} ${contender.group}: ${contender.name}, ${load.name}: ${iops}`);
      }
    }
  }
  for (const { contender, remove } of devices) attempt(report, contender, "removal", remove);
  run("sh", "-c", "rm -f /scratch/*.img");
}

/** Fields of smaps_rollup, in MiB. */
function memory(pid: number): { rssMiB: number; pssMiB: number } {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  const field = (name: string) =>
    Number(text.match(new RegExp(`^${name}:\\s+(\\d+) kB`, "m"))![1]) * 1024 / MIB;
  return { rssMiB: field("Rss"), pssMiB: field("Pss") };
}

/** The ublk servers whose cost at rest and at the start is compared, serving null. */
function starters(plan: Plan): { name: string; command: (id: number) => string[] }[] {
  const has = (program: Plan["programs"][number]) => plan.programs.includes(program);
  const quick = plan.starts === 1;
  return [
    { name: "ubd", command: (id) => [...UBD, "add", "-n", `${id}`, "null"] },
    ...(quick ? [] : [{
      name: "ubd on Deno",
      command: (id: number) => [...UBD_ON_DENO, "add", "-n", `${id}`, "null"],
    }]),
    ...(has("kublk")
      ? [{
        name: "kublk",
        command: (id: number) => [...KUBLK, "add", "-t", "null", "-q", "1", "-n", `${id}`],
      }]
      : []),
    ...(has("rublk")
      ? [{ name: "rublk", command: (id: number) => [...RUBLK, "add", "null", "-n", `${id}`] }]
      : []),
  ];
}

async function measureIdle(plan: Plan, report: Report): Promise<void> {
  for (const { name, command } of starters(plan)) {
    for (const devices of name === "ubd" ? plan.idleDevices : [1]) {
      say(`idle: ${devices} x ${name}`);
      const ids = Array.from({ length: devices }, (_, id) => id);
      const made: number[] = [];
      try {
        for (const id of ids) {
          call(command(id));
          made.push(id);
        }
        // What a runtime does after its start is not the cost of having nothing to do. V8 compiles
        // and collects for half a minute of an emulated processor.
        await sleep(settleSeconds(plan) * 1000);
        const pids = ids.map(serverPid);
        const before = pids.map(threadsCpuMs);
        const startMs = performance.now();
        await sleep(plan.idleSeconds * 1000);
        // A thread that has ended takes its count along: what it did since is not known.
        const used = pids.flatMap((pid, index) =>
          [...threadsCpuMs(pid)].map(([tid, cpuMs]) => cpuMs - (before[index]!.get(tid) ?? 0))
        ).reduce((sum, cpuMs) => sum + cpuMs, 0);
        const passedS = (performance.now() - startMs) / 1000;
        const memories = pids.map(memory);
        const mean = (of: (it: typeof memories[number]) => number) =>
          memories.reduce((sum, it) => sum + of(it), 0) / devices;
        report.idle.push({
          name,
          devices,
          cpuMsPerSecond: used / passedS,
          rssMiB: mean((it) => it.rssMiB),
          pssMiB: mean((it) => it.pssMiB),
        });
      } catch (error) {
        const message = (error as Error).message;
        report.failures.push({ group: "idle", name: `${devices} x ${name}`, message });
      }
      for (const id of made) {
        attempt(report, { group: "idle", name }, "removal", () => removeUblk(id));
      }
    }
  }
}

/** Starts a program and tells when it has ended, and when each of `paths` appeared. */
async function timeline(
  [program, ...args]: string[],
  paths: Record<string, string>,
): Promise<Record<string, number>> {
  const startMs = performance.now();
  const child = spawn(program!, args, { stdio: "ignore", env: ENV });
  const exited = once(child, "exit");
  let ended = false;
  exited.finally(() => ended = true).catch(() => {});
  const steps: Record<string, number> = {};
  for (const [step, path] of Object.entries(paths)) {
    while (!ended && !existsSync(path)) await sleep(1);
    steps[step] = performance.now() - startMs;
  }
  const [code] = await exited as [number];
  steps["program ended"] = performance.now() - startMs;
  if (code !== 0) throw new Error(`${program} ended with ${code}`);
  return steps;
}

async function measureStarts(plan: Plan, report: Report): Promise<void> {
  const id = 0;
  const adds = starters(plan).map(({ name, command }) => ({
    name: `${name} add`,
    command: command(id),
    paths: { "ublkc there": `/dev/ublkc${id}`, "ublkb there": `/dev/ublkb${id}` },
  }));
  const parts = [
    { name: "ubd version", command: [...UBD, "version"], paths: {} },
    { name: "ubd features", command: [...UBD, "features"], paths: {} },
  ];
  // A round before the first that counts fills the page cache with the programs.
  for (let repeat = plan.starts > 1 ? -1 : 0; repeat < plan.starts; repeat++) {
    for (const { name, command, paths } of inTurn([...parts, ...adds], Math.max(0, repeat))) {
      say(`start: ${name}`);
      try {
        const steps = await timeline(command, paths);
        if (repeat >= 0) report.starts.push({ name, repeat, steps });
        if (name.endsWith(" add")) removeUblk(id);
      } catch (error) {
        report.failures.push({ group: "start", name, message: (error as Error).message });
      }
    }
  }
}

async function main(): Promise<void> {
  const plan = JSON.parse(readFileSync(`${RESULTS}/${PLAN_FILE}`, "utf8")) as Plan;
  const report: Report = {
    versions: versions(),
    measurements: [],
    idle: [],
    starts: [],
    absent: [],
    failures: [],
  };
  // A disk's time is none of the guest's instructions.
  if (plan.instructionClock) run("mount", "-t", "tmpfs", "tmpfs", "/scratch");
  if (plan.starts > 0) await measureStarts(plan, report);
  if (plan.idleDevices.length > 0) await measureIdle(plan, report);
  for (const group of plan.groups) measureGroup(plan, group, report);
  writeFileSync(`${RESULTS}/${REPORT_FILE}`, Buffer.from(JSON.stringify(report)));
}

await main();
