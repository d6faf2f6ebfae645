// SPDX-License-Identifier: MIT
/**
 * What the driver of the V2 patch lacks, and crashes for: a device on that driver, played, from
 * ADD_DEV to DEL_DEV. Needs io_uring.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { type Dialect, UBD_V2 } from "../../abi/dialect.ts";
import {
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_URING_CMD_COMP_IN_TASK,
  UBLK_F_USER_RECOVERY,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../../abi/ublk_cmd.ts";
import { Control } from "../../core/control.ts";
import { type BlockDevice, openDefinition, type WriteRequest } from "../../core/define_target.ts";
import { Device, type DeviceOptions } from "../../core/device.ts";
import { UblkError } from "../../core/error.ts";
import { openHere } from "../../core/queue_thread.ts";
import { PlayedV2 } from "./played_v2.ts";

const TIMEOUT = { timeout: 30_000 };
const SIZE = 2 ** 20;
const ZEROES: BlockDevice = { size: SIZE, read() {} };

/** A control ring to a played driver, and what makes a device with it. */
async function setUp(blockDevice: BlockDevice, special: Partial<DeviceOptions> = {}) {
  const driver = new PlayedV2();
  const control = await Control.open(driver, UBD_V2);
  const log: string[] = [];
  const tell = (text: string) => void log.push(text);
  const served = await openDefinition({ open: () => blockDevice }, {}, undefined, tell);
  const request = (op: number, offset: number, data = new Uint8Array(4096)) =>
    driver.submit(op, 0, offset, data.length, data);
  return {
    driver,
    control,
    log,
    create: () =>
      Device.create(control, {
        id: -1,
        queues: 1,
        depth: 4,
        ioBytesMax: 65536,
        flags: 0n,
        log: tell,
        targetName: "here",
        queueThreadEntry: "",
        target: openHere(served, driver, tell),
        ...special,
      }),
    read: (offset: number, bytes = 4096) => request(UBLK_IO_OP_READ, offset, new Uint8Array(bytes)),
    write: (offset: number, data = new Uint8Array(4096)) => request(UBLK_IO_OP_WRITE, offset, data),
    discard: (offset: number) => request(UBLK_IO_OP_DISCARD, offset),
    writeZeroes: (offset: number) => request(UBLK_IO_OP_WRITE_ZEROES, offset),
    [Symbol.dispose]: () => control[Symbol.dispose](),
  };
}

test("a device is made, served and deleted", TIMEOUT, async () => {
  using set = await setUp({ ...ZEROES, write() {} });
  const device = await set.create();
  assert.equal(device.path, "/dev/ubdb0");
  await set.write(0);
  await set.read(0);
  await device.stop();
  assert.deepEqual([set.driver.crashes, set.driver.added, set.log], [[], false, []]);
});

test("START_DEV waits until every queue says that its tags are fetched", TIMEOUT, async () => {
  using set = await setUp(ZEROES);
  const served = await openDefinition({ open: () => ZEROES }, {}, undefined, () => {});
  const here = openHere(served, set.driver, () => {});
  const startThread = (queueId: number) => {
    const thread = here.startThread!(queueId);
    const fetched = () => {
      set.driver.asked.push("fetched?");
      return thread.fetched().then(() => void set.driver.asked.push("fetched"));
    };
    return { ...thread, fetched };
  };
  const device = await Device.create(set.control, {
    id: -1,
    queues: 2,
    depth: 4,
    ioBytesMax: 4096,
    flags: 0n,
    log: () => {},
    targetName: "here",
    queueThreadEntry: "",
    target: { ...here, queuesMax: 2, startThread },
  });
  await device.stop();
  const order = set.driver.asked.filter((what) => /fetched|START_DEV/.test(what));
  assert.deepEqual(order, ["fetched?", "fetched?", "fetched", "fetched", "START_DEV"]);
  assert.deepEqual(set.driver.crashes, []);
});

