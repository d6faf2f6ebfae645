// SPDX-License-Identifier: MIT
/**
 * Control commands, one method each, on the driver's control device.
 *
 * Commands are submitted to a ring of their own and awaited without blocking the thread: START_DEV
 * ends only when the queues serve, STOP_DEV only when they have drained, and both need this
 * thread alive. Each command has a deadline. A command that misses it stays in flight; its
 * payload area is kept for it, since the kernel may still write there.
 *
 * No command is begun in the calling thread, whatever the driver does where it is submitted: a
 * worker of the kernel's has it from the start.
 *
 * ioctl-encoded opcodes first; a kernel before 6.4 answers them with an error and gets the legacy
 * ones from then on. Which dialect is spoken is asked of abi/dialect.ts.
 * @module
 */

import { existsSync } from "node:fs";
import { release } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import {
  chooseDialect,
  type ControlCommand,
  DEV_ID_AUTO,
  type DeviceInfo,
  type Dialect,
  QUEUE_ID_NONE,
  UBLK,
} from "../abi/dialect.ts";
import { ERRNO, errnoName } from "../abi/errno.ts";
import {
  FEATURE_KERNEL,
  FEATURE_NAMES,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_USER_RECOVERY,
  UBLK_PARAMS,
  UBLK_S_DEV_DEAD,
  UBLK_S_DEV_FAIL_IO,
  UBLK_S_DEV_QUIESCED,
} from "../abi/ublk_cmd.ts";
import { pack, unpack, type Unpacked, type Values } from "../abi/struct.ts";
import { pathBytes } from "../ffi/path.ts";
import { type ControlRequest, PAYLOAD_BYTES, PAYLOAD_COUNT, Shim } from "../ffi/mod.ts";
import { UblkError } from "./error.ts";
import { checkDeviceId } from "./size.ts";
import { startOnce } from "./start_once.ts";

const O_RDWR = 2;

/** How long a command may take, in milliseconds. Stopping waits for I/O in flight. */
const DEADLINE_MS: Readonly<Record<string, number>> = {
  START_DEV: 60_000,
  END_USER_RECOVERY: 60_000,
  STOP_DEV: 60_000,
  TRY_STOP_DEV: 60_000,
  DEL_DEV: 30_000,
};
/** First mainline kernel that has a command, of those that came after ioctl-encoded opcodes. */
const COMMAND_KERNEL: Partial<Record<ControlCommand, string>> = {
  GET_FEATURES: "6.5",
  DEL_DEV_ASYNC: "6.9",
  UPDATE_SIZE: "6.16",
  QUIESCE_DEV: "6.16",
  TRY_STOP_DEV: "7.0",
  REG_BUF: "7.1",
  UNREG_BUF: "7.1",
};

const DEADLINE_DEFAULT_MS = 15_000;

/** What waits in the driver, for a server or for another such command, so that no signal ends it. */
const MAY_WAIT = new Set<ControlCommand>([
  "STOP_DEV",
  "TRY_STOP_DEV",
  "DEL_DEV",
  "DEL_DEV_ASYNC",
  "GET_PARAMS",
  "UPDATE_SIZE",
  "QUIESCE_DEV",
]);

/** How long an old server may take to let go of its device. */
const RECOVERY_DEADLINE_MS = 30_000;

interface CommandOptions {
  deviceId?: number;
  queueId?: number;
  /** In: what the kernel reads. Its length is also how much may be answered. */
  payload?: Uint8Array;
  /** Path of the character device. Unless given, it goes with those that need it. */
  path?: string;
  /** The command's inline data. */
  data?: number;
}

export class Control implements Disposable {
  readonly dialect: Dialect;
  readonly shim: Shim;
  readonly #fd: number;
  readonly #handle: number;
  readonly #payloads: Uint8Array;
  readonly #freePayloads = Array.from({ length: PAYLOAD_COUNT }, (_, index) => index);
  readonly #waiting = new Map<number, (result: number) => void>();
  /** Whether a device was added by a user without privileges, as last heard of it. */
  readonly #unprivileged = new Map<number, boolean>();
  /**
   * Whether a command that may wait for long is given by a process of its own: this one could not
   * even end before the driver is done with it. Not for servers: theirs end when they do.
   */
  apart = false;
  #ioctlEncoded = true;
  #features: bigint | undefined;

