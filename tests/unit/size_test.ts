// SPDX-License-Identifier: MIT
/** Sizes, numbers and device names as people type them: tables, and properties of any text. */
import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import {
  formatSize,
  oneDeviceId,
  parseCpus,
  parseDeviceId,
  parseInteger,
  parseSize,
} from "../../cli/size.ts";
import { UsageError } from "../../core/error.ts";

/** Bytes for each unit that parseSize documents. */
const UNITS: Record<string, number> = {
  "": 1,
  B: 1,
  s: 512,
  ...{ K: 1024, k: 1024, KiB: 1024, KB: 1000, kB: 1000 },
  ...{ M: 1024 ** 2, m: 1024 ** 2, MiB: 1024 ** 2, MB: 1000 ** 2 },
  ...{ G: 1024 ** 3, g: 1024 ** 3, GiB: 1024 ** 3, GB: 1000 ** 3 },
  ...{ T: 1024 ** 4, t: 1024 ** 4, TiB: 1024 ** 4, TB: 1000 ** 4 },
  ...{ P: 1024 ** 5, p: 1024 ** 5, PiB: 1024 ** 5, PB: 1000 ** 5 },
};

const SIZES: [string, number][] = [
  ["0", 0],
  ["1", 1],
  ["007", 7],
  ["512B", 512],
  ["2048s", 1048576],
  ["1.5s", 768],
  ["0.5K", 512],
  ["1.5K", 1536],
  ["64M", 67108864],
  ["64MiB", 67108864],
  ["64MB", 64000000],
  ["64 M", 67108864],
  [" 64M\n", 67108864],
  ["2.50G", 2684354560],
  ["1.005KB", 1005],
  ["7P", 7881299347898368],
  ["9007199254740991", 9007199254740991],
];

const NO_SIZES = [
  ...["", " ", "K", "M64", "-1", "+1", "1e3", "0x10", "1,5K", "1.", ".5K", "1 0", "1..5K"],
  ...["1kb", "1mB", "1kiB", "1KIB", "1S", "1b", "1E", "1EB", "1bytes", "Infinity", "NaN"],
  ...["1constructor", "1toString", "1__proto__", "\u0661", "1K\u0000"],
  ...["1.5", "0.1K", "0.3s", "1.0005KB", "4.35G"],
  ...["9007199254740992", "9007199254740990.5", "8P", "17592186044416s", "1".repeat(400)],
];

test("parseSize reads every documented form", () => {
  for (const [text, bytes] of SIZES) assert.strictEqual(parseSize(text, "Size"), bytes, text);
});

test("parseSize refuses anything else, and names the option and the text", () => {
  for (const text of NO_SIZES) {
    assert.throws(
      () => parseSize(text, "Largest I/O"),
      (error) => error instanceof UsageError && error.message.startsWith(`Largest I/O "${text}": `),
      text,
    );
  }
});

test("parseSize multiplies whole numbers of each unit exactly, up to 2^53 and not beyond", () => {
  const unit = fc.constantFrom(...Object.keys(UNITS));
  fc.assert(fc.property(fc.maxSafeNat(), unit, fc.boolean(), (any, name, small) => {
    const count = small ? any % 5000 : any;
    const bytes = BigInt(count) * BigInt(UNITS[name]!);
    const read = () => parseSize(`${count}${name}`, "Size");
    if (bytes > Number.MAX_SAFE_INTEGER) assert.throws(read, UsageError);
    else assert.strictEqual(read(), Number(bytes));
  }));
});

test("parseSize reads decimal fractions of decimal units exactly", () => {
  fc.assert(fc.property(fc.nat(), (bytes) => {
    const text = `${Math.floor(bytes / 1e6)}.${String(bytes % 1e6).padStart(6, "0")}MB`;
    assert.strictEqual(parseSize(text, "Size"), bytes, text);
  }));
});

test("parseSize answers a safe whole number or throws a UsageError, whatever the text", () => {
  const likely = fc.stringMatching(/^[ ]?[0-9.]{0,6}[ ]?[KMGTPBikmgtps]{0,3}$/);
  fc.assert(fc.property(fc.oneof(fc.string(), likely), (text) => {
    try {
      const bytes = parseSize(text, "Size");
      assert.ok(Number.isSafeInteger(bytes) && bytes >= 0, `${text} → ${bytes}`);
      assert.match(text.trim(), /^\d/);
    } catch (error) {
      assert.ok(error instanceof UsageError, `${text} → ${error}`);
    }
  }));
});

test("parseInteger reads whole numbers with a sign, and nothing that only starts like one", () => {
  for (const [text, value] of [["0", 0], ["-1", -1], ["128", 128], ["0010", 10]] as const) {
    assert.strictEqual(parseInteger(text, "Queue depth"), value);
  }
  const mistakes = ["", " ", "foo", "1x", "x1", "1.0", "1e3", "0x10", "+1", " 1", "1 ", "--1", "-"];
  for (const text of [...mistakes, "1\n", "9007199254740992", "-9007199254740992"]) {
    assert.throws(
      () => parseInteger(text, "Queue depth"),
      new UsageError(`Queue depth "${text}": it must be a whole number`),
    );
  }
});

