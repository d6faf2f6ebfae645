// SPDX-License-Identifier: MIT
//! The rings. A queue's ring carries io commands (FETCH, COMMIT_AND_FETCH) on /dev/ublkcN and
//! the file operations of its target; the control ring carries control commands. liburing sets
//! rings up; this file fills SQEs, enters the kernel and drains CQEs.
//!
//! Invariants: a tag has at most one SQE in flight, so a queue never has more than depth + 1
//! (the wake-up read) completions pending and its CQ cannot overflow. A queue is used by one
//! thread from init to exit (the kernel binds tags and SINGLE_ISSUER rings to it).

const std = @import("std");
const batch = @import("batch.zig");
const layout = @import("layout.zig");
const sys = @import("sys.zig");

const Ring = layout.Ring;

extern fn io_uring_queue_init_params(entries: c_uint, ring: *Ring, params: *layout.Params) c_int;
extern fn io_uring_queue_exit(ring: *Ring) void;
extern fn io_uring_register_ring_fd(ring: *Ring) c_int;
extern fn io_uring_register_eventfd(ring: *Ring, fd: c_int) c_int;
extern fn io_uring_register_files(ring: *Ring, fds: *const i32, count: c_uint) c_int;
extern fn io_uring_register_files_update(ring: *Ring, index: c_uint, fds: *const i32, count: c_uint) c_int;
extern fn io_uring_register_buffers_sparse(ring: *Ring, count: c_uint) c_int;
extern fn io_uring_register_buffers_update_tag(ring: *Ring, index: c_uint, iovecs: *const sys.IoVec, tags: *const u64, count: c_uint) c_int;

const setup_coop_taskrun: u32 = 1 << 8;
const setup_taskrun_flag: u32 = 1 << 9;
const setup_sqe128: u32 = 1 << 10;
const setup_single_issuer: u32 = 1 << 12;
const setup_defer_taskrun: u32 = 1 << 13;
const sq_taskrun: u32 = 1 << 2;
const enter_getevents: u32 = 1 << 0;
const enter_registered_ring: u32 = 1 << 4;
const cq_eventfd_disabled: u32 = 1 << 0;
/// SQEs for many tags that a step may need beside those for one: a batch of commits, the fetch.
const batch_sqes = 2;
/// IO_LOCAL_TW_DEFAULT_MAX of the kernel.
const task_work_batch = 20;

const op_nop = 0;
const op_fsync = 3;
const op_read_fixed = 4;
const op_write_fixed = 5;
const op_fallocate = 17;
const op_openat = 18;
const op_read = 22;
const op_write = 23;
const op_uring_cmd = 46;
const sqe_fixed_file = 1 << 0;
const sqe_async = 1 << 4;
const at_fdcwd: i32 = -100;
const no_file: i32 = -1;

/// Values of Command.op; ffi/mod.ts names the same ones.
pub const command_fetch = 0;
pub const command_commit = 1;
pub const command_read = 2;
pub const command_write = 3;
pub const command_fsync = 4;
pub const command_fallocate = 5;
pub const command_wake = 6;
pub const command_write_zeroes = 7;
pub const command_register = 8;
pub const command_unregister = 9;
pub const command_get_data = 10;

/// Values of QueueConfig.data_mode: the driver copies data to and from the tags' buffers; or a
/// request's own pages are the ring's buffer number `tag`, put there by command_register, or by
/// the driver with each request; or this file copies, by reading and writing the character device.
pub const data_copied = 0;
pub const data_registered = 1;
pub const data_automatic = 2;
pub const data_user = 3;
/// For tests: as data_automatic, but the driver can never register.
const data_fallback = 4;

/// UBLKSRV_IO_BUF_OFFSET, UBLK_TAG_OFF and UBLK_QID_OFF: where the character device has a tag's data.
const user_data_start = 0x8000_0000;
const user_tag_shift = 25;
const user_queue_shift = 41;

const io_op_read = 0;
const io_op_write = 1;
const sector = 512;

/// UBLK_AUTO_BUF_REG_FALLBACK where struct ublk_auto_buf_reg has its flags: a request whose pages
/// could not be registered is handed out all the same, marked.
const auto_reg_fallback = 1 << 16;

/// Values of Event.kind, and in the user data of SQEs above the tag; ffi/mod.ts names the same ones.
pub const event_request = 0;
pub const event_file = 1;
pub const event_wake = 2;
pub const event_refused = 3;

/// As those, for SQEs that are for many tags.
pub const batch_prepare = 4;
pub const batch_commit = 5;
pub const batch_fetch = 6;

pub const depth_max = 4096;
/// Operations that are counted, and what is counted of each.
const stats_ops = 32;
const stats_counts = 3;
var uncounted: [stats_ops * stats_counts]f64 = undefined;
pub const page = 4096;

