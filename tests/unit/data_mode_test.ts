// SPDX-License-Identifier: MIT
/** Which way the data of a device goes, and what those are told who get another. */
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  UBLK_F_AUTO_BUF_REG,
  UBLK_F_BATCH_IO,
  UBLK_F_NEED_GET_DATA,
  UBLK_F_SUPPORT_ZERO_COPY,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_USER_COPY,
  UBLK_F_USER_RECOVERY,
} from "../../abi/ublk_cmd.ts";
import { describeLack } from "../../core/control.ts";
import { UsageError } from "../../core/error.ts";
import type { ZeroCopyOffer } from "../../core/target.ts";
import {
  chooseDataMode,
  chooseZeroCopy,
  type DataWish,
  notesOf,
  zeroCopyOf,
} from "../../core/data_mode.ts";

const ABLE: ZeroCopyOffer = { memoryAlignBytes: 512 };
const UNABLE: ZeroCopyOffer = { obstacle: "the moon is full" };
const BOTH = UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY;
const NONE = UBLK_F_USER_COPY;

test("chooseZeroCopy takes it by default, where kernel and target allow it", () => {
  assert.deepStrictEqual(chooseZeroCopy("auto", ABLE, BOTH | NONE), {
    flags: BOTH,
    notes: ["zero copy"],
  });
  assert.deepStrictEqual(chooseZeroCopy("auto", undefined, BOTH), { flags: 0n, notes: [] });
  const reserved = { memoryAlignBytes: 1, whenAsked: true } as const;
  assert.deepStrictEqual(chooseZeroCopy("auto", reserved, BOTH), { flags: 0n, notes: [] });
  assert.strictEqual(chooseZeroCopy("on", reserved, BOTH).flags, BOTH);
});

test("chooseZeroCopy says why it is off", () => {
  const why = (...args: Parameters<typeof chooseZeroCopy>) => {
    const { flags, notes } = chooseZeroCopy(...args);
    assert.strictEqual(flags, 0n);
    return notes[0];
  };
  assert.strictEqual(why("auto", UNABLE, BOTH), "zero copy: off, the moon is full");
  assert.strictEqual(why("off", ABLE, BOTH), "zero copy: off, as asked");
  assert.strictEqual(why("off", undefined, BOTH), undefined);
  for (const features of [NONE, UBLK_F_SUPPORT_ZERO_COPY]) {
    const lack = /^zero copy: off, kernel \S+ lacks AUTO_BUF_REG \(needs 6\.16\)$/;
    assert.match(why("auto", ABLE, features)!, lack);
  }
});

test("chooseZeroCopy asks for what is insisted on, be it there or not: the driver refuses", () => {
  for (const features of [BOTH, NONE]) {
    assert.strictEqual(chooseZeroCopy("on", ABLE, features).flags, BOTH);
    assert.strictEqual(chooseZeroCopy("reg", ABLE, features).flags, UBLK_F_SUPPORT_ZERO_COPY);
  }
  for (const wish of ["on", "reg"] as const) {
    assert.throws(
      () => chooseZeroCopy(wish, UNABLE, BOTH),
      (error) => error instanceof UsageError && error.message.endsWith("the moon is full"),
    );
    assert.throws(() => chooseZeroCopy(wish, undefined, BOTH), UsageError);
  }
});

/** The driver has all that is asked for here. */
const choose = (wish: DataWish, offer: ZeroCopyOffer | undefined, deviceFlags = 0n) =>
  chooseDataMode(wish, offer, deviceFlags, BOTH);

const refuses = (message: RegExp, ...args: Parameters<typeof choose>) =>
  assert.throws(
    () => choose(...args),
    (error) => error instanceof UsageError && message.test(error.message),
    `${message}`,
  );

