// SPDX-License-Identifier: MIT
/** The targets memory, concat, stripe and fault, as devices. */

import assert from "node:assert/strict";
import { cpSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { verify } from "./fio.ts";
import { type Added, deviceTest, killServer, queueSetting, scaled, type Scene } from "./helpers.ts";

const ROOT = join(import.meta.dirname!, "..", "..");
const MEBIBYTES = scaled(4, 64);

/** The arguments of `ubd add` for each. */
const TARGETS: Record<string, (scene: Scene) => string[]> = {
  memory: () => ["memory", "--size", `${MEBIBYTES}M`],
  concat: (scene) => ["concat", ...parts(scene, [MEBIBYTES - 1, 1])],
  stripe: (scene) => ["stripe", ...parts(scene, [MEBIBYTES / 2, MEBIBYTES / 2])],
  "an asynchronous module": (scene) => {
    const file = join(scene.directory, "later.ts");
    writeFileSync(file, LATER);
    return [file];
  },
};

/** Every function awaits a timer; all queues share a buffer. */
const LATER = `
import { defineTarget } from "ubd";
import { setTimeout as sleep } from "node:timers/promises";
export default defineTarget({
  share: () => new SharedArrayBuffer(${MEBIBYTES << 20}),
  open(_options, shared) {
    const disk = new Uint8Array(shared);
    return {
      size: disk.length,
      async read({ offset, length, buffer }) {
        await sleep(1);
        buffer.set(disk.subarray(offset, offset + length));
      },
      async write({ offset, buffer }) {
        await sleep(1);
        disk.set(buffer, offset);
      },
    };
  },
});`;

function parts(scene: Scene, mebibytes: number[]): string[] {
  return mebibytes.map((size, index) => scene.image(`${index}.img`, size << 20));
}

for (const [name, command] of Object.entries(TARGETS)) {
  for (const queues of [1, 2]) {
    deviceTest(`fio finds no error on ${name} -q ${queues}`, {
      limitS: 300,
      anyKernel: true,
    }, async (scene) => {
      const device = await scene.add(...command(scene), "-q", `${queues}`);
      assert.equal(device.queues, queues);
      await verify(scene, device.path, MEBIBYTES);
      await scene.del(device);
    });
  }
}

deviceTest("ext4 on memory keeps its files through a random workload, and is clean", {
  limitS: 300,
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add("memory", "--size", "64M", "--block-size", "4096", "-q", "2");
  assert.equal(queueSetting(device, "logical_block_size"), "4096");
  await scene.sh(`mkfs.ext4 -q ${device.path}`);
  const point = await scene.mount("point", "-o discard", device.path);
  await scene.sh(
    `cd ${point}
     fio --name=files --directory=. --nrfiles=8 --size=${scaled(3, 24)}M --bsrange=1k-32k \
       --rw=randrw --file_service_type=random --fsync=32 --verify=crc32c --verify_fatal=1 \
       --unlink=1 --output=/dev/null
     RANDOM=7; mkdir files
     for turn in $(seq ${scaled(60, 400)}); do
       name=files/$((RANDOM % 12))
       case $((RANDOM % 5)) in
         0) rm -f $name ;;
         1) truncate -s $((RANDOM * 9)) $name ;;
         2) mv -f $name files/$((RANDOM % 12)) 2>/dev/null || true ;;
         *) head -c $((RANDOM * 7)) /dev/urandom >> $name ;;
       esac
     done
     sha256sum files/* > ${scene.directory}/sums
     cd /; umount ${point}; fsck.ext4 -f -n ${device.path}
     mount ${device.path} ${point}; fstrim ${point}
     cd ${point}; echo 3 > /proc/sys/vm/drop_caches; sha256sum --quiet -c ${scene.directory}/sums
     cd /; umount ${point}; fsck.ext4 -f -n ${device.path}`,
  );
  await scene.del(device);
});

deviceTest("stripe puts chunks on files by turns, concat one file behind the other", {
  anyKernel: true,
}, async (scene) => {
  const files = parts(scene, [2, 2, 3]);
  const stripe = await scene.add("stripe", ...files, "--chunk", "8K");
  assert.equal(queueSetting(stripe, "chunk_sectors"), "16");
  assert.match(stripe.stderr, /: 6 MiB, direct I\/O, the last 1048576 bytes of .*2\.img are not/);
  const info = JSON.parse((await scene.ubd("info", `${stripe.id}`, "--json")).stdout);
  assert.deepEqual(info.target.backing_files, files);
  await scene.sh(
    `head -c 6M /dev/urandom > data
     dd status=none if=data of=${stripe.path} bs=1M oflag=direct conv=fsync
     for file in 0 1 2; do
       for turn in 0 1 100 255; do
         cmp -n 8192 -i $(((turn * 3 + file) * 8192)):$((turn * 8192)) data $file.img
       done
     done
     blkdiscard -f -o 1M -l 3M ${stripe.path}
     dd status=none if=/dev/zero of=data bs=1M seek=1 count=3 conv=notrunc
     dd status=none if=${stripe.path} bs=1M iflag=direct | cmp - data`,
  );
  const again = await scene.ubd("add", "concat", files[0]!);
  assert.deepEqual([again.code, /EBUSY/.test(again.stderr)], [4, true], again.stderr);
  await scene.del(stripe);

  const concat = await scene.add("concat", ...files, "--ro");
  assert.match(concat.stderr, /: 7 MiB, read-only, direct I\/O/);
  await scene.sh(
    `cat ${files.join(" ")} > joined
     dd status=none if=${concat.path} bs=1M iflag=direct | cmp - joined
     ! dd status=none if=data of=${concat.path} bs=1M count=1 2> /dev/null`,
  );
  await scene.del(concat);
});

deviceTest("targets refuse options that are wrong, and leave nothing", {
  anyKernel: true,
}, async (scene) => {
  const [file] = parts(scene, [1]);
  const refused: [string[], RegExp][] = [
    [["memory", "--size", "1000"], /Size 1000: it must be a multiple of the 512-byte block/],
    [["memory", "--block-size", "8K"], /Block size 8192: it must be 512, 1024, 2048 or 4096/],
    [["memory", file!], /Option "file": there are size, blockSize/],
    [["fault", file!, "--opt", "errorRate=2"], /"errorRate" is "2": say a probability/],
    [
      ["fault", "-q", "2", "--opt", "cache=true"],
      /Number of queues 2: this target can be served by 1/,
    ],
    [["stripe", file!, "--chunk", "2M"], /Chunk 2097152: the smallest file has 1048576 bytes/],
  ];
  for (const [args, message] of refused) {
    const { code, stderr } = await scene.ubd("add", ...args);
    assert.equal(code, 2, stderr);
    assert.match(stderr, message);
  }
  const absent = await scene.ubd("add", "fault", join(scene.directory, "absent"));
  assert.deepEqual([absent.code, /ENOENT/.test(absent.stderr)], [1, true], absent.stderr);
});

deviceTest("fault fails the requests in its range with its errno, and no others", {
  anyKernel: true,
}, async (scene) => {
  const device = await scene.add(
    ...["fault", "--size", "4M"],
    ...["errorRate=1", "error=ENOSPC", "operations=write", "from=1M", "to=2M"]
      .flatMap((option) => ["--opt", option]),
  );
  const write = (seek: number) =>
    scene.run([
      "dd",
      "if=/dev/zero",
      `of=${device.path}`,
      "bs=64k",
      "count=1",
      `seek=${seek}`,
      "oflag=direct",
    ]);
  for (const seek of [0, 15, 32]) assert.equal((await write(seek)).code, 0);
  for (const seek of [16, 31]) assert.match((await write(seek)).stderr, /No space left on device/);
  await scene.sh(
    `dd status=none if=${device.path} bs=1M iflag=direct | cmp - <(head -c 4M /dev/zero)`,
  );
  await scene.del(device);
});

/** Copies the program's source, with a loop that answers FLUSH at once. @returns its main. */
function plantBug(scene: Scene): string {
  const copy = join(scene.directory, "planted");
  for (const part of ["abi", "cli", "core", "ffi", "targets", "mod.ts", "package.json"]) {
    cpSync(join(ROOT, part), join(copy, part), { recursive: true });
  }
  symlinkSync(join(ROOT, "node_modules"), join(copy, "node_modules"));
  const files = join(copy, "targets/files.ts");
  const source = readFileSync(files, "utf8");
  const flush = "for (const { fd } of this.files) plan.sync(fd);";
  assert.ok(source.includes(flush));
  writeFileSync(files, source.replace(flush, ""));
  return join(copy, "cli/main.ts");
}

/** Whether what was flushed through a loop device is there after its disk's power was cut. */
async function survivesPowerCut(scene: Scene, add: (path: string) => Promise<Added>) {
  const disk = scene.image("disk.img", 4 << 20);
  const faulty = await scene.add("fault", disk, "--opt", "cache=true");
  const loop = await add(faulty.path);
  await scene.sh(
    `head -c 2M /dev/urandom > data
     dd status=none if=data of=${loop.path} bs=64k oflag=direct conv=fsync
     cmp -n 2M data ${faulty.path}`,
  );
  await killServer(scene, faulty);
  await scene.del(loop);
  await scene.del(faulty);
  return (await scene.run(["cmp", "-n", "2M", "data", disk])).code === 0;
}

deviceTest("fault finds a loop that drops FLUSH: what was flushed is gone after a power cut", {
  anyKernel: true,
}, async (scene) => {
  const asItIs = (path: string) => scene.add("loop", path);
  const planted = async (path: string) => {
    const { code, stdout, stderr } = await scene.run(["bun", plantBug(scene), "add", "loop", path]);
    assert.equal(code, 0, stderr);
    return scene.adopt(stdout);
  };
  assert.equal(await survivesPowerCut(scene, asItIs), true, "the control");
  assert.equal(await survivesPowerCut(scene, planted), false);
});
