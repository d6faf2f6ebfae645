// SPDX-License-Identifier: MIT
/**
 * abi/ against the kernel's own headers: a C file generated from our tables, compiled, holds every
 * constant, struct size, field offset, width and sign as a compiler sees them.
 *
 * Headers: Debian sid's linux-libc-dev from the tools' cache, or the include directory in
 * UBD_LINUX_HEADERS. Compiler: the tools' Zig. Without network and cache the tests are skipped
 * with the reason, or fail where CI is set.
 *
 * Rule for completeness: whatever ublk_cmd.h of the tables' version has must be in the tables.
 * A newer header must still agree with all the tables have; what it adds is printed, not failed.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { promisify } from "node:util";
import { ERRNO } from "../../abi/errno.ts";
import * as ioUring from "../../abi/io_uring.ts";
import { type Field, fieldBytes, type Layout } from "../../abi/struct.ts";
import * as ublk from "../../abi/ublk_cmd.ts";
import { fetchPackages } from "../../tools/debian.ts";
import { findZig } from "../../tools/zig.ts";

const TABLES_VERSION = 0x070200; // LINUX_VERSION_CODE without the patch level
const run = promisify(execFile);

/** Ours, but not a constant of a header: the C expression that must have its value. */
const EXPRESSIONS: Record<string, string> = {
  SQE_CMD_OFFSET: "__builtin_offsetof(struct io_uring_sqe, cmd)",
};

const entries = [
  ...Object.entries(ublk),
  ...Object.entries(ioUring),
  ...Object.entries(ERRNO),
] as [string, unknown][];
const constants = new Map(
  entries.filter((entry): entry is [string, number | bigint] =>
    typeof entry[1] === "number" || typeof entry[1] === "bigint"
  ),
);
const layouts = new Map(
  entries.map(([_, value]) => value).filter((value): value is Layout =>
    typeof value === "object" && value !== null && "size" in value && "fields" in value
  ).map((layout) => [layout.name, layout]),
);

interface Findings {
  version: number;
  header: string;
  /** `NAME`, `struct` or `struct.field` → what the compiler says, as `expected…` words it. */
  facts: Map<string, string>;
}

/** Marks the start of the numbers in the object file; spells nothing that a compiler emits. */
const MAGIC = [0x7562642d6162692dn, 0x68656164657273f1n];

/** C expressions by name, each list one line of facts. */
function expressions(): Map<string, string[]> {
  const all = new Map([["version", ["LINUX_VERSION_CODE"]]]);
  for (const name of constants.keys()) all.set(name, [EXPRESSIONS[name] ?? name]);
  for (const { name, fields } of layouts.values()) {
    all.set(name, [`sizeof(struct ${name})`]);
    for (const [field, it] of Object.entries(fields)) {
      const member = `((struct ${name} *)0)->${field}`;
      const item = "count" in it ? `${member}[0]` : member;
      all.set(`${name}.${field}`, [
        `__builtin_offsetof(struct ${name}, ${field})`,
        `sizeof(${member})`,
        `sizeof(${item})`,
        "struct" in it
          ? `__builtin_types_compatible_p(__typeof__(${item}), struct ${it.struct.name})`
          : `(__typeof__(${item}))-1 < 0`,
      ]);
    }
  }
  return all;
}

function expectedField(field: Field): string {
  const width = "struct" in field ? field.struct.size : fieldBytes({ ...field, count: 1 });
  const isSignedOrNested = "struct" in field || field.type === "s32" ? 1 : 0;
  return `${field.offset} ${fieldBytes(field)} ${width} ${isSignedOrNested}`;
}

async function includeDirectory(): Promise<string> {
  const given = process.env.UBD_LINUX_HEADERS;
  if (given) return given;
  const packages = ["linux-libc-dev"];
  return join(await fetchPackages({ suite: "sid", arch: "amd64", packages }), "usr/include");
}