pub const Queue = struct {
    ring: Ring,
    /// Of each io_uring_enter.
    enter_flags: u32,
    config: layout.QueueConfig,
    sqe_bytes: u32,
    /// What all io commands have in common.
    io_sqe: layout.Sqe,
    /// One private mapping: this struct, then commands, then events.
    mapping: usize,
    mapping_bytes: usize,
    commands: [*]layout.Command,
    events: [*]layout.Event,
    capacity: u32,
    descs: [*]volatile layout.IoDesc,
    descs_bytes: usize,
    /// 0 where the data is in the ring's registered buffers, whose addresses count from 0.
    buffers: usize,
    buffers_bytes: usize,
    /// Where each tag's data is: in `buffers`, until useBuffer. 0 without `buffers`.
    addresses: [*]usize,
    /// Counts of requests, bytes and errors for each operation, the caller's: see core/stats.ts.
    stats: [*]f64,
    /// io_bytes_max of zeroes, never written and so never more than the kernel's one zero page.
    zeroes: usize,
    /// Which of the ring's buffers the driver is told to make of tag 0's requests. 0, or behind all.
    auto_base: u16,
    /// A FETCH and a COMMIT are an SQE each, and the shim copies no data.
    plain: bool,
    /// The character device is the ring's file 0.
    registered: bool,
    /// Landing place of the wake-up read; its value has no meaning.
    wake_count: u64,
    batch: batch.State,
};

pub fn queueInit(config: *const layout.QueueConfig, stats: ?[*]f64, out: **Queue) i32 {
    if (config.depth == 0 or config.depth > depth_max) return -sys.EINVAL;
    if (config.io_bytes_max < page or config.io_bytes_max % page != 0) return -sys.EINVAL;
    if (config.desc_bytes < config.depth * @sizeOf(layout.IoDesc)) return -sys.EINVAL;
    if (config.desc_bytes % page != 0 or config.wake_fd < 0) return -sys.EINVAL;
    if (config.data_mode > data_fallback) return -sys.EINVAL;
    if ((config.data_mode == data_user or config.prep_op != 0) and config.char_fd < 0) return -sys.EINVAL;

    const capacity = config.depth + 1;
    const head = sys.roundUp(@sizeOf(Queue), 64);
    const records = capacity * (@sizeOf(layout.Command) + @sizeOf(layout.Event));
    const bytes = sys.roundUp(head + records + config.depth * @sizeOf(usize), page);
    const base = sys.mapMemory(bytes) catch return -sys.ENOMEM;
    const queue: *Queue = @ptrFromInt(base);
    queue.config = config.*;
    if (config.data_mode == data_fallback) {
        queue.config.data_mode = data_automatic;
        queue.auto_base = @intCast(config.depth);
    }
    queue.stats = stats orelse &uncounted;
    queue.mapping = base;
    queue.mapping_bytes = bytes;
    queue.capacity = capacity;
    queue.commands = @ptrFromInt(base + head);
    queue.events = @ptrFromInt(base + head + capacity * @sizeOf(layout.Command));
    queue.addresses = @ptrFromInt(base + head + records);
    queue.plain = !inBatches(queue) and config.data_mode != data_user;
    queue.sqe_bytes = if (config.sqe128 != 0) 128 else 64;

    const result = queueAcquire(queue);
    if (result < 0) {
        queueRelease(queue);
        return result;
    }
    out.* = queue;
    return 0;
}

/// On failure the caller releases what exists: zero marks what does not.
fn queueAcquire(queue: *Queue) i32 {
    const config = &queue.config;
    queue.descs_bytes = config.desc_bytes;
    const descs = if (config.char_fd < 0)
        sys.mapMemory(config.desc_bytes) catch return -sys.ENOMEM
    else
        sys.mapFile(config.char_fd, config.desc_bytes, sys.fileOffset(config.desc_offset) orelse return -sys.EINVAL) catch |e| return sys.errnoOf(e);
    queue.descs = @ptrFromInt(descs);

    const copied = hasBuffers(queue);
    if (copied or config.char_fd < 0) {
        const stride = bufferStride(config.io_bytes_max);
        queue.buffers_bytes = config.depth * stride;
        queue.buffers = sys.mapMemory(queue.buffers_bytes) catch return -sys.ENOMEM;
        for (queue.addresses[0..config.depth], 0..) |*address, tag| {
            address.* = queue.buffers + tag * stride;
        }
    }
    queue.zeroes = sys.mapMemory(config.io_bytes_max) catch return -sys.ENOMEM;

    const more_sqes: u32 = if (inBatches(queue)) batch_sqes else 0;
    var result = ringInit(queue, config.depth + more_sqes);
    if (result >= 0 and !copied) result = bufferTableInit(queue);
    // Saves the threads of all queues a shared count of references for each request.
    queue.registered = result >= 0 and config.char_fd >= 0 and io_uring_register_files(&queue.ring, &config.char_fd, 1) >= 0;
    queue.io_sqe = ioSqe(queue);
    if (result >= 0 and inBatches(queue)) result = batch.init(queue);
    return result;
}