test("parseInteger gives back every safe integer that is printed", () => {
  fc.assert(fc.property(fc.maxSafeInteger(), (value) => {
    assert.strictEqual(parseInteger(String(value), "Number"), value + 0);
  }));
});

test("formatSize uses the largest unit that keeps the number at 1 or more", () => {
  const table: [number, string][] = [
    [0, "0 bytes"],
    [512, "512 bytes"],
    [1023, "1023 bytes"],
    [1024, "1 KiB"],
    [1536, "1.5 KiB"],
    [524288, "512 KiB"],
    [64.5 * 1024 ** 2, "64.5 MiB"],
    [99.996 * 1024 ** 2, "100 MiB"],
    [123.456 * 1024 ** 2, "123.5 MiB"],
    [250 * 1024 ** 3, "250 GiB"],
    [1024 ** 4, "1 TiB"],
    [Number.MAX_SAFE_INTEGER, "8 PiB"],
  ];
  for (const [bytes, text] of table) assert.strictEqual(formatSize(bytes), text);
});

test("formatSize is within half a percent of the truth", () => {
  const factors = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  fc.assert(fc.property(fc.maxSafeNat(), fc.nat({ max: 52 }), (any, shift) => {
    const bytes = Math.floor(any / 2 ** shift);
    const [number, unit] = formatSize(bytes).split(" ");
    const shown = Number(number) * 1024 ** factors.indexOf(unit!);
    assert.ok(Math.abs(shown - bytes) <= bytes * 0.005, `${bytes} → ${number} ${unit}`);
  }));
});

test("parseDeviceId takes an id, a block device's name, or its path", () => {
  for (const text of ["3", "ublkb3", "/dev/ublkb3", "ubdb3", "/dev/ubdb3"]) {
    assert.strictEqual(parseDeviceId(text), 3, text);
  }
  assert.strictEqual(parseDeviceId("/dev/ublkb1048575"), 1048575);
  const mistakes = ["", "foo", "3x", "ublkc3", "/dev/ublkb", "/dev/ublkb3p1", "/dev/sda3"];
  for (const text of [...mistakes, "dev/ublkb3", "/dev//ublkb3", "/tmp/ublkb3", "ublkb-1"]) {
    assert.throws(
      () => parseDeviceId(text),
      new UsageError(`Device id "${text}": it must be a whole number`),
    );
  }
});

test("parseDeviceId refuses ids that no device can have, before they wrap to another's", () => {
  for (const id of ["-1", "1048576", "4294967295", "4294967296", "ublkb4294967296"]) {
    const message = `Device id ${id.replace("ublkb", "")}: it must be from 0 to 1048575`;
    assert.throws(() => parseDeviceId(id), new UsageError(message));
  }
});

test("parseCpus takes the lists of ublk, taskset and the kernel", () => {
  assert.deepStrictEqual(parseCpus("[0,2]"), [0, 2]);
  assert.deepStrictEqual(parseCpus("[ 0, 2 ]"), [0, 2]);
  assert.deepStrictEqual(parseCpus("7"), [7]);
  assert.deepStrictEqual(parseCpus("0-2,8191"), [0, 1, 2, 8191]);
  for (const text of ["", "[]", "x", "2-1", "0,", "-1", "8192", "0 1", "0-9999999999"]) {
    assert.throws(() => parseCpus(text), UsageError, text);
  }
});

/** Takes minutes where the time grows with the square of the length. */
const LONG = 200_000;

test("parseCpus takes no longer for a long list", { timeout: 10_000 }, () => {
  for (const blank of [" ", "\t", "[", "-", ","]) {
    assert.throws(() => parseCpus(`${blank.repeat(LONG)}x`), UsageError);
  }
  const everything = parseCpus(`${"0-8191,".repeat(LONG)}3`);
  assert.strictEqual(everything.length, 8192, "each CPU once");
  assert.deepStrictEqual(parseCpus("3,1-2,2-3,1"), [1, 2, 3]);
});

test("parseSize and parseInteger take no longer for many digits", { timeout: 10_000 }, () => {
  for (const text of ["1".repeat(LONG * 10), `0.${"1".repeat(LONG * 10)}K`, "1".repeat(101)]) {
    assert.throws(() => parseSize(text, "Size"), UsageError);
    assert.throws(() => parseInteger(text, "Depth"), UsageError);
  }
});

test("oneDeviceId wants a device, once", () => {
  assert.strictEqual(oneDeviceId("recover", 3), 3);
  assert.strictEqual(oneDeviceId("recover", undefined, 0), 0);
  assert.throws(() => oneDeviceId("recover", undefined), /^UsageError: Which device\? ubd recover/);
  assert.throws(() => oneDeviceId("recover", 1, 1), /once/);
});
