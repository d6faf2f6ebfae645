// SPDX-License-Identifier: MIT
/** What gc does with what it has found, when things have changed since. */
import assert from "node:assert/strict";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import process from "node:process";
import { after, before, test } from "node:test";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import { UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED } from "../../abi/ublk_cmd.ts";
import { toFailure } from "../../cli/exit.ts";
import { type Leftover, removeAll, staleFiles } from "../../cli/gc.ts";
import type { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import { useStateDirectory } from "../../core/state.ts";

const ID = 3_000_000 + process.pid;
const errorOf = (errno: string, device: number) =>
  new UblkError({ errno, operation: "DEL_DEV", device });

test("gc looks again at each before it removes it, and goes on after a failure", async () => {
  const states = new Map([
    [ID, UBLK_S_DEV_DEAD],
    [ID + 1, UBLK_S_DEV_LIVE], // Has been recovered since.
    [ID + 2, UBLK_S_DEV_DEAD], // Cannot be deleted.
    [ID + 4, UBLK_S_DEV_QUIESCED], // Needs --force.
    [ID + 5, UBLK_S_DEV_DEAD], // Another program is faster.
    [ID + 6, UBLK_S_DEV_DEAD],
  ]);
  const stopped: number[] = [];
  const control = {
    dialect: UBLK,
    features: 0n,
    getDeviceInfo(id: number): Promise<Partial<DeviceInfo>> {
      const state = states.get(id); // ID + 3 is gone.
      return state === undefined
        ? Promise.reject(errorOf("ENODEV", id))
        : Promise.resolve({ id, state, pid: -1, targetFlags: 0n });
    },
    stopDevice(id: number) {
      stopped.push(id);
      return id === ID + 5 ? Promise.reject(errorOf("ENODEV", id)) : Promise.resolve();
    },
    deleteDeviceLater: (id: number) =>
      id === ID + 2 ? Promise.reject(errorOf("EIO", id)) : Promise.resolve(),
  };
  const found = [0, 1, 2, 3, 4, 5, 6].map((at): Leftover => ({
    device: ID + at,
    why: "it looked so",
    needs: [],
  }));
  const may = ({ needs }: Leftover) => !needs.includes("--force");
  const { removed, failures } = await removeAll(control as unknown as Control, found, may);
  assert.deepStrictEqual(removed.map(({ device }) => device! - ID), [0, 6]);
  assert.deepStrictEqual(stopped.map((id) => id - ID), [0, 2, 5, 6]);
  assert.deepStrictEqual(failures.map((error) => (error as UblkError).device), [ID + 2]);
});

const SCRATCH = mkdtempSync(join(tmpdir(), "ubd-gc-"));
const DIRECTORY = join(SCRATCH, "ubd");
const NO_DEVICES = { dialect: { ...UBLK, charClass: "none" } } as unknown as Control;

/** Files that nobody needs any more, and all that only looks like them. */
const STALE = ["0.json", "77777.json", "4.json", `.7.${2 ** 31 - 2}`];
const KEPT = [
  "3.json",
  "007.json",
  "00.json",
  "x.json",
  "1e3.json",
  ".json",
  "..5",
  `.7.${process.pid}`,
];

before(() => useStateDirectory(DIRECTORY));
after(() => {
  useStateDirectory(undefined);
  rmSync(SCRATCH, { recursive: true });
});

function plant(): void {
  rmSync(DIRECTORY, { recursive: true, force: true });
  mkdirSync(DIRECTORY, { mode: 0o755 });
  for (const name of [...STALE, ...KEPT]) {
    if (name === "4.json") symlinkSync("/etc/passwd", join(DIRECTORY, name));
    else writeFileSync(join(DIRECTORY, name), "");
  }
}

test("gc removes stale files by the names they have, and no others", async () => {
  plant();
  const found = staleFiles([3]);
  assert.deepStrictEqual(found.map(({ file }) => basename(file)).sort(), [...STALE].sort());
  const { removed, failures } = await removeAll(NO_DEVICES, found, () => true);
  assert.deepStrictEqual(failures, []);
  assert.strictEqual(removed.length, STALE.length);
  assert.deepStrictEqual(readdirSync(DIRECTORY).sort(), [...KEPT].sort());
  assert.ok(existsSync("/etc/passwd"));
});

test("gc goes on after a file that cannot be removed, and says which", async () => {
  plant();
  mkdirSync(join(DIRECTORY, "1.json"));
  const found = staleFiles([3]);
  const { removed, failures } = await removeAll(NO_DEVICES, found, () => true);
  assert.strictEqual(removed.length, STALE.length);
  const [error, ...more] = failures as UblkError[];
  assert.ok(error instanceof UblkError);
  assert.match(error.message, /^Cannot remove .*\/1\.json: EISDIR, /);
  assert.strictEqual(toFailure(error).exitCode, 1);
  assert.deepStrictEqual(more, []);
});

test("gc removes nothing through a link in place of the state directory", async () => {
  plant();
  const found = staleFiles([3]);
  renameSync(DIRECTORY, `${DIRECTORY}.real`);
  symlinkSync(`${DIRECTORY}.real`, DIRECTORY);
  assert.deepStrictEqual(staleFiles([]), []);
  const { removed } = await removeAll(NO_DEVICES, found, () => true);
  assert.deepStrictEqual(removed, []);
  assert.deepStrictEqual(readdirSync(`${DIRECTORY}.real`).length, STALE.length + KEPT.length);
});
