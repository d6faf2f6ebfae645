// SPDX-License-Identifier: MIT
/**
 * What is printed of a device and of the driver, against the lines of `ublk list` and
 * `ublk features` (ublksrv abbfea2, lib/ublksrv_cmd.c: ublksrv_ctrl_dump, targets/ublk.cpp).
 */
import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { type DeviceInfo, UBLK } from "../../abi/dialect.ts";
import { pack, unpack } from "../../abi/struct.ts";
import { UBLK_PARAMS, UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED } from "../../abi/ublk_cmd.ts";
import {
  describeDevice,
  describeParams,
  type DeviceFacts,
  dumpDevice,
  dumpFeatures,
  featureNames,
} from "../../cli/describe.ts";
import type { Control } from "../../core/control.ts";
import { makersMark, removeState, writeState } from "../../core/state.ts";

const FACTS: DeviceFacts = {
  id: 5,
  path: "/dev/ublkb5",
  charPath: "/dev/ublkc5",
  state: "LIVE",
  queues: 2,
  depth: 64,
  blockBytes: 512,
  sizeBytes: 1024 ** 3,
  readOnly: false,
  maxIoBytes: 524288,
  pid: 4711,
  flags: "0x42",
  features: ["URING_CMD_COMP_IN_TASK", "CMD_IOCTL_ENCODE"],
  char: "239:5",
  block: "259:7",
  owner: { uid: 1000, gid: 100 },
  queueThreads: [{ qid: 0, tid: 4713, affinity: [0, 2] }, { qid: 1, tid: 4714, affinity: [] }],
  target: {
    name: "loop",
    dev_size: 1073741824,
    backing_file: "/a b.img",
    direct_io: 1,
    offset: 0,
  },
};

test("dumpDevice prints the lines of ublk list", () => {
  assert.strictEqual(
    dumpDevice(FACTS),
    "dev id 5: nr_hw_queues 2 queue_depth 64 block size 512 dev_capacity 2097152\n" +
      "\tmax rq size 524288 daemon pid 4711 state LIVE\n" +
      "\tflags 0x42 [ URING_CMD_COMP_IN_TASK CMD_IOCTL_ENCODE ]\n" +
      "\tublkc: 239:5 ublkb: 259:7 owner: 1000:100\n" +
      "\tqueue 0: tid 4713 affinity(0 2 )\n" +
      "\tqueue 1: tid 4714 affinity()\n" +
      '\ttarget {"backing_file":"/a b.img","dev_size":1073741824,"direct_io":1,"name":"loop",' +
      '"offset":0,"type":0}\n',
  );
});

test("dumpDevice leaves out queues and target where nobody told of them", () => {
  const bare = { ...FACTS, flags: "0x0", features: [], pid: -1, queueThreads: [], target: {} };
  assert.strictEqual(
    dumpDevice({ ...bare, state: "DEAD" }),
    "dev id 5: nr_hw_queues 2 queue_depth 64 block size 512 dev_capacity 2097152\n" +
      "\tmax rq size 524288 daemon pid -1 state DEAD\n" +
      "\tflags 0x0 [ ]\n" +
      "\tublkc: 239:5 ublkb: 259:7 owner: 1000:100\n",
  );
});

/** The flag tokens of ublksrv_ctrl_dump in the order in which it prints them, with their bits. */
const TOKENS: [string, number][] = [
  ["SUPPORT_ZERO_COPY", 0],
  ["AUTO_ZC", 11],
  ["URING_CMD_COMP_IN_TASK", 1],
  ["NEED_GET_DATA", 2],
  ["UNPRIVILEGED_DEV", 5],
  ["RECOVERY", 3],
  ["RECOVERY_REISSUE", 4],
  ["CMD_IOCTL_ENCODE", 6],
  ["USER_COPY", 7],
  ["ZONED", 8],
  ["RECOVERY_FAIL_IO", 9],
  ["UPDATE_SIZE", 10],
  ["QUIESCE", 12],
  ["PER_IO_DAEMON", 13],
  ["BUF_REG_OFF_DAEMON", 14],
  ["BATCH_IO", 15],
  ["INTEGRITY", 16],
  ["SAFE_STOP_DEV", 17],
  ["NO_AUTO_PART_SCAN", 18],
  ["SHMEM_ZC", 19],
];

const INFO: DeviceInfo = {
  id: 5,
  queues: 2,
  depth: 64,
  state: 1,
  maxIoBytes: 524288,
  pid: process.pid,
  flags: 0n,
  targetFlags: 0n,
  ownerUid: 0,
  ownerGid: 0,
};

const ID = 3_000_000 + process.pid;

/** What describeDevice asks a Control, answered from memory. */
function fakeControl(info: Partial<DeviceInfo>): Control {
  const params = pack(UBLK_PARAMS, {
    basic: { attrs: 1, logical_bs_shift: 12, dev_sectors: 2097152n },
    devt: { char_major: 239, char_minor: 5, disk_major: 259, disk_minor: 7 },
  });
  const answers = {
    dialect: UBLK,
    getDeviceInfo: () => Promise.resolve({ ...INFO, ...info }),
    getParams: () => Promise.resolve(unpack(UBLK_PARAMS, params)),
  };
  return answers as unknown as Control;
}

