// SPDX-License-Identifier: MIT
//! System calls without libc, and the five C symbols that liburing.a expects of one.
//! Everything returns >= 0 or -errno.

const std = @import("std");
const linux = std.os.linux;

pub const EINTR = 4;
pub const EIO = 5;
pub const EBADF = 9;
pub const EAGAIN = 11;
pub const ENOMEM = 12;
pub const EACCES = 13;
pub const EBUSY = 16;
pub const ENODEV = 19;
pub const EINVAL = 22;
pub const ENFILE = 23;
pub const ENOBUFS = 105;

pub const IoVec = extern struct { base: usize, len: usize };

pub const Failure = error{ NoMemory, NoAccess, NoDevice, Invalid, Other };

pub fn errnoOf(failure: Failure) i32 {
    return switch (failure) {
        error.NoMemory => -ENOMEM,
        error.NoAccess => -EACCES,
        error.NoDevice => -ENODEV,
        error.Invalid, error.Other => -EINVAL,
    };
}

pub fn call(number: linux.SYS, a: [6]usize) i32 {
    const result: isize = @bitCast(linux.syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]));
    return @intCast(@min(result, 0x7fffffff));
}

const prot_read = 1;
const prot_write = 2;
const map_shared = 1;
const map_private = 2;
const map_anonymous = 0x20;
const map_noreserve = 0x4000;
const map_populate = 0x8000;

fn map(bytes: usize, prot: usize, flags: usize, fd: i32, offset: usize) Failure!usize {
    const descriptor: usize = @bitCast(@as(isize, fd));
    const result = linux.syscall6(.mmap, 0, bytes, prot, flags, descriptor, offset);
    const signed: isize = @bitCast(result);
    if (signed >= 0 or signed < -4095) return result;
    return switch (-signed) {
        ENOMEM => error.NoMemory,
        1, EACCES => error.NoAccess,
        ENODEV, 6 => error.NoDevice,
        EINVAL => error.Invalid,
        else => error.Other,
    };
}

/// Zeroed private memory, without a promise of swap: deep queues map far more than they touch.
pub fn mapMemory(bytes: usize) Failure!usize {
    return map(bytes, prot_read | prot_write, map_private | map_anonymous | map_noreserve, -1, 0);
}

/// Zeroed memory that processes have in common which this one forks.
pub fn mapShared(bytes: usize) Failure!usize {
    return map(bytes, prot_read | prot_write, map_shared | map_anonymous, -1, 0);
}

/// Read-only shared mapping; ublk refuses a writable one.
pub fn mapFile(fd: i32, bytes: usize, offset: usize) Failure!usize {
    return map(bytes, prot_read, map_shared | map_populate, fd, offset);
}

pub fn unmap(address: usize, bytes: usize) void {
    _ = linux.syscall2(.munmap, address, bytes);
}

/// Private memory there reads as zeroes then.
pub fn dropPages(address: usize, bytes: usize) void {
    const madv_dontneed = 4;
    _ = linux.syscall3(.madvise, address, bytes, madv_dontneed);
}

pub fn roundUp(value: usize, unit: usize) usize {
    return (value + unit - 1) / unit * unit;
}

/// A byte offset or length that came from a JavaScript number: exact up to 2^53.
pub fn fileOffset(value: f64) ?u64 {
    if (!(value >= 0 and value <= 0x1p53)) return null;
    return @intFromFloat(value);
}

pub fn powerOfTwo(value: u32) u32 {
    var power: u32 = 1;
    while (power < value) power *= 2;
    return power;
}

// What liburing.a asks of a C library. calloc and free serve io_uring_get_probe only, which is
// never called: they refuse. The stack canary is a constant, its failure a trap.
export fn calloc(_: usize, _: usize) callconv(.c) ?*anyopaque {
    return null;
}
export fn malloc(_: usize) callconv(.c) ?*anyopaque {
    return null;
}
export fn free(_: ?*anyopaque) callconv(.c) void {}
export fn __stack_chk_fail() callconv(.c) noreturn {
    @trap();
}
export var __stack_chk_guard: usize = 0x5bd1e995_2f6b91c7;
export fn memset(to: [*]u8, value: c_int, bytes: usize) callconv(.c) [*]u8 {
    const target: [*]volatile u8 = to;
    for (0..bytes) |i| target[i] = @truncate(@as(c_uint, @bitCast(value)));
    return to;
}
export fn memcpy(noalias to: [*]u8, noalias from: [*]const u8, bytes: usize) callconv(.c) [*]u8 {
    const target: [*]volatile u8 = to;
    for (0..bytes) |i| target[i] = from[i];
    return to;
}
