// SPDX-License-Identifier: MIT
/**
 * Uses more memory than there is, all of it again and again: what it finds must be what it wrote.
 *
 *   hog.ts MEBIBYTES SECONDS
 *
 * Used by isolation_test.ts; prints how much it has been through as JSON.
 * @module
 */

import process from "node:process";

const [mebibytes, seconds] = process.argv.slice(2).map(Number) as [number, number];
const PAGE_WORDS = 1024;

const memory = Array.from({ length: mebibytes }, () => new Uint32Array(256 * PAGE_WORDS));
const word = (block: number, at: number, pass: number) =>
  (Math.imul(block << 18 | at, 0x9e3779b1) + pass) >>> 0;

function check(block: number, at: number, pass: number): void {
  const [found, wrote] = [memory[block]![at], word(block, at, pass)];
  if (found === wrote) return;
  console.error(`MiB ${block}, word ${at}, pass ${pass}: ${found}, not ${wrote}`);
  process.exit(1);
}

for (const [block, words] of memory.entries()) {
  for (let at = 0; at < words.length; at++) words[at] = word(block, at, 0);
}
const start = performance.now();
const isOver = () => performance.now() - start > seconds * 1000;
let passes = 0;
let looked = 0;
for (; !isOver(); passes++) {
  for (const [block, words] of memory.entries()) {
    if (isOver()) break; // When memory is short, a pass takes minutes.
    // A page's first word is new in each pass, so that an old copy of the page is found out.
    for (let page = 0; page < words.length; page += PAGE_WORDS) {
      check(block, page, passes);
      check(block, page + 1 + passes % (PAGE_WORDS - 1), 0);
      words[page] = word(block, page, passes + 1);
    }
    looked++;
  }
}
console.log(JSON.stringify({ mebibytesWritten: mebibytes, mebibytesChecked: looked }));