test("while a queue does not hear, no STOP_DEV is given that its process could not end before", {
  ...TIMEOUT,
}, async () => {
  for (const starting of [false, true]) {
    const interrupted = new AbortController();
    const read = () => starting && interrupted.abort(new Error("told to end"));
    const blockDevice = { ...ZEROES, read: () => void read() };
    using set = await setUp(blockDevice);
    const served = await openDefinition({ open: () => blockDevice }, {}, undefined, () => {});
    const here = openHere(served, set.driver, () => {});
    let hears = false;
    let looks = 0;
    const startThread = (queueId: number) => {
      const hasHeard = () => {
        looks++;
        return hears;
      };
      return { ...here.startThread!(queueId), hears: hasHeard };
    };
    const making = Device.create(set.control, {
      id: -1,
      queues: 1,
      depth: 4,
      ioBytesMax: 4096,
      flags: 0n,
      log: () => {},
      targetName: "here",
      queueThreadEntry: "",
      signal: interrupted.signal,
      target: { ...here, startThread },
    });
    const ended = starting
      ? assert.rejects(making, /told to end/)
      : making.then((device) => device.stop());
    const asked = (what: string) => set.driver.asked.includes(what);
    while (looks < 5 && !asked("STOP_DEV")) await sleep(1);
    assert.ok(!asked("STOP_DEV") && !asked("DEL_DEV"), `starting: ${starting}`);
    hears = true;
    await ended;
    assert.ok(asked("STOP_DEV") && asked("DEL_DEV"));
    assert.deepEqual([set.driver.crashes, set.driver.added], [[], false]);
  }
});

test("one thread serves two queues, and START_DEV waits for both", TIMEOUT, async () => {
  const offsets: number[] = [];
  const read = ({ offset }: { offset: number }) => void offsets.push(offset);
  using set = await setUp({ ...ZEROES, read }, { queues: 2, threads: 1 });
  const device = await set.create();
  assert.deepEqual(device.queues.map(({ qid }) => qid), [0, 1]);
  assert.equal(device.queues[0]!.tid, device.queues[1]!.tid);
  for (let at = 0; at < SIZE; at += 65536) await set.read(at);
  assert.equal(device.stats().read.requests, 1 + SIZE / 65536, "the partition table, and these");
  await device.stop();
  assert.deepEqual([set.driver.crashes, set.driver.added, set.log], [[], false, []]);
});

test("it lets no two threads share a queue", TIMEOUT, async () => {
  using set = await setUp(ZEROES, { threads: 2 });
  await assert.rejects(set.create(), { errno: "EOPNOTSUPP", message: /PER_IO_DAEMON/ });
  assert.deepEqual([set.driver.crashes, set.driver.added], [[], false]);
});

test(
  "what fails before the first FETCH leaves no device, and crashes nothing",
  TIMEOUT,
  async () => {
    const onAdded = () => {
      throw new Error("no");
    };
    using set = await setUp(ZEROES, { onAdded });
    await assert.rejects(set.create(), /^Error: no$/);
    assert.deepEqual([set.driver.crashes, set.driver.added, set.log], [[], false, []]);
  },
);

test("a device whose server died before the first FETCH can be deleted", TIMEOUT, async () => {
  using set = await setUp(ZEROES);
  const { driver, control } = set;
  const dimensions = { queues: 2, depth: 3, maxIoBytes: 4096, blockSize: 512, sizeBytes: SIZE };
  const { id } = await control.addDevice({ id: -1, ...dimensions });
  await control.stopDevice(id);
  assert.ok(!driver.asked.includes("STOP_DEV"), "there is nothing to stop");
  await control.deleteDevice(id);
  assert.deepEqual([driver.crashes, driver.added], [[], false]);
  const commands = driver.asked.filter((what) => /START|STOP|DEL/.test(what));
  assert.deepEqual(commands, ["START_DEV", "STOP_DEV", "DEL_DEV"]);
  await assert.rejects(control.deleteDevice(id), { errno: "ENODEV" });
});

test(
  "what it cannot do is refused by the driver's name, before there is a device",
  TIMEOUT,
  async () => {
    const unable: Partial<DeviceOptions>[] = [
      { zeroCopy: "reg" },
      { zeroCopy: "on" },
      { userCopy: true },
      { needGetData: true },
      { batch: true },
      ...[UBLK_F_USER_RECOVERY, UBLK_F_URING_CMD_COMP_IN_TASK, UBLK_F_UNPRIVILEGED_DEV]
        .map((flags) => ({ flags })),
    ];
    for (const options of unable) {
      const zeroCopy = { memoryAlignBytes: 1 };
      using set = await setUp(ZEROES, options);
      const served = await openDefinition({ open: () => ZEROES }, {}, undefined, () => {});
      const target = { ...openHere(served, set.driver, () => {}), zeroCopy };
      const what = JSON.stringify(options, (_, value) => `${value}`);
      await assert.rejects(
        Device.create(set.control, { ...defaults(target), ...options }),
        (error) => {
          assert.ok(error instanceof UblkError, `${what}: ${error}`);
          assert.equal(error.errno, "EOPNOTSUPP", what);
          assert.match(error.message, /ubd_drv, lacks/, what);
          assert.doesNotMatch(error.message, /kernel/, what);
          return true;
        },
      );
      assert.ok(!set.driver.asked.includes("ADD_DEV"), what);
    }
  },
);