  private constructor(shim: Shim, dialect: Dialect) {
    this.shim = shim;
    this.dialect = dialect;
    this.#fd = shim.open(dialect.controlPath, O_RDWR);
    if (this.#fd < 0) {
      throw UblkError.from(this.#fd, "open the control device", {
        cause: new Error(dialect.controlPath),
        ...this.#rootOnly(this.#fd),
      });
    }
    const ring = shim.controlInit();
    if (typeof ring === "number") {
      shim.native.ubd_close(this.#fd);
      throw UblkError.from(ring, "set up a ring");
    }
    this.#handle = ring.handle;
    this.#payloads = new Uint8Array(ring.payloads);
  }

  /**
   * Opens the control device and finds out how the running kernel wants its commands.
   *
   * @throws {UblkError} ENOENT: no driver; EACCES: no permission; EPERM: no io_uring.
   */
  static async open(shim = new Shim(), dialect = chooseDialect(existsSync)): Promise<Control> {
    const control = new Control(shim, dialect);
    try {
      await control.#probeEncoding();
      return control;
    } catch (error) {
      control[Symbol.dispose]();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    this.shim.native.ubd_control_exit(this.#handle);
    this.shim.native.ubd_close(this.#fd);
  }

  /** GET_FEATURES says most; a kernel without it is asked for a device without saying which. */
  async #probeEncoding(): Promise<void> {
    if (!this.dialect.hasCommand("GET_FEATURES")) {
      this.#ioctlEncoded = false;
      return;
    }
    const payload = new Uint8Array(8);
    const result = await this.#run("GET_FEATURES", { payload });
    if (result === 0) {
      this.#features = new DataView(payload.buffer).getBigUint64(0, true);
      return;
    }
    // Who knows this opcode misses its payload; to the others all unknown ones lack a device.
    this.#ioctlEncoded = await this.#run("ADD_DEV", {}) === -ERRNO.EINVAL;
  }

  /** Bits of UBLK_F_*; undefined where the kernel (before 6.5) cannot say. */
  get features(): bigint | undefined {
    return this.#features;
  }

  /** @throws {UblkError} EOPNOTSUPP, by name: the running kernel lacks this feature. */
  require(feature: bigint, operation: string, device?: number): void {
    if ((this.#features ?? 0n) & feature) return;
    throw lackError(feature, operation, device, this.dialect);
  }

  /** @throws {UblkError} EOPNOTSUPP: the driver lacks this command, and so cannot do `operation`. */
  requireCommand(command: ControlCommand, operation: string = command, device?: number): void {
    if (this.dialect.hasCommand(command, this.#ioctlEncoded)) return;
    const lacking = describeLackingCommand(command, this.dialect);
    throw operationLacks(operation, device, lacking);
  }

  /** Whether opcodes are ioctl-encoded: the queues' io commands must agree. */
  get ioctlEncoded(): boolean {
    return this.#ioctlEncoded;
  }

  /** How many commands may be given now: one that has missed its deadline keeps its area. */
  get room(): number {
    return this.#freePayloads.length;
  }

  /** Makes /dev/ublkcN. @returns what the kernel made of the request: it may lower values. */
  async addDevice(request: Parameters<Dialect["packInfo"]>[0]): Promise<DeviceInfo> {
    const payload = this.dialect.packInfo(request);
    const deviceId = request.id < 0 ? DEV_ID_AUTO : request.id;
    await this.#command("ADD_DEV", { deviceId, payload });
    return this.#heard(this.dialect.unpackInfo(payload));
  }

  /** What was last heard of the device: a user without privileges has added it. */
  isUnprivileged(deviceId: number): boolean {
    return this.#unprivileged.get(deviceId) ?? false;
  }

  #heard(info: DeviceInfo): DeviceInfo {
    this.#unprivileged.set(info.id, (info.flags & UBLK_F_UNPRIVILEGED_DEV) !== 0n);
    return info;
  }

  async setParams(deviceId: number, params: Values<typeof UBLK_PARAMS>): Promise<void> {
    const payload = pack(UBLK_PARAMS, { ...params, len: UBLK_PARAMS.size });
    await this.#command("SET_PARAMS", { deviceId, payload });
  }

  async getParams(deviceId: number): Promise<Unpacked<typeof UBLK_PARAMS>> {
    const payload = pack(UBLK_PARAMS, { len: UBLK_PARAMS.size });
    await this.#command("GET_PARAMS", { deviceId, payload });
    return unpack(UBLK_PARAMS, payload);
  }

  /**
   * Makes /dev/ublkbN. Ends when every tag of every queue has been fetched and the partition
   * table has been read through the queues.
   *
   * @param pid the process that opened the character device.
   */
  async startDevice(deviceId: number, pid: number): Promise<void> {
    await this.#command("START_DEV", { deviceId, data: pid });
  }

  /**
   * Makes a device ready for a new server. The old one must have let go: the driver answers EBUSY
   * while its last reference to /dev/ublkcN lives, so this asks again for a while.
   *
   * @param goOn called before each try; may throw.
   * @returns anew: false if another server has begun it, which may have died since, and this driver
   * does not begin again.
   * @throws {UblkError} EINVAL: it was not added for recovery, or has been stopped.
   */
  async startUserRecovery(deviceId: number, goOn = () => {}): Promise<{ anew: boolean }> {
    const deadline = performance.now() + RECOVERY_DEADLINE_MS;
    for (;;) {
      goOn();
      const result = await this.#run("START_USER_RECOVERY", { deviceId });
      if (result === 0) return { anew: true };
      const refused = UblkError.from(result, "START_USER_RECOVERY", { device: deviceId });
      if (result !== -ERRNO.EBUSY && result !== -ERRNO.EINVAL) throw refused;
      const { flags, state } = await this.getDeviceInfo(deviceId);
      const recoverable = (flags & UBLK_F_USER_RECOVERY) !== 0n &&
        (state === UBLK_S_DEV_QUIESCED || state === UBLK_S_DEV_FAIL_IO);
      // As drivers do (Linux 6.12) while no queue has fetched since the last time.
      if (result === -ERRNO.EINVAL && recoverable) return { anew: false };
      if (result === -ERRNO.EINVAL || performance.now() > deadline) throw refused;
      // To the driver, a stopped device is as busy as one whose server still lives.
      if (state === UBLK_S_DEV_DEAD) {
        const hint = "it has been stopped, and can only be deleted: ubd del -n ID";
        const errno = "EINVAL";
        throw new UblkError({ errno, operation: "START_USER_RECOVERY", device: deviceId, hint });
      }
      await sleep(100);
    }
  }

  /** As startDevice, for a device that is being recovered. */
  async endUserRecovery(deviceId: number, pid: number): Promise<void> {
    await this.#command("END_USER_RECOVERY", { deviceId, data: pid });
  }

  /**
   * Holds back new requests and cancels the FETCHes that wait for one. Those that carry a request
   * are not cancelled, and fetch again after it: see Device.quiesce, which asks until all are.
   */
  async quiesceDevice(deviceId: number, timeoutMs: number): Promise<void> {
    await this.#command("QUIESCE_DEV", { deviceId, data: timeoutMs });
  }

  /** The driver checks nothing but that the device is there. */
  async updateSize(deviceId: number, sectors: number): Promise<void> {
    await this.#command("UPDATE_SIZE", { deviceId, data: sectors });
  }

  /** As stopDevice, unless somebody has the block device open: EBUSY. */
  async tryStopDevice(deviceId: number): Promise<void> {
    await this.#command("TRY_STOP_DEV", { deviceId });
  }

  /** Ends when the queues have answered what is in flight, or the server is dead. */
  async stopDevice(deviceId: number): Promise<void> {
    if (await this.#neverStarted(deviceId)) return; // As other drivers do.
    await this.#command("STOP_DEV", { deviceId });
  }

  /** Ends when the last user of /dev/ublkcN has gone. */
  async deleteDevice(deviceId: number): Promise<void> {
    if (await this.#neverStarted(deviceId)) await startOnce(this, deviceId);
    await this.#command("DEL_DEV", { deviceId });
  }

  /** Of a driver that does not look for itself. */
  async #neverStarted(deviceId: number): Promise<boolean> {
    if (this.dialect.checksState) return false;
    const { state, pid } = await this.getDeviceInfo(deviceId);
    return state === UBLK_S_DEV_DEAD && pid === 0; // A stop makes it -1.
  }

  /** As deleteDevice, but the kernel does the waiting (6.9). */
  async deleteDeviceLater(deviceId: number): Promise<void> {
    const command = "DEL_DEV_ASYNC";
    const result = await this.#run(command, { deviceId });
    if (result >= 0) return;
    const lacks = errnoName(result) === "EOPNOTSUPP" &&
      { hint: describeLackingCommand(command, this.dialect) };
    throw UblkError.from(result, command, { device: deviceId, ...lacks });
  }

  /**
   * GET_DEV_INFO2 where the kernel has it, since it also answers a device's owner.
   *
   * @throws {UblkError} ENODEV: there is no such device; EACCES: it is another user's.
   */
  async getDeviceInfo(deviceId: number): Promise<DeviceInfo> {
    const payload = new Uint8Array(this.dialect.infoSize);
    if (this.dialect.hasCommand("GET_DEV_INFO2")) {
      const path = this.dialect.charPath(deviceId);
      const result = await this.#run("GET_DEV_INFO2", { deviceId, payload, path });
      if (result === 0) return this.#heard(this.dialect.unpackInfo(payload));
      // The older command says only EINVAL of another user's device. A driver with encoded opcodes
      // has this one; others may say ENODEV of a command that they do not know.
      if (result === -ERRNO.EACCES || result === -ERRNO.ENODEV && this.#ioctlEncoded) {
        throw UblkError.from(result, "GET_DEV_INFO", { device: deviceId });
      }
    }
    await this.#command("GET_DEV_INFO", { deviceId, payload });
    return this.#heard(this.dialect.unpackInfo(payload));
  }

  /**
   * The driver wants the path of an unprivileged device's character device with each command, to
   * see whether the caller may open it; with any other device it would take it for the payload.
   */
  async #requiredPath(command: ControlCommand, deviceId: number): Promise<string | undefined> {
    if (["ADD_DEV", "GET_FEATURES", "GET_DEV_INFO"].includes(command)) return undefined;
    if (!this.#unprivileged.has(deviceId)) {
      // What keeps this from an answer, the command itself will say.
      await this.getDeviceInfo(deviceId).catch(() => {});
    }
    return this.isUnprivileged(deviceId) ? this.dialect.charPath(deviceId) : undefined;
  }

  /** @returns the CPUs whose I/O this queue gets. */
  async getQueueAffinity(deviceId: number, queueId: number): Promise<number[]> {
    // The kernel wants room for every possible CPU, in units of 8 bytes; 8192 CPUs are its limit.
    const payload = new Uint8Array(1024);
    await this.#command("GET_QUEUE_AFFINITY", { deviceId, payload, data: queueId });
    const cpus = [];
    for (let cpu = 0; cpu < payload.length * 8; cpu++) {
      if (payload[cpu >> 3]! & 1 << (cpu & 7)) cpus.push(cpu);
    }
    return cpus;
  }

  async #command(command: ControlCommand, options: CommandOptions): Promise<void> {
    const result = await this.#run(command, options);
    if (result >= 0) return;
    throw UblkError.from(result, command, { ...device(options), ...this.#rootOnly(result) });
  }

  /** Where no device can be an ordinary user's, that is no advice. */
  #rootOnly(result: number): { hint?: string } {
    const denied = result === -ERRNO.EPERM || result === -ERRNO.EACCES;
    return denied && !this.dialect.flagsMask ? { hint: "run as root" } : {};
  }

  /** Submits and awaits one command. @returns its result; the answer is in options.payload. */
  async #run(command: ControlCommand, options: CommandOptions): Promise<number> {
    const { deviceId = DEV_ID_AUTO } = options;
    this.requireCommand(command, command, device(options).device);
    if (deviceId !== DEV_ID_AUTO) checkDeviceId(deviceId);
    if (command !== "ADD_DEV" && this.#isDeleted(deviceId)) return -ERRNO.ENODEV;
    const pathname = options.path ??
      await this.#requiredPath(command, deviceId);
    const path = pathname ? pathBytes(pathname) : new Uint8Array();
    return await this.#submit(command, options, path, {
      opcode: this.dialect.controlOpcode(command, this.#ioctlEncoded),
      deviceId,
      queueId: options.queueId ?? QUEUE_ID_NONE,
      data: BigInt(options.data ?? 0),
      apart: this.apart && MAY_WAIT.has(command),
    });
  }

  /**
   * Opens a file without waiting for it here: what a device that this thread serves does first
   * when it is opened, such as to read its partitions, may need this thread.
   *
   * @param flags O_* of open(2). @returns a descriptor.
   */
  async openFile(path: string, flags: number): Promise<number> {
    const operation = `open ${path}`;
    const fields = { opcode: 0, deviceId: 0, queueId: 0, data: BigInt(flags) };
    const fd = await this.#submit(operation, {}, pathBytes(path), fields);
    if (fd < 0) throw UblkError.from(fd, operation);
    return fd;
  }

  /** A driver may know a device until it is closed, and not that it is deleted. */
  #isDeleted(deviceId: number): boolean {
    const { dialect } = this;
    if (dialect.checksState || deviceId === DEV_ID_AUTO) return false;
    return isUnlisted(dialect, deviceId);
  }

  /** Puts path and payload into an area of their own, and waits. @returns the result. */
  async #submit(
    operation: string,
    options: CommandOptions,
    path: Uint8Array,
    fields: Pick<ControlRequest, "opcode" | "deviceId" | "queueId" | "data" | "apart">,
  ): Promise<number> {
    const slot = this.#freePayloads.pop();
    if (slot === undefined) {
      throw new UblkError({ errno: "EBUSY", operation, ...device(options) });
    }
    const area = this.#payloads.subarray(slot * PAYLOAD_BYTES, (slot + 1) * PAYLOAD_BYTES);
    area.set(path);
    area.set(options.payload ?? [], path.length);

    const submitted = this.shim.controlSubmit(this.#handle, {
      ...fields,
      controlFd: this.#fd,
      payload: slot,
      payloadBytes: path.length + (options.payload?.length ?? 0),
      pathBytes: path.length,
    });
    if (submitted < 0) {
      this.#freePayloads.push(slot);
      throw UblkError.from(submitted, operation, device(options));
    }

    const deadlineMs = DEADLINE_MS[operation] ?? DEADLINE_DEFAULT_MS;
    const result = await this.#completion(slot, deadlineMs);
    if (result === undefined) {
      this.#waiting.set(slot, () => this.#freePayloads.push(slot));
      throw lateError(operation, options, deadlineMs, this.dialect);
    }
    this.#freePayloads.push(slot);
    options.payload?.set(area.subarray(path.length, path.length + options.payload.length));
    return result;
  }

  /** Polls, ever more slowly: nothing else can wait for a ring in both runtimes' event loops. */
  async #completion(slot: number, deadlineMs: number): Promise<number | undefined> {
    let result: number | undefined;
    this.#waiting.set(slot, (value) => result = value);
    const deadline = performance.now() + deadlineMs;
    for (let pauseMs = 0.25;; pauseMs = Math.min(pauseMs * 1.5, 25)) {
      this.#reap();
      if (result !== undefined || performance.now() > deadline) return result;
      await sleep(pauseMs);
    }
  }

