// SPDX-License-Identifier: MIT
/** bench/: what is made of the measurements, from a report made up here. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { drawReport } from "../../bench/chart.ts";
import { inTurn, type Measurement, PRESETS, type Report } from "../../bench/plan.ts";
import { median, ratio } from "../../bench/statistics.ts";
import { formatReport } from "../../bench/table.ts";
import { verdicts } from "../../bench/targets.ts";

const CASE = "4k random read, QD 64";

/** One measurement of each repeat. */
function measured(name: string, iops: number[], cpuUs: number | null = 10): Measurement[] {
  return iops.map((value, repeat) => ({
    group: "null",
    name,
    case: CASE,
    repeat,
    iops: value,
    bytesPerSecond: value * 4096,
    latencyP50Us: 100,
    latencyP99Us: 200,
    serverCpuUs: cpuUs,
    requestKiBMax: 512,
  }));
}

function report(...measurements: Measurement[][]): Report {
  return {
    versions: { kernel: "7.2" },
    measurements: measurements.flat(),
    idle: [{ name: "ubd", devices: 2, cpuMsPerSecond: 0, rssMiB: 90, pssMiB: 70 }],
    starts: [{ name: "ubd add", repeat: 0, steps: { "program ended": 12.4 } }],
    absent: [{ group: "null", name: "ubd, copying", message: "unknown option" }],
    failures: [],
  };
}

test("median is the middle, or the mean of the two in the middle", () => {
  assert.equal(median([3, 1, 2]), 2);
  assert.equal(median([4, 1, 2, 3]), 2.5);
});

test("ratio compares within a repeat, and has none for who never met", () => {
  const own = measured("ubd", [200, 40, 100]);
  const other = measured("kublk", [100, 10, 100]);
  const found = ratio(own, other, (it) => it.iops)!;
  assert.ok(Math.abs(found.median - 2) < 1e-9);
  assert.ok(Math.abs(found.min - 1) < 1e-9 && Math.abs(found.max - 4) < 1e-9);
  assert.equal(ratio(own, [], (it) => it.iops), undefined);
  assert.equal(
    ratio(own, measured("null_blk", [1, 1, 1], null), (it) => it.serverCpuUs),
    undefined,
  );
});

test("verdicts judge what was measured, in the direction of each target", () => {
  const found = verdicts(report(measured("ubd", [90, 90], 13), measured("kublk", [100, 100])));
  const met = Object.fromEntries(found.map((it) => [it.what, it.met]));
  assert.deepEqual(met, {
    [`null, ${CASE}: IOPS of ubd / kublk`]: false,
    [`null, ${CASE}: server CPU per I/O of ubd / kublk`]: false,
    "idle devices: 2 of ubd, memory of one (PSS)": false,
    "idle devices: 2 of ubd, processor time of one": true,
  });
  const better = verdicts(report(measured("ubd", [101], 12), measured("kublk", [100])));
  assert.deepEqual(better.slice(0, 2).map((it) => it.met), [true, true]);
});

test("formatReport shows everybody, ratios, and who was absent", () => {
  const text = formatReport(
    report(measured("ubd", [90, 110, 100]), measured("kublk", [100, 100, 100], null)),
    PRESETS.default,
    "npm run bench",
  );
  assert.match(text, /\| ubd +\| +100 \| +90 to 110 \| +1\.00 \| 0\.90 to 1\.10 \| +10\.0 \|/);
  assert.match(text, /\| kublk +\| +100 \| 100 to 100 \| +1\.00 \|/);
  assert.match(text, /## Absent\n\n- null: ubd, copying: `unknown option`/);
  assert.match(text, /\| ubd add \| +12 \|/);
  assert.doesNotMatch(text, /NaN|undefined|Infinity/);
});

test("drawReport draws a bar for each contender that has a ratio", () => {
  const drawn = drawReport(report(measured("ubd", [900]), measured("kublk", [100])));
  assert.equal(drawn.match(/<rect [^>]*height="14"/g)?.length, 2);
  assert.match(drawn, />9\.00 →</); // Cut off, and says so.
  assert.doesNotMatch(drawn, /NaN|undefined|Infinity/);
});

test("inTurn: all in each repeat, another first, and after another one each time", () => {
  for (const count of [1, 2, 5, 8, 9, 10]) {
    const items = Array.from({ length: count }, (_, index) => `${index}`);
    const repeats = items.map((_, repeat) => inTurn(items, repeat));
    for (const turn of repeats) assert.deepEqual(turn.toSorted(), items);
    assert.equal(new Set(repeats.map(([first]) => first)).size, count);
    const pairs = (turn: string[]) => turn.slice(1).map((it, index) => `${turn[index]} ${it}`);
    if (count >= 9) {
      const three = repeats.slice(0, 3).flatMap(pairs);
      assert.equal(new Set(three).size, three.length, `${three}`);
    }
  }
});

test("presets: names of groups are unique, and quick is short", () => {
  for (const { groups } of Object.values(PRESETS)) {
    assert.equal(new Set(groups.map(({ name }) => name)).size, groups.length);
  }
  const { quick } = PRESETS;
  assert.ok(!(quick.programs as readonly string[]).includes("rublk"));
  assert.equal(quick.repeats, 1);
});
