// SPDX-License-Identifier: MIT
/** Commands, servers and supervisors as real processes, killed at control commands of a played driver. */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import fc from "fast-check";
import { UBLK_S_DEV_LIVE } from "../../abi/ublk_cmd.ts";
import type { DeviceState } from "../../core/state.ts";
import { runtime } from "../../ffi/mod.ts";
import { DriverModel } from "./driver_model.ts";
import type { Fuzzer } from "./fuzzer.ts";

const PLAYED = join(import.meta.dirname!, "played_ubd.ts");
const ARGS = runtime.startsWith("Deno") ? ["run", "-A", "-q", "--no-check", PLAYED] : [PLAYED];
/** A command that takes longer hangs: the played driver answers in milliseconds. */
const LIMIT_MS = 120_000;
/** Ids of the strangers that are there from the beginning. */
const STRANGER = 40;

interface Step {
  verb:
    | "add"
    | "del"
    | "recover"
    | "upgrade"
    | "quiesce"
    | "resize"
    | "gc"
    | "run"
    | "kill"
    | "slow";
  /** Of add: recovery, supervise. */
  lasting: number;
  /** Which of the devices there are. */
  device: number;
  /** Who is ended at which of its control commands. */
  mortal: "nobody" | "command" | "server";
  count: number;
  when: "before" | "after";
  signal: "SIGKILL" | "SIGINT" | "SIGTERM";
  /** The next step begins at once. */
  beside: boolean;
  /** The id is a stranger's once the device is gone. */
  stranger: boolean;
}

const step: fc.Arbitrary<Step> = fc.record({
  verb: fc.constantFrom<Step["verb"][]>(
    ...["add", "add", "add", "del", "recover", "upgrade", "quiesce", "resize"] as const,
    ...["gc", "run", "kill", "slow"] as const,
  ),
  lasting: fc.nat(2),
  device: fc.nat(3),
  mortal: fc.constantFrom("nobody", "command", "server"),
  count: fc.integer({ min: 1, max: 12 }),
  when: fc.constantFrom("before", "after"),
  signal: fc.constantFrom("SIGKILL", "SIGKILL", "SIGINT", "SIGTERM"),
  beside: fc.boolean(),
  stranger: fc.boolean(),
});

class Play {
  readonly directory = mkdtempSync(join(tmpdir(), "ubd-life-"));
  readonly driver = new DriverModel(this.directory);
  readonly #commands = new Set<Promise<string | undefined>>();
  readonly #env: Record<string, string | undefined>;

