// SPDX-License-Identifier: MIT
/** Failures in words (core/error.ts) and as exit codes and JSON (cli/exit.ts). */
import assert from "node:assert/strict";
import { test } from "node:test";
import { ERRNO } from "../../abi/errno.ts";
import { EXIT, EXIT_MEANINGS, ReportedError, toFailure } from "../../cli/exit.ts";
import { assert as invariant, AssertionError } from "../../core/assert.ts";
import { describeThrown, plainPaths, UblkError, UsageError } from "../../core/error.ts";

test("UblkError says action, device, errno with its text, and what to do", () => {
  const error = new UblkError({ errno: "EEXIST", operation: "ADD_DEV", device: 3 });
  assert.strictEqual(
    error.message,
    "Cannot ADD_DEV on device 3: EEXIST, File exists " +
      "(choose another id with -n, or delete that device with ubd del -n ID)",
  );
  assert.strictEqual(error.name, "UblkError");
  assert.strictEqual(error.errno, "EEXIST");
  assert.strictEqual(error.operation, "ADD_DEV");
  assert.strictEqual(error.device, 3);
  assert.match(error.hint!, /^choose another id/);
});

test("UblkError leaves out what it does not know", () => {
  const message = (details: ConstructorParameters<typeof UblkError>[0]) =>
    new UblkError(details).message;
  assert.strictEqual(
    message({ errno: "EIO", operation: "open /a.img" }),
    "Cannot open /a.img: EIO, Input/output error",
  );
  assert.strictEqual(
    message({ errno: "EIO", operation: "DEL_DEV", device: 0 }),
    "Cannot DEL_DEV on device 0: EIO, Input/output error",
  );
  assert.strictEqual(
    message({ errno: "ENOTREAL", operation: "STOP_DEV" }),
    "Cannot STOP_DEV: ENOTREAL",
  );
});

test("UblkError prefers the caller's hint to the table's, and keeps the cause", () => {
  const cause = new Error("below");
  const error = new UblkError({ errno: "EEXIST", operation: "ADD_DEV", hint: "go away", cause });
  assert.match(error.message, /: EEXIST, File exists \(go away\)$/);
  assert.strictEqual(error.hint, "go away");
  assert.strictEqual(error.cause, cause);
});

test("UblkError.from names a negative result, also one that no table knows", () => {
  const error = UblkError.from(-ERRNO.EBUSY, "lock /a.img", { device: 7, hint: "wait" });
  assert.strictEqual(
    error.message,
    "Cannot lock /a.img on device 7: EBUSY, Device or resource busy (wait)",
  );
  assert.match(UblkError.from(-4095, "ADD_DEV").message, /^Cannot ADD_DEV: .*4095/);
});

test("UblkError's hints say how to get a driver, a ring, permission and a free id", () => {
  const hints: [string, string, RegExp][] = [
    ["open the control device", "ENOENT", /modprobe ublk_drv/],
    ["open the control device", "ENXIO", /modprobe ublk_drv/],
    ["open the control device", "EACCES", /root/],
    ["set up a ring", "EPERM", /kernel\.io_uring_disabled=0/],
    ["set up a ring", "ENOSYS", /CONFIG_IO_URING/],
    ["set up a ring", "ENOMEM", /ulimit -l/],
    ["set up a ring", "EMFILE", /ulimit -n/],
    ["ADD_DEV", "EACCES", /ublks_max/],
    ["STOP_DEV", "ENODEV", /ubd list/],
    ["DEL_DEV", "ENODEV", /ubd list/],
    ["GET_DEV_INFO", "ENODEV", /ubd list/],
  ];
  for (const [operation, errno, hint] of hints) {
    const error = new UblkError({ errno, operation });
    assert.match(error.hint ?? "", hint, `${operation} ${errno}`);
    assert.ok(error.message.endsWith(` (${error.hint})`));
  }
  assert.strictEqual(new UblkError({ errno: "ENOENT", operation: "ADD_DEV" }).hint, undefined);
});