/// What a buffer takes: an odd number of pages. At a power of two the first pages of all buffers,
/// which small requests use, would share a few places of each cache and TLB.
pub fn bufferStride(bytes: u32) usize {
    return @as(usize, sys.roundUp(bytes, page) / page | 1) * page;
}

/// Requests' data is in the tags' buffers while they are served.
fn hasBuffers(queue: *const Queue) bool {
    return queue.config.data_mode == data_copied or queue.config.data_mode == data_user;
}

/// Io commands are for many tags each.
fn inBatches(queue: *const Queue) bool {
    return queue.config.prep_op != 0;
}

/// One registered buffer for each tag, empty until there is a request. Without a driver to fill
/// it, each is the tag's own memory.
fn bufferTableInit(queue: *Queue) i32 {
    const result = io_uring_register_buffers_sparse(&queue.ring, queue.config.depth);
    if (result < 0 or queue.config.char_fd >= 0) return result;
    for (0..queue.config.depth) |tag| {
        const memory = sys.IoVec{ .base = queue.addresses[tag], .len = queue.config.io_bytes_max };
        const updated = io_uring_register_buffers_update_tag(&queue.ring, @intCast(tag), &memory, &0, 1);
        if (updated < 0) return updated;
    }
    return 0;
}

/// The kernel's cheapest way to run completions first (6.1), then what older kernels have.
fn ringInit(queue: *Queue, entries: u32) i32 {
    const ring = &queue.ring;
    const variants = [_]u32{
        setup_single_issuer | setup_defer_taskrun | setup_taskrun_flag,
        setup_coop_taskrun | setup_taskrun_flag,
        0,
    };
    var result: i32 = 0;
    for (variants) |flags| {
        var params = std.mem.zeroes(layout.Params);
        params.flags = flags | if (queue.config.sqe128 != 0) setup_sqe128 else 0;
        result = io_uring_queue_init_params(sys.powerOfTwo(entries + 1), ring, &params);
        if (result != -sys.EINVAL) break;
    }
    if (result < 0) {
        ring.ring_fd = 0;
        return result;
    }
    // Saves a file look-up on each enter; a kernel before 5.18 refuses and nothing is lost.
    const registered = io_uring_register_ring_fd(ring) > 0;
    queue.enter_flags = enter_getevents | if (registered) enter_registered_ring else 0;
    return 0;
}

fn queueRelease(queue: *Queue) void {
    // The ring ends later, and the driver waits for the last reference to the device. Not by
    // unregistering: before 6.13 that waits for the FETCHes that are still in flight.
    if (queue.registered) _ = io_uring_register_files_update(&queue.ring, 0, &no_file, 1);
    if (queue.ring.ring_fd > 0) io_uring_queue_exit(&queue.ring);
    if (queue.buffers != 0) sys.unmap(queue.buffers, queue.buffers_bytes);
    if (queue.batch.mapping != 0) sys.unmap(queue.batch.mapping, queue.batch.mapping_bytes);
    if (queue.zeroes != 0) sys.unmap(queue.zeroes, queue.config.io_bytes_max);
    if (@intFromPtr(queue.descs) != 0) sys.unmap(@intFromPtr(queue.descs), queue.descs_bytes);
    sys.unmap(queue.mapping, queue.mapping_bytes);
}

/// Somebody may still see the buffers: they stay mapped.
pub fn queueExit(queue: *Queue) void {
    queue.buffers = 0;
    queueRelease(queue);
}

/// Has the ring signal `fd` when completions may be had from a step that does not wait.
pub fn queueNotify(queue: *Queue, fd: i32) i32 {
    return io_uring_register_eventfd(&queue.ring, fd);
}

/// Gives a tag other memory, for its next request: whoever serves the last one has been given up, and
/// must not write into the next one's data.
pub fn useBuffer(queue: *Queue, tag: u32, address: usize) i32 {
    if (tag >= queue.config.depth or address == 0 or address % page != 0) return -sys.EINVAL;
    queue.addresses[tag] = address;
    return 0;
}

/// The first half of the next SQE, as it was last: the caller fills it, and has looked whether there
/// is room. Nobody reads the other half of a 128-byte one.
fn nextSqe(ring: *Ring, sqe_bytes: u32) *layout.Sqe {
    const sqe = sqeAt(ring.sq.sqes, ring.sq.ring_mask, ring.sq.sqe_tail, sqe_bytes);
    ring.sq.sqe_tail +%= 1;
    return sqe;
}

