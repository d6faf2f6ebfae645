// SPDX-License-Identifier: MIT
/**
 * The mainline ublk interface: every constant, by the kernel's name, and every struct.
 *
 * Facts from `linux/ublk_cmd.h` of Linux 7.2 (Debian's linux-libc-dev 7.2.13-1). Values and
 * completeness are checked against that header by a compiler (tests/unit/abi_header_test.ts).
 *
 * Types: 64-bit masks that are used with 64-bit fields (UBLK_F_*, UBLK_SHMEM_ZC_*) are bigint;
 * all other constants are numbers, unsigned. An opcode encodes its payload's size the way most
 * architectures do (`asm-generic/ioctl.h`); alpha, mips, powerpc and sparc differ.
 */
import { UBLK_BATCH_IO, UBLKSRV_CTRL_CMD, UBLKSRV_IO_CMD } from "./ublk_structs.ts";

export * from "./ublk_structs.ts";

const DIR_READ = 2;
const DIR_READ_WRITE = 3;

function encode(direction: number, nr: number, size: number): number {
  return ((direction << 30) | (size << 16) | (0x75 << 8) | nr) >>> 0; // 0x75 is 'u'
}
const controlRead = (nr: number) => encode(DIR_READ, nr, UBLKSRV_CTRL_CMD.size);
const control = (nr: number) => encode(DIR_READ_WRITE, nr, UBLKSRV_CTRL_CMD.size);
const io = (nr: number) => encode(DIR_READ_WRITE, nr, UBLKSRV_IO_CMD.size);
const batch = (nr: number) => encode(DIR_READ_WRITE, nr, UBLK_BATCH_IO.size);

/** Command number of an opcode, ioctl-encoded or legacy. */
export function commandNumber(opcode: number): number {
  return opcode & 0xff;
}

// Control commands, legacy form: the only one before Linux 6.4, a build option of later kernels.
export const UBLK_CMD_GET_QUEUE_AFFINITY = 0x01;
export const UBLK_CMD_GET_DEV_INFO = 0x02;
export const UBLK_CMD_ADD_DEV = 0x04;
export const UBLK_CMD_DEL_DEV = 0x05;
export const UBLK_CMD_START_DEV = 0x06;
export const UBLK_CMD_STOP_DEV = 0x07;
export const UBLK_CMD_SET_PARAMS = 0x08;
export const UBLK_CMD_GET_PARAMS = 0x09;
export const UBLK_CMD_START_USER_RECOVERY = 0x10;
export const UBLK_CMD_END_USER_RECOVERY = 0x11;
export const UBLK_CMD_GET_DEV_INFO2 = 0x12;

// Control commands, ioctl-encoded form. From GET_FEATURES on there is no legacy form.
export const UBLK_U_CMD_GET_QUEUE_AFFINITY = controlRead(UBLK_CMD_GET_QUEUE_AFFINITY);
export const UBLK_U_CMD_GET_DEV_INFO = controlRead(UBLK_CMD_GET_DEV_INFO);
export const UBLK_U_CMD_ADD_DEV = control(UBLK_CMD_ADD_DEV);
export const UBLK_U_CMD_DEL_DEV = control(UBLK_CMD_DEL_DEV);
export const UBLK_U_CMD_START_DEV = control(UBLK_CMD_START_DEV);
export const UBLK_U_CMD_STOP_DEV = control(UBLK_CMD_STOP_DEV);
export const UBLK_U_CMD_SET_PARAMS = control(UBLK_CMD_SET_PARAMS);
export const UBLK_U_CMD_GET_PARAMS = controlRead(UBLK_CMD_GET_PARAMS);
export const UBLK_U_CMD_START_USER_RECOVERY = control(UBLK_CMD_START_USER_RECOVERY);
export const UBLK_U_CMD_END_USER_RECOVERY = control(UBLK_CMD_END_USER_RECOVERY);
export const UBLK_U_CMD_GET_DEV_INFO2 = controlRead(UBLK_CMD_GET_DEV_INFO2);
export const UBLK_U_CMD_GET_FEATURES = controlRead(0x13);
export const UBLK_U_CMD_DEL_DEV_ASYNC = controlRead(0x14);
export const UBLK_U_CMD_UPDATE_SIZE = control(0x15);
export const UBLK_U_CMD_QUIESCE_DEV = control(0x16);
export const UBLK_U_CMD_TRY_STOP_DEV = control(0x17);
export const UBLK_U_CMD_REG_BUF = control(0x18);
export const UBLK_U_CMD_UNREG_BUF = control(0x19);

