// SPDX-License-Identifier: MIT
/**
 * Who uses a block device: mounts (in any mount namespace), swap, devices on top of it (dm, md,
 * loop, bcache), and processes that have it open. Read from /proc and /sys, without opening it.
 * @module
 */

import { setTimeout as sleep } from "node:timers/promises";
import { unescapeMount } from "./isolation.ts";
import { contents, linkTarget, namesIn } from "./proc.ts";

/** udev and its helpers look at every device that changes, and let go by themselves. */
const PASSING = /^\(?(udev-worker|systemd-udevd|udevd|blkid|partx)\)?$/;

/** How long other openers may take to leave: a command that has just ended may linger. */
const PATIENCE_MS = 1000;

/** @returns one line for each user, such as "mounted on /mnt"; empty when there is none. */
export async function deviceUsers(blockName: string): Promise<string[]> {
  const lasting = () => {
    const nodes = deviceNodes(blockName);
    const swaps = swapPaths(blockName).map((path) => `${path} is swap`);
    const parts = [...journals(nodes), ...btrfs(nodes)];
    return [...mounts(nodes), ...parts, ...swaps, ...holders(blockName), ...loops(nodes)];
  };
  const deadline = performance.now() + PATIENCE_MS;
  for (;;) {
    const users = lasting();
    if (users.length > 0) return users;
    const open = openers(blockName);
    if (open.length === 0 || performance.now() > deadline) return open;
    await sleep(50);
  }
}

/** "major:minor" of the disk and its partitions → name. */
function deviceNodes(blockName: string): Map<string, string> {
  const nodes = new Map<string, string>();
  const disk = `/sys/block/${blockName}`;
  for (const name of [".", ...namesIn(disk).filter((entry) => entry.startsWith(blockName))]) {
    const number = contents(`${disk}/${name}/dev`).trim();
    if (number) nodes.set(number, name === "." ? blockName : name);
  }
  return nodes;
}

function mounts(nodes: Map<string, string>): string[] {
  const found = new Set<string>();
  const namespaces = new Set<string>();
  for (const pid of processIds()) {
    const namespace = linkTarget(`/proc/${pid}/ns/mnt`);
    if (namespaces.has(namespace)) continue;
    namespaces.add(namespace);
    for (const user of mountsIn(contents(`/proc/${pid}/mountinfo`), nodes)) found.add(user);
  }
  return [...found];
}

/**
 * File systems on several devices, such as btrfs, have a number of their own (0:N) and name one of
 * them as their source; XFS tells in its options where its log and its realtime data are.
 */
export function mountsIn(mountinfo: string, nodes: ReadonlyMap<string, string>): string[] {
  const names = new Set(nodes.values());
  const nameOf = (path = "") => {
    const name = unescapeMount(path).replace("/dev/", "");
    return names.has(name) ? name : undefined;
  };
  return mountinfo.split("\n").flatMap((line) => {
    const [mount = "", superblock = ""] = line.split(" - ");
    const [, , number = "", , point = ""] = mount.split(" ");
    const [, source, options = ""] = superblock.split(" ");
    const where = unescapeMount(point);
    const main = nodes.get(number) ?? (number.startsWith("0:") ? nameOf(source) : undefined);
    const parts = options.split(",").flatMap((option) => {
      const [, what, path] = /^(logdev|rtdev)=(.*)$/.exec(option) ?? [];
      const name = nameOf(path);
      return name === undefined ? [] : [`/dev/${name} is the ${what} of ${where}`];
    });
    return [...(main === undefined ? [] : [`/dev/${main} is mounted on ${where}`]), ...parts];
  });
}

/** Those of ext4 that are on a device of their own; others are named NAME-INODE. */
function journals(nodes: Map<string, string>): string[] {
  const names = new Set(nodes.values());
  return namesIn("/proc/fs/jbd2").filter((name) => names.has(name))
    .map((name) => `/dev/${name} is the journal of a mounted file system`);
}

/** No more than one device of a btrfs is in its mount's source. */
function btrfs(nodes: Map<string, string>): string[] {
  const names = new Set(nodes.values());
  return namesIn("/sys/fs/btrfs").flatMap((id) =>
    namesIn(`/sys/fs/btrfs/${id}/devices`).filter((name) => names.has(name))
      .map((name) => `/dev/${name} is a part of the mounted btrfs ${id}`)
  );
}

/** @returns paths of the device and its partitions that are swap. */
export function swapPaths(blockName: string): string[] {
  const names = new Set(deviceNodes(blockName).values());
  const paths = contents("/proc/swaps").split("\n").slice(1).map((line) => line.split(/\s/)[0]!);
  return paths.filter((path) => names.has(path.replace("/dev/", "")));
}

function holders(blockName: string): string[] {
  const disk = `/sys/block/${blockName}`;
  const parts = namesIn(disk).filter((entry) => entry.startsWith(blockName));
  return [".", ...parts].flatMap((part) =>
    namesIn(`${disk}/${part}/holders`).map((holder) =>
      `/dev/${part === "." ? blockName : part} is held by /dev/${holder}`
    )
  );
}

function loops(nodes: Map<string, string>): string[] {
  const names = new Set(nodes.values());
  return namesIn("/sys/block").filter((name) => name.startsWith("loop")).flatMap((loop) => {
    const backing = contents(`/sys/block/${loop}/loop/backing_file`).trim();
    return names.has(backing.replace("/dev/", "")) ? [`${backing} is held by /dev/${loop}`] : [];
  });
}

function openers(blockName: string): string[] {
  const found: string[] = [];
  for (const pid of processIds()) {
    const opened = namesIn(`/proc/${pid}/fd`).map((fd) => linkTarget(`/proc/${pid}/fd/${fd}`))
      .find((path) => isNodeOf(path, blockName));
    if (opened === undefined) continue;
    const name = contents(`/proc/${pid}/comm`).trim();
    if (!PASSING.test(name)) found.push(`${opened} is open in process ${pid} (${name})`);
  }
  return found;
}

/** Processes that have a character device open: its server, or one that is just starting. */
export function charDeviceOpeners(charName: string): number[] {
  return processIds().filter((pid) =>
    namesIn(`/proc/${pid}/fd`).some((fd) =>
      linkTarget(`/proc/${pid}/fd/${fd}`).split("/").at(-1) === charName
    )
  ).map(Number);
}

function isNodeOf(path: string, blockName: string): boolean {
  if (!path.startsWith("/dev/")) return false;
  const rest = path.slice("/dev/".length);
  return rest === blockName ||
    (rest.startsWith(`${blockName}p`) && /^\d+$/.test(rest.slice(blockName.length + 1)));
}

function processIds(): string[] {
  return namesIn("/proc").filter((name) => /^\d+$/.test(name));
}