inline fn sqeAt(sqes: [*]u8, mask: u32, tail: u32, sqe_bytes: u32) *layout.Sqe {
    return @ptrCast(@alignCast(sqes + @as(usize, tail & mask) * sqe_bytes));
}

fn roomFor(ring: *Ring, count: u32) bool {
    const queued = ring.sq.sqe_tail -% @atomicLoad(u32, ring.sq.khead, .acquire);
    return count <= ring.sq.ring_entries - queued;
}

/// Packs `count` commands, enters the kernel once, and drains completions into the event array.
/// With `wait` it blocks until there is at least one; no events is a normal result (a signal,
/// or task work that completed nothing). Returns the number of events or -errno. EAGAIN: there are
/// none, but some are about to come, and nothing rings for them: come back.
pub fn step(queue: *Queue, count: u32, wait: bool) i32 {
    if (count > queue.capacity) return -sys.EINVAL;
    if (!roomFor(&queue.ring, count)) return -sys.EBUSY;
    const tail = queue.ring.sq.sqe_tail;
    const commands = queue.commands[0..count];
    const result = if (queue.plain) putPlain(queue, commands) else putAll(queue, commands);
    if (result < 0) {
        queue.ring.sq.sqe_tail = tail; // All of a step, or nothing.
        if (inBatches(queue)) batch.drop(queue);
        return result;
    }
    // It is rung for each completion, also for those that this very step looks for.
    if (!wait) ringEventfd(&queue.ring, false);
    // The completion of a batch of commits is there at once, and nothing to wait for, unless it is
    // the last: no request comes after the end.
    const commits = inBatches(queue) and batch.close(queue) and queue.batch.ended == 0;
    const entered = enter(queue, if (!wait) 0 else if (commits) 2 else 1);
    if (entered < 0) return entered;
    const events = collect(queue);
    // Whoever had commands or got events comes back before it sleeps, and need not be woken.
    if (wait or count > 0 or events != 0) return events;
    return lookAgain(queue);
}

// What few steps need is out of line: the code that all need stays in one piece, and what a system
// call has made the processor forget of it is less.

noinline fn lookAgain(queue: *Queue) i32 {
    ringEventfd(&queue.ring, true);
    _ = enterKernel(&queue.ring, 0, queue.enter_flags); // What came before that rang nothing.
    runRest(queue);
    const events = collect(queue);
    return if (events == 0 and moreToRun(&queue.ring)) -sys.EAGAIN else events;
}

/// Drains, and submits what that led to: the caller may sleep now, until there are completions.
inline fn collect(queue: *Queue) i32 {
    const events = if (inBatches(queue)) batch.drain(queue) else drain(queue);
    return if (unsent(&queue.ring)) sendMore(queue, events) else events;
}

noinline fn sendMore(queue: *Queue, events: i32) i32 {
    const answered = enter(queue, 0);
    return if (answered < 0) answered else events;
}

/// Whether the eventfd of queueNotify is rung.
fn ringEventfd(ring: *Ring, on: bool) void {
    const flags = ring.cq.kflags orelse return;
    @atomicStore(u32, flags, if (on) 0 else cq_eventfd_disabled, .seq_cst);
}

/// Waits for so many completions, unless there are some.
inline fn enter(queue: *Queue, wait: u32) i32 {
    const ready = pending(&queue.ring) > 0;
    if (ready and !unsent(&queue.ring)) return 0;
    const result = enterKernel(&queue.ring, if (ready) 0 else wait, queue.enter_flags);
    // A signal, or completions to be drained before the kernel takes more.
    if (result < 0 and result != -sys.EINTR and result != -sys.EAGAIN and result != -sys.EBUSY) {
        return result;
    }
    if (wait == 0) runRest(queue);
    return 0;
}

/// The kernel runs 20 items at a time, and rings the eventfd neither for what is left, nor for an item
/// that somebody was about to add while the one before it was run (7.2): so this goes on until the
/// flag is gone. Whoever adds an item sets the flag last. By then the item may have been run, and the
/// kernel does not clear the flag before the next one comes: so it is cleared here. The kernel finds
/// what is there without it, and sets it again if something is left.
noinline fn runRest(queue: *Queue) void {
    const ring = &queue.ring;
    var enters = queue.capacity / task_work_batch + 2;
    while (pending(ring) == 0 and moreToRun(ring) and enters > 0) {
        _ = @atomicRmw(u32, ring.sq.kflags, .And, ~sq_taskrun, .seq_cst);
        if (enterKernel(ring, 0, queue.enter_flags) < 0) break;
        enters -= 1;
    }
}

