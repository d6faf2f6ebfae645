// SPDX-License-Identifier: MIT
/**
 * Texts of others on their way to a terminal or a log: names of files, processes and mount points,
 * what modules throw and web servers answer. What moves a cursor, or turns the text around, must
 * not get there. In place of such a character stands \u and its four digits, as JSON has it: so
 * JSON stays JSON, with the same meaning.
 * @module
 */

import { shownPath } from "../ffi/path.ts";

// C0 but tab and newline, DEL and C1; line and paragraph separators; what changes the direction.
// deno-lint-ignore no-control-regex
const UNPRINTABLE = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

function escape(character: string): string {
  return `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
}

/** A whole text, of one line or several. */
export function printable(text: string): string {
  return text.replaceAll(UNPRINTABLE, escape);
}

/** A name within a line, for people: a newline would make it look like one more. */
export function oneLine(name: string): string {
  return printable(shownPath(name)).replaceAll(/[\t\n]/g, escape);
}

/** Longest text that is shown whole. */
const SHOWN_MAX = 2000;

/**
 * A message that echoes what it was given, however long that is. Its middle goes: what was wrong is
 * said at the beginning, what to do at the end.
 */
export function shorten(text: string): string {
  if (text.length <= SHOWN_MAX) return text;
  const [head, tail] = [text.slice(0, SHOWN_MAX / 2), text.slice(-SHOWN_MAX / 4)];
  const left = text.length - head.length - tail.length;
  return `${head} [... ${left} more characters ...] ${tail}`.toWellFormed();
}
