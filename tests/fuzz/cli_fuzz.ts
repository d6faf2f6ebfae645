// SPDX-License-Identifier: MIT
/**
 * Command lines as nobody types them: most are parsed in this process, up to where the driver would
 * be opened; some run as processes of their own, with environments and descriptors to match.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Command } from "commander";
import fc from "fast-check";
import { toSpec } from "../../cli/add.ts";
import { EXIT, EXIT_MEANINGS } from "../../cli/exit.ts";
import { divertOutput } from "../../cli/output.ts";
import { defineProgram, runProgram } from "../../cli/program.ts";
import { commandOf } from "../../cli/run.ts";
import { specOf } from "../../cli/spec.ts";
import { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import { useStateDirectory } from "../../core/state.ts";
import type { Fuzzer } from "./fuzzer.ts";

const MAIN = join(import.meta.dirname!, "..", "..", "cli", "main.ts");
const RUN = "Deno" in globalThis ? ["run", "-A", "-q", "--no-check", MAIN] : [MAIN];
const SCRATCH = mkdtempSync(join(tmpdir(), "ubd-cli-fuzz-"));
process.on("exit", () => rmSync(SCRATCH, { recursive: true, force: true }));
const hasDriver = ["/dev/ublk-control", "/dev/ubd-control"].some((path) => existsSync(path));

const program = defineProgram();
const verbs = program.commands.flatMap((command) => [command.name(), ...command.aliases()]);
const flags = [
  ...new Set(
    program.commands.flatMap((command) =>
      command.options.flatMap(({ short, long }) =>
        [short, long].filter((flag) => flag !== undefined)
      )
    ),
  ),
];

const hostile = fc.oneof(
  {
    weight: 3,
    arbitrary: fc.constantFrom(
      ...["", " ", "-", "--", "---", "=", "-=", "a=b", "=b", "a=", "a=b=c", ".", "..", "/", "~"],
      ...["0", "1", "-1", "00", "1e9", "0x10", "NaN", "1.5", "4294967296", "9".repeat(400), "1K"],
      ...["[0,2]", "[0,", "0-8191", "0-", "5-1", ",", "[", "[]", "1K", "0s", "-0", "1048576"],
      ...["null", "loop", "memory", "http", "fault", "concat", "stripe", "module", "nbd"],
      ...["__proto__", "constructor", "toString", "__proto__=1", "size=1M", "size=0", "url=x"],
      ...["./no.ts", "./no.mjs", "https://h/x", "https://", "http:x", "/dev/null", "/dev/ublkb0"],
      ...["ublkb1", "/dev/ublkb1048575", "{}", "%s", "$(x)", "wait", "reissue", "auto", "reg"],
      ...["\x1b[2J", "\u202ex", "\ud800", "\n", "a\nb", "x\0y", "é", "\u{1f600}"],
    ),
  },
  fc.string({ unit: "binary", maxLength: 12 }),
  fc.constantFrom(" ", "1", "-", "[", "0,", "a=", "x\n", "\u{1f600}").map((part) =>
    part.repeat(9999)
  ),
);

const word = fc.oneof(
  { weight: 3, arbitrary: fc.constantFrom(...flags) },
  { weight: 1, arbitrary: fc.constantFrom("--json", "--help", "-h", "--", "-v", "--version") },
  { weight: 3, arbitrary: hostile },
  fc.tuple(fc.constantFrom(...flags), hostile).map(([flag, value]) => `${flag}=${value}`),
);

/** A verb, mostly, and words that could be anything. */
const line = fc.tuple(
  fc.oneof({ weight: 9, arbitrary: fc.constantFrom(...verbs) }, word),
  fc.array(word, { maxLength: 8 }),
).map(([verb, words]) => [verb, ...words]);

interface Outcome {
  code: number | null;
  out: string;
  err: string;
}

function assertOutcome(words: string[], { code, out, err }: Outcome, jsonTold = true): void {
  const told = `exit code ${code}\n${out.slice(0, 2000)}${err.slice(0, 4000)}`;
  assert.ok(EXIT_MEANINGS.some(([known]) => known === code) && code !== EXIT.BUG, told);
  assert.doesNotMatch(err, /\n\s+at /, told);
  // deno-lint-ignore no-control-regex
  assert.doesNotMatch(`${out}${err}`, /[\0\x1b\u202e]/, told);
  assert.ok(err.length < 8000, told);
  const json = words.slice(0, words.length - commandOf(words).length).includes("--json");
  if (code !== EXIT.OK) {
    assert.strictEqual(err.match(/^ubd: /gm)?.length ?? 0, out && !json ? 0 : 1, told);
  }
  if (json && jsonTold) JSON.parse(out);
}

