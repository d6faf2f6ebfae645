// SPDX-License-Identifier: MIT
/** Targets that are somebody's module: `ubd add ./my_target.ts`. @module */

import { statSync } from "node:fs";
import { openDefinition, parseOptions, toDefinition } from "../core/define_target.ts";
import type { TargetDefinition } from "../core/define_target.ts";
import { describeThrown, plainPaths, UblkError, UsageError } from "../core/error.ts";
import type { ServedTarget } from "../core/target.ts";
import { provideLibrary, runtime, specifierOf } from "../ffi/mod.ts";
import * as library from "../mod.ts";
import { checkModule } from "./trust.ts";

/** Name of the target that a module is, in specs and state files. */
export const MODULE_TARGET = "module";

export interface ModuleSpec {
  /** Absolute path of the module. */
  file: string;
  /** What `--opt` said, by name. */
  options: Record<string, unknown>;
  /** What its paths are relative to. */
  directory: string;
  /** What `share` answered, once it has. */
  shared?: unknown;
  /** Only to see that it can be: it is not opened, and serves nothing. */
  loadOnly?: boolean;
}

/** Whether a target's name is a URL, for `http`. */
export function isUrl(name: string): boolean {
  return /^https?:/i.test(name);
}

/**
 * Whether a target's name is a module's path: `./x.ts`, `x.js`. Never without such an extension: a
 * disk image must not be taken for code.
 */
export function isModule(name: string): boolean {
  return !isUrl(name) && /\.[cm]?[jt]sx?$/.test(name);
}

/**
 * @throws {UsageError} the module cannot be loaded, exports no target, or is somebody's whose code
 * root must not run.
 */
export async function loadModule(file: string): Promise<TargetDefinition> {
  const refuse = (why: string) => new UsageError(`Cannot load ${file}: ${why}`);
  let specifier;
  try {
    checkModule(file);
    if (!statSync(file).isFile()) throw refuse("it is no file");
    specifier = specifierOf(file);
  } catch (error) {
    if (error instanceof UsageError) throw error;
    throw refuse((error as Error).message);
  }
  if (specifier === undefined) {
    throw refuse(
      `${runtime} loads no module whose path has ? or \\; rename it, or serve it by Deno`,
    );
  }
  provideLibrary({
    ubd: () => Promise.resolve(library),
    "ubd/testing": () => import("../testing/mod.ts"),
  });
  let exported;
  try {
    exported = await import(specifier);
  } catch (error) {
    throw refuse(describeLoadFailure(error));
  }
  return toDefinition(exported.default, file);
}

/** Opens a module's target in the thread that serves it. */
export async function openModule(
  spec: ModuleSpec,
  log: (text: string) => void,
): Promise<ServedTarget> {
  const definition = await loadModule(spec.file);
  const options = parseOptions(definition, spec.options, spec.directory);
  if (spec.loadOnly) {
    const handler = () => {
      throw new Error("it is only loaded");
    };
    return { handler };
  }
  try {
    return await openDefinition(definition, options, spec.shared, log);
  } catch (error) {
    if (error instanceof UblkError || (error as Error)?.name === "UsageError") throw error;
    throw new UsageError(`Cannot open ${spec.file}: ${describeThrown(error)}`);
  }
}

/** Where Bun found a mistake in a text. */
interface Position {
  file: string;
  line: number;
  column: number;
  lineText: string;
}

/** What a runtime says of a module that it cannot load: each says it in another way. */
function describeLoadFailure(error: unknown): string {
  const { errors, position, message, code } = (error ?? {}) as {
    errors?: unknown[];
    position?: Position | null;
    message?: string;
    code?: string;
  };
  // Bun: a message for each mistake.
  if (errors?.length && position === undefined) return errors.map(describeLoadFailure).join("\n");
  if (position) {
    const { file, line, column, lineText } = position;
    const pointer = lineText.slice(0, column - 1).replaceAll(/[^\t]/g, " ");
    return `${message}\n    at ${file}:${line}:${column}\n${lineText}\n${pointer}^`;
  }
  // deno-lint-ignore no-control-regex
  if (code === "ERR_MODULE_NOT_FOUND") return plainPaths(message!.replaceAll(/\x1b\[[\d;]*m/g, ""));
  return describeThrown(error); // It began to run, and has thrown.
}
