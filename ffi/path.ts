// SPDX-License-Identifier: MIT
/**
 * File names as strings. To the kernel they are bytes, mostly UTF-8 but not always: a byte that is
 * no part of a character stands as a character of private use here, U+10FF80 to U+10FFFF, and so do
 * the bytes of these characters themselves. No two names become one, and each finds its file again.
 * Lone surrogates would not last: Bun's node:path replaces them.
 * @module
 */

const STRAY = 0x10ff00;
const STRAYS = /[\u{10ff80}-\u{10ffff}]/u;

/** The path as bytes, with NUL at its end. */
export function pathBytes(path: string): Uint8Array<ArrayBuffer> {
  const encoder = new TextEncoder();
  if (!STRAYS.test(path)) return encoder.encode(`${path}\0`);
  return Uint8Array.from(
    [...path, "\0"].flatMap((character) =>
      STRAYS.test(character) ? [character.codePointAt(0)! - STRAY] : [...encoder.encode(character)]
    ),
  );
}

/** @param bytes without NUL. */
export function pathOf(bytes: Uint8Array): string {
  const whole = decode(bytes);
  if (whole !== undefined) return whole;
  let path = "";
  for (let at = 0; at < bytes.length;) {
    const byte = bytes[at]!;
    const length = byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
    const character = decode(bytes.subarray(at, at + length));
    path += character ?? String.fromCodePoint(STRAY + byte);
    at += character === undefined ? 1 : length;
  }
  return path;
}

/** @returns undefined: it is no UTF-8, or has characters that stand for bytes. */
function decode(bytes: Uint8Array): string | undefined {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return STRAYS.test(text) ? undefined : text;
  } catch {
    return undefined;
  }
}

/** For people: what stands for a byte as \xE9. */
export function shownPath(path: string): string {
  return path.replace(
    /[\u{10ff80}-\u{10ffff}]/gu,
    (character) => `\\x${(character.codePointAt(0)! - STRAY).toString(16).toUpperCase()}`,
  );
}
