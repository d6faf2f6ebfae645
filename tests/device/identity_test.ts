// SPDX-License-Identifier: MIT
/** A device serves the file that it was made of, whatever becomes of that file's name. */

import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { deviceTest, isTold, NO_QUIESCE, type Scene, until } from "./helpers.ts";

/** A mounted file system with a file of 1 MiB, on an image that is then replaced by rename. */
async function replaced(scene: Scene, ...flags: string[]) {
  const image = scene.image("disk.img", 64 << 20);
  await scene.sh(`mkfs.ext4 -q ${image}`);
  const device = await scene.add("loop", image, "--recovery", ...flags);
  const point = await scene.mount("point", device.path);
  await scene.sh(`head -c 1M /dev/urandom > precious; cp precious ${point}/; sync
    truncate -s 96M new.img; mkfs.ext4 -q new.img; ln disk.img former.img; mv new.img disk.img`);
  const check = () => scene.sh(`echo 3 > /proc/sys/vm/drop_caches; cmp precious ${point}/precious`);
  return { image, device, point, check };
}

deviceTest("an image replaced by rename: upgrade and resize stay with the one that is served", {
  skip: NO_QUIESCE,
}, async (scene) => {
  const { device, point, check } = await replaced(scene);
  const upgrade = await scene.ubd("upgrade", `${device.id}`);
  assert.equal(upgrade.code, 0, upgrade.stderr);
  await check();
  // The size is that of the file which is served, too, and not the 96 MiB of the other one.
  await scene.sh("truncate -s 80M former.img");
  const resize = await scene.ubd("resize", `${device.id}`, "--json");
  assert.equal(JSON.parse(resize.stdout).sizeBytes, 80 << 20, resize.stderr);
  await scene.sh("rm disk.img former.img"); // Now it has no name at all.
  assert.equal((await scene.ubd("upgrade", `${device.id}`)).code, 0);
  await check();
  await scene.sh(`umount ${point}; fsck.ext4 -fn ${device.path}`);
  await scene.del(device);
});

deviceTest("an image replaced by rename: recover refuses the other one, and says what to do", {
  anyKernel: true,
}, async (scene) => {
  const { device, point, check } = await replaced(scene);
  process.kill(device.pid, "SIGKILL");
  await until(() => !existsSync(`/proc/${device.pid}`));
  const refused = await scene.ubd("recover", `${device.id}`);
  assert.equal(refused.code, 1, refused.stderr);
  assert.match(refused.stderr, /disk\.img on device \d+: ESTALE.*another file.*ubd del.*--force/);
  await scene.sh("mv disk.img other.img; mv former.img disk.img");
  const recovered = await scene.ubd("recover", `${device.id}`);
  assert.equal(recovered.code, 0, recovered.stderr);
  await check();
  await scene.sh(`umount ${point}; fsck.ext4 -fn ${device.path}`);

  process.kill(scene.adopt(recovered.stdout).pid, "SIGKILL");
  await scene.sh("mv disk.img former.img; mv other.img disk.img");
  assert.equal((await scene.ubd("recover", `${device.id}`)).code, 1);
  const forced = await scene.ubd("recover", "--force", `${device.id}`);
  assert.equal(forced.code, 0, forced.stderr);
  await scene.sh(`umount ${point} 2> /dev/null || true; cmp -n 1M ${device.path} disk.img`);
  await scene.del(device);
});

deviceTest("an image replaced by rename: a supervisor's next server serves the one it was", {
  anyKernel: true,
}, async (scene) => {
  const { device, point, check } = await replaced(scene, "--supervise");
  process.kill(device.pid, "SIGKILL");
  await check(); // Waits for the next one.
  await scene.sh(`umount ${point}; fsck.ext4 -fn ${device.path}`);
  await scene.del(device);
});

deviceTest("fault and a module's option of type file: another file is refused too", {
  anyKernel: true,
}, async (scene) => {
  const module = join(scene.directory, "disk.ts");
  writeFileSync(
    module,
    `import { defineTarget } from "ubd";
     import { openSync, readSync, fstatSync } from "node:fs";
     export default defineTarget({
       options: { data: { type: "file", required: true } },
       open({ data }) {
         const fd = openSync(data, "r");
         return {
           size: fstatSync(fd).size,
           read: ({ offset, length, buffer }) => readSync(fd, buffer, 0, length, offset),
         };
       },
     });`,
  );
  for (const target of [["fault"], [module, "--opt", `data=${scene.directory}/f.img`]]) {
    const image = scene.image("f.img", 1 << 20);
    const file = target[0] === "fault" ? [image] : [];
    const device = await scene.add(...target, ...file, "--recovery");
    process.kill(device.pid, "SIGKILL");
    await scene.sh("cp f.img g.img; mv g.img f.img");
    await until(() => !existsSync(`/proc/${device.pid}`));
    const { code, stderr } = await scene.ubd("recover", `${device.id}`);
    assert.equal(code, 1, stderr);
    assert.match(stderr, /f\.img on device \d+: ESTALE/);
    await scene.del(device);
  }
});

