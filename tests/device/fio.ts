// SPDX-License-Identifier: MIT
/** fio, for device tests. @module */

import assert from "node:assert/strict";
import type { Scene } from "./helpers.ts";

interface FioJob {
  jobname: string;
  error: number;
  read: { total_ios: number };
  write: { total_ios: number };
}

/** Writes checksums and reads them back: two patterns at once, each on its half of the device. */
export async function verify(scene: Scene, device: string, mebibytes: number): Promise<void> {
  const common = `--filename=${device} --direct=1 --ioengine=libaio --verify=crc32c ` +
    `--verify_fatal=1 --randrepeat=0 --size=${mebibytes / 2}M --group_reporting=0`;
  const jobs = `--name=random --rw=randwrite --bs=4k --iodepth=64 --norandommap=0 ` +
    `--name=sequential --rw=write --bs=128k --iodepth=16 --offset=${mebibytes / 2}M`;
  const { code, stdout, stderr } = await scene.run(
    ["bash", "-c", `fio --max-jobs=4 --output-format=json ${common} ${jobs}`],
    { limitMs: 300_000 },
  );
  assert.equal(code, 0, stderr + stdout);
  const result = JSON.parse(stdout.slice(stdout.indexOf("{"))) as { jobs: FioJob[] };
  assert.equal(result.jobs.length, 2);
  for (const { jobname, error, read, write } of result.jobs) {
    assert.equal(error, 0, jobname);
    assert.ok(read.total_ios > 0 && write.total_ios > 0, jobname);
  }
}
