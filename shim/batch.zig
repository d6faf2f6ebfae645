// SPDX-License-Identifier: MIT
//! Io commands in batches (UBLK_F_BATCH_IO, Linux 7.0): all FETCHes of a queue become one
//! PREP_IO_CMDS, the COMMITs of a step one COMMIT_IO_CMDS, and one multishot FETCH_IO_CMDS
//! delivers the tags of requests into buffers that the ring was given. To the caller of ring.step
//! it looks as without: each FETCH and each COMMIT is answered by an event for its tag.
//!
//! Invariants: at most one FETCH_IO_CMDS is in flight. A tag is `serving` from its delivery until
//! its commit has been done, and is in one place only: so the tags delivered and not yet committed
//! never need more buffers than there are, nor more events. Elements of a batch stay as they are
//! until its completion: there are twice as many as tags.

const std = @import("std");
const layout = @import("layout.zig");
const ring = @import("ring.zig");
const sys = @import("sys.zig");

const Queue = ring.Queue;

extern fn io_uring_register_buf_ring(ring: *layout.Ring, reg: *const layout.BufferRing, flags: c_uint) c_int;

const sqe_buffer_select = 1 << 5;
const uring_cmd_multishot = 1 << 1;
const cqe_buffer = 1 << 0;
const cqe_more = 1 << 1;
const cqe_buffer_shift = 16;

/// UBLK_BATCH_F_*.
const has_buffer_address = 1 << 1;
const auto_reg_fallback = 1 << 2;

/// What the driver delivers at once.
const tags_max = 128;

const first_shift = 32;
const count_shift = 48;

pub const State = struct {
    mapping: usize,
    mapping_bytes: usize,
    /// Buffers for tags, as the kernel finds them: as many as there are tags, a power of two.
    buffers: [*]layout.Buffer,
    buffer_mask: u16,
    buffer_tail: u16,
    buffer_bytes: u32,
    tags: usize,
    elements: usize,
    element_bytes: u32,
    element_flags: u16,
    /// Where the next batch of elements starts.
    next: u32,
    /// The batch that is being gathered, and how many elements it has.
    gathering: ?*layout.Sqe,
    gathered: u32,
    serving: [*]bool,
    /// What FETCH_IO_CMDS has ended with, for good; 0 while requests may come.
    ended: i32,
    /// Of the step's events.
    events: u32,
};

/// Maps what batches need and gives the ring its buffers. On failure the caller releases.
pub fn init(queue: *Queue) i32 {
    const state = &queue.batch;
    const depth = queue.config.depth;
    const count = sys.powerOfTwo(depth);
    const copied = queue.config.data_mode == ring.data_copied;
    state.element_bytes = if (copied) 16 else 8;
    state.element_flags = if (copied) has_buffer_address else if (queue.config.data_mode == ring.data_automatic) auto_reg_fallback else 0;
    state.buffer_mask = @intCast(count - 1);
    const tags: u32 = @min(depth, tags_max); // By itself, @min would take the narrowest type.
    state.buffer_bytes = tags * @sizeOf(u16);

    const ring_bytes = count * @sizeOf(layout.Buffer);
    const tags_bytes = sys.roundUp(count * state.buffer_bytes, 8);
    const elements_bytes = 2 * depth * state.element_bytes;
    state.mapping_bytes = sys.roundUp(ring_bytes + tags_bytes + elements_bytes + depth, ring.page);
    state.mapping = sys.mapMemory(state.mapping_bytes) catch return -sys.ENOMEM;
    state.buffers = @ptrFromInt(state.mapping);
    state.tags = state.mapping + ring_bytes;
    state.elements = state.tags + tags_bytes;
    state.serving = @ptrFromInt(state.elements + elements_bytes);

    const told = layout.BufferRing{ .ring_addr = state.mapping, .ring_entries = count, .bgid = 0, .flags = 0, .resv = .{ 0, 0, 0 } };
    const result = io_uring_register_buf_ring(&queue.ring, &told, 0);
    if (result < 0) return result;
    for (0..count) |id| provide(state, @intCast(id));
    return 0;
}

/// Gives the ring a buffer, again or for the first time.
fn provide(state: *State, id: u16) void {
    const buffer = &state.buffers[state.buffer_tail & state.buffer_mask];
    buffer.addr = state.tags + @as(usize, id) * state.buffer_bytes;
    buffer.len = state.buffer_bytes;
    buffer.bid = id;
    state.buffer_tail +%= 1;
    // The ring's tail lies in its first buffer, where nothing else is.
    @atomicStore(u16, &state.buffers[0].tail, state.buffer_tail, .release);
}

fn element(state: *const State, at: usize) *layout.Element {
    return @ptrFromInt(state.elements + at * state.element_bytes);
}

/// Adds a FETCH or a COMMIT to the step's batch. A step has FETCHes only, or COMMITs only.
pub fn gather(queue: *Queue, command: *const layout.Command) void {
    const state = &queue.batch;
    const is_fetch = command.op == ring.command_fetch;
    const sqe = state.gathering orelse begin(queue, if (is_fetch) queue.config.prep_op else queue.config.commit_op);
    const item = element(state, state.next + state.gathered);
    item.tag = command.tag;
    item.buf_index = command.tag + queue.auto_base;
    item.result = ring.answer(queue, command);
    if (state.element_bytes > 8) item.buf_addr = queue.addresses[command.tag];
    state.gathered += 1;
    const kind: u64 = if (is_fetch) ring.batch_prepare else ring.batch_commit;
    describe(state, sqe, kind, state.next, state.gathered);
}

