// SPDX-License-Identifier: MIT
/** The log of a device: its bounds, and its names. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { deviceLogRemover, LOG_BYTES_KEPT, logPath, openDeviceLog } from "../../cli/device_log.ts";
import { makeStateDirectory, useStateDirectory } from "../../core/state.ts";
import { runtime } from "../../ffi/mod.ts";

const ID = 3_000_000 + process.pid;

/** Runs a script whose standard error is the log of device ID. */
function inServer(script: string): void {
  const root = join(import.meta.dirname!, "..", "..");
  const preamble =
    `import { boundDeviceLog, nameDeviceLog, readLog } from "${root}/cli/device_log.ts";
    import { Shim } from "${root}/ffi/mod.ts";
    import { fstatSync, writeSync } from "node:fs";
    import process from "node:process";\n`;
  const file = join(root, "tests", "shim", `.log-${process.pid}.ts`);
  writeFileSync(file, preamble + script);
  try {
    const args = runtime.startsWith("Deno") ? ["run", "-A", "-q", file] : [file];
    const log = openDeviceLog(ID);
    const { status } = spawnSync(process.execPath, args, {
      stdio: ["ignore", "inherit", log],
      timeout: 60_000,
    });
    assert.strictEqual(status, 0, readFileSync(logPath(ID), "latin1").slice(-2000));
  } finally {
    rmSync(file);
  }
}

test("a log that nobody reads stays short, and keeps the end", () => {
  try {
    inServer(`boundDeviceLog(new Shim(), true);
      const line = "x".repeat(1023) + "\\n";
      for (let i = 0; i < 200; i++) {
        for (let j = 0; j < 20; j++) writeSync(2, line);
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      writeSync(2, "last words\\n");
      const { text } = readLog(2);
      if (!text.endsWith("x\\nlast words\\n") || text.includes("\\0")) process.exit(1);
      if (text.length < ${LOG_BYTES_KEPT / 2} || text.length > ${LOG_BYTES_KEPT}) process.exit(2);
      if (/^x{0,1022}\\n/.test(text)) process.exit(3);
      while (fstatSync(2).blocks * 512 > ${3 * LOG_BYTES_KEPT}) {
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      process.exit(0);`);
    const { size, blocks } = statSync(logPath(ID));
    assert.ok(size > 4_000_000);
    assert.ok(blocks * 512 <= 3 * LOG_BYTES_KEPT, `${blocks * 512}`);
  } finally {
    rmSync(logPath(ID), { force: true });
  }
});

test("a log is opened as a file of ours only, and goes on where it was", () => {
  mkdirSync(logPath(ID));
  assert.throws(() => openDeviceLog(ID), { errno: "EISDIR" });
  rmSync(logPath(ID), { recursive: true });
  symlinkSync("/dev/zero", logPath(ID));
  assert.throws(() => openDeviceLog(ID), { errno: "ELOOP" });
  rmSync(logPath(ID));
  try {
    inServer(`writeSync(2, "one\\n");`);
    inServer(`writeSync(2, "two\\n");`);
    assert.strictEqual(readFileSync(logPath(ID), "utf8"), "one\ntwo\n");
    assert.strictEqual(statSync(logPath(ID)).mode & 0o777, 0o600);
  } finally {
    rmSync(logPath(ID), { force: true });
  }
});

test("whoever removes a device's log removes no other's that has its name by then", () => {
  writeFileSync(logPath(ID), "old");
  const [remove, again] = [deviceLogRemover(ID), deviceLogRemover(ID)];
  remove();
  assert.throws(() => statSync(logPath(ID)), { code: "ENOENT" });
  const holder = openDeviceLog(ID); // So that the number of its inode is not given again at once.
  assert.ok(holder > 0);
  rmSync(logPath(ID));
  writeFileSync(logPath(ID), "new");
  again();
  assert.strictEqual(readFileSync(logPath(ID), "utf8"), "new");
  rmSync(logPath(ID));
});

test("whoever removes a device's log removes no directory, and nothing through a link", () => {
  const scratch = mkdtempSync(join(tmpdir(), "ubd-log-"));
  const directory = join(scratch, "ubd");
  useStateDirectory(directory);
  try {
    makeStateDirectory();
    mkdirSync(logPath(ID));
    deviceLogRemover(ID)();
    assert.ok(statSync(logPath(ID)).isDirectory());
    rmdirSync(logPath(ID));
    writeFileSync(logPath(ID), "precious");
    renameSync(directory, `${directory}.real`);
    symlinkSync(`${directory}.real`, directory);
    deviceLogRemover(ID)();
    assert.strictEqual(readFileSync(logPath(ID), "utf8"), "precious");
    rmSync(directory);
    writeFileSync(directory, "a file");
    deviceLogRemover(ID)();
  } finally {
    useStateDirectory(undefined);
    rmSync(scratch, { recursive: true });
  }
});
