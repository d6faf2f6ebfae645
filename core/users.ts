// SPDX-License-Identifier: MIT
/**
 * Who uses a block device: mounts (in any mount namespace), swap, devices on top of it (dm, md,
 * loop, bcache), and processes that have it open or mapped. Read from /proc and /sys, without
 * opening it.
 *
 * A device is its number. Names are only what the kernel itself calls it by in /sys: a node may have
 * any name, be in a chroot or another mount namespace, and /dev/ublkb0 be another device's node.
 * @module
 */

import { existsSync, readFileSync, type Stats, statSync } from "node:fs";
import { stat } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import type { Dialect } from "../abi/dialect.ts";
import { unescapeMount } from "./isolation.ts";
import { contents, deviceNumber, linkTarget, namesIn, processIds } from "./proc.ts";
import { oneLine } from "./text.ts";

/** udev and its helpers look at every device that changes, and let go by themselves. */
const PASSING = /^\(?(udev-worker|udev-synth|systemd-udevd|udevd|blkid|partx)\)?$/;

/** How long other openers may take to leave: a command that has just ended may linger. */
const PATIENCE_MS = 1000;

/** To ask for a file there may take for ever. */
const REMOTE = /^(nfs|cifs|smb|fuse|9p|virtiofs|ceph|afs|autofs|coda|lustre|glusterfs|orangefs)/;

/** As on all machines but a few that ubd does not run on. */
const O_PATH = 0o10000000;

/** What may take for ever is given so long. */
const STAT_PATIENCE_MS = 500;

/** "259:0" → "ublkb0": a disk and its partitions. */
export type Nodes = ReadonlyMap<string, string>;

/** Who is found to use a device. */
export interface Users {
  /** One line for each, such as "/dev/ublkb0 is mounted on /mnt". */
  readonly lines: readonly string[];
  /** udev or a helper of it has it open: it lets go, unless the device does not answer. */
  readonly passing: boolean;
}

/** @returns one line for each user; empty when there is none but those that pass. */
export async function deviceUsers(blockName: string): Promise<readonly string[]> {
  return (await findUsers(deviceNodes(blockName))).lines;
}

/** As deviceUsers. Who only has it open is given a moment to leave. */
export async function findUsers(nodes: Nodes): Promise<Users> {
  const deadline = performance.now() + PATIENCE_MS;
  for (;;) {
    const tables = mountTables();
    const lines = [
      ...await mounts(nodes, tables),
      ...journals(nodes),
      ...btrfs(nodes),
      ...(await swaps(nodes, tables)).map(({ line }) => line),
      ...holders(nodes),
      ...await loops(nodes, tables),
    ];
    if (lines.length > 0) return { lines, passing: false };
    const found = await openers(nodes, "block", tables);
    const staying = found.filter(({ name }) => !PASSING.test(name));
    const passing = staying.length < found.length;
    if (found.length === 0) return { lines: await mappers(nodes), passing };
    if (staying.length === 0 || performance.now() > deadline) {
      return { lines: staying.map(lineOf), passing };
    }
    await sleep(50);
  }
}

/**
 * The numbers of a disk that is deleted while somebody uses it, as those have them: the disk has
 * none in /sys any more. Which disk it was, only the name tells by which they took it.
 */
export async function deletedNodes(blockName: string): Promise<Nodes> {
  const nodes = new Map<string, string>();
  const note = (path: string, number: string | undefined) => {
    const name = path.replace(/ \(deleted\)$/, "").split("/").at(-1)!;
    if (number === undefined || number.startsWith("0:") || !isOf(name, blockName)) return;
    if (!existsSync(`/sys/dev/block/${number}`)) nodes.set(number, name);
  };
  const tables = mountTables();
  for (const line of tables.flatMap(({ mountinfo }) => mountinfo.split("\n"))) {
    const [mount = "", superblock = ""] = line.split(" - ");
    note(unescapeMount(superblock.split(" ")[1] ?? ""), mount.split(" ")[2]);
  }
  const answering = answeringMounts(tables);
  for (const { pid, fd, path } of openFiles()) {
    if (isOf(path.replace(/ \(deleted\)$/, "").split("/").at(-1)!, blockName)) {
      note(path, await openedNumber(pid, fd, "block", answering));
    }
  }
  return nodes;
}

