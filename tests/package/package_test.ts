// SPDX-License-Identifier: MIT
/**
 * What is shipped, from where a user stands: the npm package, packed and installed into an empty
 * directory, and the single executable.
 *
 *   bun tools/build.ts && bun test tests/package
 *
 * Runs under Bun only; needs dist/ built, npm, and no network. No Zig is on the PATH.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { execFileSync, spawnSync } from "node:child_process";
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import process from "node:process";
import { after, before, test } from "node:test";
import { VERSION } from "../../core/version.ts";

const ROOT = join(import.meta.dirname!, "..", "..");
const DIST = ["cli.js", "mod.js", "ubd"].map((name) => join(ROOT, "dist", name));
const BUILT = DIST.every((file) => existsSync(file));
const OPTIONS = { skip: BUILT ? false : "dist/ is not built: bun tools/build.ts", timeout: 60_000 };

const scratch = mkdtempSync(join(tmpdir(), "ubd-package-"));
after(() => rmSync(scratch, { recursive: true, force: true }));

/** The PATH of a user who has the runtimes, npm, and no compiler. */
const PATH = [join(ROOT, "node_modules", ".bin"), ...process.env.PATH!.split(delimiter)]
  .filter((directory) => !existsSync(join(directory, "zig"))).join(delimiter);

function output(cwd: string, command: string, args: string[], env = {}): string {
  const options = { cwd, encoding: "utf8", env: { ...process.env, PATH, ...env } } as const;
  return execFileSync(command, args, { ...options, stdio: ["ignore", "pipe", "pipe"] });
}

function directory(name: string): string {
  const path = join(scratch, name);
  mkdirSync(path);
  return path;
}

let tarball = "";
let installed = "";

before(() => {
  if (!BUILT) return;
  const into = directory("pack");
  const args = ["pack", "--ignore-scripts", "--silent", "--pack-destination", into];
  output(ROOT, "npm", args);
  const [name] = readdirSync(into);
  tarball = join(into, name!);
  installed = directory("installed");
  writeFileSync(join(installed, "package.json"), '{"name":"user","private":true}');
  // A registry that is not there: whatever the package wanted from it would fail.
  const npm = {
    npm_config_registry: "http://127.0.0.1:9/",
    BUN_CONFIG_REGISTRY: "http://127.0.0.1:9/",
  };
  output(installed, "bun", ["add", tarball], npm);
});

test("the package holds the bundles, their types, and nothing else", OPTIONS, () => {
  const files = output(scratch, "tar", ["-tzf", tarball]).trimEnd().split("\n").sort();
  for (
    const file of ["cli.js", "mod.js", "testing.js", "types/mod.d.ts", "types/testing/mod.d.ts"]
  ) {
    assert.ok(files.includes(`package/dist/${file}`), file);
  }
  for (const file of ["LICENSE", "SECURITY.md", "package.json", "systemd/ubd@.service"]) {
    assert.ok(files.includes(`package/${file}`), file);
  }
  const known =
    /^package\/(dist\/((cli|mod|testing)\.js|types\/(\w+\/)?\w+\.d\.ts)|systemd\/ubd@\.service|package\.json|LICENSE|(README|CHANGELOG|SECURITY)\.md)$/;
  assert.deepStrictEqual(files.filter((file) => !known.test(file)), []);
});

test(
  "the package is smaller than 1 MiB, unpacked too, and names no path of this machine",
  OPTIONS,
  () => {
    assert.ok(statSync(tarball).size < 1024 ** 2);
    const unpacked = directory("unpacked");
    output(unpacked, "tar", ["-xzf", tarball]);
    let bytes = 0;
    for (const name of readdirSync(unpacked, { recursive: true, encoding: "utf8" })) {
      const file = join(unpacked, name);
      if (!statSync(file).isFile()) continue;
      const text = readFileSync(file, "latin1");
      bytes += text.length;
      assert.ok(!text.includes(ROOT), `${name} names ${ROOT}`);
      assert.doesNotMatch(text, /BEGIN [A-Z ]*PRIVATE KEY|\b(npm|ghp|github_pat)_[A-Za-z0-9]{30}/);
    }
    assert.ok(bytes > 100_000 && bytes < 1024 ** 2, `${bytes} bytes`);
  },
);

test("the installed package brings no other package", OPTIONS, () => {
  const packages = readdirSync(join(installed, "node_modules")).filter((name) => name[0] !== ".");
  assert.deepStrictEqual(packages, ["ubd"]);
});

test("npm installs the tarball too, offline", OPTIONS, () => {
  const cwd = directory("npm");
  writeFileSync(join(cwd, "package.json"), '{"name":"user","private":true}');
  const quiet = ["--offline", "--no-audit", "--no-fund", "--loglevel=error"];
  output(cwd, "npm", ["install", ...quiet, tarball]);
  const { version } = JSON.parse(readFileSync(join(cwd, "node_modules/ubd/package.json"), "utf8"));
  assert.strictEqual(version, VERSION);
});

