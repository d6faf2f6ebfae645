// SPDX-License-Identifier: MIT
/**
 * Byte-exact vectors for both dialects, written by hand from the two headers.
 *
 * They do not use the tables' offsets, so an error in a table, in the codec or in a conversion
 * shows here without a compiler. Opcodes: printed by a C program over the 7.2 header.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { test } from "node:test";
import { UBD_V2, UBLK } from "../../abi/dialect.ts";
import { ERRNO, errnoName, errnoText } from "../../abi/errno.ts";
import { pack, unpack } from "../../abi/struct.ts";
import * as ubd from "../../abi/ubd_v2.ts";
import * as ublk from "../../abi/ublk_cmd.ts";

function bytes(...parts: string[]): Uint8Array {
  return new Uint8Array(Buffer.from(parts.join("").replaceAll(" ", ""), "hex"));
}

test("ADD_DEV info, mainline", () => {
  const info = UBLK.packInfo({
    id: 3,
    queues: 2,
    depth: 128,
    maxIoBytes: 512 * 1024,
    flags: ublk.UBLK_F_CMD_IOCTL_ENCODE | ublk.UBLK_F_USER_RECOVERY | ublk.UBLK_F_SHMEM_ZC,
    targetFlags: 0x1122334455667788n,
    blockSize: 4096,
    sizeBytes: 1 << 30,
  });
  const wanted = bytes(
    "0200 8000 0000 0000", // queues, depth, state, pad0
    "00000800 03000000", // max_io_buf_bytes, dev_id
    "00000000 00000000", // pid, pad1
    "48000800 00000000", // flags
    "88776655 44332211", // ublksrv_flags
    "00".repeat(24), // owner, reserved
  );
  assert.deepEqual(info, wanted);
});

test("ADD_DEV info, mainline, automatic id", () => {
  const spec = { queues: 1, depth: 1, maxIoBytes: 4096, blockSize: 512, sizeBytes: 0 };
  const info = UBLK.packInfo({ id: -1, ...spec });
  assert.deepEqual(info.subarray(8, 16), bytes("00100000 ffffffff"));
});

test("GET_DEV_INFO, mainline", () => {
  const info = UBLK.unpackInfo(bytes(
    "0400 0001 0300 ffff",
    "00001000 2a000000",
    "ffffffff ffffffff",
    "ffff0f00 00000000",
    "01000000 00000080",
    "e8030000 e9030000",
    "ff".repeat(16),
  ));
  assert.deepEqual(info, {
    id: 42,
    queues: 4,
    depth: 256,
    state: ublk.UBLK_S_DEV_FAIL_IO,
    maxIoBytes: 1 << 20,
    pid: -1,
    flags: 0xfffffn,
    targetFlags: 0x8000000000000001n,
    ownerUid: 1000,
    ownerGid: 1001,
  });
});

test("ADD_DEV info, V2", () => {
  const info = UBD_V2.packInfo({
    id: 3,
    queues: 2,
    depth: 128,
    maxIoBytes: 512 * 1024,
    flags: 0n,
    blockSize: 4096,
    sizeBytes: 5n << 44n, // 80 TiB: 5 << 32 blocks
  });
  const wanted = bytes(
    "0200 8000 0010 0000", // queues, depth, block_size, state
    "80000000 03000000", // rq_max_blocks, dev_id
    "00000000 05000000", // dev_blocks
    "00000000 00000000", // pid, reserved0
    "00000000 00000000", // flags[0]
    "00".repeat(88),
  );
  assert.deepEqual(info, wanted);
});

test("GET_DEV_INFO, V2", () => {
  const info = UBD_V2.unpackInfo(bytes(
    "0100 4000 0002 0100",
    "00040000 07000000",
    "00002000 00000000",
    "d2040000 ffffffff",
    "00000000 00000000",
    "ff".repeat(88),
  ));
  assert.deepEqual(info, {
    id: 7,
    queues: 1,
    depth: 64,
    state: ublk.UBLK_S_DEV_LIVE,
    maxIoBytes: 1024 * 512,
    pid: 1234,
    flags: 0n,
    targetFlags: 0n,
    ownerUid: 0,
    ownerGid: 0,
    blockBytes: 512,
    sizeBytes: 2 ** 30,
  });
});

test("control command, mainline with a device path", () => {
  const command = pack(ublk.UBLKSRV_CTRL_CMD, {
    dev_id: 0xffffffff,
    queue_id: 0xffff,
    len: 64,
    addr: 0x7f0011223344n,
    data: [0x0102030405060708n],
    dev_path_len: 13,
  });
  const wanted = bytes(
    "ffffffff ffff 4000",
    "44332211 007f0000",
    "08070605 04030201",
    "0d00 0000 00000000",
  );
  assert.deepEqual(command, wanted);
});

test("control command: without a path both dialects have the same bytes", () => {
  const values = { dev_id: 5, queue_id: 0xffff, len: 128, addr: 1n, data: [99n] };
  assert.deepEqual(pack(ublk.UBLKSRV_CTRL_CMD, values), pack(ubd.UBDSRV_CTRL_CMD, values));
});

test("io command, both dialects", () => {
  const values = { q_id: 1, tag: 0x0fff, result: -5, addr: 0xdeadbeef00n };
  const wanted = bytes("0100 ff0f fbffffff 00efbead de000000");
  assert.deepEqual(pack(ublk.UBLKSRV_IO_CMD, values), wanted);
  assert.deepEqual(pack(ubd.UBDSRV_IO_CMD, values), wanted);
});

test("io descriptor, both dialects: flags are in place, not shifted", () => {
  const descriptor = bytes("05a00000 08000000 00000000 01000000 00100000 00000000");
  for (const layout of [ublk.UBLKSRV_IO_DESC, ubd.UBDSRV_IO_DESC]) {
    const { op_flags, nr_sectors, start_sector, addr } = unpack(layout, descriptor);
    assert.equal(op_flags & 0xff, ublk.UBLK_IO_OP_WRITE_ZEROES);
    assert.equal(op_flags & ~0xff, ublk.UBLK_IO_F_FUA | ublk.UBLK_IO_F_NOUNMAP);
    assert.deepEqual([nr_sectors, start_sector, addr], [8, 2n ** 32n, 4096n]);
  }
});

test("params: basic, discard and dma", () => {
  const params = pack(ublk.UBLK_PARAMS, {
    len: ublk.UBLK_PARAMS.size,
    types: ublk.UBLK_PARAM_TYPE_BASIC | ublk.UBLK_PARAM_TYPE_DISCARD |
      ublk.UBLK_PARAM_TYPE_DMA_ALIGN,
    basic: {
      attrs: ublk.UBLK_ATTR_VOLATILE_CACHE | ublk.UBLK_ATTR_FUA,
      logical_bs_shift: 9,
      physical_bs_shift: 12,
      io_opt_shift: 16,
      io_min_shift: 12,
      max_sectors: 1024,
      dev_sectors: 0x123456789an,
    },
    discard: {
      discard_granularity: 4096,
      max_discard_sectors: 0x7fffff,
      max_write_zeroes_sectors: 0x7ffffe,
      max_discard_segments: 1,
    },
    dma: { alignment: 511 },
  });
  const wanted = bytes(
    "98000000 13000000", // len 152, types
    "0c000000 09 0c 10 0c 00040000 00000000", // attrs, shifts, max_sectors, chunk_sectors
    "9a785634 12000000 0000000000000000", // dev_sectors, virt_boundary_mask
    "00000000 00100000 ffff7f00 feff7f00 0100 0000", // discard
    "00".repeat(16), // devt
    "00".repeat(32), // zoned
    "ff010000 00000000", // dma
    "00000000", // hole
    "00".repeat(32), // segment, integrity
  );
  assert.deepEqual(params, wanted);
});

test("params: devt comes back in GET_PARAMS", () => {
  const reply = new Uint8Array(152);
  reply.set(bytes("f1000000 03000000 03010000 04000000"), 60);
  const { devt } = unpack(ublk.UBLK_PARAMS, reply);
  assert.deepEqual(devt, { char_major: 241, char_minor: 3, disk_major: 259, disk_minor: 4 });
});

test("opcodes have the values of the compiled header", () => {
  const values: [number, number][] = [
    [ublk.UBLK_U_CMD_GET_QUEUE_AFFINITY, 0x80207501],
    [ublk.UBLK_U_CMD_GET_DEV_INFO, 0x80207502],
    [ublk.UBLK_U_CMD_ADD_DEV, 0xc0207504],
    [ublk.UBLK_U_CMD_DEL_DEV, 0xc0207505],
    [ublk.UBLK_U_CMD_START_DEV, 0xc0207506],
    [ublk.UBLK_U_CMD_STOP_DEV, 0xc0207507],
    [ublk.UBLK_U_CMD_SET_PARAMS, 0xc0207508],
    [ublk.UBLK_U_CMD_GET_PARAMS, 0x80207509],
    [ublk.UBLK_U_CMD_GET_DEV_INFO2, 0x80207512],
    [ublk.UBLK_U_CMD_GET_FEATURES, 0x80207513],
    [ublk.UBLK_U_CMD_DEL_DEV_ASYNC, 0x80207514],
    [ublk.UBLK_U_CMD_UPDATE_SIZE, 0xc0207515],
    [ublk.UBLK_U_IO_FETCH_REQ, 0xc0107520],
    [ublk.UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0xc0107521],
    [ublk.UBLK_U_IO_NEED_GET_DATA, 0xc0107522],
    [ublk.UBLK_U_IO_REGISTER_IO_BUF, 0xc0107523],
    [ublk.UBLK_U_IO_FETCH_IO_CMDS, 0xc0107527],
  ];
  for (const [value, wanted] of values) assert.equal(value, wanted, wanted.toString(16));
});

test("errno: names, numbers of either sign, and messages", () => {
  assert.equal(errnoName(19), "ENODEV");
  assert.equal(errnoName(-19), "ENODEV");
  assert.equal(errnoText("ENODEV"), "No such device");
  assert.equal(errnoName(ERRNO.EWOULDBLOCK), "EAGAIN");
  assert.equal(errnoName(41), "errno 41"); // a hole of the kernel's numbering
  assert.equal(errnoName(4095), "errno 4095");
  assert.equal(errnoName(-524), "EOPNOTSUPP"); // the kernel's own ENOTSUPP: the same to a user
  assert.equal(errnoText("ENOSUCH"), "ENOSUCH");
  const holes = [41, 58];
  for (let n = 1; n <= 133; n++) {
    assert.equal(/^E[0-9A-Z]+$/.test(errnoName(n)), !holes.includes(n), String(n));
  }
});
