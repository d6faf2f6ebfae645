// SPDX-License-Identifier: MIT
/** core/engine.ts with volumes that plan in every way they may, and in ways they may not. */
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import fc from "fast-check";
import { ERRNO } from "../../abi/errno.ts";
import {
  UBLK_IO_F_FUA,
  UBLK_IO_OP_DISCARD,
  UBLK_IO_OP_FLUSH,
  UBLK_IO_OP_READ,
  UBLK_IO_OP_WRITE,
  UBLK_IO_OP_WRITE_ZEROES,
} from "../../abi/ublk_cmd.ts";
import type { Plan, Volume } from "../../core/volume.ts";
import { COMMAND_FALLOCATE, COMMAND_FSYNC, type ZeroCopyConfig } from "../../ffi/mod.ts";
import { type Request, serveVolume, shim } from "./block_layer.ts";

const [READ, WRITE, FLUSH] = [UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_IO_OP_FLUSH];
const [DISCARD, WRITE_ZEROES] = [UBLK_IO_OP_DISCARD, UBLK_IO_OP_WRITE_ZEROES];
const { EIO, ENODATA, EROFS } = ERRNO;
const AUTOMATIC: ZeroCopyConfig = { automatic: true, registerOpcode: 0, unregisterOpcode: 0 };

const directory = mkdtempSync(join(tmpdir(), "ubd-engine-"));
after(() => rmSync(directory, { recursive: true, force: true }));

const SECTORS = 64;

/** A file of SECTORS sectors, each of this byte. */
function disk(name: string, byte: number): { path: string; fd: number } {
  const path = join(directory, name);
  writeFileSync(path, new Uint8Array(SECTORS * 512).fill(byte));
  const fd = shim.open(path, 2);
  assert.ok(fd >= 0);
  return { path, fd };
}

const results = (volume: Volume, requests: Request[], logs: string[] = []) =>
  serveVolume(volume, requests, { logs }).answers.map(({ result }) => result);

for (const [how, zeroCopy] of [["copying", undefined], ["zero copy", AUTOMATIC]] as const) {
  test(`pieces of two files and of nothing are one request (${how})`, () => {
    const [one, other] = [disk("one", 1), disk("other", 2)];
    // Sectors take turns: the first file, the other one, zeroes.
    const turns = (op: number, offset: number, length: number, _flags: number, plan: Plan) => {
      let at = offset;
      for (let pieces = 0; pieces < 4 && at < offset + length; pieces++, at += 512) {
        const turn = at / 512 % 3;
        if (turn === 2 && op === READ) plan.zeroes(512);
        else plan.file(turn === 0 ? one.fd : other.fd, at, 512);
      }
      return at - offset;
    };
    const volume = { piecesMax: 4, map: turns };
    const data = Uint8Array.from({ length: 7 * 512 }, (_, at) => 10 + Math.floor(at / 512));
    const { answers } = serveVolume(volume, [
      { op: READ, sector: 1, sectors: 9 },
      { op: WRITE, sector: 3, sectors: 7, data },
      { op: READ, sector: 2, sectors: 8 },
    ], { zeroCopy });
    const bytes = (index: number) => {
      const { data } = answers[index]!;
      return Array.from({ length: data.length / 512 }, (_, sector) => {
        const part = data.subarray(sector * 512, sector * 512 + 512);
        assert.ok(part.every((byte) => byte === part[0]));
        return part[0];
      });
    };
    assert.deepStrictEqual(answers.map(({ result }) => result), [9 * 512, 7 * 512, 8 * 512]);
    assert.deepStrictEqual(bytes(0), [2, 0, 1, 2, 0, 1, 2, 0, 1]);
    assert.deepStrictEqual(bytes(2), [0, 10, 11, 0, 13, 14, 0, 16]);
    const [first, second] = [one, other].map(({ path }) => readFileSync(path));
    assert.deepStrictEqual([first![3 * 512], first![4 * 512], first![9 * 512]], [10, 1, 16]);
    assert.deepStrictEqual([second![4 * 512], second![3 * 512], second![7 * 512]], [11, 2, 14]);
    for (const { fd } of [one, other]) shim.native.ubd_close(fd);
  });
}

