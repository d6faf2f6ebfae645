// SPDX-License-Identifier: MIT
/** What a server says reaches both logs: whole, in pieces the kernel takes, and not in floods. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import { createServerLog, split } from "../../cli/server_log.ts";

function listen(kernelFails = false) {
  const device: string[] = [];
  const kernel: string[] = [];
  const log = createServerLog(() => {}, {
    device: (text) => device.push(text),
    kernel: (record) => {
      if (kernelFails) throw new Error("EPERM");
      kernel.push(record);
    },
  });
  return { log, device, kernel };
}

test("each record of the kernel's log is one line of less than 1000 bytes, and none is lost", () => {
  const { log, device, kernel } = listen();
  const stack = `Error: ${"ü€𐍈".repeat(400)}\n    at read (file.ts:1:2)\n\n    at x`;
  log(stack);
  for (const record of kernel) {
    assert.ok(Buffer.byteLength(record) < 1000, `${Buffer.byteLength(record)}`);
    assert.match(record, /^ubd\[\d+\]: [^\n]+\n$/);
  }
  const said = kernel.map((record) => record.replace(/^ubd\[\d+\]: /, "").trimEnd());
  assert.strictEqual(said.slice(0, -2).join(""), stack.split("\n")[0]);
  assert.deepStrictEqual(
    said.slice(-2),
    ["    at read (file.ts:1:2)", "    at x"].map((line) => line),
  );
  assert.strictEqual(device.length, 1);
  assert.ok(device[0]!.endsWith(` ubd: ${stack}\n`));
});

test("split cuts between characters, and keeps all of them", () => {
  const line = "aü€𐍈".repeat(50);
  for (const bytes of [4, 5, 7, 10, 64, 499, 500, 1000]) {
    const parts = split(line, bytes);
    assert.strictEqual(parts.join(""), line);
    for (const part of parts) assert.ok(Buffer.byteLength(part) <= bytes);
  }
  assert.deepStrictEqual(split("", 10), [""]);
});

test("of 100 000 failing reads the kernel's log gets 100 lines at most; the end is never left out", () => {
  const { log, device, kernel } = listen();
  for (let read = 0; read < 100_000; read++) log(`READ at ${read}: EIO\n  at x`);
  log("device 0 is no longer served: EIO", true);
  assert.strictEqual(device.length, 100_001);
  assert.ok(kernel.length <= 100 && kernel.length > 10, `${kernel.length}`);
  assert.match(kernel.at(-1)!, /no longer served/);
});

test("a log that cannot be written is told to the other one", () => {
  const { log, device } = listen(true);
  log("a");
  assert.strictEqual(device.length, 1);

  const kernel: string[] = [];
  const places = {
    device: () => {
      throw new Error("ENOSPC, no space left");
    },
    kernel: (record: string) => void kernel.push(record),
  };
  createServerLog(() => {}, places)("b");
  assert.match(kernel.join(""), /log cannot be written: ENOSPC[^\n]*\nubd\[\d+\]: b\n/);
});
