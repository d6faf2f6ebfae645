// SPDX-License-Identifier: MIT
/**
 * The part of the benchmark that needs no guest: requests per second of the queue loop, natively.
 *
 * core/queue.ts as an executable, under Bun and under Deno (ring_server.ts) takes turns with the
 * same loop in C (loop.c). All processes of a depth exist at the same time and wait for their turn;
 * each has served for a while before the first measurement. Needs io_uring. Called by bench.ts.
 */
import { type ChildProcessByStdio, spawn } from "node:child_process";
import { once } from "node:events";
import { cpus } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import { EXECUTABLE } from "../tools/build.ts";
import { run } from "../tools/run.ts";
import { compile, fetchLibraries } from "./compile.ts";
import {
  inTurn,
  type Plan,
  type Report,
  RING_GROUP,
  RING_YARDSTICK,
  ringCase,
  ringRepeats,
  ringSeconds,
} from "./plan.ts";

const HERE = import.meta.dirname!;
const SERVER = join(HERE, "ring_server.ts");

/** Ends when the serving process does: nothing here waits for a time. */
interface Loop {
  name: string;
  child: ChildProcessByStdio<Writable, Readable, null>;
  lines: AsyncIterator<string>;
}

interface Program {
  name: string;
  command: string[];
}

/** Compiles what needs it into `directory`. */
async function programs(directory: string): Promise<Program[]> {
  const c = join(directory, "loop");
  await compile([join(HERE, "loop.c")], await fetchLibraries(), c);
  const executable = join(directory, "ring_server");
  await run("bun", ["build", ...EXECUTABLE, SERVER, "--outfile", executable]);
  return [
    { name: RING_YARDSTICK, command: [c] },
    { name: "executable", command: [executable] },
    { name: "Bun", command: ["bun", SERVER] },
    { name: "Deno", command: ["deno", "run", "-A", "-q", "--cached-only", SERVER] },
  ];
}

function start({ name, command }: Program, depth: number): Loop {
  const [program, ...args] = command;
  const child = spawn(program!, [...args, `${depth}`], { stdio: ["pipe", "pipe", "inherit"] });
  child.stdin.on("error", () => {}); // It has ended, which its stdout tells as well.
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  return { name, child, lines };
}

/** Has a loop serve for some seconds. */
async function serve({ name, child, lines }: Loop, seconds: number) {
  child.stdin.write(`${seconds}\n`);
  const { value } = await lines.next();
  const [requests, took, cpu] = String(value).split(" ").map(Number);
  if (!(requests! > 0)) throw new Error(`${name}: ended without a result`);
  return { requests: requests!, seconds: took!, cpuSeconds: cpu! };
}

/** Measures every depth of the plan, for the report. */
export async function measureRing(
  plan: Plan,
  directory: string,
): Promise<Pick<Report, "measurements" | "versions">> {
  const measurements: Report["measurements"] = [];
  const all = await programs(directory);
  for (const depth of plan.ringDepths) {
    const loops: Loop[] = [];
    try {
      for (const program of all) loops.push(start(program, depth));
      for (const loop of loops) await serve(loop, Math.max(0.2, plan.warmUpSeconds / 4));
      for (let repeat = 0; repeat < ringRepeats(plan); repeat++) {
        for (const loop of inTurn(loops, repeat)) {
          const { requests, cpuSeconds } = await serve(loop, ringSeconds(plan));
          measurements.push({
            group: RING_GROUP,
            name: loop.name,
            case: ringCase(depth),
            repeat,
            // The loop never sleeps: on an idle machine this is what the clock says, and on a busy
            // one it does not count the time that others had.
            iops: requests / cpuSeconds,
            serverCpuUs: cpuSeconds / requests * 1e6,
            bytesPerSecond: 0,
            latencyP50Us: null,
            latencyP99Us: null,
            requestKiBMax: null,
          });
        }
      }
    } finally {
      for (const { child } of loops) {
        if (child.exitCode !== null || child.signalCode !== null) continue;
        child.kill("SIGKILL");
        await once(child, "exit");
      }
    }
  }
  const processors = cpus();
  return {
    measurements,
    versions: {
      "host's processors": `${processors.length} x ${processors[0]?.model.trim() ?? "unknown"}`,
      "host's kernel": (await run("uname", ["-r"])).trim(),
      "C compiler": (await run("gcc", ["--version"])).split("\n")[0]!,
      runtimes: `Bun ${(await run("bun", ["--version"])).trim()}, ` +
        (await run("deno", ["--version"])).split("\n")[0]!,
    },
  };
}
