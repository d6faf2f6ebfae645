// SPDX-License-Identifier: MIT
/**
 * What is measured, and the words that bench.ts on the host and guest.ts in the guest exchange:
 * a `Plan` goes in, a `Report` comes out, both as JSON in the shared directory /results.
 */

/** A kind of load: one fio job. */
export interface Case {
  name: string;
  /** As fio calls it. */
  pattern: "randread" | "randwrite" | "randrw" | "read";
  blockBytes: number;
  /** Requests in flight. */
  depth: number;
}

/** Who is measured against whom: contenders of one group get the same cases. */
export type Group = "null" | "loop";

/** One competitor: something that makes a block device in the guest. */
export interface Contender {
  group: Group;
  name: string;
}

export const CASES: readonly Case[] = [
  { name: "4k random read, QD 64", pattern: "randread", blockBytes: 4096, depth: 64 },
  { name: "4k random read, QD 1", pattern: "randread", blockBytes: 4096, depth: 1 },
  { name: "4k random write, QD 64", pattern: "randwrite", blockBytes: 4096, depth: 64 },
  { name: "128k sequential read, QD 16", pattern: "read", blockBytes: 131072, depth: 16 },
];

/** Measured with `--quick`: one of small requests, one of large. */
export const QUICK_CASES: readonly Case[] = [CASES[0]!, CASES[3]!];

/** What ratios are made against. */
export const YARDSTICK = "kublk";

/** In the directory that both sides see. */
export const PLAN_FILE = "plan.json";
export const REPORT_FILE = "report.json";
export const KUBLK_FILE = "kublk";

export interface Plan {
  cases: readonly Case[];
  repeats: number;
  /** Of each measurement, without the ramp. */
  seconds: number;
  rampSeconds: number;
  /** Of load on each server before the first measurement. */
  warmUpSeconds: number;
  /** Size of the file behind each loop device. */
  fileMiB: number;
  hasKublk: boolean;
}

/** One run of fio on one device. */
export interface Measurement extends Contender {
  case: string;
  /** 0 for the first. */
  repeat: number;
  iops: number;
  bytesPerSecond: number;
  latencyP50Us: number;
  latencyP99Us: number;
  /** What the server process used for each request; null when the kernel serves by itself. */
  serverCpuUs: number | null;
}

export interface Failure extends Contender {
  /** The case that failed; absent when the device could not be made. */
  case?: string;
  message: string;
}

export interface Report {
  /** Names and versions of what took part, in the order to show them. */
  versions: Record<string, string>;
  measurements: Measurement[];
  failures: Failure[];
}
