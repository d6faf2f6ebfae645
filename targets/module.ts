// SPDX-License-Identifier: MIT
/** Targets that are somebody's module: `ubd add ./my_target.ts`. @module */

import { pathToFileURL } from "node:url";
import { openDefinition, parseOptions, toDefinition } from "../core/define_target.ts";
import type { TargetDefinition } from "../core/define_target.ts";
import { UblkError, UsageError } from "../core/error.ts";
import type { ServedTarget } from "../core/target.ts";
import { provideLibrary } from "../ffi/mod.ts";
import * as library from "../mod.ts";

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

/** @throws {UsageError} the module cannot be loaded, or exports no target. */
export async function loadModule(file: string): Promise<TargetDefinition> {
  provideLibrary({
    ubd: () => Promise.resolve(library),
    "ubd/testing": () => import("../testing/mod.ts"),
  });
  let exported;
  try {
    exported = await import(pathToFileURL(file).href);
  } catch (error) {
    throw new UsageError(`Cannot load ${file}: ${(error as Error)?.message ?? error}`);
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
  try {
    return await openDefinition(definition, options, spec.shared, log);
  } catch (error) {
    if (error instanceof UblkError || (error as Error)?.name === "UsageError") throw error;
    throw new UsageError(`Cannot open ${spec.file}: ${(error as Error)?.stack ?? error}`);
  }
}
