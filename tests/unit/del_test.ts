// SPDX-License-Identifier: MIT
/** deleteDevice, with a driver that answers from memory. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import { UBLK_S_DEV_DEAD, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED } from "../../abi/ublk_cmd.ts";
import { deleteDevice } from "../../cli/del.ts";
import { STOPPING_SIGNAL } from "../../cli/start_server.ts";
import type { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import { writeState } from "../../core/state.ts";

const ID = 3_000_000 + process.pid;

/** @param answers in place of success. @returns what was asked of it, too. */
function fakeControl(
  answers: Partial<Record<"stopDevice" | "deleteDeviceLater", number>>,
  info: Partial<DeviceInfo> = {},
) {
  const asked: string[] = [];
  const answer = (command: "stopDevice" | "deleteDeviceLater" | "deleteDevice") => () => {
    asked.push(command);
    const result = command === "deleteDevice" ? undefined : answers[command];
    return result ? Promise.reject(UblkError.from(result, command)) : Promise.resolve();
  };
  const control = {
    dialect: UBLK,
    features: 0n,
    getDeviceInfo: () => Promise.resolve({ id: ID, pid: -1, state: UBLK_S_DEV_DEAD, ...info }),
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

const skip = process.getuid!() !== 0 && "needs root";

test("a stop that takes long is told to the server, and to nobody who has its id now", {
  skip,
}, async () => {
  const directory = mkdtempSync(join(tmpdir(), "ubd-del-"));
  const told = Promise.withResolvers<void>();
  const begin = (id: number, state: number, opened: string) => {
    const file = join(directory, opened);
    writeFileSync(file, "");
    const child = spawn("tail", ["-f", file], { stdio: "ignore" });
    const ended = new Promise((resolve) => child.on("exit", (_, signal) => resolve(signal)));
    const { pid = -1 } = child;
    writeState(id, { mark: 0n, pid, target: {}, queues: [], spec: {} });
    const { control } = fakeControl({}, { pid, state });
    const stopDevice = () => told.promise;
    const deleted = deleteDevice(Object.assign(control, { stopDevice }), id, {});
    return { child, ended, deleted };
  };
  // The server last: when it has been told, it was the others' turn before.
  const others = [
    begin(ID, UBLK_S_DEV_LIVE, "something else"),
    begin(ID + 1, UBLK_S_DEV_QUIESCED, UBLK.charName(ID + 1)),
  ];
  const server = begin(ID + 2, UBLK_S_DEV_LIVE, UBLK.charName(ID + 2));
  try {
    assert.strictEqual(await server.ended, STOPPING_SIGNAL);
    for (const { child, ended } of others) {
      child.kill("SIGKILL");
      assert.strictEqual(await ended, "SIGKILL");
    }
  } finally {
    told.resolve();
    for (const { child } of [...others, server]) child.kill("SIGKILL");
    await Promise.all([...others, server].map(({ deleted }) => deleted));
    rmSync(directory, { recursive: true });
  }
});
