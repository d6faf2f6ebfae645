// SPDX-License-Identifier: MIT
/** Makes the server of a device let go, so that whoever dies over that can be seen to have. @module */

import { UBLK_S_DEV_LIVE } from "../abi/ublk_cmd.ts";
import type { Control } from "../core/control.ts";
import { Device } from "../core/device.ts";
import { UblkError } from "../core/error.ts";
import { noteQuiescing, quiescerOf, readState } from "../core/state.ts";

/**
 * As Device.quiesce, noted in the state file. Who calls it sees it through, whatever signals come.
 *
 * @throws {UblkError} EBUSY: somebody else is at it.
 */
export async function letServerGo(control: Control, id: number): Promise<void> {
  const { targetFlags } = await control.getDeviceInfo(id);
  const other = quiescerOf(readState(id, targetFlags) ?? {});
  if (other?.alive) throw quiescedError(id, other.pid, "QUIESCE_DEV");
  noteQuiescing(id, targetFlags, true);
  try {
    await Device.quiesce(control, id);
  } finally {
    // Unless requests are still held back: then the note stays, and outlives this process.
    const { state } = await control.getDeviceInfo(id);
    if (state !== UBLK_S_DEV_LIVE) noteQuiescing(id, targetFlags, false);
  }
}

/** Somebody else is at it. */
export function quiescedError(id: number, pid: number, operation: string): UblkError {
  const hint = `process ${pid} is making its server let go: wait for that`;
  return new UblkError({ errno: "EBUSY", operation, device: id, hint });
}

/** Whether requests to a device that the driver calls LIVE wait for somebody who has died. */
export function isForsaken(state: Parameters<typeof quiescerOf>[0] | undefined): boolean {
  return state !== undefined && quiescerOf(state)?.alive === false;
}

export function forsaken(id: number): string {
  return `device ${id} holds all requests: whoever was making its server let go has died; ` +
    `ubd recover -n ${id} goes on with that`;
}
