// SPDX-License-Identifier: MIT
/** The single executable: it needs five libraries and nothing of the directory it is started in. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { deviceTest, gone, isTold, RUNNER, until } from "./helpers.ts";

const skip = RUNNER === "binary" ? false : "needs the compiled executable";

deviceTest(
  "the executable runs in a bare directory tree",
  { skip, anyKernel: true },
  async (scene) => {
    const root = join(scene.directory, "root");
    const executable = await scene.sh("sed -n 's/^exec \\([^ ]*\\).*/\\1/p' $(command -v ubd)");
    await scene.sh(
      `mkdir -p ${root}/{proc,dev,sys,run,lib64,lib/x86_64-linux-gnu}
     cp ${executable} ${root}/ubd
     cp -L /lib64/ld-linux-x86-64.so.2 ${root}/lib64
     cd /lib/x86_64-linux-gnu
     cp -L libc.so.6 libm.so.6 libpthread.so.0 libdl.so.2 ${root}/lib/x86_64-linux-gnu`,
    );
    for (const name of ["proc", "dev", "sys", "run"]) {
      await scene.mount(`root/${name}`, "--bind", `/${name}`);
    }
    const version = await scene.run(["chroot", root, "/ubd", "version"]);
    assert.match(version.stdout, /^ubd \d+\.\d+\.\d+ /, version.stderr);
    const added = await scene.run(["chroot", root, "/ubd", "add", "null"]);
    assert.equal(added.code, 0, added.stderr);
    const device = scene.adopt(added.stdout, added.stderr);
    await scene.sh(`dd status=none if=${device.path} of=/dev/null bs=4k count=4 iflag=direct`);
    const deleted = await scene.run(["chroot", root, "/ubd", "del", `${device.id}`]);
    assert.equal(deleted.code, 0, deleted.stderr);
    await gone(device);
    scene.forget(device);
  },
);

deviceTest("the executable runs no code and takes no settings from its directory", {
  skip,
  anyKernel: true,
}, async (scene) => {
  const mark = join(scene.directory, "mark");
  await scene.sh(
    `printf '%s\\n' 'BUN_OPTIONS=--preload=./evil.ts' 'UBD_DEBUG_EXIT=added' > .env
     cp .env .env.local; cp .env .env.production
     printf 'preload = ["./evil.ts"]\\n[run]\\npreload = ["./evil.ts"]\\n' > bunfig.toml
     printf 'require("fs").writeFileSync("${mark}", "")\\n' > evil.ts
     printf '{"imports": {"commander": "./evil.ts"}}' > package.json
     mkdir node_modules; cp evil.ts node_modules/commander.ts`,
  );
  const job = scene.start(["ubd", "add", "null", "--foreground"]);
  assert.ok(await until(() => isTold(job), 60_000), job.output());
  const device = scene.adopt(job.output());
  job.kill("SIGINT");
  assert.equal((await job.ended).code, 0);
  scene.forget(device);
  assert.ok(!existsSync(mark), "evil.ts ran");
});
