// SPDX-License-Identifier: MIT
//! The kernel's and liburing's structs as this library reads and writes them, every size and
//! offset asserted at compile time. `table` hands the same numbers to TypeScript, where a test
//! compares them with abi/ and with the headers of Debian's linux-libc-dev.
//! Sources: linux/io_uring.h, linux/ublk_cmd.h (Linux 7.2), liburing.h (2.2 or later).

const std = @import("std");

pub const Sqe = extern struct {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    /// File offset; an io_uring command keeps its cmd_op in the low 32 bits.
    off: u64,
    addr: u64,
    len: u32,
    /// rw_flags, fsync_flags, poll32_events: one u32 whose meaning the opcode decides.
    op_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    file_index: i32,
    /// A 64-byte SQE carries 16 bytes of command; a 128-byte SQE goes on for 64 more.
    cmd: [16]u8,
};

pub const Cqe = extern struct { user_data: u64, res: i32, flags: u32 };

/// struct ublksrv_ctrl_cmd, and the V2 dialect's ubdsrv_ctrl_cmd (there dev_path_len,
/// pad and reserved are the second u64 of inline data, always zero).
pub const CtrlCmd = extern struct {
    dev_id: u32,
    queue_id: u16,
    len: u16,
    addr: u64,
    data: u64,
    dev_path_len: u16,
    pad: u16,
    reserved: u32,
};

/// struct ublksrv_io_cmd, the same in both dialects.
pub const IoCmd = extern struct { q_id: u16, tag: u16, result: i32, addr: u64 };

/// struct ublk_batch_io: the command of a batch.
pub const BatchIo = extern struct { q_id: u16, flags: u16, nr_elem: u16, elem_bytes: u8, reserved: u8, reserved2: u64 };

/// struct ublk_elem_header, and what follows it under UBLK_BATCH_F_HAS_BUF_ADDR.
pub const Element = extern struct { tag: u16, buf_index: u16, result: i32, buf_addr: u64 };

/// struct io_uring_buf, and the tail that struct io_uring_buf_ring has in the first one.
pub const Buffer = extern struct { addr: u64, len: u32, bid: u16, tail: u16 };

/// struct io_uring_buf_reg.
pub const BufferRing = extern struct { ring_addr: u64, ring_entries: u32, bgid: u16, flags: u16, resv: [3]u64 };

/// struct ublksrv_io_desc, the same in both dialects.
pub const IoDesc = extern struct { op_flags: u32, nr_sectors: u32, start_sector: u64, addr: u64 };

pub const RingSq = extern struct {
    khead: *u32,
    ktail: *u32,
    kring_mask: ?*u32,
    kring_entries: ?*u32,
    kflags: *u32,
    kdropped: ?*u32,
    array: ?*u32,
    sqes: [*]u8,
    sqe_head: u32,
    sqe_tail: u32,
    ring_sz: usize,
    ring_ptr: ?*anyopaque,
    ring_mask: u32,
    ring_entries: u32,
    pad: [2]u32,
};

pub const RingCq = extern struct {
    khead: *u32,
    ktail: *u32,
    kring_mask: ?*u32,
    kring_entries: ?*u32,
    kflags: ?*u32,
    koverflow: ?*u32,
    cqes: [*]Cqe,
    ring_sz: usize,
    ring_ptr: ?*anyopaque,
    ring_mask: u32,
    ring_entries: u32,
    pad: [2]u32,
};

pub const Ring = extern struct {
    sq: RingSq,
    cq: RingCq,
    flags: u32,
    ring_fd: i32,
    features: u32,
    enter_ring_fd: i32,
    int_flags: u8,
    pad: [3]u8,
    pad2: u32,
};

/// struct io_uring_params; the two offset blocks are the kernel's answer, read by liburing only.
pub const Params = extern struct {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [3]u32,
    sq_off: [40]u8,
    cq_off: [40]u8,
};

/// What core/queue.ts writes for each SQE it wants: 32 bytes, views in ffi/mod.ts.
pub const Command = extern struct {
    tag: u16,
    op: u16,
    /// COMMIT_AND_FETCH: the request's result; file operations: the file descriptor.
    value: i32,
    /// rw_flags, fsync_flags or the fallocate mode.
    flags: u32,
    /// READ and WRITE: where in the tag's buffer.
    buffer_offset: u32,
    /// READ, WRITE, WRITE_ZEROES and FALLOCATE: in bytes, as is `offset`.
    length: f64,
    offset: f64,
};

/// What core/queue.ts reads for each CQE: 8 bytes.
pub const Event = extern struct { tag: u16, kind: u16, result: i32 };

/// How a queue is to be set up: 64 bytes, written by ffi/mod.ts.
pub const QueueConfig = extern struct {
    /// -1: no driver; io descriptors are plain memory.
    char_fd: i32,
    wake_fd: i32,
    queue_id: u32,
    depth: u32,
    io_bytes_max: u32,
    /// 0: no driver; io commands become NOPs.
    fetch_op: u32,
    commit_op: u32,
    sqe128: u32,
    desc_bytes: u32,
    data_mode: u32,
    desc_offset: f64,
    register_op: u32,
    unregister_op: u32,
    get_data_op: u32,
    /// Not 0: io commands go in batches, and fetch_op and commit_op are those of batches too.
    prep_op: u32,
};