test("bunx ubd version runs from the installed package", OPTIONS, () => {
  const line = output(installed, "bunx", ["ubd", "version"]);
  assert.ok(line.startsWith(`ubd ${VERSION} (Bun ${process.versions.bun}, Linux `), line);
});

test("the installed package's program runs under Deno", OPTIONS, () => {
  const args = ["run", "-A", "-q", "node_modules/ubd/dist/cli.js", "version"];
  assert.ok(output(installed, "deno", args).startsWith(`ubd ${VERSION} (Deno `));
});

for (const [runtime, args] of [["bun", []], ["deno", ["run", "-A", "-q"]]] as const) {
  test(`import("ubd") works under ${runtime}, and all it exports is there`, OPTIONS, () => {
    writeFileSync(
      join(installed, "import.mjs"),
      'const ubd = await import("ubd");\n' +
        "console.log(JSON.stringify([ubd.VERSION, Object.keys(ubd).sort()]));\n",
    );
    const [version, names] = JSON.parse(output(installed, runtime, [...args, "import.mjs"]));
    assert.strictEqual(version, VERSION);
    const some = ["UblkError", "createDevice", "defineTarget", "faultTarget", "httpTarget"];
    for (const name of some) {
      assert.ok(names.includes(name), name);
    }
  });

  test(`a target is tested with import("ubd/testing") under ${runtime}`, OPTIONS, () => {
    writeFileSync(
      join(installed, "testing.mjs"),
      'import { defineTarget } from "ubd";\n' +
        'import { checkAgainstModel, openForTesting } from "ubd/testing";\n' +
        "const ones = defineTarget({ size: 4096, read: ({ buffer }) => void buffer.fill(1) });\n" +
        "await using device = await openForTesting(ones);\n" +
        "const [byte] = await device.read(512, 512);\n" +
        "const missing = await checkAgainstModel(ones).catch((error) => error.message);\n" +
        "console.log(JSON.stringify([byte, missing]));\n",
    );
    const [byte, missing] = JSON.parse(output(installed, runtime, [...args, "testing.mjs"]));
    assert.strictEqual(byte, 1);
    assert.match(missing, /^checkAgainstModel needs the package fast-check: install it/);
  });
}

/** As a strict project of a user has it; the strictest that tsc has. */
const STRICT = [
  ...["noEmit", "strict", "exactOptionalPropertyTypes", "noUncheckedIndexedAccess"],
  ...["noImplicitOverride", "noPropertyAccessFromIndexSignature", "noImplicitReturns"],
  ...["noUnusedLocals", "noUnusedParameters", "noFallthroughCasesInSwitch", "isolatedModules"],
  ...["verbatimModuleSyntax", "noUncheckedSideEffectImports"],
].map((name) => `--${name}`);

const TYPED = `
import { type BlockDevice, createDevice, defineTarget, fault, httpTarget, UblkError } from "ubd";
import { checkAgainstModel, openForTesting } from "ubd/testing";

const disk = new Uint8Array(1024 ** 2);
export const target = defineTarget({
  options: { size: { type: "size", default: "1M" }, label: { type: "string" } },
  open({ size, label }) {
    const device: BlockDevice = {
      size: size + (label?.length ?? 0),
      read: ({ offset, length, buffer }) => buffer.set(disk.subarray(offset, offset + length)),
      write: ({ offset, buffer, fua }) => {
        disk.set(buffer, offset);
        return fua ? buffer.length : undefined;
      },
    };
    return fault(device, {});
  },
});

export async function main(): Promise<void> {
  try {
    await using device = await createDevice(target, { options: { size: "1M" } });
    console.log(device.path, device.stats());
  } catch (error) {
    if (error instanceof UblkError) console.log(error.errno);
  }
  // @ts-expect-error a device's size is a number
  defineTarget({ size: "1M", read() {} });
  await using tested = await openForTesting(httpTarget);
  const bytes: Uint8Array = await tested.read(0, 512);
  await checkAgainstModel(target, { runs: bytes.length });
}
`;
test("the types are right for tsc, whatever its modules, and for deno check", OPTIONS, () => {
  const cwd = directory("typed");
  writeFileSync(join(cwd, "package.json"), '{"name":"user","private":true,"type":"module"}');
  cpSync(join(installed, "node_modules"), join(cwd, "node_modules"), { recursive: true });
  writeFileSync(join(cwd, "typed.ts"), TYPED);
  const modules = [["node16"], ["nodenext"], ["esnext", "--moduleResolution", "bundler"]];
  for (const module of modules) {
    // Of the libraries, the oldest target that has what the code itself needs.
    const args = [
      ...STRICT,
      "--skipLibCheck",
      "false",
      "--target",
      "es2022",
      "--module",
      ...module,
    ];
    const options = { cwd, encoding: "utf8", env: { ...process.env, PATH } } as const;
    const { status, stdout } = spawnSync("tsc", [...args, "typed.ts"], options);
    assert.deepStrictEqual([status, stdout], [0, ""], args.join(" "));
  }
  output(cwd, "deno", ["check", "-q", "typed.ts"]);
});

