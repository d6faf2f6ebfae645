// SPDX-License-Identifier: MIT
/**
 * The struct codec: round trips of arbitrary values through every layout of abi/, and each way
 * in which `pack` and `unpack` must refuse.
 *
 * Layouts are checked here for inner consistency only (fields inside the struct, aligned, apart
 * from unions not overlapping); abi_header_test.ts compares them with the kernel's headers.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import fc from "fast-check";
import * as ioUring from "../../abi/io_uring.ts";
import { type Field, fieldBytes, type Layout, pack, unpack } from "../../abi/struct.ts";
import * as ubd from "../../abi/ubd_v2.ts";
import * as ublk from "../../abi/ublk_cmd.ts";

const LAYOUTS = [ublk, ubd, ioUring].flatMap((module) => Object.values(module)).filter(
  (value): value is Layout =>
    typeof value === "object" && "name" in value && "size" in value && "fields" in value,
);

const SAMPLE = {
  name: "sample",
  size: 32,
  fields: {
    byte: { offset: 0, type: "u8" },
    half: { offset: 2, type: "u16" },
    word: { offset: 4, type: "u32" },
    sign: { offset: 8, type: "s32" },
    pair: { offset: 12, type: "u16", count: 2 },
    long: { offset: 16, type: "u64" },
    alias: { offset: 16, type: "u64" },
    inner: {
      offset: 24,
      struct: { name: "inner", size: 8, fields: { low: { offset: 4, type: "u32" } } },
    },
  },
} as const satisfies Layout;

const LIMITS = {
  u8: [0n, 255n],
  u16: [0n, 65535n],
  u32: [0n, 4294967295n],
  s32: [-2147483648n, 2147483647n],
  u64: [0n, 18446744073709551615n],
} as const;

function arbitraryField(field: Field): fc.Arbitrary<unknown> {
  if ("struct" in field) return arbitraryValues(field.struct);
  const [min, max] = LIMITS[field.type];
  const scalar = fc.bigInt({ min, max }).map((n) => field.type === "u64" ? n : Number(n));
  return field.count === undefined
    ? scalar
    : fc.array(scalar, { minLength: field.count, maxLength: field.count });
}

/** Values of all fields, without those that share their first byte with an earlier one. */
function arbitraryValues(layout: Layout): fc.Arbitrary<Record<string, unknown>> {
  const seen = new Set<number>();
  const fields = Object.entries(layout.fields).filter(([_, { offset }]) =>
    !seen.has(offset) && seen.add(offset)
  );
  const arbitraries = fields.map(([name, field]) => [name, arbitraryField(field)]);
  return fc.record(Object.fromEntries(arbitraries), { noNullPrototype: true });
}

function pick(values: object, like: object): unknown {
  return Object.fromEntries(
    Object.entries(like).map(([name, part]) => {
      const value = (values as Record<string, unknown>)[name];
      const isStruct = typeof part === "object" && !Array.isArray(part);
      return [name, isStruct ? pick(value as object, part as object) : value];
    }),
  );
}

test("abi has the layouts this file is about", () => {
  assert.equal(LAYOUTS.length, 16 + 4 + 5);
  assert.equal(new Set(LAYOUTS.map(({ name }) => name)).size, LAYOUTS.length);
});

for (const layout of LAYOUTS) {
  test(`${layout.name}: unpack returns what pack was given`, () => {
    fc.assert(fc.property(arbitraryValues(layout), (values) => {
      const bytes = pack(layout, values as Record<string, never>);
      assert.equal(bytes.length, layout.size);
      assert.deepEqual(pick(unpack(layout, bytes), values), values);
      // Unions come back under both names, with one value, so this is accepted.
      assert.deepEqual(pack(layout, unpack(layout, bytes) as Record<string, never>), bytes);
    }));
  });

  test(`${layout.name}: fields lie inside, aligned, and overlap only as unions`, () => {
    const fields = Object.entries(layout.fields);
    for (const [name, field] of fields) {
      const align = "struct" in field ? 4 : fieldBytes({ ...field, count: 1 } as Field);
      assert.equal(field.offset % align, 0, name);
      assert.ok(field.offset + fieldBytes(field) <= layout.size, name);
      for (const [other, { offset }] of fields) {
        const inside = offset > field.offset && offset < field.offset + fieldBytes(field);
        assert.ok(!inside, `${other} inside ${name}`);
      }
    }
  });
}

