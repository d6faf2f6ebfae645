// SPDX-License-Identifier: MIT
/**
 * `npm run demo`: runs demo.sh on this machine's own driver when there is one and it may be used,
 * else in a QEMU guest with Debian's newest kernel, and says which.
 * @module
 */

import { spawnSync } from "node:child_process";
import { accessSync, constants, existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { build } from "./build.ts";
import { runInGuest } from "./vm.ts";

const ROOT = join(import.meta.dirname!, "..");

/** Why the host's driver cannot be used; undefined when it can. */
function hostObstacle(): string | undefined {
  const control = "/dev/ublk-control";
  if (!existsSync(control)) return "this machine has no ublk driver loaded";
  try {
    accessSync(control, constants.R_OK | constants.W_OK);
  } catch {
    return `${control} may not be opened by this user`;
  }
  return process.getuid!() === 0 ? undefined : "mounting needs root";
}

await build();
const obstacle = hostObstacle();
if (obstacle === undefined) {
  console.log("Demo on this machine's own kernel.");
  const env = { ...process.env, PATH: `${join(ROOT, "dist")}:${process.env.PATH}` };
  const { status } = spawnSync(join(ROOT, "tools/demo.sh"), { stdio: "inherit", env });
  process.exit(status ?? 1);
}
console.log(`Demo in a QEMU guest with Debian's newest kernel, since ${obstacle}.`);
console.log("The first time, the guest is downloaded and built: about two minutes.");
const { exitCode } = await runInGuest({
  ubd: "binary",
  command: "uname -sr; TMPDIR=/scratch /ubd/tools/demo.sh",
  onOutput: (chunk) => process.stdout.write(chunk),
});
process.exit(exitCode);
