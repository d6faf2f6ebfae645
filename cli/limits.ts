// SPDX-License-Identifier: MIT
/**
 * What a server inherits from its caller's shell and cannot serve with: resource limits. Root sets
 * them as they are without a shell; others get what is allowed, and the device's notes tell the
 * rest in words. What else is inherited is either set anew (umask, working directory, signals,
 * oom_score_adj), or is a wish to be obeyed (nice, CPUs, cgroup).
 * @module
 */

import { contents } from "../core/proc.ts";
import type { Shim } from "../ffi/mod.ts";

interface Limit {
  /** RLIMIT_*. */
  resource: number;
  /** As /proc/PID/limits calls it. */
  name: string;
  option: string;
  /** What it does to a server. */
  effect: string;
}

const LIMITS: readonly Limit[] = [
  { resource: 0, name: "Max cpu time", option: "-t", effect: "the server is killed after that" },
  { resource: 1, name: "Max file size", option: "-f", effect: "writes beyond that fail (EFBIG)" },
  { resource: 2, name: "Max data size", option: "-d", effect: "the server may lack memory" },
  { resource: 6, name: "Max processes", option: "-u", effect: "the server may lack threads" },
  { resource: 9, name: "Max address space", option: "-v", effect: "the server may lack memory" },
];

/** Raises this process's limits as far as it may. @returns sets them again as they were. */
export function raiseLimits({ native }: Shim): () => void {
  const undo = LIMITS.map(({ resource }) => {
    const before = new BigUint64Array(2);
    return native.ubd_raise_limit(resource, before) < 0
      ? () => {}
      : () => void native.ubd_set_limit(resource, before);
  });
  return () => undo.forEach((step) => step());
}

/** Runs `start`, which starts a process, without limits: those of the caller are not touched. */
export function withoutLimits<T>(shim: Shim, start: () => T): T {
  const restore = raiseLimits(shim);
  try {
    return start();
  } finally {
    restore();
  }
}

/** @returns a line for each limit that is in a server's way. @param text of /proc/self/limits. */
export function limitNotes(text: string = contents("/proc/self/limits")): string[] {
  return LIMITS.flatMap(({ name, option, effect }) => {
    const line = text.split("\n").find((candidate) => candidate.startsWith(name));
    const [soft, , unit = ""] = line?.slice(name.length).trim().split(/\s+/) ?? [];
    if (soft === undefined || soft === "unlimited") return [];
    // That of processes has a default everywhere, which is enough.
    if (option === "-u" && Number(soft) >= 1000) return [];
    return [`ulimit ${option} limits it to ${soft} ${unit}: ${effect}; raise it before ubd add`];
  });
}