/** Compiles, and reads the numbers from the object file: nothing is linked or run. */
async function find(): Promise<Findings> {
  const wanted = expressions();
  const headers = ["linux/errno", "linux/falloc", "linux/fs", "linux/io_uring"];
  const source = [
    ...[...headers, "linux/ublk_cmd", "linux/version"].map((name) => `#include <${name}.h>`),
    "const unsigned long long facts[] = {",
    ...MAGIC.map((word) => `${word}ull,`),
    ...[...wanted.values()].flat().map((it) => `(unsigned long long)(${it}),`),
    "};",
  ];
  const include = await includeDirectory();
  const directory = await mkdtemp(join(tmpdir(), "ubd-abi-"));
  try {
    const [input, output] = [join(directory, "abi.c"), join(directory, "abi.o")];
    await writeFile(input, `${source.join("\n")}\n`);
    const asm = join(include, "x86_64-linux-gnu"); // of the target, whatever machine this is
    // Without -nostdinc, Zig's own copies of the kernel's headers would go first.
    const flags = ["-target", "x86_64-linux-musl", "-nostdinc", "-I", include, "-I", asm];
    await run(await findZig(), ["cc", ...flags, "-c", "-o", output, input]);
    const object = await readFile(output);
    const magic = Buffer.alloc(16);
    MAGIC.forEach((word, index) => magic.writeBigUInt64LE(word, index * 8));
    let at = object.indexOf(magic) + magic.length;
    const facts = new Map<string, string>();
    for (const [name, { length }] of wanted) {
      const words = Array.from({ length }, (_, i) => object.readBigUInt64LE(at + i * 8));
      facts.set(name, words.join(" "));
      at += length * 8;
    }
    const [header, version] = await Promise.all(
      ["ublk_cmd.h", "version.h"].map((name) => readFile(join(include, "linux", name), "utf8")),
    );
    return { version: Number(/VERSION_CODE (\d+)/.exec(version!)?.[1]), header: header!, facts };
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/** Names that a header declares: constants, and `struct.field` for each field. */
function declared(header: string): { constants: string[]; fields: string[] } {
  const code = header.replace(/\/\*[\s\S]*?\*\//g, " ").replace(/\\\n/g, " ");
  // A macro with parameters is no constant; the include guard has another prefix.
  const names = [...code.matchAll(/^[ \t]*#[ \t]*define[ \t]+(UBLK\w*)(?![\w(])/gm)];
  const plain = code.replace(/^[ \t]*#.*$/gm, "");
  const fields = [...plain.matchAll(/^struct\s+(\w+)\s*\{([\s\S]*?)^\};/gm)].flatMap(
    ([_, struct, body]) => {
      const flat = body!.replace(/\b(union|struct)\s*\{|\}/g, "");
      return flat.split(";").map((it) => it.trim()).filter((it) => it !== "").map((statement) => {
        const match = /^(?:__[us]\d+|struct\s+\w+)\s+(\w+)\s*(?:\[\w*\])?$/.exec(statement);
        return `${struct}.${match?.[1] ?? `(cannot parse: ${statement})`}`;
      });
    },
  );
  return { constants: names.map((match) => match[1]!), fields };
}

// At load, not in a test: the first run downloads and compiles, longer than a test may take.
const prepared = await find().catch((error: Error) => error);
if (prepared instanceof Error && process.env.CI) throw prepared;
const skip = prepared instanceof Error && `no kernel headers: ${prepared.message.split("\n")[0]}`;
if (skip) console.warn(`abi_header_test: skipped: ${skip}`); // Neither runner prints the reason.
const found = prepared as Findings;

test("the headers are those of the tables' version or newer", { skip }, () => {
  assert.ok(found.version >= TABLES_VERSION, `LINUX_VERSION_CODE 0x${found.version.toString(16)}`);
  assert.equal(found.facts.get("version"), `${found.version}`, "another header was compiled");
});

test("constants have the compiler's values", { skip }, () => {
  for (const [name, value] of constants) {
    const unsigned = BigInt.asUintN(64, BigInt(value)).toString();
    assert.equal(unsigned, found.facts.get(name), name);
  }
});

test("structs have the compiler's sizes", { skip }, () => {
  for (const { name, size } of layouts.values()) {
    assert.equal(`${size}`, found.facts.get(name), name);
  }
});

test("fields have the compiler's offsets, widths and signs", { skip }, () => {
  for (const { name, fields } of layouts.values()) {
    for (const [field, it] of Object.entries(fields)) {
      assert.equal(expectedField(it), found.facts.get(`${name}.${field}`), `${name}.${field}`);
    }
  }
});

test("every constant and field of ublk_cmd.h is in the tables", { skip }, () => {
  const there = declared(found.header);
  // Guards the parser: 7.2 has this many, and headers only grow.
  assert.ok(there.constants.length >= 129, `${there.constants.length} constants`);
  assert.ok(there.fields.length >= 95, `${there.fields.length} fields`);
  const missing = [
    ...there.constants.filter((name) => !constants.has(name)),
    ...there.fields.filter((path) => {
      const [struct, field] = path.split(".");
      return !Object.hasOwn(layouts.get(struct!)?.fields ?? {}, field!);
    }),
  ];
  if (found.version < TABLES_VERSION + 0x100) assert.deepEqual(missing, []);
  else if (missing.length > 0) console.warn(`new in ublk_cmd.h: ${missing.join(", ")}`);
});

test("the parser of ublk_cmd.h sees unions, arrays and nested structs, not functions", () => {
  const header =
    "#define UBLK_A 1\n#define\tUBLK_B \\\n  2\n#define UBLK_C(x) x\n/* #define UBLK_D */\n" +
    "struct s {\n__u32 a; /* b; */\nunion {\n__u8 c[4];\nstruct t d;\n};\n#define UBLK_E 3\n};\n" +
    "static int f(struct s *s)\n{\nstruct s x = {\n};\n}\nstruct u {\n__u8 x, y;\n};\n";
  assert.deepEqual(declared(header), {
    constants: ["UBLK_A", "UBLK_B", "UBLK_E"],
    fields: ["s.a", "s.c", "s.d", "u.(cannot parse: __u8 x, y)"],
  });
});
