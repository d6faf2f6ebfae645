// SPDX-License-Identifier: MIT
/**
 * The part of io_uring and of file io that this project uses, by the kernel's names.
 *
 * The shim drives the ring; TypeScript needs these to describe target SQEs (opcode, flags), to
 * read probe results and messages, and to compare struct offsets with the shim's. Facts from
 * `linux/io_uring.h`, `linux/falloc.h` and `linux/fs.h` of Linux 7.2 (Debian's linux-libc-dev
 * 7.2.13-1), checked by a compiler (tests/unit/abi_header_test.ts). Not complete, on purpose.
 */
import type { Layout } from "./struct.ts";

// io_uring_setup flags, with the kernel each came with.
export const IORING_SETUP_SQPOLL = 1 << 1;
export const IORING_SETUP_CQSIZE = 1 << 3; // 5.5
export const IORING_SETUP_CLAMP = 1 << 4; // 5.6
export const IORING_SETUP_SUBMIT_ALL = 1 << 7; // 5.18
export const IORING_SETUP_COOP_TASKRUN = 1 << 8; // 5.19
export const IORING_SETUP_TASKRUN_FLAG = 1 << 9; // 5.19
export const IORING_SETUP_SQE128 = 1 << 10; // 5.19
export const IORING_SETUP_CQE32 = 1 << 11; // 5.19
export const IORING_SETUP_SINGLE_ISSUER = 1 << 12; // 6.0
export const IORING_SETUP_DEFER_TASKRUN = 1 << 13; // 6.1
export const IORING_SETUP_NO_MMAP = 1 << 14; // 6.5
export const IORING_SETUP_REGISTERED_FD_ONLY = 1 << 15; // 6.5
export const IORING_SETUP_NO_SQARRAY = 1 << 16; // 6.6

// Features in io_uring_params.
export const IORING_FEAT_SINGLE_MMAP = 1 << 0;
export const IORING_FEAT_NODROP = 1 << 1;
export const IORING_FEAT_SUBMIT_STABLE = 1 << 2;
export const IORING_FEAT_FAST_POLL = 1 << 5;
export const IORING_FEAT_EXT_ARG = 1 << 8;
export const IORING_FEAT_NATIVE_WORKERS = 1 << 9;
export const IORING_FEAT_CQE_SKIP = 1 << 11;
export const IORING_FEAT_LINKED_FILE = 1 << 12;
export const IORING_FEAT_REG_REG_RING = 1 << 13;

export const IORING_OP_NOP = 0;
export const IORING_OP_READV = 1;
export const IORING_OP_WRITEV = 2;
export const IORING_OP_FSYNC = 3;
export const IORING_OP_READ_FIXED = 4;
export const IORING_OP_WRITE_FIXED = 5;
export const IORING_OP_POLL_ADD = 6;
export const IORING_OP_POLL_REMOVE = 7;
export const IORING_OP_TIMEOUT = 11;
export const IORING_OP_ASYNC_CANCEL = 14;
export const IORING_OP_FALLOCATE = 17;
export const IORING_OP_READ = 22;
export const IORING_OP_WRITE = 23;
export const IORING_OP_SEND = 26;
export const IORING_OP_RECV = 27;
export const IORING_OP_MSG_RING = 40;
export const IORING_OP_URING_CMD = 46;

// sqe.flags
export const IOSQE_FIXED_FILE = 1 << 0;
export const IOSQE_IO_DRAIN = 1 << 1;
export const IOSQE_IO_LINK = 1 << 2;
export const IOSQE_IO_HARDLINK = 1 << 3;
export const IOSQE_ASYNC = 1 << 4;
export const IOSQE_BUFFER_SELECT = 1 << 5;
export const IOSQE_CQE_SKIP_SUCCESS = 1 << 6;

// Flags of single opcodes, and io_uring_enter's.
export const IORING_URING_CMD_FIXED = 1 << 0;
export const IORING_URING_CMD_MULTISHOT = 1 << 1;
export const IORING_FSYNC_DATASYNC = 1 << 0;
export const IORING_POLL_ADD_MULTI = 1 << 0;
export const IORING_ENTER_GETEVENTS = 1 << 0;
export const IORING_ENTER_SQ_WAKEUP = 1 << 1;
export const IORING_ENTER_SQ_WAIT = 1 << 2;
export const IORING_ENTER_EXT_ARG = 1 << 3;
export const IORING_ENTER_REGISTERED_RING = 1 << 4;

// cqe.flags, and the flag words in the rings.
export const IORING_CQE_F_BUFFER = 1 << 0;
export const IORING_CQE_F_MORE = 1 << 1;
export const IORING_CQE_F_NOTIF = 1 << 3;
export const IORING_CQE_BUFFER_SHIFT = 16;
export const IORING_SQ_NEED_WAKEUP = 1 << 0;
export const IORING_SQ_CQ_OVERFLOW = 1 << 1;
export const IORING_SQ_TASKRUN = 1 << 2;
export const IORING_CQ_EVENTFD_DISABLED = 1 << 0;