/// One control command: 40 bytes, written by ffi/mod.ts.
pub const ControlRequest = extern struct {
    control_fd: i32,
    opcode: u32,
    device_id: u32,
    queue_id: u32,
    /// Which of the ring's payload areas the command may read and write.
    payload: u32,
    payload_len: u32,
    dev_path_len: u32,
    /// Nonzero: it is given by a process of its own.
    apart: u32,
    data: u64,
};

fn check(comptime T: type, comptime size: usize, comptime offsets: anytype) void {
    if (@sizeOf(T) != size) @compileError(@typeName(T) ++ ": size differs from the kernel's");
    @setEvalBranchQuota(20_000);
    // std.meta, because the shape of @typeInfo changed in Zig 0.17.
    for (std.meta.fieldNames(@TypeOf(offsets))) |name| {
        if (@offsetOf(T, name) != @field(offsets, name)) {
            @compileError(@typeName(T) ++ "." ++ name ++ ": offset differs");
        }
    }
}

comptime {
    check(Sqe, 64, .{ .opcode = 0, .flags = 1, .ioprio = 2, .fd = 4, .off = 8, .addr = 16, .len = 24, .op_flags = 28, .user_data = 32, .buf_index = 40, .personality = 42, .file_index = 44, .cmd = 48 });
    check(Cqe, 16, .{ .user_data = 0, .res = 8, .flags = 12 });
    check(CtrlCmd, 32, .{ .dev_id = 0, .queue_id = 4, .len = 6, .addr = 8, .data = 16, .dev_path_len = 24, .pad = 26, .reserved = 28 });
    check(IoCmd, 16, .{ .q_id = 0, .tag = 2, .result = 4, .addr = 8 });
    check(IoDesc, 24, .{ .op_flags = 0, .nr_sectors = 4, .start_sector = 8, .addr = 16 });
    check(BatchIo, 16, .{ .q_id = 0, .flags = 2, .nr_elem = 4, .elem_bytes = 6, .reserved = 7, .reserved2 = 8 });
    check(Element, 16, .{ .tag = 0, .buf_index = 2, .result = 4, .buf_addr = 8 });
    check(Buffer, 16, .{ .addr = 0, .len = 8, .bid = 12, .tail = 14 });
    check(BufferRing, 40, .{ .ring_addr = 0, .ring_entries = 8, .bgid = 12, .flags = 14, .resv = 16 });
    check(RingSq, 104, .{ .khead = 0, .ktail = 8, .kring_mask = 16, .kring_entries = 24, .kflags = 32, .kdropped = 40, .array = 48, .sqes = 56, .sqe_head = 64, .sqe_tail = 68, .ring_sz = 72, .ring_ptr = 80, .ring_mask = 88, .ring_entries = 92, .pad = 96 });
    check(RingCq, 88, .{ .khead = 0, .ktail = 8, .kring_mask = 16, .kring_entries = 24, .kflags = 32, .koverflow = 40, .cqes = 48, .ring_sz = 56, .ring_ptr = 64, .ring_mask = 72, .ring_entries = 76, .pad = 80 });
    check(Ring, 216, .{ .sq = 0, .cq = 104, .flags = 192, .ring_fd = 196, .features = 200, .enter_ring_fd = 204, .int_flags = 208, .pad = 209, .pad2 = 212 });
    check(Params, 120, .{ .sq_entries = 0, .cq_entries = 4, .flags = 8, .sq_thread_cpu = 12, .sq_thread_idle = 16, .features = 20, .wq_fd = 24, .resv = 28, .sq_off = 40, .cq_off = 80 });
    check(Command, 32, .{ .tag = 0, .op = 2, .value = 4, .flags = 8, .buffer_offset = 12, .length = 16, .offset = 24 });
    check(Event, 8, .{ .tag = 0, .kind = 2, .result = 4 });
    check(QueueConfig, 64, .{ .char_fd = 0, .wake_fd = 4, .queue_id = 8, .depth = 12, .io_bytes_max = 16, .fetch_op = 20, .commit_op = 24, .sqe128 = 28, .desc_bytes = 32, .data_mode = 36, .desc_offset = 40, .register_op = 48, .unregister_op = 52, .get_data_op = 56, .prep_op = 60 });
    check(ControlRequest, 40, .{ .control_fd = 0, .opcode = 4, .device_id = 8, .queue_id = 12, .payload = 16, .payload_len = 20, .dev_path_len = 24, .apart = 28, .data = 32 });
}

fn describe(comptime T: type, comptime name: []const u8) []const u8 {
    @setEvalBranchQuota(20_000);
    comptime var text: []const u8 = decimalLine(name, @sizeOf(T));
    inline for (comptime std.meta.fieldNames(T)) |field| {
        text = text ++ decimalLine(name ++ "." ++ field, @offsetOf(T, field));
    }
    return text;
}

fn decimalLine(comptime name: []const u8, comptime value: usize) []const u8 {
    comptime var digits: []const u8 = "";
    comptime var rest = value;
    inline while (true) {
        digits = &[_]u8{'0' + rest % 10} ++ digits;
        rest /= 10;
        if (rest == 0) break;
    }
    return name ++ " " ++ digits ++ "\n";
}

/// Lines "struct SIZE" and "struct.field OFFSET" for every struct shared with the kernel.
pub const table: []const u8 = describe(Sqe, "io_uring_sqe") ++
    describe(Cqe, "io_uring_cqe") ++
    describe(Params, "io_uring_params") ++
    describe(CtrlCmd, "ublksrv_ctrl_cmd") ++
    describe(IoCmd, "ublksrv_io_cmd") ++
    describe(IoDesc, "ublksrv_io_desc") ++
    describe(BatchIo, "ublk_batch_io");
