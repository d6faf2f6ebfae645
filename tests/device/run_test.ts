// SPDX-License-Identifier: MIT
/** `ubd run`: the device lives as long as the command, however either of them ends. */

import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { type Added, deviceTest, gone, type Scene, servers, statePath, until } from "./helpers.ts";

/** Starts a command that tells its device and then waits. */
async function waiting(scene: Scene, image: string, tail = "exec sleep 600") {
  const script = `echo dev $UBD_DEVICE; ${tail}`;
  const job = scene.start(["ubd", "run", "loop", image, "--", "bash", "-c", script]);
  const told = /dev (\/dev\/ublkb(\d+))\n/;
  assert.ok(await until(() => told.test(job.output()), 60_000), job.output());
  const [, path, id] = told.exec(job.output())!;
  const { pid } = JSON.parse(readFileSync(statePath(Number(id)), "utf8"));
  assert.ok(existsSync(path!) && servers().includes(pid));
  const device = { id: Number(id), path, name: `ublkb${id}`, pid } as Added;
  return { job, device };
}

deviceTest("run gives the command its device, keeps its exit code, and leaves nothing", {
  anyKernel: true,
}, async (scene) => {
  const image = scene.image("disk", 8 << 20);
  const script = "echo {} $UBD_DEVICE; cat >&2 <&0; printf hi | dd of=$1 status=none; exit 7";
  const { code, stdout, stderr } = await scene.ubd(
    ...["run", "loop", image, "--", "bash", "-c", script, "x{}", "{}"],
  );
  assert.equal(code, 7, stderr);
  assert.match(stdout, /^(\/dev\/ublkb\d+) \1\n$/);
  assert.equal(stderr, "");
  assert.equal(await scene.sh(`head -c 2 ${image}`), "hi");
  assert.ok(!existsSync(stdout.split(" ")[0]!));

  assert.equal((await scene.ubd("run", "null", "--", "sh", "-c", "kill -9 $$")).code, 137);
  const absent = await scene.ubd("run", "null", "--", "./absent");
  assert.equal(absent.code, 127);
  assert.match(absent.stderr, /^ubd: Cannot run \.\/absent: /);
  assert.equal((await scene.ubd("run", "null", "--", image)).code, 126);
  assert.equal((await scene.ubd("run", "loop", "/absent", "--", "true")).code, 1);
});

deviceTest("run hands signals on, and its device goes with the command or with itself", {
  anyKernel: true,
  limitS: 240,
}, async (scene) => {
  const image = scene.image("disk", 8 << 20);
  const told = await waiting(scene, image, "trap 'kill $!; exit 9' TERM; sleep 600 & wait");
  process.kill(told.job.pid, "SIGTERM");
  assert.equal((await told.job.ended).code, 9, told.job.output());
  await gone(told.device);

  // As a terminal does: to the whole group.
  const typed = await waiting(scene, image);
  typed.job.kill("SIGINT");
  assert.equal((await typed.job.ended).code, 130);
  await gone(typed.device);

  const killed = await waiting(scene, image);
  const upgrade = await scene.ubd("upgrade", `${killed.device.id}`);
  assert.equal(upgrade.code, 1);
  assert.match(upgrade.stderr, /ubd run made it for the time of a command/);
  process.kill(killed.job.pid, "SIGKILL");
  await gone(killed.device, 60_000);
  killed.job.kill("SIGKILL");
  await killed.job.ended;

  // The server's death is not the command's, and what it leaves goes too.
  const orphan = await waiting(scene, image, "while kill -0 $PPID; do sleep 0.2; done");
  process.kill(orphan.device.pid, "SIGKILL");
  process.kill(orphan.job.pid, "SIGTERM");
  assert.equal((await orphan.job.ended).code, 143, orphan.job.output());
  await gone(orphan.device);
});

deviceTest("run says who still uses its device, and it goes when they are done", {
  anyKernel: true,
  limitS: 240,
}, async (scene) => {
  const image = scene.image("disk", 64 << 20);
  const point = join(scene.directory, "point");
  const mount = `mkfs.ext4 -q {}; mkdir -p ${point}; mount {} ${point}; echo {}`;
  const busy = await scene.ubd("run", "loop", image, "--", "bash", "-ec", mount);
  assert.equal(busy.code, 4, busy.stderr);
  const path = busy.stdout.trim();
  const id = Number(path.replace("/dev/ublkb", ""));
  assert.ok(
    busy.stderr.includes(
      `(${path} is mounted on ${point}; ${path} goes when that ends, or now: ubd del --force ${id})`,
    ),
    busy.stderr,
  );
  await scene.sh(`echo kept > ${point}/file; sync; sleep 2; cat ${point}/file`);
  await scene.sh(`umount ${point}`);
  await gone({ id, path, name: `ublkb${id}`, pid: -1 } as Added);

  const failed = await scene.ubd(
    "run",
    "loop",
    image,
    "--",
    "bash",
    "-c",
    `mount {} ${point}; exit 3`,
  );
  assert.equal(failed.code, 3, failed.stderr);
  assert.match(failed.stderr, /EBUSY/);
  assert.equal(await scene.sh(`cat ${point}/file; umount ${point}`), "kept");
});

/** Runs its arguments on a terminal of their own, and types Ctrl-C once there is a file `ready`. */
const TERMINAL = `
  sysopen(my $terminal, "/dev/ptmx", O_RDWR | O_NOCTTY) or die $!;
  my $number = pack("i", 0);
  ioctl($terminal, 0x40045431, $number) or die $!; # TIOCSPTLCK: unlock
  ioctl($terminal, 0x80045430, $number) or die $!; # TIOCGPTN
  my $child = fork;
  if (!$child) {
    setsid();
    open(STDIN, "+<", "/dev/pts/" . unpack("i", $number)) or die $!;
    ioctl(STDIN, 0x540e, 0) or die $!; # TIOCSCTTY
    open(STDOUT, ">&STDIN"); open(STDERR, ">&STDIN");
    exec @ARGV;
  }
  select(undef, undef, undef, 0.1) until -s "ready";
  syswrite($terminal, "\\003");
  waitpid($child, 0);
  exit($? & 127 ? 99 : $? >> 8);`;

deviceTest("Ctrl-C on a terminal reaches the command once, and the device is deleted", {
  anyKernel: true,
}, async (scene) => {
  const command = "trap 'echo int >> ints' INT; echo {} > ready; " +
    "until test -s ints; do sleep 0.1; done; sleep 1; exit 5";
  const ubd = ["ubd", "run", "null", "--", "bash", "-c", command];
  const { code, stderr } = await scene.run(["perl", "-MFcntl", "-MPOSIX", "-e", TERMINAL, ...ubd]);
  assert.equal(code, 5, stderr);
  assert.equal(await scene.sh("cat ints"), "int");
  assert.ok(!existsSync(await scene.sh("cat ready")));
});
