// SPDX-License-Identifier: MIT
/**
 * Who uses a device: mounts as lines of /proc/PID/mountinfo tell of them, and, where there are loop
 * devices, real users of a real device under all kinds of names.
 */
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { closeSync, mkdtempSync, openSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { charDeviceOpeners, deviceUsers, mountsIn } from "../../core/users.ts";
import { contents, Process } from "../../core/proc.ts";
import { Shim } from "../../ffi/mod.ts";

const TIMEOUT = { timeout: 60_000 };

const NODES = new Map([["259:0", "ublkb0"], ["259:1", "ublkb0p1"]]);

test("mountsIn finds a device by its number, its node as a source, and as a part", async () => {
  const table: [string, string[]][] = [
    [
      "36 25 259:1 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/ublkb0p1 rw",
      ["/dev/ublkb0p1 is mounted on /mnt/a b"],
    ],
    // One that was mounted by another name.
    ["36 25 259:0 / /mnt rw - ext4 /dev/disk/by-label/x rw", ["/dev/ublkb0 is mounted on /mnt"]],
    [
      "40 25 0:44 /sub /mnt/b rw,relatime shared:1 master:2 - btrfs /tmp/a\\040node rw,subvolid=5",
      ["/dev/ublkb0 is mounted on /mnt/b"],
    ],
    [
      "41 25 254:0 / /x rw - xfs /dev/vda rw,attr2,logdev=/tmp/a\\040node,noquota,rtdev=/dev/p1",
      ["/dev/ublkb0 is the logdev of /x", "/dev/ublkb0p1 is the rtdev of /x"],
    ],
    // What would clear the screen, or look like a line of its own.
    [
      "36 25 259:0 / /mnt/\x1b[2J\\012b rw - ext4 /dev/x rw",
      ["/dev/ublkb0 is mounted on /mnt/\\u001b[2J\\u000ab"],
    ],
    // An earlier device of that name, which is gone but still mounted; others altogether.
    ["36 25 259:7 / /mnt rw - ext4 /dev/ublkb0 rw", []],
    ["36 25 0:47 / /mnt rw - btrfs /dev/ublkb0 rw,logdev=/dev/ublkb0p1", []],
    ["37 25 0:45 / /tmp rw - tmpfs tmpfs rw,size=1k", []],
    ["38 25 0:46 / /mnt/c rw - nfs4 /tmp/a\\040node rw", []],
    ["", []],
  ];
  const numbers = new Map([["/tmp/a node", "259:0"], ["/dev/p1", "259:1"], ["/dev/ublkb0", "7:9"]]);
  const find = (text: string) =>
    mountsIn(text, NODES, (path) => Promise.resolve(numbers.get(path)));
  for (const [line, users] of table) assert.deepStrictEqual(await find(line), users, line);
  const all = table.map(([line]) => line).join("\n");
  assert.deepStrictEqual(await find(all), table.flatMap(([, users]) => users));
});

/** A loop device of a file; undefined: this is no place for that. */
function loopDevice(file: string): string | undefined {
  if (process.getuid!() !== 0) return undefined;
  spawnSync("truncate", ["-s", "8M", file]);
  const { status, stdout } = spawnSync("losetup", ["--find", "--show", file], { encoding: "utf8" });
  return status === 0 ? stdout.trim() : undefined;
}

function run(command: string, ...args: string[]): void {
  const { status, stderr } = spawnSync(command, args, { encoding: "utf8" });
  assert.strictEqual(status, 0, `${command} ${args.join(" ")}: ${stderr}`);
}

/** Ends what a failed test has left. */
const running = new Set<() => Promise<void>>();

function isThere(group: number): boolean {
  try {
    return process.kill(group, 0);
  } catch {
    return false;
  }
}

/** A program that has a file open, or whatever `script` does with "$1". */
async function user(path: string, script = 'exec 5< "$1"'): Promise<() => Promise<void>> {
  const child = spawn("bash", ["-c", `${script}; echo; exec sleep 600`, "-", path], {
    stdio: ["ignore", "pipe", "ignore"],
    detached: true, // A group of its own: whatever it starts ends with it.
  });
  const ended = new Promise<void>((resolve) => child.on("exit", () => resolve()));
  await new Promise((resolve) => child.stdout.once("data", resolve));
  const group = -child.pid!;
  const end = async () => {
    if (running.delete(end)) process.kill(group, "SIGKILL");
    await ended;
    for (; isThere(group); await sleep(10)); // What it has started may end after it.
  };
  running.add(end);
  return end;
}

test("deviceUsers finds who has a device under another name", TIMEOUT, async (t) => {
  const directory = mkdtempSync(join(tmpdir(), "ubd-users-"));
  const disk = loopDevice(join(directory, "image"));
  if (disk === undefined) return t.skip("needs root and loop devices");
  const name = disk.slice("/dev/".length);
  const node = join(directory, "no\nde");
  const shown = join(directory, "no\\u000ade");
  const [major, minor] = contents(`/sys/block/${name}/dev`).trim().split(":");
  const found = async () => (await deviceUsers(name)).map((line) => line.replace(/\d+ \(/, "N ("));
  try {
    run("mknod", node, "b", major!, minor!);
    assert.deepStrictEqual(await found(), [], "nobody");

    // A file of the device's name is not the device.
    const namesake = join(directory, name);
    openSync(namesake, "w");
    const other = await user(namesake);
    assert.deepStrictEqual(await found(), []);
    await other();

    const reader = await user(node);
    assert.deepStrictEqual(await found(), [`${disk} is open as ${shown} in process N (sleep)`]);
    await reader();

    // The node itself may be gone.
    const moved = join(directory, "moved");
    run("mknod", moved, "b", major!, minor!);
    const orphan = await user(moved, 'exec 5< "$1"; rm "$1"');
    const [line] = await found();
    assert.strictEqual(line, `${disk} is open as ${moved} (deleted) in process N (sleep)`);
    await orphan();

    const chrooted = await user(
      directory,
      'exec unshare -m bash -c \'mount --bind /dev/null "$1"/image; exec 5< "$1"/no*de; echo; exec sleep 600\' - "$1"',
    );
    assert.deepStrictEqual(await found(), [`${disk} is open as ${shown} in process N (sleep)`]);
    await chrooted();

    const shim = new Shim();
    const held = shim.open(node, 0o10000000);
    assert.ok(held >= 0);
    assert.deepStrictEqual(await found(), [], "O_PATH is a hold on the node alone");
    shim.native.ubd_close(held);

    // The block device's number is not the character device's.
    const opener = await user(node);
    const asCharacter = { charClass: "block" as const, charName: () => name };
    assert.deepStrictEqual(await charDeviceOpeners(asCharacter, 0), []);
    await opener();

    // Of a mount namespace, the process with the lowest id is in a chroot and sees no mounts.
    run("mkfs.ext4", "-q", disk);
    const mounted = await user(
      directory,
      `exec unshare -m bash -c 'cd "$1"; mkdir m r; mount --bind / r; mount ${disk} m; sleep 600 &
        echo; exec chroot r sleep 600' - "$1"`,
    );
    assert.deepStrictEqual(await found(), [`${disk} is mounted on ${directory}/m`]);
    await mounted();

    const second = spawnSync("losetup", ["--find", "--show", node], { encoding: "utf8" }).stdout
      .trim();
    assert.deepStrictEqual(await found(), [`${disk} is held by ${second}`]);
    run("losetup", "-d", second);
  } finally {
    for (const end of running) await end();
    run("losetup", "-d", disk);
    rmSync(directory, { recursive: true });
  }
});

test("charDeviceOpeners finds a character device by its number, not by its name", async (t) => {
  if (process.getuid!() !== 0) return t.skip("needs root");
  // In place of the driver's: one that few have open.
  const dialect = { charClass: "mem", charName: () => "full" };
  const directory = mkdtempSync(join(tmpdir(), "ubd-users-"));
  const node = join(directory, "node");
  const namesake = join(directory, "full");
  try {
    run("mknod", node, "c", "1", "7");
    // Others may have it open, too.
    const isOpener = async (pid: number, id = 0) =>
      (await charDeviceOpeners(dialect, id)).includes(pid);
    closeSync(openSync(namesake, "w"));
    const own = openSync(namesake, "r");
    assert.strictEqual(await isOpener(process.pid), false, "a file of that name");
    closeSync(own);
    const fd = openSync(node, "r");
    assert.strictEqual(await isOpener(process.pid), true, "a node of another name");
    closeSync(fd);
    assert.strictEqual(await isOpener(process.pid), false);
    assert.deepStrictEqual(await charDeviceOpeners({ ...dialect, charName: () => "none" }, 0), []);
  } finally {
    rmSync(directory, { recursive: true });
  }
});

test("a Process is that one, not who has its id", async () => {
  const child = spawn("sleep", ["600"], { stdio: "ignore" });
  const ended = new Promise((resolve) => child.on("exit", (_, signal) => resolve(signal)));
  const found = Process.find(child.pid!)!;
  assert.ok(found.lives);
  const shim = new Shim();
  assert.ok(found.signal(shim, "SIGSTOP"));
  while (found.state !== "T") await new Promise((resolve) => setTimeout(resolve, 1));
  assert.ok(found.signal(shim, "SIGKILL"));
  assert.strictEqual(await ended, "SIGKILL");
  assert.deepStrictEqual([found.state, found.lives, found.signal(shim, "SIGTERM")], [
    undefined,
    false,
    false,
  ]);
  assert.strictEqual(Process.find(child.pid!), undefined);
  // As if this process had got the id since.
  const successor: Process = Object.assign(found, { pid: process.pid });
  assert.deepStrictEqual([successor.lives, successor.signal(shim, "SIGKILL")], [false, false]);
});
