// SPDX-License-Identifier: MIT
/** core/log.ts: what is told, and that telling harms nobody. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { describeThrown } from "../../core/error.ts";
import { harmless, limited } from "../../core/log.ts";

const collect = (now?: () => number) => {
  const lines: string[] = [];
  return { lines, log: limited((text) => void lines.push(text), now) };
};

test("100 000 failures are 100 lines at most, also when each has another text", () => {
  const texts: Record<string, (n: number) => string> = {
    "the same": () => "READ fails: Error: gone\n    at read (a.ts:5:7)",
    "in turn": (n) => n % 2 ? "READ fails" : "WRITE fails",
    "with offsets": (n) => `READ of 4096 bytes at ${n * 4096}: gone`,
    "in turn with offsets": (n) => `${n % 2 ? "READ" : "WRITE"} at ${n * 512} fails`,
    "with numbers of another kind": (n) => `block 0x${n.toString(16)}a0 of ${n / 7}e-5 is bad`,
    "all different": (n) => `no ${n.toString(2).replaceAll("0", "o").replaceAll("1", "l")}`,
  };
  for (const [name, text] of Object.entries(texts)) {
    // As long as 100 000 take when each takes a millisecond.
    const count = name === "in turn with offsets" ? 100_000 : 10_000;
    let time = 0;
    const { lines, log } = collect(() => time);
    for (let n = 0; n < count; n++, time += 100_000 / count) log(text(n));
    assert.ok(lines.length > 0 && lines.length <= 40, `${name}: ${lines.length}`);
    assert.equal(lines[0], text(0));
  }
});

test("what differs in numbers is told at first, and then ever more rarely, with its count", () => {
  const { lines, log } = collect();
  for (let n = 1; n <= 1000; n++) log(`READ at ${n} fails`);
  assert.deepEqual(lines, [
    "READ at 1 fails",
    "READ at 10 fails (number 10 of its kind)",
    "READ at 100 fails (number 100 of its kind)",
    "READ at 1000 fails (number 1000 of its kind)",
  ]);
});

test("after too many kinds of texts there is one a minute, which says how many were not told", () => {
  let time = 0;
  const { lines, log } = collect(() => time);
  const word = (n: number) => `${String.fromCharCode(97 + n % 26).repeat(1 + n / 26)} fails`;
  for (let n = 0; n < 100; n++) log(word(n));
  assert.equal(lines.length, 32);
  time = 59_999;
  log(word(100));
  assert.equal(lines.length, 32);
  time = 60_000;
  log(word(101));
  log(word(102));
  assert.deepEqual(lines.slice(32), [`${word(101)} (69 other messages were left out)`]);
  time += 60_000;
  log(word(103));
  assert.equal(
    lines.at(-1),
    `${word(103)} (1 other messages were left out)`,
    "since the last line",
  );
  time += 3600_000;
  for (let n = 0; n < 100; n++) log(word(n + 104));
  assert.equal(lines.length, 34 + 32, "no more than at first");
});

test("a log that throws, rejects or is handed anything breaks nothing", async () => {
  let told = 0;
  const bad: ((text: string) => unknown)[] = [
    () => {
      throw new Error("full");
    },
    () => Promise.reject(new Error("full")),
    () => ({
      get then() {
        throw new Error("full");
      },
    }),
    () => ({
      then(_resolve: unknown, reject: (error: unknown) => void) {
        reject(new Error("full"));
      },
    }),
  ];
  for (const log of bad) {
    for (const make of [harmless, limited]) {
      const said = make((text) => {
        told++;
        return log(text) as void;
      });
      said("text");
      for (const any of [Symbol("x"), undefined, Object.create(null)]) said(any as string);
    }
  }
  assert.ok(told >= 2 * bad.length);
  await new Promise((resolve) => setTimeout(resolve, 5)); // Nothing is rejected unheard.
});

test("whatever was thrown is described", () => {
  assert.match(describeThrown(new Error("oops")), /^Error: oops\n +at /);
  assert.equal(describeThrown("oops"), "oops");
  assert.equal(describeThrown(Object.create(null)), "a object that cannot be shown");
  const odd = Object.defineProperty(new Error("x"), "stack", {
    get() {
      throw new Error("no stack for you");
    },
  });
  assert.equal(describeThrown(odd), "a object that cannot be shown");
  assert.equal(describeThrown(Object.assign(new Error("x"), { stack: 5 })), "5");
});
