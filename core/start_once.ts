// SPDX-License-Identifier: MIT
/**
 * For drivers that cannot delete a device whose tags were never all fetched: it is served, started
 * and stopped once, so that it can be.
 * @module
 */

import process from "node:process";
import { UBLK_IO_OP_READ } from "../abi/ublk_cmd.ts";
import { attach, unwinding } from "./attach.ts";
import type { Control } from "./control.ts";
import { UblkError } from "./error.ts";
import { movesData, type Queue } from "./queue.ts";
import { openHere } from "./queue_thread.ts";
import type { DeviceLimits } from "./target.ts";

/** Nobody is told of the device: what reads it is the search for partitions. */
const NOTHING: DeviceLimits = {
  sizeBytes: 0,
  blockBytes: 512,
  physicalBlockBytes: 512,
  readOnly: true,
  volatileCache: false,
  discardBytes: 0,
  writeZeroes: false,
};

function answer(queue: Queue, tag: number): void {
  const [op, bytes] = [queue.op(tag), queue.bytes(tag)];
  if (op === UBLK_IO_OP_READ) queue.fillZero(tag, 0, bytes);
  queue.commit(tag, movesData(op) ? bytes : 0);
}

/**
 * @throws {UblkError} EBUSY: its tags are with a server, which may be dead; nothing can delete it.
 */
export async function startOnce(control: Control, id: number): Promise<void> {
  const info = await control.getDeviceInfo(id);
  const log = () => {};
  const served = { description: { limits: NOTHING, shared: undefined } };
  const target = openHere({ ...served, handler: () => ({ handle: answer }) }, control.shim, log);
  await unwinding(log, async (undo) => {
    const serving = { targetName: "nothing", target, queueThreadEntry: "", log };
    const queues = await attach(control, info, serving, undo).catch((error) => {
      if ((error as UblkError).errno !== "EBUSY") throw error;
      const hint = "a server was ended, or is at work, between its first request for I/O and the " +
        `start, and ${control.dialect.driver} cannot delete the device then: leave it, and choose ` +
        "another id; it ends with the machine";
      throw new UblkError({ errno: "EBUSY", operation: "delete", device: id, hint });
    });
    await queues.during("START_DEV", control.startDevice(id, process.pid));
    await control.stopDevice(id);
    await queues.ended;
    queues.release();
  });
}
