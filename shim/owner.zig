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
const open_cloexec = 0o2000000;
const open_rdwr = 2;

pub fn main() void {
    linux.exit(if (give()) 0 else 1);
}

fn give() bool {
    var arguments: [256]u8 = undefined;
    const name = argument(commandLine(&arguments) orelse return false);
    const info = deviceInfo(deviceId(name) orelse return false) orelse return false;
    if (info.flags & unprivileged == 0) return true;
    var path: [64]u8 = @splat(0);
    const directory = "/dev/";
    if (name.len >= path.len - directory.len) return false;
    for (directory, 0..) |character, i| path[i] = character;
    for (name, directory.len..) |character, i| path[i] = character;
    const at = @intFromPtr(&path);
    const owner = sys.call(.fchownat, .{ at_fdcwd, at, info.owner_uid, info.owner_gid, 0, 0 });
    return owner >= 0 and sys.call(.fchmodat, .{ at_fdcwd, at, 0o600, 0, 0, 0 }) >= 0;
}

/// From /proc, since how `main` gets its arguments differs between versions of Zig.
fn commandLine(buffer: *[256]u8) ?[]const u8 {
    const path: [*:0]const u8 = "/proc/self/cmdline";
    const fd = sys.call(.openat, .{ at_fdcwd, @intFromPtr(path), open_cloexec, 0, 0, 0 });
    if (fd < 0) return null;
    const bytes = sys.call(.read, .{ @intCast(fd), @intFromPtr(buffer), buffer.len, 0, 0, 0 });
    return if (bytes > 0) buffer[0..@intCast(bytes)] else null;
}

/// What stands behind the program's name.
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
