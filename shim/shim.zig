// SPDX-License-Identifier: MIT
//! Every symbol that TypeScript calls (ffi/symbols.ts is the other half). Each checks its
//! arguments, calls, and returns >= 0 or -errno. Rings are named by small handles, because a
//! u32 crosses both FFIs at full speed and a stale one is refused, where a pointer would not be.

const std = @import("std");
const linux = std.os.linux;
const layout = @import("layout.zig");
const ring = @import("ring.zig");
const sys = @import("sys.zig");

/// Raised with every change of these exports or of the shared structs; ffi/load.ts compares it.
const shim_version = 12;

const handles_max = 1024;
var queues: [handles_max]?*ring.Queue = @splat(null);
var controls: [handles_max]?*ring.Control = @splat(null);

/// Threads share the table (one mapping of this library per process): slots are claimed by CAS.
fn claim(comptime T: type, table: *[handles_max]?*T, object: *T) i32 {
    for (table, 0..) |*slot, index| {
        if (@cmpxchgStrong(?*T, slot, null, object, .acq_rel, .monotonic) == null) return @intCast(index);
    }
    return -sys.ENFILE;
}

fn lookUp(comptime T: type, table: *[handles_max]?*T, handle: u32) ?*T {
    if (handle >= handles_max) return null;
    return @atomicLoad(?*T, &table[handle], .acquire);
}

fn release(comptime T: type, table: *[handles_max]?*T, handle: u32) ?*T {
    if (handle >= handles_max) return null;
    return @atomicRmw(?*T, &table[handle], .Xchg, null, .acq_rel);
}

export fn ubd_version() i32 {
    return shim_version;
}

/// Writes layout.table to `out`; returns its length, also when `bytes` is too small for it.
export fn ubd_layout(out: ?[*]u8, bytes: u32) i32 {
    const to = out orelse return -sys.EINVAL;
    for (layout.table[0..@min(bytes, layout.table.len)], 0..) |byte, i| to[i] = byte;
    return layout.table.len;
}

/// Sets up a queue's ring and memory on the calling thread. Returns its handle. Requests that it
/// answers are counted in `stats`, if given, which must stay until ubd_queue_exit.
export fn ubd_queue_init(config: ?*const layout.QueueConfig, stats: ?[*]f64) i32 {
    const checked = config orelse return -sys.EINVAL;
    var queue: *ring.Queue = undefined;
    const result = ring.queueInit(checked, stats, &queue);
    if (result < 0) return result;
    const handle = claim(ring.Queue, &queues, queue);
    if (handle < 0) ring.queueExit(queue);
    return handle;
}

/// Address of a region of the queue: 0 commands, 1 events, 2 io descriptors, 3 + t the io buffer of
/// tag t. 0 for a buffer that the driver keeps, -1 for an unknown handle or region. It is valid until
/// ubd_queue_exit, an io buffer until ubd_buffer_drop.
export fn ubd_queue_address(handle: u32, region: u32) f64 {
    const queue = lookUp(ring.Queue, &queues, handle) orelse return -1;
    const address: usize = switch (region) {
        0 => @intFromPtr(queue.commands),
        1 => @intFromPtr(queue.events),
        2 => @intFromPtr(queue.descs),
        else => if (region - 3 < queue.config.depth) queue.addresses[region - 3] else return -1,
    };
    return @floatFromInt(address);
}

/// The whole data path: packs `count` commands, submits, waits when `wait` is not 0, drains.
/// Returns the number of events.
export fn ubd_step(handle: u32, count: u32, wait: u32) i32 {
    const queue = lookUp(ring.Queue, &queues, handle) orelse return -sys.EBADF;
    return ring.step(queue, count, wait != 0);
}

/// Has the queue's ring signal `fd`, an eventfd, when ubd_step has something to drain: for a thread
/// that must not block in it.
export fn ubd_queue_notify(handle: u32, fd: i32) i32 {
    const queue = lookUp(ring.Queue, &queues, handle) orelse return -sys.EBADF;
    return ring.queueNotify(queue, fd);
}

/// A new io buffer for requests of that many bytes. Returns its address, or -1.
export fn ubd_buffer_map(bytes: u32) f64 {
    return @floatFromInt(sys.mapMemory(ring.bufferStride(bytes)) catch return -1);
}