// mmap offsets of a ring's file.
export const IORING_OFF_SQ_RING = 0;
export const IORING_OFF_CQ_RING = 0x800_0000;
export const IORING_OFF_SQES = 0x1000_0000;

export const IORING_REGISTER_BUFFERS = 0;
export const IORING_REGISTER_FILES = 2;
export const IORING_REGISTER_EVENTFD = 4;
export const IORING_REGISTER_PROBE = 8;
export const IORING_REGISTER_BUFFERS2 = 15;
export const IORING_REGISTER_RING_FDS = 20;

// preadv2 and pwritev2 flags, and so sqe.rw_flags.
export const RWF_HIPRI = 0x1;
export const RWF_DSYNC = 0x2;
export const RWF_SYNC = 0x4;
export const RWF_NOWAIT = 0x8;

// fallocate modes, and so sqe.len of IORING_OP_FALLOCATE.
export const FALLOC_FL_KEEP_SIZE = 0x01;
export const FALLOC_FL_PUNCH_HOLE = 0x02; // only together with KEEP_SIZE
export const FALLOC_FL_ZERO_RANGE = 0x10;
export const FALLOC_FL_WRITE_ZEROES = 0x80; // 6.17

/**
 * A submission. The command area of a URING_CMD starts at byte 48: 16 bytes, or 80 bytes with
 * IORING_SETUP_SQE128.
 */
export const IO_URING_SQE = {
  name: "io_uring_sqe",
  size: 64,
  fields: {
    opcode: { offset: 0, type: "u8" },
    flags: { offset: 1, type: "u8" },
    ioprio: { offset: 2, type: "u16" },
    fd: { offset: 4, type: "s32" },
    off: { offset: 8, type: "u64" },
    cmd_op: { offset: 8, type: "u32" }, // union
    addr: { offset: 16, type: "u64" },
    len: { offset: 24, type: "u32" },
    rw_flags: { offset: 28, type: "u32" },
    fsync_flags: { offset: 28, type: "u32" }, // union, as are the next two
    poll32_events: { offset: 28, type: "u32" },
    uring_cmd_flags: { offset: 28, type: "u32" },
    user_data: { offset: 32, type: "u64" },
    buf_index: { offset: 40, type: "u16" },
    personality: { offset: 42, type: "u16" },
    file_index: { offset: 44, type: "u32" },
    addr3: { offset: 48, type: "u64" },
  },
} as const satisfies Layout;

/** Byte of an SQE at which the payload of IORING_OP_URING_CMD starts (`cmd`). */
export const SQE_CMD_OFFSET = 48;

/** A completion. */
export const IO_URING_CQE = {
  name: "io_uring_cqe",
  size: 16,
  fields: {
    user_data: { offset: 0, type: "u64" },
    res: { offset: 8, type: "s32" },
    flags: { offset: 12, type: "u32" },
  },
} as const satisfies Layout;

export const IO_SQRING_OFFSETS = {
  name: "io_sqring_offsets",
  size: 40,
  fields: {
    head: { offset: 0, type: "u32" },
    tail: { offset: 4, type: "u32" },
    ring_mask: { offset: 8, type: "u32" },
    ring_entries: { offset: 12, type: "u32" },
    flags: { offset: 16, type: "u32" },
    dropped: { offset: 20, type: "u32" },
    array: { offset: 24, type: "u32" },
    resv1: { offset: 28, type: "u32" },
    user_addr: { offset: 32, type: "u64" },
  },
} as const satisfies Layout;

export const IO_CQRING_OFFSETS = {
  name: "io_cqring_offsets",
  size: 40,
  fields: {
    head: { offset: 0, type: "u32" },
    tail: { offset: 4, type: "u32" },
    ring_mask: { offset: 8, type: "u32" },
    ring_entries: { offset: 12, type: "u32" },
    overflow: { offset: 16, type: "u32" },
    cqes: { offset: 20, type: "u32" },
    flags: { offset: 24, type: "u32" },
    resv1: { offset: 28, type: "u32" },
    user_addr: { offset: 32, type: "u64" },
  },
} as const satisfies Layout;

export const IO_URING_PARAMS = {
  name: "io_uring_params",
  size: 120,
  fields: {
    sq_entries: { offset: 0, type: "u32" },
    cq_entries: { offset: 4, type: "u32" },
    flags: { offset: 8, type: "u32" },
    sq_thread_cpu: { offset: 12, type: "u32" },
    sq_thread_idle: { offset: 16, type: "u32" },
    features: { offset: 20, type: "u32" },
    wq_fd: { offset: 24, type: "u32" },
    resv: { offset: 28, type: "u32", count: 3 },
    sq_off: { offset: 40, struct: IO_SQRING_OFFSETS },
    cq_off: { offset: 80, struct: IO_CQRING_OFFSETS },
  },
} as const satisfies Layout;
