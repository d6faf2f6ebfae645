// SPDX-License-Identifier: MIT
/**
 * The program as a shell sees it, under the runtime that runs this test: what it prints where,
 * and its exit code. No driver is needed; mistakes are found before the driver is opened.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { release } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { toSpec } from "../../cli/add.ts";
import { EXIT_MEANINGS } from "../../cli/exit.ts";
import { divertOutput } from "../../cli/output.ts";
import { defineProgram, runProgram } from "../../cli/program.ts";
import { VERSION } from "../../core/version.ts";
import { runtime } from "../../ffi/mod.ts";

const MAIN = join(import.meta.dirname!, "..", "..", "cli", "main.ts");
const RUN = runtime.startsWith("Deno") ? ["run", "-A", "-q", "--no-check", MAIN] : [MAIN];
const TIMEOUT = { timeout: 60_000 };
const hasDriver = existsSync("/dev/ublk-control") || existsSync("/dev/ubd-control");
const driverSkip = hasDriver ? "the ublk driver is loaded" : false;

const VERBS = [
  ...["add", "run", "del", "stop", "resize", "recover", "quiesce", "upgrade", "gc", "set_affinity"],
  ...["list", "info", "features", "log", "doctor", "udev", "version", "help"],
];

interface Outcome {
  code: number | null;
  stdout: string;
  stderr: string;
}

function ubd(...args: string[]): Outcome {
  const { status, stdout, stderr } = spawnSync(process.execPath, [...RUN, ...args], {
    encoding: "utf8",
    env: { ...process.env, NO_COLOR: "1" },
  });
  return { code: status, stdout, stderr };
}

test("a name that is no UTF-8 reaches the file system as it was given", {
  skip: "Deno" in globalThis && "Deno takes no such arguments",
}, () => {
  const words = [process.execPath, ...RUN, "add", "loop"].map((word) => `'${word}'`).join(" ");
  const script = `exec ${words} "$(printf '/caf\\351.img')"`;
  const { stderr } = spawnSync("sh", ["-c", script], { encoding: "utf8" });
  assert.match(stderr, /^ubd: Cannot open \/caf\\xE9\.img: ENOENT/);
});

/** A mistake: exit 2, nothing on standard output, one reason on standard error. */
function mistake(args: string[], reason: RegExp | string): void {
  const { code, stdout, stderr } = ubd(...args);
  const command = `ubd ${args.join(" ")}`;
  if (typeof reason === "string") assert.strictEqual(stderr, `ubd: ${reason}\n`, command);
  else assert.match(stderr, reason, command);
  assert.doesNotMatch(stderr, /\n\s+at /, `${command} prints a stack`);
  assert.deepStrictEqual({ code, stdout }, { code: 2, stdout: "" }, command);
}

test("ubd help names every verb and every documented exit code with its meaning", TIMEOUT, () => {
  const { code, stdout, stderr } = ubd("help");
  assert.deepStrictEqual({ code, stderr }, { code: 0, stderr: "" });
  for (const verb of VERBS) assert.match(stdout, new RegExp(`^  ${verb}\\b`, "m"));
  for (const [exitCode, meaning] of EXIT_MEANINGS) {
    assert.ok(stdout.includes(`\n  ${String(exitCode).padEnd(4)}${meaning}`), meaning);
  }
  assert.doesNotMatch(stdout, /__serve/);
  assert.strictEqual(ubd("--help").stdout, stdout);
});

test("ubd alone prints the help and exits 2", TIMEOUT, () => {
  const { code, stdout } = ubd();
  assert.strictEqual(code, 2);
  assert.match(stdout, /^Usage: ubd /);
});

test("ubd help VERB and ubd VERB --help explain one verb", TIMEOUT, () => {
  const { code, stdout } = ubd("help", "add");
  assert.strictEqual(code, 0);
  assert.match(stdout, /^Usage: ubd add /);
  assert.match(stdout, /--block-size <size>/);
  assert.doesNotMatch(stdout, /user_recovery/);
  assert.deepStrictEqual(ubd("add", "--help"), { code: 0, stdout, stderr: "" });
  assert.deepStrictEqual(ubd("add", "loop", "./x.img", "--help"), { code: 0, stdout, stderr: "" });
  const memory = ubd("add", "memory", "--help").stdout;
  assert.match(memory, /^Options of memory:\n {2}--opt size=SIZE .*\(default: 1G\)$/m);
});

