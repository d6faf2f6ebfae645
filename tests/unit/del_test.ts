// SPDX-License-Identifier: MIT
/** deleteDevice, with a driver that answers from memory, and a real process as the server. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import {
  UBLK_F_SAFE_STOP_DEV,
  UBLK_S_DEV_DEAD,
  UBLK_S_DEV_LIVE,
  UBLK_S_DEV_QUIESCED,
} from "../../abi/ublk_cmd.ts";
import { deleteDevice } from "../../cli/del.ts";
import { STOPPING_SIGNAL } from "../../cli/start_server.ts";
import type { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import { Process } from "../../core/proc.ts";
import { writeState } from "../../core/state.ts";
import { Shim } from "../../ffi/mod.ts";

const TIMEOUT = { timeout: 60_000 };

const ID = 3_000_000 + process.pid;

/**
 * As if a device's character device were another one: /dev/full for what has a server, which tests
 * beside this one may have open, and else one that nobody can have.
 */
const SYSFS = mkdtempSync(join(tmpdir(), "ubd-sysfs-"));
for (const [name, number] of [["full", "1:7"], ["nobody", "1:250"]] as const) {
  mkdirSync(join(SYSFS, name));
  writeFileSync(join(SYSFS, name, "dev"), `${number}\n`);
}
after(() => rmSync(SYSFS, { recursive: true }));
const dialect = (served: boolean) => ({
  ...UBLK,
  charClass: `../..${SYSFS}`,
  charName: () => served ? "full" : "nobody",
});

type Answer = number | Promise<void> | (() => Promise<void>) | undefined;
const COMMANDS = ["stopDevice", "tryStopDevice", "deleteDevice", "deleteDeviceLater"] as const;

/** @param answers in place of success. @returns what was asked of it, too. */
function fakeControl(
  answers: Partial<Record<typeof COMMANDS[number], Answer>>,
  info: Partial<DeviceInfo> = {},
  features = 0n,
) {
  const asked: string[] = [];
  const answer = (command: typeof COMMANDS[number]) => () => {
    asked.push(command);
    const result = answers[command];
    if (typeof result === "number") return Promise.reject(UblkError.from(result, command));
    return typeof result === "function" ? result() : result ?? Promise.resolve();
  };
  const getDeviceInfo = () =>
    asked.includes("deleteDeviceLater")
      ? Promise.reject(UblkError.from(-19, "GET_DEV_INFO"))
      : Promise.resolve({ id: ID, pid: -1, state: UBLK_S_DEV_DEAD, ...info });
  const control = {
    dialect: dialect((info.pid ?? -1) > 0),
    shim: new Shim(),
    features,
    isUnprivileged: () => false,
    getDeviceInfo,
    ...Object.fromEntries(COMMANDS.map((command) => [command, answer(command)])),
  };
  return { control: control as unknown as Control, asked };
}

test("what is to be kept is stopped, and not deleted", async () => {
  const { control, asked } = fakeControl({});
  assert.strictEqual(await deleteDevice(control, ID, { force: true, keep: true }), undefined);
  assert.deepStrictEqual(asked, ["stopDevice"]);
});

test("with --force, a driver without DEL_DEV_ASYNC gets DEL_DEV, however it says so", async () => {
  for (const lacking of [-22, -95, -524]) {
    const { control, asked } = fakeControl({ deleteDeviceLater: lacking });
    await deleteDevice(control, ID, { force: true });
    assert.deepStrictEqual(asked, ["stopDevice", "deleteDeviceLater", "deleteDevice"]);
  }
  const { control } = fakeControl({ deleteDeviceLater: -5 });
  await assert.rejects(deleteDevice(control, ID, { force: true }), { errno: "EIO" });
});

test("without --force, the driver is asked whether somebody has it open, where it can tell", async () => {
  const live = { state: UBLK_S_DEV_LIVE };
  const can = fakeControl({}, live, UBLK_F_SAFE_STOP_DEV);
  await deleteDevice(can.control, ID, {});
  assert.deepStrictEqual(can.asked, ["tryStopDevice", "deleteDevice"]);
  const cannot = fakeControl({}, live);
  await deleteDevice(cannot.control, ID, {});
  assert.deepStrictEqual(cannot.asked, ["stopDevice", "deleteDevice"]);
  const dead = fakeControl({}, {}, UBLK_F_SAFE_STOP_DEV);
  await deleteDevice(dead.control, ID, {});
  assert.deepStrictEqual(dead.asked, ["stopDevice", "deleteDevice"], "it has no disk to ask about");
  const forced = fakeControl({}, live, UBLK_F_SAFE_STOP_DEV);
  await deleteDevice(forced.control, ID, { force: true });
  assert.deepStrictEqual(forced.asked, ["stopDevice", "deleteDeviceLater"]);
});

test(
  "a user that the driver knows and nobody sees keeps the device, and is told of honestly",
  TIMEOUT,
  async () => {
    const live = { state: UBLK_S_DEV_LIVE };
    const { control, asked } = fakeControl({ tryStopDevice: -16 }, live, UBLK_F_SAFE_STOP_DEV);
    await assert.rejects(deleteDevice(control, ID, {}), {
      errno: "EBUSY",
      message: /the driver says that somebody has it open, and nobody is to be seen from here/,
    });
    assert.deepStrictEqual([...new Set(asked)], ["tryStopDevice"]);
  },
);

const skip = process.getuid!() !== 0 && "needs root";

