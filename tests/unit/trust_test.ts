// SPDX-License-Identifier: MIT
/** Whose code root runs: targets/trust.ts, with files of this user and users that are played. */
import assert from "node:assert/strict";
import {
  chmodSync,
  chownSync,
  lchownSync,
  mkdirSync,
  mkdtempSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { afterEach, beforeEach, test } from "node:test";
import { UsageError } from "../../core/error.ts";
import { refuseForeign, strangersOf, trustedUsers } from "../../targets/trust.ts";

const ME = process.geteuid!();
const TRUSTED = new Set([0, ME]);
const DAEMON = 1; // Of every distribution, with a group of the same number.
const ROOT_ONLY = { skip: ME === 0 ? false : "needs root, to give files to others" };

let directory = "";
let file = "";

beforeEach(() => {
  directory = mkdtempSync(join(realpathSync(tmpdir()), "ubd-trust-"));
  file = join(directory, "x.ts");
  writeFileSync(file, "");
  chmodSync(file, 0o644);
});
afterEach(() => rmSync(directory, { recursive: true }));

function refused(message: RegExp, path = file, users: ReadonlySet<number> = TRUSTED): void {
  assert.throws(() => refuseForeign(path, users), (error) => {
    assert.ok(error instanceof UsageError);
    assert.match(error.message, message);
    return true;
  });
}

test("a file of root's or of a trusted user's is run, below sticky directories such as /tmp", () => {
  refuseForeign(file, TRUSTED);
  refuseForeign("/bin/sh", new Set([0]));
});

test("what anybody may write is refused: the file, or a directory above it", () => {
  chmodSync(file, 0o646);
  refused(/^Will not run \S+x\.ts as root: anybody may change it; chmod o-w \S+x\.ts, or copy /);
  chmodSync(file, 0o644);
  const deep = join(directory, "a", "b");
  mkdirSync(deep, { recursive: true });
  const inside = join(deep, "x.ts");
  writeFileSync(inside, "");
  refuseForeign(inside, TRUSTED);
  chmodSync(join(directory, "a"), 0o777);
  refused(/anybody may change \S+\/a; chmod o-w \S+\/a,/, inside);
  chmodSync(join(directory, "a"), 0o1777);
  refuseForeign(inside, TRUSTED);
});

test("what a user who is not trusted owns is refused, with the user's name", ROOT_ONLY, () => {
  chownSync(file, DAEMON, 0);
  refused(/user daemon may change it; chown root \S+x\.ts,/);
  refuseForeign(file, new Set([0, DAEMON]));
  chownSync(file, 4242, 0);
  refused(/user 4242 may change it/);
  chownSync(file, 0, 0);
  chownSync(directory, DAEMON, 0);
  refused(new RegExp(`user daemon may change ${directory};`));
});

test("without root too: a user is not trusted who is not in the list", () => {
  if (ME === 0) return;
  refused(/user .* may change/, file, new Set([0]));
});

test("a group of the trusted user alone may write, one with others may not", ROOT_ONLY, () => {
  chmodSync(file, 0o664);
  refuseForeign(file, TRUSTED); // Root's own group.
  chownSync(file, 0, DAEMON);
  refused(/group daemon \(daemon\) may change it; chmod g-w \S+x\.ts,/);
  refuseForeign(file, new Set([0, DAEMON]));
  chownSync(file, 0, 4242);
  refused(/group 4242 may change it/);
  chmodSync(file, 0o644);
  refuseForeign(file, TRUSTED);
});

test("members of a group are those it lists, and those whose own group it is", () => {
  const accounts = ["root:x:0:0", "ann:x:1000:1000", "bob:x:1001:1000", "carol:x:1002:1002"]
    .map((line) => line.split(":"));
  const groups = [
    "root:x:0:",
    "ann:x:1000:",
    "dev:x:50:ann,carol",
    "far:x:60:ann,ldap",
    "none:x:70:",
  ]
    .map((line) => line.split(":"));
  const strangers = (gid: number, ...users: number[]) =>
    strangersOf(gid, new Set([0, ...users]), accounts, groups);
  assert.equal(strangers(0), undefined);
  assert.equal(strangers(70), undefined);
  assert.equal(strangers(50, 1000), "group dev (carol)");
  assert.equal(strangers(50, 1000, 1002), undefined);
  assert.equal(strangers(1000, 1000), "group ann (bob)");
  assert.equal(strangers(60, 1000), "group far (ldap)");
  assert.equal(strangers(80, 1000), "group 80");
});

test("a link counts as what it leads through: its owner, and where it points", ROOT_ONLY, () => {
  const elsewhere = mkdtempSync(join(realpathSync(tmpdir()), "ubd-trust-"));
  try {
    const link = join(elsewhere, "y.ts");
    symlinkSync(`../../${file}`.replace("//", "/"), link);
    refuseForeign(link, TRUSTED);
    chmodSync(directory, 0o777);
    refused(new RegExp(`anybody may change ${directory};`), link);
    chmodSync(directory, 0o755);
    lchownSync(link, DAEMON, 0);
    refused(/user daemon may change it/, link);
    rmSync(link);
    chmodSync(directory, 0o755);
    symlinkSync(file, link);
    refuseForeign(link, TRUSTED);
    chmodSync(file, 0o666);
    refused(new RegExp(`anybody may change ${file};`), link);
    rmSync(link);
    symlinkSync("y.ts", link);
    refused(/too many links/, link);
  } finally {
    rmSync(elsewhere, { recursive: true });
  }
});

test("what decides on imports counts too: package.json, node_modules", ROOT_ONLY, () => {
  for (const name of ["package.json", "node_modules"]) {
    const path = join(directory, name);
    writeFileSync(path, "{}");
    refuseForeign(file, TRUSTED);
    chownSync(path, DAEMON, 0);
    refused(new RegExp(`user daemon may change ${path};`));
    rmSync(path);
  }
});

test("a file that is not there is said to be absent", () => {
  assert.throws(() => refuseForeign(`${file}.no`, TRUSTED), { code: "ENOENT" });
});

test("root, this user, and who became it by sudo or logged in are trusted", () => {
  writeFileSync(file, "5678");
  assert.ok(trustedUsers(file).has(5678));
  writeFileSync(file, "4294967295"); // Nobody has logged in.
  assert.ok(!trustedUsers(file).has(0xffff_ffff));
  const saved = process.env.SUDO_UID;
  try {
    for (const [text, trusted] of [["1234", true], ["x", false], ["-5", false]] as const) {
      process.env.SUDO_UID = text;
      const users = trustedUsers();
      assert.ok(users.has(0) && users.has(ME));
      assert.equal(users.has(Number(text)), trusted, text);
      assert.ok(!users.has(0xffff_ffff), "nobody logged in: no user");
    }
  } finally {
    if (saved === undefined) delete process.env.SUDO_UID;
    else process.env.SUDO_UID = saved;
  }
});
