// SPDX-License-Identifier: MIT
/**
 * What went wrong: every failure of a control command, a file or the driver is a `UblkError`.
 *
 * Its message has one form, built here only: action, device, errno, and what to do next. Bad
 * arguments are `UsageError`s; anything else that is thrown is a bug.
 * @module
 */

import { errnoName, errnoText } from "../abi/errno.ts";
import { shownPath } from "../ffi/path.ts";

/** What a `UblkError` is made of. */
export interface UblkErrorDetails {
  /** Errno name, such as "EBUSY"; "ETIMEDOUT" when a deadline passed. */
  errno: string;
  /** What was being done, in the kernel's words where it has them: "ADD_DEV", "open /a.img". */
  operation: string;
  /** Device id, when there is one. */
  device?: number;
  /** What to do next, as an imperative. The default comes from the table below. */
  hint?: string;
  /** The error behind it. */
  cause?: unknown;
}

/**
 * A system failure.
 *
 * @example
 * ```ts
 * new UblkError({ errno: "EEXIST", operation: "ADD_DEV", device: 3 }).message;
 * // Cannot ADD_DEV on device 3: EEXIST, File exists (choose another id with -n, or ...)
 * ```
 */
export class UblkError extends Error {
  /** Always "UblkError". */
  override readonly name = "UblkError";
  /** Errno name, such as "EBUSY". */
  readonly errno: string;
  /** What was being done. */
  readonly operation: string;
  /** Device id, when there is one. */
  readonly device: number | undefined;
  /** What to do next. */
  readonly hint: string | undefined;

  /** The message is made of the details. */
  constructor({ errno, operation, device, hint, cause }: UblkErrorDetails) {
    const advice = hint ?? hintFor(operation, errno);
    const where = device === undefined ? "" : ` on device ${device}`;
    const text = errnoText(errno) === errno ? "" : errnoText(errno);
    const message = `Cannot ${operation}${where}: ${errno}${text ? `, ${text}` : ""}`;
    super(shownPath(message + (advice ? ` (${advice})` : "")), { cause });
    this.errno = errno;
    this.operation = operation;
    this.device = device;
    this.hint = advice;
  }

  /** What makes the same error again, without its cause: plain data. */
  get details(): UblkErrorDetails {
    const { errno, operation, device, hint } = this;
    return { errno, operation, ...(device !== undefined && { device }), ...(hint && { hint }) };
  }

  /** From a shim call's or a completion's negative result. */
  static from(
    result: number,
    operation: string,
    more: Omit<UblkErrorDetails, "errno" | "operation"> = {},
  ): UblkError {
    return new UblkError({ errno: errnoName(-result), operation, ...more });
  }
}

/** A mistake in what the caller asked for: nothing was tried. */
export class UsageError extends Error {
  /** Always "UsageError". */
  override readonly name = "UsageError";

  /** What was asked for, what there is, and what to say instead. */
  constructor(message: string, options?: ErrorOptions) {
    super(shownPath(message), options);
  }
}

/** An error on its way to another thread, where it would lose its class. */
export type PlainError =
  | { kind: "ublk"; details: UblkErrorDetails }
  | { kind: "usage"; message: string }
  | { kind: "other"; error: unknown };

export function toPlainError(error: unknown): PlainError {
  if (error instanceof UblkError) return { kind: "ublk", details: error.details };
  if (error instanceof UsageError) return { kind: "usage", message: error.message };
  return { kind: "other", error };
}

export function fromPlainError(plain: PlainError): Error {
  if (plain.kind === "ublk") return new UblkError(plain.details);
  if (plain.kind === "usage") return new UsageError(plain.message);
  return plain.error instanceof Error ? plain.error : new Error(String(plain.error));
}

const FROM_SOURCE = import.meta.url.endsWith("/core/error.ts");

/** Where this program's own code is: in directories of the checkout, or in a bundle. */
const OWN = FROM_SOURCE
  ? ["abi", "cli", "core", "ffi", "targets", "testing"].map((it) => pathOf(`../${it}/`))
  : [pathOf(import.meta.url)];

function pathOf(url: string): string {
  return decodeURIComponent(new URL(url, import.meta.url).pathname);
}

