// SPDX-License-Identifier: MIT
/**
 * How the bytes of requests travel: copied by the driver to and from buffers of the server, at once
 * or (get data) when the server asks; copied by the server itself (user copy); or not at all, as
 * registered buffers of the queues' rings. And how requests do: one by one, or in batches. Decided
 * once, when a device is added; the driver keeps the decision in the device's flags, where recovery
 * finds it.
 * @module
 */

import {
  UBLK_F_AUTO_BUF_REG,
  UBLK_F_BATCH_IO,
  UBLK_F_NEED_GET_DATA,
  UBLK_F_SUPPORT_ZERO_COPY,
  UBLK_F_UNPRIVILEGED_DEV,
  UBLK_F_USER_COPY,
} from "../abi/ublk_cmd.ts";
import { describeLack } from "./control.ts";
import { UsageError } from "./error.ts";
import type { ZeroCopyOffer } from "./target.ts";

/**
 * "auto": where kernel and target allow it. "on" and "reg" insist: buffers are registered by the
 * driver with each request (Linux 6.16), or by the queue with commands of its own (6.15).
 */
export type ZeroCopyWish = "auto" | "on" | "reg" | "off";

export const ZERO_COPY_WISHES: readonly ZeroCopyWish[] = ["auto", "on", "reg", "off"];

/** The driver registers; commands of the queue's own, for what it could not, take the other flag. */
const AUTOMATIC = UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY;

/** What may be asked for. The driver can do one of the first three. */
export interface DataWish {
  /** Default: "auto", unless one of the others is asked for. */
  zeroCopy?: ZeroCopyWish;
  /** The server copies data by reading and writing the character device. */
  userCopy?: boolean;
  /** The data of a WRITE is copied when the server asks for it. */
  needGetData?: boolean;
  /** Requests are fetched and answered many at a time. */
  batch?: boolean;
}

export interface DataMode {
  /** Of UBLK_F_*, for ADD_DEV. */
  flags: bigint;
  /** For a person, one line each. */
  notes: string[];
}

/**
 * @param deviceFlags the other UBLK_F_* that the device shall have.
 * @param features what the driver offers; what is insisted on is asked for nevertheless.
 * @throws {UsageError} target or driver cannot do what is insisted on, or two things exclude each
 * other.
 */
export function chooseDataMode(
  wish: DataWish,
  offer: ZeroCopyOffer | undefined,
  deviceFlags: bigint,
  features: bigint,
): DataMode {
  const { flags, notes } = chooseWay(wish, offer, deviceFlags, features);
  if (!wish.batch) return { flags, notes };
  if (wish.needGetData) throw new UsageError("The driver has no get data with batches");
  return { flags: flags | UBLK_F_BATCH_IO, notes: [...notes, "batches"] };
}

function chooseWay(
  { zeroCopy = "auto", userCopy = false, needGetData = false }: DataWish,
  offer: ZeroCopyOffer | undefined,
  deviceFlags: bigint,
  features: bigint,
): DataMode {
  const unprivileged = (deviceFlags & UBLK_F_UNPRIVILEGED_DEV) !== 0n;
  const denied = "the driver denies it to unprivileged devices";
  if (!userCopy && !needGetData) {
    return chooseZeroCopy(zeroCopy, offer && unprivileged ? { obstacle: denied } : offer, features);
  }
  const insisted = [
    ...(zeroCopy === "on" || zeroCopy === "reg" ? ["zero copy"] : []),
    ...(userCopy ? ["user copy"] : []),
    ...(needGetData ? ["get data"] : []),
  ];
  if (insisted.length > 1) {
    throw new UsageError(`A device's data goes one way: not ${insisted.join(" and ")}`);
  }
  if (userCopy && unprivileged) throw new UsageError(`User copy is not possible: ${denied}`);
  return { flags: userCopy ? UBLK_F_USER_COPY : UBLK_F_NEED_GET_DATA, notes: insisted };
}

/** The notes for a device that is taken over, as its flags say. */
export function notesOf(flags: bigint, offer: ZeroCopyOffer | undefined): string[] {
  const notes = [];
  if (flags & UBLK_F_USER_COPY) notes.push("user copy");
  else if (flags & UBLK_F_NEED_GET_DATA) notes.push("get data");
  else if (zeroCopyOf(flags)) notes.push("zero copy");
  else if (offer && !("whenAsked" in offer)) notes.push("zero copy: off, as before");
  if (flags & UBLK_F_BATCH_IO) notes.push("batches");
  return notes;
}

/**
 * @param features what the driver offers; what is insisted on is asked for nevertheless.
 * @throws {UsageError} the target cannot do what is insisted on.
 */
export function chooseZeroCopy(
  wish: ZeroCopyWish,
  offer: ZeroCopyOffer | undefined,
  features: bigint,
): DataMode {
  if (offer && "whenAsked" in offer && wish === "auto") return { flags: 0n, notes: [] };
  if (wish === "off") {
    return { flags: 0n, notes: offer ? ["zero copy: off, as asked"] : [] };
  }
  const obstacle = offer && "obstacle" in offer ? offer.obstacle : undefined;
  if (wish !== "auto" && (!offer || obstacle)) {
    const why = obstacle ?? "the target needs the bytes of its requests";
    throw new UsageError(`Zero copy is not possible: ${why}`);
  }
  if (!offer) return { flags: 0n, notes: [] };
  if (obstacle) return { flags: 0n, notes: [`zero copy: off, ${obstacle}`] };
  if (wish === "reg") return { flags: UBLK_F_SUPPORT_ZERO_COPY, notes: ["zero copy (reg)"] };
  const lacking = AUTOMATIC & ~features;
  if (wish === "auto" && lacking) {
    return { flags: 0n, notes: [`zero copy: off, ${describeLack(lacking)}`] };
  }
  return { flags: AUTOMATIC, notes: ["zero copy"] };
}

/** The way of zero copy that a device's flags stand for; undefined: data is copied. */
export function zeroCopyOf(flags: bigint): { automatic: boolean } | undefined {
  if (!(flags & AUTOMATIC)) return undefined;
  return { automatic: (flags & UBLK_F_AUTO_BUF_REG) !== 0n };
}
