// SPDX-License-Identifier: MIT
/** `ubd set_affinity`: on which CPUs the threads of a queue may run. @module */

import { readFileSync } from "node:fs";
import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { describeDevice } from "./describe.ts";
import { printJson, tell } from "./output.ts";
import { oneDeviceId, parseCpus, parseDeviceId, parseInteger } from "./size.ts";

interface SetAffinityOptions {
  number?: number;
  queue: number;
  cpuset?: number[];
  json?: boolean;
}

export function defineSetAffinity(program: Command): void {
  program.command("set_affinity")
    .alias("set-affinity")
    .summary("choose the CPUs of a queue's threads")
    .description(
      "Chooses the CPUs on which the thread of a queue may run, or the threads that share it, until " +
        "its server ends. Queues that have one thread move together.\n\n" +
        '  ubd set_affinity -n 0 -q 0 --cpuset "[0,2]"',
    )
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("-q, --queue <id>", "queue, from 0", (text) => parseInteger(text, "Queue"), 0)
    .option("--cpuset <cpus>", 'CPUs: "[0,2]", 0,2 or 0-3', parseCpus)
    .action(setAffinity);
}

async function setAffinity(
  device: number | undefined,
  { number, queue, cpuset, json }: SetAffinityOptions,
): Promise<void> {
  const id = oneDeviceId("set_affinity", device, number);
  if (!cpuset) throw new UsageError('Which CPUs? ubd set_affinity -n ID -q QUEUE --cpuset "[0,2]"');
  using control = await Control.open();
  const { queues, queueThreads, pid } = await describeDevice(control, id);
  if (queue < 0 || queue >= queues) {
    throw new UsageError(`Queue ${queue}: device ${id} has queues 0 to ${queues - 1}`);
  }
  const operation = "set_affinity";
  const threads = queueThreads.filter(({ qid }) => qid === queue);
  if (threads.length === 0 || !threads.every(({ tid }) => isThreadOf(pid, tid))) {
    const hint = "nobody serves it, or another program does, whose threads are not known";
    throw new UblkError({ errno: "ESRCH", operation, device: id, hint });
  }
  const mask = new Uint8Array(1024);
  for (const cpu of cpuset) mask[cpu >> 3]! |= 1 << (cpu & 7);
  for (const { tid } of threads) {
    const result = control.shim.native.ubd_set_affinity(tid, mask);
    if (result >= 0) continue;
    const hint = { EINVAL: "none of these CPUs is online", EPERM: "run as root" };
    const error = UblkError.from(result, operation);
    const known = hint[error.errno as keyof typeof hint];
    throw UblkError.from(result, operation, { device: id, ...(known && { hint: known }) });
  }
  const { queueThreads: now } = await describeDevice(control, id);
  const { affinity } = now.find(({ qid }) => qid === queue) ?? { affinity: cpuset };
  const [tid, ...others] = threads.map((thread) => thread.tid);
  const more = others.length > 0 && { others };
  if (json) printJson({ id, queue, tid, ...more, affinity });
  else tell(`queue ${queue} of device ${id} runs on CPU ${affinity}`);
}

function isThreadOf(pid: number, tid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/task/${tid}/comm`).length > 0;
  } catch {
    return false;
  }
}