/// Submits what there is, waits for so many completions, and has the kernel run what it had put
/// off. Not liburing's functions for that: what a processor learned of the way back to the caller
/// is lost in a system call, and each frame less is a return less that it predicts wrong.
inline fn enterKernel(ring: *Ring, wait: u32, flags: u32) i32 {
    const sq = &ring.sq;
    sq.sqe_head = sq.sqe_tail;
    @atomicStore(u32, sq.ktail, sq.sqe_tail, .release);
    const queued = sq.sqe_tail -% @atomicLoad(u32, sq.khead, .acquire);
    const fd: usize = @bitCast(@as(isize, ring.enter_ring_fd));
    return sys.call(.io_uring_enter, .{ fd, queued, wait, flags, 0, 0 });
}

/// SQEs wait for the next enter.
fn unsent(ring: *const Ring) bool {
    return ring.sq.sqe_head != ring.sq.sqe_tail;
}

fn moreToRun(ring: *Ring) bool {
    return @atomicLoad(u32, ring.sq.kflags, .monotonic) & sq_taskrun != 0;
}

pub fn pending(ring: *Ring) u32 {
    return @atomicLoad(u32, ring.cq.ktail, .acquire) -% ring.cq.khead.*;
}

/// Packs commands, for which there is room.
noinline fn putAll(queue: *Queue, commands: []const layout.Command) i32 {
    for (commands) |*command| {
        const result = put(queue, command);
        if (result < 0) return result;
    }
    return 0;
}

fn put(queue: *Queue, command: *const layout.Command) i32 {
    if (command.tag >= queue.config.depth) return -sys.EINVAL;
    if (command.op <= command_commit and inBatches(queue)) {
        batch.gather(queue, command);
        return 0;
    }
    return pack(queue, command, nextSqe(&queue.ring, queue.sqe_bytes));
}

/// The same for a queue that is plain: without a call for what each request has, and with what
/// stays the same, or adds up, in registers.
inline fn putPlain(queue: *Queue, commands: []const layout.Command) i32 {
    const sq = &queue.ring.sq;
    const sqes = sq.sqes;
    const mask = sq.ring_mask;
    const sqe_bytes = queue.sqe_bytes;
    const io_sqe = queue.io_sqe;
    const depth = queue.config.depth;
    const descs = queue.descs;
    const addresses = queue.addresses;
    const automatic = queue.config.data_mode == data_automatic;
    const auto_reg = @as(u32, queue.auto_base) | auto_reg_fallback;
    const ops = [2]u32{ queue.config.fetch_op, queue.config.commit_op };
    var tally = Tally{ .stats = queue.stats };
    defer tally.close();
    var tail = sq.sqe_tail;
    for (commands) |*slot| {
        const command = slot.*; // Not read again after each store to an SQE.
        if (command.tag >= depth) return -sys.EINVAL;
        const sqe = sqeAt(sqes, mask, tail, sqe_bytes);
        tail +%= 1;
        if (command.op > command_commit) {
            const result = pack(queue, slot, sqe);
            if (result < 0) return result;
            continue;
        }
        if (command.op == command_commit) tally.add(descs[command.tag].op_flags, command.value);
        packIo(sqe, &io_sqe, ops[command.op], command.tag, command.value, addresses[command.tag]);
        if (automatic) sqe.addr = command.tag + auto_reg;
    }
    sq.sqe_tail = tail;
    return 0;
}

/// Counts of requests with one operation, on the way to the queue's.
const Tally = struct {
    stats: [*]f64,
    op: u32 = 0,
    requests: u32 = 0,
    bytes: u64 = 0,
    errors: u32 = 0,

    inline fn add(tally: *Tally, op_flags: u32, result: i32) void {
        const op = op_flags % stats_ops;
        if (op != tally.op) {
            tally.close();
            tally.* = .{ .stats = tally.stats, .op = op };
        }
        tally.requests += 1;
        if (result >= 0) tally.bytes += @intCast(result) else tally.errors += 1;
    }

    inline fn close(tally: *const Tally) void {
        if (tally.requests == 0) return;
        const counts = tally.stats[tally.op * stats_counts ..][0..stats_counts];
        counts[0] += @floatFromInt(tally.requests);
        counts[1] += @floatFromInt(tally.bytes);
        counts[2] += @floatFromInt(tally.errors);
    }
};

/// The next SQE as a command for the driver's queue. There must be room.
pub fn nextCommand(queue: *Queue, op: u32) *layout.Sqe {
    const sqe = nextSqe(&queue.ring, queue.sqe_bytes);
    sqe.* = queue.io_sqe;
    sqe.off = op;
    return sqe;
}

