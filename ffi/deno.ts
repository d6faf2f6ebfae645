// SPDX-License-Identifier: MIT
/** Deno's side of the FFI. @module */

import { readFileSync } from "node:fs";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { isMainThread } from "node:worker_threads";
import type { Adapter, Native, NativeFunction } from "./symbols.ts";

// Dynamic: what is imported at the top, a bundle loads under Bun too.
const { inflateRawSync } = await import("node:zlib");

const FROM_SOURCE = import.meta.url.endsWith("/ffi/deno.ts");

/** What a module that ubd loads may import, and where it is: from source, or beside dist/cli.js. */
function importMap(): string {
  const at = (path: string) => new URL(path, import.meta.url).href;
  const imports = {
    ubd: at(FROM_SOURCE ? "../mod.ts" : "./mod.js"),
    "ubd/testing": at(FROM_SOURCE ? "../testing/mod.ts" : "./testing.js"),
  };
  return `data:application/json,${encodeURIComponent(JSON.stringify({ imports }))}`;
}

/**
 * Deno resolves names before it runs anything: they are to be known from the start. From source,
 * deno.json has them.
 */
function hasLibrary(): boolean {
  return FROM_SOURCE || readFileSync("/proc/self/cmdline", "utf8").includes(importMap());
}

function rerunArguments(): string[] {
  if (Deno.build.standalone) return [];
  // Packages are looked for where each module is, as elsewhere; a project need not say so.
  const packages = "--node-modules-dir=manual";
  return ["run", "-A", "-q", packages, `--import-map=${importMap()}`, process.argv[1]!];
}

const WAITING = {
  ubd_wait: { parameters: ["i32"], result: "i32", nonblocking: true },
} as const;

/** Of this thread: each time they are asked for they are compiled anew. */
let waiting: Deno.DynamicLibrary<typeof WAITING>["symbols"] | undefined;

export const adapter: Adapter = {
  runtime: `Deno ${Deno.version.deno}`,
  canLockMemory: false,
  restfulEnvironment: {},

  rerunArguments,

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

  specifierOf: (file) => pathToFileURL(file).href,

  provideLibrary() {
    if (!isMainThread || Deno.build.standalone || hasLibrary()) return;
    const args = [...rerunArguments(), ...Deno.args];
    const stdio = { stdin: "inherit", stdout: "inherit", stderr: "inherit" } as const;
    Deno.exit(new Deno.Command(Deno.execPath(), { args, ...stdio }).outputSync().code);
  },

  watch({ path, native }, signalled) {
    const fd = native.ubd_eventfd(0);
    if (fd < 0) return fd;
    waiting ??= Deno.dlopen(path, WAITING).symbols;
    const { ubd_wait } = waiting;
    let closed = false;
    (async () => {
      while (await ubd_wait(fd) >= 0 && !closed) signalled();
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
