// SPDX-License-Identifier: MIT
/**
 * Targets written by users: a size, a `read`, and what else the device shall offer.
 *
 * What is not given is not offered to the kernel: without `write` the device is read-only, without
 * `discard` nobody sends one. core/function_handler.ts calls the functions.
 * @module
 */

import { isAbsolute, resolve } from "node:path";
import { UsageError } from "./error.ts";
import { FunctionHandler } from "./function_handler.ts";
import { parseSize } from "./size.ts";
import type { MemoryLimits, ServedTarget } from "./target.ts";

/** What a handler answers: nothing when all is done, or the bytes that are, now or later. */
export type Answer = void | number | Promise<void | number>;

/** One request, valid until its handler's answer is settled. */
export interface Request {
  /** Where on the device it starts, in bytes. */
  readonly offset: number;
  /** Bytes it is about. */
  readonly length: number;
  /** Fires when the device is about to stop: what waits should end. */
  readonly signal: AbortSignal;
}

/** What `read` is asked. */
export interface ReadRequest extends Request {
  /** `length` zeroes, to be filled: the kernel's own request, not a copy. */
  readonly buffer: Uint8Array<ArrayBuffer>;
}

/** What `write` is asked. */
export interface WriteRequest extends Request {
  /** The `length` bytes to be written: the kernel's own request, not a copy. */
  readonly buffer: Uint8Array<ArrayBuffer>;
  /** It must be durable before it is answered. Without `handlesFua`, `flush` sees to that. */
  readonly fua: boolean;
}

/** What `writeZeroes` is asked. */
export interface ZeroRequest extends Request {
  /** As of a {@linkcode WriteRequest}. */
  readonly fua: boolean;
  /** The extent may be deallocated, as long as it reads as zeroes. */
  readonly mayUnmap: boolean;
}

/**
 * A block device as an object of functions.
 *
 * Each request is answered exactly once, whatever a function does. An error it throws or rejects
 * with becomes that request's errno: the error's `code` when that names one (`ENOSPC`), else EIO;
 * so does a number that is no count of the request's bytes. A count below `length` has the kernel
 * ask again for the rest, from the last whole block on; less than a block is an error.
 *
 * A function that returns no promise is answered at once, in a thread that does nothing else. From
 * the first promise on, the queue runs on its thread's event loop, with as many requests in flight
 * as the queue is deep. A request may overtake another; what must come after a write waits for
 * its answer before it is sent. So a `flush` covers the writes that were answered before it came.
 */
export interface BlockDevice {
  /** Bytes; a multiple of `blockSize`. */
  size: number;
  /** Unit of every request in bytes: 512 (default), 1024, 2048 or 4096. */
  blockSize?: number;
  /** Fills `buffer`: what it leaves out is zeroes. */
  read(request: ReadRequest): Answer;
  /** Default: the device is read-only. */
  write?(request: WriteRequest): Answer;
  /** Makes what was answered before durable. Default: every write is, once it is answered. */
  flush?(request: Request): Answer;
  /** The extent's contents are not needed any more. */
  discard?(request: Request): Answer;
  /** The extent shall read as zeroes, all of it. Default: the kernel writes them. */
  writeZeroes?(request: ZeroRequest): Answer;
  /** Called once after the last request. */
  close?(): void | Promise<void>;
  /** `write` and `writeZeroes` look at `fua`. Default: `flush` is called after them. */
  handlesFua?: boolean;
  /** Most promises outstanding in a thread, for each queue; further requests wait. Default: depth. */
  maxConcurrent?: number;
  /** A promise that takes longer is given up: its request gets ETIMEDOUT. Default: 30000. */
  timeoutMs?: number;
  /** Most queues, or threads, where the definition has `share`. Default: any; without `share`, one. */
  maxQueues?: number;
  /** How the data of requests lies in their callers' memory. Default: anyhow. */
  memory?: MemoryLimits;
}