test("toFailure gives each class of failure its exit code", () => {
  const ublk = (errno: string, operation: string) => new UblkError({ errno, operation });
  const table: [unknown, number][] = [
    [new UsageError("Queue depth 0"), 2],
    [ublk("EIO", "START_DEV"), 1],
    [ublk("EINVAL", "ADD_DEV"), 1],
    [ublk("ENOENT", "open /absent.img"), 1],
    [ublk("EISDIR", "open /tmp"), 1],
    [ublk("ENODEV", "GET_DEV_INFO"), 3],
    [ublk("EBUSY", "lock /a.img"), 4],
    [ublk("EEXIST", "ADD_DEV"), 4],
    [ublk("EPERM", "ADD_DEV"), 5],
    [ublk("EACCES", "open /a.img"), 5],
    [ublk("EACCES", "open the control device"), 5],
    [ublk("ENOENT", "open the control device"), 6],
    [ublk("ENXIO", "open the control device"), 6],
    [ublk("ENODEV", "open the control device"), 6],
    [ublk("EPERM", "set up a ring"), 6],
    [ublk("ENOSYS", "set up a ring"), 6],
    [ublk("ETIMEDOUT", "STOP_DEV"), 7],
    [new AssertionError("double commit"), 70],
    [new TypeError("x is not a function"), 70],
    ["thrown text", 70],
    [undefined, 70],
  ];
  for (const [error, code] of table) {
    assert.strictEqual(toFailure(error).exitCode, code, String(error));
  }
});

test("toFailure is plain JSON with the parts of a UblkError", () => {
  const full = toFailure(new UblkError({ errno: "EEXIST", operation: "ADD_DEV", device: 0 }));
  assert.deepStrictEqual(JSON.parse(JSON.stringify(full)), {
    message: "Cannot ADD_DEV on device 0: EEXIST, File exists " +
      "(choose another id with -n, or delete that device with ubd del -n ID)",
    exitCode: 4,
    errno: "EEXIST",
    operation: "ADD_DEV",
    device: 0,
    hint: "choose another id with -n, or delete that device with ubd del -n ID",
  });
  const sparse = toFailure(new UblkError({ errno: "EIO", operation: "START_DEV" }));
  assert.deepStrictEqual(Object.keys(sparse).sort(), [
    "errno",
    "exitCode",
    "message",
    "operation",
  ]);
  assert.deepStrictEqual(toFailure(new UsageError("Which file?")), {
    message: "Which file?",
    exitCode: 2,
  });
});

test("toFailure hands on what another process has put into words", () => {
  const failure = toFailure(new UblkError({ errno: "EBUSY", operation: "lock a.img" }));
  assert.deepStrictEqual(toFailure(new ReportedError(failure)), failure);
});

test("toFailure asks for a report of a bug, with the stack", () => {
  const { message } = toFailure(new AssertionError("more commands than tags"));
  assert.match(message, /^this is a bug in ubd, please report it: .*more commands than tags/);
  assert.match(message, /error_test\.ts/);
  assert.match(toFailure("thrown text").message, /thrown text$/);
});

test("EXIT_MEANINGS explains every exit code once, in order", () => {
  assert.deepStrictEqual(EXIT_MEANINGS.map(([code]) => code), Object.values(EXIT));
  assert.strictEqual(new Set(EXIT_MEANINGS.map(([code]) => code)).size, EXIT_MEANINGS.length);
  for (const [, meaning] of EXIT_MEANINGS) assert.notStrictEqual(meaning, "");
});

test("assert throws an AssertionError with its literal, only when the condition is false", () => {
  invariant(true, "not thrown");
  assert.throws(() => invariant(false, "a queue runs once"), (error) => {
    return error instanceof AssertionError && error.name === "AssertionError" &&
      error.message === "a queue runs once";
  });
});

test("plainPaths names files by their paths", () => {
  assert.strictEqual(plainPaths("at f (file:///tmp/a%20b%3F.ts:1:2)"), "at f (/tmp/a b?.ts:1:2)");
  assert.strictEqual(plainPaths("see file:///tmp/%zz"), "see file:///tmp/%zz");
});

test("describeThrown keeps the frames of a target's author, and shows whatever was thrown", () => {
  const error = new TypeError("too deep");
  const own = new URL("../../core/queue.ts", import.meta.url).href;
  error.stack = "TypeError: too deep\n    at read (file:///home/a/x.ts:2:9)\n" +
    `    at turn (${own}:5:6)\n    at async ${own}:7:8\n    at ext:core/01_core.js:1:1\n` +
    "    at /home/a/ubd/y.ts:3:1";
  assert.strictEqual(
    describeThrown(error),
    "TypeError: too deep\n    at read (/home/a/x.ts:2:9)\n    at /home/a/ubd/y.ts:3:1",
  );
  assert.match(describeThrown(new Error("here")), /^Error: here\n +at .*error_test\.ts:\d+/);
  assert.strictEqual(describeThrown(null), "null");
  assert.strictEqual(describeThrown("text"), "text");
  assert.strictEqual(describeThrown(Object.create(null)), "a object that cannot be shown");
});
