// SPDX-License-Identifier: MIT
/**
 * Modules of users in the three ways that ubd is shipped: the executable, and the npm package's
 * program under Bun and Deno, away from the checkout. What they import, what is said of those that
 * cannot be loaded, and whose are refused. Their `--help` shows an option's default: what they saw.
 *
 * Runs under Bun only; needs dist/ built.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";

const ROOT = join(import.meta.dirname!, "..", "..");
const BUNDLES = ["cli.js", "mod.js", "testing.js"].map((name) => join(ROOT, "dist", name));
const BUILT = [...BUNDLES, join(ROOT, "dist", "ubd")].every((file) => existsSync(file));
const OPTIONS = { skip: BUILT ? false : "dist/ is not built: bun tools/build.ts", timeout: 60_000 };

const scratch = realpathSync(mkdtempSync(join(tmpdir(), "ubd-module-")));
after(() => rmSync(scratch, { recursive: true, force: true }));

/** As installed: in no directory whose settings help. */
const installed = join(scratch, "installed", "node_modules", "ubd", "dist");
const WAYS: Readonly<Record<string, readonly string[]>> = {
  "the executable": [join(ROOT, "dist", "ubd")],
  "Bun": [join(installed, "cli.js")],
  "Deno": ["deno", "run", "-A", "-q", join(installed, "cli.js")],
};

if (BUILT) {
  mkdirSync(installed, { recursive: true });
  for (const file of BUNDLES) cpSync(file, join(installed, file.split("/").at(-1)!));
  cpSync(join(ROOT, "package.json"), join(dirname(installed), "package.json"));
}

function files(directory: string, contents: Record<string, string>): void {
  for (const [name, text] of Object.entries(contents)) {
    const file = join(directory, name);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, text);
  }
}

function explain(way: string, module: string) {
  const [program, ...args] = [...WAYS[way]!, "add", module, "--help"];
  const PATH = [join(ROOT, "node_modules", ".bin"), process.env.PATH].join(delimiter);
  const options = { cwd: scratch, encoding: "utf8", env: { ...process.env, PATH } } as const;
  return spawnSync(program!, args, options);
}

/** A module that shows what `expression` is. */
const showing = (imports: string, expression: string) =>
  `import { defineTarget } from "ubd";
   ${imports}
   const options = { seen: { type: "string", default: String(${expression}) } } as const;
   export default defineTarget({ options, open: () => ({ size: 512, read() {} }) });\n`;

function assertSees(way: string, module: string, seen: string): void {
  const { stdout, stderr, status } = explain(way, module);
  assert.equal(status, 0, stderr);
  const [, shown] = /--opt seen=STRING +\(default: (.*)\)/.exec(stdout) ?? [];
  assert.equal(shown, seen, `${module}: ${stderr}`);
}

/** Each way that a package has to say where it begins, and what is seen of it. */
const PACKAGES: readonly [name: string, files: Record<string, string>][] = [
  ["esm-main", {
    "package.json": '{"name":"esm-main","type":"module","main":"lib/main.js"}',
    "lib/main.js": 'export const seen = "esm-main";',
  }],
  ["cjs-main", {
    "package.json": '{"name":"cjs-main","main":"./lib"}',
    "lib/index.js":
      'const { data } = require("./d.json"); exports.seen = data + typeof require("fs").openSync;',
    "lib/d.json": '{"data":"cjs-main "}',
  }],
  ["conditions", {
    "package.json": `{"name":"conditions","exports":{
      ".":{"import":"./esm.mjs","require":"./cjs.cjs"},"./sub/*":"./subs/*.mjs"}}`,
    "esm.mjs": 'import { part } from "conditions/sub/part"; export const seen = `import ${part}`;',
    "cjs.cjs": 'exports.seen = "require";',
    "subs/part.mjs": 'export const part = "sub";',
  }],
  ["@scope/nested", {
    "package.json": '{"name":"@scope/nested","type":"module","exports":"./main.js"}',
    "main.js": 'import { seen as inner } from "inner"; export const seen = `scoped ${inner}`;',
    "node_modules/inner/package.json": '{"name":"inner","main":"i"}',
    "node_modules/inner/i.js": 'exports.seen = "inner " + require("conditions").seen;',
  }],
  ["native", {
    "package.json": '{"name":"native","type":"module","main":"n.js","imports":{"#hash":"./h.js"}}',
    "n.js": 'import { hash } from "#hash"; export const seen = hash("a");',
    "h.js": 'import { createHash } from "node:crypto";\n' +
      'export const hash = (it) => createHash("sha1").update(it).digest("hex").slice(0, 6);',
  }],
  ["uses-ubd", {
    "package.json": '{"name":"uses-ubd","type":"module","main":"u.js"}',
    "u.js": 'import { defineTarget } from "ubd"; export const seen = typeof defineTarget;',
  }],
];

const SEEN: Record<string, string> = {
  "esm-main": "esm-main",
  "cjs-main": "cjs-main function",
  "conditions": "import sub",
  "@scope/nested": "scoped inner require",
  "native": "86f7e4",
  "uses-ubd": "function",
};