test("pack writes little endian at the offsets and zero elsewhere", () => {
  const bytes = pack(SAMPLE, {
    byte: 0x11,
    half: 0x2233,
    word: 0x44556677,
    sign: -2,
    pair: [0x8899],
    long: 0xaabbccddeeff0102n,
    inner: { low: 0x03040506 },
  });
  const hex = "11003322" + "77665544" + "feffffff" + "99880000" + "0201ffeeddccbbaa" +
    "0000000006050403";
  assert.equal(Buffer.from(bytes).toString("hex"), hex);
});

test("unpack types u64 as bigint and the rest as number", () => {
  const values = unpack(SAMPLE, new Uint8Array(32).fill(0xff));
  const word: number = values.word;
  const long: bigint = values.long;
  const pair: number[] = values.pair;
  const low: number = values.inner.low;
  assert.deepEqual([word, long, pair, low, values.sign], [
    0xffffffff,
    0xffffffffffffffffn,
    [0xffff, 0xffff],
    0xffffffff,
    -1,
  ]);
});

test("unpack reads a view that does not start at its buffer's first byte", () => {
  const buffer = new Uint8Array(40);
  buffer[5 + 4] = 7;
  assert.equal(unpack(SAMPLE, buffer.subarray(5)).word, 7);
});

test("pack takes an exact number for u64", () => {
  assert.equal(unpack(SAMPLE, pack(SAMPLE, { long: 2 ** 53 - 1 })).long, 2n ** 53n - 1n);
});

test("pack accepts the limits of each type and refuses the numbers beyond", () => {
  for (const [type, [low, high]] of Object.entries(LIMITS)) {
    const layout = {
      name: "one",
      size: 8,
      fields: { it: { offset: 0, type: type as "u64" } },
    };
    for (const fits of [low, high]) {
      assert.equal(BigInt(unpack(layout, pack(layout, { it: fits })).it), fits, type);
    }
    for (const beyond of [low - 1n, high + 1n]) {
      const message = `Cannot pack one.it: ${beyond} does not fit ${type}`;
      assert.throws(() => pack(layout, { it: beyond }), { name: "RangeError", message });
    }
  }
});

test("pack refuses what is no exact integer", () => {
  for (const it of [1.5, Number.NaN, Infinity, 2 ** 53, "1", null, true, {}]) {
    assert.throws(() => pack(SAMPLE, { long: it as number }), {
      name: "RangeError",
      message: /^Cannot pack sample\.long: .* is not an exact integer$/,
    });
  }
});

test("pack refuses unknown fields, also inside a nested struct, and inherited names", () => {
  const cases: [object, RegExp][] = [
    [{ wrod: 1 }, /^Cannot pack sample\.wrod: no such field$/],
    [{ inner: { high: 1 } }, /^Cannot pack sample\.inner\.high: no such field$/],
    [{ toString: 1 }, /^Cannot pack sample\.toString: no such field$/],
  ];
  for (const [values, message] of cases) {
    assert.throws(() => pack(SAMPLE, values as { word: 1 }), { name: "RangeError", message });
  }
});

test("pack refuses a wrong shape", () => {
  const cases: [object, RegExp][] = [
    [{ pair: 1 }, /sample\.pair: an array is needed/],
    [{ pair: [1, 2, 3] }, /sample\.pair: 3 values for 2/],
    [{ word: [1] }, /sample\.word: not an array/],
    [{ inner: 1 }, /sample\.inner: not an object/],
    [{ inner: null }, /sample\.inner: not an object/],
  ];
  for (const [values, message] of cases) {
    assert.throws(() => pack(SAMPLE, values as { word: 1 }), { name: "RangeError", message });
  }
});

test("pack accepts one value under both names of a union and refuses two", () => {
  assert.equal(unpack(SAMPLE, pack(SAMPLE, { long: 5n, alias: 5n })).alias, 5n);
  assert.throws(() => pack(SAMPLE, { long: 5n, alias: 0n }), {
    name: "RangeError",
    message: /sample\.alias: another field of the union has another value/,
  });
});

test("pack ignores fields that are undefined", () => {
  assert.deepEqual(pack(SAMPLE, { word: undefined }), new Uint8Array(32));
});

test("unpack accepts the struct's size and refuses one byte less", () => {
  assert.equal(unpack(SAMPLE, new Uint8Array(32)).word, 0);
  assert.equal(unpack(SAMPLE, new Uint8Array(33)).word, 0);
  assert.throws(() => unpack(SAMPLE, new Uint8Array(31)), {
    name: "RangeError",
    message: "Cannot unpack sample: 32 bytes are needed, not 31",
  });
});
