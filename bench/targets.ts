// SPDX-License-Identifier: MIT
/**
 * What ubd is meant to reach against the others, and whether it did. Targets of what was not
 * measured are left out.
 */
import { type Measurement, type Report, RING_GROUP, RING_YARDSTICK, ringCase } from "./plan.ts";
import { pick, type Ratio, ratio } from "./statistics.ts";

export interface Verdict {
  what: string;
  measured: string;
  target: string;
  met: boolean;
}

const THROUGHPUT = (it: Measurement) => it.iops;
const LATENCY = (it: Measurement) => it.latencyP50Us;
const SERVER_CPU = (it: Measurement) => it.serverCpuUs;

const READ_64 = "4k random read, QD 64";
const WRITE_64 = "4k random write, QD 64";
const READ_1 = "4k random read, QD 1";

/** Those who do as `ubd` does where it copies nothing, and where it does. */
const ZERO_COPY = ["kublk, zero copy", "rublk, zero copy"];
const COPYING = ["kublk", "rublk"];

interface Target {
  group: string;
  cases: readonly string[];
  /** ubd in this form ... */
  own: string;
  /** ... against each of these. */
  others: readonly string[];
  what: string;
  of: (it: Measurement) => number | null;
  atLeast?: number;
  atMost?: number;
}

const TARGETS: readonly Target[] = [
  {
    group: "null",
    cases: [READ_64],
    own: "ubd",
    others: ["kublk", "rublk"],
    what: "IOPS",
    of: THROUGHPUT,
    atLeast: 1,
  },
  ...([
    ["null", [READ_64], "ubd, zero copy", ZERO_COPY],
    ["loop", [READ_64, WRITE_64], "ubd", ZERO_COPY],
    ["loop", [READ_64, WRITE_64], "ubd, copying", COPYING],
  ] as const).map(([group, cases, own, others]) => ({
    ...{ group, cases, own, others },
    what: "IOPS",
    of: THROUGHPUT,
    atLeast: 1,
  })),
  {
    group: "loop",
    cases: [READ_64, WRITE_64],
    own: "ubd",
    others: ["kublk", "rublk", "kernel, direct"],
    what: "IOPS",
    of: THROUGHPUT,
    atLeast: 1,
  },
  {
    group: "loop",
    cases: ["128k sequential read, QD 16", "1M sequential read, QD 16"],
    own: "ubd",
    others: ["kublk", "rublk"],
    what: "throughput",
    of: THROUGHPUT,
    atLeast: 1.2,
  },
  ...([["ubd", ZERO_COPY], ["ubd, copying", COPYING]] as const).map(([own, others]) => ({
    group: "loop",
    cases: ["128k sequential read, QD 16", "1M sequential read, QD 16"],
    own,
    others,
    what: "throughput",
    of: THROUGHPUT,
    atLeast: 1,
  })),
  ...["null", "loop"].flatMap((group): Target[] => [
    {
      group,
      cases: [READ_1],
      own: "ubd",
      others: ["kublk"],
      what: "p50",
      of: LATENCY,
      atMost: 1.1,
    },
    {
      group,
      cases: [READ_64],
      own: "ubd",
      others: ["qemu-nbd"],
      what: "IOPS",
      of: THROUGHPUT,
      atLeast: 2,
    },
    {
      group,
      cases: [READ_64],
      own: "ubd",
      others: ["kublk"],
      what: "server CPU per I/O",
      of: SERVER_CPU,
      atMost: 1.25,
    },
  ]),
  ...["executable", "Bun"].map((own): Target => ({
    group: RING_GROUP,
    cases: [1, 8, 64].map(ringCase),
    own,
    others: [RING_YARDSTICK],
    what: "operations",
    of: THROUGHPUT,
    atLeast: 0.9,
  })),
];

const PSS_MAX_MIB = 64;
/** Half a millisecond in a second, of an emulated processor: a timer of the runtime's, no work. */
const IDLE_CPU_MAX_PERCENT = 0.05;

function judge({ atLeast, atMost, ...target }: Target, found: Ratio, load: string, other: string) {
  const { group, own, what } = target;
  const text = (value: number) => value.toFixed(3); // 0.996 is not 1.
  return {
    what: `${group}, ${load}: ${what} of ${own} / ${other}`,
    measured: `${text(found.median)} (${text(found.min)} to ${text(found.max)})`,
    target: atLeast !== undefined ? `at least ${atLeast}` : `at most ${atMost}`,
    met: atLeast !== undefined ? found.median >= atLeast : found.median <= atMost!,
  };
}

/** Every target whose two sides were measured. */
export function verdicts(report: Report): Verdict[] {
  const all: Verdict[] = [];
  for (const target of TARGETS) {
    for (const load of target.cases) {
      for (const other of target.others) {
        const of = (name: string) => pick(report.measurements, target.group, load, name);
        const found = ratio(of(target.own), of(other), target.of);
        if (found) all.push(judge(target, found, load, other));
      }
    }
  }
  for (const { name, devices, cpuMsPerSecond, pssMiB } of report.idle) {
    if (!name.startsWith("ubd")) continue;
    const cpuPercent = cpuMsPerSecond / devices / 10;
    const what = `idle devices: ${devices} of ${name}`;
    all.push({
      what: `${what}, memory of one (PSS)`,
      measured: `${pssMiB.toFixed(1)} MiB`,
      target: `at most ${PSS_MAX_MIB} MiB`,
      met: pssMiB <= PSS_MAX_MIB,
    }, {
      what: `${what}, processor time of one`,
      measured: `${cpuPercent.toFixed(3)} %`,
      target: `at most ${IDLE_CPU_MAX_PERCENT} %`,
      met: cpuPercent <= IDLE_CPU_MAX_PERCENT,
    });
  }
  return all;
}
