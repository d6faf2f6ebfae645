// SPDX-License-Identifier: MIT
/**
 * targets/loop.ts on real files, over a real ring without a driver (see block_layer.ts).
 *
 * Needs io_uring, and in the temporary directory a file system that punches holes.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { crc32 } from "node:zlib";
import { execFileSync } from "node:child_process";
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statfsSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import fc from "fast-check";
import { ERRNO } from "../../abi/errno.ts";
import { RWF_DSYNC } from "../../abi/io_uring.ts";
import {
  UBLK_IO_F_FUA,
  UBLK_IO_F_NOUNMAP,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../../abi/ublk_cmd.ts";
import { UblkError, UsageError } from "../../core/error.ts";
import type { Gaps } from "../../core/gaps.ts";
import type { OpenTarget } from "../../core/target.ts";
import {
  COMMAND_FALLOCATE,
  COMMAND_FSYNC,
  COMMAND_WRITE,
  COMMAND_WRITE_ZEROES,
  type ZeroCopyConfig,
} from "../../ffi/mod.ts";
import { concatTarget, stripeTarget } from "../../targets/concat.ts";
import type { FilesSpec } from "../../targets/files.ts";
import { loopTarget } from "../../targets/loop.ts";
import {
  type Answer,
  type BlockLayer,
  IO_BYTES,
  type Request,
  type ServeOptions,
  serveVolume,
  shim,
} from "./block_layer.ts";

const { EIO, EAGAIN, EINTR, ENOSPC, EOPNOTSUPP } = ERRNO;
const [READ, WRITE, FLUSH] = [UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_FLUSH];
const [DISCARD, WRITE_ZEROES] = [UBLK_IO_OP_DISCARD, UBLK_IO_OP_WRITE_ZEROES];
const directory = mkdtempSync(join(tmpdir(), "ubd-loop-"));
after(() => rmSync(directory, { recursive: true, force: true }));

const CONTEXT = { shim, hasVolatileCache: true };

interface LoopServeOptions extends ServeOptions {
  /** The device's size by now. */
  deviceBytes?: number;
}

/** Has `requests` served by a volume made from `spec`. */
function serveSpec(spec: unknown, requests: Request[], options: LoopServeOptions = {}): BlockLayer {
  const context = {
    depth: options.depth ?? 1,
    ioBytesMax: IO_BYTES,
    log: () => {},
    deviceBytes: () => options.deviceBytes,
  };
  return serveVolume(loopTarget.volume(spec as FilesSpec, context), requests, options);
}

function serve(target: OpenTarget, requests: Request[], options?: LoopServeOptions): Answer[] {
  return serveSpec(target.spec, requests, options).answers;
}

const results = (answers: Answer[]) => answers.map(({ result }) => result);

let images = 0;

/** A file of these bytes, or of this many bytes that differ from sector to sector. */
function image(content: number | Uint8Array, folder = directory): string {
  const path = join(folder, `${++images}.img`);
  writeFileSync(path, typeof content === "number" ? pattern(content) : content);
  return path;
}

function pattern(bytes: number): Buffer {
  const sectors = Array.from({ length: Math.ceil(bytes / 512) }, (_, index) => 1 + index % 250);
  return Buffer.from(sectors.flatMap((value) => new Array(512).fill(value))).subarray(0, bytes);
}

type Options = Omit<Parameters<typeof loopTarget.open>[0], "file">;

/** Opens `file`, does the work, closes it. */
function withTarget<T>(file: string, options: Options, work: (target: OpenTarget) => T): T {
  const target = loopTarget.open({ file, ...options }, CONTEXT);
  try {
    return work(target);
  } finally {
    target.close();
  }
}

const REGISTERED: ZeroCopyConfig = { automatic: false, registerOpcode: 0, unregisterOpcode: 0 };
const AUTOMATIC: ZeroCopyConfig = { ...REGISTERED, automatic: true };

/** With zero copy, a tag's registered buffer is the memory that `BlockLayer` fills and looks at. */
const MODES: [string, Options, ZeroCopyConfig?][] = [
  ["direct", {}],
  ["buffered", { buffered: true }],
  ["direct, zero copy", {}, AUTOMATIC],
  ["buffered, zero copy", { buffered: true }, AUTOMATIC],
  ["direct, registered", {}, REGISTERED],
];

