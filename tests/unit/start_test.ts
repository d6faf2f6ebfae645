// SPDX-License-Identifier: MIT
/** What ends a start, whose device a leftover is, and who has died over a quiesce. */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import { UBLK } from "../../abi/dialect.ts";
import { UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED } from "../../abi/ublk_cmd.ts";
import { isForsaken, letServerGo } from "../../cli/quiescing.ts";
import { deleteLeftover, parseAnswer } from "../../cli/start_server.ts";
import { Control } from "../../core/control.ts";
import { Device } from "../../core/device.ts";
import { UblkError } from "../../core/error.ts";
import { unless } from "../../core/queue_thread.ts";
import { quiescerOf, readState, useStateDirectory, writeState } from "../../core/state.ts";

const directory = mkdtempSync(join(tmpdir(), "ubd-start-"));
useStateDirectory(directory);
after(() => {
  useStateDirectory(undefined);
  rmSync(directory, { recursive: true });
});

const MARK = 0x2bdn << 22n | 7n;

function fakeControl(id: number, states: number[], targetFlags = MARK) {
  const asked: string[] = [];
  const answer = (command: string) => () => {
    asked.push(command);
    return Promise.resolve();
  };
  const control = {
    dialect: UBLK,
    asked,
    [Symbol.dispose]() {},
    getDeviceInfo: () =>
      Promise.resolve({ id, targetFlags, state: states.length > 1 ? states.shift() : states[0] }),
    quiesceDevice: answer("quiesce"),
    stopDevice: answer("stop"),
    deleteDevice: answer("delete"),
  };
  return control as unknown as Control & { asked: string[] };
}

test("unless ends a wait when its signal is aborted, before or meanwhile, and else leaves it", async () => {
  const never = new Promise<never>(() => {});
  const reason = new Error("told to end");
  const late = new AbortController();
  const waiting = unless(late.signal, never);
  late.abort(reason);
  await assert.rejects(waiting, reason);
  await assert.rejects(unless(late.signal, never), reason);
  assert.strictEqual(await unless(new AbortController().signal, Promise.resolve(5)), 5);
  assert.strictEqual(await unless(undefined, Promise.resolve(6)), 6);
});

test("a leftover is deleted by its mark: an id in other hands is left alone", async () => {
  const { open } = Control;
  try {
    for (const [mark, asked] of [[MARK, ["stop", "delete"]], [MARK + 1n, []]] as const) {
      const control = fakeControl(3, [UBLK_S_DEV_LIVE], mark);
      Control.open = () => Promise.resolve(control);
      await deleteLeftover(3, ({ targetFlags }) => targetFlags === MARK);
      assert.deepStrictEqual(control.asked, asked);
    }
  } finally {
    Control.open = open;
  }
});

test("parseAnswer takes what this version says, and nothing that looks like it", () => {
  const said = { type: "added", id: 3, mark: `${MARK}` };
  assert.deepStrictEqual(parseAnswer(JSON.stringify(said)), said);
  const lies = ["", "null", "5", "{}", '{"type":"added","id":3}', '{"type":"added","mark":"5"}'];
  lies.push('{"type":"live"}', '{"type":"failed","failure":null}', '{"type":"more"}', "live");
  for (const lie of lies) assert.throws(() => parseAnswer(lie), { errno: "EPROTO" }, lie);
});

function writeOne(id: number): void {
  writeState(id, { mark: MARK, pid: 4, target: {}, queues: [], spec: {} });
}

test("a quiesce is noted while it lasts, and stays noted when requests are still held back", async () => {
  writeOne(1);
  let noted: unknown;
  const done = fakeControl(1, [UBLK_S_DEV_LIVE, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED]);
  Object.assign(done, {
    quiesceDevice() {
      noted = quiescerOf(readState(1)!);
      return Promise.resolve();
    },
  });
  await letServerGo(done, 1);
  assert.deepStrictEqual(noted, { pid: process.pid, alive: true });
  assert.strictEqual(readState(1)!.quiescing, undefined);

  const { quiesce } = Device;
  Device.quiesce = () => Promise.reject(new UblkError({ errno: "ETIMEDOUT", operation: "x" }));
  try {
    const held = letServerGo(fakeControl(1, [UBLK_S_DEV_LIVE]), 1);
    await assert.rejects(held, { errno: "ETIMEDOUT" });
  } finally {
    Device.quiesce = quiesce;
  }
  const state = readState(1)!;
  assert.strictEqual(quiescerOf(state)?.alive, true);
  // This process lives: nobody else may begin.
  const second = letServerGo(fakeControl(1, [UBLK_S_DEV_LIVE]), 1);
  await assert.rejects(second, { errno: "EBUSY" });
  // Had it died, another would have its id.
  const { pid, began } = state.quiescing!;
  assert.strictEqual(isForsaken(state), false);
  assert.strictEqual(isForsaken({ quiescing: { pid, began: began - 1 } }), true);
  assert.strictEqual(isForsaken({ quiescing: { pid: 2 ** 22 + 1, began } }), true);
  assert.strictEqual(isForsaken({}), false);
  // Whoever comes after a dead one goes on.
  const dead = { pid, began: began - 1 };
  writeState(1, { mark: MARK, pid: 4, target: {}, queues: [], spec: {}, quiescing: dead });
  await letServerGo(fakeControl(1, [UBLK_S_DEV_LIVE, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED]), 1);
  assert.strictEqual(readState(1)!.quiescing, undefined);
});