/// Has a tag's data at this address, one that ubd_buffer_map or ubd_queue_address has returned, from
/// its next command on.
export fn ubd_buffer_use(handle: u32, tag: u32, address: f64) i32 {
    const queue = lookUp(ring.Queue, &queues, handle) orelse return -sys.EBADF;
    return ring.useBuffer(queue, tag, sys.fileOffset(address) orelse return -sys.EINVAL);
}

/// Gives the pages of an io buffer back, which then reads as zeroes, or unmaps it.
export fn ubd_buffer_drop(address: f64, bytes: u32, unmap: u32) i32 {
    const at = sys.fileOffset(address) orelse return -sys.EINVAL;
    if (at == 0 or at % ring.page != 0) return -sys.EINVAL;
    const mapped = ring.bufferStride(bytes);
    if (unmap != 0) sys.unmap(at, mapped) else sys.dropPages(at, mapped);
    return 0;
}

/// Ends a queue. Its io buffers stay: each ends by ubd_buffer_drop.
export fn ubd_queue_exit(handle: u32) i32 {
    ring.queueExit(release(ring.Queue, &queues, handle) orelse return -sys.EBADF);
    return 0;
}

export fn ubd_control_init() i32 {
    var control: *ring.Control = undefined;
    const result = ring.controlInit(&control);
    if (result < 0) return result;
    const handle = claim(ring.Control, &controls, control);
    if (handle < 0) ring.controlExit(control);
    return handle;
}

/// Address of the payload areas: 16 of 8192 bytes each. -1 for an unknown handle.
export fn ubd_control_address(handle: u32) f64 {
    const control = lookUp(ring.Control, &controls, handle) orelse return -1;
    return @floatFromInt(@intFromPtr(&control.payloads));
}

export fn ubd_control_submit(handle: u32, request: ?*const layout.ControlRequest) i32 {
    const control = lookUp(ring.Control, &controls, handle) orelse return -sys.EBADF;
    return ring.controlSubmit(control, request orelse return -sys.EINVAL);
}

export fn ubd_control_reap(handle: u32, out: ?*[2]i32) i32 {
    const control = lookUp(ring.Control, &controls, handle) orelse return -sys.EBADF;
    return ring.controlReap(control, out orelse return -sys.EINVAL);
}

export fn ubd_control_exit(handle: u32) i32 {
    ring.controlExit(release(ring.Control, &controls, handle) orelse return -sys.EBADF);
    return 0;
}

fn word(value: i32) usize {
    return @bitCast(@as(isize, value));
}

/// open(2), always with O_CLOEXEC. node:fs cannot: Deno hides file descriptors.
export fn ubd_open(path: ?[*:0]const u8, flags: u32) i32 {
    const cloexec = 0o2000000;
    const checked = path orelse return -sys.EINVAL;
    return sys.call(.openat, .{ at_fdcwd, @intFromPtr(checked), flags | cloexec, 0, 0, 0 });
}

export fn ubd_close(fd: i32) i32 {
    return sys.call(.close, .{ word(fd), 0, 0, 0, 0, 0 });
}

/// flock(2): the lock belongs to the open file, so it ends with the server, however it ends.
export fn ubd_flock(fd: i32, operation: u32) i32 {
    return sys.call(.flock, .{ word(fd), operation, 0, 0, 0, 0 });
}

/// Sends one datagram to a Unix socket. `address` is what follows the family in sockaddr_un:
/// a path, or a zero byte and an abstract name. node: has no such sockets.
export fn ubd_send_datagram(address: ?[*]const u8, address_bytes: u32, data: ?[*]const u8, bytes: u32) i32 {
    const af_unix = 1;
    const sock_dgram_cloexec = 2 | 0o2000000;
    var name: extern struct { family: u16 = af_unix, path: [108]u8 = @splat(0) } = .{};
    const from = address orelse return -sys.EINVAL;
    const message = data orelse return -sys.EINVAL;
    if (address_bytes == 0 or address_bytes > name.path.len) return -sys.EINVAL;
    for (name.path[0..address_bytes], from[0..address_bytes]) |*to, byte| to.* = byte;

    const socket = sys.call(.socket, .{ af_unix, sock_dgram_cloexec, 0, 0, 0, 0 });
    if (socket < 0) return socket;
    const name_bytes = @sizeOf(u16) + address_bytes;
    const sent = sys.call(.sendto, .{ word(socket), @intFromPtr(message), bytes, 0, @intFromPtr(&name), name_bytes });
    _ = sys.call(.close, .{ word(socket), 0, 0, 0, 0, 0 });
    return sent;
}

export fn ubd_fdatasync(fd: i32) i32 {
    return sys.call(.fdatasync, .{ word(fd), 0, 0, 0, 0, 0 });
}