/** What every declared option may say. */
export interface OptionSpecOf<Type extends string, Value> {
  /**
   * "size" takes 64M or 2048s and is a number of bytes; "path" is made absolute. "file" is the path
   * of a file or block device that the target keeps its data in: a server that takes the device over
   * refuses another one that has this name by then.
   */
  type: Type;
  /** One line for --help. */
  description?: string;
  /** What it is when it is not given: a value, or text as of `--opt`. */
  default?: Value | string;
  /** It must be given. */
  required?: boolean;
}

/** One declared option. Values come as text from `--opt NAME=VALUE`, or as what they are. */
export type OptionSpec =
  | OptionSpecOf<"string" | "path" | "file", string>
  | OptionSpecOf<"number" | "size", number>
  | OptionSpecOf<"boolean", boolean>;

/** The options of a target, by name. */
export type OptionSpecs = Record<string, OptionSpec>;

/** What an option of a type is. */
export type OptionValue<Spec extends OptionSpec> = Spec["type"] extends "number" | "size" ? number
  : Spec["type"] extends "boolean" ? boolean
  : string;

/** What `open` gets for the options it declares. */
export type OptionValues<Specs extends OptionSpecs> = {
  readonly [Name in keyof Specs]: Specs[Name] extends { required: true } | {
    default: string | number | boolean;
  } ? OptionValue<Specs[Name]>
    : OptionValue<Specs[Name]> | undefined;
};

/** What may be given for the options of a target: values, or text as of `--opt`. */
export type GivenOptions<Specs extends OptionSpecs> = string extends keyof Specs
  ? Record<string, string | number | boolean>
  : [keyof Specs] extends [never] ? Record<string, never>
  : { [Name in keyof Specs]?: OptionValue<Specs[Name]> | string };

/** Of a target without options. */
export type NoOptions = Record<never, OptionSpec>;

/** A target with options, made anew for each device. */
export interface TargetDefinition<
  Specs extends OptionSpecs = OptionSpecs,
  Shared = unknown,
> {
  /** What may be given to it, by name. Default: nothing. */
  options?: Specs;
  /**
   * Lets the device have several queues, and threads, each thread with an `open` of its own: called
   * once, its result (structured-cloneable, such as a SharedArrayBuffer) goes to each of them.
   * Default: one queue, and one thread.
   */
  share?(options: OptionValues<Specs>): Shared | Promise<Shared>;
  /**
   * Called in the thread that serves. An error thrown here keeps the device from being made.
   *
   * @param log tells the operator what no request fails by: in the kernel's log, of `ubd add`.
   */
  open(
    options: OptionValues<Specs>,
    shared: Shared,
    log: (text: string) => void,
  ): BlockDevice | Promise<BlockDevice>;
}

/** Found on definitions also of another copy of this library. */
export const MARK: unique symbol = Symbol.for("ubd.target");

/** What `defineTarget` returns: for `createDevice`, or a module's default export. */
export interface Target<Specs extends OptionSpecs = OptionSpecs> {
  /** What it was made of. */
  readonly [MARK]: TargetDefinition<Specs>;
}

/**
 * Defines a block device.
 *
 * @param target a device, or a definition with options and an `open` that makes one.
 *
 * @example A device of 64 MiB in memory
 * ```ts
 * import { defineTarget } from "ubd";
 *
 * const disk = new Uint8Array(64 * 1024 ** 2);
 *
 * const target = defineTarget({
 *   size: disk.length,
 *   read: ({ offset, length, buffer }) => buffer.set(disk.subarray(offset, offset + length)),
 *   write: ({ offset, buffer }) => disk.set(buffer, offset),
 * });
 * ```
 *
 * @example With an option, for `ubd add ./zeroes.ts --opt size=1G`
 * ```ts
 * import { defineTarget } from "ubd";
 *
 * export default defineTarget({
 *   options: { size: { type: "size", default: "64M", description: "size of the device" } },
 *   open: ({ size }) => ({ size, read() {} }),
 * });
 * ```
 */
export function defineTarget(target: BlockDevice): Target<NoOptions>;
/**
 * Defines a block device with options, or one that `open` makes when it is needed.
 *
 * @param target its options, and an `open` that gets their values.
 */
