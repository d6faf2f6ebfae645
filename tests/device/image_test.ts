// SPDX-License-Identifier: MIT
/** Images that others made, as loop devices: partitions, odd sizes, windows, backings. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { closeSync, existsSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import { join } from "node:path";
import { blockStat, deviceTest, queueSetting, type Scene, until } from "./helpers.ts";

const MIB = 1 << 20;

/** A disk image with two partitions, one ext4 and one vfat, each with a file, and a tail. */
async function partitioned(
  scene: Scene,
  label: "gpt" | "dos",
  tailBytes: number,
): Promise<string> {
  const image = scene.image(`${label}.img`, 12 * MIB);
  const second = label === "gpt" ? "" : ",type=c";
  await scene.sh(
    `printf 'label: ${label}\\nstart=2048,size=8192\\nstart=10240,size=12288${second}\\n' |
       sfdisk -q ${image}
     mkfs.ext4 -q -E offset=${2048 * 512} ${image} 4M
     truncate -s 6M fat; mkfs.vfat fat > /dev/null
     dd status=none if=fat of=${image} bs=512 seek=10240 conv=notrunc
     head -c ${tailBytes} /dev/urandom >> ${image}; rm fat`,
  );
  return image;
}

/** The last sector as the device shows it, past the page cache. */
async function lastSector(scene: Scene, device: string, bytes: number): Promise<Buffer> {
  await scene.sh(
    `dd status=none if=${device} of=sector iflag=direct bs=512 skip=${bytes / 512 - 1}`,
  );
  return readFileSync(join(scene.directory, "sector"));
}

for (const { label, tail } of [{ label: "gpt", tail: 512 }, { label: "dos", tail: 100 }] as const) {
  const odd = tail === 512 ? "no multiple of 4096" : "no multiple of 512";
  deviceTest(`a ${label} image of a size that is ${odd} is served whole`, {
    anyKernel: true,
  }, async (scene) => {
    const image = await partitioned(scene, label, tail);
    const whole = readFileSync(image);
    const sizeBytes = Math.ceil(whole.length / 512) * 512;
    const device = await scene.add("loop", image);
    assert.equal(queueSetting(device, "logical_block_size"), "512");
    assert.equal(await scene.sh(`blockdev --getsize64 ${device.path}`), `${sizeBytes}`);
    if (tail === 100) assert.match(device.stderr, /the last block has 100 bytes of the file/);

    await scene.sh(
      `cmp -n ${whole.length} ${image} ${device.path}
       dd status=none iflag=direct bs=64K if=${device.path} | cmp -n ${whole.length} - ${image}`,
    );
    const sector = Buffer.alloc(512);
    whole.copy(sector, 0, sizeBytes - 512);
    assert.deepEqual(await lastSector(scene, device.path, sizeBytes), sector);

    const parts = [`${device.path}p1`, `${device.path}p2`];
    assert.ok(await until(() => parts.every((part) => existsSync(part))), "partitions appear");
    for (const part of parts) {
      const point = await scene.mount(`on-${part.at(-1)}`, part);
      await scene.sh(`echo hello > ${point}/file; umount ${point}; mount ${part} ${point}`);
      assert.equal(await scene.sh(`cat ${point}/file; umount ${point}`), "hello");
    }
    assert.equal(statSync(image).size, whole.length, "the tail was not written");

    const fresh = Buffer.alloc(512, label);
    await scene.sh(
      `printf %s ${fresh} |
         dd status=none of=${device.path} bs=512 oflag=direct iflag=fullblock \
           seek=${sizeBytes / 512 - 1}`,
    );
    await scene.del(device);
    assert.equal(statSync(image).size, sizeBytes, "writing the tail lets the file grow");
    assert.deepEqual(readFileSync(image).subarray(-512), fresh);
    const rest = readFileSync(image).subarray(whole.length - tail - 64 * 1024, -512);
    assert.ok(rest.equals(whole.subarray(whole.length - tail - 64 * 1024, sizeBytes - 512)));
  });
}

deviceTest(
  "--ro never changes the file, allows many readers and no writer",
  { anyKernel: true },
  async (scene) => {
    const image = scene.image("disk.img", 16 * MIB + 100);
    await scene.sh(`mkfs.ext4 -q -F ${image} 16M; touch -d 2001-02-03 ${image}`);
    const facts = () => scene.sh(`sha256sum ${image}; stat -c '%Y %s %b' ${image}`);
    const before = await facts();
    const one = await scene.add("loop", image, "--ro");
    const two = await scene.add("loop", image, "--ro", "--buffered");
    assert.match(one.stderr, /read-only/);
    assert.equal(await scene.sh(`blockdev --getro ${one.path} ${two.path}`), "1\n1");
    const write = await scene.run(["dd", "if=/dev/zero", `of=${one.path}`, "bs=4k", "count=1"]);
    assert.notEqual(write.code, 0);
    const point = await scene.mount("point", "-o ro", one.path);
    await scene.sh(`ls ${point} > /dev/null; umount ${point}`);
    await scene.run(["blkdiscard", "-f", two.path]);

    const writer = await scene.ubd("add", "loop", image);
    assert.equal(writer.code, 4, writer.stderr);
    assert.match(writer.stderr, /Cannot lock .*EBUSY.*--force/);
    await scene.del(one, two);
    assert.equal(await facts(), before);
  },
);