export const UBLK_SHMEM_BUF_READ_ONLY = 1 << 0;
export const UBLK_FEATURES_LEN = 8; // bytes GET_FEATURES writes

// Io commands, legacy form, then ioctl-encoded.
export const UBLK_IO_FETCH_REQ = 0x20;
export const UBLK_IO_COMMIT_AND_FETCH_REQ = 0x21;
export const UBLK_IO_NEED_GET_DATA = 0x22;
export const UBLK_U_IO_FETCH_REQ = io(UBLK_IO_FETCH_REQ);
export const UBLK_U_IO_COMMIT_AND_FETCH_REQ = io(UBLK_IO_COMMIT_AND_FETCH_REQ);
export const UBLK_U_IO_NEED_GET_DATA = io(UBLK_IO_NEED_GET_DATA);
export const UBLK_U_IO_REGISTER_IO_BUF = io(0x23);
export const UBLK_U_IO_UNREGISTER_IO_BUF = io(0x24);
export const UBLK_U_IO_PREP_IO_CMDS = batch(0x25);
export const UBLK_U_IO_COMMIT_IO_CMDS = batch(0x26);
export const UBLK_U_IO_FETCH_IO_CMDS = batch(0x27); // needs IORING_URING_CMD_MULTISHOT

// Results of a FETCH. ABORT (-ENODEV) means: do not fetch this tag again.
export const UBLK_IO_RES_OK = 0;
export const UBLK_IO_RES_NEED_GET_DATA = 1;
export const UBLK_IO_RES_ABORT = -19;

// File offsets of /dev/ublkcN: descriptors to mmap, request data for pread and pwrite.
export const UBLKSRV_CMD_BUF_OFFSET = 0;
export const UBLKSRV_IO_BUF_OFFSET = 0x8000_0000;
export const UBLK_MAX_QUEUE_DEPTH = 4096;

// Bit fields of a request's data offset (added to UBLKSRV_IO_BUF_OFFSET): queue, tag, byte.
export const UBLK_IO_BUF_OFF = 0;
export const UBLK_IO_BUF_BITS = 25; // so at most 32 MiB for each request
export const UBLK_IO_BUF_BITS_MASK = 2 ** UBLK_IO_BUF_BITS - 1;
export const UBLK_TAG_OFF = UBLK_IO_BUF_BITS;
export const UBLK_TAG_BITS = 16;
export const UBLK_TAG_BITS_MASK = 2 ** UBLK_TAG_BITS - 1;
export const UBLK_QID_OFF = UBLK_TAG_OFF + UBLK_TAG_BITS;
export const UBLK_QID_BITS = 12;
export const UBLK_QID_BITS_MASK = 2 ** UBLK_QID_BITS - 1;
export const UBLK_MAX_NR_QUEUES = 2 ** UBLK_QID_BITS;
export const UBLKSRV_IO_BUF_TOTAL_BITS = UBLK_QID_OFF + UBLK_QID_BITS;
export const UBLKSRV_IO_BUF_TOTAL_SIZE = 1n << BigInt(UBLKSRV_IO_BUF_TOTAL_BITS);
export const UBLK_INTEGRITY_FLAG_OFF = 62;
export const UBLKSRV_IO_INTEGRITY_FLAG = 1n << BigInt(UBLK_INTEGRITY_FLAG_OFF);

// Features, for ADD_DEV's flags and GET_FEATURES.
export const UBLK_F_SUPPORT_ZERO_COPY = 1n << 0n;
export const UBLK_F_URING_CMD_COMP_IN_TASK = 1n << 1n;
export const UBLK_F_NEED_GET_DATA = 1n << 2n;
export const UBLK_F_USER_RECOVERY = 1n << 3n;
export const UBLK_F_USER_RECOVERY_REISSUE = 1n << 4n;
export const UBLK_F_UNPRIVILEGED_DEV = 1n << 5n;
export const UBLK_F_CMD_IOCTL_ENCODE = 1n << 6n;
export const UBLK_F_USER_COPY = 1n << 7n;
export const UBLK_F_ZONED = 1n << 8n;
export const UBLK_F_USER_RECOVERY_FAIL_IO = 1n << 9n;
export const UBLK_F_UPDATE_SIZE = 1n << 10n;
export const UBLK_F_AUTO_BUF_REG = 1n << 11n;
export const UBLK_F_QUIESCE = 1n << 12n;
export const UBLK_F_PER_IO_DAEMON = 1n << 13n;
export const UBLK_F_BUF_REG_OFF_DAEMON = 1n << 14n;
export const UBLK_F_BATCH_IO = 1n << 15n;
export const UBLK_F_INTEGRITY = 1n << 16n;
export const UBLK_F_SAFE_STOP_DEV = 1n << 17n;
export const UBLK_F_NO_AUTO_PART_SCAN = 1n << 18n;
export const UBLK_F_SHMEM_ZC = 1n << 19n;