for (const [mode, options, zeroCopy] of MODES) {
  test(`loop (${mode}) reads the file's bytes and writes them, nothing beside them`, () => {
    const file = image(65536);
    const expected = pattern(65536);
    const data = new Uint8Array(1536).fill(0xab);
    const answers = withTarget(file, options, (target) =>
      serve(target, [
        { op: READ, sector: 3, sectors: 5 },
        { op: WRITE, sector: 4, sectors: 3, data },
        { op: READ, sector: 0, sectors: 128 },
      ], { zeroCopy }));
    assert.deepStrictEqual(results(answers), [2560, 1536, 65536]);
    assert.deepStrictEqual(Buffer.from(answers[0]!.data), expected.subarray(1536, 4096));
    expected.fill(0xab, 2048, 3584);
    assert.deepStrictEqual(Buffer.from(answers[2]!.data), expected);
    assert.deepStrictEqual(readFileSync(file), expected);
  });

  test(`loop (${mode}) shows zeroes behind an odd end, and grows the file when it is written`, () => {
    const file = image(4096 + 100);
    withTarget(file, options, (target) => {
      assert.strictEqual(target.limits.sizeBytes, 4096 + 512);
      const [answer] = serve(target, [{ op: READ, sector: 7, sectors: 2 }], { zeroCopy });
      const expected = Buffer.alloc(1024);
      pattern(4096 + 100).copy(expected, 0, 3584);
      assert.strictEqual(answer!.result, 1024);
      assert.deepStrictEqual(Buffer.from(answer!.data), expected);
      assert.strictEqual(statSync(file).size, 4196);
      const data = new Uint8Array(512).fill(0xcd);
      assert.deepStrictEqual(
        results(serve(target, [{ op: WRITE, sector: 8, sectors: 1, data }], { zeroCopy })),
        [512],
      );
    });
    const bytes = readFileSync(file);
    assert.strictEqual(bytes.length, 4608);
    assert.ok(bytes.subarray(4096).every((byte) => byte === 0xcd));
  });

  test(`loop (${mode}) fails reads behind the end of a file that was cut short`, () => {
    const file = image(16384);
    withTarget(file, options, (target) => {
      truncateSync(file, 8192);
      const logs: string[] = [];
      const answers = serve(target, [
        { op: READ, sector: 20, sectors: 4 },
        { op: READ, sector: 12, sectors: 8 },
        { op: READ, sector: 8, sectors: 8 },
      ], { logs, zeroCopy });
      assert.deepStrictEqual(results(answers), [-EIO, -EIO, 4096]);
      assert.match(logs[0]!, /was cut short while in use/);
    });
  });

  test(`loop (${mode}) knows the end of a device that was resized since`, () => {
    const file = image(4096 + 100);
    withTarget(file, options, (target) => {
      const read = { op: READ, sector: 8, sectors: 1 };
      const last = { op: READ, sector: 7, sectors: 1 };
      for (const [fileBytes, result] of [[3600, 512], [3584, -EIO]] as const) {
        truncateSync(file, fileBytes);
        assert.deepStrictEqual(results(serve(target, [last], { deviceBytes: 4096 })), [result]);
      }
      writeFileSync(file, pattern(8192 + 100));
      const grown = serve(target, [
        { op: READ, sector: 15, sectors: 2 },
        { op: READ, sector: 7, sectors: 4 },
      ], { deviceBytes: 8192 + 512 });
      assert.deepStrictEqual(results(grown), [1024, 2048]);
      const expected = Buffer.alloc(1024);
      pattern(8192 + 100).copy(expected, 0, 15 * 512);
      assert.deepStrictEqual(Buffer.from(grown[0]!.data), expected);
      truncateSync(file, 4096 + 300);
      const cut = serve(target, [read], { deviceBytes: 8192 + 512 });
      assert.deepStrictEqual(results(cut), [-EIO]);
    });
  });

  test(`loop (${mode}) is a buffer: random requests leave what they leave in memory`, {
    timeout: 60_000,
  }, () => {
    const sectors = 256;
    const extent = fc.tuple(fc.nat({ max: sectors - 1 }), fc.integer({ min: 1, max: 64 }))
      .map(([sector, wanted]) => ({ sector, sectors: Math.min(wanted, sectors - sector) }));
    const kind = fc.constantFrom<[number, number]>(
      [READ, 0],
      [WRITE, 0],
      [WRITE, UBLK_IO_F_FUA],
      [WRITE_ZEROES, 0],
      [WRITE_ZEROES, UBLK_IO_F_NOUNMAP],
      [DISCARD, 0],
    );
    const step = fc.tuple(kind, extent, fc.integer({ min: 1, max: 255 }));
    fc.assert(
      fc.property(fc.array(step, { minLength: 1, maxLength: 40 }), (steps) => {
        const model = pattern(sectors * 512);
        const file = image(model);
        const reads: Buffer[] = [];
        const requests = steps.map(([[op, flags], { sector, sectors }, value]): Request => {
          const [from, to] = [sector * 512, (sector + sectors) * 512];
          if (op === READ) reads.push(Buffer.from(model.subarray(from, to)));
          else model.fill(op === WRITE ? value : 0, from, to);
          const data = new Uint8Array(op === WRITE ? sectors * 512 : 0).fill(value);
          return { op, flags, sector, sectors, data };
        });
        const answers = withTarget(
          file,
          options,
          (target) => serve(target, requests, { zeroCopy }),
        );
        for (const [index, { op, sectors }] of requests.entries()) {
          const bytes = op === READ || op === WRITE ? sectors! * 512 : 0;
          assert.strictEqual(answers[index]!.result, bytes);
          if (op === READ) assert.ok(reads.shift()!.equals(answers[index]!.data));
        }
        assert.ok(readFileSync(file).equals(model));
        rmSync(file);
      }),
      { numRuns: 25 },
    );
  });
}

