// SPDX-License-Identifier: MIT
/** Deno's side of the FFI. @module */

import process from "node:process";
import type { Adapter, Native, NativeFunction } from "./symbols.ts";

export const adapter: Adapter = {
  runtime: `Deno ${Deno.version.deno}`,

  rerunArguments() {
    return Deno.build.standalone ? [] : ["run", "-A", "-q", process.argv[1]!];
  },

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
};