export fn ubd_fallocate(fd: i32, mode: u32, offset: f64, length: f64) i32 {
    const from = sys.fileOffset(offset) orelse return -sys.EINVAL;
    const bytes = sys.fileOffset(length) orelse return -sys.EINVAL;
    return sys.call(.fallocate, .{ word(fd), mode, from, bytes, 0, 0 });
}

/// Reads `bytes` at `offset` into a page-aligned scratch page and forgets them: whether the file
/// can be read there, and so whether O_DIRECT bears this size and alignment.
export fn ubd_probe_read(fd: i32, bytes: u32, offset: f64) i32 {
    var scratch: [4096]u8 align(4096) = undefined;
    const from = sys.fileOffset(offset) orelse return -sys.EINVAL;
    if (bytes > scratch.len) return -sys.EINVAL;
    return sys.call(.pread64, .{ word(fd), @intFromPtr(&scratch), bytes, from, 0, 0 });
}

/// statx(2) of an open file; `out` holds the 256 bytes of struct statx.
export fn ubd_statx(fd: i32, mask: u32, out: ?*[256]u8) i32 {
    const at_empty_path = 0x1000;
    const empty: [*:0]const u8 = "";
    const checked = out orelse return -sys.EINVAL;
    return sys.call(.statx, .{ word(fd), @intFromPtr(empty), at_empty_path, mask, @intFromPtr(checked), 0 });
}

/// ioctl(2) whose argument is a pointer to `out`: as many bytes as the request fills.
export fn ubd_ioctl(fd: i32, request: u32, out: ?[*]u8) i32 {
    const checked = out orelse return -sys.EINVAL;
    return sys.call(.ioctl, .{ word(fd), request, @intFromPtr(checked), 0, 0, 0 });
}

/// An eventfd, to wake a thread out of ubd_step or ubd_wait. Bun watches only one that does not
/// block, a ring reads only one that does.
export fn ubd_eventfd(nonblocking: u32) i32 {
    const cloexec = 0o2000000;
    const nonblock = 0o4000;
    const flags: usize = if (nonblocking != 0) cloexec | nonblock else cloexec;
    return sys.call(.eventfd2, .{ 0, flags, 0, 0, 0, 0 });
}

/// Blocks until the eventfd was written, and resets it.
export fn ubd_wait(fd: i32) i32 {
    var count: u64 = 0;
    while (true) {
        const result = sys.call(.read, .{ word(fd), @intFromPtr(&count), 8, 0, 0, 0 });
        if (result != -sys.EINTR) return result;
    }
}

export fn ubd_wake(fd: i32) i32 {
    var one: u64 = 1;
    return sys.call(.write, .{ word(fd), @intFromPtr(&one), 8, 0, 0, 0 });
}

/// Lets no descriptor from 3 on reach a program started by this process (Linux 5.11).
export fn ubd_close_on_exec() i32 {
    const close_range_cloexec = 1 << 2;
    return sys.call(.close_range, .{ 3, 0xffff_ffff, close_range_cloexec, 0, 0, 0 });
}

/// Lets a descriptor reach what this process executes.
export fn ubd_keep_on_exec(fd: i32) i32 {
    const f_setfd = 2;
    return sys.call(.fcntl, .{ word(fd), f_setfd, 0, 0, 0, 0 });
}

/// pidfd_open(2), always with O_CLOEXEC: a process that stays itself, whoever gets its id.
export fn ubd_pidfd_open(pid: i32) i32 {
    return sys.call(.pidfd_open, .{ word(pid), 0, 0, 0, 0, 0 });
}

/// pidfd_send_signal(2).
export fn ubd_pidfd_signal(pidfd: i32, signal: i32) i32 {
    return sys.call(.pidfd_send_signal, .{ word(pidfd), word(signal), 0, 0, 0, 0 });
}

/// Takes a resource limit (RLIMIT_*) off this process; where only its hard limit may stay, raises the
/// other one up to it. `before` gets soft and hard limit as they were. Returns 0 when there is none any
/// more, 1 when there is, or -errno.
export fn ubd_raise_limit(resource: u32, before: ?*[2]u64) i32 {
    const unlimited = std.math.maxInt(u64);
    const known = setLimit(resource, null, before orelse return -sys.EINVAL);
    if (known < 0) return known;
    var limit: [2]u64 = .{ unlimited, unlimited };
    if (setLimit(resource, &limit, null) == 0) return 0;
    const result = setLimit(resource, null, &limit);
    if (result < 0) return result;
    limit[0] = limit[1];
    const raised = setLimit(resource, &limit, null);
    if (raised < 0) return raised;
    return if (limit[0] == unlimited) 0 else 1;
}