test("whatever the pieces, and however short the transfers, the bytes are those of the plan", {
  timeout: 60_000,
}, () => {
  const files = [disk("a", 0), disk("b", 0), disk("c", 0)];
  const kind = fc.constantFrom("read", "write");
  const request = fc.tuple(kind, fc.nat({ max: 50 }), fc.integer({ min: 1, max: 14 }));
  fc.assert(
    fc.property(
      fc.array(fc.nat({ max: 3 }), { minLength: SECTORS, maxLength: SECTORS }),
      fc.array(request, { minLength: 1, maxLength: 20 }),
      fc.array(fc.nat({ max: 1024 }), { minLength: 1 }),
      (places, asked, shortages) => {
        // Each sector is in one of the files, or is zeroes that swallow what is written.
        const model = new Uint8Array(SECTORS);
        for (const { path } of files) writeFileSync(path, new Uint8Array(SECTORS * 512));
        const volume: Volume = {
          piecesMax: 3,
          map(op, offset, length, _flags, plan) {
            let at = offset;
            for (let piece = 0; piece < 3 && at < offset + length; piece++) {
              const place = places[at / 512]!;
              let end = at + 512;
              while (end < offset + length && places[end / 512] === place) end += 512;
              const fd = place < 3 ? files[place]!.fd : full;
              if (place === 3 && op === READ) plan.zeroes(end - at);
              else plan.file(fd, at, end - at);
              at = end;
            }
            return at - offset;
          },
        };
        const full = shim.open("/dev/null", 2);
        const expected: (Uint8Array | undefined)[] = [];
        const requests = asked.map(([what, sector, sectors], index): Request => {
          const bytes = sectors * 512;
          if (what === "write") {
            for (let at = sector; at < sector + sectors; at++) {
              if (places[at] !== 3) model[at] = index + 1;
            }
            expected.push(undefined);
            return { op: WRITE, sector, sectors, data: new Uint8Array(bytes).fill(index + 1) };
          }
          expected.push(model.slice(sector, sector + sectors));
          return { op: READ, sector, sectors };
        });
        let turn = 0;
        const onResult = (result: number) =>
          result > 1 ? Math.max(1, result - shortages[turn++ % shortages.length]!) : result;
        const { answers } = serveVolume(volume, requests, { onResult });
        shim.native.ubd_close(full);
        for (const [index, sectors] of expected.entries()) {
          const { result, data } = answers[index]!;
          assert.strictEqual(result, requests[index]!.sectors! * 512);
          for (const [at, byte] of sectors?.entries() ?? []) {
            assert.ok(data.subarray(at * 512, at * 512 + 512).every((one) => one === byte));
          }
        }
      },
    ),
    { numRuns: 20 },
  );
  for (const { fd } of files) shim.native.ubd_close(fd);
});

test("a volume with nothing to do is answered at once", () => {
  const volume: Volume = { map: (_op, _offset, length) => length };
  const requests = [READ, WRITE, DISCARD, WRITE_ZEROES].map((op) => ({ op, sectors: 4 }));
  assert.deepStrictEqual(results(volume, [...requests, { op: FLUSH }]), [2048, 2048, 0, 0, 0]);
});

test("an errno is the request's, unless something is done: then that, and the kernel asks again", () => {
  const { fd } = disk("partly", 1);
  const volume: Volume = {
    map(_op, offset, length, _flags, plan) {
      if (offset >= 4096) return -ENODATA;
      const bytes = Math.min(length, 4096 - offset);
      plan.file(fd, offset, bytes);
      return bytes;
    },
  };
  const logs: string[] = [];
  const requests = [
    { op: READ, sector: 6, sectors: 4 },
    { op: READ, sector: 8, sectors: 2 },
    { op: READ, sector: 0, sectors: 8 },
  ];
  assert.deepStrictEqual(results(volume, requests, logs), [1024, -ENODATA, 4096]);
  assert.deepStrictEqual(logs, []);
  const none: Volume = { map: () => -EROFS };
  assert.deepStrictEqual(results(none, [{ op: WRITE, sectors: 1 }, { op: FLUSH }]), [
    -EROFS,
    -EROFS,
  ]);
  shim.native.ubd_close(fd);
});