/** A process that may have the character device open, as the server of a device. */
async function played(id: number, state: number, opened: string, script = "") {
  const child = spawn("bash", ["-c", `exec 5< ${opened}; echo; ${script} exec sleep 600`], {
    stdio: ["ignore", "pipe", "ignore"],
  });
  const ended = new Promise((resolve) => child.on("exit", (_, signal) => resolve(signal)));
  await new Promise((resolve) => child.stdout.once("data", resolve));
  const { pid = -1 } = child;
  writeState(id, { mark: 0n, pid, target: {}, queues: [], spec: {} });
  const info: Partial<DeviceInfo> = { id, pid, state, targetFlags: 0n };
  const signal = async (name: NodeJS.Signals, letter: string) => {
    child.kill(name);
    const found = Process.find(pid)!;
    while (found.state !== letter) await new Promise((resolve) => setTimeout(resolve, 1));
  };
  return { child, ended, info, pid, signal };
}

test("a stop that takes long is told to the server, and to nobody who has its id now", {
  skip,
  ...TIMEOUT,
}, async () => {
  const told = Promise.withResolvers<void>();
  // The server last: when it has been told, it was the others' turn before.
  const all = [
    await played(ID, UBLK_S_DEV_LIVE, "/dev/zero"),
    await played(ID + 1, UBLK_S_DEV_QUIESCED, "/dev/zero"),
    await played(ID + 2, UBLK_S_DEV_LIVE, "/dev/full"),
  ] as const;
  const [first, second, server] = all;
  const deleted = all.map(({ info }) => {
    const { control } = fakeControl({ stopDevice: told.promise }, info);
    return deleteDevice(control, info.id!, {});
  });
  try {
    assert.strictEqual(await server.ended, STOPPING_SIGNAL);
    for (const { child, ended } of [first, second]) {
      child.kill("SIGKILL");
      assert.strictEqual(await ended, "SIGKILL");
    }
  } finally {
    told.resolve();
    for (const { child } of all) child.kill("SIGKILL");
    await Promise.all(deleted);
  }
});

test("a server hears of a stop that may be refused only once the disk goes", {
  skip,
  ...TIMEOUT,
}, async () => {
  const blockName = `../..${SYSFS}/disk`;
  const bdi = join(SYSFS, "disk", "bdi");
  for (const accepted of [false, true]) {
    mkdirSync(bdi, { recursive: true });
    const asked = Promise.withResolvers<void>();
    const answered = Promise.withResolvers<void>();
    const server = await played(ID, UBLK_S_DEV_LIVE, "/dev/full");
    const tryStopDevice = () => {
      asked.resolve();
      return answered.promise;
    };
    const fake = fakeControl({ tryStopDevice }, server.info, UBLK_F_SAFE_STOP_DEV);
    Object.assign(fake.control, {
      dialect: { ...fake.control.dialect, blockName: () => blockName },
    });
    const deleted = deleteDevice(fake.control, ID, {});
    deleted.catch(() => {});
    await asked.promise;
    if (accepted) {
      rmSync(bdi, { recursive: true });
      assert.strictEqual(await server.ended, STOPPING_SIGNAL);
      answered.resolve();
      await deleted;
    } else {
      // Longer than it takes until a stop that cannot be refused is told.
      assert.strictEqual(await Promise.race([server.ended, sleep(3000, "untold")]), "untold");
      answered.reject(UblkError.from(-1, "TRY_STOP_DEV"));
      await assert.rejects(deleted, { errno: "EPERM" });
      server.child.kill("SIGKILL");
      assert.strictEqual(await server.ended, "SIGKILL");
    }
  }
});

test("a stopped server is told of at once, and --force ends it before it says success", {
  skip,
  ...TIMEOUT,
}, async () => {
  const { info, pid, signal } = await played(ID, UBLK_S_DEV_LIVE, "/dev/full");
  await signal("SIGSTOP", "T");
  const refused = fakeControl({}, info, UBLK_F_SAFE_STOP_DEV);
  await assert.rejects(deleteDevice(refused.control, ID, {}), {
    errno: "EBUSY",
    message: new RegExp(`process ${pid}, is stopped.*kill -CONT ${pid} lets it go on.*--force`),
  });
  assert.deepStrictEqual(refused.asked, [], "nothing was done");
  const { control, asked } = fakeControl({}, info);
  await deleteDevice(control, ID, { force: true });
  assert.deepStrictEqual(asked, ["stopDevice", "deleteDeviceLater"]);
  assert.strictEqual(Process.find(pid), undefined, "success before the server was gone");
});

test("who is no server of ubd's is waited for until it lets go, and never killed", {
  skip,
  ...TIMEOUT,
}, async () => {
  const server = await played(ID, UBLK_S_DEV_LIVE, "/dev/full", "read -t 1.5 <> <(:); exec 5<&-;");
  const { child, ended, info, pid } = server;
  writeState(ID, { mark: 0n, pid: pid + 1, target: {}, queues: [], spec: {} });
  const { control } = fakeControl({}, info);
  await deleteDevice(control, ID, { force: true });
  assert.ok(Process.find(pid), "it lives, and has let go");
  child.kill("SIGKILL");
  assert.strictEqual(await ended, "SIGKILL");
});

test("an id that is another device's by then is left alone, before the stop and after it", async () => {
  for (const [seen, commands] of [[1, []], [2, ["stopDevice"]]] as const) {
    const { control, asked } = fakeControl({});
    let looks = 0;
    const getDeviceInfo = () =>
      Promise.resolve({
        id: ID,
        pid: -1,
        state: UBLK_S_DEV_DEAD,
        flags: 0n,
        targetFlags: looks++ < seen ? 5n : 6n,
      });
    const deleted = deleteDevice(Object.assign(control, { getDeviceInfo }), ID, { force: true });
    if (seen === 1) await assert.rejects(deleted, { errno: "ENODEV" });
    else await deleted; // It is gone, as was asked for.
    assert.deepStrictEqual(asked, commands);
  }
});
