// SPDX-License-Identifier: MIT
/**
 * ubd, all of it, with a played driver in place of the kernel's: `Control` asks driver_model.ts, and
 * null's queues have no rings. UBD_PLAY names the directory of the play; UBD_PLAY_KILL says at which
 * control command which process is killed: "server 3 before", "command 1 after".
 */

import { connect } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { UBLK } from "../../abi/dialect.ts";
import { runProgram } from "../../cli/program.ts";
import { runServer } from "../../cli/server.ts";
import { SERVE_VERB } from "../../cli/start_server.ts";
import { Control } from "../../core/control.ts";
import { Device } from "../../core/device.ts";
import { UblkError } from "../../core/error.ts";
import type { QueueThread } from "../../core/queue_thread.ts";
import { useStateDirectory } from "../../core/state.ts";
import { emptyStats } from "../../core/stats.ts";
import { Shim } from "../../ffi/mod.ts";
import { nullTarget } from "../../targets/null.ts";
import { fromText, toText } from "./played_wire.ts";

const directory = process.env.UBD_PLAY!;
const classDirectory = join(directory, "class");
useStateDirectory(join(directory, "state"));

const role = process.argv[2] === SERVE_VERB ? "server" : "command";
const [mortal, count, when] = (process.env.UBD_PLAY_KILL ?? "").split(" ");
let calls = 0;
function dieIf(moment: string): void {
  if (role !== mortal || when !== moment || calls !== Number(count)) return;
  process.kill(process.pid, process.env.UBD_PLAY_SIGNAL ?? "SIGKILL");
}

const waiting = new Map<number, PromiseWithResolvers<unknown>>();
const queues = new Map<number, (() => void)[]>();
const socket = connect(join(directory, "driver"));
socket.unref();
let rest = "";
socket.setEncoding("utf8").on("data", (text: string) => {
  const lines = (rest + text).split("\n");
  rest = lines.pop()!;
  for (const line of lines) {
    const { call, result, errno, ended } = fromText(line) as Record<string, never>;
    if (ended !== undefined) queues.get(ended)?.forEach((end) => end());
    else if (errno === undefined) waiting.get(call!)?.resolve(result);
    else waiting.get(call!)?.reject(errno);
  }
});
socket.on("error", () => process.kill(process.pid, "SIGKILL")); // The play is over.
socket.on("close", () => process.kill(process.pid, "SIGKILL"));

let next = 0;
async function ask(method: string, ...args: unknown[]): Promise<unknown> {
  const call = next++;
  const answer = Promise.withResolvers<unknown>();
  waiting.set(call, answer);
  socket.ref();
  socket.write(toText({ call, method, args }));
  try {
    return await answer.promise;
  } finally {
    waiting.delete(call);
    if (waiting.size === 0 && role === "command") socket.unref();
  }
}
await ask("hello", process.pid, process.argv[2]);

async function command(method: string, id: number, ...args: unknown[]): Promise<unknown> {
  calls++;
  dieIf("before");
  try {
    return await ask(method, id, ...args);
  } catch (errno) {
    throw UblkError.from(-Number(errno), method, { device: id });
  } finally {
    dieIf("after");
  }
}

const RECOVERY_TRIES = 200;

class PlayedControl {
  readonly shim = new Shim();
  readonly dialect = {
    ...UBLK,
    charClass: `../..${classDirectory}`,
    charPath: (id: number) => join(classDirectory, `ublkc${id}`),
    blockPath: (id: number) => join(directory, `ublkb${id}`),
  };
  readonly features = 0x8n | 1n << 10n | 1n << 12n;
  readonly ioctlEncoded = true;
  [Symbol.dispose]() {}
  require() {}
  requireCommand() {}
  isUnprivileged = () => false;
  openFile = (path: string, flags: number) => Promise.resolve(this.shim.open(path, flags));
  addDevice = (request: { id: number }) => {
    calls++;
    dieIf("before");
    return ask("addDevice", request).catch((errno) => {
      throw UblkError.from(-Number(errno), "ADD_DEV");
    }).finally(() => dieIf("after"));
  };
  getDeviceInfo = (id: number) => command("getDeviceInfo", id);
  setParams = (id: number, params: unknown) => command("setParams", id, params);
  getParams = (id: number) => command("getParams", id);
  startDevice = (id: number, pid: number) => command("startDevice", id, pid);
  endUserRecovery = (id: number, pid: number) => command("endUserRecovery", id, pid);
  quiesceDevice = (id: number) => command("quiesceDevice", id);
  updateSize = (id: number) => command("updateSize", id);
  tryStopDevice = (id: number) => command("stopDevice", id);
  stopDevice = (id: number) => command("stopDevice", id);
  deleteDevice = (id: number) => command("deleteDevice", id);
  deleteDeviceLater = (id: number) =>
    Promise.reject(UblkError.from(-95, "DEL_DEV_ASYNC", { device: id }));
  getQueueAffinity = () => Promise.resolve([0]);
  async startUserRecovery(id: number, goOn = () => {}) {
    for (let tries = 0;; tries++) {
      goOn();
      try {
        await command("startUserRecovery", id);
        return { anew: true };
      } catch (error) {
        const busy = error instanceof UblkError && error.errno === "EBUSY";
        if (!busy || tries > RECOVERY_TRIES) throw error;
      }
      await sleep(20);
    }
  }
}
Object.assign(Control, { open: () => Promise.resolve(new PlayedControl()) });

const openNull = nullTarget.open;
nullTarget.open = (options, context) => ({
  ...openNull(options, context),
  startThread(): QueueThread {
    const ended = Promise.withResolvers<void>();
    const fetched = Promise.withResolvers<void>();
    return {
      opened: Promise.resolve(undefined),
      ended: ended.promise,
      stats: emptyStats(),
      async serve({ blockName }) {
        const id = Number(blockName.replace(/\D+/, ""));
        queues.set(id, [...queues.get(id) ?? [], () => ended.resolve()]);
        await ask("fetch", id);
        fetched.resolve();
        return process.pid;
      },
      fetched: () => fetched.promise,
      stopping() {},
      hears: () => true,
      abandon: () => ended.resolve(),
    };
  },
});

// What a server looks like that adds a device and forgets it.
if (process.env.UBD_PLAY_CANARY) {
  const { create } = Device;
  Device.create = async (control, options) => {
    const device = await create(control, options);
    await control.addDevice({ ...device.info, id: -1, maxIoBytes: 4096 } as never);
    return device;
  };
}

const work = role === "server" ? runServer() : runProgram();
work.then((code) => process.exit(code));
