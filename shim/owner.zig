// SPDX-License-Identifier: MIT
//! `ubd-owner ublkc0`, the program that a udev rule runs: gives the node of an unprivileged device
//! to the user who has added it, and leaves every other device's as it is.
//!
//! It changes the owner itself, because udev's OWNER= takes no users but the system's own (since
//! systemd 258).
//!
//! A program of its own, because udevd runs it for every ublk device while others wait, and under
//! systemd in a sandbox where nothing may make code: both rule out a JavaScript runtime.

const std = @import("std");
const linux = std.os.linux;
const layout = @import("layout.zig");
const ring = @import("ring.zig");
const sys = @import("sys.zig");

// Linux 7.2: linux/ublk_cmd.h.
const get_dev_info2 = 0x80207512;
const unprivileged = 1 << 5;

const DevInfo = extern struct {
    before: [24]u8,
    flags: u64,
    server_flags: u64,
    owner_uid: u32,
    owner_gid: u32,
    reserved: [2]u64,
};

const at_fdcwd: usize = @bitCast(@as(isize, -100));
const at_empty_path = 0x1000;
const type_mask = 0o170000;
const type_char = 0o020000;
const type_block = 0o060000;
const open_cloexec = 0o2000000;
const open_rdwr = 2;

pub fn main() void {
    linux.exit(if (give()) 0 else 1);
}

/// The node is opened before the driver is asked, and is what is changed: when the device is deleted
/// meanwhile and another gets its id, that one has another node.
fn give() bool {
    var arguments: [256]u8 = undefined;
    const name = argument(commandLine(&arguments) orelse return false);
    const id = deviceId(name) orelse return false;
    const node = openNode(name) orelse return false;
    const info = deviceInfo(id) orelse return false;
    if (info.flags & unprivileged == 0) return true;
    if (!isDevice(node, name)) return false;
    const empty = @intFromPtr(@as([*:0]const u8, ""));
    const owner = .{ word(node), empty, info.owner_uid, info.owner_gid, at_empty_path, 0 };
    if (sys.call(.fchownat, owner) < 0) return false;
    var path: [64]u8 = @splat(0);
    // fchmod takes no O_PATH, and fchmodat2 came with Linux 6.6.
    _ = decimal(@intCast(node), &path, write(&path, 0, "/proc/self/fd/"));
    return sys.call(.fchmodat, .{ at_fdcwd, @intFromPtr(&path), 0o600, 0, 0, 0 }) >= 0;
}

/// Of /dev, and no link. Not opened for I/O, which a device would take notice of.
fn openNode(name: []const u8) ?i32 {
    var path: [64]u8 = @splat(0);
    const directory = "/dev/";
    if (name.len >= path.len - directory.len) return null;
    _ = write(&path, write(&path, 0, directory), name);
    const flags: u32 = @bitCast(linux.O{ .PATH = true, .NOFOLLOW = true, .CLOEXEC = true });
    const fd = sys.call(.openat, .{ at_fdcwd, @intFromPtr(&path), flags, 0, 0, 0 });
    return if (fd >= 0) fd else null;
}

/// Whether a node has the type and number that the kernel knows under this name.
fn isDevice(node: i32, name: []const u8) bool {
    var stat: linux.Statx = undefined;
    const empty = @intFromPtr(@as([*:0]const u8, ""));
    const mask = 0x7ff;
    const query = .{ word(node), empty, at_empty_path, mask, @intFromPtr(&stat), 0 };
    if (sys.call(.statx, query) < 0) return false;
    const is_char = name[4] == 'c';
    const expected_type: u32 = if (is_char) type_char else type_block;
    if (stat.mode & type_mask != expected_type) return false;

    var path: [128]u8 = @splat(0);
    const class = if (is_char) "/sys/class/ublk-char/" else "/sys/class/block/";
    _ = write(&path, write(&path, write(&path, 0, class), name), "/dev");
    var known: [32]u8 = undefined;
    const bytes = read(&path, &known) orelse return false;
    var expected: [32]u8 = undefined;
    var end = decimal(stat.rdev_major, &expected, 0);
    end = decimal(stat.rdev_minor, &expected, write(&expected, end, ":"));
    end = write(&expected, end, "\n");
    return std.mem.eql(u8, known[0..bytes], expected[0..end]);
}

