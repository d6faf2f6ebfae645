// SPDX-License-Identifier: MIT
/**
 * State files: written whole, private, never through a planted link, read only when understood.
 *
 * The directory is the real one (core/state.ts knows no other); the id is one that no driver
 * gives out.
 */
import assert from "node:assert/strict";
import {
  closeSync,
  existsSync,
  lstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { afterEach, test } from "node:test";
import { makerOf, makersMark, readState, removeState, writeState } from "../../core/state.ts";

const ID = 4_000_000 + process.pid;
const isRoot = process.getuid!() === 0;
const DIRECTORY = join(isRoot ? "/run" : process.env.XDG_RUNTIME_DIR ?? "/run", "ubd");
const FILE = join(DIRECTORY, `${ID}.json`);
const TEMPORARY = join(DIRECTORY, `.${ID}.${process.pid}`);
const skip = !isRoot && process.env.XDG_RUNTIME_DIR === undefined
  ? "needs root or XDG_RUNTIME_DIR"
  : false;

const MARK = makersMark(process.pid);
const STATE = {
  mark: MARK,
  spec: { any: ["JSON", 1] },
  pid: process.pid,
  target: { name: "loop", backing_file: "/a \u00e9.img", direct_io: 1, read_only: true },
  queues: [{ qid: 0, tid: 12, affinity: [0, 3] }],
};

afterEach(() => {
  rmSync(FILE, { force: true });
  rmSync(TEMPORARY, { force: true });
});

/** All that this test and this process have in the directory. */
function ours(): string[] {
  return readdirSync(DIRECTORY).filter((name) => name.includes(String(ID)));
}

test(
  "readState gives back what writeState wrote, and undefined when there is nothing",
  { skip },
  () => {
    assert.strictEqual(readState(ID), undefined);
    writeState(ID, STATE);
    assert.deepStrictEqual(readState(ID), {
      version: 1,
      ...STATE,
      mark: `0x${MARK.toString(16)}`,
    });
  },
);

test(
  "writeState makes a file of mode 0600, alone, in a directory nobody else writes",
  { skip },
  () => {
    writeState(ID, STATE);
    assert.strictEqual(statSync(FILE).mode & 0o7777, 0o600);
    assert.strictEqual(statSync(DIRECTORY).mode & 0o022, 0);
    assert.deepStrictEqual(ours(), [`${ID}.json`]);
  },
);

test(
  "writeState replaces the file whole: who has the old one open reads all of it",
  { skip },
  () => {
    writeState(ID, STATE);
    const old = readFileSync(FILE, "utf8");
    const fd = openSync(FILE, "r");
    try {
      writeState(ID, { ...STATE, pid: 1, queues: [] });
      const bytes = Buffer.alloc(old.length + 100);
      const length = readSync(fd, bytes, 0, bytes.length, 0);
      assert.strictEqual(bytes.subarray(0, length).toString(), old);
    } finally {
      closeSync(fd);
    }
    assert.strictEqual(readState(ID)?.pid, 1);
    assert.deepStrictEqual(ours(), [`${ID}.json`]);
  },
);

for (const [what, path] of [["file", FILE], ["temporary file", TEMPORARY]] as const) {
  test(`writeState writes through no symbolic link in place of its ${what}`, { skip }, () => {
    const scratch = mkdtempSync(join(tmpdir(), "ubd-state-"));
    try {
      writeState(ID, STATE); // The directory must exist.
      const victim = join(scratch, "victim");
      writeFileSync(victim, "precious", { mode: 0o644 });
      rmSync(path, { force: true });
      symlinkSync(victim, path);
      writeState(ID, { ...STATE, pid: 2 });
      assert.strictEqual(readFileSync(victim, "utf8"), "precious");
      assert.ok(lstatSync(FILE).isFile());
      assert.strictEqual(readState(ID)?.pid, 2);
      assert.deepStrictEqual(ours(), [`${ID}.json`]);
    } finally {
      rmSync(scratch, { recursive: true });
    }
  });
}

test("readState takes the state of another device with the same id for none", { skip }, () => {
  writeState(ID, STATE);
  assert.strictEqual(readState(ID, MARK)?.pid, process.pid);
  for (const other of [0n, MARK + 1n, MARK ^ 1n << 63n]) {
    assert.strictEqual(readState(ID, other), undefined);
  }
  // A file that was written before states had marks counts, as it did then.
  writeFileSync(FILE, readFileSync(FILE, "utf8").replace(/"mark".*\n/, ""));
  assert.strictEqual(readState(ID, MARK + 1n)?.pid, process.pid);
});

test("readState ignores another version, and what is no JSON", { skip }, () => {
  writeState(ID, STATE);
  const text = readFileSync(FILE, "utf8");
  for (
    const bad of [
      text.replace('"version": 1', '"version": 2'),
      text.replace('"version": 1', '"version": "1"'),
      text.replace('"version": 1,', ""),
      text.slice(0, -3),
      "",
      "null",
      "[]",
    ]
  ) {
    assert.notStrictEqual(bad, text);
    writeFileSync(FILE, bad);
    assert.strictEqual(readState(ID), undefined, bad);
  }
  writeFileSync(FILE, text);
  assert.strictEqual(readState(ID)?.pid, process.pid);
});

test("removeState spares the state of another process, unless told of none", { skip }, () => {
  writeState(ID, STATE);
  removeState(ID, process.pid + 1);
  assert.ok(existsSync(FILE));
  removeState(ID, process.pid);
  assert.ok(!existsSync(FILE));
  writeState(ID, STATE);
  removeState(ID);
  assert.ok(!existsSync(FILE));
  removeState(ID);
  removeState(ID, process.pid);
});

test("a device's mark names the process that made it, and no other mark does", () => {
  for (const pid of [1, process.pid, 4_194_304 - 1]) {
    const mark = makersMark(pid);
    assert.strictEqual(makerOf(mark), pid);
    assert.ok(mark > 0n && mark < 1n << 64n);
    // One of another namespace, of another program, and none.
    for (const bit of [63n, 32n, 31n, 22n]) {
      assert.strictEqual(makerOf(mark ^ 1n << bit), undefined);
    }
  }
  assert.strictEqual(makerOf(0n), undefined);
});
