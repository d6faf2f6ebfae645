// SPDX-License-Identifier: MIT
/**
 * Every struct of the mainline ublk interface, as layout tables.
 *
 * Facts from `linux/ublk_cmd.h` of Linux 7.2 (Debian's linux-libc-dev 7.2.13-1): names, sizes and
 * offsets; tests/unit/abi_header_test.ts compares all of them with a compiler's answer. Callers
 * import these through abi/ublk_cmd.ts.
 *
 * Structs only ever grew at their end, or into reserved fields, so one table serves all kernels: a
 * field that an older kernel does not know is zero there.
 */
import type { Layout } from "./struct.ts";

/** Payload of each control command: the second half of a 128-byte SQE. */
export const UBLKSRV_CTRL_CMD = {
  name: "ublksrv_ctrl_cmd",
  size: 32,
  fields: {
    dev_id: { offset: 0, type: "u32" },
    queue_id: { offset: 4, type: "u16" }, // 0xffff: the command is not for one queue
    len: { offset: 6, type: "u16" }, // bytes at addr, path included
    addr: { offset: 8, type: "u64" },
    data: { offset: 16, type: "u64", count: 1 },
    dev_path_len: { offset: 24, type: "u16" }, // with its NUL; Linux 6.3
    pad: { offset: 26, type: "u16" },
    reserved: { offset: 28, type: "u32" },
  },
} as const satisfies Layout;

/** The device as ADD_DEV takes it and GET_DEV_INFO returns it. */
export const UBLKSRV_CTRL_DEV_INFO = {
  name: "ublksrv_ctrl_dev_info",
  size: 64,
  fields: {
    nr_hw_queues: { offset: 0, type: "u16" },
    queue_depth: { offset: 2, type: "u16" },
    state: { offset: 4, type: "u16" },
    pad0: { offset: 6, type: "u16" },
    max_io_buf_bytes: { offset: 8, type: "u32" },
    dev_id: { offset: 12, type: "u32" },
    ublksrv_pid: { offset: 16, type: "s32" },
    pad1: { offset: 20, type: "u32" },
    flags: { offset: 24, type: "u64" },
    ublksrv_flags: { offset: 32, type: "u64" }, // the server's own; the driver only keeps it
    owner_uid: { offset: 40, type: "u32" },
    owner_gid: { offset: 44, type: "u32" },
    reserved1: { offset: 48, type: "u64" },
    reserved2: { offset: 56, type: "u64" },
  },
} as const satisfies Layout;

/** One request of a queue, in the mapped descriptor array, by tag. */
export const UBLKSRV_IO_DESC = {
  name: "ublksrv_io_desc",
  size: 24,
  fields: {
    op_flags: { offset: 0, type: "u32" }, // op: bits 0-7; UBLK_IO_F_*: in place, not shifted
    nr_sectors: { offset: 4, type: "u32" },
    nr_zones: { offset: 4, type: "u32" }, // union; for UBLK_IO_OP_REPORT_ZONES
    start_sector: { offset: 8, type: "u64" },
    addr: { offset: 16, type: "u64" },
  },
} as const satisfies Layout;

/** Payload of each io command: fits the command area of a 64-byte SQE. */
export const UBLKSRV_IO_CMD = {
  name: "ublksrv_io_cmd",
  size: 16,
  fields: {
    q_id: { offset: 0, type: "u16" },
    tag: { offset: 2, type: "u16" },
    result: { offset: 4, type: "s32" },
    addr: { offset: 8, type: "u64" },
    zone_append_lba: { offset: 8, type: "u64" }, // union
  },
} as const satisfies Layout;

/** UBLK_U_CMD_REG_BUF's argument. */
export const UBLK_SHMEM_BUF_REG = {
  name: "ublk_shmem_buf_reg",
  size: 24,
  fields: {
    addr: { offset: 0, type: "u64" },
    len: { offset: 8, type: "u64" },
    flags: { offset: 16, type: "u32" },
    reserved: { offset: 20, type: "u32" },
  },
} as const satisfies Layout;

/** What UBLK_F_AUTO_BUF_REG reads from `sqe.addr`: the same 8 bytes, little endian. */
export const UBLK_AUTO_BUF_REG = {
  name: "ublk_auto_buf_reg",
  size: 8,
  fields: {
    index: { offset: 0, type: "u16" },
    flags: { offset: 2, type: "u8" },
    reserved0: { offset: 3, type: "u8" },
    reserved1: { offset: 4, type: "u32" },
  },
} as const satisfies Layout;

/** Start of each element of a batch; buffer address and zone LBA (u64 each) may follow. */
export const UBLK_ELEM_HEADER = {
  name: "ublk_elem_header",
  size: 8,
  fields: {
    tag: { offset: 0, type: "u16" },
    buf_index: { offset: 2, type: "u16" },
    result: { offset: 4, type: "s32" },
  },
} as const satisfies Layout;