fn begin(queue: *Queue, op: u32) *layout.Sqe {
    const state = &queue.batch;
    if (state.next > queue.config.depth) state.next = 0;
    const sqe = ring.nextCommand(queue, op);
    state.gathering = sqe;
    return sqe;
}

/// The batch is complete, if there is one. Returns whether it has commits.
pub fn close(queue: *Queue) bool {
    const state = &queue.batch;
    const sqe = state.gathering orelse return false;
    state.next += state.gathered;
    state.gathered = 0;
    state.gathering = null;
    return sqe.off == queue.config.commit_op;
}

/// The batch is not to be sent after all.
pub fn drop(queue: *Queue) void {
    queue.batch.gathered = 0;
    queue.batch.gathering = null;
}

fn describe(state: *const State, sqe: *layout.Sqe, kind: u64, first: u64, count: u64) void {
    sqe.addr = @intFromPtr(element(state, first));
    sqe.len = @intCast(count * state.element_bytes);
    sqe.user_data = kind << 16 | first << first_shift | count << count_shift;
    const cmd: *layout.BatchIo = @ptrCast(@alignCast(&sqe.cmd));
    cmd.flags = state.element_flags;
    cmd.nr_elem = @intCast(count);
    cmd.elem_bytes = @intCast(state.element_bytes);
}

/// Asks for requests, as long as there are buffers.
fn fetch(queue: *Queue) void {
    const sqe = ring.nextCommand(queue, queue.config.fetch_op);
    sqe.flags |= sqe_buffer_select;
    sqe.op_flags = uring_cmd_multishot;
    sqe.user_data = ring.batch_fetch << 16;
    const cmd: *layout.BatchIo = @ptrCast(@alignCast(&sqe.cmd));
    cmd.elem_bytes = @sizeOf(u16);
}

/// As ring.drain.
pub fn drain(queue: *Queue) i32 {
    const cq = &queue.ring.cq;
    const head = cq.khead.*;
    const count = ring.pending(&queue.ring);
    queue.batch.events = 0;
    for (0..count) |i| {
        const cqe = &cq.cqes[(head +% @as(u32, @intCast(i))) & cq.ring_mask];
        const handled = switch (@as(u16, @truncate(cqe.user_data >> 16))) {
            ring.batch_prepare => prepared(queue, cqe),
            ring.batch_commit => committed(queue, cqe),
            ring.batch_fetch => fetched(queue, cqe),
            else => emit(queue, ring.eventOf(cqe)),
        };
        if (!handled) return -sys.EIO;
    }
    @atomicStore(u32, cq.khead, head +% count, .release);
    _ = close(queue); // Of requests that were answered here.
    return @intCast(queue.batch.events);
}

/// False: the driver has broken a promise.
fn emit(queue: *Queue, event: layout.Event) bool {
    const state = &queue.batch;
    if (state.events == queue.capacity) return false;
    queue.events[state.events] = event;
    state.events += 1;
    return true;
}

fn answerTag(queue: *Queue, tag: u16, result: i32) bool {
    return emit(queue, ring.eventFor(tag, ring.event_request, result));
}

fn prepared(queue: *Queue, cqe: *const layout.Cqe) bool {
    if (cqe.res < 0) return answerTag(queue, 0, cqe.res);
    fetch(queue);
    return true;
}

fn fetched(queue: *Queue, cqe: *const layout.Cqe) bool {
    const state = &queue.batch;
    if (cqe.flags & cqe_buffer != 0) {
        const id: u16 = @intCast(cqe.flags >> cqe_buffer_shift);
        const tags: [*]const u16 = @ptrFromInt(state.tags + @as(usize, id & state.buffer_mask) * state.buffer_bytes);
        const bytes: usize = @intCast(@max(cqe.res, 0));
        if (bytes > state.buffer_bytes) return false;
        for (tags[0 .. bytes / @sizeOf(u16)]) |tag| {
            if (tag >= queue.config.depth or state.serving[tag]) return false;
            state.serving[tag] = true;
            if (ring.arrived(queue, tag) and !answerTag(queue, tag, 0)) return false;
        }
        provide(state, id);
    }
    if (cqe.flags & cqe_more != 0) return true;
    // It ran out of buffers, or completions had no room.
    if (cqe.res >= 0 or cqe.res == -sys.ENOBUFS) {
        fetch(queue);
        return true;
    }
    // Requests that are being served are committed first, as without batches.
    state.ended = cqe.res;
    for (0..queue.config.depth) |tag| {
        if (!state.serving[tag] and !answerTag(queue, @intCast(tag), cqe.res)) return false;
    }
    return true;
}

/// The driver goes through a batch until an element that it refuses: the answer is how much it has
/// done, or, where that is nothing, why.
fn committed(queue: *Queue, cqe: *const layout.Cqe) bool {
    const state = &queue.batch;
    const first: usize = @intCast(cqe.user_data >> first_shift & 0xffff);
    const count: usize = @intCast(cqe.user_data >> count_shift);
    const bytes: u32 = @intCast(@max(cqe.res, 0));
    const done = @min(count, bytes / state.element_bytes);
    for (first..first + done) |at| {
        const tag = element(state, at).tag;
        state.serving[tag] = false;
        if (state.ended != 0 and !answerTag(queue, tag, state.ended)) return false;
    }
    if (done == count) return true;
    if (done == 0) return answerTag(queue, element(state, first).tag, @min(cqe.res, -1));
    const sqe = ring.nextCommand(queue, queue.config.commit_op);
    describe(state, sqe, ring.batch_commit, first + done, count - done);
    return true;
}
