// SPDX-License-Identifier: MIT
/** Bun's side of the FFI. The import is dynamic, so that bundles also load under Deno. @module */

import { realpathSync } from "node:fs";
import { pathToFileURL } from "node:url";
import type { Adapter, Native, NativeFunction } from "./symbols.ts";

const { dlopen, toArrayBuffer } = await import("bun:ffi");

const TYPE_NAMES = { u32: "u32", i32: "i32", f64: "f64", buffer: "ptr" } as const;

export const adapter: Adapter = {
  runtime: `Bun ${process.versions.bun}`,
  canLockMemory: true,
  restfulEnvironment: {
    // Else the main thread wakes every few seconds to look at its heap.
    BUN_GC_TIMER_DISABLE: "1",
    // Else modules come from $HOME/.bun or XDG_CACHE_HOME, compiled there by whoever it was.
    BUN_RUNTIME_TRANSPILER_CACHE_PATH: "0",
  },

  rerunArguments() {
    if (import.meta.url.includes("/$bunfs/")) return [];
    return [...process.execArgv, process.argv[1]!]; // Without the directory's settings, again.
  },

  // Loading node:zlib takes as long as starting Bun.
  inflate: (bytes) => Bun.inflateSync(bytes),

  load<Table extends Record<string, NativeFunction>>(path: string, table: Table): Native<Table> {
    const entries = Object.entries(table).map(([name, { args, result }]) => [
      name,
      { args: args.map((type) => TYPE_NAMES[type]), returns: TYPE_NAMES[result] },
    ]);
    return dlopen(path, Object.fromEntries(entries)).symbols as unknown as Native<Table>;
  },

  view(address, sizeBytes) {
    return toArrayBuffer(address as Parameters<typeof toArrayBuffer>[0], 0, sizeBytes);
  },

  specifierOf(file) {
    // Bun 1.4.5 takes the one for the beginning of a query, the other for a slash.
    return /[?\\]/.test(realpathSync(file)) ? undefined : pathToFileURL(file).href;
  },

  provideLibrary(modules) {
    Bun.plugin({
      name: "ubd",
      setup(build) {
        for (const [name, load] of Object.entries(modules)) {
          build.module(name, async () => ({ loader: "object", exports: { ...await load() } }));
        }
      },
    });
  },

  watch({ native }, signalled) {
    const fd = native.ubd_eventfd(1);
    if (fd < 0) return fd;
    const reader = Bun.file(fd).stream().getReader();
    let closed = false;
    (async () => {
      while (!closed && !(await reader.read()).done) signalled();
    })();
    return {
      fd,
      close() {
        closed = true;
        reader.cancel(); // Closes its own copy.
        native.ubd_close(fd);
      },
    };
  },
};
