// SPDX-License-Identifier: MIT
/** cli/backing_files.ts: what a name means, and whether it still means that. */
import assert from "node:assert/strict";
import { execFileSync, spawn, spawnSync } from "node:child_process";
import {
  closeSync,
  copyFileSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import {
  backingFile,
  descriptorNumber,
  filesOf,
  holdFiles,
  lostNames,
} from "../../cli/backing_files.ts";
import { lockHeld } from "../../cli/open_target.ts";
import { UblkError, UsageError } from "../../core/error.ts";
import { descriptorPath, identify, isSameFile } from "../../core/file_identity.ts";
import { Shim } from "../../ffi/mod.ts";

const shim = new Shim();
const directory = mkdtempSync(join(tmpdir(), "ubd-files-"));
after(() => rmSync(directory, { recursive: true }));

function image(name: string, content = name): string {
  const path = join(directory, name);
  writeFileSync(path, content);
  return path;
}

/** Holds what the path names now. */
function known(path: string) {
  const held = holdFiles(shim, [backingFile(path)]);
  held.close();
  return held.files;
}

const isStale = (error: unknown) => error instanceof UblkError && error.errno === "ESTALE";

test("a held file is the same whatever becomes of its name", () => {
  const path = image("held");
  const held = holdFiles(shim, [backingFile(path)]);
  renameSync(image("other"), path);
  const fd = held.find(path)!;
  assert.strictEqual(readFileSync(descriptorPath(fd), "utf8"), "held");
  assert.ok(!isSameFile(held.files[0]!.identity!, known(path)[0]!.identity!));
  held.close();
  assert.throws(() => readFileSync(descriptorPath(fd)));
});

test("a device is taken over with the file that it was made of, and with no other", () => {
  const path = image("disk");
  const files = known(path);
  const source = { device: 7 };
  holdFiles(shim, files, source).close();

  renameSync(path, `${path}.old`);
  assert.throws(() => holdFiles(shim, files, source), /ENOENT.*ubd del 7/);
  copyFileSync(`${path}.old`, path); // The same bytes, and another file.
  assert.throws(() => holdFiles(shim, files, source), isStale);
  assert.throws(() => holdFiles(shim, files, source), /disk.*another file.*--force 7/);
  const forced = holdFiles(shim, files, { ...source, force: true });
  assert.ok(!isSameFile(forced.files[0]!.identity!, files[0]!.identity!));
  forced.close();

  rmSync(path);
  renameSync(`${path}.old`, path);
  holdFiles(shim, files, source).close();
  rmSync(path);
  symlinkSync(image("disk2"), path);
  assert.throws(() => holdFiles(shim, files, source), isStale);
});

test("an inode that was freed and used again is another file", () => {
  const path = image("again");
  const files = known(path);
  const { ino } = statSync(path);
  for (let turn = 0; turn < 50; turn++) {
    rmSync(path);
    writeFileSync(path, "again");
    if (statSync(path).ino === ino) break;
  }
  // Also where the file system never gives the number again.
  assert.throws(() => holdFiles(shim, files, { device: 1 }), isStale);
});

test("what a living server has open is the truth: the name may mean another, or nothing", async () => {
  const path = image("served");
  const files = known(path);
  const others = openSync(image("not served"), "r");
  const server = spawn("sleep", ["60"], {
    stdio: [others, "ignore", "ignore", openSync(path, "r+")],
  });
  try {
    await new Promise((resolve) => server.on("spawn", resolve));
    const source = { device: 3, pid: server.pid! };
    for (const change of [() => renameSync(image("x"), path), () => rmSync(path)]) {
      change();
      const held = holdFiles(shim, files, source);
      assert.strictEqual(readFileSync(descriptorPath(held.fds[0]!), "utf8"), "served");
      assert.deepStrictEqual(held.files, files);
      held.close();
      // Version 0.1.0 kept the name alone.
      const old = holdFiles(shim, [{ path }], source);
      assert.strictEqual(readFileSync(descriptorPath(old.fds[0]!), "utf8"), "served");
      old.close();
    }
    assert.throws(() => holdFiles(shim, files, { device: 3 }), /ENOENT/);
  } finally {
    server.kill();
  }
});

/** A mount point with an image below that nobody has written to; undefined: not permitted. */
function overlay(): { point: string; end: () => void } | undefined {
  const base = mkdtempSync(join(directory, "overlay-"));
  execFileSync("mkdir", ["-p", ...["layers", "point"].map((name) => join(base, name))]);
  const end = () => {
    for (const name of ["point", "layers"]) spawnSync("umount", [join(base, name)]);
  };
  const { status } = spawnSync("sh", [
    "-c",
    `cd ${base}; mount -t tmpfs tmpfs layers &&
    mkdir layers/lower layers/upper layers/work && echo image > layers/lower/disk && cd layers &&
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work ../point`,
  ]);
  if (status === 0) return { point: join(base, "point"), end };
  end();
  return undefined;
}
const trial = overlay();
trial?.end();

test("names that are lost are told of, and no others", () => {
  const path = image("to be replaced");
  const files = [...known(path), ...known(image("stays")), { path: "/none", optional: true }];
  assert.deepStrictEqual(lostNames(shim, files), []);
  renameSync(image("x"), path);
  assert.deepStrictEqual(lostNames(shim, files), [path]);
  rmSync(path);
  assert.deepStrictEqual(lostNames(shim, files), [path]);
});

test("on an overlay, a file that was opened for writing is still the one", {
  skip: trial ? false : "needs the right to mount an overlay",
}, () => {
  const { point, end } = overlay()!;
  try {
    const path = join(point, "disk");
    const held = holdFiles(shim, [backingFile(path)]);
    closeSync(openSync(path, "r+"));
    const files = held.known();
    held.close();
    assert.ok(!isSameFile(held.files[0]!.identity!, files[0]!.identity!), "the trap works");
    holdFiles(shim, files, { device: 1 }).close();
    // What was read-only may be written to by another later on.
    const fd = openSync(path, "r");
    holdFiles(shim, held.files, { device: 1, pid: process.pid }).close();
    closeSync(fd);
    assert.throws(() => holdFiles(shim, held.files, { device: 1 }), isStale);
  } finally {
    end();
  }
});

test("nothing stays open when one of several files is not there", () => {
  const before = readdirSync("/proc/self/fd").length;
  const files = [image("a"), join(directory, "none"), image("b")].map(backingFile);
  assert.throws(() => holdFiles(shim, files), /none: ENOENT.*truncate/);
  assert.strictEqual(readdirSync("/proc/self/fd").length, before);
});

test("a file that need not be there yet holds its directory, and may become another", () => {
  const cache = { path: join(directory, "cache"), optional: true };
  const held = holdFiles(shim, [cache]);
  assert.strictEqual(statSync(descriptorPath(held.fds[0]!)).ino, statSync(directory).ino);
  assert.strictEqual(held.find(cache.path), undefined);
  assert.deepStrictEqual(held.files, [cache]);
  held.close();
  holdFiles(shim, [cache], { device: 1 }).close();
});

test("a descriptor's path means the caller's descriptor", () => {
  const path = image("by-descriptor");
  const fd = shim.open(path, 2);
  const link = join(directory, "link");
  symlinkSync(`/dev/fd/${fd}`, link);
  for (
    const typed of [`/proc/self/fd/${fd}`, `/dev/fd/${fd}`, `/proc/thread-self/fd/${fd}`, link]
  ) {
    assert.strictEqual(descriptorNumber(typed), fd, typed);
    assert.deepStrictEqual(backingFile(typed), { path, typed: `/proc/self/fd/${fd}` });
  }
  rmSync(path);
  const held = holdFiles(shim, [backingFile(link)]);
  assert.strictEqual(readFileSync(descriptorPath(held.fds[0]!), "utf8"), "by-descriptor");
  assert.deepStrictEqual(Object.keys(held.files[0]!).sort(), ["identity", "path"]);
  held.close();
  shim.native.ubd_close(fd);
  assert.throws(() => backingFile("/dev/fd/999"), UsageError);
  assert.throws(() => backingFile("/dev/fd/999"), /EBADF.*999/);
});

test("a relative path is the caller's, and kept as an absolute one", () => {
  const here = process.cwd();
  process.chdir(directory);
  try {
    const path = image("relative");
    assert.deepStrictEqual(backingFile("./relative"), { path, typed: "./relative" });
    assert.strictEqual(known("relative")[0]!.path, path);
  } finally {
    process.chdir(here);
  }
});

test("other paths are no descriptor's", () => {
  mkdirSync(join(directory, "fd"));
  const loop = join(directory, "loop");
  symlinkSync(loop, loop);
  const others = [image("plain"), join(directory, "fd/3"), "/proc/1/fd/3", loop, "/nowhere/fd/3"];
  for (const path of others) assert.strictEqual(descriptorNumber(path), undefined, path);
});

test("a name that is no UTF-8 is found", () => {
  // Not with node:fs: Deno has no such names.
  execFileSync("sh", ["-c", `printf latin-1 > "$(printf '${directory}/caf\\351')"`]);
  const held = holdFiles(shim, [backingFile(`${directory}/caf\u{10ffe9}`)]);
  assert.strictEqual(readFileSync(descriptorPath(held.fds[0]!), "utf8"), "latin-1");
  held.close();
});

test("identify tells a hard link from a copy, and looks at no more than it must", () => {
  const path = image("one");
  linkSync(path, join(directory, "two"));
  copyFileSync(path, join(directory, "three"));
  const [one, two, three] = ["one", "two", "three"].map((name) =>
    known(join(directory, name))[0]!.identity!
  );
  assert.ok(isSameFile(one!, two!));
  assert.ok(!isSameFile(one!, three!));
  assert.ok(!isSameFile(one!, { device: one!.device }));
  const { born: _, generation: __, ...less } = one!;
  assert.ok(isSameFile(one!, less));
  assert.ok(!isSameFile({ ...one!, generation: 1 }, { ...one!, generation: 2 }));
  assert.ok(
    !isSameFile({ device: "8:1", diskSequence: "1" }, { device: "8:1", diskSequence: "2" }),
  );
  const fd = openSync(directory, "r");
  assert.strictEqual(identify(shim, fd).generation, undefined);
  closeSync(fd);
});

test("filesOf knows what specs of version 0.1.0 had", () => {
  const of = (name: string, options: object) => filesOf({ target: { name, options } });
  assert.deepStrictEqual(of("loop", { file: "/a" }), [{ path: "/a" }]);
  assert.deepStrictEqual(of("stripe", { files: ["/a", "/b"] }), [{ path: "/a" }, { path: "/b" }]);
  assert.deepStrictEqual(of("module", { file: "/x.ts" }), []);
  assert.deepStrictEqual(of("null", {}), []);
});

test("what a target opens in its queues is locked until it is closed", () => {
  const path = image("locked");
  const held = lockHeld(holdFiles(shim, [backingFile(path)]), shim);
  assert.strictEqual(readFileSync(descriptorPath(held.find(path)!), "utf8"), "locked");
  const second = holdFiles(shim, [{ path: image("free") }, backingFile(path)]);
  const opened = () => readdirSync("/proc/self/fd").length;
  const before = opened();
  const isBusy = (error: unknown) =>
    error instanceof UblkError && error.errno === "EBUSY" &&
    new RegExp(`lock ${path}.*process ${process.pid} .*stop that one\\)$`).test(error.message);
  assert.throws(() => lockHeld(second, shim), isBusy);
  assert.strictEqual(opened(), before);
  held.close();
  lockHeld(second, shim).close();
  // A cache may be shared; a directory is the target's to refuse.
  const shared = [{ path, optional: true }, backingFile(directory)];
  lockHeld(holdFiles(shim, shared), shim).close();
});