async function flagsLine(flags: bigint): Promise<string> {
  return dumpDevice(await describeDevice(fakeControl({ flags }), ID)).split("\n")[2]!;
}

test("dumpDevice names each flag as ublk list does", async () => {
  for (const [token, bit] of TOKENS) {
    const hex = (1 << bit).toString(16);
    assert.strictEqual(await flagsLine(1n << BigInt(bit)), `\tflags 0x${hex} [ ${token} ]`);
  }
});

test("dumpDevice prints all flags in ublk list's order, which is not that of the bits", async () => {
  const all = TOKENS.map(([token]) => ` ${token}`).join("");
  assert.strictEqual(await flagsLine(0xfffffn), `\tflags 0xfffff [${all} ]`);
  assert.strictEqual(await flagsLine(0x1fffffn), `\tflags 0x1fffff [${all} ]`);
});

test("describeDevice names every state, and a state of a later kernel UNKNOWN", async () => {
  for (const [state, name] of ["DEAD", "LIVE", "QUIESCED", "FAIL_IO", "UNKNOWN"].entries()) {
    assert.strictEqual((await describeDevice(fakeControl({ state }), ID)).state, name);
  }
});

test("describeDevice takes size, block, attributes and numbers from the driver's params", async () => {
  const facts = await describeDevice(fakeControl({}), ID);
  assert.strictEqual(facts.sizeBytes, 2 ** 30);
  assert.strictEqual(facts.blockBytes, 4096);
  assert.strictEqual(facts.readOnly, true);
  assert.strictEqual(facts.char, "239:5");
  assert.strictEqual(facts.block, "259:7");
  assert.deepStrictEqual(facts.target, {});
});

const skip = process.getuid!() !== 0 && "needs root";

test(
  "describeDevice tells no target of another device that had the id before",
  { skip },
  async () => {
    const mark = makersMark(process.pid);
    const target = { name: "loop", backing_file: "/a.img" };
    writeState(ID, { mark, pid: process.pid, target, queues: [], spec: {} });
    try {
      for (const state of [UBLK_S_DEV_LIVE, UBLK_S_DEV_QUIESCED]) {
        const told = async (targetFlags: bigint) =>
          (await describeDevice(fakeControl({ state, targetFlags }), ID)).target.name;
        assert.strictEqual(await told(mark), "loop");
        assert.strictEqual(await told(0n), undefined);
      }
    } finally {
      removeState(ID);
    }
  },
);

test("describeParams names what the device has, in bytes", () => {
  const basic = {
    attrs: 4 | 8,
    logical_bs_shift: 9,
    physical_bs_shift: 12,
    io_min_shift: 12,
    io_opt_shift: 16,
    max_sectors: 1024,
  };
  const discard = {
    discard_granularity: 4096,
    max_discard_sectors: 8,
    max_write_zeroes_sectors: 16,
    max_discard_segments: 1,
  };
  const seg = { max_segments: 9, max_segment_size: 8192, seg_boundary_mask: 65535 };
  const describe = (types: number) =>
    describeParams(
      unpack(
        UBLK_PARAMS,
        pack(UBLK_PARAMS, { types, basic, discard, dma: { alignment: 511 }, seg }),
      ),
    );
  const expected = {
    attributes: ["volatile cache", "FUA"],
    logicalBlockBytes: 512,
    physicalBlockBytes: 4096,
    ioMinBytes: 4096,
    ioOptBytes: 65536,
    requestBytesMax: 524288,
    chunkBytes: 0,
    memoryAlignBytes: 4,
  };
  assert.deepStrictEqual(describe(1), expected);
  assert.deepStrictEqual(describe(1 | 2 | 16), {
    ...expected,
    discard: {
      granularityBytes: 4096,
      alignmentBytes: 0,
      discardBytesMax: 4096,
      writeZeroesBytesMax: 8192,
      segmentsMax: 1,
    },
    memoryAlignBytes: 512,
  });
  assert.deepStrictEqual(describe(1 | 32), {
    ...expected,
    segments: { max: 9, bytesMax: 8192, boundaryBytes: 65536 },
  });
});

test("dumpFeatures prints the lines of ublk features", () => {
  const names = [
    "ZERO_COPY",
    "COMP_IN_TASK",
    "GET_DATA",
    "USER_RECOVERY",
    "RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_ZC",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
  ];
  assert.deepStrictEqual(featureNames(0x7ffffn), names);
  const lines = names.map((name, bit) => `\t${name.padEnd(20)}: 0x${(2 ** bit).toString(16)}\n`);
  assert.strictEqual(dumpFeatures(0x7ffffn), `ublk_drv features: 0x7ffff\n${lines.join("")}`);
  assert.strictEqual(dumpFeatures(0n), "ublk_drv features: 0x0\n");
  assert.strictEqual(
    dumpFeatures(1n << 63n),
    "ublk_drv features: 0x8000000000000000\n\tunknown             : 0x8000000000000000\n",
  );
});
