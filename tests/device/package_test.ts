// SPDX-License-Identifier: MIT
/** The npm package, packed and installed where there is no compiler and no network. */

import assert from "node:assert/strict";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { deviceTest, RUNNER } from "./helpers.ts";

const DIST = join(import.meta.dirname!, "../../dist");
const tarball = existsSync(DIST) && readdirSync(DIST).find((name) => name.endsWith(".tgz"));

deviceTest("bunx ubd serves a device from the packed package", {
  anyKernel: true,
  skip: !tarball
    ? "dist/ has no packed package: run npm run build"
    : RUNNER !== "binary" && "the package is the same, whatever else ubd is run as",
}, async (scene) => {
  await scene.sh(`echo '{}' > package.json; bun add ${join(DIST, tarball as string)}`);
  const { code, stdout, stderr } = await scene.run(["bun", "x", "ubd", "add", "null"]);
  assert.equal(code, 0, stderr);
  const device = scene.adopt(stdout, stderr);
  await scene.sh(`dd if=${device.path} of=/dev/null bs=1M count=1 status=none`);
  assert.equal((await scene.run(["bun", "x", "ubd", "del", `${device.id}`])).code, 0);
  scene.forget(device);
});