test("loop serves many tags at once", () => {
  const file = image(1024 * 512);
  const requests = Array.from({ length: 512 }, (_, index): Request => {
    const sector = index * 2;
    return index % 2
      ? { op: READ, sector, sectors: 2 }
      : { op: WRITE, sector, sectors: 2, data: new Uint8Array(1024).fill(index >> 1) };
  });
  const expected = pattern(1024 * 512);
  const answers = withTarget(file, {}, (target) => serve(target, requests, { depth: 32 }));
  for (const [index, { result, data }] of answers.entries()) {
    assert.strictEqual(result, 1024);
    const from = index * 1024;
    if (index % 2) assert.ok(expected.subarray(from, from + 1024).equals(data), `read ${index}`);
    else expected.fill(index >> 1, from, from + 1024);
  }
  assert.ok(readFileSync(file).equals(expected));
});

/** The file commands that `requests` lead to. */
function commandsOf(requests: Request[], gaps?: Gaps): [number, number][] {
  const layer = withTarget(image(65536), {}, ({ spec }) => serveSpec(spec, requests, { gaps }));
  assert.ok(layer.answers.every(({ result }) => result >= 0));
  return layer.fileCommands;
}

const DURABILITY: Request[] = [
  { op: FLUSH },
  { op: WRITE, sectors: 1, data: new Uint8Array(512) },
  { op: WRITE, sectors: 1, flags: UBLK_IO_F_FUA, data: new Uint8Array(512) },
  { op: WRITE_ZEROES, sectors: 8 },
  { op: WRITE_ZEROES, sectors: 8, flags: UBLK_IO_F_FUA },
];

test("loop makes durable what FLUSH and FUA ask for: fdatasync, and RWF_DSYNC", () => {
  assert.deepStrictEqual(commandsOf(DURABILITY), [
    [COMMAND_FSYNC, 1],
    [COMMAND_WRITE, 0],
    [COMMAND_WRITE, RWF_DSYNC],
    [COMMAND_FALLOCATE, 3],
    [COMMAND_FALLOCATE, 3],
    [COMMAND_FSYNC, 1],
  ]);
});

test("loop makes every change durable where the driver has no FLUSH", () => {
  assert.deepStrictEqual(commandsOf(DURABILITY, { durability: true, rest: false, refused: [] }), [
    [COMMAND_FSYNC, 1],
    [COMMAND_WRITE, RWF_DSYNC],
    [COMMAND_WRITE, RWF_DSYNC],
    [COMMAND_FALLOCATE, 3],
    [COMMAND_FSYNC, 1],
    [COMMAND_FALLOCATE, 3],
    [COMMAND_FSYNC, 1],
  ]);
});

/** Sectors that the file system has given to a file of 1 MiB after one request for its half. */
function afterwards(op: number, flags = 0): { blocks: number; zeroed: boolean; discard: number } {
  const file = image(1024 * 1024);
  const discard = withTarget(file, {}, (target) => {
    const [answer] = serve(target, [{ op, flags, sector: 0, sectors: 1024 }, { op: FLUSH }]);
    assert.strictEqual(answer!.result, 0);
    return target.limits.discardBytes;
  });
  const bytes = readFileSync(file);
  assert.strictEqual(bytes.length, 1024 * 1024);
  assert.ok(bytes.subarray(524288).equals(pattern(1024 * 1024).subarray(524288)));
  const zeroed = bytes.subarray(0, 524288).every((byte) => byte === 0);
  return { blocks: statSync(file).blocks, zeroed, discard };
}

test("loop punches holes for DISCARD and WRITE_ZEROES, and keeps blocks with NOUNMAP", () => {
  const discarded = afterwards(DISCARD);
  assert.strictEqual(discarded.discard, 4096, "this file system punches no holes");
  assert.ok(discarded.zeroed && discarded.blocks <= 1040, JSON.stringify(discarded));
  const zeroed = afterwards(WRITE_ZEROES);
  assert.ok(zeroed.zeroed && zeroed.blocks <= 1040, JSON.stringify(zeroed));
  const kept = afterwards(WRITE_ZEROES, UBLK_IO_F_NOUNMAP);
  assert.ok(kept.zeroed && kept.blocks >= 2048, JSON.stringify(kept));
});

const TMPFS_MAGIC = 0x01021994;
const hasTmpfs = existsSync("/dev/shm") && statfsSync("/dev/shm").type === TMPFS_MAGIC;

