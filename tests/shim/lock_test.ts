// SPDX-License-Identifier: MIT
/** targets/loop.ts: who else has the file. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { closeSync, linkSync, mkdtempSync, openSync, renameSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import { ERRNO } from "../../abi/errno.ts";
import { UblkError } from "../../core/error.ts";
import { Shim } from "../../ffi/mod.ts";
import { type Backing, type BackingOptions, openBacking } from "../../targets/backing.ts";

const shim = new Shim();
const directory = mkdtempSync(join(tmpdir(), "ubd-lock-"));
after(() => rmSync(directory, { recursive: true }));

function image(name: string): string {
  const path = join(directory, name);
  closeSync(openSync(path, "w"));
  spawnSync("truncate", ["-s", "1M", path]);
  return path;
}

function open(file: string, options: Partial<BackingOptions> = {}, its = shim): Backing {
  return openBacking({ file, ...options }, { shim: its, hasVolatileCache: true });
}

function refuses(errno: string, reason: RegExp, work: () => unknown): void {
  assert.throws(work, (error) => {
    assert.ok(error instanceof UblkError);
    assert.strictEqual(error.errno, errno);
    assert.match(error.message, reason);
    return true;
  });
}

/** A shim whose flock says this. */
function lockingWith(result: number): Shim {
  return Object.assign(Object.create(shim), {
    native: { ...shim.native, ubd_flock: () => result },
  });
}

test("a second writer is refused by any name, and told which process has the lock", () => {
  const file = image("disk");
  linkSync(file, join(directory, "link"));
  const first = open(file);
  const who = new RegExp(`process ${process.pid} \\(\\w+\\) serves or uses it.*--force`);
  for (const name of [file, join(directory, "link")]) {
    refuses("EBUSY", who, () => open(name));
    refuses("EBUSY", who, () => open(name, { readOnly: true }));
    shim.native.ubd_close(open(name, { force: true }).fd);
  }
  shim.native.ubd_close(first.fd);
  const readers = [open(file, { readOnly: true }), open(file, { readOnly: true })];
  refuses("EBUSY", who, () => open(file));
  for (const { fd } of readers) shim.native.ubd_close(fd);
  shim.native.ubd_close(open(file).fd);
});

test("a file system without locks does not count as one where nobody else writes", () => {
  const file = image("remote");
  for (
    const [errno, name] of [[ERRNO.ENOLCK, "ENOLCK"], [ERRNO.EOPNOTSUPP, "EOPNOTSUPP"]] as const
  ) {
    const remote = lockingWith(-errno);
    refuses(name, /a second writer would not be noticed.*--force/, () => open(file, {}, remote));
    shim.native.ubd_close(open(file, { force: true }, remote).fd);
  }
  // Somebody has it whom nobody here can see.
  refuses("EBUSY", /another process serves/, () => open(file, {}, lockingWith(-ERRNO.EAGAIN)));
});

const attach = (file: string) =>
  spawnSync("losetup", ["--find", "--show", file], { encoding: "utf8" }).stdout.trim();
const trial = process.getuid!() === 0 ? attach(image("trial")) : "";
if (trial) spawnSync("losetup", ["-d", trial]);

test("the kernel's loop driver has a file by whatever name it was given", {
  skip: trial ? false : "needs root and the kernel's loop driver",
}, () => {
  for (const name of ["plain", "ends in a space ", "new\nline", "(deleted)"]) {
    const file = image(name);
    const loop = attach(file);
    assert.match(loop, /^\/dev\/loop\d+$/);
    try {
      const reason = new RegExp(`${loop} has it as backing file`);
      refuses("EBUSY", reason, () => open(file));
      renameSync(file, join(directory, "renamed"));
      refuses("EBUSY", reason, () => open(join(directory, "renamed")));
      shim.native.ubd_close(open(image(name)).fd); // Another file of the same name.
      shim.native.ubd_close(open(join(directory, "renamed"), { readOnly: true }).fd);
    } finally {
      spawnSync("losetup", ["-d", loop]);
    }
  }
});
