// SPDX-License-Identifier: MIT
/** deleteDevice, with a driver that answers from memory. */
import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { UBLK } from "../../abi/dialect.ts";
import { UBLK_S_DEV_DEAD } from "../../abi/ublk_cmd.ts";
import { deleteDevice } from "../../cli/del.ts";
import type { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";

const ID = 3_000_000 + process.pid;

/** @param answers in place of success. @returns what was asked of it, too. */
function fakeControl(answers: Partial<Record<"stopDevice" | "deleteDeviceLater", number>>) {
  const asked: string[] = [];
  const answer = (command: "stopDevice" | "deleteDeviceLater" | "deleteDevice") => () => {
    asked.push(command);
    const result = command === "deleteDevice" ? undefined : answers[command];
    return result ? Promise.reject(UblkError.from(result, command)) : Promise.resolve();
  };
  const control = {
    dialect: UBLK,
    features: 0n,
    getDeviceInfo: () => Promise.resolve({ id: ID, pid: -1, state: UBLK_S_DEV_DEAD }),
    stopDevice: answer("stopDevice"),
    deleteDeviceLater: answer("deleteDeviceLater"),
    deleteDevice: answer("deleteDevice"),
  };
  return { control: control as unknown as Control, asked };
}

test("with --force, a driver without DEL_DEV_ASYNC gets DEL_DEV, however it says so", async () => {
  for (const lacking of [-22, -95, -524]) {
    const { control, asked } = fakeControl({ deleteDeviceLater: lacking });
    await deleteDevice(control, ID, { force: true });
    assert.deepStrictEqual(asked, ["stopDevice", "deleteDeviceLater", "deleteDevice"]);
  }
  const { control } = fakeControl({ deleteDeviceLater: -5 });
  await assert.rejects(deleteDevice(control, ID, { force: true }), { errno: "EIO" });
});
