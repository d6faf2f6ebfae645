// SPDX-License-Identifier: MIT

/** The same as in package.json and deno.json; a test compares them. */
export const VERSION = "0.1.0";