test("ubd help --json lists verbs with their options", TIMEOUT, () => {
  const { code, stdout } = ubd("help", "--json");
  assert.strictEqual(code, 0);
  const help = JSON.parse(stdout);
  assert.deepStrictEqual(help.commands.map(({ name }: { name: string }) => name), VERBS);
  for (const command of help.commands) {
    const flags = command.options.map((option: { flags: string }) => option.flags);
    assert.ok(flags.includes("--json"), command.name);
  }
  assert.strictEqual(JSON.parse(ubd("help", "del", "--json").stdout).name, "del");
});

test("ubd VERB --help --json is JSON, as ubd help VERB --json", TIMEOUT, () => {
  for (const words of [["list", "--help", "--json"], ["list", "--json", "-h"]]) {
    assert.deepStrictEqual(ubd(...words), ubd("help", "list", "--json"));
  }
  const all = ubd("help", "--json");
  assert.deepStrictEqual(ubd("--help", "--json"), all);
  assert.deepStrictEqual(JSON.parse(ubd("run", "--json", "--help").stdout).name, "run");
  const memory = JSON.parse(ubd("add", "memory", "--json", "--help").stdout);
  assert.match(memory.target, /^Options of memory:\n {2}--opt size=SIZE/);
  const own = ubd("run", "--help", "--", "x", "--json").stdout;
  assert.match(own, /^Usage: ubd run/);
});

/** As ubd, without a process of its own: for mistakes that end before anything is done. */
async function here(...words: string[]): Promise<Outcome> {
  const said = { 1: "", 2: "" };
  const { argv } = process;
  divertOutput((fd, text) => said[fd] += text);
  process.argv = [argv[0]!, "ubd", ...words];
  try {
    return { code: await runProgram(), stdout: said[1], stderr: said[2] };
  } finally {
    divertOutput(undefined);
    process.argv = argv;
  }
}

test("ubd refuses an option that is given twice", async () => {
  const tried: [string[], string][] = [
    [["del", "-n", "0", "-n", "1"], "--number"],
    [["list", "--number=0", "-n", "0"], "--number"],
    [["add", "null", "--size", "1M", "--size", "2M"], "--size"],
    [["add", "loop", "/a", "-o", "1", "-o", "2"], "-o"],
    [["add", "null", "--recovery", "--recovery=wait"], "--recovery"],
    [["help", "-t", "a", "-t", "b"], "--type"],
  ];
  for (const [words, option] of tried) {
    const outcome = { code: 2, stdout: "", stderr: `ubd: ${option}: it is given twice\n` };
    assert.deepStrictEqual(await here(...words), outcome);
  }
});

test("ubd shortens what it echoes, on standard error and in JSON", async () => {
  const long = "x".repeat(300_000);
  const tried = [["del", long], ["list", `--${long}`], [long], [
    "add",
    "loop",
    "/a",
    "--size",
    long,
  ]];
  for (const words of tried) {
    const { code, stderr } = await here(...words);
    assert.strictEqual(code, 2);
    assert.ok(stderr.length < 2100 && stderr.includes(" more characters ...] "), stderr);
  }
  const { stdout } = await here("add", "null", "--size", long, "--json");
  const { message } = JSON.parse(stdout).error;
  assert.ok(message.length < 2100, `${message.length}`);
  assert.match(message, /^Size "x+ \[\.\.\. \d+ more characters \.\.\.\] x*": say bytes, or a/);
});

test(
  "thousands of options take no longer each, and keep their names",
  { timeout: 30_000 },
  async () => {
    const given: string[] = [];
    const program = defineProgram();
    program.commands.find((command) => command.name() === "add")!.action(
      (target, files, options) => {
        const { options: own } = toSpec(target, files, options).target.options;
        given.push(...Object.keys(own as object));
      },
    );
    const names = ["__proto__", "toString", ...Array.from({ length: 30_000 }, (_, at) => `o${at}`)];
    const words = names.flatMap((name) => ["--opt", `${name}=1`]);
    await program.parseAsync(["add", "./x.ts", ...words], { from: "user" });
    assert.deepStrictEqual(given, names);
  },
);