fn ioSqe(queue: *const Queue) layout.Sqe {
    var sqe = std.mem.zeroes(layout.Sqe);
    // Without a driver a NOP, which heeds nothing else.
    sqe.opcode = if (queue.config.fetch_op == 0) op_nop else op_uring_cmd;
    sqe.flags = if (queue.registered) sqe_fixed_file else 0;
    sqe.fd = if (queue.registered) 0 else queue.config.char_fd;
    const queue_id: *u16 = @ptrCast(@alignCast(&sqe.cmd)); // First in each command.
    queue_id.* = @intCast(queue.config.queue_id);
    return sqe;
}

inline fn packIo(sqe: *layout.Sqe, io_sqe: *const layout.Sqe, op: u32, tag: u16, result: i32, address: u64) void {
    sqe.* = io_sqe.*;
    sqe.off = op;
    sqe.user_data = tag | event_request << 16;
    const cmd: *layout.IoCmd = @ptrCast(@alignCast(&sqe.cmd));
    cmd.tag = tag;
    cmd.result = result;
    cmd.addr = address;
}

/// What a COMMIT tells the driver, once the data is where it belongs, and the request is counted.
pub fn answer(queue: *Queue, command: *const layout.Command) i32 {
    if (command.op != command_commit) return command.value;
    const copies = queue.config.data_mode == data_user;
    const result = if (copies) giveData(queue, command.tag, command.value) else command.value;
    var tally = Tally{ .stats = queue.stats };
    tally.add(queue.descs[command.tag].op_flags, result);
    tally.close();
    return result;
}

noinline fn pack(queue: *Queue, command: *const layout.Command, sqe: *layout.Sqe) i32 {
    const config = &queue.config;
    const io = &queue.io_sqe;
    const tag = command.tag;
    const buffer = queue.addresses[tag];
    sqe.* = std.mem.zeroes(layout.Sqe);
    switch (command.op) {
        command_wake => {
            sqe.opcode = op_read;
            sqe.fd = queue.config.wake_fd;
            sqe.addr = @intFromPtr(&queue.wake_count);
            sqe.len = 8;
        },
        command_fetch => packIo(sqe, io, config.fetch_op, tag, 0, 0),
        command_commit => packIo(sqe, io, config.commit_op, tag, answer(queue, command), 0),
        command_register => packIo(sqe, io, config.register_op, tag, 0, tag),
        command_unregister => packIo(sqe, io, config.unregister_op, tag, 0, tag),
        command_get_data => packIo(sqe, io, config.get_data_op, tag, 0, buffer),
        command_read, command_write, command_write_zeroes => {
            const length = sys.fileOffset(command.length) orelse return -sys.EINVAL;
            if (length + command.buffer_offset > queue.config.io_bytes_max) return -sys.EINVAL;
            sqe.fd = command.value;
            sqe.off = sys.fileOffset(command.offset) orelse return -sys.EINVAL;
            sqe.len = @intCast(length);
            sqe.op_flags = command.flags;
            if (command.op == command_write_zeroes) {
                sqe.opcode = op_write;
                sqe.addr = queue.zeroes;
            } else if (hasBuffers(queue)) {
                sqe.opcode = if (command.op == command_read) op_read else op_write;
                sqe.addr = buffer + command.buffer_offset;
            } else {
                sqe.opcode = if (command.op == command_read) op_read_fixed else op_write_fixed;
                sqe.addr = buffer + command.buffer_offset;
                sqe.buf_index = tag;
            }
        },
        command_fsync => {
            sqe.opcode = op_fsync;
            sqe.fd = command.value;
            sqe.op_flags = command.flags;
        },
        command_fallocate => {
            sqe.opcode = op_fallocate;
            sqe.fd = command.value;
            sqe.off = sys.fileOffset(command.offset) orelse return -sys.EINVAL;
            sqe.addr = sys.fileOffset(command.length) orelse return -sys.EINVAL;
            sqe.len = command.flags;
        },
        else => return -sys.EINVAL,
    }
    const kind: u32 = switch (command.op) {
        command_fetch, command_commit, command_get_data => event_request,
        command_wake => event_wake,
        else => event_file,
    };
    sqe.user_data = tag | kind << 16;
    return 0;
}

inline fn drain(queue: *Queue) i32 {
    const ring = &queue.ring;
    const head = ring.cq.khead.*;
    const count = @min(pending(ring), queue.capacity);
    const cqes = ring.cq.cqes;
    const mask = ring.cq.ring_mask;
    const takes = queue.config.data_mode == data_user;
    const events = queue.events;
    var given: u32 = 0;
    for (0..count) |i| {
        const event = eventOf(&cqes[(head +% @as(u32, @intCast(i))) & mask]);
        if (takes and event.kind == event_request and !arrived(queue, event.tag)) continue;
        events[given] = event;
        given += 1;
    }
    @atomicStore(u32, ring.cq.khead, head +% count, .release);
    return @intCast(given);
}