test("what a volume may not plan fails its request, and nothing else", () => {
  const { fd, path } = disk("wrong", 7);
  const plans: [string, number, Volume["map"]][] = [
    ["more than the request has", READ, (_op, _offset, length, _flags, plan) => {
      plan.file(fd, 0, length + 512);
      return length + 512;
    }],
    ["none of it", READ, () => 0],
    ["a piece of more than it says", READ, (_op, _offset, length, _flags, plan) => {
      plan.file(fd, 0, length + 512);
      return length;
    }],
    ["a WRITE of more than it says", WRITE, (_op, _offset, length, _flags, plan) => {
      plan.file(fd, 0, length + 512);
      return length;
    }],
    ["pieces of more than it says", READ, (_op, _offset, length, _flags, plan) => {
      plan.file(fd, 0, length);
      plan.file(fd, 0, 512);
      return length;
    }],
    ["pieces of less than it says", READ, (_op, _offset, length, _flags, plan) => {
      plan.file(fd, 0, length - 512);
      return length;
    }],
    ["too many", READ, (_op, _offset, length, _flags, plan) => {
      for (let piece = 0; piece < 3; piece++) plan.file(fd, piece * 512, 512);
      return length;
    }],
    ["a hole for a READ", READ, (_op, _offset, length, _flags, plan) => {
      plan.punch(fd, 0, length, false);
      return length;
    }],
    ["data for a DISCARD", DISCARD, (_op, offset, length, _flags, plan) => {
      plan.file(fd, offset, length);
      return length;
    }],
    ["zeroes for a WRITE", WRITE, (_op, _offset, length, _flags, plan) => {
      plan.zeroes(length);
      return length;
    }],
    ["an exception", READ, () => {
      throw new Error("by itself");
    }],
  ];
  for (const [what, op, map] of plans) {
    const logs: string[] = [];
    let first = true;
    const volume: Volume = {
      piecesMax: 2,
      map(op, offset, length, flags, plan) {
        if (!first) {
          plan.file(fd, offset, length);
          return length;
        }
        first = false;
        return map(op, offset, length, flags, plan);
      },
    };
    const requests = [{ op, sectors: 3 }, { op: READ, sectors: 3 }];
    // Another tag's pieces come after those of the first.
    const { answers } = serveVolume(volume, requests, { logs, depth: 2 });
    assert.deepStrictEqual(answers.map(({ result }) => result), [-EIO, 3 * 512], what);
    assert.strictEqual(logs.length, 1, what);
    if (what === "too many") assert.match(logs[0]!, /more pieces than 2/);
    assert.ok(readFileSync(path).every((byte) => byte === 7), what);
  }
  shim.native.ubd_close(fd);
});

test("WRITE_ZEROES with FUA syncs each file that it was on, once; DISCARD none", () => {
  const [one, other] = [disk("synced", 1), disk("synced too", 1)];
  const volume: Volume = {
    piecesMax: 3,
    map(_op, _offset, length, _flags, plan) {
      plan.punch(one.fd, 0, 4096, false);
      plan.punch(one.fd, 8192, 4096, false);
      plan.punch(other.fd, 4096, 4096, true);
      return length;
    },
  };
  const commands = (op: number, flags: number) => {
    const { fileCommands, answers } = serveVolume(volume, [{ op, flags, sectors: 24 }]);
    assert.strictEqual(answers[0]!.result, 0);
    return fileCommands.map(([command]) => command);
  };
  const [clear, sync] = [COMMAND_FALLOCATE, COMMAND_FSYNC];
  assert.deepStrictEqual(commands(WRITE_ZEROES, UBLK_IO_F_FUA), [clear, clear, clear, sync, sync]);
  assert.deepStrictEqual(commands(WRITE_ZEROES, 0), [clear, clear, clear]);
  assert.deepStrictEqual(commands(DISCARD, UBLK_IO_F_FUA), [clear, clear, clear]);
  const bytes = readFileSync(one.path);
  for (const [at, byte] of [[0, 0], [4096, 1], [8192, 0], [12288, 1]]) {
    assert.strictEqual(bytes[at!], byte);
  }
  for (const { fd } of [one, other]) shim.native.ubd_close(fd);
});
