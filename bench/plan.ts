// SPDX-License-Identifier: MIT
/**
 * What is measured, and the words that bench.ts on the host and guest.ts in the guest exchange:
 * a `Plan` goes in, a `Report` comes out, both as JSON in the shared directory /results.
 */

/** A kind of load: one fio job, or several alike. */
export interface Case {
  name: string;
  /** As fio calls it. */
  pattern: "randread" | "randwrite" | "randrw" | "read" | "write" | "rw";
  blockBytes: number;
  /** Requests in flight, of each job. */
  depth: number;
  /** 1 unless given. */
  jobs?: number;
}

/** Contenders of one group get the same cases, in turn. */
export interface Group {
  /** Unique, and the heading of its tables. */
  name: string;
  target: "null" | "loop";
  queues: number;
  cases: readonly Case[];
  /** Who takes part; everybody unless given. */
  contenders?: readonly string[];
}

/** One competitor in one group. */
export interface Contender {
  /** Name of the group. */
  group: string;
  name: string;
}

/** Programs that bench.ts puts into the shared directory, if it can have them. */
export const GUESTS_PROGRAMS = ["kublk", "rublk", "qemu-nbd"] as const;
export type GuestsProgram = typeof GUESTS_PROGRAMS[number];

const random = (pattern: Case["pattern"], what: string, depth: number, jobs = 1): Case => ({
  name: `4k random ${what}, QD ${depth}${jobs > 1 ? ` x ${jobs} jobs` : ""}`,
  pattern,
  blockBytes: 4096,
  depth,
  jobs,
});
const sequential = (pattern: "read" | "write", size: string, blockBytes: number): Case => ({
  name: `${size} sequential ${pattern}, QD 16`,
  pattern,
  blockBytes,
  depth: 16,
});

const READ_64 = random("randread", "read", 64);
const WRITE_64 = random("randwrite", "write", 64);
const READ_1 = random("randread", "read", 1);
const READ_128K = sequential("read", "128k", 128 * 1024);
const READ_1M = sequential("read", "1M", 1024 * 1024);

const CASES = [READ_64, WRITE_64, READ_1, READ_128K, READ_1M];
const ALL_CASES = [
  ...CASES,
  random("randrw", "mixed", 64),
  random("randwrite", "write", 1),
  random("randrw", "mixed", 1),
  sequential("write", "128k", 128 * 1024),
  sequential("write", "1M", 1024 * 1024),
];
const CASES_TWO_QUEUES = [random("randread", "read", 64, 2), random("randwrite", "write", 64, 2)];

export interface Plan {
  /** The queue loop without a driver, on the host: depths. */
  ringDepths: readonly number[];
  groups: readonly Group[];
  /** How often each measurement is made, in turn. */
  repeats: number;
  /** Of each measurement, without the ramp. */
  seconds: number;
  rampSeconds: number;
  /** Seconds are thousand millions of instructions, and the loop's files are in memory. */
  instructionClock?: boolean;
  /** Of small requests on each server before its first measurement. */
  warmUpSeconds: number;
  /** Size of the file behind each loop device. */
  fileMiB: number;
  /** Numbers of ubd's devices that exist at once and are left alone; of the others', one. */
  idleDevices: readonly number[];
  idleSeconds: number;
  /** How often each start is timed. */
  starts: number;
  guestMemoryMiB: number;
  /** Programs to be had besides the guest's own. */
  programs: readonly GuestsProgram[];
}

const DEFAULT: Plan = {
  ringDepths: [1, 8, 64],
  groups: [
    { name: "null", target: "null", queues: 1, cases: CASES },
    { name: "loop", target: "loop", queues: 1, cases: CASES },
  ],
  repeats: 3,
  seconds: 1,
  rampSeconds: 0.3,
  warmUpSeconds: 14,
  fileMiB: 512,
  idleDevices: [1, 16],
  idleSeconds: 60,
  starts: 3,
  guestMemoryMiB: 4096,
  programs: GUESTS_PROGRAMS,
};

