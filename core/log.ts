// SPDX-License-Identifier: MIT
/**
 * What the queues of a device tell the operator. It may be as much as there are requests, and goes
 * where other logs go too, so it is limited; and it may go to a function of the user, so nothing
 * that one does reaches the queue.
 * @module
 */

/** Takes one text, of any number of lines. */
export type Log = (text: string) => void;

/** Texts of so many kinds are told apart. */
const KINDS_MAX = 1000;
/** Of a text, so much makes its kind. */
const KIND_LENGTH = 1000;
/** So many texts at once, then one a minute. */
const BURST = 32;
const REFILL_MS = 60_000;

/** Whatever the log throws or rejects with is dropped: nobody is left who could be told. */
export function harmless(log: Log): Log {
  return (text) => {
    try {
      Promise.resolve(log(text) as unknown).catch(() => {});
    } catch { /* see above */ }
  };
}

/**
 * Of texts that differ in numbers only (an offset, a count) it tells the first, the tenth, the
 * hundredth and so on; of all texts no more than a few at once, and how many it has left out.
 */
export function limited(log: Log, now: () => number = () => performance.now()): Log {
  const kinds = new Map<string, number>();
  let tokens = BURST;
  let filled = now();
  let omitted = 0;
  return harmless((any) => {
    const text = String(any);
    const kind = text.slice(0, KIND_LENGTH).replaceAll(/\w*\d\w*/g, "#");
    if (kinds.size >= KINDS_MAX && !kinds.has(kind)) kinds.clear();
    const count = (kinds.get(kind) ?? 0) + 1;
    kinds.set(kind, count);
    if (!/^10*$/.test(`${count}`)) return;
    const more = Math.floor((now() - filled) / REFILL_MS);
    tokens = Math.min(BURST, tokens + more);
    filled += more * REFILL_MS;
    if (tokens === 0) return void omitted++;
    tokens--;
    const repeated = count > 1 ? [`number ${count} of its kind`] : [];
    const left = omitted > 0 ? [`${omitted} other messages were left out`] : [];
    omitted = 0;
    const notes = [...repeated, ...left].join("; ");
    return log(notes ? `${text} (${notes})` : text);
  });
}