pub inline fn eventOf(cqe: *const layout.Cqe) layout.Event {
    const kind: u16 = @truncate(cqe.user_data >> 16);
    return eventFor(@truncate(cqe.user_data), kind, cqe.res);
}

pub inline fn eventFor(tag: u16, kind: u16, result: i32) layout.Event {
    const refused = kind == event_request and result != 0;
    return .{ .tag = tag, .kind = if (refused) event_refused else kind, .result = result };
}

/// Whether a request can be served. One whose data cannot be had is answered here.
pub noinline fn arrived(queue: *Queue, tag: u16) bool {
    if (queue.config.data_mode != data_user) return true;
    const result = takeData(queue, tag);
    if (result < 0) refuse(queue, tag, result);
    return result >= 0;
}

fn refuse(queue: *Queue, tag: u16, result: i32) void {
    const commit = layout.Command{ .tag = tag, .op = command_commit, .value = result, .flags = 0, .buffer_offset = 0, .length = 0, .offset = 0 };
    // There is room: the tag has nothing else in flight.
    _ = put(queue, &commit);
}

/// Copies the data of a WRITE into the tag's buffer.
fn takeData(queue: *Queue, tag: u16) i32 {
    const desc = &queue.descs[tag];
    if (desc.op_flags & 0xff != io_op_write) return 0;
    return copyData(queue, .pread64, tag, @as(usize, desc.nr_sectors) * sector);
}

/// Copies what was done of a READ out of the tag's buffer. Returns what it is answered with.
fn giveData(queue: *Queue, tag: u16, result: i32) i32 {
    if (result <= 0 or queue.descs[tag].op_flags & 0xff != io_op_read) return result;
    const copied = copyData(queue, .pwrite64, tag, @intCast(result));
    return if (copied < 0) copied else result;
}

fn copyData(queue: *Queue, direction: std.os.linux.SYS, tag: u16, bytes: usize) i32 {
    if (bytes > queue.config.io_bytes_max) return -sys.EIO;
    const fd: usize = @intCast(queue.config.char_fd);
    const queue_offset = @as(usize, queue.config.queue_id) << user_queue_shift;
    const offset = user_data_start + queue_offset + (@as(usize, tag) << user_tag_shift);
    const done = sys.call(direction, .{ fd, queue.addresses[tag], bytes, offset, 0, 0 });
    return if (done < 0 or done == bytes) @min(done, 0) else -sys.EIO;
}

pub const payload_bytes = 8192;
pub const payload_count = 16;

pub const Control = struct {
    ring: Ring,
    /// Of commands that are given apart, by payload number.
    apart: [payload_count]Apart,
    payloads: [payload_count * payload_bytes]u8 align(page),
};

/// A process with one command.
const Apart = struct {
    /// 0: none.
    pid: i32,
    result: i32,
    /// Set last, by that process.
    done: u32,
};

/// Its memory is shared with the processes of commands that are given apart.
pub fn controlInit(out: **Control) i32 {
    const base = sys.mapShared(@sizeOf(Control)) catch return -sys.ENOMEM;
    const control: *Control = @ptrFromInt(base);
    var params = std.mem.zeroes(layout.Params);
    params.flags = setup_sqe128;
    const result = io_uring_queue_init_params(2 * payload_count, &control.ring, &params);
    if (result < 0) {
        sys.unmap(base, @sizeOf(Control));
        return result;
    }
    out.* = control;
    return 0;
}

pub fn controlExit(control: *Control) void {
    io_uring_queue_exit(&control.ring);
    sys.unmap(@intFromPtr(control), @sizeOf(Control));
}

/// Opcode 0 opens the file whose path, with its NUL, is the payload, with the flags that are `data`.
pub fn controlSubmit(control: *Control, request: *const layout.ControlRequest) i32 {
    if (request.payload >= payload_count or request.payload_len > payload_bytes) return -sys.EINVAL;
    if (request.dev_path_len > request.payload_len or request.queue_id > 0xffff) return -sys.EINVAL;
    if (request.apart != 0 and request.control_fd >= 0) {
        const pid = submitApart(control, request);
        if (pid >= 0) return 0; // One process more may be one too many: as any other, then.
    }
    if (!roomFor(&control.ring, 1)) return -sys.EBUSY;
    packControl(control, request, nextSqe(&control.ring, 128));
    const result = enterKernel(&control.ring, 0, enter_getevents);
    const sq = &control.ring.sq;
    if (result >= 0 or @atomicLoad(u32, sq.khead, .acquire) == sq.sqe_tail) return 0;
    // The caller is told that it failed: it must not go along with the next one.
    sq.sqe_tail -%= 1;
    @atomicStore(u32, sq.ktail, sq.sqe_tail, .release);
    return result;
}