/// Sets soft and hard limit.
export fn ubd_set_limit(resource: u32, limit: ?*const [2]u64) i32 {
    return setLimit(resource, limit orelse return -sys.EINVAL, null);
}

fn setLimit(resource: u32, new: ?*const [2]u64, old: ?*[2]u64) i32 {
    return sys.call(.prlimit64, .{ 0, resource, @intFromPtr(new), @intFromPtr(old), 0, 0 });
}

/// sched_setaffinity(2) of any thread: `cpus` is a bit set.
export fn ubd_set_affinity(tid: i32, cpus: ?*const [1024]u8) i32 {
    const checked = cpus orelse return -sys.EINVAL;
    if (tid <= 0) return -sys.EINVAL;
    return sys.call(.sched_setaffinity, .{ word(tid), checked.len, @intFromPtr(checked), 0, 0, 0 });
}

/// Keeps the calling thread to those of its CPUs that are in `mask`, if there are any: whoever
/// restricted the process (taskset, a cgroup) is obeyed first.
export fn ubd_narrow_affinity(mask: ?*const [1024]u8) i32 {
    const wanted = mask orelse return -sys.EINVAL;
    var cpus: [1024]u8 align(8) = undefined;
    const bytes = sys.call(.sched_getaffinity, .{ 0, cpus.len, @intFromPtr(&cpus), 0, 0, 0 });
    if (bytes < 0) return bytes;
    var any: u8 = 0;
    for (cpus[0..@intCast(bytes)], wanted[0..@intCast(bytes)]) |*have, want| {
        have.* &= want;
        any |= have.*;
    }
    if (any == 0) return 0;
    return sys.call(.sched_setaffinity, .{ 0, @intCast(bytes), @intFromPtr(&cpus), 0, 0, 0 });
}

export fn ubd_gettid() i32 {
    return sys.call(.gettid, .{ 0, 0, 0, 0, 0, 0 });
}

const at_fdcwd: usize = @bitCast(@as(isize, -100));
const clone_newns = 0x20000;
const clone_fs = 0x200;

/// What the calling thread left: its mount namespace, its root and its working directory.
const Mounts = extern struct { namespace: i32, root: i32, cwd: i32 };

/// Puts the calling thread into a mount namespace of its own; processes it starts from now on are born
/// there. Other threads stay: a runtime that has already started threads cannot move as a whole.
///
/// The namespace is empty, and root and working directory stay where they are, in the old one: a path
/// means what it means there, at any time, and what is not in use there can be unmounted. With
/// `copy`, it has a copy of the old one's mounts, where nothing done to those is seen.
export fn ubd_leave_mounts(left: ?*Mounts, copy: u32) i32 {
    const saved = left orelse return -sys.EINVAL;
    const path_only = 0o10000000;
    saved.namespace = ubd_open("/proc/thread-self/ns/mnt", 0);
    saved.root = ubd_open("/", path_only);
    saved.cwd = ubd_open(".", path_only);
    var result = @min(saved.namespace, saved.root, saved.cwd);
    if (result >= 0) result = sys.call(.unshare, .{ clone_newns, 0, 0, 0, 0, 0 });
    if (result < 0) {
        closeMounts(saved);
        return result;
    }
    const recursive_private = 0x4000 | 1 << 18;
    const root: [*:0]const u8 = "/";
    result = sys.call(.mount, .{ 0, @intFromPtr(root), 0, recursive_private, 0, 0 });
    if (result >= 0 and copy == 0) {
        result = ubd_detach_mount(root);
        if (result >= 0) result = takePlaces(saved);
    }
    if (result < 0) _ = ubd_rejoin_mounts(saved);
    return result;
}

/// Makes root and working directory what they were.
fn takePlaces(saved: *const Mounts) i32 {
    const here: [*:0]const u8 = ".";
    var result = sys.call(.fchdir, .{ word(saved.root), 0, 0, 0, 0, 0 });
    if (result >= 0) result = sys.call(.chroot, .{ @intFromPtr(here), 0, 0, 0, 0, 0 });
    if (result >= 0) result = sys.call(.fchdir, .{ word(saved.cwd), 0, 0, 0, 0, 0 });
    return result;
}

