// SPDX-License-Identifier: MIT
/**
 * fio writes checksums and reads them back: loop, direct and buffered, with one and two queues,
 * with zero copy (the default, where the kernel has it) and without.
 */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { verify } from "./fio.ts";
import { allocated, DATA_MODES, deviceTest, KERNEL, queueSetting, scaled } from "./helpers.ts";

/** By the kernel's number; its flags say the same, but the tests are declared before they run. */
const hasZeroCopy = KERNEL === "newest";

const cases = [
  { queues: 1, flags: [] },
  { queues: 1, flags: ["--buffered"] },
  { queues: 2, flags: [] },
  { queues: 2, flags: ["--buffered", "--zero-copy=off"] },
  ...hasZeroCopy
    ? [
      { queues: 1, flags: ["--zero-copy=off"] },
      { queues: 2, flags: ["--zero-copy=reg"] },
    ]
    : [],
  ...scaled([], [{ queues: 1, flags: ["-u", "1", "--max_io_buf_bytes", "65536"] }]),
];

for (const { queues, flags } of cases) {
  deviceTest(`fio finds no error on loop -q ${[queues, ...flags].join(" ")}`, {
    limitS: 400,
    everywhere: queues === 2 && flags.length === 0,
    oldest: queues === 2 && flags.length === 0,
  }, async (scene) => {
    const mebibytes = scaled(10, 64);
    const image = scene.image("disk.img", mebibytes << 20);
    const device = await scene.add("loop", image, "-q", `${queues}`, ...flags);
    assert.match(device.stderr, flags.includes("--buffered") ? /buffered I\/O/ : /direct I\/O/);
    const off = flags.includes("--zero-copy=off") ? "off, as asked" : !hasZeroCopy && "off, kernel";
    assert.match(device.stderr, new RegExp(off ? `zero copy: ${off}` : "zero copy( \\(reg\\))?\n"));
    assert.strictEqual(/ SUPPORT_ZERO_COPY /.test(device.stdout), !off, device.stdout);
    const bytesMax = flags.includes("65536") ? 65536 : off ? 524288 : 1048576;
    assert.match(device.stdout, new RegExp(`max rq size ${bytesMax} `));
    await verify(scene, device.path, mebibytes);
    await scene.del(device);
  });
}

for (const { flags, note } of DATA_MODES) {
  deviceTest(`fio finds no error on loop and memory, ${note}`, {}, async (scene) => {
    const image = scene.image("disk.img", 8 << 20);
    const devices = [
      await scene.add("loop", image, "-q", "2", ...flags),
      await scene.add("memory", "--size", "8M", ...flags),
    ];
    await Promise.all(devices.map(async (device) => {
      assert.match(device.stderr, new RegExp(`, ${note}\n`));
      await verify(scene, device.path, 4);
      await scene.del(device);
    }));
  });
}

deviceTest(
  "zero copy is there when asked for, or refused by name of what has none",
  {},
  async (scene) => {
    const image = scene.image("disk.img", 1 << 20);
    const refused = async (code: number, message: RegExp, ...args: string[]) => {
      const { code: actual, stderr } = await scene.ubd("add", ...args);
      assert.strictEqual(actual, code, stderr);
      assert.match(stderr, message);
    };
    if (!hasZeroCopy) {
      const lack = /kernel 6\.12\S* lacks AUTO_BUF_REG \(needs 6\.16\)/;
      await refused(1, lack, "loop", image, "-z");
      await refused(1, /lacks SUPPORT_ZERO_COPY \(needs 6\.15\)/, "loop", image, "--zero-copy=reg");
      await refused(1, /lacks BATCH_IO \(needs 7\.0\)/, "null", "--batch");
      const device = await scene.add("loop", image);
      assert.match(device.stderr, lack);
    }
    await refused(2, /Zero copy is not possible: the target needs/, "memory", "-z");
    if (hasZeroCopy) {
      const device = await scene.add("null", "-z");
      assert.match(device.stderr, /, zero copy\n/);
      await scene.sh(`dd if=${device.path} of=/dev/null bs=128k count=16 iflag=direct status=none`);
      await scene.sh(`dd if=/dev/zero of=${device.path} bs=128k count=16 oflag=direct status=none`);
    }
    await refused(2, /Zero copy "x"/, "null", "--zero-copy=x");
    await refused(2, /Queue depth 1: .* 2 or more for batches/, "null", "--batch", "-d", "1");
    await refused(2, /goes one way: not user copy and get data/, "null", "--user-copy", "-g", "1");
  },
);