/** The disk, or a partition of it. */
function isOf(name: string, blockName: string): boolean {
  return name.startsWith(blockName) && /^(p\d+)?$/.test(name.slice(blockName.length));
}

/** The disk and its partitions. */
export function deviceNodes(blockName: string): Nodes {
  const nodes = new Map<string, string>();
  const disk = `/sys/block/${blockName}`;
  for (const name of [".", ...partitions(blockName)]) {
    const number = contents(`${disk}/${name}/dev`).trim();
    if (number) nodes.set(number, name === "." ? blockName : name);
  }
  return nodes;
}

function partitions(blockName: string): string[] {
  return namesIn(`/sys/block/${blockName}`).filter((entry) => entry.startsWith(blockName));
}

/** What a process sees of the mounts of its namespace, below its root. */
interface MountTable {
  /** Its root directory, as this process can name it. */
  root: string;
  mountinfo: string;
}

/** One of each mount namespace, and of each root in it: who is in a chroot sees no others. */
function mountTables(): MountTable[] {
  const tables = new Map<string, MountTable>();
  for (const pid of ["self", ...processIds()]) {
    const key = `${linkTarget(`/proc/${pid}/ns/mnt`)} ${linkTarget(`/proc/${pid}/root`)}`;
    if (tables.has(key)) continue;
    tables.set(key, { root: `/proc/${pid}/root`, mountinfo: contents(`/proc/${pid}/mountinfo`) });
  }
  return [...tables.values()];
}

type Kind = "block" | "character";

function numberOf(stats: Stats | undefined, kind: Kind): string | undefined {
  const is = kind === "block" ? stats?.isBlockDevice() : stats?.isCharacterDevice();
  return stats && is ? deviceNumber(stats) : undefined;
}

/** @returns a device's number; undefined: it is none of this kind, or does not say so in time. */
async function numberAt(path: string, kind: Kind = "block"): Promise<string | undefined> {
  // Not in this thread: what is asked may be on a file system that does not answer.
  const late = sleep(STAT_PATIENCE_MS, undefined, { ref: false });
  return numberOf(await Promise.race([stat(path).catch(() => undefined), late]) ?? undefined, kind);
}

async function mounts(nodes: Nodes, tables: readonly MountTable[]): Promise<string[]> {
  const found = new Set<string>();
  for (const { root, mountinfo } of tables) {
    const lookUp = (path: string) => numberAt(`${root}${path}`);
    for (const user of await mountsIn(mountinfo, nodes, lookUp)) found.add(user);
  }
  return [...found];
}

/**
 * File systems on several devices, such as btrfs, have a number of their own (0:N) and name one of
 * them as their source; XFS tells in its options where its log and its realtime data are.
 *
 * @param lookUp a device's number by its path, as the one who sees these mounts sees it.
 */
export async function mountsIn(
  mountinfo: string,
  nodes: Nodes,
  lookUp: (path: string) => Promise<string | undefined>,
): Promise<string[]> {
  const users: string[] = [];
  const nameOf = async (path = "") =>
    path.startsWith("/") ? nodes.get(await lookUp(unescapeMount(path)) ?? "") : undefined;
  for (const line of mountinfo.split("\n")) {
    const [mount = "", superblock = ""] = line.split(" - ");
    const [, , number = "", , point = ""] = mount.split(" ");
    const [type = "", source, options = ""] = superblock.split(" ");
    const where = oneLine(unescapeMount(point));
    const several = number.startsWith("0:") && !REMOTE.test(type);
    const main = nodes.get(number) ?? (several ? await nameOf(source) : undefined);
    if (main !== undefined) users.push(`/dev/${main} is mounted on ${where}`);
    for (const [, what, path] of options.matchAll(/(?:^|,)(logdev|rtdev)=([^,]*)/g)) {
      const name = await nameOf(path);
      if (name !== undefined) users.push(`/dev/${name} is the ${what} of ${where}`);
    }
  }
  return users;
}

/** Those of ext4 that are on a device of their own; others are named NAME-INODE. */
function journals(nodes: Nodes): string[] {
  const names = new Set(nodes.values());
  return namesIn("/proc/fs/jbd2").filter((name) => names.has(name))
    .map((name) => `/dev/${name} is the journal of a mounted file system`);
}

