// SPDX-License-Identifier: MIT
/** Prints a `Report`: one table for each case and group, each number the median of the repeats. */
import { type Case, type Group, type Measurement, type Report, YARDSTICK } from "./plan.ts";

/** The middle value; of an even number, the mean of the two in the middle. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** IOPS, or MiB/s where requests are large. */
function throughputOf(load: Case): { unit: string; of: (it: Measurement) => number } {
  return load.blockBytes > 65536
    ? { unit: "MiB/s", of: (it) => it.bytesPerSecond / 1024 ** 2 }
    : { unit: "IOPS", of: (it) => it.iops };
}

/**
 * How a contender compares with the yardstick: "0.95x" and over which range, from the ratios
 * within each repeat, where both had about the same share of the machine.
 */
function ratiosTo(yardstick: Measurement[], own: Measurement[]): [string, string] {
  // Of logarithms, for twice and half as fast must weigh the same.
  const logs = own.flatMap((it) => {
    const other = yardstick.find(({ repeat }) => repeat === it.repeat);
    return other ? [Math.log(it.iops / other.iops)] : [];
  });
  if (logs.length === 0) return ["-", "-"];
  const text = (log: number) => Math.exp(log).toFixed(2);
  return [`${text(median(logs))}x`, `${text(Math.min(...logs))}..${text(Math.max(...logs))}`];
}

function row(load: Case, own: Measurement[], yardstick: Measurement[]): string[] {
  const { of } = throughputOf(load);
  const values = own.map(of);
  const cpu = own.flatMap(({ serverCpuUs }) => serverCpuUs === null ? [] : [serverCpuUs]);
  return [
    own[0]!.name,
    median(values).toFixed(0),
    `${Math.min(...values).toFixed(0)}..${Math.max(...values).toFixed(0)}`,
    ...ratiosTo(yardstick, own),
    cpu.length > 0 ? median(cpu).toFixed(1) : "-",
    median(own.map((it) => it.latencyP50Us)).toFixed(0),
    median(own.map((it) => it.latencyP99Us)).toFixed(0),
  ];
}

/** Lines with columns aligned: the first to the left, the others to the right. */
function align(rows: string[][]): string {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((it) => it[column]!.length)));
  return rows.map((cells) =>
    cells.map((cell, column) =>
      column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!)
    ).join("  ")
  ).join("\n");
}

function table(load: Case, group: Group, measurements: Measurement[]): string {
  const here = measurements.filter((it) => it.case === load.name && it.group === group);
  if (here.length === 0) return "";
  const names = [...new Set(here.map(({ name }) => name))].sort();
  const of = (name: string) => here.filter((it) => it.name === name);
  const header = [
    `${group}: ${load.name}`,
    ...[
      throughputOf(load).unit,
      "min..max",
      `vs ${YARDSTICK}`,
      "min..max",
      "CPU us/IO",
      "p50 us",
      "p99 us",
    ],
  ];
  return `${align([header, ...names.map((it) => row(load, of(it), of(YARDSTICK)))])}\n\n`;
}

/** Everything that was measured, as text. */
export function formatReport(report: Report, cases: readonly Case[], command: string): string {
  const facts = { command, ...report.versions };
  const width = Math.max(...Object.keys(facts).map((it) => it.length));
  const head = Object.entries(facts).map(([name, value]) => `${name.padEnd(width)}  ${value}\n`);
  const groups: Group[] = ["null", "loop"];
  const tables = groups.flatMap((group) =>
    cases.map((load) => table(load, group, report.measurements))
  );
  const failures = report.failures.map((it) =>
    `FAILED ${it.group}: ${it.name}${it.case ? `, ${it.case}` : ""}: ${it.message}\n`
  );
  return `${head.join("")}\n${tables.join("")}${failures.join("")}`;
}
