// SPDX-License-Identifier: MIT
/** State files: written whole, private, never through a planted link, read only when understood. */
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import {
  chmodSync,
  chownSync,
  closeSync,
  copyFileSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, before, beforeEach, test } from "node:test";
import { UblkError } from "../../core/error.ts";
import {
  findState,
  makerOf,
  makersMark,
  makeStateDirectory,
  onStateFault,
  readState,
  removeState,
  stateDirectory,
  stateNames,
  useStateDirectory,
  writeState,
} from "../../core/state.ts";

const ID = 3;
const SCRATCH = mkdtempSync(join(tmpdir(), "ubd-state-"));
const DIRECTORY = join(SCRATCH, "ubd");
const FILE = join(DIRECTORY, `${ID}.json`);
const TEMPORARY = join(DIRECTORY, `.${ID}.${process.pid}`);
const isRoot = process.getuid!() === 0;
const TIMEOUT = { timeout: 20_000 };

let faults: string[] = [];
before(() => useStateDirectory(DIRECTORY));
after(() => {
  useStateDirectory(undefined);
  onStateFault(() => {});
  rmSync(SCRATCH, { recursive: true });
});
beforeEach(() => {
  faults = [];
  onStateFault((text) => faults.push(text));
  rmSync(DIRECTORY, { recursive: true, force: true });
});

const MARK = makersMark(process.pid);
const STATE = {
  mark: MARK,
  spec: { any: ["JSON", 1] },
  pid: process.pid,
  target: { name: "loop", backing_file: "/a \u00e9.img", direct_io: 1, read_only: true },
  queues: [{ qid: 0, tid: 12, affinity: [0, 3] }],
};

/** All that this test and this process have in the directory. */
function ours(): string[] {
  return readdirSync(DIRECTORY).filter((name) => name.includes(String(ID)));
}

test(
  "readState gives back what writeState wrote, and undefined when there is nothing",
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
  () => {
    writeState(ID, STATE);
    assert.strictEqual(statSync(FILE).mode & 0o7777, 0o600);
    assert.strictEqual(statSync(DIRECTORY).mode & 0o022, 0);
    assert.deepStrictEqual(ours(), [`${ID}.json`]);
  },
);

test(
  "writeState replaces the file whole: who has the old one open reads all of it",
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
  test(`writeState writes through no symbolic link in place of its ${what}`, () => {
    writeState(ID, STATE); // The directory must exist.
    const victim = join(SCRATCH, "victim");
    writeFileSync(victim, "precious", { mode: 0o644 });
    rmSync(path, { force: true });
    symlinkSync(victim, path);
    writeState(ID, { ...STATE, pid: 2 });
    assert.strictEqual(readFileSync(victim, "utf8"), "precious");
    assert.ok(lstatSync(FILE).isFile());
    assert.strictEqual(readState(ID)?.pid, 2);
    assert.deepStrictEqual(ours(), [`${ID}.json`]);
  });
}

test("readState takes the state of another device with the same id for none", () => {
  writeState(ID, STATE);
  assert.strictEqual(readState(ID, MARK)?.pid, process.pid);
  for (const other of [0n, MARK + 1n, MARK ^ 1n << 63n]) {
    assert.strictEqual(readState(ID, other), undefined);
  }
  // A file that was written before states had marks counts, as it did then.
  writeFileSync(FILE, readFileSync(FILE, "utf8").replace(/"mark".*\n/, ""));
  assert.strictEqual(readState(ID, MARK + 1n)?.pid, process.pid);
});

const DEEP = `{"a":`.repeat(40) + "1" + "}".repeat(40);

/** What 0.1.0 wrote, and what a later version may add. */
const GOOD: readonly Record<string, unknown>[] = [
  {},
  { mark: undefined },
  { supervisor: 7, leashed: true, nodes: ["/dev/ublkb3"] },
  { target: {} },
  { target: { name: "concat", files: ["/a", "/b"], dev_size: 2 ** 60, chunk: 1.5, "": false } },
  { queues: [] },
  { spec: {} },
  { later: { version: [1, null] } },
];

test("readState takes what any version wrote in the form of this one, and keeps the rest", () => {
  writeState(ID, STATE);
  const state = JSON.parse(readFileSync(FILE, "utf8"));
  for (const more of GOOD) {
    const text = JSON.stringify({ ...state, ...more });
    writeFileSync(FILE, text);
    assert.deepStrictEqual(readState(ID), JSON.parse(text), text);
  }
  assert.deepStrictEqual(faults, []);
});

