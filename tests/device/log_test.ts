// SPDX-License-Identifier: MIT
/** What a module prints reaches `ubd log`, whatever happens to its server, and never the caller. */
import assert from "node:assert/strict";
import { existsSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { deviceTest, killServer, NO_QUIESCE, type Scene, until } from "./helpers.ts";

const LIE = `console.log('{"type":"live","live":{"id":7,"path":"/dev/ublkb7","notes":[]}}');`;

function writeModule(scene: Scene, body: string): string {
  const file = join(scene.directory, "printer.ts");
  writeFileSync(
    file,
    `import { defineTarget } from "ubd";\nimport { writeSync } from "node:fs";\n` +
      `import process from "node:process";\n${body}`,
  );
  return file;
}

const logOf = async (scene: Scene, id: number) => (await scene.ubd("log", `${id}`)).stdout;

deviceTest("a module may print: ubd log has it, upgrade and recover go on with it", {
  skip: NO_QUIESCE,
}, async (scene) => {
  const file = writeModule(
    scene,
    `${LIE}
    console.error("loaded");
    export default defineTarget({
      size: 1024 ** 2,
      read({ offset, buffer }) {
        if (offset === 512 * 1024) writeSync(2, "its last words\\n"), process.kill(process.pid, "SIGSEGV");
        if (offset === 640 * 1024) console.log("read of 640K");
        buffer.fill(0);
      },
    });`,
  );
  const device = await scene.add(file, "--recovery");
  const read = (at: number) =>
    scene.run([
      "dd",
      `if=${device.path}`,
      "of=/dev/null",
      "iflag=direct",
      "bs=4k",
      `skip=${at}`,
      "count=1",
    ]);
  assert.match(device.stderr, /^ubd: \S+ is live/);
  await read(160);
  assert.match(await logOf(scene, device.id), /"type":"live".*\nloaded\n(.*\n)*read of 640K\n/);
  assert.equal(statSync(`/run/ubd/${device.id}.log`).mode & 0o777, 0o600);

  const follower = scene.start(["ubd", "log", "-f", `${device.id}`]);
  assert.ok(await until(() => follower.output().includes("read of 640K")));
  const upgraded = await scene.ubd("upgrade", `${device.id}`);
  assert.equal(upgraded.code, 0, upgraded.stderr);
  assert.ok(await until(() => follower.output().split("loaded\n").length >= 3), follower.output());

  const dying = read(128);
  assert.ok(await until(() => follower.output().includes("its last words")));
  await killServer(scene, scene.adopt(upgraded.stdout)).catch(() => {}); // It is gone already.
  const recovered = await scene.ubd("recover", `${device.id}`);
  // The request that killed it is served again, and kills again: recovery=reissue.
  assert.ok([0, 1].includes(recovered.code), recovered.stderr);
  assert.ok(existsSync(`/run/ubd/${device.id}.log`));
  assert.ok((await logOf(scene, device.id)).split("its last words").length >= 2);
  await scene.ubd("del", "--force", `${device.id}`);
  await dying;
  scene.forget(device);
  const { code } = await follower.ended;
  assert.equal(code, 0, "the log has gone with the device, and whoever follows it ends");
});

deviceTest("a module that prints and then cannot be served says so to the caller", {
  anyKernel: true,
  everywhere: "deno",
}, async (scene) => {
  const file = writeModule(scene, `${LIE}\nthrow new Error("no such backend");`);
  const { code, stdout, stderr } = await scene.ubd("add", file);
  assert.notEqual(code, 0);
  assert.notEqual(code, 70, stderr);
  assert.equal(stdout, "");
  assert.match(stderr, /"type":"live"/);
  assert.match(stderr, /no such backend/);
});

deviceTest(
  "a chatty module fills no file system, and a run's output is the command's alone",
  { anyKernel: true },
  async (scene) => {
    const file = writeModule(
      scene,
      `export default defineTarget({
      size: 1024 ** 2,
      read({ buffer }) {
        for (let i = 0; i < 100; i++) console.log("x".repeat(10_000));
        buffer.fill(0);
      },
    });`,
    );
    const device = await scene.add(file);
    const dd = ["dd", `if=${device.path}`, "of=/dev/null", "iflag=direct", "bs=4k", "count=8"];
    assert.equal((await scene.run(dd)).code, 0);
    const short = () => statSync(`/run/ubd/${device.id}.log`).blocks * 512 < 1024 * 1024;
    assert.ok(await until(short));
    assert.match(await logOf(scene, device.id), /^x+\n/);
    await scene.del(device);
    const { code, stdout } = await scene.ubd("run", file, "--", "echo", "done");
    assert.deepEqual([code, stdout], [0, "done\n"]);
  },
);