test(
  "under Node.js, targets can be defined; what needs the kernel says what it needs",
  OPTIONS,
  () => {
    writeFileSync(
      join(installed, "node.mjs"),
      'import { createDevice, defineTarget, UsageError } from "ubd";\n' +
        'import { openForTesting } from "ubd/testing";\n' +
        "const target = defineTarget({ size: 4096, read() {} });\n" +
        "const told = [typeof UsageError];\n" +
        "for (const start of [createDevice, openForTesting]) {\n" +
        "  await start(target).catch((error) => told.push(error.message));\n" +
        "}\n" +
        "console.log(JSON.stringify(told));\n",
    );
    const [type, ...told] = JSON.parse(output(installed, "node", ["node.mjs"]));
    assert.strictEqual(type, "function");
    assert.strictEqual(told.length, 2);
    const needed =
      /ubd needs Bun 1\.4 or Deno 2\.9, and this is Node\.js \d\S+: .*"bun test", "deno/;
    for (const message of told) assert.match(message, needed);

    writeFileSync(
      join(installed, "uncaught.mjs"),
      `import { createDevice, defineTarget } from "ubd";
    await createDevice(defineTarget({ size: 4096, read() {} }));`,
    );
    for (const args of [["uncaught.mjs"], ["node_modules/ubd/dist/cli.js", "list"]]) {
      const options = { cwd: installed, encoding: "utf8", env: { ...process.env, PATH } } as const;
      const { status, stderr } = spawnSync("node", args, options);
      assert.ok(status === 1 || status === 2, `${status}`);
      assert.match(stderr, needed);
      assert.doesNotMatch(stderr, /this is a bug/);
      assert.ok(stderr.length < 2000, `${stderr.length} characters`);
    }
  },
);

/** A directory whose settings make a careless Bun program run code and take its environment. */
function hostileDirectory(name: string) {
  const cwd = directory(name);
  const marking = (mark: string) =>
    `require("fs").writeFileSync(${JSON.stringify(join(cwd, mark))}, "");\nmodule.exports = {};\n`;
  writeFileSync(join(cwd, "bunfig.toml"), 'preload = ["./preload.cjs"]\n');
  writeFileSync(join(cwd, "preload.cjs"), marking("mark of bunfig.toml"));
  const paths = { "not-installed": ["./path.cjs"] };
  writeFileSync(join(cwd, "tsconfig.json"), JSON.stringify({ compilerOptions: { paths } }));
  writeFileSync(join(cwd, "path.cjs"), marking("mark of tsconfig.json"));
  writeFileSync(join(cwd, ".env"), "UBD_SETTING=dirty\n");
  writeFileSync(
    join(cwd, "x.ts"),
    `await import("not-installed").catch(() => {});
     const options = { a: { type: "string", default: process.env.UBD_SETTING ?? "clean" } };
     export default { options, open() {} };`,
  );
  return {
    cwd,
    /** What of it had an effect on this program. */
    effects(command: string, ...args: string[]): string[] {
      const shown = output(cwd, command, [...args, "add", "./x.ts", "--help"]);
      const marks = readdirSync(cwd).filter((file) => file.startsWith("mark of ")).sort();
      return /--opt a=STRING +\(default: clean\)/.test(shown) ? marks : [".env", ...marks];
    },
  };
}

/** Loads the shim and looks for devices: exit 0, or 6 without a driver. */
function list(cwd: string, command: string, args: string[], more: NodeJS.ProcessEnv = {}): void {
  const env: NodeJS.ProcessEnv = { ...process.env, PATH, ...more };
  const options = { cwd, env, encoding: "utf8" } as const;
  const { status, stderr } = spawnSync(command, [...args, "list"], options);
  assert.ok(status === 0 || status === 6, `exit ${status}: ${stderr}`);
}

test("dist/ubd, copied alone into an empty directory, runs", OPTIONS, () => {
  const cwd = directory("alone");
  copyFileSync(join(ROOT, "dist", "ubd"), join(cwd, "ubd"));
  const options = { cwd, encoding: "utf8", env: {} } as const;
  const { status, stdout } = spawnSync(join(cwd, "ubd"), ["version"], options);
  assert.strictEqual(status, 0);
  assert.ok(stdout.startsWith(`ubd ${VERSION} (Bun `), stdout);
  list(cwd, join(cwd, "ubd"), []);
  assert.deepStrictEqual(readdirSync(cwd), ["ubd"]);
});

