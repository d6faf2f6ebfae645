// SPDX-License-Identifier: MIT
/** Devices of users without privileges, with real udev; nodes where nobody makes them. */

import assert from "node:assert/strict";
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  unlinkSync,
} from "node:fs";
import { join } from "node:path";
import { type Added, deviceTest, KERNEL, type Outcome, RUNNER, type Scene } from "./helpers.ts";

const NO_RULE = /run as root; or, .*once: sudo ubd udev install/;

/** A user with a runtime directory and an image, who runs commands. */
class User {
  readonly image: string;
  readonly runtime: string;

  constructor(readonly scene: Scene, readonly uid: number) {
    chmodSync(scene.directory, 0o711);
    this.runtime = join(scene.directory, `run-${uid}`);
    mkdirSync(this.runtime, { mode: 0o700 });
    this.image = scene.image(`disk-${uid}`, 16 << 20);
    for (const path of [this.runtime, this.image]) chownSync(path, uid, uid);
  }

  run(...command: string[]): Promise<Outcome> {
    const id = `${this.uid}`;
    return this.scene.run(
      ["setpriv", "--reuid", id, "--regid", id, "--clear-groups", ...command],
      { env: { XDG_RUNTIME_DIR: this.runtime, LC_ALL: "C" } },
    );
  }

  async add(): Promise<Added> {
    const { code, stdout, stderr } = await this.run(
      ...["ubd", "add", "loop", this.image, "--unprivileged"],
    );
    assert.equal(code, 0, stderr);
    return this.scene.adopt(stdout, stderr);
  }

  async refused(message: RegExp, ...command: string[]): Promise<void> {
    const { code, stderr } = await this.run(...command);
    assert.notEqual(code, 0, command.join(" "));
    assert.match(stderr, message);
  }
}

const access = (path: string) => {
  const { uid, gid, mode } = statSync(path);
  return [uid, gid, mode & 0o777];
};

deviceTest("without the udev rules, a user is told exactly what to install", {
  anyKernel: true,
}, async (scene) => {
  const user = new User(scene, 1001);
  await user.refused(NO_RULE, "ubd", "add", "null", "--unprivileged");
  await user.refused(NO_RULE, "ubd", "list");
  // Only half of the rules: the nodes stay root's, and so does what is left of the device.
  chmodSync("/dev/ublk-control", 0o666);
  scene.finally(() => Promise.resolve(chmodSync("/dev/ublk-control", 0o600)));
  await user.refused(NO_RULE, "ubd", "add", "null");
  const half = await user.run("ubd", "add", "null", "--unprivileged", "-n", "41");
  assert.equal(half.code, 5, half.stderr);
  assert.match(half.stderr, /open \/dev\/ublkc41.*sudo ubd udev install, then sudo ubd del 41/);
  assert.equal((await scene.ubd("del", "41")).code, 0);
});

/** Under other nodes in /dev: the device's own, a link to a file, and another device's. */
const SWAPPED = `give() { /usr/local/lib/ubd/ubd-owner "$1" || :; }
  nodes=(/dev/ublk-control /dev/ublkb$1 /dev/ublkc$1)
  cp -a "\${nodes[@]}" .; touch victim; chmod 644 victim; victim=$PWD/victim
  mount -t tmpfs tmpfs /dev; cp -a ublk-control ublkb$1 ublkc$1 /dev
  chown 0:0 "\${nodes[@]}"
  give ublkb$1; stat -c "b %u %a" /dev/ublkb$1
  give ublkc$1; stat -c "c %u %a" /dev/ublkc$1
  ln -sf $victim /dev/ublkb$1; give ublkb$1; stat -c "link %u %a" $victim
  rm /dev/ublkb$1; mknod -m 644 /dev/ublkb$1 b 1 0; give ublkb$1
  stat -c "other %u %a" /dev/ublkb$1`;

