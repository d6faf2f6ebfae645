// SPDX-License-Identifier: MIT
/** Medians, and how one contender compares with another. Used by table.ts, targets.ts, chart.ts. */
import type { Measurement } from "./plan.ts";

/** The middle value; of an even number, the mean of the two in the middle. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

export interface Ratio {
  median: number;
  min: number;
  max: number;
}

/**
 * How `own` compares with `other` in `of`, from the ratios within each repeat, where both had about
 * the same share of the machine. Undefined when they never met.
 */
export function ratio(
  own: readonly Measurement[],
  other: readonly Measurement[],
  of: (it: Measurement) => number | null,
): Ratio | undefined {
  // Of logarithms, for twice and half as fast must weigh the same.
  const logs = own.flatMap((mine) => {
    const theirs = other.find(({ repeat }) => repeat === mine.repeat);
    const values = [of(mine), theirs ? of(theirs) : null];
    return values[0] && values[1] ? [Math.log(values[0] / values[1])] : [];
  });
  if (logs.length === 0) return undefined;
  return {
    median: Math.exp(median(logs)),
    min: Math.exp(Math.min(...logs)),
    max: Math.exp(Math.max(...logs)),
  };
}

/** One contender's measurements of one case. */
export function pick(
  measurements: readonly Measurement[],
  group: string,
  load: string,
  name?: string,
): Measurement[] {
  return measurements.filter((it) =>
    it.group === group && it.case === load && (name === undefined || it.name === name)
  );
}

/** Without repetitions, in the order of their first appearance. */
export function distinct(values: readonly string[]): string[] {
  return [...new Set(values)];
}