/** No more than one device of a btrfs is in its mount's source. */
function btrfs(nodes: Nodes): string[] {
  return namesIn("/sys/fs/btrfs").flatMap((id) =>
    namesIn(`/sys/fs/btrfs/${id}/devices`).flatMap((name) => {
      const node = nodes.get(contents(`/sys/fs/btrfs/${id}/devices/${name}/dev`).trim());
      return node === undefined ? [] : [`/dev/${node} is a part of the mounted btrfs ${id}`];
    })
  );
}

/** @returns paths of the device and its partitions that are swap. */
export async function swapPaths(blockName: string): Promise<string[]> {
  return (await swaps(deviceNodes(blockName), mountTables())).map(({ path }) => path);
}

/**
 * The kernel tells only the path by which an area's node was opened, from the root of its mount
 * namespace. Where that leads to no block device, the size is all there is to go by.
 */
async function swaps(nodes: Nodes, tables: readonly MountTable[]) {
  const found: { path: string; line: string }[] = [];
  for (const entry of contents("/proc/swaps").trimEnd().split("\n").slice(1)) {
    const [escaped = "", type, kibibytes] = entry.split(/\s+/);
    if (type !== "partition") continue;
    const path = unescapeMount(escaped);
    const numbers = await numbersAt(path, tables);
    const name = numbers.map((number) => nodes.get(number)).find((one) => one !== undefined);
    if (name !== undefined) {
      const line = `/dev/${name} is swap${path === `/dev/${name}` ? "" : `, as ${oneLine(path)}`}`;
      found.push({ path, line });
    } else if (numbers.length === 0) {
      const like = [...nodes].find(([number]) => swapKibibytes(number) === Number(kibibytes));
      const which = `${oneLine(path)}, whose node is not found and which has the same size`;
      if (like) found.push({ path, line: `/dev/${like[1]} may be the swap ${which}` });
    }
  }
  return found;
}

/** What /proc/swaps says of a whole device: all its pages but the header's. */
function swapKibibytes(number: string): number {
  const sectors = Number(contents(`/sys/dev/block/${number}/size`));
  return Math.floor(sectors / 8) * 4 - 4;
}

/** Numbers of the block devices that have this path, for whomever. */
async function numbersAt(path: string, tables: readonly MountTable[]): Promise<string[]> {
  const numbers = new Set<string>();
  for (const { root } of tables) {
    const number = await numberAt(`${root}${path}`);
    if (number !== undefined) numbers.add(number);
  }
  return [...numbers];
}

function holders(nodes: Nodes): string[] {
  return [...nodes].flatMap(([number, name]) =>
    namesIn(`/sys/dev/block/${number}/holders`)
      .map((holder) => `/dev/${name} is held by /dev/${holder}`)
  );
}

/** The kernel tells the path of a backing file by which it was opened, as with swap. */
async function loops(nodes: Nodes, tables: readonly MountTable[]): Promise<string[]> {
  const found: string[] = [];
  for (const loop of namesIn("/sys/block").filter((name) => name.startsWith("loop"))) {
    const backing = contents(`/sys/block/${loop}/loop/backing_file`).replace(/\n$/, "");
    if (!backing.startsWith("/")) continue;
    for (const number of await numbersAt(backing, tables)) {
      const name = nodes.get(number);
      if (name !== undefined) found.push(`/dev/${name} is held by /dev/${loop}`);
    }
  }
  return found;
}

interface Opener {
  pid: number;
  /** Of the process. */
  name: string;
  /** Of the device. */
  node: string;
  /** By which it was opened. */
  path: string;
}

function lineOf({ pid, name, node, path }: Opener): string {
  const named = path.replace(/ \(deleted\)$/, "") === `/dev/${node}`;
  const as = named ? "" : ` as ${oneLine(path)}`;
  return `/dev/${node} is open${as} in process ${pid} (${oneLine(name)})`;
}

