// SPDX-License-Identifier: MIT
/**
 * `npm test`: the house's rules, then three tiers, then the package, the demo and the benchmark.
 *
 *   bun tools/test.ts [--quick] [--full] [--kernel newest|6.12|6.1] [--ubd binary|bun|deno]
 *                     [--only STAGE]
 *
 * --quick stops before the first guest: the developer's loop. --full repeats what the device tests
 * do under load as often as a release asks for: half an hour for each combination.
 *
 * Everything is counted from JUnit reports, since the two runtimes print differently; a runner that
 * leaves none has failed. The last line is "N passed, N failed, N skipped".
 * @module
 */

import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { build } from "./build.ts";
import { check } from "./check.ts";
import { runInGuest, UBD_COMMANDS } from "./vm.ts";
import { type KernelName, KERNELS } from "./vm_images.ts";

type Runner = keyof typeof UBD_COMMANDS;

const { values: options } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    full: { type: "boolean", default: false },
    kernel: { type: "string" },
    ubd: { type: "string" },
    only: { type: "string" },
  },
});

const ROOT = join(import.meta.dirname!, "..");
const total = { passed: 0, failed: 0, skipped: 0 };
const failures: string[] = [];
const scratch = mkdtempSync(join(tmpdir(), "ubd-test-"));
process.on("exit", () => rmSync(scratch, { recursive: true, force: true }));

/** The name of a test case that holds a failure. */
const FAILED_CASE =
  /<testcase\b[^>]*?\bname="([^"]*)"[^>]*[^/]>(?:(?!<\/testcase>)[^])*?<(?:failure|error)\b/g;

/** The most lines that are told again of what a failed test has printed. */
const TOLD_LINES = 30;

/** What a runner printed of this failed test: whoever sees only the end of a run wants to know. */
function toldOf(test: string, output: string): string {
  const lines = output.split("\n");
  const end = lines.findIndex((line) => line.startsWith(`(fail) ${test}`));
  const before = lines.slice(Math.max(0, end - TOLD_LINES), Math.max(0, end));
  const begin = before.findLastIndex((line) => /^\((pass|skip|fail)\) |_test\.ts:$/.test(line));
  return before.slice(begin + 1).map((line) => `\n  ${line}`).join("");
}

/** Adds up one report. @param ended whether its runner ended well. @param output what it printed. */
function count(name: string, report: string | undefined, ended: boolean, output = ""): void {
  const occurrences = (pattern: RegExp) => report?.match(pattern)?.length ?? 0;
  const cases = occurrences(/<testcase\b/g);
  const failed = occurrences(/<(failure|error)\b/g);
  const skipped = occurrences(/<skipped\b/g);
  const crashed = cases === 0 || (!ended && failed === 0) ? 1 : 0;
  if (crashed) failures.push(`${name}: the runner failed without a failed test`);
  for (const [, test] of report?.matchAll(FAILED_CASE) ?? []) {
    failures.push(`${name}: ${test}${toldOf(test!, output)}`);
  }
  total.passed += cases - failed - skipped;
  total.failed += failed + crashed;
  total.skipped += skipped;
}

/** Counts a program as one test. */
function countOne(name: string, good: boolean): void {
  total[good ? "passed" : "failed"]++;
  if (!good) failures.push(name);
}

async function stage(name: string, work: () => void | Promise<void>): Promise<void> {
  if (options.only && !name.startsWith(options.only)) return;
  console.log(`\n== ${name}`);
  const start = performance.now();
  try {
    await work();
  } catch (error) {
    console.log(error);
    countOne(name, false);
  }
  console.log(`== ${name}: ${((performance.now() - start) / 1000).toFixed(0)} s`);
}

function readReport(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
}