test("ubd version prints version, runtime and kernel, in all its spellings", TIMEOUT, () => {
  const line = `ubd ${VERSION} (${runtime}, Linux ${release()})\n`;
  for (const spelling of ["version", "--version", "-v"]) {
    assert.deepStrictEqual(ubd(spelling), { code: 0, stdout: line, stderr: "" }, spelling);
  }
  const facts = { version: VERSION, runtime, kernel: release() };
  assert.deepStrictEqual(JSON.parse(ubd("version", "--json").stdout), facts);
});

test("ubd refuses an unknown verb and suggests help", TIMEOUT, () => {
  mistake(["frobnicate"], /^ubd: unknown command 'frobnicate'\nTry: ubd help\n$/);
  mistake(["help", "frobnicate"], /^ubd: unknown command 'frobnicate'/);
});

test("ubd refuses an unknown option of each verb", TIMEOUT, () => {
  for (const verb of VERBS) {
    mistake([verb, "--frobnicate"], /^ubd: unknown option '--frobnicate'/);
  }
  mistake(["list", "--jsno"], /Did you mean --json\?/);
});

test("ubd refuses more arguments than a verb has", TIMEOUT, () => {
  mistake(["add", "loop", "a", "b"], "Target loop takes one file");
  mistake(["list", "3", "4"], /too many arguments/);
  mistake(["info"], "Which device? ubd info -n ID");
  mistake(["info", "3", "-n", "4"], "Name the device once");
  mistake(["list", "3", "-n", "4"], "Name the device once");
});

test("ubd del deletes nothing unless it is told what", TIMEOUT, () => {
  mistake(["del"], "Which device? ubd del -n ID, or ubd del --all");
  mistake(["del", "-n", "foo"], 'Device id "foo": it must be a whole number');
  mistake(["del", "foo"], 'Device id "foo": it must be a whole number');
  mistake(["del", "-n", ""], 'Device id "": it must be a whole number');
  mistake(["del", "-n", "-1"], "Device id -1: it must be from 0 to 1048575");
  for (const verb of ["del", "info", "recover", "quiesce", "upgrade", "resize", "set_affinity"]) {
    mistake([verb, "4294967296"], "Device id 4294967296: it must be from 0 to 1048575");
  }
  mistake(["list", "-n", "4294967296"], "Device id 4294967296: it must be from 0 to 1048575");
  mistake(["del", "-a", "3"], "Name devices, or say --all: not both");
  mistake(["del", "-a", "-n", "3"], "Name devices, or say --all: not both");
  mistake(["del", "-n"], /option '-n, --number <id>' argument missing/);
});

