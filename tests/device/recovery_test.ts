// SPDX-License-Identifier: MIT
/** Devices that outlive their server. */

import assert from "node:assert/strict";
import process from "node:process";
import {
  type Added,
  DATA_MODES,
  deviceTest,
  scaled,
  type Scene,
  servers,
  startVerifier,
  until,
} from "./helpers.ts";

/** Kills the server and waits until the driver says so. */
async function kill(scene: Scene, device: Added, state: string): Promise<void> {
  process.kill(device.pid, "SIGKILL");
  await until(() => !servers().includes(device.pid));
  const told = async () => (await scene.ubd("list", "-n", `${device.id}`)).stdout.includes(state);
  assert.ok(await until(told, 60_000), `never ${state}`);
}

async function recover(scene: Scene, device: Added): Promise<Added> {
  const { code, stdout, stderr } = await scene.ubd("recover", "-n", `${device.id}`);
  assert.equal(code, 0, stderr);
  return scene.adopt(stdout, stderr);
}

deviceTest("recover serves the same device again: reissue loses no I/O of a running fio", {
  limitS: scaled(300, 2400),
  everywhere: true,
  oldest: true,
}, async (scene) => {
  let device = await scene.add("loop", scene.image("disk", 64 << 20), "--recovery=reissue");
  const fio = startVerifier(scene, device, 16);
  const kills = scaled(2, 100);
  for (let round = 0; round < kills; round++) {
    await scene.sh(`sleep ${1 + round % 2}`);
    fio.goesOn();
    await kill(scene, device, "state QUIESCED");
    const next = await recover(scene, device);
    assert.equal(next.path, device.path);
    assert.equal(/flags (\S+)/.exec(next.stdout)![1], /flags (\S+)/.exec(device.stdout)![1]);
    device = next;
  }
  await fio.finish();
  await scene.del(device);
});

deviceTest("recover finds the way of the data: reissue loses no I/O in any of them", {
  limitS: 300,
}, async (scene) => {
  const devices = [];
  for (const { flags } of DATA_MODES) {
    const image = scene.image(`disk-${devices.length}`, 16 << 20);
    devices.push(await scene.add("loop", image, "--recovery", ...flags));
  }
  const verifiers = devices.map((device) => startVerifier(scene, device, 16));
  await scene.sh("sleep 1");
  await Promise.all(devices.map(async (device, index) => {
    verifiers[index]!.goesOn();
    await kill(scene, device, "state QUIESCED");
    const next = await recover(scene, device);
    assert.match(next.stderr, new RegExp(`, ${DATA_MODES[index]!.note}\n`));
    devices[index] = next;
  }));
  for (const verifier of verifiers) await verifier.finish();
  for (const device of devices) await scene.del(device);
});

deviceTest("a mounted ext4 outlives the server: files whole, fsck finds nothing", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add("loop", scene.image("disk", 64 << 20), "--recovery");
  await scene.sh(`mkfs.ext4 -q ${device.path}`);
  const point = await scene.mount("point", device.path);
  await scene.sh("head -c 4M /dev/urandom > data");
  const writer = scene.start(["bash", "-c", `for i in {1..6}; do cp data ${point}/$i; sync; done`]);
  await scene.sh("sleep 1");
  await kill(scene, device, "state QUIESCED");
  const next = await recover(scene, device);
  assert.equal((await writer.ended).code, 0);
  await scene.sh(`for i in {1..6}; do cmp data ${point}/$i; done`);
  await scene.sh(`umount ${point}; fsck.ext4 -f -n ${next.path}`);
  await scene.del(next);
});

for (const [mode, state] of [["wait", "QUIESCED"], ["fail", "FAIL_IO"]] as const) {
  deviceTest(
    `recover in mode ${mode}: what was written before is read after`,
    {},
    async (scene) => {
      const { stdout: features } = await scene.ubd("features");
      if (mode === "fail" && !features.includes("RECOVERY_FAIL_IO")) {
        const refused = await scene.ubd("add", "null", "--recovery=fail");
        assert.equal(refused.code, 1);
        assert.match(refused.stderr, /kernel 6\.12\S* lacks USER_RECOVERY_FAIL_IO \(needs 6\.13\)/);
        return;
      }
      const device = await scene.add("loop", scene.image("disk", 16 << 20), `--recovery=${mode}`);
      await scene.sh(`head -c 1M /dev/urandom > data; dd status=none if=data of=${device.path} \
      bs=64k oflag=direct`);
      await kill(scene, device, `state ${state}`);
      if (mode === "fail") {
        const read = await scene.run(["dd", `if=${device.path}`, "of=/dev/null", "iflag=direct"]);
        assert.notEqual(read.code, 0, "I/O fails until there is a server");
      }
      const waiting = mode === "wait" &&
        scene.start(["dd", `if=${device.path}`, "of=/dev/null", "count=1", "iflag=direct"]);
      const next = await recover(scene, device);
      if (waiting) assert.equal((await waiting.ended).code, 0, "later I/O waits for a server");
      await scene.sh(`cmp -n 1M data ${next.path}`);
      await scene.del(next);
    },
  );
}

deviceTest("recover refuses what it cannot recover", {}, async (scene) => {
  const device = await scene.add("null");
  const alive = await scene.ubd("recover", `${device.id}`);
  assert.notEqual(alive.code, 0);
  assert.match(alive.stderr, /START_USER_RECOVERY on device \d+: E(INVAL|BUSY)/);
  assert.equal((await scene.ubd("recover", "999")).code, 3);
  assert.equal((await scene.ubd("recover")).code, 2);
  await scene.del(device);
});