export const PRESETS = {
  /** Shows that all of it runs: part of `npm test`. */
  quick: {
    ...DEFAULT,
    ringDepths: [64],
    groups: [
      {
        name: "null",
        target: "null",
        queues: 1,
        cases: [READ_64],
        contenders: ["ubd", "kublk", "null_blk"],
      },
      {
        name: "loop",
        target: "loop",
        queues: 1,
        cases: [READ_64, READ_128K],
        contenders: ["ubd", "kernel, direct"],
      },
    ],
    repeats: 1,
    seconds: 1,
    rampSeconds: 0,
    warmUpSeconds: 0,
    fileMiB: 64,
    idleDevices: [1],
    idleSeconds: 1,
    starts: 1,
    programs: ["kublk"],
  },
  instructions: {
    ...DEFAULT,
    ringDepths: [],
    groups: (["null", "loop"] as const).map((target) => ({
      name: target,
      target,
      queues: 1,
      cases: [READ_64, WRITE_64, READ_128K, READ_1M],
    })),
    instructionClock: true,
    repeats: 2,
    seconds: 0.5,
    rampSeconds: 0,
    warmUpSeconds: 6,
    fileMiB: 64,
    idleDevices: [],
    starts: 0,
    programs: ["kublk", "rublk"],
  },
  default: DEFAULT,
  full: {
    ...DEFAULT,
    groups: [
      { name: "null", target: "null", queues: 1, cases: ALL_CASES },
      { name: "loop", target: "loop", queues: 1, cases: ALL_CASES },
      { name: "null, 2 queues", target: "null", queues: 2, cases: CASES_TWO_QUEUES },
      { name: "loop, 2 queues", target: "loop", queues: 2, cases: CASES_TWO_QUEUES },
    ],
    repeats: 5,
    seconds: 4,
    rampSeconds: 1,
    warmUpSeconds: 10,
    fileMiB: 512,
    idleDevices: [1, 16, 64],
    idleSeconds: 60,
    starts: 5,
    guestMemoryMiB: 6144,
  },
} as const satisfies Record<string, Plan>;

/** What ratios are made against. */
export const YARDSTICK = "kublk";

/** The group that bench.ts measures on the host, and its yardstick. */
export const RING_GROUP = "ring";
export const RING_YARDSTICK = "C and liburing";
export const ringCase = (depth: number) => `queue loop without a driver, depth ${depth}`;

/** How long idle devices are left alone before they are measured. */
export const settleSeconds = ({ idleSeconds }: Plan) => Math.min(40, idleSeconds);

/** Measurements of the ring are short and many: there is no disk and no scheduler in them. */
export const ringRepeats = ({ repeats }: Plan) => 2 * repeats;
export const ringSeconds = ({ seconds }: Plan) => seconds / 4;

/** In the directory that both sides see. */
export const PLAN_FILE = "plan.json";
export const REPORT_FILE = "report.json";

/** One run of fio on one device, or of the loop without one. */
export interface Measurement extends Contender {
  case: string;
  /** 0 for the first. */
  repeat: number;
  iops: number;
  bytesPerSecond: number;
  /** Null where there is no caller who waits. */
  latencyP50Us: number | null;
  latencyP99Us: number | null;
  /** What the server process used for each of fio's; null when the kernel serves by itself. */
  serverCpuUs: number | null;
  /** The driver splits what is larger; null without a driver. */
  requestKiBMax: number | null;
}

/** Servers that have nothing to do. */
export interface Idle {
  name: string;
  /** How many there are at once. */
  devices: number;
  /** Processor time of all of them, for each second that passed. */
  cpuMsPerSecond: number;
  /** Resident memory of one, in MiB: all of it, and with shared pages divided among their users. */
  rssMiB: number;
  pssMiB: number;
}

/** How long it takes to make a device, in ms since the program was called. */
export interface Start {
  name: string;
  repeat: number;
  steps: Record<string, number>;
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
  idle: Idle[];
  starts: Start[];
  /** Who could not take part, and why: no failure. */
  absent: Failure[];
  failures: Failure[];
}

/**
 * Every repeat starts with another contender and goes on in other steps: none is always first, and
 * none always comes after the same one, which may leave it a cold cache or a warm disk.
 */
export function inTurn<T>(items: readonly T[], repeat: number): T[] {
  const count = items.length;
  const steps = items.map((_, index) => index + 1).filter((step) => divisor(step, count) === 1);
  const step = steps[repeat % steps.length]!;
  return items.map((_, index) => items[(repeat + index * step) % count]!);
}

function divisor(a: number, b: number): number {
  return b === 0 ? a : divisor(b, a % b);
}