  #reap(): void {
    const out = new Int32Array(2);
    while (this.shim.native.ubd_control_reap(this.#handle, out) === 1) {
      const [slot, result] = [out[0]!, out[1]!];
      this.#waiting.get(slot)?.(result);
      this.#waiting.delete(slot);
    }
  }
}

/** Whether /sys is there, and has no device of this id. */
export function isUnlisted({ charClass, charName }: Dialect, id: number): boolean {
  const devices = `/sys/class/${charClass}`;
  return existsSync(devices) && !existsSync(`${devices}/${charName(id)}`);
}

/** "kernel 6.12.90 lacks UPDATE_SIZE (needs 6.16)": of several features, the youngest. */
export function describeLack(features: bigint, dialect = chooseDialect(existsSync)): string {
  const [flag, name] = [...FEATURE_NAMES].findLast(([bit]) => bit & features) ?? [];
  const needs = flag === undefined ? undefined : FEATURE_KERNEL.get(flag);
  return lacks(name ?? "a feature", needs ?? "a later one", dialect);
}

/** The same for a command. */
function describeLackingCommand(command: ControlCommand, dialect: Dialect): string {
  return lacks(command, COMMAND_KERNEL[command] ?? "a later one", dialect);
}

/** Who has another driver than the kernel's own is not helped by a younger kernel. */
function lacks(what: string, needs: string, dialect: Dialect): string {
  return dialect.name === UBLK.name
    ? `kernel ${release()} lacks ${what} (needs ${needs})`
    : `the driver that is loaded, ${dialect.driver}, lacks ${what}: ${UBLK.driver} may have it`;
}

export function lackError(
  features: bigint,
  operation: string,
  device?: number,
  dialect?: Dialect,
): UblkError {
  return operationLacks(operation, device, describeLack(features, dialect));
}

function operationLacks(operation: string, device: number | undefined, hint: string): UblkError {
  const errno = "EOPNOTSUPP";
  return new UblkError({ errno, operation, ...(device !== undefined && { device }), hint });
}

function device({ deviceId }: CommandOptions): { device?: number } {
  return deviceId === undefined || deviceId === DEV_ID_AUTO ? {} : { device: deviceId };
}

function lateError(
  operation: string,
  options: CommandOptions,
  ms: number,
  { blockPath, charPath }: Dialect,
): UblkError {
  const { deviceId } = options;
  const holders = deviceId === undefined || deviceId === DEV_ID_AUTO
    ? ""
    : `, and at who holds the device: fuser -v ${blockPath(deviceId)} ${charPath(deviceId)}`;
  return new UblkError({
    errno: "ETIMEDOUT",
    operation,
    ...device(options),
    hint: `no answer in ${ms / 1000} s; look at dmesg${holders}; the command goes on in the kernel`,
  });
}