/// From /proc, since how `main` gets its arguments differs between versions of Zig.
fn commandLine(buffer: *[256]u8) ?[]const u8 {
    var path: [20]u8 = @splat(0);
    _ = write(&path, 0, "/proc/self/cmdline");
    const bytes = read(&path, buffer) orelse return null;
    return buffer[0..bytes];
}

/// What is at a path that ends with a zero. Returns the number of bytes: one or more.
fn read(path: []const u8, buffer: []u8) ?usize {
    const fd = sys.call(.openat, .{ at_fdcwd, @intFromPtr(path.ptr), open_cloexec, 0, 0, 0 });
    if (fd < 0) return null;
    const bytes = sys.call(.read, .{ word(fd), @intFromPtr(buffer.ptr), buffer.len, 0, 0, 0 });
    return if (bytes > 0) @intCast(bytes) else null;
}

/// What stands after the program's name.
fn argument(line: []const u8) []const u8 {
    var start: usize = 0;
    while (start < line.len and line[start] != 0) start += 1;
    start = @min(start + 1, line.len);
    var end = start;
    while (end < line.len and line[end] != 0) end += 1;
    return line[start..end];
}

/// Of "ublkc7", "ublkb7" or a partition, "ublkb7p1".
fn deviceId(name: []const u8) ?u32 {
    const prefix = "ublk";
    if (name.len < prefix.len + 2) return null;
    for (prefix, name[0..prefix.len]) |expected, got| {
        if (expected != got) return null;
    }
    if (name[prefix.len] != 'b' and name[prefix.len] != 'c') return null;
    var id: u32 = 0;
    var digits: usize = 0;
    for (name[prefix.len + 1 ..]) |character| {
        if (character < '0' or character > '9') break;
        id = id * 10 + (character - '0');
        digits += 1;
        if (digits > 7) return null;
    }
    return if (digits > 0) id else null;
}

fn deviceInfo(id: u32) ?DevInfo {
    var control: *ring.Control = undefined;
    if (ring.controlInit(&control) < 0) return null;
    const path: [*:0]const u8 = "/dev/ublk-control";
    const flags = open_rdwr | open_cloexec;
    const fd = sys.call(.openat, .{ at_fdcwd, @intFromPtr(path), flags, 0, 0, 0 });
    if (fd < 0) return null;
    const char_path = "/dev/ublkc";
    for (char_path, 0..) |character, i| control.payloads[i] = character;
    // Zeroes follow: the end of the path, and room for the answer on an even address.
    _ = decimal(id, &control.payloads, char_path.len);
    const path_bytes = 32;
    const result = ring.controlSubmit(control, &.{
        .control_fd = fd,
        .opcode = get_dev_info2,
        .device_id = id,
        .queue_id = 0xffff,
        .payload = 0,
        .payload_len = path_bytes + @sizeOf(DevInfo),
        .dev_path_len = path_bytes,
        .apart = 0,
        .data = 0,
    });
    if (result < 0) return null;
    var out: [2]i32 = undefined;
    const pause = extern struct { seconds: i64, nanoseconds: i64 }{ .seconds = 0, .nanoseconds = 1_000_000 };
    for (0..5000) |_| {
        const reaped = ring.controlReap(control, &out);
        if (reaped < 0) return null;
        if (reaped == 1) {
            if (out[1] < 0) return null;
            const answer: *const DevInfo = @ptrCast(@alignCast(&control.payloads[path_bytes]));
            return answer.*;
        }
        _ = sys.call(.nanosleep, .{ @intFromPtr(&pause), 0, 0, 0, 0, 0 });
    }
    return null;
}

fn word(fd: i32) usize {
    return @intCast(fd);
}

/// Writes text at `start`. Returns where it ends.
fn write(to: []u8, start: usize, text: []const u8) usize {
    for (text, start..) |character, i| to[i] = character;
    return start + text.len;
}

/// Writes a number at `start`. Returns where it ends.
fn decimal(value: u32, text: []u8, start: usize) usize {
    var divisor: u32 = 1;
    while (value / divisor >= 10) divisor *= 10;
    var at = start;
    while (divisor > 0) : (divisor /= 10) {
        text[at] = '0' + @as(u8, @intCast(value / divisor % 10));
        at += 1;
    }
    return at;
}