deviceTest("two users have a device each, and neither can touch the other's", {
  anyKernel: true,
  limitS: 240,
}, async (scene) => {
  const root = await scene.add("null");
  const nodes = [root.path, `/dev/ublkc${root.id}`];
  const before = nodes.map(access);
  const install = await scene.ubd("udev", "install");
  assert.equal(install.code, 0, install.stderr);
  scene.finally(() => scene.ubd("udev", "remove"));
  assert.equal(install.stderr, "", "udevd took notice");
  assert.deepEqual(access("/dev/ublk-control"), [0, 0, 0o666]);

  const [alice, bob] = [new User(scene, 1001), new User(scene, 1002)];
  const [hers, his] = await Promise.all([alice.add(), bob.add()]);
  for (const [user, device] of [[alice, hers], [bob, his]] as const) {
    const own = [user.uid, user.uid, 0o600];
    assert.deepEqual([device.path, `/dev/ublkc${device.id}`].map(access), [own, own]);
    assert.match(device.stdout, new RegExp(`UNPRIVILEGED_DEV .*\n.* owner: ${user.uid}:`));
    assert.ok(existsSync(join(user.runtime, "ubd", `${device.id}.json`)));
    const mine = await user.run(
      "bash",
      "-euc",
      `head -c 1M /dev/urandom > /tmp/${user.uid}
      dd status=none if=/tmp/${user.uid} of=${device.path} bs=64k oflag=direct
      cmp -n 1M /tmp/${user.uid} ${device.path}; ubd info ${device.id}; ubd list`,
    );
    assert.equal(mine.code, 0, mine.stderr);
    assert.match(mine.stdout, /backing_file/);
    const listed = [...mine.stdout.matchAll(/^dev id (\d+):/gm)].map(([, id]) => Number(id));
    assert.deepEqual(listed, [device.id], "a list of one's own");
  }
  // What udev runs gives away a device's own node, and nothing that is in its place.
  const swapped = await scene.run(["unshare", "-m", "bash", "-euc", SWAPPED, "-", `${hers.id}`]);
  assert.equal(swapped.code, 0, swapped.stdout + swapped.stderr);
  assert.equal(swapped.stdout, `b ${alice.uid} 600\nc ${alice.uid} 600\nlink 0 644\nother 0 644\n`);

  await bob.refused(/device \d+: EACCES.*owner/, "ubd", "del", "--force", `${hers.id}`);
  await bob.refused(/device \d+: EACCES.*owner/, "ubd", "info", `${hers.id}`);
  await bob.refused(/device \d+: EPERM/, "ubd", "del", `${root.id}`);
  await bob.refused(/Permission denied/, "dd", `if=${hers.path}`, "of=/dev/null", "count=1");
  await bob.refused(/Permission denied/, "dd", "if=/dev/null", `of=${hers.path}`);
  await bob.refused(/no recovery/, "ubd", "add", "null", "--unprivileged", "--recovery");
  await bob.refused(NO_RULE, "ubd", "add", "null");

  // A link, or another user's directory, where the state is to be kept.
  const carol = new User(scene, 1003);
  const state = join(carol.runtime, "ubd");
  const add = ["ubd", "add", "loop", carol.image, "--unprivileged", "-n", "43"];
  symlinkSync(alice.runtime, state);
  await carol.refused(/keep state in .*: ELOOP.*it is a symbolic link/, ...add);
  unlinkSync(state);
  mkdirSync(state);
  await carol.refused(/keep state in .*: EPERM.*it belongs to user 0/, ...add);
  assert.ok(!existsSync("/dev/ublkc43"));

  await scene.del(root);
  const other = await scene.add("null");
  assert.deepEqual([other.path, `/dev/ublkc${other.id}`].map(access), before, "root's are as ever");
  const asked = await scene.ubd("add", "null", "--unprivileged");
  assert.equal(asked.code, 2, asked.stderr);
  const owned = await alice.run("ubd", "del", `${hers.id}`);
  assert.equal(owned.code, 0, owned.stderr);
  scene.forget(hers);
  await scene.del(his); // Root may.
  assert.ok(!existsSync(join(bob.runtime, "ubd", `${his.id}.json`)));

  const remove = await scene.ubd("udev", "remove");
  assert.equal(remove.code, 0, remove.stderr);
  assert.deepEqual(access("/dev/ublk-control"), [0, 0, 0o600]);
  await alice.refused(NO_RULE, "ubd", "add", "null", "--unprivileged");
});

deviceTest("where nobody makes device nodes, root's server does, and removes them", {
  anyKernel: true,
}, async (scene) => {
  const script = `cp -a /dev/{ublk-control,null,zero,urandom,kmsg} .
    mount -t tmpfs tmpfs /dev; cp -a {ublk-control,null,zero,urandom,kmsg} /dev
    ubd add null -n 40
    ls -l /dev/ublk[bc]40
    dd status=none if=/dev/ublkb40 of=/dev/null bs=4k count=1
    ubd del 40
    ls /dev`;
  const { code, stdout, stderr } = await scene.run(["unshare", "-m", "bash", "-euc", script]);
  assert.equal(code, 0, stderr);
  assert.match(stdout, /^brw------- .* \/dev\/ublkb40\ncrw------- .* \/dev\/ublkc40$/m);
  assert.doesNotMatch(stdout.slice(stdout.lastIndexOf("kmsg")), /ublk[bc]/);
});

deviceTest("nodes of an earlier device are replaced; those of ubd go with the device", {
  anyKernel: true,
}, async (scene) => {
  const leave = KERNEL === "newest" ? "ubd quiesce 41" : "end";
  const script = `cp -a /dev/{ublk-control,null,zero,urandom,kmsg} .
    mount -t tmpfs tmpfs /dev; cp -a {ublk-control,null,zero,urandom,kmsg} /dev
    same() {
      [ "$(stat -c %Hr:%Lr /dev/ublkb41)" = "$(cat /sys/block/ublkb41/dev)" ]
      [ "$(stat -c %Hr:%Lr /dev/ublkc41)" = "$(cat /sys/class/ublk-char/ublkc41/dev)" ]
      dd status=none if=/dev/ublkb41 of=/dev/null bs=4k count=1 iflag=direct
    }
    end() { kill -9 $(ubd list -n 41 | grep -o 'pid [0-9]*' | cut -d' ' -f2); }
    mknod /dev/ublkb41 b 7 3; mknod /dev/ublkc41 c 1 5
    truncate -s 1M disk
    ubd add loop disk -n 41 --recovery; same
    ${leave}; ls /dev/ublk[bc]41
    ubd recover 41; same
    end
    ubd recover 41; same
    ubd del 41
    ls /dev`;
  const { code, stdout, stderr } = await scene.run(["unshare", "-m", "bash", "-euc", script]);
  assert.equal(code, 0, stderr + stdout);
  assert.doesNotMatch(stdout.slice(stdout.lastIndexOf("kmsg")), /ublk[bc]/);
});

deviceTest("the walk-through of docs/containers.md does what it says", {
  anyKernel: true,
  skip: RUNNER !== "binary" && "it copies the executable",
}, async (scene) => {
  const text = readFileSync(join(import.meta.dirname!, "../../docs/containers.md"), "utf8");
  const blocks = [...text.matchAll(/^```sh\n(.*?)^```$/gms)].map(([, block]) => block!);
  assert.equal(blocks.length, 4);
  scene.finally(() => scene.ubd("udev", "remove"));
  const executable = join(import.meta.dirname!, "../../dist/ubd");
  for (const block of blocks) await scene.sh(block, { env: { UBD: executable } });
});
