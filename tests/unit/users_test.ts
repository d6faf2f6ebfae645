// SPDX-License-Identifier: MIT
/** Who has mounted a device, as lines of /proc/PID/mountinfo tell it. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { mountsIn } from "../../core/users.ts";

const NODES = new Map([["259:0", "ublkb0"], ["259:1", "ublkb0p1"]]);

test("mountsIn finds a device by its number, its name as a source, and as a part", () => {
  const table: [string, string[]][] = [
    [
      "36 25 259:1 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/ublkb0p1 rw",
      ["/dev/ublkb0p1 is mounted on /mnt/a b"],
    ],
    // One that was mounted by another name.
    ["36 25 259:0 / /mnt rw - ext4 /dev/disk/by-label/x rw", ["/dev/ublkb0 is mounted on /mnt"]],
    [
      "40 25 0:44 /sub /mnt/b rw,relatime shared:1 master:2 - btrfs /dev/ublkb0 rw,subvolid=5",
      ["/dev/ublkb0 is mounted on /mnt/b"],
    ],
    [
      "41 25 254:0 / /x rw - xfs /dev/vda rw,attr2,logdev=/dev/ublkb0,noquota,rtdev=/dev/ublkb0p1",
      ["/dev/ublkb0 is the logdev of /x", "/dev/ublkb0p1 is the rtdev of /x"],
    ],
    // An earlier device of that name, which is gone but still mounted; others altogether.
    ["36 25 259:7 / /mnt rw - ext4 /dev/ublkb0 rw", []],
    ["37 25 0:45 / /tmp rw - tmpfs tmpfs rw,size=1k", []],
    ["38 25 0:46 / /mnt/c rw - btrfs /dev/ublkb01 rw", []],
    ["", []],
  ];
  for (const [line, users] of table) assert.deepStrictEqual(mountsIn(line, NODES), users, line);
  const all = table.map(([line]) => line).join("\n");
  assert.deepStrictEqual(mountsIn(all, NODES), table.flatMap(([, users]) => users));
});
