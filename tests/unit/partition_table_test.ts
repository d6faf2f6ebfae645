// SPDX-License-Identifier: MIT
/** The sector size of partition tables: tables made here, by the standards. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { crc32 } from "node:zlib";
import { findPartitionTable } from "../../targets/partition_table.ts";

const SIZES = [512, 1024, 2048, 4096];

function find(image: Uint8Array) {
  return findPartitionTable((offset, length) =>
    offset + length <= image.length ? image.subarray(offset, offset + length) : undefined
  );
}

function put(image: Uint8Array, at: number, text: string): void {
  for (const [index, character] of [...text].entries()) image[at + index] = character.charCodeAt(0);
}

/** @param partitions type and first sector of each */
function mbr(partitions: [number, number][], bytes = 1 << 20): Uint8Array {
  const image = new Uint8Array(bytes);
  const view = new DataView(image.buffer);
  for (const [index, [type, start]] of partitions.entries()) {
    view.setUint8(446 + index * 16 + 4, type);
    view.setUint32(446 + index * 16 + 8, start, true);
    view.setUint32(446 + index * 16 + 12, 8, true);
  }
  put(image, 510, "\x55\xaa");
  return image;
}

function gpt(sectorBytes: number, image = mbr([[0xee, 1]])): Uint8Array {
  const view = new DataView(image.buffer, sectorBytes, sectorBytes);
  put(image, sectorBytes, "EFI PART");
  view.setUint32(8, 0x10000, true);
  view.setUint32(12, 92, true);
  view.setBigUint64(24, 1n, true);
  view.setUint32(16, 0, true);
  view.setUint32(16, crc32(image.subarray(sectorBytes, sectorBytes + 92)), true);
  return image;
}

test("findPartitionTable tells a GPT's sectors by where its header is", () => {
  for (const sectorBytes of SIZES) {
    assert.deepStrictEqual(find(gpt(sectorBytes)), { kind: "GPT", sectorBytes });
    const broken = gpt(sectorBytes);
    broken[sectorBytes + 40] = 1; // Its checksum is another one's.
    assert.strictEqual(find(broken), undefined);
    const misplaced = gpt(sectorBytes);
    new DataView(misplaced.buffer).setUint32(sectorBytes + 24, 8, true);
    assert.strictEqual(find(misplaced), undefined);
    const unprotected = gpt(sectorBytes, mbr([[0x83, 1]]));
    assert.strictEqual(find(unprotected), undefined, "the kernel wants it protected, too");
    const short = gpt(sectorBytes).subarray(0, sectorBytes + 90);
    assert.strictEqual(find(short), undefined);
  }
  assert.deepStrictEqual(find(gpt(512, gpt(2048)))?.sectorBytes, 512, "both ways, as of a CD");
});

test("findPartitionTable tells an MBR's sectors only by what is where they start", () => {
  for (const sectorBytes of SIZES) {
    const start = 16;
    const table = () => mbr([[0x83, start], [0x82, 100]]);
    assert.strictEqual(find(table()), undefined, "nothing is there");
    const found = { kind: "MBR", sectorBytes };
    for (
      const [at, text] of [[1080, "\x53\xef"], [0, "XFSB"], [65600, "_BHRfS_M"], [
        4086,
        "SWAPSPACE2",
      ]] as const
    ) {
      const image = table();
      put(image, start * sectorBytes + at, text);
      assert.deepStrictEqual(find(image), found, text);
    }
    const fat = table();
    put(fat, start * sectorBytes, "\xeb\x3c\x90mkfs.fat");
    put(fat, start * sectorBytes + 510, "\x55\xaa");
    const declared = new DataView(fat.buffer, start * sectorBytes + 11);
    declared.setUint16(0, sectorBytes, true);
    assert.deepStrictEqual(find(fat), found);
    declared.setUint16(0, sectorBytes === 512 ? 4096 : 512, true);
    assert.strictEqual(find(fat), undefined, "it says that it is none of these sectors");
    const lvm = table();
    put(lvm, (start + 1) * sectorBytes, "LABELONE");
    assert.deepStrictEqual(find(lvm), found);
  }
  // Evidence for both: what such a disk is taken for stays.
  const both = mbr([[0x83, 16]]);
  put(both, 16 * 512 + 1080, "\x53\xef");
  put(both, 16 * 4096 + 1080, "\x53\xef");
  assert.strictEqual(find(both)?.sectorBytes, 512);
});

test("findPartitionTable says nothing of what has no table", () => {
  assert.strictEqual(find(new Uint8Array(100)), undefined);
  assert.strictEqual(find(new Uint8Array(1 << 16)), undefined);
  const bootSector = mbr([[0x83, 16]]);
  put(bootSector, 16 * 4096, "XFSB");
  bootSector[446] = 0x6e; // Text of a boot loader, where a table has 0 or 0x80.
  assert.strictEqual(find(bootSector), undefined);
});