// Device states.
export const UBLK_S_DEV_DEAD = 0;
export const UBLK_S_DEV_LIVE = 1;
export const UBLK_S_DEV_QUIESCED = 2;
export const UBLK_S_DEV_FAIL_IO = 3;

// Operations: the low 8 bits of a descriptor's op_flags.
export const UBLK_IO_OP_READ = 0;
export const UBLK_IO_OP_WRITE = 1;
export const UBLK_IO_OP_FLUSH = 2;
export const UBLK_IO_OP_DISCARD = 3;
export const UBLK_IO_OP_WRITE_SAME = 4;
export const UBLK_IO_OP_WRITE_ZEROES = 5;
export const UBLK_IO_OP_ZONE_OPEN = 10;
export const UBLK_IO_OP_ZONE_CLOSE = 11;
export const UBLK_IO_OP_ZONE_FINISH = 12;
export const UBLK_IO_OP_ZONE_APPEND = 13;
export const UBLK_IO_OP_ZONE_RESET_ALL = 14;
export const UBLK_IO_OP_ZONE_RESET = 15;
export const UBLK_IO_OP_REPORT_ZONES = 18;

// Flags of the same word, in place: test them on op_flags itself, not on op_flags >> 8.
export const UBLK_IO_F_FAILFAST_DEV = 1 << 8;
export const UBLK_IO_F_FAILFAST_TRANSPORT = 1 << 9;
export const UBLK_IO_F_FAILFAST_DRIVER = 1 << 10;
export const UBLK_IO_F_META = 1 << 11;
export const UBLK_IO_F_FUA = 1 << 13;
export const UBLK_IO_F_NOUNMAP = 1 << 15;
export const UBLK_IO_F_SWAP = 1 << 16;
export const UBLK_IO_F_NEED_REG_BUF = 1 << 17;
export const UBLK_IO_F_INTEGRITY = 1 << 18;
export const UBLK_IO_F_SHMEM_ZC = 1 << 19;

export const UBLK_AUTO_BUF_REG_FALLBACK = 1 << 0;
export const UBLK_AUTO_BUF_REG_F_MASK = UBLK_AUTO_BUF_REG_FALLBACK;

export const UBLK_BATCH_F_HAS_ZONE_LBA = 1 << 0;
export const UBLK_BATCH_F_HAS_BUF_ADDR = 1 << 1;
export const UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK = 1 << 2;

export const UBLK_ATTR_READ_ONLY = 1 << 0;
export const UBLK_ATTR_ROTATIONAL = 1 << 1;
export const UBLK_ATTR_VOLATILE_CACHE = 1 << 2;
export const UBLK_ATTR_FUA = 1 << 3; // ignored without UBLK_ATTR_VOLATILE_CACHE

export const UBLK_PARAM_TYPE_BASIC = 1 << 0;
export const UBLK_PARAM_TYPE_DISCARD = 1 << 1;
export const UBLK_PARAM_TYPE_DEVT = 1 << 2;
export const UBLK_PARAM_TYPE_ZONED = 1 << 3;
export const UBLK_PARAM_TYPE_DMA_ALIGN = 1 << 4;
export const UBLK_PARAM_TYPE_SEGMENT = 1 << 5;
export const UBLK_PARAM_TYPE_INTEGRITY = 1 << 6;
export const UBLK_MIN_SEGMENT_SIZE = 4096;

// A descriptor's addr under UBLK_IO_F_SHMEM_ZC: buffer index and byte offset in it.
export const UBLK_SHMEM_ZC_OFF_MASK = 0xffff_ffffn;
export const UBLK_SHMEM_ZC_IDX_OFF = 32;
export const UBLK_SHMEM_ZC_IDX_MASK = 0xffffn;

