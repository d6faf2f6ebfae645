// SPDX-License-Identifier: MIT
/** Control commands, answered by a driver in memory: how many, and how many at a time. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { setImmediate, setTimeout } from "node:timers";
import { type Dialect, UBLK } from "../../abi/dialect.ts";
import { ERRNO } from "../../abi/errno.ts";
import { deletedDevices } from "../../cli/describe.ts";
import { Control } from "../../core/control.ts";
import { UblkError } from "../../core/error.ts";
import { type ControlRequest, PAYLOAD_BYTES, PAYLOAD_COUNT, type Shim } from "../../ffi/mod.ts";

/** /sys/class/mem is on every Linux, and has no ublk devices: those that answer are deleted. */
const DIALECT = {
  ...UBLK,
  charClass: "mem",
  blockName: (id: number) => `no-such-disk${id}`,
} as unknown as Dialect;

/** A driver that completes nothing in the turn of the event loop in which it is asked. */
class Driver {
  readonly asked: [command: string, id: number][] = [];
  /** Most commands in flight at a time. */
  most = 0;
  readonly #payloads = new ArrayBuffer(PAYLOAD_COUNT * PAYLOAD_BYTES);
  readonly #ready = new Set<ControlRequest>();
  #flying = 0;

  /**
   * @param encoded it knows ioctl-encoded opcodes: it is that of Linux 6.4 or later.
   * @param answer to all but GET_FEATURES, for a device; undefined: the command waits.
   */
  constructor(
    readonly encoded: boolean,
    readonly answer: (id: number) => number | undefined,
  ) {}

  readonly native = {
    ubd_close: () => 0,
    ubd_control_exit: () => 0,
    ubd_control_reap: (_: number, out: Int32Array) => {
      for (const request of this.#ready) {
        const result = this.#resultOf(request);
        if (result === undefined) continue;
        this.#ready.delete(request);
        this.#flying--;
        out.set([request.payload, result]);
        return 1;
      }
      return 0;
    },
  };

  open = () => 3;
  controlInit = () => ({ handle: 0, payloads: this.#payloads });
  controlSubmit = (_: number, request: ControlRequest) => {
    this.asked.push([this.#nameOf(request.opcode), request.deviceId]);
    setImmediate(() => this.#ready.add(request));
    this.most = Math.max(this.most, ++this.#flying);
    return 0;
  };

  #nameOf(opcode: number): string {
    const names = ["GET_DEV_INFO2", "GET_DEV_INFO", "GET_PARAMS", "GET_FEATURES"] as const;
    return names.find((name) =>
      [true, false].some((encoded) =>
        UBLK.hasCommand(name, encoded) && UBLK.controlOpcode(name, encoded) === opcode
      )
    ) ?? "another";
  }

  #resultOf({ opcode, deviceId, payload, pathBytes }: ControlRequest): number | undefined {
    const name = this.#nameOf(opcode);
    if (name === "GET_FEATURES" && this.encoded) return 0;
    // As Linux 6.1 answers what it does not know.
    if (!["GET_DEV_INFO", "GET_PARAMS"].includes(name) && !this.encoded) return -ERRNO.ENODEV;
    const result = this.answer(deviceId);
    const info = UBLK.packInfo({
      ...{ id: deviceId, queues: 1, depth: 1, maxIoBytes: 4096, flags: 0n, targetFlags: 0n },
      ...{ pid: 1, blockSize: 512, sizeBytes: 0, ownerUid: 0, ownerGid: 0 },
    });
    if (result === 0) new Uint8Array(this.#payloads).set(info, payload * PAYLOAD_BYTES + pathBytes);
    return result;
  }

  control(): Promise<Control> {
    return Control.open(this as unknown as Shim, DIALECT);
  }
}

test("deleted devices are looked for with as many commands at a time as there is room", async () => {
  const driver = new Driver(true, (id) => [3, 40].includes(id) ? 0 : -ERRNO.ENODEV);
  using control = await driver.control();
  driver.asked.length = 0;
  const found = await deletedDevices(control);
  assert.deepStrictEqual(found, [{ id: 3, heldBy: [] }, { id: 40, heldBy: [] }]);
  assert.deepStrictEqual(
    driver.asked,
    Array.from({ length: 64 }, (_, id) => ["GET_DEV_INFO2", id]),
    "each is asked for once",
  );
  assert.strictEqual(driver.most, PAYLOAD_COUNT);
});

test("deleted devices are found while other commands wait in the driver", async () => {
  let late: number | undefined = undefined;
  const driver = new Driver(true, (id) => id === 99 ? late : id === 63 ? 0 : -ERRNO.ENODEV);
  using control = await driver.control();
  const waiting = Array.from({ length: 3 }, () => control.getDeviceInfo(99));
  const found = await deletedDevices(control);
  assert.deepStrictEqual(found.map(({ id }) => id), [63]);
  assert.strictEqual(driver.most, PAYLOAD_COUNT);
  late = 0;
  await Promise.all(waiting);
});

test("a failure of one command is told when the others are answered", async () => {
  let late: number | undefined;
  const driver = new Driver(true, (id) => id === 5 ? -ERRNO.EIO : id === 6 ? late : -ERRNO.ENODEV);
  using control = await driver.control();
  setTimeout(() => late = -ERRNO.ENODEV, 50);
  await assert.rejects(deletedDevices(control), { errno: "EIO" });
  assert.strictEqual(control.room, PAYLOAD_COUNT);
});

test("GET_DEV_INFO is asked only of a driver that may not know GET_DEV_INFO2", async () => {
  for (const encoded of [true, false]) {
    const driver = new Driver(encoded, (id) => id === 1 ? 0 : -ERRNO.ENODEV);
    using control = await driver.control();
    driver.asked.length = 0;
    assert.strictEqual((await control.getDeviceInfo(1)).id, 1);
    await assert.rejects(control.getDeviceInfo(2), (error) => {
      assert.ok(error instanceof UblkError && error.errno === "ENODEV");
      return /GET_DEV_INFO\b/.test(error.message);
    });
    const names = encoded ? ["GET_DEV_INFO2"] : ["GET_DEV_INFO2", "GET_DEV_INFO"];
    const asked = [1, 2].flatMap((id) => names.map((name) => [name, id]));
    assert.deepStrictEqual(driver.asked, asked);
  }
});
