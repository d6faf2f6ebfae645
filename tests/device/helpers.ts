// SPDX-License-Identifier: MIT
/**
 * What device tests share: a scene for each test, which cleans up and then looks for leftovers.
 *
 * Used by tests/device/*_test.ts, which run as root on a kernel with ublk_drv: normally in a guest
 * of tools/vm.ts, by `bun test`. They drive the tool `ubd` in PATH, the nodes in /dev, and files
 * below /scratch. Invariants:
 * - a test that cannot run here is skipped with a reason that is known before it starts;
 * - every test has a time limit, after which what it started is killed;
 * - after every test: no device, state file or server is left, and the kernel did not complain.
 *
 * Environment: UBD_RUNNER (bun, deno or binary) says what `ubd` is, UBD_KERNEL (newest, 6.12
 * or 6.1) which kernel this is, UBD_SCALE (small or full) how often a thing is repeated.
 * @module
 */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { type ChildProcess, spawn } from "node:child_process";
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

export { sleep };

/** What `ubd` in PATH runs. */
export const RUNNER = process.env.UBD_RUNNER ?? "binary";

/** The guest's kernel, as tools/vm.ts calls it. */
export const KERNEL = process.env.UBD_KERNEL ?? "newest";

/** Why a test that quiesces, upgrades or watches cannot run here; false where it can. */
export const NO_QUIESCE = KERNEL !== "newest" && "QUIESCE_DEV needs Linux 6.16";

/** The same of one that adds a device whose partitions nobody looks for. */
export const NO_PARTSCAN = KERNEL !== "newest" && "NO_AUTO_PART_SCAN needs Linux 7.0";

/** Number of repetitions, or whatever else depends on UBD_SCALE. */
export function scaled<T>(small: T, full: T): T {
  return process.env.UBD_SCALE === "full" ? full : small;
}

export const FULL = scaled(false, true);

/** Ways of a request's data, other than the default: options of add, and what is noted of them. */
export const DATA_MODES: readonly { flags: readonly string[]; note: string }[] = [
  { flags: ["-g", "1"], note: "get data" },
  { flags: ["--user-copy"], note: "user copy" },
  ...KERNEL === "newest"
    ? [
      { flags: ["--batch"], note: "batches" },
      ...scaled([], [{ flags: ["--batch", "--user-copy"], note: "user copy, batches" }]),
    ]
    : [],
];

const SCRATCH = existsSync("/scratch") ? "/scratch" : tmpdir();
const CHAR_CLASS = "/sys/class/ublk-char";
const STATE_DIRECTORY = "/run/ubd";
const COMPLAINT = /WARNING:|BUG:|Oops|hung task|blocked for more than|Call Trace/;

/**
 * With zero copy, once after boot: 7.2's io_buffer_register_bvec fills an array before it sets the
 * count that the compiler's bounds check compares with. Nothing is out of bounds.
 */
const FALSE_ALARM = /UBSAN: array-index-out-of-bounds in \S*io_uring\/rsrc\.c/;
/** Lines between the alarm and its "Call Trace". */
const ALARM_LINES = 8;

/** Everything is slow under emulation on a busy machine; nothing here measures speed. */
const COMMAND_LIMIT_MS = 120_000;
const SETTLE_LIMIT_MS = 15_000;

/** Why no device test can run here; false when they can. */
export const cannotRun: string | false = process.getuid?.() !== 0
  ? "needs root"
  : !existsSync("/dev/ublk-control")
  ? "needs the driver: /dev/ublk-control is absent"
  : !inPath("ubd")
  ? "needs ubd in PATH"
  : false;

