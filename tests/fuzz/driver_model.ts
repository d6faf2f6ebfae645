// SPDX-License-Identifier: MIT
/**
 * The control side of the driver, played: devices, their states, who serves them. Processes of ubd
 * connect to it by a socket (played_ubd.ts) and are told by it what the driver would answer; that a
 * process has died, it sees by the end of its connection, as the driver sees it by a closed file.
 *
 * A device is a file in a directory in place of /sys/class/ublk-char, which its server has open.
 */

import { existsSync, mkdirSync, readdirSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import {
  UBLK_F_QUIESCE,
  UBLK_F_UPDATE_SIZE,
  UBLK_F_USER_RECOVERY,
  UBLK_S_DEV_DEAD,
  UBLK_S_DEV_LIVE,
  UBLK_S_DEV_QUIESCED,
} from "../../abi/ublk_cmd.ts";
import { fromText, toText } from "./played_wire.ts";

export const FEATURES = UBLK_F_QUIESCE | UBLK_F_UPDATE_SIZE | UBLK_F_USER_RECOVERY;

interface PlayedDevice {
  id: number;
  state: number;
  flags: bigint;
  targetFlags: bigint;
  queues: number;
  depth: number;
  maxIoBytes: number;
  pid: number;
  params: unknown;
  server: Connection | undefined;
  fetched: number;
  /** Requests it is serving, which end by themselves. */
  busy: number;
  /** New requests are held back. */
  held: boolean;
}

type Added = Pick<
  PlayedDevice,
  "id" | "flags" | "queues" | "depth" | "maxIoBytes" | "targetFlags"
>;

interface Connection {
  pid: number;
  verb: string;
  /** The devices that it was told of. */
  known: Set<PlayedDevice>;
  socket: Socket;
}

class Refusal extends Error {}

const refuse = (errno: number): never => {
  throw new Refusal(`${errno}`);
};
const [EBUSY, EEXIST, ENODEV, EINVAL] = [16, 17, 19, 22];

export class DriverModel {
  readonly devices = new Map<number, PlayedDevice>();
  readonly connections = new Set<Connection>();
  /** Ids whose device was stopped or deleted though no command may touch it. */
  readonly wronged: number[] = [];
  /** An id that becomes free is taken by a stranger at once. */
  strangersComeAt = new Set<number>();
  readonly classDirectory: string;
  readonly #server: Server;

  constructor(readonly directory: string) {
    this.classDirectory = join(directory, "class");
    mkdirSync(this.classDirectory);
    this.#server = createServer((socket) => this.#welcome(socket));
  }

  listen(): Promise<void> {
    return new Promise((resolve) => this.#server.listen(join(this.directory, "driver"), resolve));
  }

  close(): void {
    for (const { socket } of this.connections) socket.destroy();
    this.#server.close();
  }

  /** A device of another program's, which is alive and serves it. */
  addStranger(id: number): void {
    this.#add({ id, flags: 0n, queues: 1, depth: 128, maxIoBytes: 524288, targetFlags: 0n });
    Object.assign(this.devices.get(id)!, { state: UBLK_S_DEV_LIVE, pid: process.pid });
  }

  isStranger(id: number): boolean {
    return this.devices.get(id)?.targetFlags === 0n;
  }

  #welcome(socket: Socket): void {
    const connection: Connection = { pid: -1, verb: "", known: new Set(), socket };
    let rest = "";
    socket.setEncoding("utf8").on("data", (text: string) => {
      const lines = (rest + text).split("\n");
      rest = lines.pop()!;
      for (const line of lines) this.#serve(connection, line);
    });
    socket.on("error", () => {});
    socket.on("close", () => {
      this.connections.delete(connection);
      for (const device of this.devices.values()) {
        if (device.server === connection) this.#lost(device);
      }
    });
  }

  async #serve(connection: Connection, line: string): Promise<void> {
    const { call, method, args } = fromText(line) as {
      call: number;
      method: string;
      args: never[];
    };
    let answer: Record<string, unknown>;
    try {
      const commands = this as unknown as Record<string, (...args: unknown[]) => unknown>;
      answer = { result: await commands[`do_${method}`]!(connection, ...args) };
    } catch (error) {
      if (!(error instanceof Refusal)) console.error(error);
      answer = { errno: Number(error instanceof Refusal ? error.message : 5) };
    }
    if (!connection.socket.destroyed) connection.socket.write(toText({ call, ...answer }));
  }

  #lost(device: PlayedDevice): void {
    device.server = undefined;
    device.fetched = 0;
    device.held = false;
    if (device.state !== UBLK_S_DEV_LIVE) return;
    const recoverable = (device.flags & UBLK_F_USER_RECOVERY) !== 0n;
    device.state = recoverable ? UBLK_S_DEV_QUIESCED : UBLK_S_DEV_DEAD;
  }

  #device(id: number): PlayedDevice {
    return this.devices.get(id) ?? refuse(ENODEV);
  }

  #charPath(id: number): string {
    return join(this.classDirectory, `ublkc${id}`);
  }

  /** Whether a process has the character device open. */
  #isOpen(id: number): boolean {
    return [...this.connections].some(({ pid }) => {
      const directory = `/proc/${pid}/fd`;
      try {
        return readdirSync(directory).some((fd) => {
          try {
            return readlinkSync(join(directory, fd)).startsWith(this.#charPath(id)) &&
              !/\d/.test(readlinkSync(join(directory, fd)).slice(this.#charPath(id).length));
          } catch {
            return false;
          }
        });
      } catch {
        return false;
      }
    });
  }

  do_hello(connection: Connection, pid: number, verb: string): void {
    Object.assign(connection, { pid, verb });
    this.connections.add(connection);
  }

  do_addDevice(_: Connection, request: Added) {
    return this.#info(this.#add(request));
  }

  #add(
    request: Added,
  ): PlayedDevice {
    let { id } = request;
    if (id < 0) { for (id = 0; this.devices.has(id) || existsSync(this.#charPath(id));) id++; }
    if (this.devices.has(id)) refuse(EEXIST);
    const device: PlayedDevice = {
      ...request,
      id,
      queues: 1,
      state: UBLK_S_DEV_DEAD,
      pid: -1,
      params: undefined,
      server: undefined,
      fetched: 0,
      busy: 0,
      held: false,
    };
    this.devices.set(id, device);
    writeFileSync(this.#charPath(id), "");
    return device;
  }

  #info({ params: _, server: __, fetched: ___, busy: ____, held: _____, ...info }: PlayedDevice) {
    return { ...info, ublksrvFlags: 0n, ownerUid: 0, ownerGid: 0 };
  }

  do_getDeviceInfo({ known }: Connection, id: number) {
    known.add(this.#device(id));
    return this.#info(this.#device(id));
  }

  do_setParams(_: Connection, id: number, params: unknown): void {
    this.#device(id).params = params;
  }

  do_getParams(_: Connection, id: number) {
    return this.#device(id).params ?? refuse(EINVAL);
  }

  do_fetch(connection: Connection, id: number): void {
    const device = this.#device(id);
    device.server = connection;
    device.fetched++;
  }

  async do_startDevice(connection: Connection, id: number, pid: number): Promise<void> {
    const device = this.#device(id);
    while (device.fetched < device.queues) {
      if (connection.socket.destroyed || this.devices.get(id) !== device) refuse(ENODEV);
      await sleep(1);
    }
    Object.assign(device, { state: UBLK_S_DEV_LIVE, pid });
  }

  do_startUserRecovery(_: Connection, id: number): void {
    const device = this.#device(id);
    if (!(device.flags & UBLK_F_USER_RECOVERY)) refuse(EINVAL);
    if (device.server || this.#isOpen(id)) refuse(EBUSY);
    if (device.state !== UBLK_S_DEV_QUIESCED) refuse(EBUSY);
  }

  async do_endUserRecovery(connection: Connection, id: number, pid: number): Promise<void> {
    await this.do_startDevice(connection, id, pid);
  }

  /** Idle tags are cancelled; one that carries a request fetches again. */
  async do_quiesceDevice(_: Connection, id: number): Promise<void> {
    const device = this.#device(id);
    if (device.state !== UBLK_S_DEV_LIVE) refuse(EBUSY);
    device.held = true;
    for (let tries = 0; device.busy > 0; tries++) {
      if (tries === 50) refuse(EBUSY);
      await sleep(2);
    }
    const { server } = device;
    this.#endQueues(device);
    // A server may quiesce its own device: the state changes when it lets go, which it need not die for.
    while (device.server && this.#isOpen(id)) await sleep(1);
    if (device.server && device.server === server) this.#lost(device);
  }

  #endQueues({ id, server }: PlayedDevice): void {
    if (server && !server.socket.destroyed) server.socket.write(toText({ ended: id }));
  }

  do_updateSize(_: Connection, id: number): void {
    this.#device(id);
  }

  async do_stopDevice({ verb, known }: Connection, id: number): Promise<void> {
    const device = this.#device(id);
    // Whoever says `del ID` means the device that has the id when the command looks.
    const isMeant = verb === "del" && [...known].every((one) => one.id !== id || one === device);
    if (this.isStranger(id) && !isMeant) this.wronged.push(id);
    while (device.busy > 0 && device.server) await sleep(1);
    device.state = UBLK_S_DEV_DEAD;
    this.#endQueues(device);
  }

  async do_deleteDevice(connection: Connection, id: number): Promise<void> {
    const device = this.#device(id);
    await this.do_stopDevice(connection, id);
    rmSync(this.#charPath(id), { force: true });
    while (this.#isOpen(id)) await sleep(2);
    if (this.devices.get(id) !== device) refuse(ENODEV);
    this.devices.delete(id);
    if (this.strangersComeAt.delete(id)) this.addStranger(id);
  }
}