/** Names files by their paths, and a bundle, which nobody knows the inside of, by "ubd". */
export function plainPaths(text: string): string {
  const plain = text.replaceAll(/\bfile:\/\/(\/[^\s)]*)/g, (url, path) => {
    try {
      return decodeURIComponent(path);
    } catch {
      return url;
    }
  });
  return FROM_SOURCE ? plain : plain.replaceAll(OWN[0]!, "ubd");
}

/** Of a frame in Deno's own code, or Bun's. */
const RUNTIME_PLACE = /^(ext|internal|node:internal)[:/]/;

/**
 * What was thrown, which may be anything, with the frames of its stack that are its author's.
 * Never throws.
 */
export function describeThrown(error: unknown): string {
  try {
    const text = error instanceof Error ? String(error.stack ?? error.message) : String(error);
    const own = FROM_SOURCE ? OWN : ["ubd:"];
    const isForeign = (line: string) => {
      if (!/^\s+at /.test(line)) return false;
      const [place = ""] = /[^\s(]*$/.exec(line) ?? [];
      return own.some((path) => place.startsWith(path)) || RUNTIME_PLACE.test(place);
    };
    return plainPaths(text).split("\n").filter((line) => !isForeign(line)).join("\n");
  } catch {
    return `a ${typeof error} that cannot be shown`;
  }
}

const UNPRIVILEGED = "run as root; or, for devices of your own, once: sudo ubd udev install, " +
  "then: ubd add --unprivileged";

const HINTS: Record<string, Record<string, string>> = {
  "open the control device": {
    ENOENT: "load the driver: modprobe ublk_drv; a kernel without it needs CONFIG_BLK_DEV_UBLK",
    EACCES: UNPRIVILEGED,
    EPERM: UNPRIVILEGED,
    ENXIO: "load the driver: modprobe ublk_drv",
  },
  "set up a ring": {
    EPERM: "io_uring is disabled: sysctl kernel.io_uring_disabled=0, " +
      "or the container's seccomp profile forbids it",
    ENOSYS: "this kernel is built without io_uring (CONFIG_IO_URING)",
    ENOMEM: "lower --depth or --queues, or raise the locked-memory limit (ulimit -l)",
    EMFILE: "raise the limit of open files (ulimit -n)",
  },
  ADD_DEV: {
    EEXIST: "choose another id with -n, or delete that device with ubd del -n ID",
    EACCES: "too many devices: raise the limit in /sys/module/ublk_drv/parameters/ublks_max",
    EPERM: UNPRIVILEGED,
    EINVAL: "the driver refuses these queue, depth or feature values; see dmesg",
    ENOSPC: "choose an id below 1048576",
    ENOMEM: "lower --depth or --queues",
    ENODEV: "the driver does not say why: choose another id with -n, or see dmesg",
  },
  SET_PARAMS: { EINVAL: "the driver refuses these sizes or limits; see dmesg" },
  START_DEV: {
    EINVAL: "in a container, the server must run in the host's pid namespace",
    ENODEV: "its queues have ended, or the driver does not say why: see dmesg",
  },
  START_USER_RECOVERY: {
    EBUSY: "its server still lives or is only just ending: see ubd list",
    EINVAL: "it was not added with --recovery: ubd del -n ID, then add it again",
    ENODEV: "ubd list shows all devices",
  },
  STOP_DEV: { ENODEV: "ubd list shows all devices" },
  TRY_STOP_DEV: {
    EBUSY: "somebody has the block device open: see fuser -v /dev/ublkbN",
    ENODEV: "ubd list shows all devices",
  },
  DEL_DEV: {
    ENODEV: "ubd list shows all devices",
    EINTR: "something still holds its character device open: see fuser /dev/ublkcN",
  },
  GET_DEV_INFO: {
    ENODEV: "ubd list shows all devices",
    EPERM: "run as root",
    EACCES: "run as root or as the device's owner",
  },
};

function hintFor(operation: string, errno: string): string | undefined {
  return HINTS[operation]?.[errno];
}

/** Waits for work that may fail with one of these errors. */
export async function ignoring(errnos: string[], work: Promise<void>): Promise<void> {
  try {
    await work;
  } catch (error) {
    if (!(error instanceof UblkError && errnos.includes(error.errno))) throw error;
  }
}