deviceTest(
  "--offset and --size cut a window; bytes outside are not touched",
  { anyKernel: true },
  async (scene) => {
    const image = join(scene.directory, "disk.img");
    await scene.sh(`head -c 8M /dev/urandom > ${image}`);
    const before = readFileSync(image);
    const [start, size] = [MIB + 512, 2 * MIB];
    const device = await scene.add("loop", image, "--offset", `${start}B`, "--size", "2M");
    const same = await scene.ubd("add", "loop", image, "-o", "2049", "--size", "2M", "--force");
    const twin = scene.adopt(same.stdout);
    await scene.sh(
      `[ $(blockdev --getsize64 ${device.path}) = ${size} ]
     cmp -n ${size} -i 0:${start} ${device.path} ${image}
     cmp -n ${size} ${device.path} ${twin.path}
     head -c 2M /dev/urandom > new
     dd status=none if=new of=${device.path} bs=256K oflag=direct
     blkdiscard -z -o 512 -l 1024 ${device.path}
     ! dd status=none if=/dev/zero of=${device.path} bs=4k count=1 seek=512 2> /dev/null`,
    );
    await scene.del(device, twin);
    const after = readFileSync(image);
    const wanted = Buffer.from(readFileSync(join(scene.directory, "new")));
    wanted.fill(0, 512, 1536);
    assert.ok(after.subarray(start, start + size).equals(wanted), "the window has the new data");
    assert.ok(after.subarray(0, start).equals(before.subarray(0, start)), "in front of it");
    assert.ok(after.subarray(start + size).equals(before.subarray(start + size)), "behind it");
  },
);

deviceTest("offsets beyond 4 GiB arrive where they belong", { anyKernel: true }, async (scene) => {
  const image = scene.image("large.img", 6 * 1024 ** 3);
  const device = await scene.add("loop", image);
  const at = 5 * 1024 + 3; // MiB
  await scene.sh(
    `head -c 1M /dev/urandom > data
     dd status=none if=data of=${device.path} bs=1M seek=${at} oflag=direct
     dd status=none if=${image} bs=1M skip=${at} count=1 | cmp - data
     dd status=none if=${image} bs=1M skip=${at - 4096} count=1 | cmp -n 1048576 - /dev/zero
     blkdiscard -f ${device.path}
     dd status=none if=${image} bs=1M skip=${at} count=1 | cmp -n 1048576 - /dev/zero`,
  );
});

deviceTest(
  "block devices and 4096-byte blocks serve as backing",
  { anyKernel: true },
  async (scene) => {
    const bytes = 24 * MIB;
    const large = await scene.losetup("-b 4096", scene.image("disk.img", bytes));
    const onDevice = await scene.add("loop", large);
    assert.equal(queueSetting(onDevice, "logical_block_size"), "4096");
    assert.match(onDevice.stderr, /direct I\/O/);
    const busy = await scene.ubd("add", "loop", large);
    assert.equal(busy.code, 4, busy.stderr);

    // A device of ubd on a device of ubd, with a file system on top.
    const onTop = await scene.add("loop", onDevice.path);
    await scene.sh(`mkfs.ext4 -q ${onTop.path}`);
    const point = await scene.mount("point", onTop.path);
    await scene.sh(
      `head -c 4M /dev/urandom > ${point}/data; sha256sum < ${point}/data > sum
     umount ${point}; blockdev --flushbufs ${onTop.path}`,
    );
    await scene.del(onTop);
    await scene.del(onDevice);
    const image = join(scene.directory, "disk.img");
    await scene.sh(`losetup -d ${large}; mount -o loop,ro ${image} ${point}
    sha256sum < ${point}/data | cmp - sum`);
  },
);

deviceTest(
  "what refuses direct I/O is served buffered, and add says why",
  { anyKernel: true },
  async (scene) => {
    const large = await scene.losetup("-b 4096", scene.image("back", 24 * MIB));
    await scene.sh(`mkfs.ext4 -q ${large}`);
    const point = await scene.mount("point", large);
    const image = `${point}/disk.img`;
    await scene.sh(`truncate -s 8M ${image}`);
    const write = (device: string, bytes: number) =>
      scene.sh(`head -c 1M /dev/urandom > new
      dd status=none if=new of=${device} bs=${bytes} oflag=direct
      dd status=none if=${device} bs=${bytes} iflag=direct count=${MIB / bytes} | cmp - new
      cmp -n ${MIB} new ${image}`);

    const small = await scene.add("loop", image);
    assert.match(
      small.stderr,
      /buffered I\/O: direct I\/O needs blocks of 4096 bytes; --block-size/,
    );
    await write(small.path, 512 * 32);
    await scene.del(small);
    const aligned = await scene.add("loop", image, "--block-size", "4096");
    assert.match(aligned.stderr, /, direct I\/O, zero copy.*\n/);
    await write(aligned.path, 4096 * 8);
    assert.ok(blockStat(aligned)[4]! > 0);
    const fd = openSync(aligned.path, "r");
    assert.equal(readSync(fd, new Uint8Array(100)), 100);
    closeSync(fd);
  },
);
