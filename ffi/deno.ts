// SPDX-License-Identifier: MIT
/** Deno's side of the FFI. @module */

import process from "node:process";
import type { Adapter, Native, NativeFunction } from "./symbols.ts";

// Dynamic: what is imported at the top, a bundle loads under Bun too.
const { inflateRawSync } = await import("node:zlib");

/** So that a module the server loads can import "ubd": from source, or from dist/cli.js. */
function importMap(): string {
  const fromSource = import.meta.url.endsWith("/ffi/deno.ts");
  const at = (path: string) => new URL(path, import.meta.url).href;
  const imports = {
    ubd: at(fromSource ? "../mod.ts" : "./mod.js"),
    "ubd/testing": at(fromSource ? "../testing/mod.ts" : "./testing.js"),
  };
  const map = JSON.stringify({ imports });
  return `data:application/json,${encodeURIComponent(map)}`;
}

export const adapter: Adapter = {
  runtime: `Deno ${Deno.version.deno}`,
  canLockMemory: false,
  restfulEnvironment: {},

  rerunArguments() {
    if (Deno.build.standalone) return [];
    return ["run", "-A", "-q", `--import-map=${importMap()}`, process.argv[1]!];
  },

  inflate: (bytes) => inflateRawSync(bytes),

  load<Table extends Record<string, NativeFunction>>(path: string, table: Table): Native<Table> {
    const entries = Object.entries(table).map(([name, { args, result }]) => [
      name,
      { parameters: [...args], result },
    ]);
    const library = Deno.dlopen(path, Object.fromEntries(entries) as Deno.ForeignLibraryInterface);
    return library.symbols as unknown as Native<Table>;
  },

  view(address, sizeBytes) {
    const pointer = Deno.UnsafePointer.create(BigInt(address));
    if (pointer === null) throw new RangeError("Cannot view memory at address 0");
    return Deno.UnsafePointerView.getArrayBuffer(pointer, sizeBytes);
  },

  provideLibrary() {
    // rerunArguments has: Deno resolves names before it runs anything.
  },

  watch({ path, native }, signalled) {
    const fd = native.ubd_eventfd(0);
    if (fd < 0) return fd;
    const { symbols } = Deno.dlopen(path, {
      ubd_wait: { parameters: ["i32"], result: "i32", nonblocking: true },
    });
    let closed = false;
    (async () => {
      while (await symbols.ubd_wait(fd) >= 0 && !closed) signalled();
      native.ubd_close(fd);
    })();
    return {
      fd,
      close() {
        closed = true;
        native.ubd_wake(fd);
      },
    };
  },
};
