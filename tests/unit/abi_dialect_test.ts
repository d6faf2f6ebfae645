// SPDX-License-Identifier: MIT
/**
 * The two dialects: what they share, where they differ, and what they refuse.
 *
 * Byte layouts are in abi_bytes_test.ts; the mapping offsets here are checked against the
 * drivers' own arithmetic, restated, for 4, 16 and 64 KiB pages.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  chooseDialect,
  type ControlCommand,
  type DeviceSpecAbi,
  type IoCommand,
  UBD_V2,
  UBLK,
} from "../../abi/dialect.ts";
import {
  COMMAND_NAMES,
  commandNumber,
  COMMANDS,
  FEATURE_KERNEL,
  FEATURE_NAMES,
  IO_COMMANDS,
} from "../../abi/ublk_cmd.ts";

const CONTROL = Object.keys(COMMANDS) as ControlCommand[];
const IO = [...Object.keys(IO_COMMANDS), "COMMIT_REQ"] as IoCommand[];
const SPEC: DeviceSpecAbi = {
  id: 0,
  queues: 1,
  depth: 64,
  maxIoBytes: 65536,
  blockSize: 512,
  sizeBytes: 1 << 20,
};

test("chooseDialect takes V2 only when its control device is the one present", () => {
  const choose = (...present: string[]) => chooseDialect((path) => present.includes(path)).name;
  assert.equal(choose(), "ublk");
  assert.equal(choose("/dev/ublk-control"), "ublk");
  assert.equal(choose("/dev/ubd-control"), "ubd-v2");
  assert.equal(choose("/dev/ubd-control", "/dev/ublk-control"), "ublk");
});

test("names and paths of the devices", () => {
  assert.deepEqual(
    [UBLK.charName(7), UBLK.charPath(7), UBLK.blockName(7), UBLK.blockPath(7), UBLK.charClass],
    ["ublkc7", "/dev/ublkc7", "ublkb7", "/dev/ublkb7", "ublk-char"],
  );
  assert.deepEqual(
    [UBD_V2.charName(7), UBD_V2.charPath(7), UBD_V2.blockName(7), UBD_V2.blockPath(7)],
    ["ubdc7", "/dev/ubdc7", "ubdb7", "/dev/ubdb7"],
  );
  assert.equal(UBD_V2.charClass, "ubd-char");
});

test("commands that both have, have one number in both", () => {
  for (const command of CONTROL.filter((it) => UBD_V2.hasCommand(it))) {
    const number = commandNumber(UBLK.controlOpcode(command, true));
    assert.equal(UBD_V2.controlOpcode(command, false), number);
    assert.equal(UBLK.controlOpcode(command, false), number);
  }
  for (const command of ["FETCH_REQ", "COMMIT_AND_FETCH_REQ"] as const) {
    assert.equal(UBD_V2.ioOpcode(command, false), UBLK.ioOpcode(command, false));
  }
});

test("V2 has six control commands and three io commands, in one form", () => {
  assert.deepEqual(CONTROL.filter((it) => UBD_V2.hasCommand(it)).sort(), [
    "ADD_DEV",
    "DEL_DEV",
    "GET_DEV_INFO",
    "GET_QUEUE_AFFINITY",
    "START_DEV",
    "STOP_DEV",
  ]);
  assert.deepEqual(IO.filter((it) => UBD_V2.hasCommand(it)), [
    "FETCH_REQ",
    "COMMIT_AND_FETCH_REQ",
    "COMMIT_REQ",
  ]);
  assert.equal(UBD_V2.controlOpcode("ADD_DEV", true), 0x04);
  assert.equal(UBD_V2.ioOpcode("COMMIT_REQ", true), 0x22);
});

test("a command that a dialect lacks is refused", () => {
  const refused: [() => number, string][] = [
    [() => UBD_V2.controlOpcode("SET_PARAMS", false), "SET_PARAMS: ubd-v2 has no such command"],
    [() => UBD_V2.ioOpcode("NEED_GET_DATA", true), "NEED_GET_DATA: ubd-v2 has no such command"],
    [() => UBLK.ioOpcode("COMMIT_REQ", true), "COMMIT_REQ: ublk has no such command"],
    [
      () => UBLK.controlOpcode("GET_FEATURES", false),
      "GET_FEATURES: ublk has no such command in legacy form",
    ],
  ];
  for (const [call, message] of refused) {
    assert.throws(call, { name: "RangeError", message: `Cannot encode ${message}` });
  }
  assert.equal(UBLK.hasCommand("toString" as IoCommand), false);
});

test("mapping offsets select the queue that the driver computes from them", () => {
  for (const pageSize of [4096, 16384, 65536]) {
    const rounded = Math.ceil(4096 * 24 / pageSize) * pageSize;
    for (let queue = 0; queue < 64; queue++) {
      const mainline = UBLK.mmapOffset(queue, pageSize);
      const v2 = UBD_V2.mmapOffset(queue, pageSize);
      assert.equal(mainline % pageSize, 0);
      assert.equal(v2 % pageSize, 0);
      assert.equal(mainline / rounded, queue);
      assert.equal(Math.floor(v2 / (4096 * 24)), queue);
    }
  }
});

test("mapping sizes are whole pages", () => {
  for (const dialect of [UBLK, UBD_V2]) {
    assert.deepEqual([1, 170, 171, 4096].map((depth) => dialect.mmapBytes(depth, 4096)), [
      4096,
      4096,
      8192,
      98304,
    ]);
    assert.equal(dialect.mmapBytes(4096, 65536), 131072);
  }
});

test("packInfo refuses ids outside -1..2^31-1 in both dialects", () => {
  for (const dialect of [UBLK, UBD_V2]) {
    for (const id of [-2, 0.5, Number.NaN, 2 ** 31, 0xffffffff]) {
      assert.throws(() => dialect.packInfo({ ...SPEC, id }), RangeError);
    }
    for (const id of [-1, 0, 2 ** 31 - 1]) dialect.packInfo({ ...SPEC, id });
  }
});

test("packInfo of V2 refuses what its struct cannot hold", () => {
  const bad: Partial<DeviceSpecAbi>[] = [
    { blockSize: 65536 }, // the field has 16 bits
    { blockSize: 256 },
    { blockSize: 768 },
    { blockSize: 0 },
    { sizeBytes: 513 },
    { sizeBytes: -512 },
    { flags: 1n },
  ];
  for (const change of bad) {
    assert.throws(() => UBD_V2.packInfo({ ...SPEC, ...change }), RangeError, String(change));
  }
  for (const blockSize of [512, 4096, 32768]) UBD_V2.packInfo({ ...SPEC, blockSize });
});

test("info survives packing, up to what the driver rounds", () => {
  for (const dialect of [UBLK, UBD_V2]) {
    const bytes = dialect.packInfo({ ...SPEC, id: 9, queues: 3, maxIoBytes: 131072 });
    assert.equal(bytes.length, dialect.infoSize);
    const info = dialect.unpackInfo(bytes);
    assert.deepEqual([info.id, info.queues, info.depth, info.maxIoBytes], [9, 3, 64, 131072]);
    assert.throws(() => dialect.unpackInfo(bytes.subarray(1)), RangeError);
  }
});

test("every feature bit has a name and a kernel", () => {
  assert.deepEqual(
    [...FEATURE_NAMES.keys()],
    Array.from({ length: 20 }, (_, i) => 1n << BigInt(i)),
  );
  assert.deepEqual([...FEATURE_KERNEL.keys()], [...FEATURE_NAMES.keys()]);
});

test("command numbers have names", () => {
  assert.equal(COMMAND_NAMES.get(0x04), "ADD_DEV");
  assert.equal(COMMAND_NAMES.get(0x13), "GET_FEATURES");
  assert.equal(COMMAND_NAMES.get(0x21), "COMMIT_AND_FETCH_REQ");
  assert.equal(COMMAND_NAMES.size, CONTROL.length + IO.length - 1);
});