test("readState takes another form for none, and says why, once", () => {
  writeState(ID, STATE);
  const text = readFileSync(FILE, "utf8");
  const bad: [string, RegExp][] = [
    [text.replace('"version": 1', '"version": 2'), /another version of ubd has written it$/],
    [text.replace('"version": 1', '"version": "1"'), /another version/],
    [text.replace('"version": 1,', ""), /its "version" is not 1$/],
    [text.slice(0, -3), /it is no JSON$/],
    ["", /it is no JSON$/],
    ["null", /it is no JSON object$/],
    ["[]", /it is no JSON object$/],
    [text.replace('"spec": {', `"spec": ${DEEP}, "x": {`), /it has more than 32 levels$/],
  ];
  const wrong: Record<string, unknown[]> = {
    mark: [1, "1", "0x", "0x10000000000000000", "0xZ"],
    pid: [undefined, null, 0, -1, 1.5, "1", [1], 2 ** 31],
    supervisor: [null, 0, "1"],
    leashed: [null, 1, "true"],
    nodes: [null, "x", {}, [1], [null]],
    target: [undefined, null, [], 1, "x", { name: 1 }, { x: null }, { x: {} }, { x: [1] }],
    queues: [undefined, null, {}, 1, [null], [{}], [{ qid: 0, tid: 1 }]],
    spec: [undefined, null, [], "x", 1],
  };
  wrong.queues!.push([{ qid: 0, tid: 1, affinity: ["0"] }], [{ qid: -1, tid: 1, affinity: [] }]);
  const state = JSON.parse(text);
  for (const [name, values] of Object.entries(wrong)) {
    for (const value of values) {
      bad.push([JSON.stringify({ ...state, [name]: value }), RegExp(`its "${name}" is not `)]);
    }
  }
  for (const [content, why] of bad) {
    assert.notStrictEqual(content, text);
    writeFileSync(FILE, content);
    onStateFault((fault) => faults.push(fault));
    assert.strictEqual(readState(ID), undefined, content);
    assert.strictEqual(readState(ID), undefined, content);
    assert.match(faults.join("\n"), why, content);
    assert.strictEqual(faults.length, 1, content);
    assert.ok(faults.pop()!.startsWith(`${FILE} counts as none: `));
    assert.match(findState(ID).fault!, why);
  }
  writeFileSync(FILE, text);
  assert.strictEqual(readState(ID)?.pid, process.pid);
});

/** Puts something else in place of a file that is good. @returns why it is none. */
const REPLACED: Record<string, (good: string) => RegExp> = {
  "a FIFO": () => {
    execFileSync("mkfifo", [FILE]);
    return /it is no regular file$/;
  },
  "a directory": () => {
    mkdirSync(FILE);
    return /it is no regular file$/;
  },
  "a link to an endless device": () => {
    symlinkSync("/dev/zero", FILE);
    return /it is a symbolic link$/;
  },
  "a link to a good file": (good) => {
    symlinkSync(good, FILE);
    return /it is a symbolic link$/;
  },
  "a link to nothing": () => {
    symlinkSync("nothing", FILE);
    return /it is a symbolic link$/;
  },
  "a huge file": () => {
    writeFileSync(FILE, "");
    truncateSync(FILE, 2 ** 40);
    return /it has 1099511627776 bytes$/;
  },
  "a file that others may write": (good) => {
    copyFileSync(good, FILE);
    chmodSync(FILE, 0o620);
    return /others may write to it$/;
  },
  ...(isRoot && {
    "another user's file": (good) => {
      copyFileSync(good, FILE);
      chownSync(FILE, 1, 0);
      return /it belongs to user 1$/;
    },
  }),
};

for (const [what, plant] of Object.entries(REPLACED)) {
  test(`readState takes ${what} for none, does not wait, and says why`, TIMEOUT, () => {
    writeState(ID, STATE);
    writeState(ID + 1, STATE);
    const good = join(DIRECTORY, "good");
    renameSync(FILE, good);
    const why = plant(good);
    assert.strictEqual(readState(ID), undefined);
    assert.match(faults.join("\n"), why);
    assert.strictEqual(faults.length, 1);
    assert.strictEqual(readState(ID + 1)?.pid, process.pid);
    removeState(ID, process.pid);
    assert.ok(lstatSync(FILE), "nobody has removed it");
  });
}

