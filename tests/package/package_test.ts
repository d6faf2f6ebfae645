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
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
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

test(
  "the package holds the bundles and the sources of the library, and nothing else",
  OPTIONS,
  () => {
    const files = output(scratch, "tar", ["-tzf", tarball]).trimEnd().split("\n").sort();
    assert.ok(files.includes("package/dist/cli.js") && files.includes("package/dist/mod.js"));
    assert.ok(files.includes("package/mod.ts") && files.includes("package/ffi/shim_binary.ts"));
    assert.ok(files.includes("package/systemd/ubd@.service"));
    assert.ok(files.includes("package/LICENSE") && files.includes("package/package.json"));
    const known =
      /^package\/((abi|core|ffi|targets|testing)\/\w+\.ts|mod\.ts|dist\/(cli|mod|testing)\.js|systemd\/ubd@\.service|package\.json|LICENSE|README\.md|CHANGELOG\.md)$/;
    assert.deepStrictEqual(files.filter((file) => !known.test(file)), []);
  },
);

test(
  "the package is smaller than 1 MiB, unpacked 1.5 MiB, and names no path of this machine",
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
    assert.ok(bytes > 100_000 && bytes < 1.5 * 1024 ** 2, `${bytes} bytes`);
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
  test(`import("ubd") works under ${runtime}, and its types' file is there`, OPTIONS, () => {
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
    assert.ok(existsSync(join(installed, "node_modules/ubd/mod.ts")));
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
    assert.ok(existsSync(join(installed, "node_modules/ubd/testing/mod.ts")));
  });
}

for (
  const [form, command] of Object.entries({
    "the executable": [join(ROOT, "dist", "ubd")],
    "Bun": ["bun", join(ROOT, "dist", "cli.js")],
    "Deno": ["deno", "run", "-A", "-q", join(ROOT, "dist", "cli.js")],
  })
) {
  test(`a module that ${form} serves may import "ubd/testing", installed or not`, OPTIONS, () => {
    const cwd = directory(`module of ${form}`);
    writeFileSync(
      join(cwd, "x.ts"),
      `import { defineTarget } from "ubd";
       import { openForTesting } from "ubd/testing";
       const options = { a: { type: "string", default: typeof openForTesting } } as const;
       export default defineTarget({ options, open: () => ({ size: 512, read() {} }) });`,
    );
    const [program, ...args] = [...command, "add", "./x.ts", "--help"];
    assert.match(output(cwd, program!, args), /--opt a=STRING +\(default: function\)/);
  });
}

/** A directory whose settings make a careless Bun program run code and take its environment. */
function hostileDirectory(name: string) {
  const cwd = directory(name);
  const [marker, temporary] = [join(cwd, "marker"), join(cwd, "evil-tmp")];
  mkdirSync(temporary);
  utimesSync(temporary, 1, 1);
  writeFileSync(join(cwd, ".env"), `TMPDIR=${temporary}\n`);
  writeFileSync(join(cwd, "bunfig.toml"), 'preload = ["./evil.ts"]\n');
  writeFileSync(
    join(cwd, "evil.ts"),
    `import { writeFileSync } from "node:fs";\nwriteFileSync(${JSON.stringify(marker)}, "");\n`,
  );
  return {
    cwd,
    ranCode: () => existsSync(marker),
    // Loading the shim makes a directory in TMPDIR, and removes it.
    tookEnvironment: () => statSync(temporary).mtimeMs !== 1000,
  };
}

/** Loads the shim and looks for devices: exit 0, or 6 without a driver. */
function list(cwd: string, command: string, args: string[]): void {
  const env: NodeJS.ProcessEnv = { ...process.env, PATH };
  delete env.TMPDIR;
  const { status } = spawnSync(command, [...args, "list"], { cwd, env, stdio: "ignore" });
  assert.ok(status === 0 || status === 6, `exit ${status}`);
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

test("dist/ubd neither runs a bunfig.toml's preload nor takes a .env's settings", OPTIONS, () => {
  const hostile = hostileDirectory("hostile");
  list(hostile.cwd, join(ROOT, "dist", "ubd"), []);
  assert.deepStrictEqual([hostile.ranCode(), hostile.tookEnvironment()], [false, false]);
});

test("the trap above works: Bun itself, started there, walks into it", OPTIONS, () => {
  const hostile = hostileDirectory("control");
  list(hostile.cwd, "bun", [join(ROOT, "dist", "cli.js")]);
  assert.deepStrictEqual([hostile.ranCode(), hostile.tookEnvironment()], [true, true]);
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