export function defineTarget<const Specs extends OptionSpecs = NoOptions, Shared = unknown>(
  target: TargetDefinition<Specs, Shared>,
): Target<Specs>;
export function defineTarget(target: BlockDevice | TargetDefinition): Target {
  return { [MARK]: "open" in target ? target : { open: () => target } };
}

/**
 * @param value what a module exports as its default: a `Target`, or what `defineTarget` takes.
 * @throws {UsageError} it is neither, or declares an option that cannot be.
 */
export function toDefinition(value: unknown, where: string): TargetDefinition {
  const object = value as Partial<Target & BlockDevice & TargetDefinition> | null | undefined;
  if (object?.[MARK]) return checkSpecs(object[MARK]);
  if (typeof object?.open === "function") return checkSpecs(object as TargetDefinition);
  if (typeof object?.read === "function") return { open: () => object as BlockDevice };
  throw new UsageError(
    `${where} is no target: its default export must be defineTarget({ size, read ... })`,
  );
}

const OPTION_TYPES = ["string", "number", "boolean", "size", "path", "file"];
const SPEC_PROPERTIES = ["type", "description", "default", "required"];

/** Modules are not type-checked before they are run. */
function checkSpecs(definition: TargetDefinition): TargetDefinition {
  for (const [name, spec] of Object.entries(definition.options ?? {})) {
    const type: unknown = spec?.type;
    if (!OPTION_TYPES.includes(type as string)) {
      throw new UsageError(
        `The target declares option "${name}" with type ${JSON.stringify(type)}: there are ` +
          OPTION_TYPES.join(", "),
      );
    }
    const unknown = Object.keys(spec).find((key) => !SPEC_PROPERTIES.includes(key));
    if (unknown !== undefined) {
      throw new UsageError(
        `The target declares option "${name}" with "${unknown}": there are ` +
          SPEC_PROPERTIES.join(", "),
      );
    }
  }
  return definition;
}

/** The declared options, a line each, for --help. */
export function describeOptions({ options = {} }: TargetDefinition): string[] {
  return Object.entries(options).map(([name, spec]) => {
    const usage = `--opt ${name}=${spec.type.toUpperCase()}`;
    const more = spec.required
      ? " (required)"
      : spec.default === undefined
      ? ""
      : ` (default: ${spec.default})`;
    return `  ${usage.padEnd(32)}  ${spec.description ?? ""}${more}`;
  });
}

/**
 * @param given by name: text to be parsed, or values of the declared type.
 * @param directory what paths are relative to.
 * @throws {UsageError} naming the option, and the ones there are.
 */
export function parseOptions(
  { options = {} }: TargetDefinition,
  given: Record<string, unknown>,
  directory: string,
): Record<string, string | number | boolean | undefined> {
  const names = Object.keys(options);
  const unknown = Object.keys(given).find((name) => !Object.hasOwn(options, name));
  if (unknown !== undefined) {
    const known = names.length > 0 ? `there are ${names.join(", ")}` : "this target has none";
    throw new UsageError(`Option "${unknown}": ${known}`);
  }
  return Object.fromEntries(
    Object.entries(options).map(([name, spec]) => {
      const value = (Object.hasOwn(given, name) ? given[name] : undefined) ?? spec.default;
      if (value === undefined && spec.required) {
        throw new UsageError(
          `Option "${name}" is missing: --opt ${name}=${spec.type.toUpperCase()}`,
        );
      }
      return [name, value === undefined ? undefined : parseOption(name, spec, value, directory)];
    }),
  );
}

function parseOption(name: string, { type }: OptionSpec, value: unknown, directory: string) {
  const text = String(value);
  const wrong = (wanted: string) => new UsageError(`Option "${name}" is "${text}": say ${wanted}`);
  switch (type) {
    case "size":
      return typeof value === "number" ? value : parseSize(text, `Option "${name}":`);
    case "number":
      if (text.trim() === "" || !Number.isFinite(Number(text))) throw wrong("a number");
      return Number(text);
    case "boolean":
      if (["true", "1", "yes"].includes(text)) return true;
      if (["false", "0", "no"].includes(text)) return false;
      throw wrong("true or false");
    case "path":
    case "file":
      return isAbsolute(text) ? text : resolve(directory, text);
    case "string":
      return text;
  }
}