fn packControl(control: *Control, request: *const layout.ControlRequest, sqe: *layout.Sqe) void {
    sqe.* = std.mem.zeroes(layout.Sqe);
    // By a worker of the kernel's from the start: a driver may do all of it where it is submitted.
    sqe.flags = sqe_async;
    sqe.user_data = request.payload;
    const payload: usize = @intFromPtr(&control.payloads) + request.payload * payload_bytes;
    if (request.opcode == 0) {
        sqe.opcode = op_openat;
        sqe.fd = at_fdcwd;
        sqe.addr = payload;
        sqe.op_flags = @truncate(request.data);
    } else {
        sqe.opcode = op_uring_cmd;
        sqe.fd = request.control_fd;
        sqe.off = request.opcode;
        const cmd: *layout.CtrlCmd = @ptrCast(@alignCast(&sqe.cmd));
        cmd.* = .{
            .dev_id = request.device_id,
            .queue_id = @intCast(request.queue_id),
            .len = @intCast(request.payload_len),
            .addr = if (request.payload_len > 0) payload else 0,
            .data = request.data,
            .dev_path_len = @intCast(request.dev_path_len),
            .pad = 0,
            .reserved = 0,
        };
    }
}

const every_signal: u64 = ~@as(u64, 0);
const sig_setmask = 2;
const exit_group = std.os.linux.SYS.exit_group;

/// Forks a process that gives the command and waits for it. Nothing else is told of its end: no
/// signal, and it holds none of the caller's files. Returns its id or -errno.
fn submitApart(control: *Control, request: *const layout.ControlRequest) i32 {
    const slot = &control.apart[request.payload];
    slot.* = .{ .pid = 0, .result = -sys.EIO, .done = 0 };
    // It must never run a handler of the caller's: what these belong to is not there.
    var before: u64 = 0;
    _ = sys.call(.rt_sigprocmask, .{ sig_setmask, @intFromPtr(&every_signal), @intFromPtr(&before), 8, 0, 0 });
    const pid = sys.call(.clone, .{ 0, 0, 0, 0, 0, 0 });
    if (pid == 0) {
        slot.result = giveApart(control, request);
        @atomicStore(u32, &slot.done, 1, .release);
        while (true) _ = sys.call(exit_group, .{ 0, 0, 0, 0, 0, 0 });
    }
    _ = sys.call(.rt_sigprocmask, .{ sig_setmask, @intFromPtr(&before), 0, 8, 0, 0 });
    if (pid > 0) slot.pid = pid;
    return pid;
}

/// In that process.
fn giveApart(control: *Control, request: *const layout.ControlRequest) i32 {
    const fd: usize = @intCast(request.control_fd);
    if (fd > 0) _ = sys.call(.close_range, .{ 0, fd - 1, 0, 0, 0, 0 });
    _ = sys.call(.close_range, .{ fd + 1, 0xffff_ffff, 0, 0, 0, 0 });
    var own: Ring = undefined;
    var params = std.mem.zeroes(layout.Params);
    params.flags = setup_sqe128;
    const made = io_uring_queue_init_params(1, &own, &params);
    if (made < 0) return made;
    packControl(control, request, nextSqe(&own, 128));
    while (pending(&own) == 0) {
        const result = enterKernel(&own, 1, enter_getevents);
        if (result < 0 and result != -sys.EINTR and result != -sys.EAGAIN) return result;
    }
    return own.cq.cqes[own.cq.khead.* & own.cq.ring_mask].res;
}

/// Takes one completion: out[0] = payload number, out[1] = result. Returns 1, or 0 when none is
/// ready. Entering the kernel lets it run the completions of commands it had put off.
pub fn controlReap(control: *Control, out: *[2]i32) i32 {
    for (&control.apart, 0..) |*slot, payload| {
        if (slot.pid == 0) continue;
        const wait_all = 0x4000_0000;
        const no_hang = 1;
        const ended = sys.call(.wait4, .{ @intCast(slot.pid), 0, no_hang | wait_all, 0, 0, 0 });
        // Whoever killed it has not ended what the driver does.
        if (@atomicLoad(u32, &slot.done, .acquire) == 0 and ended == 0) continue;
        out.* = .{ @intCast(payload), slot.result };
        slot.pid = 0;
        return 1;
    }
    const ring = &control.ring;
    if (pending(ring) == 0) {
        const result = enterKernel(ring, 0, enter_getevents);
        if (result < 0 and result != -sys.EINTR) return result;
        if (pending(ring) == 0) return 0;
    }
    const head = ring.cq.khead.*;
    const cqe = ring.cq.cqes[head & ring.cq.ring_mask];
    out[0] = @intCast(cqe.user_data);
    out[1] = cqe.res;
    @atomicStore(u32, ring.cq.khead, head +% 1, .release);
    return 1;
}
