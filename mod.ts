// SPDX-License-Identifier: MIT
/**
 * Linux block devices served from TypeScript, over the kernel's ublk driver and io_uring.
 *
 * `defineTarget` makes a block device of a few functions; `createDevice` serves it in this
 * program, `ubd add ./file.ts` in a process of its own. Sizes and offsets are in bytes, times in
 * milliseconds.
 *
 * @example A device of 64 MiB in memory
 * ```ts
 * import { createDevice, defineTarget } from "ubd";
 *
 * const disk = new Uint8Array(64 * 1024 ** 2);
 * const target = defineTarget({
 *   size: disk.length,
 *   read: ({ offset, length, buffer }) => buffer.set(disk.subarray(offset, offset + length)),
 *   write: ({ offset, buffer }) => disk.set(buffer, offset),
 * });
 *
 * await using device = await createDevice(target);
 * console.log(device.path);
 * ```
 * @module
 */

export { createDevice, type CreateDeviceOptions, type ServedDevice } from "./core/create_device.ts";
export {
  type Answer,
  type BlockDevice,
  defineTarget,
  type GivenOptions,
  type MARK,
  type NoOptions,
  type OptionSpec,
  type OptionSpecOf,
  type OptionSpecs,
  type OptionValue,
  type OptionValues,
  type ReadRequest,
  type Request,
  type Target,
  type TargetDefinition,
  type WriteRequest,
  type ZeroRequest,
} from "./core/define_target.ts";
export { UblkError, type UblkErrorDetails, UsageError } from "./core/error.ts";
export type { DeviceStats, OperationStats } from "./core/stats.ts";
export type { MemoryLimits } from "./core/target.ts";
export {
  fault,
  type FaultOperation,
  type FaultOptions,
  faultTarget,
  type FaultyDevice,
} from "./targets/fault.ts";
export { httpTarget } from "./targets/http.ts";
export { memoryTarget } from "./targets/memory.ts";
export { VERSION } from "./core/version.ts";
