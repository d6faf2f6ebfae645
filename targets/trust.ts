// SPDX-License-Identifier: MIT
/**
 * Whose code root runs. A module may be anybody's to write; what root serves must be changed by
 * nobody but root and the person who became root (sudo, su, doas), now or before an upgrade.
 *
 * Looked at are the module's file, each link to it and each directory on the way; and what a
 * directory has that changes what imports mean. What these import is not.
 * @module
 */

import { lstatSync, readFileSync, readlinkSync, type Stats } from "node:fs";
import { isAbsolute, join } from "node:path";
import process from "node:process";
import { UsageError } from "../core/error.ts";

/** Who may write a thing, as far as that is not somebody trusted; undefined: nobody else. */
type Stranger = string | undefined;

const LINKS_MAX = 40;

/** A directory's owner decides with these what a module in it imports. */
const DECIDING = ["package.json", "node_modules"];

/** @throws {UsageError} this is root, and the module at `file` is somebody's to change. */
export function checkModule(file: string): void {
  if (process.geteuid!() === 0) refuseForeign(file);
}

/**
 * @param file an absolute path. @param users ids of those who are trusted.
 * @throws {UsageError} somebody else may change what is there, and who that is.
 */
export function refuseForeign(file: string, users: ReadonlySet<number> = trustedUsers()): void {
  const refuse = (path: string, who: string, remedy: string) => {
    const whole = path === file ? "it" : path;
    throw new UsageError(
      `Will not run ${file} as root: ${who} may change ${whole}; ${remedy} ${path}, ` +
        "or copy the module to where only root may write",
    );
  };
  for (const [path, stats] of stepsTo(file)) {
    if (!users.has(stats.uid)) refuse(path, nameOfUser(stats.uid), "chown root");
    // Of a sticky directory, nobody replaces what is another's.
    if (stats.isSymbolicLink() || (stats.isDirectory() && stats.mode & 0o1000)) continue;
    if (stats.mode & 0o002) refuse(path, "anybody", "chmod o-w");
    const group = stats.mode & 0o020 ? strangersOf(stats.gid, users) : undefined;
    if (group !== undefined) refuse(path, group, "chmod g-w");
  }
}

/** The file, and all that the kernel looks at to find it, in that order. */
function* stepsTo(file: string): Generator<[string, Stats]> {
  const names = file.split("/").filter(Boolean);
  let at = "/";
  yield [at, lstatSync(at)];
  for (let links = 0; names.length > 0;) {
    const name = names.shift()!;
    const path = join(at, name);
    const stats = lstatSync(path);
    yield [path, stats];
    if (stats.isSymbolicLink()) {
      if (++links > LINKS_MAX) throw new UsageError(`${file} has too many links`);
      const to = readlinkSync(path);
      names.unshift(...to.split("/").filter(Boolean));
      if (isAbsolute(to)) at = "/";
      continue;
    }
    at = path;
    if (!stats.isDirectory()) continue;
    for (const deciding of DECIDING) {
      const beside = lstatSync(join(path, deciding), { throwIfNoEntry: false });
      if (beside) yield [join(path, deciding), beside];
    }
  }
}

/** Root, whoever this process runs as, and who became that: sudo says so, or the login did. */
export function trustedUsers(login = "/proc/self/loginuid"): ReadonlySet<number> {
  const { SUDO_UID } = process.env;
  return new Set([0, process.geteuid!(), ...asUser(SUDO_UID), ...asUser(contentOf(login))]);
}

const NO_LOGIN = 0xffff_ffff;

function asUser(text: string | undefined): number[] {
  const uid = /^\d+\s*$/.test(text ?? "") ? Number(text) : NO_LOGIN;
  return uid < NO_LOGIN ? [uid] : [];
}

function contentOf(file: string): string | undefined {
  try {
    return readFileSync(file, "utf8");
  } catch {
    return undefined;
  }
}

/** Lines of a file such as /etc/passwd, in fields. */
const fieldsOf = (file: string) =>
  (contentOf(file) ?? "").split("\n").filter(Boolean).map((line) => line.split(":"));

/**
 * A group of its user alone, as most distributions give one to each, is no group.
 *
 * @param accounts lines of /etc/passwd. @param groups of /etc/group.
 */
export function strangersOf(
  gid: number,
  users: ReadonlySet<number>,
  accounts: string[][] = fieldsOf("/etc/passwd"),
  groups: string[][] = fieldsOf("/etc/group"),
): Stranger {
  const group = groups.find(([, , id]) => id === `${gid}`);
  if (!group) return `group ${gid}`;
  const listed = (group[3] ?? "").split(",").filter(Boolean);
  const members = accounts.filter(([name, , , primary]) =>
    primary === `${gid}` || listed.includes(name!)
  );
  const known = new Set(members.map(([name]) => name));
  const strangers = [
    ...members.filter(([, , uid]) => !users.has(Number(uid))).map(([name]) => name),
    ...listed.filter((name) => !known.has(name)), // Of a directory service.
  ];
  return strangers.length > 0 ? `group ${group[0]} (${strangers.join(", ")})` : undefined;
}

function nameOfUser(uid: number): string {
  const account = fieldsOf("/etc/passwd").find(([, , id]) => id === `${uid}`);
  return account ? `user ${account[0]}` : `user ${uid}`;
}