  constructor(canary: boolean) {
    mkdirSync(join(this.directory, "state"), { mode: 0o755 });
    this.#env = {
      ...process.env,
      UBD_PLAY: this.directory,
      ...(canary && { UBD_PLAY_CANARY: "1" }),
    };
  }

  async begin(): Promise<void> {
    await this.driver.listen();
    this.driver.addStranger(STRANGER);
  }

  ours(): number[] {
    return [...this.driver.devices.keys()].filter((id) => !this.driver.isStranger(id)).sort();
  }

  /** @returns what is wrong with how it ended. */
  ubd(args: string[], env: Record<string, string> = {}): Promise<string | undefined> {
    const child = spawn(process.execPath, [...ARGS, ...args], {
      env: { ...this.#env, ...env },
      stdio: ["ignore", "pipe", "pipe"],
    });
    const ended = outcome(child, args);
    this.#commands.add(ended);
    ended.finally(() => this.#commands.delete(ended));
    return ended;
  }

  async take(one: Step): Promise<string | undefined> {
    const ids = this.ours();
    const id = ids[one.device % Math.max(ids.length, 1)];
    const device = id === undefined ? undefined : this.driver.devices.get(id);
    if (one.stranger && id !== undefined) this.driver.strangersComeAt.add(id);
    if (one.verb === "kill") {
      if (device?.server) killQuietly(device.server.pid);
      return undefined;
    }
    if (one.verb === "slow") {
      if (!device) return undefined;
      device.busy++;
      setTimeout(() => device.busy--, 100);
      return undefined;
    }
    const lasting = [[], ["--recovery"], ["--supervise"]][one.lasting]!;
    const target = id === undefined ? undefined : [`${id}`];
    const args: Partial<Record<Step["verb"], string[]>> = {
      add: ["null", ...lasting],
      run: ["null", "--", "true"],
      gc: ["--force"],
      ...(target && {
        del: target,
        recover: target,
        upgrade: target,
        quiesce: target,
        resize: [...target, "1G"],
      }),
    };
    const words = args[one.verb];
    if (!words) return undefined;
    const kill = one.mortal === "nobody" ? {} : {
      UBD_PLAY_KILL: `${one.mortal} ${one.count} ${one.when}`,
      UBD_PLAY_SIGNAL: one.signal,
    };
    const ended = this.ubd([one.verb, ...words], kill);
    return one.beside ? undefined : await ended;
  }

  async idle(): Promise<(string | undefined)[]> {
    return await Promise.all(this.#commands);
  }

  #state(id: number): Partial<DeviceState> | undefined {
    try {
      return JSON.parse(readFileSync(join(this.directory, "state", `${id}.json`), "utf8"));
    } catch {
      return undefined;
    }
  }

  /** What must hold once nothing is under way. */
  faults(): string[] {
    const { devices, wronged } = this.driver;
    const faults = wronged.map((id) => `device ${id} is a stranger's, and was stopped`);
    if (devices.get(STRANGER)?.state !== UBLK_S_DEV_LIVE) faults.push("the stranger is gone");
    const directory = join(this.directory, "state");
    for (const name of readdirSync(directory)) {
      const id = Number(/^(\d+)\.(?:json|log)$/.exec(name)?.[1] ?? NaN);
      if (!devices.has(id)) faults.push(`${name} is left of nothing`);
    }
    for (const id of this.ours()) {
      const { state, server, targetFlags } = devices.get(id)!;
      if (state !== UBLK_S_DEV_LIVE || !server) {
        faults.push(`device ${id} is left in state ${state}`);
        continue;
      }
      const told = this.#state(id);
      if (!told) faults.push(`device ${id} has no state`);
      else if (told.pid !== server.pid) faults.push(`${id}.json lies: ${told.pid}, ${server.pid}`);
      else if (BigInt(told.mark!) !== targetFlags) faults.push(`${id}.json lies: ${told.mark}`);
    }
    return faults;
  }

  /** Servers without a device, or with one that is another's, may take a moment to end. */
  strays(): number[] {
    const serving = new Set([...this.driver.devices.values()].map(({ server }) => server?.pid));
    for (const id of this.ours()) serving.add(this.#state(id)?.supervisor);
    return [...this.driver.connections].map(({ pid }) => pid).filter((pid) => !serving.has(pid));
  }

  async end(): Promise<void> {
    for (const { pid } of this.driver.connections) killQuietly(pid);
    this.driver.close();
    await sleep(1);
    rmSync(this.directory, { recursive: true, force: true });
  }
}

function killQuietly(pid: number): void {
  try {
    if (pid > 0 && pid !== process.pid) process.kill(pid, "SIGKILL");
  } catch { /* it has ended */ }
}

function outcome(child: ChildProcess, args: string[]): Promise<string | undefined> {
  let said = "";
  child.stdout!.on("data", (text) => said += text);
  child.stderr!.on("data", (text) => said += text);
  return new Promise((resolve) => {
    const late = setTimeout(() => {
      child.kill("SIGKILL");
      resolve(`ubd ${args.join(" ")} does not end: ${said}`);
    }, LIMIT_MS);
    child.on("close", (code) => {
      clearTimeout(late);
      resolve(code === 70 ? `ubd ${args.join(" ")}: ${said}` : undefined);
    });
  });
}

const fuzzer: Fuzzer = {
  about:
    "commands and servers, killed anywhere: no orphan, no lie in a state file, no stranger hurt",
  smokeMs: 10_000,
  property: (canary) =>
    fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 5 }), async (steps) => {
      const play = new Play(canary);
      await play.begin();
      try {
        const faults: (string | undefined)[] = [];
        for (const one of steps) faults.push(await play.take(one));
        faults.push(...await play.idle());
        // What a killed process has left, gc takes away: it knows what nobody looks after.
        for (let tries = 0; tries < 100 && play.strays().length > 0; tries++) await sleep(50);
        faults.push(...play.strays().map((pid) => `process ${pid} serves nothing`));
        faults.push(await play.ubd(["gc", "--force"]), ...play.faults());
        assert.deepStrictEqual(faults.filter((fault) => fault !== undefined), []);
      } finally {
        await play.end();
      }
    }),
};
export default fuzzer;