/** Their output is kept until the end: both runtimes' tests wait more than they compute. */
async function hostTests(runtime: "bun" | "deno", ...tiers: string[]): Promise<void> {
  const report = join(scratch, `${runtime}.xml`);
  rmSync(report, { force: true });
  const args = runtime === "bun"
    ? ["test", "--reporter=junit", `--reporter-outfile=${report}`, "--timeout=60000", ...tiers]
    : ["test", "-A", "-q", "--no-check", `--junit-path=${report}`, ...tiers];
  const child = spawn(runtime, args, { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
  let output = "";
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding("utf8").on("data", (text) => output += text);
  }
  const status = await new Promise((resolve) => child.on("close", resolve).on("error", resolve));
  console.log(`\n== ${tiers.join(", ")}, ${runtime}\n${output}`);
  count(`${tiers.join(", ")}, ${runtime}`, readReport(report), status === 0, output);
}

interface Job {
  kernel: KernelName;
  ubd: Runner;
  /** Such as "1/3". */
  part: string;
  files: string[];
  /** Only this one test, in a guest that is made for it. */
  alone?: { what: string; test: string; memoryMiB?: number; env?: Record<string, string> };
}

/** At full scale only; the first one leaves a device which nothing but a reboot removes. */
const ALONE: Required<Job>["alone"][] = [
  { what: "the deadlock", test: "deadlocks", env: { UBD_DEADLOCK: "1" } },
  { what: "1 GiB of swap", test: "1 GiB of swap", memoryMiB: 1024 },
];

/** The most that one guest can do in about ten minutes, so that both lanes end together. */
function partsOf(kernel: KernelName, ubd: Runner): Job[] {
  const directory = join(ROOT, "tests/device");
  const bytes = (name: string) => statSync(join(directory, name)).size;
  // A longer file takes longer: dealt out to and fro, all parts take about the same.
  const all = readdirSync(directory).filter((name) => name.endsWith("_test.ts"))
    .sort((one, other) => bytes(other) - bytes(one));
  const counts = { newest: { binary: 6, bun: 1, deno: 2 }, "6.12": { binary: 3, bun: 1, deno: 1 } };
  const count = kernel === "6.1" ? 1 : counts[kernel][ubd];
  const turn = (at: number) => Math.min(at % (2 * count), 2 * count - 1 - at % (2 * count));
  return Array.from({ length: count }, (_, index) => ({
    kernel,
    ubd,
    part: `${index + 1}/${count}`,
    files: all.filter((_, at) => turn(at) === index).map((name) => `/ubd/tests/device/${name}`),
  }));
}

/**
 * Emulation translates what a JIT compiler makes once more: it is to come later, when there is
 * something to be gained. A command that runs for a moment takes two thirds of the time then.
 */
const LATE_JIT = {
  BUN_JSC_thresholdForJITAfterWarmUp: "10000",
  BUN_JSC_thresholdForJITSoon: "10000",
};

/**
 * One guest, some files of device tests. Its output is kept until the end: two guests run at a
 * time.
 */
async function deviceTests({ kernel, ubd, part, files, alone }: Job): Promise<void> {
  const what = alone?.what ?? `device tests ${part}`;
  const name = `${what}, Linux ${kernel}, ubd as ${ubd}`;
  console.log(`== ${name}: begins`);
  const results = mkdtempSync(join(scratch, "results-"));
  const guest = await runInGuest({
    kernel,
    ubd,
    resultsDir: results,
    timeoutS: options.full ? 7200 : 2400,
    ...(alone?.memoryMiB && { memoryMiB: alone.memoryMiB }),
    env: {
      UBD_RUNNER: ubd,
      UBD_KERNEL: kernel,
      UBD_SCALE: options.full ? "full" : "small",
      ...LATE_JIT,
      ...alone?.env,
    },
    command: "bun test --reporter=junit --reporter-outfile=/results/report.xml " +
      `--timeout=120000 ${alone ? `-t '${alone.test}'` : ""} ${files.join(" ")}`,
  });
  console.log(`\n== ${name}\n${guest.output}`);
  if (guest.exitCode !== 0) console.log(guest.dmesg.split("\n").slice(-40).join("\n"));
  count(name, readReport(join(results, "report.xml")), guest.exitCode === 0, guest.output);
  console.log(`== ${name}: ${guest.seconds.toFixed(0)} s`);
}

function program(...command: string[]): void {
  const { status } = spawnSync(command[0]!, command.slice(1), { cwd: ROOT, stdio: "inherit" });
  countOne(command.join(" "), status === 0);
}

await stage("check", async () => {
  const { passed, failed } = await check();
  if (failed) failures.push(`check: ${failed} failed`);
  total.passed += passed;
  total.failed += failed;
});
await stage("build", build);
await stage("unit and shim tests", async () => {
  const tiers = ["tests/unit", "tests/shim"];
  await Promise.all([hostTests("bun", ...tiers), hostTests("deno", ...tiers)]);
});
await stage("package tests", () => hostTests("bun", "tests/package"));
if (!options.quick) {
  const kernels = (Object.keys(KERNELS) as KernelName[])
    .filter((kernel) => !options.kernel || kernel === options.kernel);
  const runners = (Object.keys(UBD_COMMANDS) as Runner[])
    .filter((runner) => !options.ubd || runner === options.ubd);
  // Two at a time: an emulated guest keeps about one of two processors busy. Longest first.
  await stage("device tests", async () => {
    // The oldest kernel has few tests, none of which depends on the runtime.
    const jobs = kernels.flatMap((kernel) => runners.flatMap((ubd) => partsOf(kernel, ubd)))
      .filter(({ kernel, ubd }) => kernel !== "6.1" || ubd === "binary" || options.ubd);
    const lane = async () => {
      for (let job = jobs.shift(); job; job = jobs.shift()) await deviceTests(job);
    };
    await Promise.all([lane(), lane()]);
    if (!options.full) return;
    const files = ["/ubd/tests/device/isolation_test.ts"];
    for (const kernel of kernels.filter((kernel) => kernel !== "6.1")) {
      for (const alone of ALONE) {
        await deviceTests({ kernel, ubd: "binary", part: "", files, alone });
      }
    }
  });
  await stage("demo", () => program("bun", "tools/demo.ts"));
  await stage("bench", () => program("bun", "bench/bench.ts", "--quick"));
}

for (const failure of failures) console.log(`FAILED: ${failure}`);
const { passed, failed, skipped } = total;
console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`);
process.exit(failed || passed === 0 ? 1 : 0);