/**
 * Opens a target in the thread that serves it.
 *
 * @param shared what the first queue's thread got from `share`; there: undefined.
 * @throws {UsageError} a device without a valid size or function; whatever `open` throws.
 */
export async function openDefinition(
  definition: TargetDefinition,
  options: Record<string, unknown>,
  shared: unknown,
  log: (text: string) => void,
): Promise<ServedTarget> {
  const values = options as OptionValues<OptionSpecs>;
  shared ??= await definition.share?.(values);
  const device = await definition.open(values, shared, log);
  checkDevice(device);
  const { size, blockSize = 512 } = device;
  const readOnly = !device.write;
  return {
    description: {
      limits: {
        sizeBytes: size,
        blockBytes: blockSize,
        physicalBlockBytes: Math.max(blockSize, 4096),
        readOnly,
        volatileCache: !readOnly && device.flush !== undefined,
        discardBytes: !readOnly && device.discard ? blockSize : 0,
        writeZeroes: !readOnly && device.writeZeroes !== undefined,
        ...device.memory,
      },
      ...(definition.share
        ? device.maxQueues !== undefined && { queuesMax: device.maxQueues }
        : { queuesMax: 1 }),
      files: filesOf(definition, values),
      shared,
    },
    handler: (context) => new FunctionHandler(device, context),
    close: () => device.close?.(),
  };
}

/** Paths of the files that a target keeps its data in, as its options say. */
function filesOf({ options = {} }: TargetDefinition, values: Record<string, unknown>): string[] {
  return Object.keys(options).filter((name) => options[name]!.type === "file")
    .map((name) => values[name]).filter((value) => typeof value === "string");
}

/** What a device may have, and of which type. */
const MEMBERS: Readonly<Record<keyof BlockDevice, string>> = {
  size: "number",
  blockSize: "number",
  read: "function",
  write: "function",
  flush: "function",
  discard: "function",
  writeZeroes: "function",
  close: "function",
  handlesFua: "boolean",
  maxConcurrent: "number",
  timeoutMs: "number",
  maxQueues: "number",
  memory: "object",
};

/**
 * What is not given is not offered: a misspelt `write` would make the device read-only. Members of a
 * device's own are no mistakes: one is, if it could be what is not there.
 */
function misspelt(device: object): [wrong: string, right: string] | undefined {
  const absent = Object.entries(MEMBERS).filter(([name]) => !(name in device));
  const letters = (name: string) => [...name.toLowerCase()].sort().join("");
  const lacksOne = (short: string, long: string) =>
    long.length === short.length + 1 &&
    [...long].some((_, at) => long.slice(0, at) + long.slice(at + 1) === short);
  for (const [name, value] of Object.entries(device)) {
    if (name in MEMBERS) continue;
    const meant = absent.find(([other, type]) =>
      typeof value === type &&
      (letters(other) === letters(name) || lacksOne(name, other) || lacksOne(other, name))
    );
    if (meant) return [name, meant[0]];
  }
  return undefined;
}

function checkDevice(device: BlockDevice): void {
  const [wrong, right] = misspelt(device ?? {}) ?? [];
  if (wrong !== undefined) {
    throw new UsageError(`A device has no "${wrong}": did you mean "${right}"?`);
  }
  for (const [name, type] of Object.entries(MEMBERS)) {
    if (type !== "function") continue;
    const value: unknown = device?.[name as keyof BlockDevice];
    if (typeof value === "function" || (value === undefined && name !== "read")) continue;
    throw new UsageError(`A target's ${name} must be a function, not ${typeof value}`);
  }
  if (typeof device.size !== "number") {
    throw new UsageError(`A target's size must be its bytes, not ${typeof device.size}`);
  }
  for (const name of ["maxConcurrent", "timeoutMs", "maxQueues"] as const) {
    const value = device[name];
    if (value !== undefined && !(Number.isInteger(value) && value > 0)) {
      throw new UsageError(`A target's ${name} must be a whole number above 0, not ${value}`);
    }
  }
}