function defaults(target: DeviceOptions["target"]): DeviceOptions {
  const names = { targetName: "here", queueThreadEntry: "" };
  return { id: -1, queues: 1, depth: 4, flags: 0n, log() {}, ...names, target };
}

test("a command that it lacks is EOPNOTSUPP, and not sent", TIMEOUT, async () => {
  using set = await setUp(ZEROES);
  const { control } = set;
  const lacking: (() => Promise<unknown>)[] = [
    () => control.getParams(0),
    () => control.setParams(0, {}),
    () => control.startUserRecovery(0),
    () => control.endUserRecovery(0, 1),
    () => control.quiesceDevice(0, 1),
    () => control.updateSize(0, 8),
    () => control.tryStopDevice(0),
    () => control.deleteDeviceLater(0),
    () => Promise.try(() => control.requireCommand("START_USER_RECOVERY", "recover", 0)),
    () => Promise.try(() => control.require(UBLK_F_USER_RECOVERY, "recover", 0)),
    () => Device.recover(control, 0, defaults({} as DeviceOptions["target"])),
  ];
  for (const command of lacking) {
    await assert.rejects(command, (error) => {
      assert.ok(error instanceof UblkError, `${error}`);
      assert.equal(error.errno, "EOPNOTSUPP");
      assert.match(error.message, /ubd_drv, lacks/);
      return true;
    });
  }
  assert.deepEqual(set.driver.asked, ["open /dev/ubd-control"]);
});

test("what a target does not offer is EOPNOTSUPP, without a word in the log", TIMEOUT, async () => {
  using set = await setUp({ ...ZEROES, write() {} });
  const device = await set.create();
  await assert.rejects(set.discard(0), { code: "EOPNOTSUPP" });
  await assert.rejects(set.writeZeroes(0), { code: "EOPNOTSUPP" });
  await set.write(0);
  await device.stop();
  assert.deepEqual(set.log, []);
  assert.ok(!set.driver.asked.includes("read-only"));
});

test("what it offers is called", TIMEOUT, async () => {
  const called: string[] = [];
  using set = await setUp({
    ...ZEROES,
    write() {},
    discard: () => void called.push("discard"),
    writeZeroes: () => void called.push("writeZeroes"),
  });
  const device = await set.create();
  await set.discard(0);
  await set.writeZeroes(0);
  await device.stop();
  assert.deepEqual(called, ["discard", "writeZeroes"]);
});

test(
  "a read-only target's device is made read-only, and no write gets through",
  TIMEOUT,
  async () => {
    using set = await setUp(ZEROES);
    const device = await set.create();
    const at = set.driver.asked.indexOf("read-only");
    assert.equal(set.driver.asked[at - 1], "open /dev/ubdb0");
    for (const change of [set.write, set.discard, set.writeZeroes]) {
      await assert.rejects(change(0), { code: "EOPNOTSUPP" });
    }
    await set.read(0);
    await device.stop();
    assert.deepEqual(set.log, []);
  },
);

test("each write is flushed before it is answered, or told to be durable", TIMEOUT, async () => {
  const events: string[] = [];
  const write = ({ offset, fua }: WriteRequest) => void events.push(`write ${offset} ${fua}`);
  const flush = () => void events.push("flush");
  const writeZeroes = () => void events.push("zeroes");
  for (const handlesFua of [false, true]) {
    using set = await setUp({ ...ZEROES, write, flush, writeZeroes, handlesFua });
    const device = await set.create();
    for (const offset of [0, 4096]) {
      await set.write(offset);
      events.push("answered");
    }
    await set.writeZeroes(0);
    await set.read(0);
    await device.stop();
    const flushed = handlesFua ? [] : ["flush"];
    const answered = (what: string) => [what, ...flushed, "answered"];
    assert.deepEqual(events.splice(0), [
      ...answered("write 0 true"),
      ...answered("write 4096 true"),
      "zeroes",
      ...flushed,
    ]);
  }
});

