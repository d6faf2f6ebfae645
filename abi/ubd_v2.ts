// SPDX-License-Identifier: MIT
/**
 * The V2 dialect: the interface of the ubd driver that became ublk, as posted for review.
 *
 * Facts from `linux/ubd_cmd.h` and `drivers/block/ubd_drv.c` of "[PATCH V2 1/1] ubd: add io_uring
 * based userspace block driver" (Ming Lei, 17 May 2022); never merged under this name. Names are
 * that header's. Checked by a table typed from it by hand (tests/unit/abi_ubd_v2_test.ts).
 *
 * What that driver does and mainline does not: every command, io commands too, needs 128-byte
 * SQEs; FETCH needs a buffer address; the disk always takes DISCARD and WRITE_ZEROES; there is no
 * FLUSH and no FUA; a failed START_DEV or ADD_DEV answers -ENODEV whatever the cause. DEL_DEV of a
 * device that never had all its FETCHes follows a null pointer in the kernel: fetch first.
 */
import type { Layout } from "./struct.ts";

// Control commands, on /dev/ubd-control. There is no ioctl-encoded form.
export const UBD_CMD_GET_QUEUE_AFFINITY = 0x01;
export const UBD_CMD_GET_DEV_INFO = 0x02;
export const UBD_CMD_ADD_DEV = 0x04;
export const UBD_CMD_DEL_DEV = 0x05;
export const UBD_CMD_START_DEV = 0x06;
export const UBD_CMD_STOP_DEV = 0x07;

// Io commands, on /dev/ubdcN. COMMIT_REQ has the number of mainline's NEED_GET_DATA.
export const UBD_IO_FETCH_REQ = 0x20;
export const UBD_IO_COMMIT_AND_FETCH_REQ = 0x21;
export const UBD_IO_COMMIT_REQ = 0x22;

export const UBD_IO_RES_OK = 0;
export const UBD_IO_RES_ABORT = -19; // -ENODEV

export const UBDSRV_CMD_BUF_OFFSET = 0;
export const UBDSRV_IO_BUF_OFFSET = 0x8000_0000;
export const UBD_MAX_QUEUE_DEPTH = 4096;

/** A bit number, not a mask: the driver tests, and always clears, `1 << 0` of `flags[0]`. */
export const UBD_F_SUPPORT_ZERO_COPY = 0;

export const UBD_S_DEV_DEAD = 0;
export const UBD_S_DEV_LIVE = 1;

export const UBD_IO_OP_READ = 0;
export const UBD_IO_OP_WRITE = 1;
export const UBD_IO_OP_FLUSH = 2;
export const UBD_IO_OP_DISCARD = 3;
export const UBD_IO_OP_WRITE_SAME = 4;
export const UBD_IO_OP_WRITE_ZEROES = 5;

// As in mainline: masks of op_flags itself. Bits 12 and 14 did not survive into mainline.
export const UBD_IO_F_FAILFAST_DEV = 1 << 8;
export const UBD_IO_F_FAILFAST_TRANSPORT = 1 << 9;
export const UBD_IO_F_FAILFAST_DRIVER = 1 << 10;
export const UBD_IO_F_META = 1 << 11;
export const UBD_IO_F_INTEGRITY = 1 << 12;
export const UBD_IO_F_FUA = 1 << 13;
export const UBD_IO_F_PREFLUSH = 1 << 14;
export const UBD_IO_F_NOUNMAP = 1 << 15;
export const UBD_IO_F_SWAP = 1 << 16;

export const UBDSRV_CTRL_CMD = {
  name: "ubdsrv_ctrl_cmd",
  size: 32,
  fields: {
    dev_id: { offset: 0, type: "u32" },
    queue_id: { offset: 4, type: "u16" },
    len: { offset: 6, type: "u16" },
    addr: { offset: 8, type: "u64" },
    data: { offset: 16, type: "u64", count: 2 },
  },
} as const satisfies Layout;

/** The device; block size and capacity are in here because there is no SET_PARAMS. */
export const UBDSRV_CTRL_DEV_INFO = {
  name: "ubdsrv_ctrl_dev_info",
  size: 128,
  fields: {
    nr_hw_queues: { offset: 0, type: "u16" },
    queue_depth: { offset: 2, type: "u16" },
    block_size: { offset: 4, type: "u16" },
    state: { offset: 6, type: "u16" },
    rq_max_blocks: { offset: 8, type: "u32" },
    dev_id: { offset: 12, type: "u32" },
    dev_blocks: { offset: 16, type: "u64" },
    ubdsrv_pid: { offset: 24, type: "s32" },
    reserved0: { offset: 28, type: "s32" },
    flags: { offset: 32, type: "u64", count: 2 },
    reserved1: { offset: 48, type: "u64", count: 10 },
  },
} as const satisfies Layout;

export const UBDSRV_IO_DESC = {
  name: "ubdsrv_io_desc",
  size: 24,
  fields: {
    op_flags: { offset: 0, type: "u32" },
    nr_sectors: { offset: 4, type: "u32" },
    start_sector: { offset: 8, type: "u64" },
    addr: { offset: 16, type: "u64" },
  },
} as const satisfies Layout;

export const UBDSRV_IO_CMD = {
  name: "ubdsrv_io_cmd",
  size: 16,
  fields: {
    q_id: { offset: 0, type: "u16" },
    tag: { offset: 2, type: "u16" },
    result: { offset: 4, type: "s32" },
    addr: { offset: 8, type: "u64" },
  },
} as const satisfies Layout;