/// Takes the calling thread back to what ubd_leave_mounts made it leave.
export fn ubd_rejoin_mounts(left: ?*Mounts) i32 {
    const saved = left orelse return -sys.EINVAL;
    defer closeMounts(saved);
    // A thread may have been started meanwhile, and share the working directory.
    var result = sys.call(.unshare, .{ clone_fs, 0, 0, 0, 0, 0 });
    if (result < 0) return result;
    result = sys.call(.setns, .{ word(saved.namespace), clone_newns, 0, 0, 0, 0 });
    if (result < 0) return result;
    // Now root and working directory are the namespace's: a caller's chroot must hold on.
    return takePlaces(saved);
}

fn closeMounts(saved: *const Mounts) void {
    for ([_]i32{ saved.namespace, saved.root, saved.cwd }) |fd| {
        if (fd >= 0) _ = ubd_close(fd);
    }
}

/// umount2(2) with MNT_DETACH: the mount leaves the tree now, and ends with its last user.
export fn ubd_detach_mount(path: ?[*:0]const u8) i32 {
    const detach = 2;
    const checked = path orelse return -sys.EINVAL;
    return sys.call(.umount2, .{ @intFromPtr(checked), detach, 0, 0, 0, 0 });
}

/// Tells the kernel whether the calling thread serves I/O: memory it asks for must not be found by
/// writing to the very device it serves. Threads and processes that it starts inherit that.
/// Returns what it was before, or -errno.
export fn ubd_io_flusher(on: i32) i32 {
    const pr_set_io_flusher = 57;
    const pr_get_io_flusher = 58;
    const before = sys.call(.prctl, .{ pr_get_io_flusher, 0, 0, 0, 0, 0 });
    if (before < 0) return before;
    const result = sys.call(.prctl, .{ pr_set_io_flusher, @intFromBool(on != 0), 0, 0, 0, 0 });
    return if (result < 0) result else before;
}

/// execve(2). Each string, of arguments and environment, ends with NUL, as /proc/self has them.
/// Returns -errno, or not at all.
export fn ubd_execute(path: ?[*:0]const u8, arguments: ?[*]const u8, arguments_bytes: u32, environment: ?[*]const u8, environment_bytes: u32) i32 {
    const program = path orelse return -sys.EINVAL;
    const words = (arguments orelse return -sys.EINVAL)[0..arguments_bytes];
    const settings = (environment orelse return -sys.EINVAL)[0..environment_bytes];
    const room = std.mem.count(u8, words, "\x00") + std.mem.count(u8, settings, "\x00") + 2;
    const memory = sys.mapMemory(room * @sizeOf(usize)) catch return -sys.ENOMEM;
    const pointers = @as([*]usize, @ptrFromInt(memory))[0..room];
    const argv = point(words, pointers);
    const envp = point(settings, pointers[argv..]);
    std.debug.assert(argv + envp == room);
    const result = sys.call(.execve, .{ @intFromPtr(program), memory, memory + argv * @sizeOf(usize), 0, 0, 0 });
    sys.unmap(memory, room * @sizeOf(usize));
    return result;
}

/// Points to each string, and to nothing after the last; returns how many pointers that took.
fn point(strings: []const u8, pointers: []usize) usize {
    var count: usize = 0;
    var start: usize = 0;
    for (strings, 0..) |byte, at| {
        if (byte != 0) continue;
        pointers[count] = @intFromPtr(strings.ptr) + start;
        count += 1;
        start = at + 1;
    }
    pointers[count] = 0;
    return count + 1;
}

/// mlockall(2) of all pages that are or will be touched. Not of those that are only mapped: a
/// runtime maps gigabytes that it never uses.
export fn ubd_lock_memory() i32 {
    const current_future_onfault = 1 | 2 | 4;
    return sys.call(.mlockall, .{ current_future_onfault, 0, 0, 0, 0, 0 });
}

/// mknod(2); `mode` holds the type and the permissions, before the umask.
export fn ubd_mknod(path: ?[*:0]const u8, mode: u32, major: u32, minor: u32) i32 {
    const checked = path orelse return -sys.EINVAL;
    // The kernel's 32-bit form: 12 bits of major, 20 of minor.
    if (major > 0xfff or minor > 0xfffff) return -sys.EINVAL;
    const device = (minor & 0xff) | major << 8 | (minor & ~@as(u32, 0xff)) << 12;
    return sys.call(.mknodat, .{ at_fdcwd, @intFromPtr(checked), mode, device, 0, 0 });
}
