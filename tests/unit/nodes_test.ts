// SPDX-License-Identifier: MIT
/** Device nodes are what their numbers say: names, also those in state files, prove nothing. */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import {
  existsSync,
  lstatSync,
  mkdtempSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { type NodePlace, Nodes, removeStaleNode, S_IFBLK, S_IFCHR } from "../../core/nodes.ts";
import { Shim } from "../../ffi/mod.ts";

const scratch = mkdtempSync(join(tmpdir(), "ubd-nodes-"));
after(() => rmSync(scratch, { recursive: true }));

function mknod(name: string, type: "b" | "c", major: number, minor: number): string {
  const path = join(scratch, name);
  execFileSync("mknod", [path, type, `${major}`, `${minor}`], { stdio: "ignore" });
  return path;
}

let skip: string | false = false;
try {
  rmSync(mknod("probe", "c", 1, 3));
} catch {
  skip = "may not make device nodes";
}

/** The null device's numbers, or a block device's that is nowhere. */
function place(name: string, type: NodePlace["type"], numbers: string): NodePlace {
  const sysfs = join(scratch, `${name}.dev`);
  writeFileSync(sysfs, `${numbers}\n`);
  return { path: join(scratch, name), type, sysfs };
}

test("Nodes removes what it has made, once", { skip }, () => {
  const char = place("made", S_IFCHR, "1:3");
  const nodes = new Nodes();
  nodes.make(new Shim(), char);
  assert.deepStrictEqual(nodes.paths, [char.path]);
  assert.ok(lstatSync(char.path).isCharacterDevice());
  assert.deepStrictEqual(nodes.remove(), []);
  assert.ok(!existsSync(char.path));
  writeFileSync(char.path, "somebody's");
  assert.deepStrictEqual(nodes.remove(), []);
  assert.ok(existsSync(char.path));
});

test("Nodes leaves what has taken the name of its node since", { skip }, () => {
  for (const other of ["file", "link", "another number", "another type"]) {
    const char = place(`renamed ${other}`, S_IFCHR, "1:3");
    const nodes = new Nodes();
    nodes.make(new Shim(), char);
    const aside = `${char.path} aside`;
    renameSync(char.path, aside);
    if (other === "file") writeFileSync(char.path, "");
    else if (other === "link") symlinkSync(aside, char.path);
    else {mknod(
        `renamed ${other}`,
        other === "another type" ? "b" : "c",
        1,
        other === "another type" ? 3 : 5,
      );}
    assert.match(nodes.remove().join(), /stays: it is no node of this device any more$/, other);
    assert.ok(lstatSync(char.path), other);
  }
});

test("Nodes adopts no path but those of the device, and only with its numbers", { skip }, () => {
  const char = place("char", S_IFCHR, "1:3");
  const block = place("block", S_IFBLK, "250:7");
  const victim = mknod("victim", "c", 1, 3);
  mknod("block", "b", 250, 8);
  const none = new Nodes();
  const paths = [victim, "/etc/passwd", "", `${scratch}/../${char.path}`, char.path, block.path];
  assert.deepStrictEqual(none.adopt(paths, [char, block]), paths);
  assert.deepStrictEqual(none.remove(), []);
  assert.ok(existsSync(victim));

  rmSync(block.path);
  mknod("block", "b", 250, 7);
  mknod("char", "c", 1, 3);
  const nodes = new Nodes();
  assert.deepStrictEqual(nodes.adopt([victim, char.path, block.path], [char, block]), [victim]);
  assert.deepStrictEqual(nodes.paths, [char.path, block.path]);
  assert.deepStrictEqual(nodes.remove(), []);
  assert.ok(existsSync(victim) && !existsSync(char.path) && !existsSync(block.path));
});

test("removeStaleNode removes another device's node, and nothing that is none", { skip }, () => {
  const stale = place("stale", S_IFCHR, "1:3");
  for (const [type, minor, stays] of [["c", 5, false], ["b", 3, false], ["c", 3, true]] as const) {
    mknod("stale", type, 1, minor);
    removeStaleNode(stale);
    assert.strictEqual(existsSync(stale.path), stays);
    rmSync(stale.path, { force: true });
  }
  writeFileSync(stale.path, "");
  removeStaleNode(stale);
  assert.ok(existsSync(stale.path));
});
