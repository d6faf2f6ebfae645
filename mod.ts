// SPDX-License-Identifier: MIT
/**
 * Linux block devices served from TypeScript, over the kernel's ublk driver and io_uring.
 *
 * `Control` speaks to the driver; `Device.create` adds, starts and serves a device whose target
 * is one of `findTarget`'s.
 * @module
 */

export { Control } from "./core/control.ts";
export { Device, type DeviceOptions, type QueueFacts } from "./core/device.ts";
export { UblkError, type UblkErrorDetails, UsageError } from "./core/error.ts";
export type { DeviceLimits, OpenTarget, TargetType } from "./core/target.ts";
export { VERSION } from "./core/version.ts";
export { findTarget, TARGET_NAMES } from "./targets/mod.ts";
export { queueThreadEntry } from "./targets/queue_thread.ts";