for (const way of Object.keys(WAYS)) {
  const home = join(scratch, `home of ${way}`);

  test(`${way} loads packages however they say where they begin`, OPTIONS, () => {
    for (const [name, contents] of PACKAGES) files(join(home, "node_modules", name), contents);
    // What ubd itself gives to modules, Deno does not give to packages: they have it installed.
    if (way === "Deno") {
      cpSync(dirname(installed), join(home, "node_modules", "ubd"), { recursive: true });
    }
    const names = Object.keys(SEEN);
    const imports = names.map((name, at) => `import { seen as seen${at} } from "${name}";`);
    const seen = names.map((_, at) => `seen${at}`);
    files(home, { "packages.ts": showing(imports.join("\n"), `[${seen}].join(", ")`) });
    assertSees(way, join(home, "packages.ts"), Object.values(SEEN).join(", "));
  });

  test(
    `${way} loads packages of the registry: fast-check with pure-rand, commander`,
    OPTIONS,
    () => {
      for (const name of ["fast-check", "pure-rand", "commander"]) {
        const from = join(ROOT, "node_modules", name);
        cpSync(from, join(home, "node_modules", name), { recursive: true });
      }
      const imports = 'import fc from "fast-check"; import { Command } from "commander";';
      const expression = 'fc.sample(fc.constant("s"), 1)[0] + new Command("c").name()';
      files(home, { "real.ts": showing(imports, expression) });
      assertSees(way, join(home, "real.ts"), "sc");
    },
  );

  test(`${way} loads JSON, CommonJS and TypeScript that a module imports`, OPTIONS, () => {
    files(home, {
      "data.json": '{"five": 5}',
      "old.cjs": 'module.exports = { old: "cjs" };',
      "part.ts": "export enum Part { A = 3 }\nexport const url: string = import.meta.url;",
      "mixed.ts": showing(
        `import data from "./data.json" with { type: "json" };
         import old from "./old.cjs";
         import { Part, url } from "./part.ts";`,
        '[data.five, old.old, Part.A, url.endsWith("/part.ts")].join(" ")',
      ),
    });
    assertSees(way, join(home, "mixed.ts"), "5 cjs 3 true");
  });

  test(`${way} loads modules whatever their path has, or says that it cannot`, OPTIONS, () => {
    for (const odd of ["# % %20 %3F \n \t ä€ \" ' ; & $", "?", "\\"]) {
      const directory = join(home, `a${odd}b`);
      files(directory, {
        [`c${odd}d.ts`]: showing('import { part } from "./part.ts";', "part"),
        "part.ts": 'export const part = "part";',
      });
      const module = join(directory, `c${odd}d.ts`);
      if (way === "Deno" || !/[?\\]/.test(odd)) {
        assertSees(way, module, "part");
      } else {
        const { stderr, status } = explain(way, module);
        assert.equal(status, 2);
        assert.match(stderr, /: Bun \S+ loads no module whose path has \? or \\; rename it, or /);
      }
    }
  });

  test(`${way} says where a module has a mistake, and names nothing of its own`, OPTIONS, () => {
    files(home, {
      "syntax.ts": 'import { defineTarget } from "ubd";\n\nexport default { size 5 };\n',
      "imports_it.ts": 'import "./syntax.ts";\nexport default {};\n',
      "throws.ts": 'function deep() {\n  throw new TypeError("too deep");\n}\ndeep();\n',
      "no_package.ts": 'import "absent-package";\n',
      "no_file.ts": 'import "./absent.ts";\n',
      "library_throws.ts": 'import { faultTarget } from "ubd";\n' +
        "export default faultTarget();\n",
      "null.ts": "throw null;\n",
    });
    const at = (file: string, place: string) => `${join(home, file)}:${place}`;
    const expected: Record<string, string[]> = {
      "syntax.ts": [at("syntax.ts", "3:23"), "export default { size 5 };"],
      "imports_it.ts": [at("syntax.ts", "3:23"), "export default { size 5 };"],
      "throws.ts": ["TypeError: too deep", at("throws.ts", "2:"), at("throws.ts", "4:")],
      "no_package.ts": ["absent-package", join(home, "no_package.ts")],
      "no_file.ts": ["absent.ts", join(home, "no_file.ts")],
      "library_throws.ts": [at("library_throws.ts", "2:")],
      "null.ts": ["Cannot load", "null"],
      "not_there.ts": ["ENOENT"],
    };
    for (const [file, texts] of Object.entries(expected)) {
      const { stderr, status, stdout } = explain(way, join(home, file));
      assert.equal(status, 2, `${file}: ${stdout}${stderr}`);
      assert.match(stderr, /^ubd: /);
      for (const text of texts) assert.ok(stderr.includes(text), `${file}: ${stderr}`);
      assert.doesNotMatch(stderr, /bunfs|file:\/\/|cli\.js/, file);
      assert.ok(!stderr.includes("\u001b"), file);
    }
  });

  test(`${way} does not run as root what others may write`, {
    ...OPTIONS,
    skip: OPTIONS.skip || (process.geteuid!() !== 0 && "needs root"),
  }, () => {
    const file = join(home, "shared.ts");
    const mark = join(home, `mark of ${way}`);
    const marks = `import { writeFileSync } from "node:fs";
      writeFileSync(${JSON.stringify(mark)}, "");`;
    files(home, { "shared.ts": showing(marks, "1") });
    chmodSync(file, 0o666);
    const { stderr, status } = explain(way, file);
    assert.equal(status, 2);
    assert.match(
      stderr,
      /^ubd: Will not run \S.*shared\.ts as root: anybody may change it; chmod /,
    );
    assert.ok(!existsSync(mark));
    chmodSync(file, 0o644);
    assertSees(way, file, "1");
    assert.ok(existsSync(mark), "it runs once nobody else may write it");
  });
}