test("ubd udev shows its rules, and does nothing unless it is told what", TIMEOUT, () => {
  const { code, stdout } = ubd("udev", "--print");
  assert.strictEqual(code, 0);
  assert.match(stdout, /^KERNEL=="ublk-control", MODE="0666"/m);
  assert.match(stdout, /^ACTION!="remove", KERNEL=="ublk\[bc\].*RUN\+=".*\/ubd-owner %k"$/m);
  const { rules } = JSON.parse(ubd("udev", "--print", "--group", "disk", "--json").stdout);
  assert.match(rules, /^KERNEL=="ublk-control", MODE="0660", RUN\+=".*chgrp disk \$devnode"/m);
  const what = "What to do? ubd udev install, ubd udev remove or ubd udev --print";
  for (const args of [[], ["instal"], ["install", "--print"]]) mistake(["udev", ...args], what);
  mistake(["udev", "install", "--group", 'a" b'], 'Group "a" b": it must be a name');
});

test("ubd add --unprivileged excludes recovery", TIMEOUT, () => {
  const why = "--unprivileged: the driver gives such devices no recovery";
  mistake(["add", "null", "--unprivileged", "--recovery"], why);
  mistake(["add", "null", "--unprivileged", "-r", "1"], why);
});

test("ubd add finds mistakes in the target before it opens the driver", TIMEOUT, () => {
  mistake(["add"], /^ubd: Which target\? ubd add null \.\.\. or ubd add loop \.\.\. or /);
  mistake(
    ["add", "nbd"],
    /Unknown target "nbd": there are null, loop, .*, or a module such as .\/x.ts/,
  );
  mistake(["add", "module"], /^ubd: Unknown target "module"/);
  mistake(["add", "loop"], "Which file? ubd add loop FILE");
  mistake(["add", "null", "--opt", "a=1"], "Target null takes no --opt");
  mistake(["add", "./x.ts", "--opt", "a"], "--opt a: say --opt NAME=VALUE");
  mistake(["add", "./x.ts", "--opt", "a=1", "--opt", "a=2"], "--opt a: it is given twice");
  mistake(["add", "./x.ts", "--ro"], /^ubd: Target .\/x.ts takes no --ro: that is for loop, /);
  mistake(
    ["add", "memory", "--supervise"],
    "--recovery: what memory holds is gone with its server",
  );
  mistake(["add", "./x.ts", "--opt", "size=1", "--size", "1M"], "--opt size: it is given twice");
  mistake(["add", "https://h/x", "--opt", "url=https://h/y"], "--opt url: it is given twice");
  mistake(["add", "HTTPS://h/x.ts", "--ro"], /Target http takes no --ro/);
  assert.match(
    ubd("add", "https://h/x", "--help").stdout,
    /Options of http:\n {2}--opt url=STRING/,
  );
  mistake(["add", "null", "--watch"], /^ubd: --watch is for a module/);
  mistake(["add", "./x.ts", "--watch", "--supervise"], /^ubd: --watch is for a module/);
  mistake(["add", "./x.ts", "--watch", "--foreground"], /^ubd: --watch is for servers/);
  mistake(["add", "./no.ts", "--help"], /^ubd: Cannot load .*no.ts: /);
  mistake(["add", "null", "-t", "null"], 'Name the target once: "null", or -t null');
  mistake(["add", "loop", "/a", "-f", "/b"], 'Name the file once: "/a", or -f /b');
  mistake(["add", "null", "/a"], /^ubd: Target null takes no file: that is for loop, /);
  mistake(["add", "null", "--ro"], /^ubd: Target null takes no --ro: that is for loop, /);
  mistake(["add", "loop", "/a", "--offset", "2x"], /^ubd: Offset "2x": say bytes, or a number/);
  mistake(
    ["add", "loop", "/a", "--chunk", "4K"],
    "Target loop takes no --chunk: that is for stripe",
  );
  mistake(["add", "concat", "/a", "-o", "1"], "Target concat takes no -o: that is for loop");
  mistake(["add", "stripe"], "Which file? ubd add stripe FILE");
  mistake(["add", "/dev/zero"], '"/dev/zero" is neither target nor module: ubd add loop /dev/zero');
  mistake(["add", "loop", "/a", "-o", "-1"], "Offset -512: it must not be negative");
  mistake(["add", "loop", "/a", "-o", "1", "--offset", "1s"], /cannot be used with/);
});

test("ubd add finds mistakes in the device before it opens the driver", TIMEOUT, () => {
  mistake(["add", "null", "-q", "0"], "Number of queues 0: it must be from 1 to 4096");
  mistake(["add", "null", "-d", "4097"], "Queue depth 4097: it must be from 1 to 4096");
  mistake(["add", "null", "-d", "1x"], 'Queue depth "1x": it must be a whole number');
  mistake(["add", "null", "-n", "1048576"], "Device id 1048576: it must be from -1 to 1048575");
  mistake(["add", "null", "--max-io-size", "4097"], /^ubd: Largest I\/O 4097: .* multiple of 4096/);
  mistake(["add", "null", "--size", "1Q"], /^ubd: Size "1Q": say bytes, or a number with K, M,/);
  mistake(["add", "null", "-r", "2"], "-r 2: it must be 0 or 1");
  mistake(["add", "null", "-i", "1", "-e", "1"], "-i 1 and -e 1 exclude each other");
  mistake(["add", "null", "--recovery=maybe"], /^ubd: Recovery "maybe": say --recovery=wait or/);
});

test(
  "ubd run wants a target and a command, and leaves the command's options alone",
  TIMEOUT,
  () => {
    mistake(["run", "null"], "Which command? ubd run loop disk.img -- mkfs.ext4 {}");
    mistake(["run", "null", "--"], "Which command? ubd run loop disk.img -- mkfs.ext4 {}");
    mistake(["run", "--", "true"], /^ubd: Which target\?/);
    mistake(["run", "loop", "a", "b", "--", "true"], "Target loop takes one file");
    mistake(["run", "null", "a", "--", "b", "c"], /^ubd: Target null takes no file: /);
    mistake(["run", "null", "--ro", "--", "a", "--json"], /^ubd: Target null takes no --ro/);
    mistake(["run", "null", "--foreground", "--", "a"], /^ubd: unknown option '--foreground'/);
  },
);

test("ubd --json tells a mistake on standard output too", TIMEOUT, () => {
  const { code, stdout, stderr } = ubd("del", "--json");
  const message = "Which device? ubd del -n ID, or ubd del --all";
  assert.strictEqual(code, 2);
  assert.deepStrictEqual(JSON.parse(stdout), { error: { message, exitCode: 2 } });
  assert.strictEqual(stderr, `ubd: ${message}\n`);
  const unknown = ubd("list", "--json", "--frobnicate");
  assert.strictEqual(JSON.parse(unknown.stdout).error.exitCode, 2);
});

const NO_DRIVER = "Cannot open the control device: ENOENT, No such file or directory " +
  "(load the driver: modprobe ublk_drv; a kernel without it needs CONFIG_BLK_DEV_UBLK)";

test(
  "ubd without the driver exits 6 and says how to load it",
  { skip: driverSkip, ...TIMEOUT },
  () => {
    for (
      const args of [
        ["list"],
        ["list", "-n", "0"],
        ["info", "0"],
        ["features"],
        ["del", "-n", "0"],
        ["del", "--all"],
        ["add", "null"],
        ["add", "null", "--foreground"],
        ["run", "null", "--", "true"],
        ["add", "https://127.0.0.1/disk.img", "--opt", "timeout=60"],
        ["add", "http", "--opt", "url=https://127.0.0.1/disk.img"],
      ]
    ) {
      assert.deepStrictEqual(
        ubd(...args),
        { code: 6, stdout: "", stderr: `ubd: ${NO_DRIVER}\n` },
        args.join(" "),
      );
    }
  },
);

test("ubd --json without the driver is one JSON object", { skip: driverSkip, ...TIMEOUT }, () => {
  for (const args of [["list"], ["info", "0"], ["features"], ["del", "0"], ["add", "null"]]) {
    const { code, stdout } = ubd(...args, "--json");
    assert.strictEqual(code, 6, args.join(" "));
    const { error } = JSON.parse(stdout);
    assert.deepStrictEqual(
      [error.message, error.exitCode, error.errno, error.operation],
      [NO_DRIVER, 6, "ENOENT", "open the control device"],
    );
  }
});

test("ubd prints no control character of what it was given", TIMEOUT, () => {
  const name = "x\x1b]0;x\x07\u202e";
  const shown = String.raw`x\u001b]0;x\u0007\u202e`;
  for (const args of [["del", name], ["add", "loop", "--size", name], ["list", `--${name}`]]) {
    const { code, stdout, stderr } = ubd(...args, "--json");
    assert.strictEqual(code, 2);
    assert.ok(stdout.includes(shown) && stderr.includes(shown), stderr);
    assert.ok(!/[^\n -~]/.test(stdout + stderr), stderr);
    assert.ok(JSON.parse(stdout).error.message.includes(name), "JSON keeps its meaning");
  }
});

test("ubd says which verb was meant, and how large a device may be", TIMEOUT, () => {
  const meant: [string[], string][] = [
    [["dell", "0"], "del"],
    [["lsit"], "list"],
    [["rm", "0"], "del"],
    [["ls"], "list"],
    [["help", "quiece"], "quiesce"],
  ];
  for (const [args, verb] of meant) {
    const unknown = args.find((word) => word !== "help");
    mistake(args, `unknown command '${unknown}'\n(Did you mean ${verb}?)\nTry: ubd help`);
  }
  mistake(["zzzz"], "unknown command 'zzzz'\nTry: ubd help");
  mistake(["add", "null", "--size", "8P"], 'Size "8P": it must be less than 8 PiB (2^53 bytes)');
});
