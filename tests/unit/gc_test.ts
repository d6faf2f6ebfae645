// SPDX-License-Identifier: MIT
/** What gc does with what it has found, when things have changed since. */
import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import { UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED } from "../../abi/ublk_cmd.ts";
import { type Leftover, removeAll } from "../../cli/gc.ts";
import type { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";

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
