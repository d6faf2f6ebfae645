// SPDX-License-Identifier: MIT
/**
 * The shared library: each export's refusals and releases, its layouts against abi/, its ELF
 * files for both architectures, and the ways in which ffi/load.ts gets it loaded.
 *
 * Needs io_uring. File descriptors are counted in /proc/self/fd.
 */
import assert from "node:assert/strict";
import { execFileSync, spawn, spawnSync } from "node:child_process";
import {
  closeSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { arch, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ERRNO } from "../../abi/errno.ts";
import { IO_URING_CQE, IO_URING_PARAMS, IO_URING_SQE, SQE_CMD_OFFSET } from "../../abi/io_uring.ts";
import type { Layout } from "../../abi/struct.ts";
import {
  UBLK_BATCH_IO,
  UBLKSRV_CTRL_CMD,
  UBLKSRV_IO_CMD,
  UBLKSRV_IO_DESC,
} from "../../abi/ublk_structs.ts";
import { loadShim, SHIM_VERSION } from "../../ffi/load.ts";
import {
  COMMAND_FETCH,
  COMMAND_READ,
  COMMAND_WAKE,
  COMMAND_WORDS,
  COMMAND_WRITE,
  COMMAND_WRITE_ZEROES,
  PAYLOAD_COUNT,
  type QueueConfig,
  Shim,
  TAG_BITS,
  unpackBinary,
} from "../../ffi/mod.ts";
import { OWNER_PACKED, SHIM_PACKED } from "../../ffi/shim_binary.ts";
import { type Adapter, SYMBOLS } from "../../ffi/symbols.ts";

const { adapter }: { adapter: Adapter } = "Bun" in globalThis
  ? await import("../../ffi/bun.ts")
  : await import("../../ffi/deno.ts");

const shim = new Shim();
const { native } = shim;
const wakeFd = native.ubd_eventfd(0);

/** A null pointer where the table says `buffer`. */
const NULL = null;
const { EAGAIN, EBADF, EINVAL, ENFILE, ENODEV, ENOENT } = ERRNO;

const CONFIG: QueueConfig = {
  charFd: -1,
  wakeFd,
  queueId: 0,
  depth: 4,
  ioBytesMax: 4096,
  fetchOpcode: 0,
  commitOpcode: 0,
  sqe128: false,
  descriptorOffset: 0,
  descriptorBytes: 4096,
};

/** Sets up a queue and takes it down again. @returns 0, or -errno. */
function tryQueue(config: Partial<QueueConfig>): number {
  const memory = shim.queueInit({ ...CONFIG, ...config });
  return typeof memory === "number" ? memory : native.ubd_queue_exit(memory.handle);
}

/** Descriptors of the kinds that the shim makes; the runtime's own come and go. */
const openFds = () => openPaths().filter((path) => /io_uring|eventfd|ubd-|mnt:/.test(path)).length;

/** What is open, apart from the descriptor of the listing itself. */
function openPaths(): string[] {
  return readdirSync("/proc/self/fd").flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/self/fd/${fd}`)];
    } catch {
      return [];
    }
  });
}

function leavesNoDescriptor(work: () => void): void {
  work(); // What is made once, such as the registered ring table, is made here.
  const before = openFds();
  for (let round = 0; round < 5; round++) work();
  assert.strictEqual(openFds(), before);
}

test("ubd_version is the version that ffi/load.ts wants", () => {
  assert.strictEqual(native.ubd_version(), SHIM_VERSION);
});

test("ubd_queue_init takes depths from 1 to 4096", () => {
  const descriptorBytes = 4096 * 24;
  for (const depth of [1, 2, 3, 4095, 4096]) {
    assert.strictEqual(tryQueue({ depth, descriptorBytes }), 0, `depth ${depth}`);
  }
  for (const depth of [0, 4097, 65536, -1]) {
    assert.strictEqual(
      tryQueue({ depth, descriptorBytes: 0x7fff_f000 }),
      -EINVAL,
      `depth ${depth}`,
    );
  }
});

test("ubd_queue_init takes buffers of whole pages", () => {
  for (const ioBytesMax of [4096, 8192, 33554432]) {
    assert.strictEqual(tryQueue({ ioBytesMax }), 0, `${ioBytesMax}`);
  }
  for (const ioBytesMax of [0, 1, 512, 4095, 4097, 6144]) {
    assert.strictEqual(tryQueue({ ioBytesMax }), -EINVAL, `${ioBytesMax}`);
  }
});

test("ubd_queue_init takes a descriptor area of whole pages that holds every tag", () => {
  assert.strictEqual(tryQueue({ depth: 170, descriptorBytes: 4096 }), 0);
  assert.strictEqual(tryQueue({ depth: 171, descriptorBytes: 4096 }), -EINVAL);
  assert.strictEqual(tryQueue({ depth: 171, descriptorBytes: 8192 }), 0);
  assert.strictEqual(tryQueue({ descriptorBytes: 96 }), -EINVAL);
  assert.strictEqual(tryQueue({ descriptorBytes: 4097 }), -EINVAL);
  assert.strictEqual(tryQueue({ descriptorBytes: 0 }), -EINVAL);
});

test("ubd_queue_init refuses a null config, no wake descriptor, and a bad character device", () => {
  assert.strictEqual(native.ubd_queue_init(NULL, NULL), -EINVAL);
  assert.strictEqual(tryQueue({ wakeFd: -1 }), -EINVAL);
  const zero = shim.open("/dev/null", 2);
  assert.strictEqual(tryQueue({ charFd: zero }), -ENODEV, "/dev/null cannot be mapped");
  assert.strictEqual(tryQueue({ charFd: zero, descriptorOffset: -4096 }), -EINVAL);
  assert.strictEqual(tryQueue({ charFd: zero, descriptorOffset: NaN }), -EINVAL);
  assert.strictEqual(tryQueue({ userCopy: true }), -EINVAL, "nothing to copy from");
  assert.strictEqual(tryQueue({ prepOpcode: 1 }), -EINVAL, "no driver, no batches");
  native.ubd_close(zero);
});

test("ubd_queue_init sets up rings of 128-byte SQEs", () => {
  assert.strictEqual(tryQueue({ sqe128: true }), 0);
});

test("ubd_queue_address answers for the regions of a living queue only", () => {
  const memory = shim.queueInit(CONFIG);
  assert.ok(typeof memory !== "number");
  const regions = Array.from({ length: 3 + CONFIG.depth }, (_, region) => region);
  const addresses = regions.map((region) => native.ubd_queue_address(memory.handle, region));
  assert.ok(addresses.every((address) => address > 0));
  assert.strictEqual(new Set(addresses).size, regions.length);
  assert.ok(addresses.slice(2).every((address) => address % 4096 === 0));
  assert.strictEqual(native.ubd_queue_address(memory.handle, regions.length), -1);
  native.ubd_queue_exit(memory.handle);
  assert.strictEqual(native.ubd_queue_address(memory.handle, 0), -1);
});

test("io buffers lie an odd number of pages apart", () => {
  for (const [pages, apart] of [[1, 1], [2, 3], [3, 3], [128, 129]] as const) {
    const memory = shim.queueInit({ ...CONFIG, ioBytesMax: pages * 4096 });
    assert.ok(typeof memory !== "number");
    const [first, second] = [3, 4].map((at) => native.ubd_queue_address(memory.handle, at));
    assert.strictEqual(second! - first!, apart * 4096);
    assert.ok(memory.buffers.every((buffer) => buffer.length === pages * 4096));
    native.ubd_queue_exit(memory.handle);
  }
});

/** Whether something is mapped at an address. */
function isMapped(address: number): boolean {
  return readFileSync("/proc/self/maps", "utf8").split("\n").some((line) => {
    const [start, end] = line.split(" ")[0]!.split("-").map((word) => Number.parseInt(word, 16));
    return start! <= address && address < end!;
  });
}

test("the shim is loaded once, however often it is asked for", () => {
  const mappings = () =>
    readFileSync("/proc/self/maps", "utf8").split("\n").filter((line) => line.includes(" r-xp "))
      .length;
  const before = mappings();
  for (let n = 0; n < 3; n++) assert.strictEqual(new Shim().path, shim.path);
  assert.strictEqual(new Shim(shim.path).native, shim.native);
  assert.strictEqual(mappings(), before);
});

test("an io buffer outlives its queue, until it is dropped, and may be another's place", () => {
  const file = shim.open("/dev/zero", 2);
  const memory = shim.queueInit({ ...CONFIG, ioBytesMax: 8192 });
  assert.ok(typeof memory !== "number");
  const { handle, buffers, pool } = memory;
  const first = native.ubd_queue_address(handle, 3);
  assert.strictEqual(pool.renew(0), true);
  const second = native.ubd_queue_address(handle, 3);
  assert.notStrictEqual(second, first);
  for (const wrong of [0, first + 1, -1, Infinity]) {
    assert.strictEqual(native.ubd_buffer_use(handle, 0, wrong), -EINVAL, `${wrong}`);
    assert.strictEqual(native.ubd_buffer_drop(wrong, 8192, 1), -EINVAL, `${wrong}`);
  }
  assert.strictEqual(native.ubd_buffer_use(handle, CONFIG.depth, first), -EINVAL);
  buffers[0]!.fill(7);
  new Int32Array(memory.commands).set([COMMAND_READ << TAG_BITS, file, 0, 0]);
  new Float64Array(memory.commands).set([4096, 0], 2);
  assert.strictEqual(native.ubd_step(handle, 1, 1), 1);
  assert.deepStrictEqual([buffers[0]![4095], buffers[0]![4096]], [0, 7], "it was read there");
  native.ubd_queue_exit(handle);
  assert.ok(isMapped(first) && isMapped(second));
  assert.strictEqual(native.ubd_buffer_drop(second, 8192, 0), 0);
  assert.strictEqual(buffers[0]![4096], 0, "its pages are gone, not its place");
  pool.close(() => false);
  // Three pages each: an odd number.
  for (const address of [first, second]) {
    assert.strictEqual(native.ubd_buffer_drop(address, 8192, 1), 0);
    assert.ok(!isMapped(address) && !isMapped(address + 8192), "all of it is unmapped");
  }
  native.ubd_close(file);
});

test("handles that are stale, never given or too large are refused by every call", () => {
  const queue = shim.queueInit(CONFIG);
  const control = shim.controlInit();
  assert.ok(typeof queue !== "number" && typeof control !== "number");
  assert.strictEqual(native.ubd_queue_exit(queue.handle), 0);
  assert.strictEqual(native.ubd_control_exit(control.handle), 0);
  const out = new Int32Array(2);
  const request = new BigInt64Array(5);
  for (const stale of [1023, 1024, 0x7fff_ffff, 0xffff_ffff]) {
    assert.strictEqual(native.ubd_queue_exit(stale), -EBADF);
    assert.strictEqual(native.ubd_queue_address(stale, 0), -1);
    assert.strictEqual(native.ubd_step(stale, 0, 0), -EBADF);
    assert.strictEqual(native.ubd_buffer_use(stale, 0, 4096), -EBADF);
    assert.strictEqual(native.ubd_control_exit(stale), -EBADF);
    assert.strictEqual(native.ubd_control_address(stale), -1);
    assert.strictEqual(native.ubd_control_submit(stale, request), -EBADF);
    assert.strictEqual(native.ubd_control_reap(stale, out), -EBADF);
  }
  assert.strictEqual(native.ubd_queue_exit(queue.handle), -EBADF, "second exit");
  assert.strictEqual(native.ubd_step(queue.handle, 0, 0), -EBADF);
  assert.strictEqual(native.ubd_control_exit(control.handle), -EBADF, "second exit");
  assert.strictEqual(native.ubd_control_reap(control.handle, out), -EBADF);
});

test("ubd_step refuses more commands than tags and the wake-up, bad tags and bad operations", () => {
  const packed = (count: number, ...words: number[]) => {
    const memory = shim.queueInit(CONFIG);
    assert.ok(typeof memory !== "number");
    new Int32Array(memory.commands).set(words);
    const result = native.ubd_step(memory.handle, count, 0);
    native.ubd_queue_exit(memory.handle);
    return result;
  };
  assert.strictEqual(packed(0), 0);
  assert.strictEqual(packed(5), 5, "FETCH of tag 0 is a NOP here");
  assert.strictEqual(packed(6), -EINVAL);
  assert.strictEqual(packed(1, 3), 1);
  assert.strictEqual(packed(1, 4), -EINVAL, "tag = depth");
  assert.strictEqual(packed(1, 0xffff), -EINVAL);
  assert.strictEqual(packed(1, 99 << TAG_BITS), -EINVAL, "no such operation");
});

test("ubd_step refuses data outside the tag's buffer and offsets that are no number", () => {
  const file = shim.open("/dev/zero", 2);
  let config = CONFIG;
  const io = (op: number, bytes: number, bufferOffset: number, fileOffset: number) => {
    const memory = shim.queueInit(config);
    assert.ok(typeof memory !== "number");
    new Int32Array(memory.commands).set([op << TAG_BITS, file, 0, bufferOffset]);
    new Float64Array(memory.commands).set([bytes, fileOffset], 2);
    const result = native.ubd_step(memory.handle, 1, 1);
    native.ubd_queue_exit(memory.handle);
    return result;
  };
  const refused = -EINVAL;
  const zeroCopy = { automatic: true, registerOpcode: 0, unregisterOpcode: 0 };
  for (config of [CONFIG, { ...CONFIG, zeroCopy }]) {
    for (const op of [COMMAND_READ, COMMAND_WRITE, COMMAND_WRITE_ZEROES]) {
      assert.deepStrictEqual([
        [io(op, 4096, 0, 0), io(op, 1, 4095, 0), io(op, 512, 0, 2 ** 40)],
        [io(op, 4097, 0, 0), io(op, 1, 4096, 0), io(op, 4096, 1, 0), io(op, -1, 2, 0)],
        [io(op, 512, 0, -1), io(op, 512, 0, NaN), io(op, 512, 0, 2 ** 53 + 2)],
      ], [[1, 1, 1], [refused, refused, refused, refused], [refused, refused, refused]]);
    }
  }
  native.ubd_close(file);
});

test("the eventfd is rung only after a step that took and brought nothing", async () => {
  const [wake, rung] = [native.ubd_eventfd(0), native.ubd_eventfd(1)];
  const memory = shim.queueInit({ ...CONFIG, wakeFd: wake });
  assert.ok(typeof memory !== "number");
  const commands = new Int32Array(memory.commands);
  const step = (...ops: number[]) => {
    for (const [at, op] of ops.entries()) commands[at * COMMAND_WORDS] = op << TAG_BITS;
    return native.ubd_step(memory.handle, ops.length, 0);
  };
  // The kernel rings an eventfd late when it was another one that brought the completion.
  const isRung = async (patienceMs = 100) => {
    for (let waitedMs = 0; waitedMs < patienceMs; waitedMs += 100) {
      await sleep(100);
      if (native.ubd_wait(rung) !== -EAGAIN) return true;
    }
    return false;
  };
  assert.equal(native.ubd_queue_notify(memory.handle, rung), 0);
  assert.equal(step(COMMAND_WAKE, COMMAND_FETCH), 1);
  native.ubd_wake(wake);
  assert.equal(await isRung(), false, "rung for who comes back anyway");
  assert.equal(step(), 1);
  assert.equal(step(COMMAND_WAKE), 0);
  assert.equal(await isRung(), false, "rung for what a step has brought");
  assert.equal(step(), 0);
  native.ubd_wake(wake);
  assert.equal(await isRung(30_000), true, "not rung for who sleeps");
  assert.equal(step(), 1);
  assert.equal(native.ubd_queue_exit(memory.handle), 0);
  for (const fd of [wake, rung]) native.ubd_close(fd);
});

test("ubd_control_submit refuses payloads outside its areas", async () => {
  const control = shim.controlInit();
  assert.ok(typeof control !== "number");
  const submit = (change: Partial<Parameters<Shim["controlSubmit"]>[1]>) =>
    shim.controlSubmit(control.handle, {
      controlFd: -1,
      opcode: 1,
      deviceId: 0,
      queueId: 0,
      payload: 0,
      payloadBytes: 0,
      pathBytes: 0,
      data: 0n,
      ...change,
    });
  assert.strictEqual(native.ubd_control_submit(control.handle, NULL), -EINVAL);
  assert.strictEqual(submit({ payload: PAYLOAD_COUNT }), -EINVAL);
  assert.strictEqual(submit({ payload: -1 }), -EINVAL);
  assert.strictEqual(submit({ payloadBytes: 8193 }), -EINVAL);
  assert.strictEqual(submit({ payloadBytes: 8, pathBytes: 9 }), -EINVAL);
  assert.strictEqual(submit({ queueId: 0x10000 }), -EINVAL);

  const out = new Int32Array(2);
  assert.strictEqual(native.ubd_control_reap(control.handle, NULL), -EINVAL);
  assert.strictEqual(native.ubd_control_reap(control.handle, out), 0, "nothing in flight");
  const last = PAYLOAD_COUNT - 1;
  const taken = submit({ payload: last, payloadBytes: 8192, pathBytes: 8192, queueId: 0xffff });
  assert.strictEqual(taken, 0);
  let reaped = 0;
  for (let turn = 0; turn < 5000 && reaped === 0; turn++) {
    reaped = native.ubd_control_reap(control.handle, out);
    if (reaped === 0) await sleep(1);
  }
  assert.deepStrictEqual([reaped, ...out], [1, last, -EBADF], "descriptor -1");
  native.ubd_control_exit(control.handle);
});

test("a control command that is given apart is another process's, which leaves nothing", async () => {
  const control = shim.controlInit();
  assert.ok(typeof control !== "number");
  const controlFd = shim.open("/dev/null", 2);
  const request = { controlFd, opcode: 1, deviceId: 0, queueId: 0, data: 0n, apart: true };
  const out = new Int32Array(2);
  const answers: number[][] = [];
  // A device that knows no commands refuses them; /dev/null takes any (Linux 6.2).
  for (const payload of [3, 0]) {
    const more = { payload, payloadBytes: 16, pathBytes: 0 };
    assert.strictEqual(shim.controlSubmit(control.handle, { ...request, ...more }), 0);
  }
  const tasks = readdirSync("/proc/self/task");
  const children = tasks.map((tid) => readFileSync(`/proc/self/task/${tid}/children`, "utf8"));
  while (answers.length < 2) {
    if (native.ubd_control_reap(control.handle, out) === 1) answers.push([...out]);
    else await new Promise((resolve) => setTimeout(resolve, 1));
  }
  assert.deepStrictEqual(answers.map(([payload]) => payload).sort(), [0, 3]);
  for (const [, result] of answers) assert.ok(result === 0 || result === -95, `${result}`);
  assert.notStrictEqual(children.join("").trim(), "", "in no process of its own");
  assert.strictEqual(native.ubd_control_reap(control.handle, out), 0, "answered once");
  native.ubd_control_exit(control.handle);
  native.ubd_close(controlFd);
});

test("file calls answer -errno for bad descriptors, pointers, offsets and sizes", () => {
  const out = new Uint8Array(256);
  const fd = shim.open("/proc/self/exe", 0);
  const answers: [string, number, number][] = [
    ["open null", native.ubd_open(NULL, 0), -EINVAL],
    ["open absent", shim.open("/nonexistent", 0), -ENOENT],
    ["close", native.ubd_close(-1), -EBADF],
    ["flock", native.ubd_flock(-1, 2), -EBADF],
    ["fdatasync", native.ubd_fdatasync(-1), -EBADF],
    ["fallocate", native.ubd_fallocate(-1, 0, 0, 4096), -EBADF],
    ["fallocate offset", native.ubd_fallocate(fd, 0, -1, 4096), -EINVAL],
    ["fallocate length", native.ubd_fallocate(fd, 0, 0, NaN), -EINVAL],
    ["probe_read", native.ubd_probe_read(-1, 512, 0), -EBADF],
    ["probe_read size", native.ubd_probe_read(fd, 4097, 0), -EINVAL],
    ["probe_read offset", native.ubd_probe_read(fd, 512, Infinity), -EINVAL],
    ["probe_read page", native.ubd_probe_read(fd, 4096, 0), 4096],
    ["statx", native.ubd_statx(-1, 0, out), -EBADF],
    ["statx null", native.ubd_statx(fd, 0, NULL), -EINVAL],
    ["statx good", native.ubd_statx(fd, 0x7ff, out), 0],
    ["ioctl", native.ubd_ioctl(-1, 0, out), -EBADF],
    ["send_datagram null", native.ubd_send_datagram(NULL, 1, out, 1), -EINVAL],
    ["send_datagram null data", native.ubd_send_datagram(out, 1, NULL, 1), -EINVAL],
    ["send_datagram no name", native.ubd_send_datagram(out, 0, out, 1), -EINVAL],
    ["send_datagram long name", native.ubd_send_datagram(out, 109, out, 1), -EINVAL],
    ["ioctl null", native.ubd_ioctl(fd, 0, NULL), -EINVAL],
    ["wake", native.ubd_wake(-1), -EBADF],
    ["detach_mount null", native.ubd_detach_mount(NULL), -EINVAL],
    ["mknod null", native.ubd_mknod(NULL, 0, 1, 3), -EINVAL],
    ["mknod major", native.ubd_mknod(out, 0, 4096, 0), -EINVAL],
    ["mknod minor", native.ubd_mknod(out, 0, 0, 1 << 20), -EINVAL],
    ["layout null", native.ubd_layout(NULL, 0), -EINVAL],
    ["close good", native.ubd_close(fd), 0],
    ["close again", native.ubd_close(fd), -EBADF],
  ];
  for (const [name, got, expected] of answers) assert.strictEqual(got, expected, name);
});

test("ubd_open's descriptors do not survive exec", () => {
  const fd = shim.open("/dev/null", 0);
  const flags = /^flags:\s+(\d+)$/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8"))![1]!;
  native.ubd_close(fd);
  assert.strictEqual(parseInt(flags, 8) & 0o2000000, 0o2000000);
});

test("ubd_gettid names this thread", () => {
  const link = readlinkSync("/proc/thread-self");
  assert.match(link, new RegExp(`^${process.pid}/task/\\d+$`));
  assert.ok(readdirSync("/proc/self/task").includes(String(native.ubd_gettid())));
});

test("ubd_io_flusher marks this thread, where that is permitted", () => {
  // PF_MEMALLOC_NOIO, in the flags behind the name, which may hold spaces.
  const isMarked = () => {
    const flags = readFileSync("/proc/thread-self/stat", "utf8").split(") ").pop()!.split(" ")[6];
    return (Number(flags) & 0x80000) !== 0;
  };
  const result = native.ubd_io_flusher(1);
  const { EPERM } = ERRNO;
  assert.ok(result === 0 || result === -EPERM, `${result}`);
  assert.strictEqual(isMarked(), result === 0);
  if (result < 0) return;
  assert.strictEqual(native.ubd_io_flusher(0), 1);
  assert.strictEqual(isMarked(), false);
});

test("queues and control rings leave no descriptor behind, refused ones included", () => {
  leavesNoDescriptor(() => {
    assert.strictEqual(tryQueue({}), 0);
    assert.strictEqual(tryQueue({ sqe128: true, depth: 64 }), 0);
    assert.strictEqual(tryQueue({ depth: 0 }), -EINVAL);
    assert.strictEqual(tryQueue({ charFd: 0x7fff }), -EINVAL);
    const control = shim.controlInit();
    assert.ok(typeof control !== "number");
    native.ubd_control_exit(control.handle);
  });
});

const fdLimit = Number(
  /^Max open files\s+(\d+)/m.exec(readFileSync("/proc/self/limits", "utf8"))?.[1] ?? Infinity,
);

test("queues up to the limit of handles are told apart and released again", {
  skip: fdLimit < 1200 ? `needs 1200 file descriptors, there may be ${fdLimit}` : false,
  timeout: 60_000,
}, () => {
  const before = openFds();
  const handles: number[] = [];
  let refused = 0;
  while (refused === 0) {
    assert.ok(handles.length <= 1024);
    const memory = shim.queueInit({ ...CONFIG, depth: 1 });
    if (typeof memory === "number") refused = memory;
    else handles.push(memory.handle);
  }
  assert.strictEqual(refused, -ENFILE);
  assert.strictEqual(handles.length, 1024);
  assert.strictEqual(new Set(handles).size, 1024);
  for (const handle of handles) assert.strictEqual(native.ubd_queue_exit(handle), 0);
  assert.strictEqual(openFds(), before);
  assert.strictEqual(tryQueue({}), 0);
});

test("layout() has the kernel's sizes and offsets of abi/", () => {
  const layouts: Layout[] = [
    ...[IO_URING_SQE, IO_URING_CQE, IO_URING_PARAMS],
    ...[UBLKSRV_CTRL_CMD, UBLKSRV_IO_CMD, UBLKSRV_IO_DESC, UBLK_BATCH_IO],
  ];
  const numbers = new Map(
    shim.layout().trimEnd().split("\n").map((line) => {
      const [name, value] = line.split(" ");
      return [name!, Number(value)];
    }),
  );
  for (const { name, size, fields } of layouts) {
    assert.strictEqual(numbers.get(name), size, name);
    const shared = Object.keys(fields).filter((field) => numbers.has(`${name}.${field}`));
    assert.ok(shared.length >= 3, name);
    for (const field of shared) {
      assert.strictEqual(numbers.get(`${name}.${field}`), fields[field]!.offset, field);
      numbers.delete(`${name}.${field}`);
    }
    numbers.delete(name);
  }
  // What the shim calls by a name of its own.
  assert.deepStrictEqual(Object.fromEntries(numbers), {
    "io_uring_sqe.op_flags": IO_URING_SQE.fields.rw_flags.offset,
    "io_uring_sqe.cmd": SQE_CMD_OFFSET,
  });
});

test("ubd_layout never writes behind the size it is given, and answers the size it needs", () => {
  const whole = new TextEncoder().encode(shim.layout());
  const small = new Uint8Array(64).fill(0xee);
  assert.strictEqual(native.ubd_layout(small, 10), whole.length);
  assert.deepStrictEqual(small.subarray(0, 10), whole.subarray(0, 10));
  assert.ok(small.subarray(10).every((byte) => byte === 0xee));
});

interface Elf {
  machine: number;
  /** Types of the program headers, and whether any maps memory both writable and executable. */
  segments: number[];
  writableCode: boolean;
  dynamicTags: bigint[];
  undefinedNames: string[];
  exportedNames: string[];
}

/** Reads what a dynamic linker reads of a 64-bit little-endian library. */
function readElf(bytes: Uint8Array): Elf {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const long = (at: number) => Number(view.getBigUint64(at, true));
  assert.strictEqual(view.getUint32(0), 0x7f454c46);
  assert.deepStrictEqual([bytes[4], bytes[5]], [2, 1], "64-bit, little-endian");
  const segments: number[] = [];
  let writableCode = false;
  for (let index = 0; index < view.getUint16(56, true); index++) {
    const at = long(32) + index * view.getUint16(54, true);
    segments.push(view.getUint32(at, true));
    if ((view.getUint32(at + 4, true) & 3) === 3) writableCode = true;
  }
  const sections = Array.from({ length: view.getUint16(60, true) }, (_, index) => {
    const at = long(40) + index * view.getUint16(58, true);
    const [type, link] = [view.getUint32(at + 4, true), view.getUint32(at + 40, true)];
    return { type, link, offset: long(at + 24), size: long(at + 32) };
  });
  const only = (type: number) => sections.find((section) => section.type === type)!;
  const [symbols, dynamic] = [only(11), only(6)];
  const strings = sections[symbols.link]!;
  const nameAt = (start: number) => {
    const from = strings.offset + start;
    return new TextDecoder().decode(bytes.subarray(from, bytes.indexOf(0, from)));
  };
  const dynamicTags: bigint[] = [];
  for (let at = dynamic.offset; at < dynamic.offset + dynamic.size; at += 16) {
    dynamicTags.push(view.getBigUint64(at, true));
  }
  const [undefinedNames, exportedNames]: [string[], string[]] = [[], []];
  for (let at = symbols.offset + 24; at < symbols.offset + symbols.size; at += 24) {
    const list = view.getUint16(at + 6, true) === 0 ? undefinedNames : exportedNames;
    list.push(nameAt(view.getUint32(at, true)));
  }
  return {
    machine: view.getUint16(18, true),
    ...{ segments, writableCode, dynamicTags, undefinedNames, exportedNames },
  };
}

for (const [name, machine] of [["x64", 62], ["arm64", 183]] as const) {
  test(`the ${name} library needs no other, and exports exactly SYMBOLS`, () => {
    const bytes = new Uint8Array(unpackBinary(SHIM_PACKED[name]));
    const elf = readElf(bytes);
    const [DT_NEEDED, DT_TEXTREL, PT_TLS, PT_INTERP] = [1n, 22n, 7, 3];
    assert.strictEqual(elf.machine, machine);
    assert.ok(!elf.dynamicTags.includes(DT_NEEDED));
    assert.ok(!elf.dynamicTags.includes(DT_TEXTREL));
    assert.ok(!elf.segments.includes(PT_TLS) && !elf.segments.includes(PT_INTERP));
    assert.ok(!elf.writableCode);
    assert.deepStrictEqual(elf.undefinedNames, []);
    assert.deepStrictEqual(elf.exportedNames.sort(), Object.keys(SYMBOLS).sort());
    assert.ok(bytes.length < 64 * 1024, `${bytes.length} bytes`);
  });
}

test("loadShim needs no directory: it loads from memory, also where TMPDIR is no place", () => {
  const saved = process.env.TMPDIR;
  const directory = mkdtempSync(join(tmpdir(), "ubd-load-"));
  utimesSync(directory, 1, 1);
  try {
    for (const place of [directory, "/nonexistent", "/dev/null"]) {
      process.env.TMPDIR = place;
      const { path, native } = loadShim(adapter); // A Shim takes what its thread has.
      assert.strictEqual(native.ubd_version(), SHIM_VERSION);
      assert.match(readlinkSync(path), /^\/memfd:ubd-shim/);
    }
    // Nothing was there for a moment either.
    assert.strictEqual(statSync(directory).mtimeMs, 1000);
  } finally {
    if (saved === undefined) delete process.env.TMPDIR;
    else process.env.TMPDIR = saved;
    rmSync(directory, { recursive: true });
  }
});

const mayMount = spawnSync("unshare", ["--mount", "true"]).status === 0;

test("a thread that leaves its mounts comes back to them, root and working directory too", {
  skip: mayMount ? false : "needs the right to mount a file system",
}, () => {
  const here = () => ["ns/mnt", "root", "cwd"].map((it) => readlinkSync(`/proc/thread-self/${it}`));
  const [before, cwd] = [here(), process.cwd()];
  const mounts = () => readFileSync("/proc/thread-self/mountinfo", "utf8");
  for (const copy of [1, 0]) {
    leavesNoDescriptor(() => {
      const left = new Int32Array(3);
      assert.strictEqual(native.ubd_leave_mounts(left, copy), 0);
      const away = here();
      assert.notStrictEqual(away[0], before[0]);
      assert.deepStrictEqual(away.slice(1), before.slice(1));
      assert.doesNotMatch(mounts(), / shared:/);
      assert.strictEqual(mounts() !== "", copy === 1);
      assert.strictEqual(native.ubd_rejoin_mounts(left), 0);
      assert.deepStrictEqual(here(), before);
      assert.notStrictEqual(mounts(), "");
    });
    assert.strictEqual(process.cwd(), cwd);
  }
  const none = NULL as unknown as Int32Array<ArrayBuffer>;
  assert.strictEqual(native.ubd_leave_mounts(none, 1), -EINVAL);
  assert.strictEqual(native.ubd_rejoin_mounts(new Int32Array([-1, -1, -1])), -EBADF);
});

test("where a thread has no mounts, what is mounted later is seen, and goes as if nobody looked", {
  skip: mayMount ? false : "needs the right to mount a file system",
}, () => {
  const directory = mkdtempSync(join(tmpdir(), "ubd-mount-"));
  const left = new Int32Array(3);
  assert.strictEqual(native.ubd_leave_mounts(left, 0), 0);
  const child = spawn("sh", ["-c", `read line; ls ${directory}`], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  native.ubd_rejoin_mounts(left);
  execFileSync("mount", ["-t", "tmpfs", "tmpfs", directory]);
  writeFileSync(join(directory, "late"), "");
  return new Promise<void>((resolve, reject) => {
    let seen = "";
    child.stdout.on("data", (data) => seen += data);
    child.stdin.write("go\n");
    child.on("close", () => {
      try {
        execFileSync("umount", [directory]); // Not lazily.
        rmSync(directory, { recursive: true });
        assert.strictEqual(seen, "late\n");
        resolve();
      } catch (error) {
        reject(error);
      }
    });
  });
});

test("loadShim says why it cannot load, and keeps no descriptor", () => {
  const load: Adapter["load"] = (path, table) => {
    if (path.startsWith("/proc/self/fd/")) throw new Error("failed to map segment");
    return adapter.load(path, table);
  };
  leavesNoDescriptor(() => {
    const expected = { message: "Cannot load the ubd shim: failed to map segment" };
    assert.throws(() => loadShim({ ...adapter, load }), expected);
  });
});

test("loadShim does without a seal that the kernel does not know, and says when all is refused", () => {
  const asked: number[] = [];
  const pretend = (known: number): Adapter["load"] => (path, table) => {
    const library = adapter.load(path, table) as Record<string, (...args: unknown[]) => number>;
    if (!("memfd_create" in table)) return library as never;
    const memfd_create = (name: unknown, flags: number) => {
      asked.push(flags);
      return flags & ~known ? -1 : library.memfd_create!(name, flags);
    };
    return { ...library, close: library.close!, memfd_create } as never;
  };
  leavesNoDescriptor(() => {
    const { native, path } = loadShim({ ...adapter, load: pretend(1) });
    assert.strictEqual(native.ubd_version(), SHIM_VERSION);
    closeSync(Number(path.split("/").at(-1)));
    const expected = { message: "Cannot load the ubd shim: memfd_create is refused" };
    assert.throws(() => loadShim({ ...adapter, load: pretend(0) }), expected);
  });
  assert.deepStrictEqual(asked.slice(0, 4), [9, 1, 9, 1]);
});

test("loadShim refuses a library of another version", () => {
  const load: Adapter["load"] = (path, table) =>
    "ubd_version" in table ? { ubd_version: () => 999 } as never : adapter.load(path, table);
  assert.throws(() => loadShim({ ...adapter, load }), /version 999 where \d+ is needed/);
});

test("loadShim with a known path loads the same mapping again", () => {
  const again = new Shim(shim.path);
  assert.strictEqual(again.path, shim.path);
  const memory = shim.queueInit(CONFIG);
  assert.ok(typeof memory !== "number");
  const address = native.ubd_queue_address(memory.handle, 0);
  assert.strictEqual(again.native.ubd_queue_address(memory.handle, 0), address);
  assert.strictEqual(again.native.ubd_queue_exit(memory.handle), 0);
  assert.strictEqual(native.ubd_queue_exit(memory.handle), -EBADF);
});

test("the program that udev runs fails for what is no device of a user", () => {
  const directory = mkdtempSync(join(tmpdir(), "ubd-owner-"));
  try {
    const program = join(directory, "ubd-owner");
    const bytes = unpackBinary(OWNER_PACKED[arch() as keyof typeof OWNER_PACKED]);
    writeFileSync(program, bytes, { mode: 0o700 });
    for (const args of [["ublkc1048575"], ["ublkb1048575p1"], ["ublkc"], ["sda"], [""], []]) {
      const { status, signal, stdout } = spawnSync(program, args, { encoding: "utf8" });
      assert.deepStrictEqual({ status, signal, stdout }, { status: 1, signal: null, stdout: "" });
    }
  } finally {
    rmSync(directory, { recursive: true });
  }
});

test("ubd_narrow_affinity keeps to CPUs that the thread has, and never leaves it none", () => {
  const cpus = () =>
    /^Cpus_allowed_list:\s*(.*)$/m
      .exec(readFileSync(`/proc/self/task/${native.ubd_gettid()}/status`, "utf8"))![1]!;
  const before = cpus();
  assert.strictEqual(shim.narrowAffinity([]), 0);
  assert.strictEqual(shim.narrowAffinity([8191]), 0);
  assert.strictEqual(cpus(), before, "no CPU is left: nothing changes");
  assert.strictEqual(shim.narrowAffinity(Array.from({ length: 8192 }, (_, cpu) => cpu)), 0);
  assert.strictEqual(cpus(), before);
  assert.strictEqual(native.ubd_narrow_affinity(NULL), -EINVAL);
});

test("a library is built for this machine", () => {
  assert.ok(Object.keys(SHIM_PACKED).includes(arch()));
});