/** Whatever would change the machine ends where the driver would be asked. */
function tame(canary: boolean): (program: Command) => void {
  return (program) => {
    const verb = (name: string) => program.commands.find((command) => command.name() === name)!;
    verb("add").action((target, files, options) => {
      const spec = toSpec(target, files, options);
      assert.deepStrictEqual(specOf({ spec: JSON.parse(JSON.stringify(spec)) } as never), {
        spec: JSON.parse(JSON.stringify(spec)),
      });
      throw noDriver();
    });
    verb("run").action(([target, ...files], options) => {
      toSpec(target, files, options);
      throw noDriver();
    });
    for (const name of ["udev", "doctor", "log"]) {
      verb(name).action(() => Promise.reject(noDriver()));
    }
    if (!canary) return;
    const cpuset = verb("set_affinity").options.find(({ long }) => long === "--cpuset")!;
    cpuset.argParser((text) => text.split(",").map((one) => Number(/^\d+$/.exec(one)![0])));
  };
}

const noDriver = () => new UblkError({ errno: "ENOENT", operation: "open the control device" });

async function parseHere(words: string[], canary: boolean): Promise<Outcome> {
  const said = { 1: "", 2: "" };
  const { argv } = process;
  const { open } = Control;
  divertOutput((fd, text) => said[fd] += text);
  useStateDirectory(SCRATCH);
  Control.open = () => Promise.reject(noDriver());
  process.argv = [argv[0]!, "ubd", ...words];
  process.exitCode = 0;
  try {
    const code = await runProgram(tame(canary));
    return { code, out: said[1], err: said[2] };
  } finally {
    divertOutput(undefined);
    useStateDirectory(undefined);
    Control.open = open;
    process.argv = argv;
    process.exitCode = 0;
  }
}

const ENVIRONMENTS: readonly Record<string, string>[] = [
  {},
  { TMPDIR: "/nowhere", HOME: "" },
  { TMPDIR: "", PATH: "" },
  { NOTIFY_SOCKET: "x".repeat(5000), XDG_RUNTIME_DIR: "relative" },
  { LANG: "xx", LC_ALL: "\u{1f600}", TERM: "", COLUMNS: "-1", LINES: "x" },
  { FORCE_COLOR: "3", CLICOLOR_FORCE: "1" },
  { NODE_OPTIONS: "", UBD_DEBUG_EXIT: "nowhere", UBD_DEBUG_INTERRUPT: "" },
];

const REDIRECTIONS = ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", "</dev/zero", "<.", ">/dev/full"];

const surroundings = fc.tuple(fc.constantFrom(...ENVIRONMENTS), fc.constantFrom(...REDIRECTIONS));

/** As a process; not where that could make a device, or change udev's rules. */
function runThere(words: string[], [env, redirection]: [Record<string, string>, string]): void {
  if (hasDriver || words.includes("install") || words.includes("remove")) return;
  if (words.some((word) => word.includes("\0"))) return; // No process can be given that.
  const well = words.map((word) => word.toWellFormed());
  const { status, stdout, stderr } = spawnSync(
    "/bin/bash",
    ["-c", `exec "$@" ${redirection}`, "bash", process.execPath, ...RUN, ...well],
    { env: { PATH: process.env.PATH!, NO_COLOR: "1", ...env }, cwd: SCRATCH, encoding: "utf8" },
  );
  const outcome = { code: status, out: stdout, err: stderr };
  if (/[^<]>&-|^>&-/.test(redirection)) {
    assert.ok(status !== null && status !== EXIT.BUG, `exit code ${status}`);
  } else assertOutcome(well, outcome, !redirection.includes("/dev/full"));
}

const fuzzer: Fuzzer = {
  about: "hostile command lines, environments, descriptors: a documented exit code, one message",
  property: (canary) =>
    fc.asyncProperty(
      line,
      fc.oneof(
        { weight: 400, arbitrary: fc.constant(undefined) },
        { weight: 1, arbitrary: surroundings },
      ),
      async (words, around) => {
        assertOutcome(words, await parseHere(words, canary));
        if (around) runThere(words, around);
      },
    ),
};
export default fuzzer;