test(
  "the rest of a short count is asked for, since the driver takes any for all",
  TIMEOUT,
  async () => {
    const disk = new Uint8Array(SIZE);
    const asked: [number, number][] = [];
    let turn = 0;
    const later = (count: number) => ++turn % 2 ? Promise.resolve(count) : count;
    const device: BlockDevice = {
      size: SIZE,
      read({ offset, length, buffer }) {
        const count = Math.min(length, 1024);
        buffer.set(disk.subarray(offset, offset + count));
        asked.push([offset, length]);
        return later(count);
      },
      write({ offset, length, buffer }) {
        const count = Math.min(length, 1536);
        disk.set(buffer.subarray(0, count), offset);
        return later(count);
      },
      flush() {},
    };
    using set = await setUp(device);
    const made = await set.create();
    asked.length = 0;
    const [data, got] = [new Uint8Array(16384), new Uint8Array(16384)];
    for (let at = 0; at < data.length; at++) data[at] = at * 7 + (at >> 8);
    const others = [0, 8192].map((offset) => set.write(offset, new Uint8Array(8192).fill(1)));
    await set.write(65536, data);
    await Promise.all(others);
    await set.driver.submit(UBLK_IO_OP_READ, 0, 65536, got.length, got);
    assert.deepEqual(disk.subarray(65536, 65536 + 16384), data);
    assert.deepEqual(got, data);
    assert.deepEqual(asked.slice(0, 2), [[65536, 16384], [66560, 15360]]);
    assert.equal(asked.length, 16);
    await made.stop();
    assert.deepEqual([set.driver.crashes, set.log], [[], []]);
    assert.deepEqual(made.stats().read.requests, 2, "with that of the search for partitions");
  },
);

test(
  "a failure in the rest fails all of a request, and the next one is whole",
  TIMEOUT,
  async () => {
    let calls = 0;
    const read = ({ buffer }: { buffer: Uint8Array }) => {
      if (++calls % 2 === 0) throw Object.assign(new Error("bad"), { code: "ENOSPC" });
      buffer.fill(calls);
      return 512;
    };
    using set = await setUp({ size: SIZE, read });
    const device = await set.create();
    calls = 0;
    for (let round = 0; round < 9; round++) await assert.rejects(set.read(0), { code: "ENOSPC" });
    calls = 0;
    await set.read(0, 512);
    await device.stop();
    assert.deepEqual(set.driver.crashes, []);
  },
);

test("a worker of the kernel's has a control command from the start", TIMEOUT, () => {
  // A file that knows no commands answers at once: what is left to see is who was asked.
  const script = `
    import { readdirSync, readFileSync } from "node:fs";
    import { setTimeout as sleep } from "node:timers/promises";
    import { Shim } from "${new URL("../../ffi/mod.ts", import.meta.url)}";
    const shim = new Shim();
    const ring = shim.controlInit();
    const controlFd = shim.open("/dev/zero", 2);
    const request = { controlFd, opcode: 1, deviceId: 0, queueId: 0, payload: 0 };
    shim.controlSubmit(ring.handle, { ...request, payloadBytes: 0, pathBytes: 0, data: 0n });
    const worker = "iou-wrk-" + shim.native.ubd_gettid();
    const names = () => readdirSync("/proc/self/task")
      .map((tid) => readFileSync("/proc/self/task/" + tid + "/comm", "utf8").trim());
    const deadline = performance.now() + 4000; // It has another name until it first runs.
    while (!names().includes(worker) && performance.now() < deadline) await sleep(1);
    console.log(names().includes(worker));
    process.exit(0);
  `;
  const directory = mkdtempSync(join(tmpdir(), "ubd-v2-"));
  try {
    const file = join(directory, "script.mts");
    writeFileSync(file, script);
    const args = "Bun" in globalThis ? [file] : ["run", "-A", "-q", "--no-check", file];
    const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8" });
    assert.equal(stdout.trim(), "true", stderr);
  } finally {
    rmSync(directory, { recursive: true });
  }
});

test("nothing is asked of a device that is deleted, and still open", TIMEOUT, async () => {
  const driver = new PlayedV2();
  // As sysfs has a class whose devices are all others.
  const dialect = { ...UBD_V2, charClass: "mem", charName: () => "none" } as unknown as Dialect;
  using control = await Control.open(driver, dialect);
  for (const command of ["getDeviceInfo", "stopDevice", "deleteDevice"] as const) {
    await assert.rejects(control[command](0), { errno: "ENODEV" });
  }
  assert.deepEqual(driver.asked, ["open /dev/ubd-control"]);
});
