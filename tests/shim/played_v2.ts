// SPDX-License-Identifier: MIT
/**
 * The driver of the V2 patch, played: control commands and all, for one device.
 *
 * It answers what the patch's driver answers, and notes as `crashes` what that one would follow a
 * null pointer for. Requests are sent with `submit`, as to testing/driver.ts, whose queues these are.
 */
import { UBD_V2 } from "../../abi/dialect.ts";
import { ERRNO } from "../../abi/errno.ts";
import { UBLK_IO_OP_READ, UBLK_IO_OP_WRITE } from "../../abi/ublk_cmd.ts";
import * as ubd from "../../abi/ubd_v2.ts";
import { pack, unpack } from "../../abi/struct.ts";
import {
  COMMAND_COMMIT,
  COMMAND_FETCH,
  COMMAND_WORDS,
  type ControlRequest,
  PAYLOAD_BYTES,
  PAYLOAD_COUNT,
  type QueueConfig,
  type QueueMemory,
  TAG_BITS,
  TAG_MASK,
} from "../../ffi/mod.ts";
import { PlayedDriver } from "../../testing/driver.ts";

const INFO = ubd.UBDSRV_CTRL_DEV_INFO;
const NAMES = new Map([
  [ubd.UBD_CMD_GET_QUEUE_AFFINITY, "GET_QUEUE_AFFINITY"],
  [ubd.UBD_CMD_GET_DEV_INFO, "GET_DEV_INFO"],
  [ubd.UBD_CMD_ADD_DEV, "ADD_DEV"],
  [ubd.UBD_CMD_DEL_DEV, "DEL_DEV"],
  [ubd.UBD_CMD_START_DEV, "START_DEV"],
  [ubd.UBD_CMD_STOP_DEV, "STOP_DEV"],
]);

export class PlayedV2 extends PlayedDriver {
  /** Names of the commands that came, "open PATH", and "read-only". */
  readonly asked: string[] = [];
  /** What would have crashed the kernel, or lost data. */
  readonly crashes: string[] = [];
  /** There is a device. */
  added = false;
  #info = new Uint8Array(INFO.size);
  #payloads = new ArrayBuffer(PAYLOAD_COUNT * PAYLOAD_BYTES);
  readonly #completions: [number, number][] = [];
  /** Tags to be fetched, before all are. */
  #unfetched = Infinity;
  #started = false;
  #charFd = -1;

  constructor() {
    super();
    const { ubd_step, ubd_close } = this.native;
    const memories = this.#memories;
    const native = {
      ...this.native,
      ubd_step: (handle: number, count: number, wait: number) => {
        const memory = memories.get(handle)!;
        const words = new Int32Array(memory.commands);
        const descriptors = new Int32Array(memory.descriptors);
        for (let at = 0; at < count; at++) {
          const [head, value] = [words[at * COMMAND_WORDS]!, words[at * COMMAND_WORDS + 1]!];
          const [command, tag] = [head >>> TAG_BITS, head & TAG_MASK];
          if (command === COMMAND_FETCH) this.#unfetched--;
          if (command !== COMMAND_COMMIT || value < 0) continue;
          const [op, sectors] = [descriptors[tag * 6]! & 0xff, descriptors[tag * 6 + 1]!];
          const moves = op === UBLK_IO_OP_READ || op === UBLK_IO_OP_WRITE;
          if (moves && value !== sectors * 512) this.crashes.push(`${value} bytes taken for all`);
        }
        return ubd_step(handle, count, wait);
      },
      ubd_close: (fd: number) => {
        if (fd === this.#charFd) this.#charFd = -1;
        return ubd_close(fd);
      },
      ubd_ioctl: () => {
        this.asked.push("read-only");
        return 0;
      },
      ubd_control_exit: () => 0,
      ubd_control_reap: (_: number, out: ArrayBufferView | null) => {
        const completion = this.#completions.shift();
        if (completion) (out as Int32Array).set(completion);
        return completion ? 1 : 0;
      },
    };
    Object.assign(this, { native });
  }

  readonly #memories = new Map<number, QueueMemory>();

  override open(path: string, flags: number): number {
    this.asked.push(`open ${path}`);
    const isChar = path === UBD_V2.charPath(0);
    if (isChar && !this.added) return -ERRNO.ENOENT;
    if (isChar && this.#charFd >= 0) return -ERRNO.EBUSY;
    const fd = super.open("/dev/null", flags);
    if (isChar) this.#charFd = fd;
    return fd;
  }

  override queueInit(config: QueueConfig): QueueMemory | number {
    const bare = this.config(config.queueId, config.depth, config.ioBytesMax, config.wakeFd);
    const memory = super.queueInit({ ...bare, stats: config.stats });
    if (typeof memory !== "number") this.#memories.set(memory.handle, memory);
    return memory;
  }

  override controlInit() {
    return { handle: 0, payloads: this.#payloads };
  }

  override controlSubmit(_: number, request: ControlRequest): number {
    const area = new Uint8Array(this.#payloads, request.payload * PAYLOAD_BYTES, PAYLOAD_BYTES);
    const done = (result: number) => void this.#completions.push([request.payload, result]);
    if (request.opcode === 0) {
      const length = area.indexOf(0);
      done(this.open(new TextDecoder().decode(area.subarray(0, length)), Number(request.data)));
    } else this.#command(request, area).then(done);
    return 0;
  }

  async #command({ opcode, deviceId, data }: ControlRequest, area: Uint8Array): Promise<number> {
    const name = NAMES.get(opcode) ?? `0x${opcode.toString(16)}`;
    this.asked.push(name);
    const crash = (when: string) => void this.crashes.push(`${name} ${when}`);
    if (name === "ADD_DEV") {
      const info = unpack(INFO, area.subarray(0, INFO.size));
      if (this.added) return -ERRNO.ENODEV;
      this.#set({ ...info, dev_id: 0 });
      this.added = true;
      this.#unfetched = info.nr_hw_queues * info.queue_depth;
      area.set(this.#info);
      return 0;
    }
    if (!this.added || deviceId !== 0) return -ERRNO.ENODEV;
    const info = unpack(INFO, this.#info);
    switch (name) {
      case "GET_DEV_INFO":
        area.set(this.#info);
        return 0;
      case "GET_QUEUE_AFFINITY":
        return 0;
      case "START_DEV":
        if (this.#unfetched > 0) crash("before all FETCHes");
        this.#started = true;
        this.#set({ ...info, state: ubd.UBD_S_DEV_LIVE, ubdsrv_pid: Number(data) });
        // It looks for partitions.
        await this.submit(UBLK_IO_OP_READ, 0, 0, 4096, new Uint8Array(4096)).catch(() => {});
        return 0;
      case "STOP_DEV":
        if (!this.#started) crash("of a device that never started");
        this.#set({ ...info, state: ubd.UBD_S_DEV_DEAD, ubdsrv_pid: -1 });
        this.stop();
        return 0;
      case "DEL_DEV":
        if (this.#unfetched > 0) crash("before all FETCHes");
        this.added = false;
        return 0;
      default:
        return -ERRNO.ENODEV;
    }
  }

  #set(info: Parameters<typeof pack<typeof INFO>>[1]): void {
    this.#info = pack(INFO, info);
  }
}