test("loop writes zeroes itself where the file system cannot (NOUNMAP on tmpfs)", {
  skip: hasTmpfs ? false : "/dev/shm is no tmpfs",
}, () => {
  const folder = mkdtempSync("/dev/shm/ubd-loop-");
  try {
    const file = image(512 * 1024, folder);
    const expected = pattern(512 * 1024);
    const flags = UBLK_IO_F_NOUNMAP | UBLK_IO_F_FUA;
    const layer = withTarget(file, {}, (target) =>
      // Longer than a buffer, so in several writes.
      serveSpec(target.spec, [{ op: WRITE_ZEROES, flags, sector: 1, sectors: 400 }]));
    assert.deepStrictEqual(results(layer.answers), [0]);
    assert.deepStrictEqual(
      layer.fileCommands.map(([op]) => op),
      [COMMAND_FALLOCATE, ...new Array(4).fill(COMMAND_WRITE_ZEROES), COMMAND_FSYNC],
    );
    assert.ok(readFileSync(file).equals(expected.fill(0, 512, 401 * 512)));
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("loop serves a window of the file and never leaves it", () => {
  const file = image(65536);
  const expected = pattern(65536);
  const options = { offsetBytes: 4096, sizeBytes: 8192 };
  const answers = withTarget(file, options, (target) => {
    assert.strictEqual(target.limits.sizeBytes, 8192);
    return serve(target, [
      { op: READ, sector: 0, sectors: 16 },
      { op: WRITE, sector: 15, sectors: 1, data: new Uint8Array(512).fill(0xab) },
      { op: WRITE_ZEROES, sector: 0, sectors: 8 },
    ]);
  });
  assert.deepStrictEqual(results(answers), [8192, 512, 0]);
  assert.ok(expected.subarray(4096, 12288).equals(answers[0]!.data));
  expected.fill(0xab, 4096 + 15 * 512, 12288).fill(0, 4096, 8192);
  assert.ok(readFileSync(file).equals(expected));
});

for (const zeroCopy of [undefined, AUTOMATIC]) {
  test(`loop goes on after short reads and writes${zeroCopy ? ", zero copy" : ""}`, () => {
    const file = image(16384);
    const shorten = (result: number) => result > 512 ? 512 : result;
    const data = Uint8Array.from({ length: 4096 }, (_, index) => index % 251);
    const answers = withTarget(file, {}, (target) =>
      serve(target, [
        { op: READ, sector: 0, sectors: 32 },
        { op: WRITE, sector: 8, sectors: 8, data },
      ], { onResult: shorten, zeroCopy }));
    assert.deepStrictEqual(results(answers), [16384, 4096]);
    assert.ok(pattern(16384).equals(answers[0]!.data));
    const expected = pattern(16384);
    expected.set(data, 4096);
    assert.ok(readFileSync(file).equals(expected));
  });
}

test("loop offers zero copy, with direct I/O's alignment", () => {
  const offer = (options: Options) => withTarget(image(8192), options, ({ zeroCopy }) => zeroCopy);
  assert.deepStrictEqual(offer({ buffered: true }), { memoryAlignBytes: 1 });
  const direct = offer({});
  assert.ok(direct && "memoryAlignBytes" in direct);
  assert.ok([1, 512, 1024, 2048, 4096].includes(direct.memoryAlignBytes));
});

test("loop tries again after EINTR and EAGAIN, and gives up with EIO", () => {
  const file = image(16384);
  withTarget(file, {}, (target) => {
    let left = 3;
    const twice = (result: number) => left-- > 0 ? left === 0 ? -EINTR : -EAGAIN : result;
    const request = { op: READ, sector: 1, sectors: 1 };
    const layer = serveSpec(target.spec, [request], { onResult: twice });
    assert.deepStrictEqual(results(layer.answers), [512]);
    assert.strictEqual(layer.fileCommands.length, 4);
    assert.deepStrictEqual(
      results(serve(target, [request, { op: FLUSH }], { onResult: () => -EAGAIN })),
      [-EIO, -EIO],
    );
  });
});

test("loop measures its file as it is now, beside the server that has locked it", () => {
  const file = image(4096 + 100);
  withTarget(file, {}, () => {
    const measure = (sizeBytes?: number) =>
      loopTarget.measure({ file, ...(sizeBytes !== undefined && { sizeBytes }) }, CONTEXT);
    assert.strictEqual(measure(), 4096 + 512);
    assert.strictEqual(measure(4096 + 512), 4096 + 512);
    assert.throws(() => measure(8192), /has 4196 bytes.*truncate -s 8192/);
    assert.throws(() => measure(0), UsageError);
    assert.throws(() => measure(1000), /multiple of 512/);
    truncateSync(file, 8192);
    assert.strictEqual(measure(), 8192);
  });
});

test("loop passes on the backing's error, and says so", () => {
  const full = shim.open("/dev/full", 2);
  const bytes = 1 << 20;
  const spec = {
    files: [{ fd: full, offsetBytes: 0, sizeBytes: bytes, endBytes: bytes }],
    chunkBytes: 0,
    blockBytes: 512,
  };
  const logs: string[] = [];
  const requests = [{ op: WRITE, sectors: 8, data: new Uint8Array(4096) }, { op: FLUSH }];
  const { answers } = serveSpec(spec, requests, { logs });
  shim.native.ubd_close(full);
  assert.deepStrictEqual(results(answers), [-ENOSPC, -ERRNO.EINVAL]);
  assert.strictEqual(logs[0], "WRITE on /dev/full fails: ENOSPC");
});

test("loop answers EOPNOTSUPP for an operation that it does not know", () => {
  withTarget(image(4096), {}, (target) => {
    assert.deepStrictEqual(results(serve(target, [{ op: 10 }, { op: 255 }])), [
      -EOPNOTSUPP,
      -EOPNOTSUPP,
    ]);
  });
});

/** How many descriptors of this process are of `file`. */
function descriptorsOf(file: string): number {
  return readdirSync("/proc/self/fd").filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`) === file;
    } catch {
      return false; // The listing's own, closed by now.
    }
  }).length;
}

/** Opening must fail this way, and keep nothing open. */
function mistake(file: string, options: Options, expected: string, message: RegExp): void {
  const before = descriptorsOf(file);
  assert.throws(
    () => loopTarget.open({ file, ...options }, CONTEXT),
    (error) => {
      const kind = error instanceof UblkError
        ? error.errno
        : error instanceof UsageError
        ? "usage"
        : String(error);
      assert.strictEqual(kind, expected);
      assert.match((error as Error).message, message);
      return true;
    },
    message.source,
  );
  assert.strictEqual(descriptorsOf(file), before, `${message.source}: a descriptor is left`);
}

test("loop's open refuses what is no image", () => {
  mistake(directory, {}, "EISDIR", /^Cannot open .*name a file in it/);
  mistake(join(directory, "absent"), {}, "ENOENT", /^Cannot open .*truncate -s 1G FILE/);
  mistake(image(0), {}, "usage", /it is empty/);
  mistake(image(511), {}, "usage", /511 bytes from offset 0 are less than a sector/);
  mistake("/dev/null", {}, "usage", /neither a regular file nor a block device/);
  const fifo = join(directory, "fifo");
  execFileSync("mkfifo", [fifo]);
  mistake(fifo, {}, "usage", /neither a regular file nor a block device/);
});

test("loop's open refuses windows that are not there, and takes the last one that is", () => {
  const file = image(8192);
  mistake(file, { offsetBytes: 8192 }, "usage", /^Offset 8192: .* ends at 8192 bytes/);
  mistake(file, { offsetBytes: 16384 }, "usage", /^Offset 16384: .* ends at 8192 bytes/);
  mistake(file, { sizeBytes: 8704 }, "usage", /^Size 8704: .* has 8192 bytes from offset 0/);
  mistake(file, { offsetBytes: 512, sizeBytes: 8192 }, "usage", /^Size 8192: .* 7680 bytes/);
  mistake(file, { sizeBytes: 1000 }, "usage", /^Size 1000: it must be a multiple of 512/);
  const last = { offsetBytes: 7680, sizeBytes: 512 };
  assert.strictEqual(withTarget(file, last, ({ limits }) => limits.sizeBytes), 512);
  assert.strictEqual(withTarget(image(512), {}, ({ limits }) => limits.sizeBytes), 512);
});

test("loop's open takes one writer or many readers, unless forced", () => {
  const file = image(4096);
  withTarget(file, {}, () => {
    mistake(file, {}, "EBUSY", /^Cannot lock .*--force/);
    mistake(file, { readOnly: true }, "EBUSY", /^Cannot lock /);
    withTarget(file, { force: true }, () => {});
  });
  withTarget(file, { readOnly: true }, () => {
    withTarget(file, { readOnly: true }, () => {});
    mistake(file, {}, "EBUSY", /^Cannot lock /);
  });
  withTarget(file, {}, () => {}); // Closing has released the lock.
});

test("loop's open of a read-only target can neither write nor discard", () => {
  const file = image(4096);
  withTarget(file, { readOnly: true }, (target) => {
    assert.deepStrictEqual(
      [target.limits.readOnly, target.limits.volatileCache, target.limits.discardBytes],
      [true, false, 0],
    );
    const data = new Uint8Array(512);
    const [answer] = serve(target, [{ op: WRITE, sectors: 1, data }]);
    assert.strictEqual(answer!.result, -ERRNO.EBADF);
  });
  assert.ok(readFileSync(file).equals(pattern(4096)));
});

test("loop's open says why I/O is buffered", () => {
  const file = image(4096);
  withTarget(file, { buffered: true }, ({ notes, facts }) => {
    assert.deepStrictEqual([notes, facts.direct_io], [["buffered I/O: as asked"], 0]);
  });
  withTarget(file, {}, ({ notes, facts }) => {
    assert.match(notes[0]!, facts.direct_io ? /^direct I\/O$/ : /^buffered I\/O: ./);
  });
});

test("loop starts at any byte, as losetup does: buffered, and it says why", () => {
  const file = image(65536);
  const expected = pattern(65536);
  for (const offsetBytes of [1, 100, 511, 1537]) {
    withTarget(file, { offsetBytes }, (target) => {
      const { notes, facts, limits } = target;
      assert.strictEqual(limits.sizeBytes, Math.ceil((65536 - offsetBytes) / 512) * 512);
      assert.ok(notes.includes("buffered I/O: the offset is no multiple of 512"), notes.join());
      assert.deepStrictEqual([facts.offset, facts.offset_bytes], [undefined, offsetBytes]);
      const data = new Uint8Array(1024).fill(offsetBytes & 0xff);
      const [read, write] = serve(target, [
        { op: READ, sector: 2, sectors: 8 },
        { op: WRITE, sector: 5, sectors: 2, data },
      ]);
      const from = offsetBytes + 1024;
      assert.deepStrictEqual(Buffer.from(read!.data), expected.subarray(from, from + 4096));
      assert.strictEqual(write!.result, 1024);
      expected.set(data, offsetBytes + 2560);
    });
    assert.deepStrictEqual(readFileSync(file), expected, `offset ${offsetBytes}`);
  }
  withTarget(file, { offsetBytes: 1536 }, ({ facts }) => assert.strictEqual(facts.offset, 3));
});

/** A GPT's beginning, for sectors of this size. */
function gpt(sectorBytes: number, bytes: number): Buffer {
  const disk = Buffer.alloc(bytes);
  disk.set([0, 0, 0, 0, 0xee, 0, 0, 0, 1, 0, 0, 0, 0xff], 446);
  disk.set([0x55, 0xaa], 510);
  const header = disk.subarray(sectorBytes, sectorBytes + 92);
  header.write("EFI PART");
  header.writeUInt32LE(92, 12);
  header.writeUInt32LE(1, 24);
  header.writeUInt32LE(crc32(header), 16);
  return disk;
}

test("loop, concat and stripe have the blocks that a partition table is for, and say so", () => {
  const chosen = (bytes: number) =>
    `blocks of ${bytes} bytes, which its GPT partition table is for`;
  const other = (table: number, blocks: number) =>
    `its GPT partition table is for sectors of ${table} bytes, so its partitions do not appear ` +
    `in blocks of ${blocks}: --block-size ${table}`;
  const of = (file: string, options: Options) =>
    withTarget(file, options, ({ limits, notes }) => ({
      blocks: limits.blockBytes,
      size: limits.sizeBytes,
      note: notes.find((note) => note.includes("partition table")),
    }));
  const size = 65536;
  for (const sectorBytes of [1024, 2048, 4096]) {
    const file = image(gpt(sectorBytes, size));
    assert.deepStrictEqual(of(file, {}), { blocks: sectorBytes, size, note: chosen(sectorBytes) });
    assert.strictEqual(of(file, { blockBytes: sectorBytes }).note, undefined);
    const asked = { blocks: 512, size, note: other(sectorBytes, 512) };
    assert.deepStrictEqual(of(file, { blockBytes: 512 }), asked);
    // A size that is no multiple works as it did; a file's end is rounded up.
    const sizeBytes = size - 512;
    assert.deepStrictEqual(of(file, { sizeBytes }), { ...asked, size: sizeBytes });
    const shifted = image(Buffer.concat([Buffer.alloc(512), gpt(sectorBytes, size + 512)]));
    const moved = of(shifted, { offsetBytes: 512 });
    assert.deepStrictEqual([moved.blocks, moved.note], [sectorBytes, chosen(sectorBytes)]);
    assert.strictEqual(moved.size % sectorBytes, 0);
  }
  const usual = image(gpt(512, size));
  assert.deepStrictEqual(of(usual, {}), { blocks: 512, size, note: undefined });
  assert.strictEqual(of(usual, { blockBytes: 4096 }).note, other(512, 4096));

  const disk = gpt(4096, size);
  const halves = [image(disk.subarray(0, 32768)), image(disk.subarray(32768))];
  // By turns of 4096 bytes: the header, in the second, is in the second file.
  const turns = [0, 4096].map((from) => {
    const chunks = Array.from({ length: 8 }, (_, turn) => turn * 8192 + from);
    return image(Buffer.concat(chunks.map((at) => disk.subarray(at, at + 4096))));
  });
  const odd = [halves[0]!, image(512)];
  const joined: [OpenTarget, number, string][] = [
    [concatTarget.open({ files: halves }, CONTEXT), 4096, chosen(4096)],
    [stripeTarget.open({ files: turns, chunkBytes: 4096 }, CONTEXT), 4096, chosen(4096)],
  ];
  for (const [target] of joined) target.close();
  joined.push([concatTarget.open({ files: odd }, CONTEXT), 512, other(4096, 512)]);
  joined.at(-1)![0].close();
  for (const [{ limits, notes }, blocks, note] of joined) {
    assert.strictEqual(limits.blockBytes, blocks);
    assert.ok(notes.includes(note), notes.join());
  }
});

test("loop's close leaves no descriptor", () => {
  const file = image(4096);
  for (const options of [{}, { buffered: true }, { readOnly: true }]) {
    withTarget(file, options, () => assert.strictEqual(descriptorsOf(file), 1));
  }
  assert.strictEqual(descriptorsOf(file), 0);
});

/** Joins files of these sizes; `work` gets the target, the files, and what the device holds. */
function withFiles(
  sizes: number[],
  chunkBytes: number,
  work: (target: OpenTarget, files: string[], model: () => Buffer) => void,
): void {
  const files = sizes.map((bytes) => image(bytes));
  const target = chunkBytes
    ? stripeTarget.open({ files, chunkBytes }, CONTEXT)
    : concatTarget.open({ files }, CONTEXT);
  try {
    work(target, files, () => {
      const contents = files.map((file) => readFileSync(file));
      if (chunkBytes === 0) return Buffer.concat(contents);
      const turns = Math.floor(Math.min(...sizes) / chunkBytes);
      return Buffer.concat(
        Array.from(
          { length: turns },
          (_, turn) =>
            contents.map((bytes) => bytes.subarray(turn * chunkBytes, (turn + 1) * chunkBytes)),
        ).flat(),
      );
    });
  } finally {
    target.close();
    for (const file of files) rmSync(file);
  }
}

for (const [name, chunkBytes] of [["concat", 0], ["stripe", 4096]] as const) {
  test(`${name} is a buffer: random requests leave what they leave in memory`, {
    timeout: 60_000,
  }, () => {
    const sizes = chunkBytes ? [36864, 40960, 32768] : [512, 40960, 1024, 32768];
    const sectors = chunkBytes ? 3 * 64 : 147;
    const request = fc.record({
      kind: fc.constantFrom<[number, number]>(
        [READ, 0],
        [WRITE, 0],
        [WRITE, UBLK_IO_F_FUA],
        [WRITE_ZEROES, UBLK_IO_F_FUA],
        [WRITE_ZEROES, UBLK_IO_F_NOUNMAP],
        [DISCARD, 0],
      ),
      from: fc.nat({ max: sectors - 1 }),
      length: fc.integer({ min: 1, max: 120 }),
      value: fc.integer({ min: 1, max: 255 }),
    });
    const requests = fc.array(request, { minLength: 1, maxLength: 25 });
    fc.assert(
      fc.property(requests, fc.boolean(), fc.boolean(), (steps, short, zeroCopy) => {
        withFiles(sizes, chunkBytes, ({ spec, limits }, _, contents) => {
          assert.strictEqual(limits.sizeBytes, sectors * 512);
          const model = Buffer.from(contents());
          const expected: Buffer[] = [];
          const asked = steps.map(({ kind: [op, flags], from, length, value }): Request => {
            const to = Math.min(from + length, sectors);
            const part = model.subarray(from * 512, to * 512);
            if (op !== READ) part.fill(op === WRITE ? value : 0);
            expected.push(Buffer.from(part));
            const data = new Uint8Array(op === WRITE ? part.length : 0).fill(value);
            return { op, flags, sector: from, sectors: to - from, data };
          });
          const cutShort = (result: number) => result > 512 ? 512 : result;
          const { answers } = serveSpec(spec, asked, {
            ...(short && { onResult: cutShort }),
            zeroCopy: zeroCopy ? AUTOMATIC : undefined,
          });
          for (const [index, { op }] of asked.entries()) {
            const bytes = op === READ || op === WRITE ? expected[index]!.length : 0;
            assert.strictEqual(answers[index]!.result, bytes);
            if (op === READ) assert.ok(expected[index]!.equals(answers[index]!.data));
          }
          assert.ok(contents().equals(model));
        });
      }),
      { numRuns: 12 },
    );
  });
}

test("stripe takes turns, chunk by chunk, and uses of each file what the smallest has", () => {
  withFiles([12288, 8192 + 512], 4096, ({ spec, limits, notes, facts }, files) => {
    assert.deepStrictEqual([limits.sizeBytes, limits.chunkBytes], [16384, 4096]);
    assert.deepStrictEqual(facts.backing_files, files);
    assert.deepStrictEqual(notes.slice(-2), [
      `the last 4096 bytes of ${files[0]} are not used`,
      `the last 512 bytes of ${files[1]} are not used`,
    ]);
    const writes = [0, 1, 2, 3].map((chunk): Request => {
      return { op: WRITE, sector: chunk * 8, sectors: 8, data: Buffer.alloc(4096, 65 + chunk) };
    });
    assert.deepStrictEqual(results(serveSpec(spec, writes).answers), [4096, 4096, 4096, 4096]);
    const letters = files.map((file) => {
      const bytes = readFileSync(file);
      return String.fromCharCode(bytes[0]!, bytes[4095]!, bytes[4096]!, bytes[8191]!);
    });
    assert.deepStrictEqual(letters, ["AACC", "BBDD"]);
    assert.ok(readFileSync(files[0]!).subarray(8192).equals(pattern(12288).subarray(8192)));
  });
});

test("stripe and concat flush every file, and free each file's part in one piece", () => {
  for (const chunkBytes of [0, 4096]) {
    withFiles([65536, 65536, 65536], chunkBytes, ({ spec }) => {
      const commands = (request: Request) => {
        const { answers, fileCommands } = serveSpec(spec, [request]);
        assert.ok(answers.every(({ result }) => result >= 0));
        return fileCommands.map(([op]) => op);
      };
      const everywhere = { sector: 8, sectors: 368 };
      const syncs = [COMMAND_FSYNC, COMMAND_FSYNC, COMMAND_FSYNC];
      const frees = [COMMAND_FALLOCATE, COMMAND_FALLOCATE, COMMAND_FALLOCATE];
      assert.deepStrictEqual(commands({ op: FLUSH }), syncs);
      assert.deepStrictEqual(commands({ op: DISCARD, ...everywhere }), frees);
      const flags = UBLK_IO_F_FUA;
      assert.deepStrictEqual(commands({ op: WRITE_ZEROES, flags, ...everywhere }), [
        ...frees,
        ...syncs,
      ]);
      // What is on one file alone leaves the others alone.
      assert.deepStrictEqual(commands({ op: DISCARD, sector: 136, sectors: 1 }), frees.slice(2));
    });
  }
});

test("stripe and concat pass on an error with the name of the file, a failed FLUSH too", () => {
  withFiles([4096, 4096], 0, (target) => {
    const spec = target.spec as FilesSpec;
    const full = shim.open("/dev/full", 2);
    const broken = { ...spec, files: [spec.files[0]!, { ...spec.files[1]!, fd: full }] };
    const logs: string[] = [];
    const data = new Uint8Array(4096);
    const { answers } = serveSpec(broken, [
      { op: WRITE, sector: 0, sectors: 8, data },
      { op: WRITE, sector: 4, sectors: 8, data },
      { op: FLUSH },
    ], { logs });
    shim.native.ubd_close(full);
    assert.deepStrictEqual(results(answers), [4096, -ENOSPC, -ERRNO.EINVAL]);
    assert.deepStrictEqual(logs, [
      "WRITE on /dev/full fails: ENOSPC",
      "FLUSH on /dev/full fails: EINVAL",
    ]);
  });
});

test("stripe and concat refuse files that cannot be joined, and keep nothing open", () => {
  const [good, odd, small] = [image(65536), image(65537), image(4096)];
  const refused = (open: () => unknown, message: RegExp) => {
    assert.throws(open, message);
    for (const file of [good, odd, small]) assert.strictEqual(descriptorsOf(file), 0, `${message}`);
  };
  const concat = (files: string[], more = {}) => () =>
    concatTarget.open({ files, ...more }, CONTEXT);
  const stripe = (files: string[], more = {}) => () =>
    stripeTarget.open({ files, ...more }, CONTEXT);
  refused(concat([good, odd]), /^UsageError: Cannot join .*65537 bytes .*truncate -s %512/);
  refused(concat([good, good]), /^UblkError: Cannot lock /);
  refused(concat([good, join(directory, "absent")]), /ENOENT/);
  refused(stripe([good, small]), /^UsageError: Chunk 65536: the smallest file has 4096 bytes/);
  for (const chunkBytes of [0, 2048, 12288, 2 ** 31]) {
    refused(stripe([good, small], { chunkBytes }), /^UsageError: Chunk \d+: .* power of two/);
  }
  const readOnly = concatTarget.open({ files: [good, good], readOnly: true }, CONTEXT);
  assert.deepStrictEqual(
    [readOnly.limits.readOnly, readOnly.limits.volatileCache, readOnly.limits.discardBytes],
    [true, false, 0],
  );
  readOnly.close();
  assert.strictEqual(descriptorsOf(good), 0);
  assert.throws(
    () => concatTarget.measure({ files: [good] }, CONTEXT),
    /Cannot resize: EOPNOTSUPP/,
  );
});