for (const program of ["dist/ubd", "dist/cli.js"]) {
  test(`${program} takes nothing of the directory that it is started in`, OPTIONS, () => {
    const hostile = hostileDirectory(`hostile ${program.replace("/", " ")}`);
    assert.deepStrictEqual(hostile.effects(join(ROOT, program)), []);
  });
}

test("the trap above works: Bun itself, started there, walks into it", OPTIONS, () => {
  const hostile = hostileDirectory("control");
  assert.deepStrictEqual(
    hostile.effects("bun", join(ROOT, "dist", "cli.js")),
    [".env", "mark of bunfig.toml", "mark of tsconfig.json"],
  );
});

test("dist/ubd takes no orders for its runtime from the environment", OPTIONS, () => {
  const cwd = directory("environment");
  const mark = join(cwd, "mark");
  const evil = join(cwd, "evil.cjs");
  writeFileSync(evil, `require("fs").writeFileSync(${JSON.stringify(mark)}, "");`);
  const orders = {
    BUN_OPTIONS: `--preload=${evil}`,
    BUN_BE_BUN: "1",
    BUN_INSPECT: "ws://127.0.0.1:0/ubd?break=1",
    BUN_INSPECT_PRELOAD: evil,
    BUN_BYTECODE_DIGEST_OUT: mark,
    BUN_BYTECODE_ORDER_NAMES_OUT: mark,
    BUN_BYTECODE_ORDER_OUT: mark,
    NODE_OPTIONS: `--require=${evil}`,
  };
  for (const [name, value] of Object.entries(orders)) {
    list(cwd, join(ROOT, "dist", "ubd"), [], { [name]: value });
    assert.ok(!existsSync(mark), name);
  }
  // The same runtime, as it is compiled by default, obeys the first two.
  writeFileSync(join(cwd, "plain.js"), "");
  output(cwd, "bun", ["build", "--compile", "plain.js", "--outfile", "plain"]);
  output(cwd, join(cwd, "plain"), [], { BUN_OPTIONS: orders.BUN_OPTIONS });
  assert.ok(existsSync(mark), "the trap works");
});

interface DenoPayload {
  metadata: { entrypoint_key: string; permissions: Record<string, unknown> };
  files: Map<string, Uint8Array>;
}

/**
 * What `deno compile` put behind the runtime, as Deno 2.9 writes it: the magic, then with a u64
 * length in front of each the metadata, the list of files, and the files' bytes.
 */
function readDenoPayload(path: string): DenoPayload {
  const bytes = readFileSync(path);
  const magic = "d3n0l4nd".repeat(2);
  let at = bytes.lastIndexOf(magic) + magic.length;
  assert.ok(at >= magic.length, "no payload");
  const part = () => {
    const from = at + 8;
    at = from + Number(bytes.readBigUInt64LE(at));
    return bytes.subarray(from, at);
  };
  const metadata = JSON.parse(part().toString());
  at = bytes.indexOf("[{", at) - 8; // Behind empty lists of npm packages and redirects.
  const entries = JSON.parse(part().toString()) as { File?: { n: string; o: [number, number] } }[];
  const blob = part();
  const files = new Map<string, Uint8Array>();
  for (const { File } of entries) {
    assert.ok(File, "a directory or a link");
    files.set(File.n, blob.subarray(File.o[0], File.o[0] + File.o[1]));
  }
  return { metadata, files };
}

test(
  "deno compile embeds dist/cli.js, byte for byte and alone (the result cannot be started here: " +
    "the npm registry has no denort, the runtime stub, so the payload is what is checked)",
  OPTIONS,
  () => {
    const cwd = directory("deno-compile");
    copyFileSync(join(ROOT, "dist", "cli.js"), join(cwd, "cli.js"));
    const DENORT_BIN = output(cwd, "deno", ["eval", "-q", "console.log(Deno.execPath())"]).trim();
    const args = ["compile", "-A", "-q", "--no-check", "--output", "ubd", "cli.js"];
    output(cwd, "deno", args, { DENORT_BIN });
    const { metadata, files } = readDenoPayload(join(cwd, "ubd"));
    assert.strictEqual(metadata.entrypoint_key, "cli.js");
    assert.deepStrictEqual(metadata.permissions.allow_ffi, []); // All of it.
    assert.deepStrictEqual([...files.keys()], ["cli.js"]);
    assert.ok(Buffer.from(files.get("cli.js")!).equals(readFileSync(join(cwd, "cli.js"))));
  },
);
