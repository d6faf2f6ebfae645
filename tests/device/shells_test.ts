// SPDX-License-Identifier: MIT
/** Several shells add, list and delete at random: every answer is right, and nothing is left. */

import assert from "node:assert/strict";
import { deviceTest, scaled, type Scene } from "./helpers.ts";

interface Facts {
  id: number;
  state: string;
  target: { name?: string };
}

/** One shell: it knows its own devices, and what must be true of them. */
async function shell(scene: Scene, until: number): Promise<number> {
  const mine = new Set<number>();
  const call = async (...args: string[]) => {
    // Twenty programs that start at once take an emulated guest a minute.
    const { code, stdout, stderr } = await scene.run(["ubd", ...args, "--json"], {
      limitMs: scaled(120_000, 600_000),
    });
    return { code, stderr, answer: code === 0 ? JSON.parse(stdout) : undefined };
  };
  let calls = 0;
  for (; performance.now() < until; calls++) {
    const some = [...mine][Math.floor(Math.random() * mine.size)];
    const dice = Math.random();
    if (dice < 0.4 && mine.size < 3 || some === undefined) {
      const { code, stderr, answer } = await call("add", "null");
      assert.equal(code, 0, stderr);
      const { id, state, target } = answer as Facts;
      assert.deepEqual([state, target.name], ["LIVE", "null"]);
      mine.add(id);
    } else if (dice < 0.7) {
      const { code, stderr, answer } = await call("list");
      assert.equal(code, 0, stderr);
      const known = new Map((answer as Facts[]).map((facts) => [facts.id, facts]));
      for (const id of mine) {
        const facts = known.get(id);
        assert.deepEqual([facts?.state, facts?.target.name], ["LIVE", "null"], `device ${id}`);
      }
    } else {
      const { code, stderr, answer } = await call("del", `${some}`);
      assert.equal(code, 0, stderr);
      assert.deepEqual(answer, { deleted: [some] });
      mine.delete(some);
    }
  }
  for (const id of mine) assert.equal((await call("del", `${id}`)).code, 0);
  return calls;
}

deviceTest("shells that add, list and delete at random get no wrong answer", {
  limitS: scaled(180, 1500),
  anyKernel: true,
}, async (scene) => {
  const until = performance.now() + scaled(12_000, 120_000);
  const shells = Array.from({ length: scaled(4, 20) }, () => shell(scene, until));
  const calls = await Promise.all(shells);
  assert.ok(calls.every((count) => count > 0), `${calls}`);
  console.log(`calls of each shell: ${calls}`);
});