function inPath(program: string): boolean {
  return (process.env.PATH ?? "").split(":").some((directory) => {
    try {
      accessSync(join(directory, program), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** How a process ended. */
export interface Outcome {
  /** Exit code; 128 + 15 and the like for a signal. */
  code: number;
  stdout: string;
  stderr: string;
}

/** A process that a test started. */
export interface Job {
  pid: number;
  ended: Promise<Outcome>;
  /** Signals the process and its children. */
  kill(signal: NodeJS.Signals): void;
  /** What came on stdout and stderr so far. */
  output(): string;
}

export interface JobOptions {
  cwd?: string;
  env?: Record<string, string>;
  limitMs?: number;
}

/** Whether a server in the foreground has told all of its device: the streams have no order. */
export function isTold(job: Job): boolean {
  return / is live: /.test(job.output()) && /^dev id /m.test(job.output());
}

/** A device as `ubd add` told it. */
export interface Added {
  id: number;
  /** /dev/ublkbN. */
  path: string;
  /** Name in /sys/block. */
  name: string;
  /** The server. */
  pid: number;
  queues: number;
  depth: number;
  stdout: string;
  stderr: string;
}

/**
 * Declares a test with a scene of its own.
 *
 * @param options.limitS how long the body may take; 180 unless given.
 * @param options.everywhere also as Bun and Deno from source, on all kernels; or as Deno on the
 * newest, since the executable is Bun's. The others run so at full scale only, because a guest is
 * slow and most of what they test does not depend on the runtime.
 * @param options.anyKernel does not depend on the kernel: older ones run it at full scale only.
 * @param options.oldest also on 6.1, which lacks most features; nothing else runs there.
 * @param options.skip another reason not to run.
 */
export function deviceTest(
  name: string,
  options: {
    limitS?: number;
    everywhere?: boolean | "deno";
    anyKernel?: boolean;
    oldest?: boolean;
    skip?: string | false;
  },
  body: (scene: Scene) => Promise<void>,
): void {
  const limitMs = (options.limitS ?? 180) * 1000;
  const onDeno = KERNEL === "newest" && RUNNER === "deno";
  const here = options.everywhere === true || options.everywhere === "deno" && onDeno;
  const elsewhere = !here && !FULL && RUNNER !== "binary" &&
    "at small scale, only as the executable";
  const oldest = KERNEL === "6.1" && !options.oldest && "not on Linux 6.1";
  const older = options.anyKernel && !options.oldest && !FULL && KERNEL !== "newest" &&
    "at small scale, only on the newest kernel";
  const skip = cannotRun || options.skip || elsewhere || oldest || older || false;
  // The outer limit is for the cleaning up; it must not strike first.
  test(name, { skip, timeout: limitMs + 120_000 }, async () => {
    const scene = new Scene();
    const timer = new AbortController();
    const late = sleep(limitMs, undefined, { signal: timer.signal }).then(
      () => Promise.reject(new Error(`not done after ${limitMs / 1000} s`)),
      () => {},
    );
    let failure: unknown;
    try {
      await Promise.race([body(scene), late]);
    } catch (error) {
      failure = error ?? new Error("failed without an error");
    }
    timer.abort();
    const problems = await scene.end(failure !== undefined);
    if (failure !== undefined) {
      for (const problem of problems) console.error(`  also: ${problem}`);
      throw failure;
    }
    assert.deepEqual(problems, []);
  });
}

/** What a test works with. Everything it starts, adds or mounts is gone when it ends. */
export class Scene {
  /** Empty directory of this test. */
  readonly directory = mkdtempSync(join(SCRATCH, "test-"));
  readonly #before = traces();
  readonly #jobs = new Set<Job>();
  readonly #devices = new Set<number>();
  readonly #undo: (() => Promise<unknown>)[] = [];
  readonly #kernel = new KernelLog();

  /** Starts a process in its own group. */
  start(command: string[], options: JobOptions = {}): Job {
    const child = spawn(command[0]!, command.slice(1), {
      cwd: options.cwd ?? this.directory,
      env: { ...process.env, ...options.env },
      stdio: ["ignore", "pipe", "pipe"],
      detached: true,
    });
    const job = jobOf(child, command, options.limitMs ?? COMMAND_LIMIT_MS);
    this.#jobs.add(job);
    job.ended.finally(() => this.#jobs.delete(job)).catch(() => {});
    return job;
  }

  /** Runs a process to its end. Any exit code will do. */
  run(command: string[], options: JobOptions = {}): Promise<Outcome> {
    return this.start(command, options).ended;
  }

  /** Runs a script of bash, which must succeed. @returns its stdout without the last newline. */
  async sh(script: string, options: JobOptions = {}): Promise<string> {
    const outcome = await this.run(["bash", "-euo", "pipefail", "-c", script], options);
    assert.equal(outcome.code, 0, `${script}\nfailed: ${outcome.stderr}${outcome.stdout}`);
    return outcome.stdout.trimEnd();
  }

  /** Runs `ubd`. Any exit code will do. */
  ubd(...args: string[]): Promise<Outcome> {
    return this.run(["ubd", ...args]);
  }

  /** `ubd add`, which must succeed. The device is deleted when the test ends, if not before. */
  async add(...args: string[]): Promise<Added> {
    const { code, stdout, stderr } = await this.ubd("add", ...args);
    assert.equal(code, 0, `ubd add ${args.join(" ")}: code ${code}, ${stderr}`);
    return this.adopt(stdout, stderr);
  }

  /** Takes on a device from the dump that some `ubd add` printed. */
  adopt(stdout: string, stderr = ""): Added {
    const number = (pattern: RegExp) => {
      const match = pattern.exec(stdout);
      assert.ok(match, `${pattern} in: ${stdout}`);
      return Number(match[1]);
    };
    const id = number(/^dev id (\d+):/m);
    this.#devices.add(id);
    return {
      id,
      path: `/dev/ublkb${id}`,
      name: `ublkb${id}`,
      pid: number(/daemon pid (\d+)/),
      queues: number(/nr_hw_queues (\d+)/),
      depth: number(/queue_depth (\d+)/),
      stdout,
      stderr,
    };
  }

  /** `ubd del`, which must succeed; nothing of the devices may be left when it ends. */
  async del(...devices: Added[]): Promise<void> {
    await this.#del([], devices);
  }

  /** The same for a device in use. */
  async delForced(...devices: Added[]): Promise<void> {
    await this.#del(["--force"], devices);
  }

  async #del(flags: string[], devices: Added[]): Promise<void> {
    const { code, stderr } = await this.ubd("del", ...flags, ...devices.map(({ id }) => `${id}`));
    assert.equal(code, 0, stderr);
    for (const device of devices) {
      this.#devices.delete(device.id);
      await gone(device);
    }
  }

  /** The test has seen to it, or expects, that this device is gone. */
  forget(device: Added): void {
    this.#devices.delete(device.id);
  }

  /** Makes a sparse file. @returns its path. */
  image(name: string, bytes: number): string {
    const path = join(this.directory, name);
    writeFileSync(path, "");
    truncateSync(path, bytes);
    return path;
  }

  /** Mounts, and unmounts when the test ends. @returns the mount point. */
  async mount(name: string, ...args: string[]): Promise<string> {
    const point = join(this.directory, name);
    mkdirSync(point, { recursive: true });
    await this.sh(`mount ${args.join(" ")} ${point}`);
    return point;
  }

  /** Binds a file to a device of the kernel's loop driver, until the test ends. */
  async losetup(...args: string[]): Promise<string> {
    const path = await this.sh(`losetup --find --show ${args.join(" ")}`);
    this.finally(() => this.run(["losetup", "-d", path]));
    return path;
  }

  /** Runs when the test ends, last one first, before the devices are deleted. */
  finally(undo: () => Promise<unknown>): void {
    this.#undo.push(undo);
  }

  /** Lines of the kernel's log since the last call, or since the test began. */
  kernelLines(): string[] {
    return this.#kernel.read();
  }

  /** A test that failed may have left mounts, and they keep devices from going. */
  async #unmountAll(): Promise<void> {
    const points = readFileSync("/proc/self/mountinfo", "utf8").split("\n")
      .map((line) => line.split(" ")[4]!).filter((point) => point?.startsWith(this.directory));
    for (const point of points.reverse()) await this.run(["umount", point]);
  }

  /** Cleans up. @returns what the test, or the tool, did wrong besides. */
  async end(failed: boolean): Promise<string[]> {
    const problems: string[] = [];
    for (const job of this.#jobs) {
      if (!failed) problems.push(`still running: process ${job.pid}`);
      job.kill("SIGKILL");
    }
    await this.#unmountAll();
    for (const undo of this.#undo.reverse()) await undo();
    if (this.#devices.size > 0) {
      const ids = [...this.#devices].map((id) => `${id}`);
      const { code, stderr } = await this.ubd("del", "--force", ...ids);
      if (code !== 0) problems.push(`ubd del ${ids.join(" ")}: code ${code}, ${stderr.trim()}`);
    }
    const left = () => traces().filter((trace) => !this.#before.includes(trace));
    if (!await until(() => left().length === 0)) {
      problems.push(...left().map((trace) => `left behind: ${trace}`));
      await removeTraces(this, left());
    }
    const lines = this.#kernel.end();
    const complaints = lines.filter((line, at) =>
      COMPLAINT.test(line) &&
      !lines.slice(Math.max(0, at - ALARM_LINES), at).some((before) => FALSE_ALARM.test(before))
    );
    problems.push(...complaints.map((line) => `the kernel says: ${line}`));
    // What is still mounted below it must not be emptied.
    if (!readFileSync("/proc/self/mountinfo", "utf8").includes(this.directory)) {
      rmSync(this.directory, { recursive: true, force: true });
    }
    return problems;
  }
}

function jobOf(child: ChildProcess, command: string[], limitMs: number): Job {
  const chunks: { stdout: Buffer[]; stderr: Buffer[] } = { stdout: [], stderr: [] };
  for (const stream of ["stdout", "stderr"] as const) {
    child[stream]!.on("data", (chunk: Buffer) => chunks[stream].push(chunk));
  }
  const text = (stream: "stdout" | "stderr") => Buffer.concat(chunks[stream]).toString();
  const kill = (signal: NodeJS.Signals) => {
    try {
      process.kill(-child.pid!, signal);
    } catch { /* it has ended */ }
  };
  const ended = new Promise<Outcome>((resolve, reject) => {
    const timer = setTimeout(() => {
      kill("SIGKILL");
      const said = `${text("stdout")}${text("stderr")}`;
      reject(new Error(`${command.join(" ")}: no end after ${limitMs / 1000} s\n${said}`));
    }, limitMs);
    child.on("error", (error) => {
      clearTimeout(timer);
      reject(error);
    });
    child.on("close", (code, signal) => {
      clearTimeout(timer);
      const stderr = text("stderr") + (signal ? `\n(${signal})` : "");
      resolve({ code: code ?? 128, stdout: text("stdout"), stderr });
    });
  });
  ended.catch(() => {});
  return { pid: child.pid ?? -1, ended, kill, output: () => text("stdout") + text("stderr") };
}

/** New lines of /dev/kmsg. */
class KernelLog {
  readonly #fd = openSync("/dev/kmsg", constants.O_RDONLY | constants.O_NONBLOCK);
  readonly #all: string[] = [];
  #told = 0;

  constructor() {
    this.#drain();
    this.#told = this.#all.length = 0;
  }

  read(): string[] {
    this.#drain();
    const lines = this.#all.slice(this.#told);
    this.#told = this.#all.length;
    return lines;
  }

  /** @returns every line since the start. */
  end(): string[] {
    this.#drain();
    closeSync(this.#fd);
    return this.#all;
  }

  #drain(): void {
    const record = Buffer.alloc(16384);
    for (;;) {
      try {
        const text = record.toString("utf8", 0, readSync(this.#fd, record));
        this.#all.push(text.slice(text.indexOf(";") + 1).split("\n")[0]!);
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException;
        if (code !== "EPIPE") return; // EPIPE: records were overwritten before they were read.
      }
    }
  }
}

/** Everything that devices leave in the system, by path. */
function traces(): string[] {
  const list = (directory: string, pattern: RegExp) => {
    try {
      return readdirSync(directory).filter((name) => pattern.test(name))
        .map((name) => join(directory, name));
    } catch {
      return [];
    }
  };
  return [
    ...list("/dev", /^ublk[bc]\d/),
    ...list(CHAR_CLASS, /^ublkc/),
    ...list(STATE_DIRECTORY, /^\d+\.(json|log)$|^\.(\d+|log)\.\d+$/),
    ...servers().map((pid) => `/proc/${pid}`),
  ];
}

/** Ids of the processes that serve a device. */
export function servers(): number[] {
  return readdirSync("/proc").filter((name) => /^\d+$/.test(name)).map(Number).filter(isServer);
}

function isServer(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").includes("__serve");
  } catch {
    return false;
  }
}

/** So that one failure does not make every later test fail. */
async function removeTraces(scene: Scene, left: string[]): Promise<void> {
  for (const path of left) {
    const pid = /^\/proc\/(\d+)$/.exec(path)?.[1];
    if (pid && servers().includes(Number(pid))) process.kill(Number(pid), "SIGKILL");
  }
  const ids = left.map((path) => /\/ublkc(\d+)$/.exec(path)?.[1]).filter((id) => id !== undefined);
  for (const id of new Set(ids)) await scene.ubd("del", "--force", id);
  for (const path of left) {
    if (path.startsWith(STATE_DIRECTORY)) rmSync(path, { force: true });
  }
}

/** Waits until the condition holds. @returns whether it ever did. */
export async function until(
  holds: () => boolean | Promise<boolean>,
  limitMs = SETTLE_LIMIT_MS,
): Promise<boolean> {
  for (const start = performance.now(); !await holds();) {
    if (performance.now() - start > limitMs) return false;
    await sleep(50);
  }
  return true;
}

/** The device, its state file and its server are no more, or will not be in a moment. */
export async function gone({ id, path, pid }: Added, limitMs?: number): Promise<void> {
  const traces = [path, `/dev/ublkc${id}`, `${CHAR_CLASS}/ublkc${id}`, statePath(id)];
  const left = () => [
    ...traces.filter((trace) => existsSync(trace)),
    ...(isServer(pid) ? [`process ${pid}`] : []),
  ];
  await until(() => left().length === 0, limitMs);
  assert.deepEqual(left(), [], `left of device ${id}`);
}

export function statePath(id: number): string {
  return join(STATE_DIRECTORY, `${id}.json`);
}

/** Kills the server as nothing can prevent it, and waits until `ubd list` has noticed. */
export async function killServer(scene: Scene, device: Added): Promise<void> {
  process.kill(device.pid, "SIGKILL");
  await until(() => !isServer(device.pid));
  let told = "";
  const dead = async () => {
    told = (await scene.ubd("list", "-n", `${device.id}`)).stdout;
    return told.startsWith(`dev id ${device.id}:`) && / state DEAD\n/.test(told);
  };
  assert.ok(await until(dead, 60_000), `not DEAD: ${told}`);
}

/** Runs all rounds, two at a time: a guest has two processors. */
export async function inPairs(
  rounds: number,
  run: (round: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < rounds) await run(next++);
  };
  await Promise.all([worker(), worker()]);
}

/** A fio that writes a part of a device, or a file, and verifies all of it, again and again. */
export interface Verifier {
  /** @throws {AssertionError} it has ended: fio saw an error. */
  goesOn(): void;
  /** Lets the round that is under way come to its end, which must be a good one. */
  finish(): Promise<void>;
}

/** @param depth of fio's queue. */
export function startVerifier(
  scene: Scene,
  { path }: Pick<Added, "path">,
  depth: number,
): Verifier {
  // Not time_based: when its time is over, fio skips the verification.
  const fio = "fio --max-jobs=2 --name=verify --direct=1 --ioengine=libaio --rw=randwrite " +
    `--bs=4k --size=8M --filename=${path} --iodepth=${depth} --verify=crc32c --verify_fatal=1`;
  const stop = join(scene.directory, "stop-verifying");
  const script = `until [ -e ${stop} ]; do ${fio} --randseed=$RANDOM; done`;
  const job = scene.start(["bash", "-euc", script], { limitMs: 2_400_000 });
  let running = true;
  job.ended.finally(() => running = false).catch(() => {});
  return {
    goesOn: () => assert.ok(running, job.output()),
    async finish() {
      writeFileSync(stop, "");
      const { code, stdout, stderr } = await job.ended;
      assert.equal(code, 0, stdout + stderr);
    },
  };
}

/** The numbers of /sys/block/NAME/stat: 0 reads, 4 writes, 11 discards, 15 flushes. */
export function blockStat({ name }: Added): number[] {
  return readFileSync(`/sys/block/${name}/stat`, "utf8").trim().split(/\s+/).map(Number);
}

/** A setting in /sys/block/NAME/queue. */
export function queueSetting({ name }: Added, setting: string): string {
  return readFileSync(`/sys/block/${name}/queue/${setting}`, "utf8").trim();
}

/** 512-byte blocks that a file occupies. */
export async function allocated(scene: Scene, path: string): Promise<number> {
  return Number(await scene.sh(`sync ${path}; stat -c %b ${path}`));
}
