// SPDX-License-Identifier: MIT
/**
 * Which sectors the partition table of an image counts in. Nothing in a table says so, and a device
 * with other logical blocks shows no partitions, or shows them in the wrong places.
 *
 * GPT: its header is in the second sector, with the number of its own sector and a checksum. MBR: by
 * what is where a partition would start; without such evidence, nothing is said.
 * @module
 */

import { crc32 } from "node:zlib";

/** Sectors that disks have, and block sizes that the driver takes. */
const SECTOR_SIZES = [512, 1024, 2048, 4096] as const;

export interface PartitionTable {
  kind: "GPT" | "MBR";
  sectorBytes: number;
}

/** @returns `length` bytes from `offset`; undefined: there are not so many, or not to be had. */
export type ReadBytes = (offset: number, length: number) => Uint8Array | undefined;

/** @returns undefined: there is no table, or none whose sectors are known. */
export function findPartitionTable(read: ReadBytes): PartitionTable | undefined {
  const boot = read(0, 512);
  if (!boot || boot[510] !== 0x55 || boot[511] !== 0xaa) return undefined;
  const entries = [446, 462, 478, 494].map((at) => entryOf(boot, at));
  if (entries.some(({ active }) => (active & 0x7f) !== 0)) return undefined; // A boot sector.
  const used = entries.filter(({ type, sectors }) => type !== 0 && sectors > 0);
  // An image that is to be read both ways, as of a CD, is what most take it for: the smallest.
  const protective = used.some(({ type }) => type === 0xee);
  if (protective) return choose("GPT", SECTOR_SIZES.filter((bytes) => hasGptHeader(read, bytes)));
  return choose(
    "MBR",
    SECTOR_SIZES.filter((bytes) =>
      used.some(({ start }) => startsFileSystem(read, start * bytes, bytes))
    ),
  );
}

function choose(
  kind: PartitionTable["kind"],
  sizes: readonly number[],
): PartitionTable | undefined {
  const [sectorBytes] = sizes;
  return sectorBytes === undefined ? undefined : { kind, sectorBytes };
}

function entryOf(boot: Uint8Array, at: number) {
  const view = viewOf(boot);
  return {
    active: boot[at]!,
    type: boot[at + 4]!,
    start: view.getUint32(at + 8, true),
    sectors: view.getUint32(at + 12, true),
  };
}

function hasGptHeader(read: ReadBytes, sectorBytes: number): boolean {
  const sector = read(sectorBytes, sectorBytes);
  if (!sector || !has(sector, 0, "EFI PART")) return false;
  const view = viewOf(sector);
  const headerBytes = view.getUint32(12, true);
  if (headerBytes < 92 || headerBytes > sectorBytes) return false;
  if (view.getBigUint64(24, true) !== 1n) return false;
  const header = sector.slice(0, headerBytes);
  header.fill(0, 16, 20); // The checksum itself counts as 0.
  return crc32(header) === view.getUint32(16, true);
}

/** Signatures and where they are, from the start of a partition. */
const SIGNATURES: readonly (readonly [number, string])[] = [
  [1080, "\x53\xef"], // ext2 to ext4
  [0, "XFSB"],
  [65536 + 64, "_BHRfS_M"], // btrfs
  [0, "LUKS\xba\xbe"],
  [1024, "\x10\x20\xf5\xf2"], // f2fs
  [4096 - 10, "SWAPSPACE2"],
  [32768 + 1, "CD001"], // ISO 9660
];

/** LVM is in the second sector, whatever a sector is. */
const LVM = "LABELONE";

/** FAT, exFAT and NTFS say themselves what a sector is. */
function startsFileSystem(read: ReadBytes, offset: number, sectorBytes: number): boolean {
  if (offset === 0) return false;
  const first = read(offset, 512);
  if (!first) return false;
  if (has(first, 510, "\x55\xaa")) {
    const exfat = has(first, 3, "EXFAT   ");
    const declared = exfat ? 2 ** first[108]! : viewOf(first).getUint16(11, true);
    const isBoot = first[0] === 0xeb || first[0] === 0xe9;
    if (isBoot && declared === sectorBytes) return true;
  }
  const at = (where: number, signature: string) => {
    const bytes = read(offset + where, signature.length);
    return bytes !== undefined && has(bytes, 0, signature);
  };
  return SIGNATURES.some(([where, signature]) => at(where, signature)) || at(sectorBytes, LVM);
}

function has(bytes: Uint8Array, at: number, signature: string): boolean {
  return [...signature].every((character, index) => bytes[at + index] === character.charCodeAt(0));
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
