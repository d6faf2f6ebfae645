// SPDX-License-Identifier: MIT
/**
 * The built-in targets by name. Those of `TARGETS` say where the bytes of requests are; those of
 * `DEFINED` are written as anybody would, with defineTarget.
 * @module
 */

import { openDefinition, parseOptions, type Target, toDefinition } from "../core/define_target.ts";
import type { OptionSpecs, TargetDefinition } from "../core/define_target.ts";
import { Engine } from "../core/engine.ts";
import { UsageError } from "../core/error.ts";
import type { ServedTarget, TargetType } from "../core/target.ts";
import { concatTarget, stripeTarget } from "./concat.ts";
import { faultTarget } from "./fault.ts";
import { httpTarget } from "./http.ts";
import { loopTarget } from "./loop.ts";
import { memoryTarget } from "./memory.ts";
import { loadModule, MODULE_TARGET, type ModuleSpec, openModule } from "./module.ts";
import { nullTarget } from "./null.ts";

// deno-lint-ignore no-explicit-any
const TARGETS: readonly TargetType<any, any>[] = [
  nullTarget,
  loopTarget,
  concatTarget,
  stripeTarget,
];

const DEFINED: Readonly<Record<string, Target>> = {
  memory: memoryTarget,
  http: httpTarget,
  fault: faultTarget,
};

export const TARGET_NAMES: readonly string[] = [
  ...TARGETS.map(({ name }) => name),
  ...Object.keys(DEFINED),
];

/** Whether a target is opened in the thread that serves it. */
export function isDefined(name: string): boolean {
  return name === MODULE_TARGET || Object.hasOwn(DEFINED, name);
}

/** The options that a built-in target declares, if it is written with defineTarget. */
export function declaredOptions(name: string): OptionSpecs {
  return Object.hasOwn(DEFINED, name) ? toDefinition(DEFINED[name], name).options ?? {} : {};
}

/** @param file of MODULE_TARGET. @throws {UsageError} a name that no target has. */
export async function findDefinition(name: string, file: string): Promise<TargetDefinition> {
  return name === MODULE_TARGET ? await loadModule(file) : toDefinition(DEFINED[name], name);
}

/** @throws {UsageError} for a name that no target has. */
// deno-lint-ignore no-explicit-any
export function findTarget(name: string): TargetType<any, any> {
  const target = TARGETS.find((candidate) => candidate.name === name);
  if (target) return target;
  throw new UsageError(
    `Unknown target "${name}": there are ${TARGET_NAMES.join(", ")}, or a module such as ./x.ts`,
  );
}

/** What `runQueueThread` asks for. */
export async function prepareTarget(
  { name, spec }: { name: string; spec: unknown },
  log: (text: string) => void,
): Promise<ServedTarget> {
  if (name === MODULE_TARGET) return await openModule(spec as ModuleSpec, log);
  if (!isDefined(name)) {
    return { handler: (context) => new Engine(findTarget(name).volume(spec, context), context) };
  }
  const { options, directory, shared } = spec as ModuleSpec;
  const definition = toDefinition(DEFINED[name], name);
  const values = parseOptions(definition, options, directory);
  return await openDefinition(definition, values, shared, log);
}
