// SPDX-License-Identifier: MIT
/**
 * The struct codec: bytes of a C struct from a layout table, and back.
 *
 * Owns `Layout`, `pack` and `unpack`; every other file of abi/ only fills in tables. Set-up and
 * control paths use it; the data path reads its words in place and never comes here.
 *
 * Invariants: little endian; a field that is not given is zero; nothing is truncated silently (a
 * value that does not fit is a RangeError naming struct and field). Two fields at one offset are a
 * C union: `unpack` returns both names, `pack` refuses two different values for the same bytes.
 * Padding that the compiler adds (ublk_params has one hole) is in no table and is written as zero.
 */

/** C scalar types of the kernel headers. */
export type FieldType = "u8" | "u16" | "u32" | "s32" | "u64";

/** A scalar, or an array of `count` scalars, at a byte offset. */
export interface ScalarField {
  readonly offset: number;
  readonly type: FieldType;
  readonly count?: number;
}

/** A struct embedded in another, at a byte offset. */
export interface StructField {
  readonly offset: number;
  readonly struct: Layout;
}

export type Field = ScalarField | StructField;

/** One C struct: its kernel name, its size in bytes, and where each field lies. */
export interface Layout {
  readonly name: string;
  readonly size: number;
  readonly fields: Readonly<Record<string, Field>>;
}

type Scalar<T> = T extends "u64" ? bigint : number;
type Packable<T> = T extends "u64" ? bigint | number : number;

/** What `unpack` returns: u64 as bigint, other scalars as number, `count` as an array. */
export type Unpacked<L extends Layout> = {
  -readonly [K in keyof L["fields"]]: L["fields"][K] extends { readonly struct: infer S }
    ? S extends Layout ? Unpacked<S> : never
    : L["fields"][K] extends { readonly type: infer T; readonly count: number } ? Scalar<T>[]
    : L["fields"][K] extends { readonly type: infer T } ? Scalar<T>
    : never;
};

/** What `pack` accepts: any subset; u64 also as an exact number; arrays may be shorter. */
export type Values<L extends Layout> = {
  readonly [K in keyof L["fields"]]?: L["fields"][K] extends { readonly struct: infer S }
    ? (S extends Layout ? Values<S> : never) | undefined
    : L["fields"][K] extends { readonly type: infer T; readonly count: number }
      ? readonly Packable<T>[] | undefined
    : L["fields"][K] extends { readonly type: infer T } ? Packable<T> | undefined
    : never;
};

const SIZES = { u8: 1, u16: 2, u32: 4, s32: 4, u64: 8 } as const;
const RANGES = {
  u8: [0n, 0xffn],
  u16: [0n, 0xffffn],
  u32: [0n, 0xffff_ffffn],
  s32: [-0x8000_0000n, 0x7fff_ffffn],
  u64: [0n, 0xffff_ffff_ffff_ffffn],
} as const;

/** Bytes one field takes. */
export function fieldBytes(field: Field): number {
  return "struct" in field ? field.struct.size : SIZES[field.type] * (field.count ?? 1);
}

/**
 * Bytes of a struct.
 *
 * @throws {RangeError} an unknown field, a value that is no integer or does not fit its type, an
 * array longer than its field, or two different values for one union.
 */
export function pack<const L extends Layout>(
  layout: L,
  values: Values<L>,
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(layout.size);
  packInto(layout, values, bytes, new Uint8Array(layout.size), 0, layout.name);
  return bytes;
}

function packInto(
  layout: Layout,
  values: object,
  bytes: Uint8Array<ArrayBuffer>,
  written: Uint8Array,
  base: number,
  path: string,
): void {
  for (const [name, value] of Object.entries(values)) {
    if (value === undefined) continue;
    const where = `${path}.${name}`;
    const field = Object.hasOwn(layout.fields, name) ? layout.fields[name] : undefined;
    if (field === undefined) throw new RangeError(`Cannot pack ${where}: no such field`);
    const at = base + field.offset;
    if ("struct" in field) {
      if (typeof value !== "object" || value === null) {
        throw new RangeError(`Cannot pack ${where}: not an object`);
      }
      packInto(field.struct, value, bytes, written, at, where);
      continue;
    }
    if (Array.isArray(value) !== (field.count !== undefined)) {
      throw new RangeError(
        `Cannot pack ${where}: ${field.count ? "an array is needed" : "not an array"}`,
      );
    }
    const items: unknown[] = Array.isArray(value) ? value : [value];
    if (items.length > (field.count ?? 1)) {
      throw new RangeError(`Cannot pack ${where}: ${items.length} values for ${field.count}`);
    }
    items.forEach((item, index) => {
      putScalar(bytes, written, at + index * SIZES[field.type], field.type, item, where);
    });
  }
}

function putScalar(
  bytes: Uint8Array<ArrayBuffer>,
  written: Uint8Array,
  at: number,
  type: FieldType,
  value: unknown,
  where: string,
): void {
  if (typeof value !== "bigint" && !Number.isSafeInteger(value)) {
    throw new RangeError(`Cannot pack ${where}: ${String(value)} is not an exact integer`);
  }
  const wanted = BigInt(value as bigint | number);
  const [low, high] = RANGES[type];
  if (wanted < low || wanted > high) {
    throw new RangeError(`Cannot pack ${where}: ${wanted} does not fit ${type}`);
  }
  let rest = BigInt.asUintN(64, wanted);
  for (let i = at; i < at + SIZES[type]; i++, rest >>= 8n) {
    const byte = Number(rest & 0xffn);
    if (written[i] === 1 && bytes[i] !== byte) {
      throw new RangeError(`Cannot pack ${where}: another field of the union has another value`);
    }
    bytes[i] = byte;
    written[i] = 1;
  }
}

/**
 * Fields of a struct. Bytes after the struct's size are ignored.
 *
 * @throws {RangeError} fewer bytes than the struct has.
 */
export function unpack<const L extends Layout>(layout: L, bytes: Uint8Array): Unpacked<L> {
  if (bytes.byteLength < layout.size) {
    throw new RangeError(
      `Cannot unpack ${layout.name}: ${layout.size} bytes are needed, not ${bytes.byteLength}`,
    );
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, layout.size);
  return unpackAt(layout, view, 0) as Unpacked<L>;
}

function unpackAt(layout: Layout, view: DataView, base: number): Record<string, unknown> {
  const values: Record<string, unknown> = {};
  for (const [name, field] of Object.entries(layout.fields)) {
    const at = base + field.offset;
    if ("struct" in field) {
      values[name] = unpackAt(field.struct, view, at);
    } else if (field.count === undefined) {
      values[name] = getScalar(view, at, field.type);
    } else {
      values[name] = Array.from(
        { length: field.count },
        (_, index) => getScalar(view, at + index * SIZES[field.type], field.type),
      );
    }
  }
  return values;
}

function getScalar(view: DataView, at: number, type: FieldType): number | bigint {
  switch (type) {
    case "u8":
      return view.getUint8(at);
    case "u16":
      return view.getUint16(at, true);
    case "u32":
      return view.getUint32(at, true);
    case "s32":
      return view.getInt32(at, true);
    case "u64":
      return view.getBigUint64(at, true);
  }
}
