// SPDX-License-Identifier: MIT
/**
 * What is printed arrives whole, however slow its reader, or the exit code says that it has not.
 * Under the runtime that runs this test, through pipes of a shell.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import { EXIT } from "../../cli/exit.ts";
import { runtime } from "../../ffi/mod.ts";

const ROOT = join(import.meta.dirname!, "..", "..");
const SCRATCH = mkdtempSync(join(tmpdir(), "ubd-output-"));
after(() => rmSync(SCRATCH, { recursive: true }));
const TIMEOUT = { timeout: 60_000 };

const FLAGS = runtime.startsWith("Deno") ? "run -A -q --no-check" : "";
const UBD = `'${process.execPath}' ${FLAGS} '${ROOT}/cli/main.ts'`;

function program(name: string, body: string): string {
  const file = join(SCRATCH, `${name}.ts`);
  writeFileSync(
    file,
    `import { existsSync, writeFileSync } from "node:fs";\n` +
      `import { finish } from "${ROOT}/cli/exit.ts";\n` +
      `import { neverWait, print, tell } from "${ROOT}/cli/output.ts";\n${body}`,
  );
  return `'${process.execPath}' ${FLAGS} '${file}'`;
}

/** Lines of 200 bytes, more than a pipe holds. */
const LINES = 2000;
const line = (index: number) => `${index}`.padEnd(194, "x");
const whole = Array.from({ length: LINES }, (_, index) => `ubd: ${line(index)}\n`).join("");
const LINE = '`${index}`.padEnd(194, "x")';
const FILL = 60_000;

function shell(script: string): { code: number | null; stdout: string; stderr: string } {
  const { status, stdout, stderr } = spawnSync("bash", ["-c", script], {
    cwd: SCRATCH,
    encoding: "utf8",
    env: { ...process.env, NO_COLOR: "1" },
    maxBuffer: 2 ** 26,
    timeout: 50_000,
  });
  return { code: status, stdout, stderr };
}

/** A pipe that is almost full, with a reader that begins when the program has to wait for it. */
const through = (command: string, flag = "") =>
  `{ dd if=/dev/zero bs=${FILL} count=1 ${flag} status=none; ${command}; } | { sleep 0.4; cat; }`;

for (const [kind, flag] of [["waits", ""], ["does not wait", "oflag=nonblock"]] as const) {
  test(`what is printed goes whole through a slow pipe that ${kind}`, TIMEOUT, () => {
    const out = program(
      "out",
      `for (let index = 0; index < ${LINES}; index++) print("ubd: " + ${LINE} + "\\n");\n` +
        "process.exit(await finish(0));",
    );
    const err = program(
      "err",
      `for (let index = 0; index < ${LINES}; index++) tell(${LINE});\n` +
        "process.exit(await finish(0));",
    );
    for (const command of [out, `${err} 2>&1 >/dev/null`]) {
      const { stdout } = shell(through(`${command}; echo $? >code`, flag));
      assert.ok(stdout.slice(FILL) === whole, `${stdout.length - FILL} of ${whole.length} bytes`);
      assert.strictEqual(readFileSync(join(SCRATCH, "code"), "utf8"), "0\n");
    }
  });

  test(`a verb's output goes whole through a slow pipe that ${kind}`, TIMEOUT, () => {
    const { stdout: expected } = shell(`${UBD} help --json`);
    assert.ok(expected.length > 2 ** 16 - FILL);
    const { stdout } = shell(through(`${UBD} help --json`, flag));
    assert.ok(stdout.slice(FILL) === expected, `${stdout.length - FILL} of ${expected.length}`);
  });
}

test("output that cannot be written is no success, and the message says why", TIMEOUT, () => {
  const why = "ubd: Cannot write to standard output: ENOSPC, No space left on device " +
    "(the work is done; only what was to be printed is lost)\n";
  for (const words of ["version", "help add", "version --json", "--help"]) {
    const { code, stderr } = shell(`${UBD} ${words} >/dev/full`);
    assert.deepStrictEqual({ code, stderr }, { code: EXIT.FAILURE, stderr: why }, words);
  }
});

test("a failure keeps its code when it cannot be told", TIMEOUT, () => {
  for (const to of [">/dev/full 2>/dev/full", ">/dev/full 2>&-", ">&- 2>&-"]) {
    assert.strictEqual(shell(`${UBD} frobnicate --json ${to}`).code, EXIT.USAGE, to);
  }
});

test("a reader that goes early ends the program without a word, as SIGPIPE would", TIMEOUT, () => {
  const { stdout, stderr } = shell(
    `trap '' PIPE; { while printf x; do sleep 0.01; done 2>/dev/null; ` +
      `${UBD} help --json; echo $? >&3; } 3>&2 | true`,
  );
  assert.deepStrictEqual({ stdout, stderr }, { stdout: "", stderr: `${EXIT.PIPE}\n` });
});

test("with closed descriptors nothing is printed, and into no file that is open", TIMEOUT, () => {
  const opened = program(
    "opened",
    `import { readlinkSync } from "node:fs";
const paths = [0, 1, 2].map((fd) => readlinkSync("/proc/self/fd/" + fd));
writeFileSync("opened", JSON.stringify(paths));
print("x");
tell("x");
process.exit(await finish(0));`,
  );
  // Else the next file that is opened, such as the image, would be what is printed into.
  assert.strictEqual(shell(`${opened} <&- >&- 2>&-`).code, 0);
  const paths = JSON.parse(readFileSync(join(SCRATCH, "opened"), "utf8"));
  assert.deepStrictEqual(paths, ["/dev/null", "/dev/null", "/dev/null"]);
  for (const closed of [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"]) {
    assert.strictEqual(shell(`${UBD} version ${closed}`).code, EXIT.OK, closed);
  }
});

test(
  "a server waits for no reader of its log: one that does not read, one that is gone",
  TIMEOUT,
  () => {
    const server = program(
      "server",
      `neverWait();
for (let index = 0; index < Number(process.argv[2]); index++) {
  tell(${LINE});
  if (index % 100 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
}
const code = await finish(0);
writeFileSync("done", "");
process.exit(code);`,
    );
    const { code, stdout } = shell(
      `rm -f done; set -o pipefail; ${server} ${5 * LINES} 2>&1 | ` +
        "{ until [ -e done ]; do sleep 0.05; done; cat; }",
    );
    assert.strictEqual(code, 0);
    const got = stdout.split("\n").slice(0, -1);
    assert.ok(got.length > 100 && got.length < 5 * LINES, `${got.length} lines`);
    // What a full pipe took last may be a part.
    got.slice(0, -1).forEach((text, index) => assert.strictEqual(text, `ubd: ${line(index)}`));
    assert.strictEqual(shell(`set -o pipefail; ${server} ${LINES} 2>&1 | true`).code, 0);
    const all = shell(`${server} ${LINES} 2>log; cat log`);
    assert.ok(all.stdout === whole, "a file takes all");
  },
);
