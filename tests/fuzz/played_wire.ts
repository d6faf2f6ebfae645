// SPDX-License-Identifier: MIT
/** Values between a played driver and its processes: JSON with bigints, one a line. */

export function toText(value: unknown): string {
  const encode = (_: string, one: unknown) => typeof one === "bigint" ? { bigint: `${one}` } : one;
  return `${JSON.stringify(value, encode)}\n`;
}

export function fromText(text: string): unknown {
  return JSON.parse(text, (_, one) => typeof one?.bigint === "string" ? BigInt(one.bigint) : one);
}