/** Feature bit → its name without `UBLK_F_`, lowest bit first. */
export const FEATURE_NAMES: ReadonlyMap<bigint, string> = new Map([
  [UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY"],
  [UBLK_F_URING_CMD_COMP_IN_TASK, "URING_CMD_COMP_IN_TASK"],
  [UBLK_F_NEED_GET_DATA, "NEED_GET_DATA"],
  [UBLK_F_USER_RECOVERY, "USER_RECOVERY"],
  [UBLK_F_USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE"],
  [UBLK_F_UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV"],
  [UBLK_F_CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE"],
  [UBLK_F_USER_COPY, "USER_COPY"],
  [UBLK_F_ZONED, "ZONED"],
  [UBLK_F_USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO"],
  [UBLK_F_UPDATE_SIZE, "UPDATE_SIZE"],
  [UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG"],
  [UBLK_F_QUIESCE, "QUIESCE"],
  [UBLK_F_PER_IO_DAEMON, "PER_IO_DAEMON"],
  [UBLK_F_BUF_REG_OFF_DAEMON, "BUF_REG_OFF_DAEMON"],
  [UBLK_F_BATCH_IO, "BATCH_IO"],
  [UBLK_F_INTEGRITY, "INTEGRITY"],
  [UBLK_F_SAFE_STOP_DEV, "SAFE_STOP_DEV"],
  [UBLK_F_NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN"],
  [UBLK_F_SHMEM_ZC, "SHMEM_ZC"],
]);

/**
 * Feature bit → first mainline kernel that can do it, for messages only: distributions back-port
 * and build options remove, so ask GET_FEATURES (Linux 6.5) what a kernel has. The zero-copy bit
 * is older than the feature.
 */
export const FEATURE_KERNEL: ReadonlyMap<bigint, string> = new Map([
  [UBLK_F_SUPPORT_ZERO_COPY, "6.15"],
  [UBLK_F_URING_CMD_COMP_IN_TASK, "6.0"],
  [UBLK_F_NEED_GET_DATA, "6.0"],
  [UBLK_F_USER_RECOVERY, "6.1"],
  [UBLK_F_USER_RECOVERY_REISSUE, "6.1"],
  [UBLK_F_UNPRIVILEGED_DEV, "6.3"],
  [UBLK_F_CMD_IOCTL_ENCODE, "6.4"],
  [UBLK_F_USER_COPY, "6.5"],
  [UBLK_F_ZONED, "6.6"],
  [UBLK_F_USER_RECOVERY_FAIL_IO, "6.13"],
  [UBLK_F_UPDATE_SIZE, "6.16"],
  [UBLK_F_AUTO_BUF_REG, "6.16"],
  [UBLK_F_QUIESCE, "6.16"],
  [UBLK_F_PER_IO_DAEMON, "6.16"],
  [UBLK_F_BUF_REG_OFF_DAEMON, "6.17"],
  [UBLK_F_BATCH_IO, "7.0"],
  [UBLK_F_INTEGRITY, "7.0"],
  [UBLK_F_SAFE_STOP_DEV, "7.0"],
  [UBLK_F_NO_AUTO_PART_SCAN, "7.0"],
  [UBLK_F_SHMEM_ZC, "7.1"],
]);

export const STATE_NAMES: ReadonlyMap<number, string> = new Map([
  [UBLK_S_DEV_DEAD, "DEAD"],
  [UBLK_S_DEV_LIVE, "LIVE"],
  [UBLK_S_DEV_QUIESCED, "QUIESCED"],
  [UBLK_S_DEV_FAIL_IO, "FAIL_IO"],
]);

export const OP_NAMES: ReadonlyMap<number, string> = new Map([
  [UBLK_IO_OP_READ, "READ"],
  [UBLK_IO_OP_WRITE, "WRITE"],
  [UBLK_IO_OP_FLUSH, "FLUSH"],
  [UBLK_IO_OP_DISCARD, "DISCARD"],
  [UBLK_IO_OP_WRITE_SAME, "WRITE_SAME"],
  [UBLK_IO_OP_WRITE_ZEROES, "WRITE_ZEROES"],
  [UBLK_IO_OP_ZONE_OPEN, "ZONE_OPEN"],
  [UBLK_IO_OP_ZONE_CLOSE, "ZONE_CLOSE"],
  [UBLK_IO_OP_ZONE_FINISH, "ZONE_FINISH"],
  [UBLK_IO_OP_ZONE_APPEND, "ZONE_APPEND"],
  [UBLK_IO_OP_ZONE_RESET_ALL, "ZONE_RESET_ALL"],
  [UBLK_IO_OP_ZONE_RESET, "ZONE_RESET"],
  [UBLK_IO_OP_REPORT_ZONES, "REPORT_ZONES"],
]);

/** Control and io command name → both opcodes; `legacy` is absent where the header has none. */
export const COMMANDS = {
  GET_QUEUE_AFFINITY: {
    encoded: UBLK_U_CMD_GET_QUEUE_AFFINITY,
    legacy: UBLK_CMD_GET_QUEUE_AFFINITY,
  },
  GET_DEV_INFO: { encoded: UBLK_U_CMD_GET_DEV_INFO, legacy: UBLK_CMD_GET_DEV_INFO },
  ADD_DEV: { encoded: UBLK_U_CMD_ADD_DEV, legacy: UBLK_CMD_ADD_DEV },
  DEL_DEV: { encoded: UBLK_U_CMD_DEL_DEV, legacy: UBLK_CMD_DEL_DEV },
  START_DEV: { encoded: UBLK_U_CMD_START_DEV, legacy: UBLK_CMD_START_DEV },
  STOP_DEV: { encoded: UBLK_U_CMD_STOP_DEV, legacy: UBLK_CMD_STOP_DEV },
  SET_PARAMS: { encoded: UBLK_U_CMD_SET_PARAMS, legacy: UBLK_CMD_SET_PARAMS },
  GET_PARAMS: { encoded: UBLK_U_CMD_GET_PARAMS, legacy: UBLK_CMD_GET_PARAMS },
  START_USER_RECOVERY: {
    encoded: UBLK_U_CMD_START_USER_RECOVERY,
    legacy: UBLK_CMD_START_USER_RECOVERY,
  },
  END_USER_RECOVERY: { encoded: UBLK_U_CMD_END_USER_RECOVERY, legacy: UBLK_CMD_END_USER_RECOVERY },
  GET_DEV_INFO2: { encoded: UBLK_U_CMD_GET_DEV_INFO2, legacy: UBLK_CMD_GET_DEV_INFO2 },
  GET_FEATURES: { encoded: UBLK_U_CMD_GET_FEATURES },
  DEL_DEV_ASYNC: { encoded: UBLK_U_CMD_DEL_DEV_ASYNC },
  UPDATE_SIZE: { encoded: UBLK_U_CMD_UPDATE_SIZE },
  QUIESCE_DEV: { encoded: UBLK_U_CMD_QUIESCE_DEV },
  TRY_STOP_DEV: { encoded: UBLK_U_CMD_TRY_STOP_DEV },
  REG_BUF: { encoded: UBLK_U_CMD_REG_BUF },
  UNREG_BUF: { encoded: UBLK_U_CMD_UNREG_BUF },
} as const;

export const IO_COMMANDS = {
  FETCH_REQ: { encoded: UBLK_U_IO_FETCH_REQ, legacy: UBLK_IO_FETCH_REQ },
  COMMIT_AND_FETCH_REQ: {
    encoded: UBLK_U_IO_COMMIT_AND_FETCH_REQ,
    legacy: UBLK_IO_COMMIT_AND_FETCH_REQ,
  },
  NEED_GET_DATA: { encoded: UBLK_U_IO_NEED_GET_DATA, legacy: UBLK_IO_NEED_GET_DATA },
  REGISTER_IO_BUF: { encoded: UBLK_U_IO_REGISTER_IO_BUF },
  UNREGISTER_IO_BUF: { encoded: UBLK_U_IO_UNREGISTER_IO_BUF },
  PREP_IO_CMDS: { encoded: UBLK_U_IO_PREP_IO_CMDS },
  COMMIT_IO_CMDS: { encoded: UBLK_U_IO_COMMIT_IO_CMDS },
  FETCH_IO_CMDS: { encoded: UBLK_U_IO_FETCH_IO_CMDS },
} as const;

/** Command number → name, control and io commands: `COMMAND_NAMES.get(0x04)` is `ADD_DEV`. */
export const COMMAND_NAMES: ReadonlyMap<number, string> = new Map(
  Object.entries({ ...COMMANDS, ...IO_COMMANDS }).map((
    [name, { encoded }],
  ) => [commandNumber(encoded), name]),
);
