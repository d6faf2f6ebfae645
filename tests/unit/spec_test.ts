// SPDX-License-Identifier: MIT
/** What a state file says a server was told: taken when a server can be told it, refused by name. */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import { type AddOptions, toSpec } from "../../cli/add.ts";
import { knownState } from "../../cli/recover.ts";
import { specOf } from "../../cli/spec.ts";
import type { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import {
  type DeviceState,
  makersMark,
  statePath,
  useStateDirectory,
  writeState,
} from "../../core/state.ts";

const SCRATCH = mkdtempSync(join(tmpdir(), "ubd-spec-"));
before(() => useStateDirectory(join(SCRATCH, "ubd")));
after(() => {
  useStateDirectory(undefined);
  rmSync(SCRATCH, { recursive: true });
});

const OPTIONS: AddOptions = {
  number: -1,
  queues: 1,
  depth: 128,
  maxIoSize: 524288,
  partscan: true,
};

const ADDED: readonly (readonly [string, string[], Partial<AddOptions>])[] = [
  ["null", [], { size: 2 ** 40, blockSize: 4096, unprivileged: true }],
  ["loop", ["/a.img"], { ro: true, recovery: "wait", rootStorage: true, mlock: true }],
  ["loop", ["/a.img"], { o: 1, size: 4096, buffered: true, force: true, zeroCopy: "reg" }],
  ["concat", ["/a", "/b"], { userCopy: true, supervise: true }],
  ["stripe", ["/a", "/b"], { chunk: 4096, batch: true, needGetData: false }],
  ["memory", [], { opt: { size: "1G" } }],
  ["http", [], { opt: { url: "http://h/x" } }],
  ["https://h/x", [], { recovery: "fail" }],
  ["./x.ts", [], { watch: true, opt: { a: "1" }, size: 512 }],
];

/** As it comes back from a file. */
const stateOf = (spec: unknown): DeviceState => JSON.parse(JSON.stringify({ spec }));
const added = ADDED.map(([target, files, options]) =>
  stateOf(toSpec(target, files, { ...OPTIONS, ...options }))
);

test("specOf takes every spec that ubd add makes", () => {
  for (const state of added) assert.deepStrictEqual(specOf(state), { spec: state.spec });
});

test("specOf keeps what a later version may add", () => {
  const { spec } = added[1]! as unknown as { spec: Record<string, object> };
  const later = { ...spec, later: [1], device: { ...spec.device, later: {} } };
  assert.deepStrictEqual(specOf(stateOf(later)), { spec: later });
});

test("specOf refuses what no server can be told, and says what of it", () => {
  const loop = added[1]!.spec as { device: object; target: { options: object } };
  const module = added[8]!.spec as typeof loop;
  const withOptions = (spec: typeof loop, options: object) => ({
    ...spec,
    target: { ...spec.target, options: { ...spec.target.options, ...options } },
  });
  const bad: [unknown, RegExp][] = [
    [{}, /no device/],
    [[], /no device/],
    [{ ...loop, device: null }, /no device/],
    [{ ...loop, device: {} }, /Device id undefined/],
    [{ ...loop, device: { ...loop.device, depth: "1" } }, /Queue depth 1: it must be from/],
    [{ ...loop, device: { ...loop.device, batch: 1 } }, /batch is of a wrong kind/],
    [{ ...loop, device: { ...loop.device, zeroCopy: "maybe" } }, /zeroCopy is of a wrong kind/],
    [{ ...loop, recovery: "never" }, /recovery is of a wrong kind/],
    [{ ...loop, supervise: "no" }, /supervise is of a wrong kind/],
    [{ ...loop, target: undefined }, /no target/],
    [{ ...loop, target: "loop" }, /no target/],
    [{ ...loop, target: { name: "loop" } }, /no target/],
    [{ ...loop, target: { ...loop.target, name: "nbd" } }, /unknown target "nbd"/],
    [{ ...loop, target: { ...loop.target, name: 1 } }, /unknown target 1/],
    [{ ...loop, target: { ...loop.target, name: "constructor" } }, /unknown target "constr/],
    [withOptions(loop, { file: undefined }), /lacks the file of target loop/],
    [withOptions(loop, { file: 1 }), /file is of a wrong kind/],
    [withOptions(loop, { sizeBytes: "1" }), /sizeBytes is of a wrong kind/],
    [withOptions(loop, { readOnly: "false" }), /readOnly is of a wrong kind/],
    [withOptions(added[3]!.spec as typeof loop, { files: ["/a", 1] }), /files is of a wrong kind/],
    [withOptions(added[3]!.spec as typeof loop, { files: undefined }), /lacks the files/],
    [withOptions(module, { file: undefined }), /lacks the file of target module/],
    [withOptions(module, { directory: 1 }), /lacks the directory/],
    [withOptions(module, { options: undefined }), /lacks the options/],
  ];
  for (const [spec, why] of bad) {
    const found = specOf(stateOf(spec));
    assert.match("fault" in found ? found.fault : "none", why, JSON.stringify(spec));
  }
});

test("knownState, which upgrade asks before it quiesces, refuses a state that cannot be served", async () => {
  const mark = makersMark(7);
  const control = {
    dialect: UBLK,
    getDeviceInfo: (): Promise<Partial<DeviceInfo>> => Promise.resolve({ targetFlags: mark }),
  } as unknown as Control;
  const refused = (errno: string, why: RegExp) =>
    assert.rejects(knownState(control, 3, "upgrade"), (error: UblkError) => {
      assert.match(error.message, why);
      assert.ok(error instanceof UblkError);
      return error.errno === errno && error.operation === "upgrade";
    });
  await refused("ENOENT", /it has no state file/);
  const state = { mark, pid: 7, target: {}, queues: [] };
  writeState(3, { ...state, spec: added[1]!.spec });
  assert.deepStrictEqual((await knownState(control, 3, "upgrade")).spec, added[1]!.spec);
  writeState(3, { ...state, spec: {} });
  await refused("EINVAL", /3\.json cannot be used, its spec has no device/);
  rmSync(statePath(3));
  writeState(4, { ...state, spec: {} });
  await refused("ENOENT", /it has no state file/);
});
