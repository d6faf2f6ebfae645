// SPDX-License-Identifier: MIT
/**
 * `npm run fuzz -- NAME [--seed N] [--path P] [--time S] [--canary]`: a fuzzer of tests/fuzz, for 60
 * seconds unless told otherwise. Without NAME: all of them, one after the other.
 *
 * A failure prints the smallest input that still fails, and the seed and path that repeat it.
 * --canary plants the bug that the fuzzer must find: success is to find it.
 * @module
 */

import process from "node:process";
import { parseArgs } from "node:util";
import { fuzz, fuzzerNames, loadFuzzer } from "../tests/fuzz/fuzzer.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    seed: { type: "string" },
    path: { type: "string" },
    time: { type: "string", default: "60" },
    canary: { type: "boolean", default: false },
  },
});

const known = fuzzerNames();
const unknown = positionals.filter((name) => !known.includes(name));
if (unknown.length > 0) {
  console.error(`No fuzzer ${unknown.join(", ")}: there are ${known.join(", ")}`);
  process.exit(2);
}

let failed = false;
for (const name of positionals.length > 0 ? positionals : known) {
  const fuzzer = await loadFuzzer(name);
  const seed = values.seed === undefined
    ? Math.floor(Math.random() * 2 ** 31)
    : Number.parseInt(values.seed);
  console.log(`${name}: ${fuzzer.about}`);
  const { rounds, failure } = await fuzz(fuzzer, {
    seed,
    ...(values.path !== undefined && { path: values.path }),
    timeMs: Number.parseFloat(values.time) * 1000,
    canary: values.canary,
  });
  if (failure !== undefined) {
    console.log(failure);
    const path = /path: "([^"]*)"/.exec(failure)?.[1];
    console.log(
      `again: npm run fuzz -- ${name} --seed ${seed}` +
        `${path === undefined ? "" : ` --path ${path}`}${values.canary ? " --canary" : ""}`,
    );
  }
  console.log(`${name}: seed ${seed}, ${rounds} rounds, ${failure ? "failed" : "clean"}`);
  failed ||= (failure !== undefined) !== values.canary;
}
process.exit(failed ? 1 : 0);
