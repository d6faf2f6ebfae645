// SPDX-License-Identifier: MIT
/** Lines in columns, for people at a terminal. @module */

import { oneLine } from "../core/text.ts";

/** At least so much of the last column is shown, however narrow the terminal. */
const LAST_COLUMN_MIN = 16;

/**
 * Each column is as wide as it must be; the last one has what is left of `width`, and what does not
 * fit there loses its middle: of a path, both ends tell more.
 *
 * @param width of the terminal, in characters.
 */
export function formatTable(rows: readonly (readonly string[])[], width: number): string {
  const cells = rows.map((row) => row.map(oneLine));
  const last = Math.max(...cells.map((row) => row.length)) - 1;
  const widths = Array.from(
    { length: last },
    (_, column) => Math.max(...cells.map((row) => [...row[column] ?? ""].length)) + 2,
  );
  const left = width - widths.reduce((sum, one) => sum + one, 0);
  return cells.map((row) => {
    const padded = row.slice(0, last).map((cell, column) =>
      cell + " ".repeat(widths[column]! - [...cell].length)
    );
    const end = shorten(row[last] ?? "", Math.max(left, LAST_COLUMN_MIN));
    return `${[...padded, end].join("").trimEnd()}\n`;
  }).join("");
}

function shorten(text: string, length: number): string {
  const characters = [...text];
  if (characters.length <= length) return text;
  const tail = Math.ceil((length - 1) * 2 / 3);
  return `${characters.slice(0, length - 1 - tail).join("")}…${characters.slice(-tail).join("")}`;
}
