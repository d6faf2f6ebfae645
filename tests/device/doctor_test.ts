// SPDX-License-Identifier: MIT
/** `ubd doctor` finds what is wrong, says what mends it, and changes nothing. */

import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { deviceTest, type Scene, statePath, until } from "./helpers.ts";

interface Finding {
  check: string;
  level: string;
  what: string;
  why?: string;
  mend?: string;
}

async function findings(scene: Scene, code: number, ...prefix: string[]): Promise<Finding[]> {
  const outcome = await scene.run([...prefix, "ubd", "doctor", "--json"]);
  assert.equal(outcome.code, code, outcome.stdout + outcome.stderr);
  const { working, findings } = JSON.parse(outcome.stdout);
  assert.equal(working, code === 0);
  return findings;
}

const worse = (all: Finding[], level: string) => all.filter((finding) => finding.level === level);

deviceTest("doctor is content with this machine, and finds what servers left behind", {
  anyKernel: true,
}, async (scene) => {
  assert.deepEqual(worse(await findings(scene, 0), "problem"), []);
  const dead = await scene.add("null");
  const waiting = await scene.add("null", "--recovery=fail");
  const live = await scene.add("null");
  for (const { pid } of [dead, waiting]) process.kill(pid, "SIGKILL");
  const stale = statePath(77777);
  writeFileSync(stale, "{}");
  scene.finally(() => scene.sh(`rm ${stale}`));

  let found: Finding[] = [];
  const of = (check: string) =>
    worse(found, "warning").filter((finding) => finding.check === check)
      .map(({ what, mend }) => [what, mend]);
  await until(async () => {
    found = await findings(scene, 0);
    return of("devices").length === 2;
  });
  assert.deepEqual(of("devices"), [
    [`device ${dead.id} is DEAD: nobody serves it`, `ubd del ${dead.id}, or ubd gc`],
    [
      `device ${waiting.id} is FAIL_IO: nobody serves it`,
      `ubd recover ${waiting.id}, or ubd del ${waiting.id}`,
    ],
  ]);
  assert.deepEqual(of("state"), [[`${stale} is stale`, "ubd gc"]]);
  assert.ok(existsSync(stale) && existsSync(`/dev/ublkc${dead.id}`) && existsSync(live.path));
});

deviceTest(
  "doctor warns of swap on a device whose server may be swapped out",
  { anyKernel: true },
  async (scene) => {
    const swaps = [];
    for (const more of [[], ["--mlock"]]) {
      const device = await scene.add("loop", scene.image(`swap${more.length}`, 16 << 20), ...more);
      await scene.sh(`mkswap ${device.path} > /dev/null; swapon ${device.path}`);
      scene.finally(() => scene.sh(`swapoff ${device.path}`));
      swaps.push(device);
    }
    const warned = worse(await findings(scene, 0), "warning");
    assert.deepEqual(warned.filter(({ check }) => check === "devices").map(({ what }) => what), [
      `${swaps[0]!.path} is swap, and its server (process ${
        swaps[0]!.pid
      }) is not locked in memory`,
    ]);
  },
);

deviceTest("doctor tells a user, a machine without io_uring and one without the driver apart", {
  anyKernel: true,
}, async (scene) => {
  const user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
  const [refused] = worse(await findings(scene, 1, ...user), "problem");
  assert.match(refused!.what, /^\/dev\/ublk-control cannot be opened: EACCES$/);
  assert.match(refused!.mend!, /as root/);

  scene.finally(() => scene.sh("sysctl -q kernel.io_uring_disabled=0; modprobe ublk_drv"));
  await scene.sh("sysctl -q kernel.io_uring_disabled=2");
  const [off] = worse(await findings(scene, 1), "problem");
  assert.deepEqual(
    [off!.what, off!.mend],
    ["a ring cannot be set up: EPERM", "sysctl kernel.io_uring_disabled=0"],
  );
  await scene.sh("sysctl -q kernel.io_uring_disabled=0; modprobe -r ublk_drv");
  const [unloaded] = worse(await findings(scene, 1), "problem");
  assert.equal(unloaded!.what, "ublk_drv is not loaded");
  assert.match(unloaded!.mend!, /^modprobe ublk_drv;/);

  const barring = "/etc/modprobe.d/barring.conf";
  writeFileSync(barring, "install ublk_drv /bin/false\n");
  scene.finally(() => scene.sh(`rm ${barring}`));
  const [barred] = worse(await findings(scene, 1), "problem");
  assert.match(barred!.why!, /install \/bin\/false/);
  assert.match(barred!.mend!, /\/etc\/modprobe\.d/);
  assert.ok(!readFileSync("/proc/modules", "utf8").includes("ublk_drv"));
});
