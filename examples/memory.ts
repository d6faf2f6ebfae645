// SPDX-License-Identifier: MIT
import { createDevice, defineTarget } from "ubd";

const disk = new Uint8Array(64 * 1024 ** 2);

const target = defineTarget({
  size: disk.length,
  read({ offset, length, buffer }) {
    buffer.set(disk.subarray(offset, offset + length));
  },
  write({ offset, buffer }) {
    disk.set(buffer, offset);
  },
});
export default target; // for `ubd add ./memory.ts`

if (import.meta.main) {
  await using device = await createDevice(target);
  console.log(`${device.path} is ready; Ctrl-C removes it`);
  await device.closed;
}
