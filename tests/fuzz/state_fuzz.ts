// SPDX-License-Identifier: MIT
/**
 * State directories that somebody has spoilt, under the verbs that read them, with a driver that
 * answers from a table.
 */
import assert from "node:assert/strict";
import {
  chmodSync,
  chownSync,
  lchownSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import process from "node:process";
import fc from "fast-check";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import { unpack } from "../../abi/struct.ts";
import {
  UBLK_PARAMS,
  UBLK_S_DEV_DEAD,
  UBLK_S_DEV_LIVE,
  UBLK_S_DEV_QUIESCED,
} from "../../abi/ublk_cmd.ts";
import { type AddOptions, toSpec, waitingDevice } from "../../cli/add.ts";
import { EXIT, toFailure } from "../../cli/exit.ts";
import { removeAll, staleFiles } from "../../cli/gc.ts";
import { divertOutput } from "../../cli/output.ts";
import { runProgram } from "../../cli/program.ts";
import { knownState } from "../../cli/recover.ts";
import { refuseAwaited } from "../../cli/open_target.ts";
import { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import {
  makersMark,
  onStateFault,
  readState,
  stateNames,
  useStateDirectory,
} from "../../core/state.ts";
import { Shim } from "../../ffi/mod.ts";
import type { Fuzzer } from "./fuzzer.ts";

const shim = new Shim();
const isRoot = process.getuid!() === 0;
const SCRATCH = mkdtempSync(join(tmpdir(), "ubd-state-fuzz-"));
process.on("exit", () => rmSync(SCRATCH, { recursive: true, force: true }));
const DIRECTORY = join(SCRATCH, "ubd");
const OUTSIDE = join(SCRATCH, "outside");
const CLASS = join(SCRATCH, "class");
const IMAGE = join(OUTSIDE, "image");

const MARK = makersMark(7);
/** By id: what the driver says of each device. */
const DEVICES: readonly Pick<DeviceInfo, "state" | "pid">[] = [
  { state: UBLK_S_DEV_LIVE, pid: process.pid },
  { state: UBLK_S_DEV_QUIESCED, pid: 2 ** 22 - 1 },
  { state: UBLK_S_DEV_DEAD, pid: -1 },
  { state: UBLK_S_DEV_LIVE, pid: 2 ** 22 - 2 },
];

const OPTIONS = { queues: 1, depth: 8, maxIoSize: 4096, partscan: true, recovery: "wait" } as const;
const specs = [
  toSpec("null", [], { ...OPTIONS, number: -1 } as AddOptions),
  toSpec("loop", [IMAGE], { ...OPTIONS, number: 1 } as AddOptions),
  toSpec("concat", [IMAGE, IMAGE], { ...OPTIONS, number: -1 } as AddOptions),
  toSpec("./x.ts", [], { ...OPTIONS, number: -1, opt: { a: "1" } } as AddOptions),
];

const serverOf = (id: number) => Math.max(DEVICES[id]?.pid ?? 1, 1);

/** As a server would have written it. */
const goodState = (id: number, spec: number) => ({
  version: 1,
  mark: `0x${MARK.toString(16)}`,
  pid: serverOf(id),
  nodes: ["/dev/ublkb0"],
  target: { name: specs[spec]!.target.name, dev_size: 4096, files: [IMAGE] },
  queues: [{ qid: 0, tid: process.pid, affinity: [0] }],
  spec: specs[spec],
});

const device = (id: number): DeviceInfo =>
  ({
    id,
    queues: 1,
    depth: 8,
    maxIoBytes: 4096,
    ownerUid: 0,
    ownerGid: 0,
    flags: 8n,
    targetFlags: MARK,
    ...DEVICES[id],
  }) as DeviceInfo;

const control = {
  shim: Object.assign(Object.create(Shim.prototype), shim, {
    native: { ...shim.native, ubd_set_affinity: () => 0 },
  }),
  // Below /sys/class, where deviceIds looks.
  dialect: { ...UBLK, charClass: join("../..", CLASS) },
  features: 0n,
  room: 16,
  require() {},
  getDeviceInfo: (id: number) =>
    DEVICES[id]
      ? Promise.resolve(device(id))
      : Promise.reject(new UblkError({ errno: "ENODEV", operation: "GET_DEV_INFO", device: id })),
  getParams: () => {
    const params = unpack(UBLK_PARAMS, new Uint8Array(UBLK_PARAMS.size));
    return Promise.resolve({ ...params, basic: { ...params.basic, dev_sectors: 8n } });
  },
  updateSize: () => Promise.resolve(),
  stopDevice: () => Promise.resolve(),
  deleteDevice: () => Promise.resolve(),
  deleteDeviceLater: () => Promise.resolve(),
  [Symbol.dispose]() {},
} as unknown as Control;

const VERBS: readonly string[][] = [
  ["list"],
  ["list", "--json"],
  ["list", "-v"],
  ...[0, 1, 2, 3].flatMap((id) => [["info", `${id}`], ["info", `${id}`, "--json"]]),
  ["resize", "0", "1G"],
  ["resize", "1", "--json", "--force"],
  ["set_affinity", "0", "--cpuset", "0"],
  ["del", "--force", "1", "2"],
  ["log", "0"],
  ["log", "1", "--json"],
];

/** Any JSON, among it what is only almost right. */
const anything = fc.oneof(
  fc.jsonValue({ maxDepth: 3 }),
  fc.constantFrom(null, 0, -1, 1.5, "", "x", [], {}, [null], [[]], true, 2 ** 40, "/dev/null"),
  fc.constantFrom<unknown>(
    { toString: 1 },
    JSON.parse('{"__proto__": {"name": 1}}'),
    [{ qid: 0, tid: 1, affinity: [2 ** 31] }],
    { name: "loop", options: { file: 1 } },
    { name: {} },
  ),
);

const FIELDS = [
  ...["version", "mark", "pid", "supervisor", "leashed", "nodes", "target", "queues", "spec"],
  ...["spec.device", "spec.target", "spec.target.name", "spec.target.options", "spec.recovery"],
  ...["spec.target.options.file", "spec.target.options.files", "target.name", "queues.0"],
  ...["queues.0.affinity", "later"],
];

/** A state of which one thing is changed, or gone. */
const changed = fc.tuple(
  fc.integer({ min: 0, max: specs.length - 1 }),
  fc.constantFrom(...FIELDS),
  fc.option(anything, { nil: undefined }),
).map(([spec, path, value]) => (id: number) => {
  const state = structuredClone(goodState(id, spec)) as Record<string, unknown>;
  const steps = path.split(".");
  const last = steps.pop()!;
  let at: Record<string, unknown> | undefined = state;
  for (const step of steps) at = at?.[step] as typeof at;
  if (at) at[last] = value;
  return JSON.stringify(state);
});

const deep = (levels: number) => `${'{"a":'.repeat(levels)}1${"}".repeat(levels)}`;

const text = fc.oneof(
  { weight: 4, arbitrary: changed },
  fc.string({ unit: "binary", maxLength: 40 }).map((garbage) => () => garbage),
  fc.constantFrom("null", "[]", "1", '"x"', deep(20), deep(5000), "\0".repeat(5000), "{}").map((
    bad,
  ) =>
  () => bad),
  fc.integer({ min: 0, max: 400 }).map((length) => (id: number) =>
    JSON.stringify(goodState(id, 0)).slice(0, length)
  ),
);

type Plant = (path: string, id: number) => void;
const write = (content: string): Plant => (path) => writeFileSync(path, content, { mode: 0o600 });
const S_IFIFO = 0o010000;
const S_IFSOCK = 0o140000;
const S_IFCHR = 0o020000;
const make = (type: number, major = 0, minor = 0): Plant => (path) =>
  void shim.native.ubd_mknod(
    new TextEncoder().encode(`${path}\0`),
    type | 0o600,
    major,
    minor,
  );

const link = (target: string): Plant => (path) => symlinkSync(target, path);
const good: Plant = (path, id) => write(JSON.stringify(goodState(id, 0)))(path, id);

const special: [name: string, plant: Plant][] = [
  ["a FIFO", make(S_IFIFO)],
  ["a socket", make(S_IFSOCK)],
  ["a device", make(S_IFCHR, 1, 5)],
  ["a directory", (path) => mkdirSync(path)],
  ["a full directory", (path) => mkdirSync(join(path, "x"), { recursive: true })],
  ["a link to /dev/zero", link("/dev/zero")],
  ["a link to itself", (path) => symlinkSync(path, path)],
  ["a dangling link", link("nowhere/at/all")],
  ["a link to a victim", link(join(OUTSIDE, "0.json"))],
  ["a second name of a victim", (path) => linkSync(join(OUTSIDE, "0.json"), path)],
  ["a huge file", (path) => {
    writeFileSync(path, "");
    truncateSync(path, 2 ** 41);
  }],
  ["a file for all", (path, id) => {
    good(path, id);
    chmodSync(path, 0o666);
  }],
  ["a file without rights", (path, id) => {
    good(path, id);
    chmodSync(path, 0);
  }],
];
if (isRoot) {
  special.push(["another user's file", (path, id) => {
    good(path, id);
    chownSync(path, 1, 1);
  }], ["another user's link", (path) => {
    symlinkSync("/etc/passwd", path);
    lchownSync(path, 1, 1);
  }]);
}

/** What is in place of one name. */
const plant: fc.Arbitrary<readonly [string, Plant]> = fc.oneof(
  fc.constant(["nothing", () => {}] as const),
  { weight: 2, arbitrary: fc.constant(["a good file", good] as const) },
  {
    weight: 4,
    arbitrary: text.map((make): readonly [string, Plant] => [
      `the file ${JSON.stringify(make(0)).slice(0, 400)}`,
      (path, id) => write(make(id))(path, id),
    ]),
  },
  { weight: 3, arbitrary: fc.constantFrom(...special) },
);

const NAMES = ["0.json", "1.json", "2.json", "3.json", "9.json", "007.json", "0.log", "1.log"];
const OTHERS = [".0.2147483646", `.0.${process.pid}`, "x"];

const DIRECTORIES: Record<string, () => void> = {
  "as it should be": () => {},
  "for all": () => chmodSync(DIRECTORY, 0o777),
  "a link": () => {
    rmSync(DIRECTORY, { recursive: true });
    symlinkSync(OUTSIDE, DIRECTORY);
  },
  "a file": () => {
    rmSync(DIRECTORY, { recursive: true });
    writeFileSync(DIRECTORY, "x");
  },
  "not there": () => rmSync(DIRECTORY, { recursive: true }),
  ...(isRoot && { "another user's": () => chownSync(DIRECTORY, 1, 1) }),
};

/** Names, kinds and contents of what no verb has any business with. */
function outside(): string {
  return readdirSync(OUTSIDE).sort().map((name) => {
    const { mode, uid } = lstatSync(join(OUTSIDE, name));
    return `${name} ${mode.toString(8)} ${uid} ${readFileSync(join(OUTSIDE, name), "utf8")}`;
  }).join("\n");
}

function prepare(): void {
  for (const path of [DIRECTORY, OUTSIDE]) rmSync(path, { recursive: true, force: true });
  mkdirSync(DIRECTORY, { mode: 0o755 });
  chmodSync(DIRECTORY, 0o755);
  mkdirSync(OUTSIDE);
  for (const name of [...NAMES, ...OTHERS]) good(join(OUTSIDE, name), 0);
  writeFileSync(IMAGE, "x".repeat(4096));
  for (const id of DEVICES.keys()) mkdirSync(join(CLASS, `ublkc${id}`), { recursive: true });
}

/** What gc was before it looked at what it deletes. */
function carelessGc(): void {
  try {
    for (const name of readdirSync(DIRECTORY)) {
      if (/^[4-9]\d*\.json$/.test(name)) rmSync(join(DIRECTORY, name), { force: true });
    }
  } catch { /* nothing there */ }
}

async function tryVerb(words: string[]): Promise<{ code: number; out: string; err: string }> {
  const said = { 1: "", 2: "" };
  const { argv } = process;
  divertOutput((fd, text) => said[fd] += text);
  process.argv = [argv[0]!, "ubd", ...words];
  try {
    return { code: await runProgram(), out: said[1], err: said[2] };
  } finally {
    divertOutput(undefined);
    process.argv = argv;
    process.exitCode = 0;
  }
}

/** A failure that a person could do something about, and no bug. */
function assertFailure(error: unknown): void {
  const { exitCode, message } = toFailure(error);
  assert.notStrictEqual(exitCode, EXIT.BUG, message);
}

async function withDriver<T>(work: () => Promise<T>): Promise<T> {
  const { open } = Control;
  Control.open = () => Promise.resolve(control);
  useStateDirectory(DIRECTORY);
  onStateFault(() => {});
  try {
    return await work();
  } finally {
    Control.open = open;
    useStateDirectory(undefined);
  }
}

const fuzzer: Fuzzer = {
  about: "spoilt state directories, under each verb: no bug, no wait, nothing else touched",
  property: (canary) =>
    fc.asyncProperty(
      fc.array(fc.tuple(fc.constantFrom(...NAMES, ...OTHERS), plant), { maxLength: 8 }),
      fc.oneof(
        { weight: 5, arbitrary: fc.constant("as it should be") },
        fc.constantFrom(...Object.keys(DIRECTORIES)),
      ),
      fc.array(fc.constantFrom(...VERBS), { minLength: 1, maxLength: 3 }),
      async (plants, directory, verbs) => {
        prepare();
        const good = new Set<number>();
        const used = new Map(plants.map(([name, one]) => [name, one]));
        for (const [name, [kind, put]] of used) {
          const id = Number.parseInt(name);
          put(join(DIRECTORY, name), id);
          if (kind === "a good file" && /^\d\.json$/.test(name)) good.add(id);
        }
        DIRECTORIES[directory]!();
        const before = outside();
        await withDriver(async () => {
          const believed = directory === "as it should be";
          for (const id of DEVICES.keys()) {
            const state = readState(id);
            if (!believed) assert.strictEqual(state, undefined);
            else if (good.has(id)) assert.strictEqual(state?.pid, serverOf(id));
            const spec = await knownState(control, id, "upgrade").catch(assertFailure);
            if (spec) assert.strictEqual(typeof spec.spec.target.name, "string");
          }
          const awaited = specs[1]!;
          await waitingDevice(awaited).catch(assertFailure);
          await refuseAwaited(control, awaited, [{ path: IMAGE }])
            .catch(assertFailure);
          for (const words of verbs) {
            const { code, out, err } = await tryVerb(words);
            const told = `${words.join(" ")}: ${code}\n${out}${err}`;
            assert.ok(Object.values<number>(EXIT).includes(code) && code !== EXIT.BUG, told);
            assert.doesNotMatch(err, /\n\s+at /, told);
            if (code !== EXIT.OK) assert.match(err, /^ubd: /m, told);
            if (["list", "info", "del"].includes(words[0]!)) {
              assert.strictEqual(code, EXIT.OK, told);
            }
            if (words.includes("--json")) JSON.parse(out);
          }
          const ids = [...DEVICES.keys()];
          const stale = staleFiles(ids);
          if (!believed) assert.deepStrictEqual(stale, []);
          if (canary) carelessGc();
          const { removed, failures } = await removeAll(control, stale, () => true);
          failures.forEach(assertFailure);
          const left = stateNames();
          for (const { file } of removed) assert.ok(!left.includes(basename(file!)), file!);
        });
        assert.strictEqual(outside(), before, "something outside of it has changed");
      },
    ),
};
export default fuzzer;
