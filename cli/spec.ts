// SPDX-License-Identifier: MIT
/** The form of what a server is told (ServerSpec), for specs that come from state files. @module */

import { ZERO_COPY_WISHES } from "../core/data_mode.ts";
import { checkOptions } from "../core/device.ts";
import type { DeviceState } from "../core/state.ts";
import { isDefined, TARGET_NAMES } from "../targets/mod.ts";
import { MODULE_TARGET } from "../targets/module.ts";
import type { RecoveryMode, ServerSpec } from "./start_server.ts";

type Fits = (value: unknown) => boolean;

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const isText: Fits = (value) => typeof value === "string";
const isSwitch: Fits = (value) => typeof value === "boolean";
const isBytes: Fits = (value) => Number.isSafeInteger(value) && (value as number) >= 0;
const isOneOf = (words: readonly unknown[]): Fits => (value) => words.includes(value);

const RECOVERY_MODES: readonly RecoveryMode[] = ["wait", "reissue", "fail"];

const isIdentity: Fits = (value) => {
  if (!isRecord(value)) return false;
  const { device, inode, born, generation, diskSequence } = value;
  return isText(device) &&
    [inode, born, diskSequence].every((it) => it === undefined || isText(it)) &&
    (generation === undefined || isBytes(generation));
};
const isBackingFile: Fits = (value) =>
  isRecord(value) && isText(value.path) &&
  (value.optional === undefined || isSwitch(value.optional)) &&
  (value.identity === undefined || isIdentity(value.identity));

/** What may be absent, and has this form when it is there. What else is there is left alone. */
const SPEC: Record<string, Fits> = {
  recovery: isOneOf(RECOVERY_MODES),
  supervise: isSwitch,
  watch: isSwitch,
  rootStorage: isSwitch,
  unprivileged: isSwitch,
  lockMemory: isSwitch,
  files: (value) => Array.isArray(value) && value.every(isBackingFile),
  startTimeoutS: (value) => isBytes(value) && value !== 0,
};
const DEVICE: Record<string, Fits> = {
  zeroCopy: isOneOf(ZERO_COPY_WISHES),
  userCopy: isSwitch,
  needGetData: isSwitch,
  batch: isSwitch,
  compInTask: isSwitch,
  noPartScan: isSwitch,
};
const FILE_OPTIONS: Record<string, Fits> = {
  file: isText,
  files: (value) => Array.isArray(value) && value.every(isText),
  sizeBytes: isBytes,
  blockBytes: isBytes,
  offsetBytes: isBytes,
  chunkBytes: isBytes,
  readOnly: isSwitch,
  buffered: isSwitch,
  force: isSwitch,
};

function misfit(record: Record<string, unknown>, fields: Record<string, Fits>): string | undefined {
  return Object.keys(fields).find((name) =>
    record[name] !== undefined && !fields[name]!(record[name])
  );
}

/** @returns why no server can be told this; undefined: one can, and may still refuse a value. */
function specFault(spec: unknown): string | undefined {
  if (!isRecord(spec) || !isRecord(spec.device)) return "its spec has no device";
  const { device, target } = spec;
  try {
    checkOptions(device as unknown as ServerSpec["device"]);
  } catch (error) {
    return `in its spec, ${(error as Error).message}`;
  }
  if (!isRecord(target) || !isRecord(target.options)) return "its spec has no target";
  const { name, options } = target;
  if (typeof name !== "string" || !isDefined(name) && !TARGET_NAMES.includes(name)) {
    return `its spec has an unknown target ${JSON.stringify(name)}`;
  }
  const wrong = misfit(spec, SPEC) ?? misfit(device, DEVICE) ??
    (isDefined(name) ? undefined : misfit(options, FILE_OPTIONS));
  if (wrong !== undefined) return `in its spec, ${wrong} is of a wrong kind`;
  const needs = name === MODULE_TARGET
    ? ["file", "directory"]
    : isDefined(name)
    ? ["directory"]
    : name === "loop"
    ? ["file"]
    : [];
  const lacks = needs.find((field) => !isText(options[field])) ??
    (isDefined(name) && !isRecord(options.options) ? "options" : undefined) ??
    (["concat", "stripe"].includes(name) && options.files === undefined ? "files" : undefined);
  return lacks && `its spec lacks the ${lacks} of target ${name}`;
}

/** @returns the spec in a state, or why it is none that a server can be told. */
export function specOf({ spec }: DeviceState): { spec: ServerSpec } | { fault: string } {
  const fault = specFault(spec);
  return fault === undefined ? { spec: spec as ServerSpec } : { fault };
}
