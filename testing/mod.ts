// SPDX-License-Identifier: MIT
/**
 * Tests targets without a kernel driver, on any Linux machine that has io_uring, as any user.
 *
 * `openForTesting` asks a target's functions as a device would; `checkAgainstModel` does that at
 * random, and compares with a plain buffer. Sizes and offsets are in bytes.
 *
 * @example
 * ```ts
 * import { defineTarget } from "ubd";
 * import { openForTesting } from "ubd/testing";
 *
 * const zeroes = defineTarget({ size: 1024 ** 3, read() {} });
 *
 * await using device = await openForTesting(zeroes);
 * console.log((await device.read(4096, 512)).every((byte) => byte === 0)); // true
 * ```
 * @module
 */

export { openForTesting, type TestDevice, type TestOptions } from "./device.ts";
export { RequestError } from "./driver.ts";
export { checkAgainstModel, type FastCheck, type ModelOptions, type ModelReport } from "./model.ts";
