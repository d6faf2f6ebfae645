// SPDX-License-Identifier: MIT
/**
 * Measures ubd against the kernel's own server and drivers: `npm run bench`, in one guest.
 *
 * Host side: builds what takes part, boots the guest, prints the table. guest.ts measures, plan.ts
 * says what. Absolute numbers are those of an emulated processor unless the host has KVM; the
 * ratios are what to look at, and a spread as wide as a difference means there is none.
 *
 * Exit status: 1 when a contender failed to run, never for being slow.
 */
import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { build } from "../tools/build.ts";
import { runInGuest } from "../tools/vm.ts";
import { buildKublk } from "./kublk.ts";
import { CASES, KUBLK_FILE, type Plan, PLAN_FILE, QUICK_CASES, REPORT_FILE } from "./plan.ts";
import type { Report } from "./plan.ts";
import { formatReport } from "./table.ts";

const ROOT = join(import.meta.dirname!, "..");

/** What goes into dist/ubd. */
const SOURCES = ["abi", "cli", "core", "ffi", "shim", "targets"];

/** More contenders than this would be a mistake in the estimate of a guest's time only. */
const CONTENDERS_MAX = 10;

/** Starting and ending fio in an emulated guest. */
const FIO_OVERHEAD_S = 15;

const USAGE = `Usage: bench [options]

Measures ubd against kublk, the kernel's loop driver and null_blk, in a guest.

  --quick       one short repeat of fewer cases: shows that all of it runs, measures little
  --repeats N   how often each measurement is made (default: 3)
  --seconds S   length of one measurement (default: 4)
  --json FILE   write all measurements there
  --help        show this text
`;

interface Options {
  quick: boolean;
  repeats: number;
  seconds: number;
  json: string | undefined;
}

function parseCommandLine(args: string[]): Options | undefined {
  const { values } = parseArgs({
    args,
    options: {
      quick: { type: "boolean", default: false },
      repeats: { type: "string" },
      seconds: { type: "string" },
      json: { type: "string" },
      help: { type: "boolean", default: false },
    },
  });
  if (values.help) return undefined;
  const count = (name: string, value: string | undefined, preset: number) => {
    if (value === undefined) return preset;
    if (/^[1-9]\d{0,3}$/.test(value)) return Number(value);
    throw new RangeError(`--${name} must be a whole number above 0, not ${value}`);
  };
  return {
    quick: values.quick,
    repeats: count("repeats", values.repeats, values.quick ? 1 : 3),
    seconds: count("seconds", values.seconds, values.quick ? 1 : 4),
    json: values.json,
  };
}

/** Builds dist/ubd when it is older than its sources: another guest may be running it. */
async function ensureBuilt(): Promise<void> {
  const binary = join(ROOT, "dist/ubd");
  const files = SOURCES.flatMap((directory) =>
    readdirSync(join(ROOT, directory)).map((it) => join(ROOT, directory, it))
  );
  const newestMs = Math.max(...files.map((it) => statSync(it).mtimeMs));
  if (!existsSync(binary) || statSync(binary).mtimeMs < newestMs) await build();
}

function makePlan({ quick, repeats, seconds }: Options, hasKublk: boolean): Plan {
  return {
    cases: quick ? QUICK_CASES : CASES,
    repeats,
    seconds,
    rampSeconds: quick ? 0 : 1,
    warmUpSeconds: quick ? 0 : 10,
    fileMiB: quick ? 64 : 1024,
    hasKublk,
  };
}

/** Puts kublk into the shared directory. Without it the comparison is poorer, not void. */
async function provideKublk(directory: string): Promise<string | Error> {
  try {
    const { path, version } = await buildKublk();
    copyFileSync(path, join(directory, KUBLK_FILE));
    return version;
  } catch (error) {
    process.stderr.write(`bench: goes on without kublk: ${(error as Error).message}\n`);
    return error as Error;
  }
}

async function measureInGuest(plan: Plan, directory: string): Promise<Report> {
  writeFileSync(join(directory, PLAN_FILE), JSON.stringify(plan));
  const measurements = plan.repeats * plan.cases.length * CONTENDERS_MAX;
  const result = await runInGuest({
    command: "bun /ubd/bench/guest.ts",
    ubd: "binary",
    resultsDir: directory,
    timeoutS: 120 + measurements * (plan.seconds + plan.rampSeconds + FIO_OVERHEAD_S),
    onOutput: (chunk) => process.stderr.write(chunk),
  });
  const report = join(directory, REPORT_FILE);
  if (result.exitCode !== 0 || !existsSync(report)) {
    const log = result.dmesg.trimEnd().split("\n").slice(-20).join("\n");
    throw new Error(`The guest's part ended with ${result.exitCode} (${result.outcome}):\n${log}`);
  }
  return JSON.parse(readFileSync(report, "utf8")) as Report;
}

async function bench(options: Options): Promise<number> {
  const directory = mkdtempSync(join(tmpdir(), "ubd-bench-"));
  try {
    await ensureBuilt();
    const kublk = await provideKublk(directory);
    const plan = makePlan(options, typeof kublk === "string");
    const report = await measureInGuest(plan, directory);
    report.versions.kublk = typeof kublk === "string" ? kublk : `absent: ${firstLine(kublk)}`;

    const command = ["bun bench/bench.ts", ...process.argv.slice(2)].join(" ");
    process.stdout.write(formatReport(report, plan.cases, command));
    if (options.json) {
      writeFileSync(options.json, `${JSON.stringify({ command, plan, ...report }, null, 2)}\n`);
    }
    return report.failures.length > 0 ? 1 : 0;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function firstLine(error: Error): string {
  return error.message.split("\n")[0]!;
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