test("chooseDataMode gives what is asked for in place of zero copy, whatever the target", () => {
  assert.deepStrictEqual(choose({}, ABLE), { flags: BOTH, notes: ["zero copy"] });
  for (const offer of [ABLE, UNABLE, undefined]) {
    for (const zeroCopy of ["auto", "off"] as const) {
      assert.deepStrictEqual(choose({ zeroCopy, userCopy: true }, offer), {
        flags: UBLK_F_USER_COPY,
        notes: ["user copy"],
      });
      assert.deepStrictEqual(choose({ zeroCopy, needGetData: true }, offer), {
        flags: UBLK_F_NEED_GET_DATA,
        notes: ["get data"],
      });
    }
  }
});

test("chooseDataMode refuses two ways at once", () => {
  const [userCopy, needGetData, zeroCopy] = [true, true, "on"] as const;
  refuses(/not zero copy and user copy$/, { zeroCopy, userCopy }, ABLE);
  refuses(/not zero copy and get data$/, { zeroCopy: "reg", needGetData }, ABLE);
  refuses(/not user copy and get data$/, { userCopy, needGetData }, ABLE);
  refuses(/not zero copy and user copy and get data$/, { zeroCopy, userCopy, needGetData }, ABLE);
});

test("chooseDataMode knows what the driver denies to unprivileged devices", () => {
  const flags = UBLK_F_UNPRIVILEGED_DEV;
  const { notes } = choose({}, ABLE, flags);
  assert.deepStrictEqual(notes, ["zero copy: off, the driver denies it to unprivileged devices"]);
  refuses(/Zero copy .* denies it to unprivileged/, { zeroCopy: "on" }, ABLE, flags);
  refuses(/User copy .* denies it to unprivileged/, { userCopy: true }, undefined, flags);
  const getData = choose({ needGetData: true }, undefined, flags);
  assert.strictEqual(getData.flags, UBLK_F_NEED_GET_DATA);
});

test("chooseDataMode adds batches to any way but get data", () => {
  const batch = true;
  assert.deepStrictEqual(choose({ batch }, ABLE), {
    flags: BOTH | UBLK_F_BATCH_IO,
    notes: ["zero copy", "batches"],
  });
  assert.deepStrictEqual(choose({ batch, userCopy: true }, ABLE), {
    flags: UBLK_F_USER_COPY | UBLK_F_BATCH_IO,
    notes: ["user copy", "batches"],
  });
  assert.strictEqual(choose({ batch }, undefined).flags, UBLK_F_BATCH_IO);
  refuses(/no get data with batches$/, { batch, needGetData: true }, undefined);
});

test("notesOf says of a device that is taken over what its flags say", () => {
  assert.deepStrictEqual(notesOf(UBLK_F_USER_COPY, ABLE), ["user copy"]);
  assert.deepStrictEqual(notesOf(UBLK_F_NEED_GET_DATA, ABLE), ["get data"]);
  assert.deepStrictEqual(notesOf(BOTH, ABLE), ["zero copy"]);
  assert.deepStrictEqual(notesOf(BOTH | UBLK_F_BATCH_IO, ABLE), ["zero copy", "batches"]);
  assert.deepStrictEqual(notesOf(0n, ABLE), ["zero copy: off, as before"]);
  assert.deepStrictEqual(notesOf(0n, undefined), []);
});

test("zeroCopyOf reads the choice from a device's flags", () => {
  assert.strictEqual(zeroCopyOf(NONE), undefined);
  assert.deepStrictEqual(zeroCopyOf(NONE | BOTH), { automatic: true });
  assert.deepStrictEqual(zeroCopyOf(UBLK_F_SUPPORT_ZERO_COPY), { automatic: false });
});

test("describeLack names the youngest feature, since a kernel with that has the others", () => {
  assert.match(describeLack(BOTH | UBLK_F_USER_RECOVERY), /lacks AUTO_BUF_REG \(needs 6\.16\)$/);
  assert.match(describeLack(1n << 60n), /lacks a feature \(needs a later one\)$/);
});
