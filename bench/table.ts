// SPDX-License-Identifier: MIT
/**
 * Prints a `Report` as Markdown: one table for each case and group, each number the median of the
 * repeats, with their range.
 */
import {
  type Measurement,
  type Plan,
  type Report,
  RING_GROUP,
  RING_YARDSTICK,
  ringRepeats,
  ringSeconds,
  YARDSTICK,
} from "./plan.ts";
import { distinct, median, pick, ratio } from "./statistics.ts";
import { verdicts } from "./targets.ts";

/** The one that ratios of a group are made against. */
export function yardstickOf(group: string): string {
  return group === RING_GROUP ? RING_YARDSTICK : YARDSTICK;
}

/** Rows of which the first is the head; the first column to the left, the others to the right. */
function table(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]!.map((_, column) => Math.max(3, ...rows.map((it) => it[column]!.length)));
  const line = (cells: readonly string[]) =>
    `| ${
      cells.map((cell, column) =>
        column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!)
      ).join(" | ")
    } |\n`;
  const rule = widths.map((width, column) =>
    column ? `${"-".repeat(width - 1)}:` : "-".repeat(width)
  );
  return [rows[0]!, rule, ...rows.slice(1)].map(line).join("");
}

const isLarge = ({ bytesPerSecond, iops }: Measurement) => bytesPerSecond / iops > 65536;

/** Large requests are judged by bytes. Bare numbers only: their unit is in the head. */
function throughputOf(own: readonly Measurement[]) {
  const [first] = own;
  if (first!.group === RING_GROUP) {
    return { unit: "per CPU second", of: (it: Measurement) => it.iops };
  }
  return isLarge(first!)
    ? { unit: "MiB/s", of: (it: Measurement) => it.bytesPerSecond / 1024 ** 2 }
    : { unit: "IOPS", of: (it: Measurement) => it.iops };
}

/** The median, to so many digits that a difference shows. */
function middle(values: readonly (number | null)[], digits: number): string {
  const known = values.filter((it) => it !== null);
  return known.length > 0 ? median(known).toFixed(digits) : "";
}

function row(own: Measurement[], yardstick: Measurement[]): string[] {
  const { of } = throughputOf(own);
  const values = own.map(of);
  const found = ratio(own, yardstick, (it) => it.iops);
  const isRing = own[0]!.group === RING_GROUP;
  return [
    own[0]!.name,
    middle(values, 0),
    `${Math.min(...values).toFixed(0)} to ${Math.max(...values).toFixed(0)}`,
    found ? found.median.toFixed(2) : "",
    found ? `${found.min.toFixed(2)} to ${found.max.toFixed(2)}` : "",
    middle(own.map((it) => it.serverCpuUs), isRing ? 3 : 1),
    middle(own.map((it) => it.latencyP50Us), 0),
    middle(own.map((it) => it.latencyP99Us), 0),
    middle(own.filter(isLarge).map((it) => it.requestKiBMax), 0),
  ];
}

function caseTable(measurements: Measurement[], group: string, load: string): string {
  const here = pick(measurements, group, load);
  const of = (name: string) => here.filter((it) => it.name === name);
  const yardstick = yardstickOf(group);
  const head = [
    "",
    throughputOf(here).unit,
    "range",
    `/ ${yardstick}`,
    "range",
    "CPU µs per I/O",
    "p50 µs",
    "p99 µs",
    "largest request, KiB",
  ];
  const rows = distinct(here.map(({ name }) => name)).map((it) => row(of(it), of(yardstick)));
  // Columns that hold nothing here go.
  const used = head.map((_, column) => rows.some((it) => it[column] !== ""));
  const keep = (cells: string[]) => cells.filter((_, column) => used[column]);
  return `### ${group}: ${load}\n\n${table([head, ...rows].map(keep))}\n`;
}

function verdictTable(report: Report): string {
  const rows = verdicts(report).map((
    it,
  ) => [it.what, it.measured, it.target, it.met ? "yes" : "no"]);
  return rows.length > 0
    ? `## Targets\n\n${table([["", "measured", "target", "met"], ...rows])}\n`
    : "";
}

function idleTable({ idle }: Report): string {
  const rows = idle.map((it) => [
    it.name,
    `${it.devices}`,
    it.pssMiB.toFixed(1),
    it.rssMiB.toFixed(1),
    (it.cpuMsPerSecond / it.devices / 10).toFixed(3),
  ]);
  if (rows.length === 0) return "";
  const head = ["", "devices", "PSS of one, MiB", "RSS of one, MiB", "CPU of one, %"];
  return `## Idle devices\n\n${table([head, ...rows])}\n`;
}

function startTable({ starts }: Report): string {
  if (starts.length === 0) return "";
  // Who has most steps has them in their order.
  const kinds = starts.map((it) => Object.keys(it.steps)).sort((a, b) => b.length - a.length);
  const steps = distinct(kinds.flat());
  const rows = distinct(starts.map(({ name }) => name)).sort().map((name) => [
    name,
    ...steps.map((step) =>
      middle(starts.filter((it) => it.name === name).map((it) => it.steps[step] ?? null), 0)
    ),
  ]);
  const head = ["", ...steps.map((it) => `${it}, ms`)];
  return `## Start\n\n${table([head, ...rows])}\n`;
}

/** Everything that was measured, as Markdown. */
export function formatReport(report: Report, plan: Plan, command: string): string {
  const groups = distinct(report.measurements.map(({ group }) => group));
  const facts = {
    "command": `\`${command}\``,
    ...report.versions,
    "repeats": `${plan.repeats} of ${plan.seconds} s each` +
      (groups.includes(RING_GROUP)
        ? `; of the ring ${ringRepeats(plan)} of ${ringSeconds(plan)} s`
        : ""),
  };
  const head = Object.entries(facts).map(([name, value]) => `- ${name}: ${value}\n`).join("");
  const cases = groups.flatMap((group) => {
    const loads = report.measurements.filter((it) => it.group === group).map((it) => it.case);
    return distinct(loads).map((load) => caseTable(report.measurements, group, load));
  });
  const list = (title: string, items: Report["failures"]) =>
    items.length === 0
      ? ""
      : `## ${title}\n\n${
        items.map((it) =>
          `- ${it.group}: ${it.name}${it.case ? `, ${it.case}` : ""}: \`${
            it.message.replaceAll(/\s+/g, " ").replaceAll("`", "'")
          }\`\n`
        ).join("")
      }\n`;
  return [
    `${head}\n`,
    list("Failures", report.failures),
    list("Absent", report.absent),
    verdictTable(report),
    startTable(report),
    idleTable(report),
    cases.length > 0 ? "## Throughput and latency\n\n" : "",
    ...cases,
  ].join("").trimEnd() + "\n";
}
