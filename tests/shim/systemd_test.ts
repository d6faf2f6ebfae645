// SPDX-License-Identifier: MIT
/** Readiness, the mark of root storage, and the unit. */
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { after, test } from "node:test";
import { notify, surviveShutdown } from "../../cli/systemd.ts";

const ROOT = join(import.meta.dirname!, "..", "..");
const scratch = mkdtempSync(join(tmpdir(), "ubd-systemd-"));
after(() => rmSync(scratch, { recursive: true }));

const LISTENER = `use Socket; $| = 1; my $name = shift; $name =~ s/^@/\\0/;
  socket(my $socket, AF_UNIX, SOCK_DGRAM, 0) or die;
  bind($socket, pack_sockaddr_un($name)) or die;
  print "bound\\n"; recv($socket, my $data, 4096, 0); print $data;`;

/** @returns what a listener on this socket was told. */
async function heard(socket: string, state: string): Promise<string[]> {
  const listener = spawn("perl", ["-e", LISTENER, socket], {
    stdio: ["ignore", "pipe", "inherit"],
    timeout: 30_000,
  });
  const lines: string[] = [];
  for await (const line of createInterface({ input: listener.stdout })) {
    lines.push(line);
    if (lines.length > 1) continue;
    process.env.NOTIFY_SOCKET = socket;
    notify(state);
    delete process.env.NOTIFY_SOCKET;
  }
  return lines;
}

test("notify reaches a socket by its path and by its abstract name", async () => {
  for (const socket of [join(scratch, "notify"), `@ubd-${process.pid}`]) {
    const lines = await heard(socket, "READY=1\nSTATUS=here");
    assert.deepStrictEqual(lines, ["bound", "READY=1", "STATUS=here"], socket);
  }
});

test("notify does nothing without a service manager, and survives one that is gone", () => {
  notify("READY=1");
  for (const socket of [join(scratch, "absent"), "@ubd-absent", `/${"x".repeat(200)}`]) {
    process.env.NOTIFY_SOCKET = socket;
    notify("READY=1");
    delete process.env.NOTIFY_SOCKET;
  }
});

test("surviveShutdown makes argv[0] start with @, and changes nothing else", () => {
  const words = () => readFileSync("/proc/self/cmdline", "latin1");
  const before = words();
  surviveShutdown();
  assert.strictEqual(words(), `@${before.slice(1)}`);
});

const analyzes = spawnSync("systemd-analyze", ["--version"]).status === 0;

test("systemd-analyze has nothing against the unit", {
  skip: analyzes ? false : "needs systemd-analyze",
}, () => {
  const unit = readFileSync(join(ROOT, "systemd", "ubd@.service"), "utf8");
  const copy = join(scratch, "ubd@data.service");
  const verify = (text: string) => {
    writeFileSync(copy, text.replaceAll("/usr/local/sbin/ubd", process.execPath));
    const { status, stderr } = spawnSync("systemd-analyze", ["verify", copy], { encoding: "utf8" });
    return { status, complaints: stderr.split("\n").filter((line) => line.includes("ubd@")) };
  };
  assert.deepStrictEqual(verify(unit), { status: 0, complaints: [] });
  assert.match(verify(unit.replace("KillMode=mixed", "KillMode=mix")).complaints[0]!, /kill mode/);
});
