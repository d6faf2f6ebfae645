// SPDX-License-Identifier: MIT
/** The built-in targets by name. @module */

import { UsageError } from "../core/error.ts";
import type { RequestHandler, ServeContext, TargetType } from "../core/target.ts";
import { loopTarget } from "./loop.ts";
import { nullTarget } from "./null.ts";

// deno-lint-ignore no-explicit-any
const TARGETS: readonly TargetType<any, any>[] = [nullTarget, loopTarget];

export const TARGET_NAMES: readonly string[] = TARGETS.map(({ name }) => name);

/** @throws {UsageError} for a name that no target has. */
// deno-lint-ignore no-explicit-any
export function findTarget(name: string): TargetType<any, any> {
  const target = TARGETS.find((candidate) => candidate.name === name);
  if (target) return target;
  throw new UsageError(`Unknown target "${name}": there are ${TARGET_NAMES.join(" and ")}`);
}

/** What `runQueueThread` asks for. */
export function serveTarget(name: string, spec: unknown, context: ServeContext): RequestHandler {
  return findTarget(name).serve(spec, context);
}