deviceTest("each queue's thread stays with the CPUs whose I/O it gets", {}, async (scene) => {
  const { pid, stdout } = await scene.add("null", "-q", "2");
  const queues = [...stdout.matchAll(/queue \d+: tid (\d+) affinity\(([\d ]+)\)/g)];
  assert.strictEqual(queues.length, 2);
  for (const [, tid, cpus] of queues) {
    const status = readFileSync(`/proc/${pid}/task/${tid}/status`, "utf8");
    assert.strictEqual(/^Cpus_allowed_list:\t(.*)$/m.exec(status)![1], cpus!.trim());
  }
});

deviceTest("DISCARD frees blocks, WRITE_ZEROES keeps them when told, both read zeroes", {
  limitS: 240,
}, async (scene) => {
  const image = scene.image("disk.img", 32 << 20);
  const device = await scene.add("loop", image);
  const unmap = Number(queueSetting(device, "write_zeroes_max_bytes"));
  assert.ok(unmap > 0 && Number(queueSetting(device, "discard_max_bytes")) > 0);
  await scene.sh(`head -c 32M /dev/urandom > data
    dd status=none if=data of=${device.path} bs=1M oflag=direct`);
  const full = await allocated(scene, image);
  assert.ok(full >= 65536);

  await scene.sh(`blkdiscard -f -o 4M -l 8M ${device.path}`);
  const discarded = await allocated(scene, image);
  assert.ok(discarded <= full - 16384 + 64, `${full} → ${discarded} after DISCARD`);
  await scene.sh(`fallocate -n -z -o 16M -l 4M ${device.path}; blkdiscard -z -o 20M -l 4M \
    ${device.path}`);
  const zeroed = await allocated(scene, image);
  assert.ok(zeroed >= discarded - 64, `${discarded} → ${zeroed} after WRITE_ZEROES, NOUNMAP`);
  await scene.sh(`fallocate -n -p -o 24M -l 4M ${device.path}`);
  const punched = await allocated(scene, image);
  assert.ok(punched <= zeroed - 8192 + 64, `${zeroed} → ${punched} after WRITE_ZEROES`);

  await scene.sh(
    `for hole in 4:8 16:12; do at=\${hole%:*} length=\${hole#*:}
       dd status=none if=/dev/zero of=data bs=1M seek=$at count=$length conv=notrunc
     done
     dd status=none if=${device.path} bs=1M iflag=direct | cmp - data
     cmp ${image} data`,
  );
});

deviceTest("zeroing works where the file system can not, and DISCARD is not offered then", {
  limitS: 240,
  anyKernel: true,
}, async (scene) => {
  // tmpfs punches holes but zeroes no ranges; vfat does neither.
  const fat = scene.image("fat.back", 24 << 20);
  await scene.sh(`mkfs.vfat ${fat} > /dev/null`);
  const points = [
    await scene.mount("memory", "-t tmpfs -o size=32M tmpfs"),
    await scene.mount("fat", "-o loop", fat),
  ];
  for (const point of points) {
    await scene.sh(`head -c 8M /dev/urandom > data; cp data ${point}/disk.img`);
    const device = await scene.add("loop", `${point}/disk.img`);
    const able = point.endsWith("memory");
    assert.equal(Number(queueSetting(device, "discard_max_bytes")) > 0, able, point);
    const discard = await scene.run(["blkdiscard", "-f", "-o", "0", "-l", "1M", device.path]);
    assert.equal(discard.code === 0, able, discard.stderr);
    await scene.sh(
      `blkdiscard -z -o 3M -l 5M ${device.path}
       dd status=none if=/dev/zero of=data bs=1M seek=3 count=5 conv=notrunc
       ${able ? "dd status=none if=/dev/zero of=data bs=1M count=1 conv=notrunc" : ""}
       dd status=none if=${device.path} bs=1M iflag=direct | cmp - data`,
    );
    await scene.del(device);
    await scene.sh(`cmp ${point}/disk.img data`);
  }
});
