// SPDX-License-Identifier: MIT
/**
 * The one symbol table: what shim/shim.zig exports, in types neutral to the runtimes.
 *
 * Only `u32`, `i32` and `f64` cross on the data path, because 64-bit integers cost a BigInt or a
 * slow path. `buffer` is a typed array whose memory the shim uses during the call only, unless it
 * says otherwise.
 * @module
 */

export type NativeType = "u32" | "i32" | "f64" | "buffer";

export interface NativeFunction {
  readonly args: readonly NativeType[];
  readonly result: Exclude<NativeType, "buffer">;
}

export const SYMBOLS = {
  ubd_version: { args: [], result: "i32" },
  ubd_layout: { args: ["buffer", "u32"], result: "i32" },
  ubd_queue_init: { args: ["buffer", "buffer"], result: "i32" },
  ubd_queue_address: { args: ["u32", "u32"], result: "f64" },
  ubd_step: { args: ["u32", "u32", "u32"], result: "i32" },
  ubd_queue_notify: { args: ["u32", "i32"], result: "i32" },
  ubd_buffer_map: { args: ["u32"], result: "f64" },
  ubd_buffer_use: { args: ["u32", "u32", "f64"], result: "i32" },
  ubd_buffer_drop: { args: ["f64", "u32", "u32"], result: "i32" },
  ubd_queue_exit: { args: ["u32"], result: "i32" },
  ubd_control_init: { args: [], result: "i32" },
  ubd_control_address: { args: ["u32"], result: "f64" },
  ubd_control_submit: { args: ["u32", "buffer"], result: "i32" },
  ubd_control_reap: { args: ["u32", "buffer"], result: "i32" },
  ubd_control_exit: { args: ["u32"], result: "i32" },
  ubd_open: { args: ["buffer", "u32"], result: "i32" },
  ubd_close: { args: ["i32"], result: "i32" },
  ubd_flock: { args: ["i32", "u32"], result: "i32" },
  ubd_send_datagram: { args: ["buffer", "u32", "buffer", "u32"], result: "i32" },
  ubd_fdatasync: { args: ["i32"], result: "i32" },
  ubd_fallocate: { args: ["i32", "u32", "f64", "f64"], result: "i32" },
  ubd_probe_read: { args: ["i32", "u32", "f64"], result: "i32" },
  ubd_statx: { args: ["i32", "u32", "buffer"], result: "i32" },
  ubd_ioctl: { args: ["i32", "u32", "buffer"], result: "i32" },
  ubd_eventfd: { args: ["u32"], result: "i32" },
  ubd_wait: { args: ["i32"], result: "i32" },
  ubd_wake: { args: ["i32"], result: "i32" },
  ubd_close_on_exec: { args: [], result: "i32" },
  ubd_keep_on_exec: { args: ["i32"], result: "i32" },
  ubd_pidfd_open: { args: ["i32"], result: "i32" },
  ubd_pidfd_signal: { args: ["i32", "i32"], result: "i32" },
  ubd_raise_limit: { args: ["u32", "buffer"], result: "i32" },
  ubd_set_limit: { args: ["u32", "buffer"], result: "i32" },
  ubd_set_affinity: { args: ["i32", "buffer"], result: "i32" },
  ubd_narrow_affinity: { args: ["buffer"], result: "i32" },
  ubd_gettid: { args: [], result: "i32" },
  ubd_leave_mounts: { args: ["buffer", "u32"], result: "i32" },
  ubd_rejoin_mounts: { args: ["buffer"], result: "i32" },
  ubd_detach_mount: { args: ["buffer"], result: "i32" },
  ubd_io_flusher: { args: ["i32"], result: "i32" },
  ubd_execute: { args: ["buffer", "buffer", "u32", "buffer", "u32"], result: "i32" },
  ubd_lock_memory: { args: [], result: "i32" },
  ubd_mknod: { args: ["buffer", "u32", "u32", "u32"], result: "i32" },
} as const satisfies Record<string, NativeFunction>;

type Crossing<T extends NativeType> = T extends "buffer" ? ArrayBufferView | null : number;

type Arguments<T extends readonly NativeType[]> = {
  -readonly [I in keyof T]: Crossing<T[I]>;
};

/** The table's functions as TypeScript calls them. */
export type Native<Table extends Record<string, NativeFunction> = typeof SYMBOLS> = {
  readonly [Name in keyof Table]: (...args: Arguments<Table[Name]["args"]>) => number;
};

/** What each runtime's adapter exports: all that differs between them. */
export interface Adapter {
  /** Name and version, for `ubd version`. */
  readonly runtime: string;
  /** Whether it runs in memory that is locked: V8 ends when the kernel refuses to drop pages. */
  readonly canLockMemory: boolean;
  /** A server's: in it, a process that has nothing to do does nothing, and believes no cache. */
  readonly restfulEnvironment: Readonly<Record<string, string>>;
  /** What to put behind process.execPath to start this program again; empty when compiled. */
  rerunArguments(): string[];
  /** Undoes raw DEFLATE. */
  inflate(bytes: Uint8Array<ArrayBuffer>): Uint8Array;
  /** Loads a shared library. Throws the runtime's own error when it cannot. */
  load<Table extends Record<string, NativeFunction>>(path: string, table: Table): Native<Table>;
  /** A view of native memory, no copy. The caller knows how long the memory lives. */
  view(address: number, sizeBytes: number): ArrayBuffer;
  /** What imports this file; undefined: the runtime cannot load a module by such a path. */
  specifierOf(file: string): string | undefined;
  /** Lets modules loaded from now on import these by their names, if nothing else does. */
  provideLibrary(modules: Record<string, () => Promise<object>>): void;
  /** Makes an eventfd and calls `signalled` on the event loop whenever it has been written. */
  watch(shim: { path: string; native: Native }, signalled: () => void): Watch | number;
}

/** An eventfd that the event loop listens to, without polling. */
export interface Watch {
  readonly fd: number;
  close(): void;
}
