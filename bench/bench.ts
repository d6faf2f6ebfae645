// SPDX-License-Identifier: MIT
/**
 * Measures ubd against other ublk servers and the kernel's drivers: `npm run bench`.
 *
 * Host side: builds what takes part, measures the queue loop natively (ring.ts), boots the guest
 * for the rest (guest.ts), prints the tables. plan.ts says what is measured and by whom. Absolute
 * numbers of the guest are those of an emulated processor unless the host has KVM; the ratios are
 * what to look at, and a range as wide as a difference means there is none.
 *
 * Exit status: 1 when a contender failed to run, never for being slow.
 */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statfsSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { freemem, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { build } from "../tools/build.ts";
import { run } from "../tools/run.ts";
import { runInGuest } from "../tools/vm.ts";
import { drawReport } from "./chart.ts";
import { type Plan, PLAN_FILE, PRESETS, type Report, REPORT_FILE, settleSeconds } from "./plan.ts";
import { providePrograms } from "./programs.ts";
import { measureRing } from "./ring.ts";
import { formatReport } from "./table.ts";

const ROOT = join(import.meta.dirname!, "..");
const DOCS = join(ROOT, "docs/benchmarks");

/** What goes into dist/ubd. */
const SOURCES = ["abi", "cli", "core", "ffi", "shim", "targets"];

/** More contenders than this would be a mistake in the estimate of a guest's time only. */
const CONTENDERS_MAX = 12;

/** Where the host has files in memory. */
const MEMORY = "/dev/shm";

/** Starting and ending fio, or a server, in an emulated guest. */
const PROGRAM_S = 15;

const USAGE = `Usage: bench [options]

Measures ubd against kublk, rublk, qemu-nbd, the kernel's loop driver and null_blk, in a guest;
and the queue loop against the same loop in C, on this machine.

  --quick       a minute: shows that all of it runs, measures little
  --full        hours: every case, one and two queues, up to 64 idle devices
  --instructions
                half an hour: in a guest whose clock counts instructions, not time, so that nothing
                else on this machine matters
  --only PART   ring (on this machine) or guest
  --repeats N   how often each measurement is made
  --seconds S   length of one measurement
  --write       put tables, chart and measurements into docs/benchmarks/
  --json FILE   write all measurements there
  --help        show this text
`;

interface Options {
  plan: Plan;
  ring: boolean;
  guest: boolean;
  write: boolean;
  json: string | undefined;
}

function parseCommandLine(args: string[]): Options | undefined {
  const { values } = parseArgs({
    args,
    options: {
      quick: { type: "boolean", default: false },
      full: { type: "boolean", default: false },
      instructions: { type: "boolean", default: false },
      only: { type: "string" },
      repeats: { type: "string" },
      seconds: { type: "string" },
      write: { type: "boolean", default: false },
      json: { type: "string" },
      help: { type: "boolean", default: false },
    },
  });
  if (values.help) return undefined;
  const count = (name: "repeats" | "seconds", preset: number) => {
    const value = values[name];
    if (value === undefined) return preset;
    if (/^[1-9]\d{0,3}$/.test(value)) return Number(value);
    throw new RangeError(`--${name} must be a whole number above 0, not ${value}`);
  };
  const { only } = values;
  if (only !== undefined && only !== "ring" && only !== "guest") {
    throw new RangeError(`--only must be ring or guest, not ${only}`);
  }
  const sizes = (["quick", "full", "instructions"] as const).filter((size) => values[size]);
  if (sizes.length > 1) throw new RangeError(`--${sizes.join(" and --")} exclude each other`);
  const preset: Plan = PRESETS[sizes[0] ?? "default"];
  if (only === "ring" && preset.ringDepths.length === 0) {
    throw new RangeError("--only ring has nothing to measure with --instructions: leave out one");
  }
  return {
    plan: {
      ...preset,
      repeats: count("repeats", preset.repeats),
      seconds: count("seconds", preset.seconds),
    },
    ring: only !== "guest" && preset.ringDepths.length > 0,
    guest: only !== "ring",
    write: values.write,
    json: values.json,
  };
}

/** Builds shim and dist/ubd when older than their sources: another guest may be running them. */
async function ensureBuilt(): Promise<void> {
  const binary = join(ROOT, "dist/ubd");
  const files = SOURCES.flatMap((directory) =>
    readdirSync(join(ROOT, directory)).map((it) => join(ROOT, directory, it))
  );
  const newestMs = Math.max(...files.map((it) => statSync(it).mtimeMs));
  if (!existsSync(binary) || statSync(binary).mtimeMs < newestMs) await build();
}

/** A guest that takes longer than this hangs. */
function guestTimeoutS(plan: Plan): number {
  const measurements = plan.groups.reduce((sum, { cases }) => sum + cases.length, 0) *
    plan.repeats * CONTENDERS_MAX;
  const devices = plan.idleDevices.reduce((sum, it) => sum + it, 3);
  const programs = measurements + 2 * devices + 8 * (plan.starts + 1) +
    plan.groups.length * CONTENDERS_MAX;
  return 120 + programs * PROGRAM_S + measurements * (plan.seconds + plan.rampSeconds) +
    plan.groups.length * CONTENDERS_MAX * plan.warmUpSeconds +
    (plan.idleDevices.length + 3) * (settleSeconds(plan) + plan.idleSeconds);
}

/** Whether the loop's files fit into the host's memory, where no other writer is in their way. */
function fitsInMemory(plan: Plan): boolean {
  if (!existsSync(MEMORY)) return false;
  const { bavail, bsize } = statfsSync(MEMORY);
  const neededMiB = CONTENDERS_MAX * plan.fileMiB;
  const freeMiB = Math.min(bavail * bsize, freemem()) / 1024 ** 2;
  return freeMiB > neededMiB + plan.guestMemoryMiB;
}

async function measureInGuest(plan: Plan, directory: string): Promise<Report> {
  const { versions, present } = await providePrograms(plan.programs, directory);
  writeFileSync(join(directory, PLAN_FILE), JSON.stringify({ ...plan, programs: present }));
  const inMemory = fitsInMemory(plan);
  const result = await runInGuest({
    command: "bun /ubd/bench/guest.ts",
    ...(inMemory && { scratchDirectory: MEMORY }),
    ubd: "binary",
    memoryMiB: plan.guestMemoryMiB,
    resultsDir: directory,
    ...(plan.instructionClock && { instructionClock: true }),
    timeoutS: guestTimeoutS(plan),
    onOutput: (chunk) => process.stderr.write(chunk),
  });
  const file = join(directory, REPORT_FILE);
  if (result.exitCode !== 0 || !existsSync(file)) {
    const log = result.dmesg.trimEnd().split("\n").slice(-20).join("\n");
    throw new Error(`The guest's part ended with ${result.exitCode} (${result.outcome}):\n${log}`);
  }
  const report = JSON.parse(readFileSync(file, "utf8")) as Report;
  const disk = {
    "guest's disk": `virtio-blk, a file ${
      inMemory ? "in the host's memory" : "on the host's disk"
    }`,
  };
  return { ...report, versions: { ...report.versions, ...disk, ...versions } };
}

/** Puts everything into docs/benchmarks/, formatted as the house has it. */
async function writeDocs(text: string, report: Report, plan: Plan, command: string): Promise<void> {
  mkdirSync(DOCS, { recursive: true });
  const file = (name: string) => join(DOCS, name);
  const [name, chart] = plan.instructionClock
    ? ["instructions", "instructions.svg"]
    : ["results", "chart.svg"];
  const title = `# ${plan.instructionClock ? "Results by instructions" : "Results"}\n\n` +
    "Made by the command below; [how to read them](README.md).\n\n" +
    `![Throughput against the yardstick](${chart})\n\n`;
  writeFileSync(file(`${name}.md`), title + text);
  writeFileSync(file(chart), drawReport(report));
  writeFileSync(file(`${name}.json`), JSON.stringify({ command, plan, ...report }));
  const written = [`${name}.md`, `${name}.json`, chart].map(file);
  await run("deno", ["fmt", "--quiet", ...written], { cwd: ROOT });
}

async function bench({ plan, ring, guest, write, json }: Options): Promise<number> {
  const directory = mkdtempSync(join(tmpdir(), "ubd-bench-"));
  try {
    const empty = { measurements: [], versions: {} };
    await ensureBuilt();
    const native = ring ? await measureRing(plan, directory) : empty;
    const guests: Report = guest
      ? await measureInGuest(plan, directory)
      : { ...empty, idle: [], starts: [], absent: [], failures: [] };
    const report: Report = {
      ...guests,
      versions: { ...native.versions, ...guests.versions },
      measurements: [...native.measurements, ...guests.measurements],
    };
    const command = ["npm run bench --", ...process.argv.slice(2)].join(" ");
    const text = formatReport(report, plan, command);
    process.stdout.write(text);
    if (write) await writeDocs(text, report, plan, command);
    if (json) {
      writeFileSync(json, `${JSON.stringify({ command, plan, ...report }, null, 2)}\n`);
    }
    return report.failures.length > 0 ? 1 : 0;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

async function main(): Promise<number> {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => process.exit(130));
  }
  let options: Options | undefined;
  try {
    options = parseCommandLine(process.argv.slice(2));
  } catch (error) {
    process.stderr.write(`bench: ${(error as Error).message}\n\n${USAGE}`);
    return 2;
  }
  if (options) return await bench(options);
  process.stdout.write(USAGE);
  return 0;
}

if (import.meta.main) {
  main().then((code) => process.exitCode = code, (error: Error) => {
    process.stderr.write(`bench: ${error.message}\n`);
    process.exitCode = 1;
  });
}