/** Processes that have one of these devices open. Those of others only root can see. */
async function openers(
  nodes: Nodes,
  kind: Kind,
  tables: readonly MountTable[],
): Promise<Opener[]> {
  const found: Opener[] = [];
  const answering = answeringMounts(tables);
  const known = new Set<number>();
  for (const { pid, fd, path } of openFiles()) {
    if (known.has(pid)) continue;
    const number = await openedNumber(pid, fd, kind, answering);
    const node = number === undefined ? undefined : nodes.get(number);
    if (node === undefined) continue;
    known.add(pid);
    found.push({ pid, name: commandOf(pid), node, path });
  }
  return found;
}

/** Descriptors of files, in all processes that may be looked at. */
function* openFiles(): Generator<{ pid: number; fd: string; path: string }> {
  for (const pid of processIds()) {
    for (const fd of namesIn(`/proc/${pid}/fd`)) {
      const path = linkTarget(`/proc/${pid}/fd/${fd}`);
      if (path.startsWith("/")) yield { pid, fd, path }; // No socket, pipe and the like.
    }
  }
}

function commandOf(pid: number): string {
  return contents(`/proc/${pid}/comm`).replace(/\n$/, "");
}

/** Ids of mounts where a file can be asked for without waiting for something far away. */
function answeringMounts(tables: readonly MountTable[]): Set<string> {
  const ids = new Set<string>();
  for (const line of tables.flatMap(({ mountinfo }) => mountinfo.split("\n"))) {
    const [mount = "", superblock = ""] = line.split(" - ");
    if (!REMOTE.test(superblock)) ids.add(mount.split(" ")[0]!);
  }
  return ids;
}

async function openedNumber(
  pid: number,
  fd: string,
  kind: Kind,
  answering: Set<string>,
): Promise<string | undefined> {
  const path = `/proc/${pid}/fd/${fd}`;
  try {
    const info = readFileSync(`/proc/${pid}/fdinfo/${fd}`, "utf8");
    const [, flags = ""] = /^flags:\s*(\d+)/m.exec(info) ?? [];
    if (parseInt(flags, 8) & O_PATH) return undefined; // It holds the node, not the device.
    const [, mount = ""] = /^mnt_id:\s*(\d+)/m.exec(info) ?? [];
    // One that is mounted nowhere any more may be remote, too.
    return answering.has(mount) ? numberOf(statSync(path), kind) : await numberAt(path, kind);
  } catch {
    return undefined;
  }
}

/** Those that have closed it, and yet have it in their memory. */
async function mappers(nodes: Nodes): Promise<string[]> {
  const found: string[] = [];
  const known = new Map<string, string | undefined>();
  for (const pid of processIds()) {
    const maps = contents(`/proc/${pid}/maps`);
    for (const [, range, file, path] of maps.matchAll(/^(\S+) \S+ \S+ (\S+ \d+) +(\/.*)$/gm)) {
      if (!known.has(file!)) {
        // The kernel pads what the link's name does not.
        const link = range!.split("-").map((address) => address.replace(/^0+(?=.)/, "")).join("-");
        known.set(file!, await numberAt(`/proc/${pid}/map_files/${link}`));
      }
      const node = nodes.get(known.get(file!) ?? "");
      if (node === undefined) continue;
      const as = path === `/dev/${node}` ? "" : ` as ${oneLine(path!)}`;
      found.push(`/dev/${node} is mapped${as} in process ${pid} (${oneLine(commandOf(pid))})`);
      break;
    }
  }
  return found;
}

/** Where the driver's character devices are looked up. */
type CharDevices = Pick<Dialect, "charName"> & { charClass: string };

/** @returns "243:0"; undefined: there is none, or it is deleted. */
export function charDeviceNumber({ charClass, charName }: CharDevices, id: number) {
  return contents(`/sys/class/${charClass}/${charName(id)}/dev`).trim() || undefined;
}

/** Processes that have a device's character device open: its server, or one that is starting. */
export async function charDeviceOpeners(dialect: CharDevices, id: number): Promise<number[]> {
  const number = charDeviceNumber(dialect, id);
  return number === undefined ? [] : await openersOf(number);
}

/** @param number of a character device */
export async function openersOf(number: string): Promise<number[]> {
  const nodes = new Map([[number, ""]]);
  return (await openers(nodes, "character", mountTables())).map(({ pid }) => pid);
}