test("readState is not deceived by who changes the file under its eyes", TIMEOUT, () => {
  writeState(ID, STATE);
  const good = join(DIRECTORY, "good");
  const victim = join(SCRATCH, "victim.json");
  renameSync(FILE, good);
  writeFileSync(victim, readFileSync(good, "utf8").replace(`"pid": ${process.pid}`, '"pid": 1'));
  const done = join(SCRATCH, "done");
  const swaps = `for i in {1..25}; do ln -sf ${victim} new; mv -T new ${FILE}
    mkfifo new; mv -T new ${FILE}; ln ${good} new; mv -T new ${FILE}; done; : >${done}`;
  const child = spawn("bash", ["-c", swaps], { cwd: DIRECTORY, stdio: "ignore" });
  try {
    while (!existsSync(done)) {
      const { state } = findState(ID);
      if (state) assert.strictEqual(state.pid, process.pid, "through a link");
    }
  } finally {
    child.kill("SIGKILL");
  }
});

const NO_DIRECTORY: Record<string, () => RegExp> = {
  "a link": () => {
    renameSync(DIRECTORY, `${DIRECTORY}.real`);
    symlinkSync(`${DIRECTORY}.real`, DIRECTORY);
    return /it is a symbolic link/;
  },
  "a file": () => {
    renameSync(DIRECTORY, `${DIRECTORY}.real`);
    writeFileSync(DIRECTORY, "");
    return /it is no directory/;
  },
  "a directory that others write": () => {
    chmodSync(DIRECTORY, 0o777);
    return /others may write to it/;
  },
  ...(isRoot && {
    "another user's directory": () => {
      chownSync(DIRECTORY, 1, 0);
      return /it belongs to user 1/;
    },
  }),
};

for (const [what, plant] of Object.entries(NO_DIRECTORY)) {
  test(`with ${what} in place of the state directory nothing is read, made or removed`, () => {
    writeState(ID, STATE);
    const why = plant();
    const there = existsSync(FILE);
    assert.strictEqual(readState(ID), undefined);
    assert.deepStrictEqual(stateNames(), []);
    removeState(ID);
    removeState(ID, process.pid);
    assert.strictEqual(existsSync(FILE), there);
    assert.strictEqual(faults.length, 1, `${faults}`);
    assert.match(faults[0]!, why);
    assert.ok(faults[0]!.startsWith(`${DIRECTORY} counts as none: `));
    for (const write of [makeStateDirectory, () => writeState(ID, STATE)]) {
      assert.throws(write, (error: UblkError) => {
        assert.match(error.message, why);
        assert.ok(error.message.startsWith(`Cannot keep state in ${DIRECTORY}: E`));
        return error instanceof UblkError;
      });
    }
    rmSync(DIRECTORY, { recursive: true });
    rmSync(`${DIRECTORY}.real`, { recursive: true, force: true });
  });
}

test("writeState that fails says so in one form, and leaves nothing", () => {
  makeStateDirectory();
  mkdirSync(join(FILE, "in the way"), { recursive: true });
  assert.throws(() => writeState(ID, STATE), (error: UblkError) => {
    assert.strictEqual(error.operation, "write the state file");
    return error instanceof UblkError;
  });
  assert.deepStrictEqual(ours(), [`${ID}.json`]);
  const huge = "x".repeat(16 * 2 ** 20);
  assert.throws(
    () => writeState(ID + 1, { ...STATE, spec: { huge } }),
    (error: UblkError) => error instanceof UblkError && error.errno === "EFBIG",
  );
  assert.deepStrictEqual(ours(), [`${ID}.json`]);
});

test("a relative XDG_RUNTIME_DIR counts as not set, and that is told", { skip: !isRoot }, () => {
  const { env } = process;
  const saved = env.XDG_RUNTIME_DIR;
  const { getuid } = process;
  useStateDirectory(undefined);
  process.getuid = () => 4_000_000_000;
  try {
    env.XDG_RUNTIME_DIR = SCRATCH;
    assert.strictEqual(stateDirectory(), DIRECTORY);
    assert.deepStrictEqual(faults, []);
    for (const relative of [".", "run", "../x"]) {
      env.XDG_RUNTIME_DIR = relative;
      assert.strictEqual(stateDirectory(), "/tmp/ubd-4000000000");
      assert.strictEqual(
        faults.pop(),
        `XDG_RUNTIME_DIR "${relative}" counts as none: it is no absolute path`,
      );
    }
    env.XDG_RUNTIME_DIR = "";
    assert.strictEqual(stateDirectory(), "/tmp/ubd-4000000000");
    assert.deepStrictEqual(faults, []);
  } finally {
    process.getuid = getuid!;
    if (saved === undefined) delete env.XDG_RUNTIME_DIR;
    else env.XDG_RUNTIME_DIR = saved;
    useStateDirectory(DIRECTORY);
  }
});

test("removeState spares the state of another process, unless told of none", () => {
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