/** Payload of the batch commands. */
export const UBLK_BATCH_IO = {
  name: "ublk_batch_io",
  size: 16,
  fields: {
    q_id: { offset: 0, type: "u16" },
    flags: { offset: 2, type: "u16" },
    nr_elem: { offset: 4, type: "u16" },
    elem_bytes: { offset: 6, type: "u8" },
    reserved: { offset: 7, type: "u8" },
    reserved2: { offset: 8, type: "u64" },
  },
} as const satisfies Layout;

export const UBLK_PARAM_BASIC = {
  name: "ublk_param_basic",
  size: 32,
  fields: {
    attrs: { offset: 0, type: "u32" },
    logical_bs_shift: { offset: 4, type: "u8" },
    physical_bs_shift: { offset: 5, type: "u8" },
    io_opt_shift: { offset: 6, type: "u8" },
    io_min_shift: { offset: 7, type: "u8" },
    max_sectors: { offset: 8, type: "u32" },
    chunk_sectors: { offset: 12, type: "u32" },
    dev_sectors: { offset: 16, type: "u64" },
    virt_boundary_mask: { offset: 24, type: "u64" },
  },
} as const satisfies Layout;

export const UBLK_PARAM_DISCARD = {
  name: "ublk_param_discard",
  size: 20,
  fields: {
    discard_alignment: { offset: 0, type: "u32" },
    discard_granularity: { offset: 4, type: "u32" },
    max_discard_sectors: { offset: 8, type: "u32" },
    max_write_zeroes_sectors: { offset: 12, type: "u32" },
    max_discard_segments: { offset: 16, type: "u16" },
    reserved0: { offset: 18, type: "u16" },
  },
} as const satisfies Layout;

/** Read only: SET_PARAMS refuses it. The disk numbers exist after START_DEV. */
export const UBLK_PARAM_DEVT = {
  name: "ublk_param_devt",
  size: 16,
  fields: {
    char_major: { offset: 0, type: "u32" },
    char_minor: { offset: 4, type: "u32" },
    disk_major: { offset: 8, type: "u32" },
    disk_minor: { offset: 12, type: "u32" },
  },
} as const satisfies Layout;

export const UBLK_PARAM_ZONED = {
  name: "ublk_param_zoned",
  size: 32,
  fields: {
    max_open_zones: { offset: 0, type: "u32" },
    max_active_zones: { offset: 4, type: "u32" },
    max_zone_append_sectors: { offset: 8, type: "u32" },
    reserved: { offset: 12, type: "u8", count: 20 },
  },
} as const satisfies Layout;

export const UBLK_PARAM_DMA_ALIGN = {
  name: "ublk_param_dma_align",
  size: 8,
  fields: {
    alignment: { offset: 0, type: "u32" }, // a mask: 511 asks for 512 bytes
    pad: { offset: 4, type: "u8", count: 4 },
  },
} as const satisfies Layout;

export const UBLK_PARAM_SEGMENT = {
  name: "ublk_param_segment",
  size: 16,
  fields: {
    seg_boundary_mask: { offset: 0, type: "u64" },
    max_segment_size: { offset: 8, type: "u32" },
    max_segments: { offset: 12, type: "u16" },
    pad: { offset: 14, type: "u8", count: 2 },
  },
} as const satisfies Layout;

export const UBLK_PARAM_INTEGRITY = {
  name: "ublk_param_integrity",
  size: 16,
  fields: {
    flags: { offset: 0, type: "u32" },
    max_integrity_segments: { offset: 4, type: "u16" },
    interval_exp: { offset: 6, type: "u8" },
    metadata_size: { offset: 7, type: "u8" },
    pi_offset: { offset: 8, type: "u8" },
    csum_type: { offset: 9, type: "u8" },
    tag_size: { offset: 10, type: "u8" },
    pad: { offset: 11, type: "u8", count: 5 },
  },
} as const satisfies Layout;

/** SET_PARAMS and GET_PARAMS. `len` must be set for both; a shorter `len` hides the later parts. */
export const UBLK_PARAMS = {
  name: "ublk_params",
  size: 152,
  fields: {
    len: { offset: 0, type: "u32" },
    types: { offset: 4, type: "u32" },
    basic: { offset: 8, struct: UBLK_PARAM_BASIC },
    discard: { offset: 40, struct: UBLK_PARAM_DISCARD },
    devt: { offset: 60, struct: UBLK_PARAM_DEVT },
    zoned: { offset: 76, struct: UBLK_PARAM_ZONED },
    dma: { offset: 108, struct: UBLK_PARAM_DMA_ALIGN },
    seg: { offset: 120, struct: UBLK_PARAM_SEGMENT },
    integrity: { offset: 136, struct: UBLK_PARAM_INTEGRITY },
  },
} as const satisfies Layout;
