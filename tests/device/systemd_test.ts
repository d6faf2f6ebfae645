// SPDX-License-Identifier: MIT
/** What a service manager sees of a server: the word that it is ready, and the mark in argv[0]. */

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { deviceTest, gone, until } from "./helpers.ts";

deviceTest("the manager is told when the device is LIVE, and SIGTERM deletes it", {
  anyKernel: true,
}, async (scene) => {
  const socket = join(scene.directory, "notify");
  const listener = scene.start([
    ...["perl", "-MSocket", "-e"],
    `$| = 1; socket(my $s, AF_UNIX, SOCK_DGRAM, 0) or die; bind($s, pack_sockaddr_un($ARGV[0]));
     print "bound\\n"; recv($s, my $data, 4096, 0); print $data, "\\n", qx(ls /dev/ublkb*);`,
    socket,
  ]);
  assert.ok(await until(() => listener.output() === "bound\n"));
  const server = scene.start(["ubd", "add", "null", "--foreground", "--root-storage"], {
    env: { NOTIFY_SOCKET: socket },
  });
  const { stdout } = await listener.ended;
  const [, path] = /^bound\nREADY=1\nSTATUS=(\S+) is live\n/.exec(stdout) ?? assert.fail(stdout);
  assert.ok(stdout.split("\n").includes(path!), stdout);
  assert.ok(await until(() => server.output().includes("dev id")));
  const device = scene.adopt(server.output());
  assert.equal(readFileSync(`/proc/${device.pid}/cmdline`, "latin1")[0], "@");
  process.kill(device.pid, "SIGTERM");
  assert.equal((await server.ended).code, 0);
  await gone(device);
  scene.forget(device);
});

deviceTest("started again with the same words, a server that was killed takes its device over", {
  anyKernel: true,
}, async (scene) => {
  const words = ["loop", scene.image("disk", 8 << 20), "-n", "9", "--recovery", "--foreground"];
  const start = async (...more: string[]) => {
    const server = scene.start(["ubd", "add", ...words, ...more]);
    assert.ok(await until(() => /dev id 9:.*\}\n/s.test(server.output()), 60_000));
    return { server, device: scene.adopt(server.output()) };
  };
  const first = await start();
  const reader = scene.start([
    "bash",
    "-c",
    `exec 3< ${first.device.path}; sleep 1; until [ -e go ]
    do sleep 0.1; done; head -c 64k <&3 | wc -c`,
  ]);
  process.kill(first.device.pid, "SIGKILL");
  await first.server.ended;
  const other = await scene.ubd("add", ...words, "--ro");
  assert.equal(other.code, 4, other.stderr);
  assert.match(other.stderr, /waits for a server, and was added with other options: ubd recover/);
  const { server, device } = await start("-d", "64"); // As an executable with another default would.
  writeFileSync(join(scene.directory, "go"), "");
  assert.equal((await reader.ended).stdout, "65536\n", "it is the same device");
  process.kill(device.pid, "SIGTERM");
  assert.equal((await server.ended).code, 0);
  await gone(device);
  scene.forget(device);
});

deviceTest("a server in the background is marked as root storage only when it is told", {
  anyKernel: true,
}, async (scene) => {
  const first = (pid: number) => readFileSync(`/proc/${pid}/cmdline`, "latin1")[0];
  const marked = await scene.add("null", "--root-storage");
  const plain = await scene.add("null");
  assert.deepEqual([first(marked.pid), first(plain.pid) === "@"], ["@", false]);
  await scene.del(marked, plain);
});