deviceTest("the disk under an image cannot be unmounted while it is served; other disks can", {
  anyKernel: true,
}, async (scene) => {
  const under = await scene.losetup(scene.image("under", 64 << 20));
  const beside = await scene.losetup(scene.image("beside", 64 << 20));
  await scene.sh(`mkfs.ext4 -q ${under}; mkfs.ext4 -q ${beside}`);
  const point = await scene.mount("point", under);
  const other = await scene.mount("other", beside);
  await scene.sh(
    `truncate -s 16M ${point}/disk.img; cp /ubd/examples/memory.ts ${scene.directory}`,
  );
  const targets = [
    ["loop", `${point}/disk.img`],
    ["fault", `${point}/disk.img`],
    [`${scene.directory}/memory.ts`],
  ];
  for (const target of targets) {
    const device = await scene.add(...target);
    const isModule = target[0]!.endsWith(".ts");
    const { code, stderr } = await scene.run(["umount", point]);
    assert.equal(code !== 0, !isModule, `${target[0]}: ${stderr}`);
    if (isModule) await scene.sh(`mount ${under} ${point}`);
    // Nothing keeps the other disk: a mount that only the server has would be EBUSY here.
    await scene.sh(`umount ${other}; wipefs -qa ${beside}; mkfs.ext4 -q ${beside}
      mount ${beside} ${other}`);
    await scene.del(device);
    // Whoever waited for the device's end may go on at once.
    await scene.sh(`umount ${point}; mount ${under} ${point}`);
  }
});

deviceTest("an image by descriptor: standard input, and one of the shell's", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const image = scene.image("disk.img", 8 << 20);
  await scene.sh(`head -c 1M /dev/urandom > data; dd status=none if=data of=${image} conv=notrunc`);
  for (
    const [redirection, path] of [
      [`< ${image}`, "/dev/stdin"],
      [`7<> ${image}`, "/proc/self/fd/7"],
      [`8<> ${image}`, "/dev/fd/8"],
    ]
  ) {
    const added = await scene.run(["bash", "-c", `ubd add loop ${path} ${redirection}`]);
    assert.equal(added.code, 0, added.stderr);
    const device = scene.adopt(added.stdout, added.stderr);
    assert.match(device.stdout, /"backing_file":"[^"]*\/disk\.img"/);
    await scene.sh(`cmp -n 1M data ${device.path}`);
    await scene.del(device);
  }
  const foreground = scene.start([
    "bash",
    "-c",
    `exec ubd add loop /dev/fd/9 --foreground 9<> disk.img`,
  ]);
  assert.ok(await until(() => isTold(foreground), 60_000), foreground.output());
  const device = scene.adopt(foreground.output());
  await scene.sh(`cmp -n 1M data ${device.path}`);
  foreground.kill("SIGINT");
  assert.equal((await foreground.ended).code, 0);
  scene.forget(device);
  const none = await scene.ubd("add", "loop", "/proc/self/fd/77");
  assert.equal(none.code, 2, none.stderr);
  assert.match(none.stderr, /EBADF.*descriptor 77/);
});

deviceTest("fault has its file for itself, in all of its queues and all of its servers", {
  skip: NO_QUIESCE,
}, async (scene) => {
  const image = scene.image("disk.img", 8 << 20);
  const device = await scene.add("fault", image, "--recovery", "-q", "2");
  const refused = async () => {
    for (const target of ["fault", "loop"]) {
      const { code, stderr } = await scene.ubd("add", target, image);
      assert.equal(code, 4, stderr);
      assert.match(stderr, /Cannot lock .*disk\.img: EBUSY.*process \d+ \(/);
    }
  };
  await refused();
  const upgraded = await scene.ubd("upgrade", `${device.id}`);
  assert.equal(upgraded.code, 0, upgraded.stderr);
  await refused();
  const { pid } = scene.adopt(upgraded.stdout);
  process.kill(pid, "SIGKILL");
  await until(() => !existsSync(`/proc/${pid}`));
  const recovered = await scene.ubd("recover", `${device.id}`);
  assert.equal(recovered.code, 0, recovered.stderr);
  await refused();
  await scene.del(scene.adopt(recovered.stdout));
  await scene.del(await scene.add("loop", image));
});

deviceTest("a name that is no UTF-8 is served, told, recovered and deleted", {
  anyKernel: true,
}, async (scene) => {
  const name = `$(printf '${scene.directory}/caf\\351.img')`;
  await scene.sh(`truncate -s 8M "${name}"`);
  const added = await scene.run(["bash", "-c", `ubd add loop "${name}" --recovery`]);
  assert.equal(added.code, 0, added.stderr);
  const device = scene.adopt(added.stdout);
  process.kill(device.pid, "SIGKILL");
  await until(() => !existsSync(`/proc/${device.pid}`));
  const recovered = await scene.ubd("recover", `${device.id}`);
  assert.equal(recovered.code, 0, recovered.stderr);
  const info = await scene.ubd("info", `${device.id}`);
  assert.match(info.stdout, /backing_file .*caf\\xE9\.img/);
  const state = JSON.parse(readFileSync(`/run/ubd/${device.id}.json`, "utf8"));
  assert.match(state.target.backing_file, /caf\u{10ffe9}\.img$/u);
  await scene.del(device);
});
