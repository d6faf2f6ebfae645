// SPDX-License-Identifier: MIT
/** `ubd add`: makes a device from a target and serves it. @module */

import { existsSync } from "node:fs";
import { resolve } from "node:path";
import process from "node:process";
import { isDeepStrictEqual } from "node:util";
import { UBLK_S_DEV_DEAD } from "../abi/ublk_cmd.ts";
import { Control } from "../core/control.ts";
import { ZERO_COPY_WISHES, type ZeroCopyWish } from "../core/data_mode.ts";
import {
  checkOptions,
  DEPTH_DEFAULT,
  IO_BYTES_DEFAULT,
  IO_BYTES_DEFAULT_ZERO_COPY,
  QUEUES_DEFAULT,
} from "../core/device.ts";
import { describeOptions } from "../core/define_target.ts";
import { UblkError, UsageError } from "../core/error.ts";
import { checkMemoryLimits } from "../core/params.ts";
import { becomeFlusher } from "../core/isolation.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import { readState } from "../core/state.ts";
import { charDeviceOpeners } from "../core/users.ts";
import { Shim } from "../ffi/mod.ts";
import { NULL_SIZE_DEFAULT } from "../targets/null.ts";
import {
  declaredOptions,
  findDefinition,
  findTarget,
  isDefined,
  TARGET_NAMES,
} from "../targets/mod.ts";
import { isModule, isUrl, MODULE_TARGET } from "../targets/module.ts";
import { type Command, Option } from "commander";
import { backingFile, descriptorNumber, filesOf, holdFiles } from "./backing_files.ts";
import { describeDevice, dumpDevice, holders, isNoneOfOurs, takenError } from "./describe.ts";
import { toFailure } from "./exit.ts";
import { neverWait, print, printJson, tell } from "./output.ts";
import { serve } from "./server.ts";
import {
  type Live,
  type RecoveryMode,
  type ServerSpec,
  START_TIMEOUT_S,
  startServer,
} from "./start_server.ts";
import { formatSize, parseInteger, parseSize } from "./size.ts";
import { notify } from "./systemd.ts";

export interface AddOptions {
  type?: string;
  file?: string;
  number: number;
  queues: number;
  depth: number;
  threads?: number;
  maxIoSize: number;
  memoryAlign?: number;
  segments?: number;
  segmentSize?: number;
  segmentBoundary?: number;
  max_io_buf_bytes?: number;
  size?: number;
  blockSize?: number;
  ro?: boolean;
  buffered?: boolean;
  buffered_io?: boolean;
  offset?: number;
  /** The offset in sectors. */
  o?: number;
  force?: boolean;
  /** What stripe puts on one file before it goes on with the next. */
  chunk?: number;
  /** Of a target written with defineTarget, by name. */
  opt?: Record<string, string>;
  foreground?: boolean;
  mlock?: boolean;
  unprivileged?: boolean;
  recovery?: RecoveryMode;
  supervise?: boolean;
  watch?: boolean;
  partscan: boolean;
  rootStorage?: boolean;
  startTimeout?: number;
  zeroCopy?: ZeroCopyWish;
  /** Zero copy is insisted on. */
  z?: boolean;
  userCopy?: boolean;
  needGetData?: boolean;
  batch?: boolean;
  uring_comp?: boolean;
  batchIo?: boolean;
  user_copy?: boolean;
  usercopy?: boolean;
  need_get_data?: boolean;
  user_recovery?: boolean;
  user_recovery_reissue?: boolean;
  user_recovery_fail_io?: boolean;
  json?: boolean;
}

const IO_SIZES = `${formatSize(IO_BYTES_DEFAULT)}; ` +
  `with zero copy ${formatSize(IO_BYTES_DEFAULT_ZERO_COPY)}`;

/** A day. */
const START_TIMEOUT_S_MAX = 86_400;

const DEVICE = "Device:";
const TARGET = "Target:";

const FILES: readonly (keyof AddOptions)[] = [
  "file",
  "blockSize",
  "ro",
  "buffered",
  "buffered_io",
  "force",
];

/** The options about the target that each kind of target takes. */
const TAKEN: Record<string, readonly (keyof AddOptions)[]> = {
  null: ["size", "blockSize"],
  loop: [...FILES, "size", "offset", "o"],
  concat: FILES,
  stripe: [...FILES, "chunk"],
};

/** Those that are written with defineTarget get these as options of their own. */
const TAKEN_BY_DEFINED: readonly (keyof AddOptions)[] = ["opt", "file", "size", "blockSize"];

/** @throws {UsageError} an option, or a file, that is for other targets. */
function refuseOptionsOfOthers(name: string, defined: boolean, given: AddOptions): void {
  const taken = defined ? TAKEN_BY_DEFINED : TAKEN[name]!;
  const known = new Set([...Object.values(TAKEN).flat(), ...TAKEN_BY_DEFINED]);
  for (const key of known) {
    if (given[key] === undefined || taken.includes(key)) continue;
    const flag = key.replace("blockSize", "block-size");
    const what = key === "file" ? "file" : key.length === 1 ? `-${key}` : `--${flag}`;
    const others = Object.keys(TAKEN).filter((other) => TAKEN[other]!.includes(key));
    const whose = others.length > 0 ? `: that is for ${others.join(", ")}` : "";
    throw new UsageError(`Target ${name} takes no ${what}${whose}`);
  }
}

/** A flag of `ublk` that is on or off. */
function parseSwitch(flag: string): (value: string) => boolean {
  return (value) => {
    if (value === "0" || value === "1") return value === "1";
    throw new UsageError(`${flag} ${value}: it must be 0 or 1`);
  };
}

const RECOVERY_MODES: readonly RecoveryMode[] = ["wait", "reissue", "fail"];

function parseRecovery(text: string): RecoveryMode {
  const mode = RECOVERY_MODES.find((candidate) => candidate === text);
  if (mode) return mode;
  throw new UsageError(`Recovery "${text}": say --recovery=${RECOVERY_MODES.join(" or =")}`);
}

function parseStartTimeout(text: string): number {
  const seconds = parseInteger(text, "Start timeout");
  if (seconds >= 1 && seconds <= START_TIMEOUT_S_MAX) return seconds;
  throw new UsageError(
    `Start timeout ${text}: it must be from 1 to ${START_TIMEOUT_S_MAX} seconds`,
  );
}

function collectOption(text: string, collected: Record<string, string> = Object.create(null)) {
  const [, name, value] = /^([^=]+)=(.*)$/s.exec(text) ?? [];
  if (name === undefined) throw new UsageError(`--opt ${text}: say --opt NAME=VALUE`);
  if (Object.hasOwn(collected, name)) throw new UsageError(`--opt ${name}: it is given twice`);
  collected[name] = value!;
  return collected;
}

function parseZeroCopy(text: string): ZeroCopyWish {
  const wish = ZERO_COPY_WISHES.find((candidate) => candidate === text);
  if (wish) return wish;
  throw new UsageError(`Zero copy "${text}": say --zero-copy=${ZERO_COPY_WISHES.join(" or =")}`);
}

export function defineAdd(program: Command): void {
  const command = program.command("add")
    .summary("make a block device and serve it")
    .description(
      "Makes a block device and serves it in the background until it is deleted.\n\n" +
        "  ubd add null              a device that keeps nothing\n" +
        "  ubd add loop disk.img     a file, or a block device, as a device\n" +
        "  ubd add https://HOST/disk.img  an image on a web server, read-only\n" +
        "  ubd add concat a.img b.img  several of them, one behind the other\n" +
        "  ubd add ./my_target.ts    a target of your own; with --help: its options\n\n" +
        "Prints the device on standard output once it is LIVE.",
    )
    .argument("[target]", `${TARGET_NAMES.join(", ")} or a module such as ./x.ts`)
    .argument("[files...]", "the file or block device; concat, stripe: several")
    .action(add);
  defineDeviceOptions(command)
    .addOption(
      new Option("--supervise", "start the server again when it dies; implies --recovery")
        .helpGroup(DEVICE),
    )
    .addOption(
      new Option("--watch", "serve a module anew when it changes; implies --recovery")
        .helpGroup(TARGET),
    )
    .addOption(
      new Option("--foreground", "serve here until Ctrl-C, then delete the device")
        .helpGroup(DEVICE),
    );
}

/** All that a device can be told: options of `add` and `run`. */
export function defineDeviceOptions(command: Command): Command {
  const option = (flags: string, description: string, group: string) =>
    new Option(flags, description).helpGroup(group);
  const integer = (what: string) => (text: string) => parseInteger(text, what);
  const size = (what: string) => (text: string) => parseSize(text, what);

  return command
    .addOption(
      option("-n, --number <id>", "device id; -1: the next free one", DEVICE)
        .default(-1).argParser(integer("Device id")),
    )
    .addOption(
      option("-q, --queues <count>", "hardware queues", DEVICE)
        .default(QUEUES_DEFAULT).argParser(integer("Number of queues")),
    )
    .addOption(
      option("-d, --depth <count>", "requests in flight for each queue", DEVICE)
        .default(DEPTH_DEFAULT).argParser(integer("Queue depth")),
    )
    .addOption(
      option("--threads <count>", "threads that serve the queues (default: one each)", DEVICE)
        .argParser(integer("Number of threads")),
    )
    .addOption(
      option("--max-io-size <size>", `largest request (default: ${IO_SIZES})`, DEVICE)
        .argParser(size("Largest I/O")),
    )
    .addOption(
      option("--memory-align <size>", "data lies in memory at multiples of this: 4 to 4K", DEVICE)
        .argParser(size("Memory alignment")),
    )
    .addOption(
      option("--segments <count>", "a request's data is in so many pieces at most", DEVICE)
        .argParser(integer("Number of segments")),
    )
    .addOption(
      option("--segment-size <size>", "no piece is longer; from 4K", DEVICE)
        .argParser(size("Segment size")),
    )
    .addOption(
      option("--segment-boundary <size>", "no piece crosses a multiple of this; from 4K", DEVICE)
        .argParser(size("Segment boundary")),
    )
    .addOption(
      option("--recovery [mode]", "outlive the server: wait, reissue or fail (ubd recover)", DEVICE)
        .preset("reissue").argParser(parseRecovery),
    )
    .addOption(
      option(
        "--start-timeout <seconds>",
        `how long a module may take until the device is there; ${START_TIMEOUT_S}`,
        DEVICE,
      ).argParser(parseStartTimeout),
    )
    .addOption(option("--no-partscan", "do not look for partitions", DEVICE))
    .addOption(option("--root-storage", "systemd lets the server live through shutdown", DEVICE))
    .addOption(
      option("--unprivileged", "a device of your own, without root (ubd udev install)", DEVICE),
    )
    .addOption(
      option(
        "--mlock",
        "keep the server out of swap, as swap on it needs: about 200 MiB for good",
        DEVICE,
      ),
    )
    .addOption(
      option("--zero-copy <mode>", "auto: where kernel and target allow; on, reg, off", DEVICE)
        .argParser(parseZeroCopy),
    )
    .addOption(option("-z", "the same as --zero-copy=on", DEVICE).conflicts("zeroCopy"))
    .addOption(
      option("--user-copy", "the server reads and writes /dev/ublkcN for the data", DEVICE),
    )
    .addOption(
      option("--need-get-data", "ask for the data of each write; -g 1 in ublk", DEVICE),
    )
    .addOption(option("--batch", "requests are fetched and answered many at a time", DEVICE))
    .addOption(option("-t, --type <target>", `the target: ${TARGET_NAMES.join(", ")}`, TARGET))
    .addOption(option("-f, --file <path>", "the same as naming one file", TARGET))
    .addOption(
      option(
        "--size <size>",
        `size of the device; null: ${formatSize(NULL_SIZE_DEFAULT)}, loop: up to the file's end`,
        TARGET,
      ).argParser(size("Size")),
    )
    .addOption(
      option(
        "--block-size <size>",
        "logical block: 512, 1K, 2K or 4K; what a partition table is for, or 512",
        TARGET,
      )
        .argParser(size("Block size")),
    )
    .addOption(
      option("--offset <size>", "loop: where the device starts, in bytes as losetup has it", TARGET)
        .argParser(size("Offset")),
    )
    .addOption(
      option("-o <sectors>", "loop: the same in sectors of 512 bytes", TARGET)
        .argParser(integer("Offset in sectors")).conflicts("offset"),
    )
    .addOption(option("--ro", "files: read-only, they are never written", TARGET))
    .addOption(option("--buffered", "files: through the page cache, not direct I/O", TARGET))
    .addOption(option("--force", "files: though one is locked or in use", TARGET))
    .addOption(
      option("--chunk <size>", "stripe: on one file before the next; 64K", TARGET)
        .argParser(size("Chunk")),
    )
    .addOption(
      option("--opt <name=value>", "an option of the target's own; may be repeated", TARGET)
        .argParser(collectOption),
    )
    .addOption(new Option("--buffered_io").hideHelp())
    .addOption(new Option("-b, --batch-io").hideHelp())
    .addOption(new Option("--user_copy").hideHelp())
    .addOption(new Option("--usercopy").hideHelp())
    .addOption(new Option("--max_io_buf_bytes <bytes>").argParser(size("Largest I/O")).hideHelp())
    .addOption(new Option("-u, --uring_comp <0|1>").argParser(parseSwitch("-u")).hideHelp())
    .addOption(new Option("-g, --need_get_data <0|1>").argParser(parseSwitch("-g")).hideHelp())
    .addOption(new Option("-r, --user_recovery <0|1>").argParser(parseSwitch("-r")).hideHelp())
    .addOption(
      new Option("-i, --user_recovery_reissue <0|1>").argParser(parseSwitch("-i")).hideHelp(),
    )
    .addOption(
      new Option("-e, --user_recovery_fail_io <0|1>").argParser(parseSwitch("-e")).hideHelp(),
    );
}

/** The options of the target that a command line names; empty when it names none of its kind. */
export async function targetHelp(args: readonly string[]): Promise<string> {
  const named = args.find((arg) => TARGET_NAMES.includes(arg) || isModule(arg) || isUrl(arg));
  const name = named !== undefined && isUrl(named) ? "http" : named;
  if (name === undefined || !isModule(name) && !isDefined(name)) return "";
  const definition = isModule(name)
    ? await findDefinition(MODULE_TARGET, resolve(name))
    : await findDefinition(name, "");
  const lines = describeOptions(definition);
  return `\nOptions of ${name}:\n${lines.join("\n") || "  none"}`;
}

async function add(
  target: string | undefined,
  files: string[],
  options: AddOptions,
): Promise<void> {
  const spec = toSpec(target, files, options);
  if (options.foreground) {
    const shim = new Shim();
    becomeFlusher(shim, filesOf(spec).flatMap(({ typed = "" }) => descriptorNumber(typed) ?? []));
    neverWait();
    let shown: Promise<void> | undefined;
    const onLive = (live: Live) => {
      notify(`READY=1\nSTATUS=${live.path} is live`);
      shown = show(live, options);
    };
    const { recover, files } = await waitingDevice(spec);
    const whole = { ...spec, ...(recover !== undefined && { recover }), ...(files && { files }) };
    const source = recover === undefined ? undefined : { device: recover };
    const held = holdFiles(shim, filesOf(whole), source);
    const onAdded = () => {};
    await explainingTaken(spec, serve(whole, { held, daemon: false, log: tell, onAdded, onLive }));
    await shown;
  } else {
    await show(await explainingTaken(spec, startServer(spec)), options);
  }
}

/** The driver says only that an id is taken: a device that is deleted may have it. */
export async function explainingTaken<T>(
  { device: { id } }: Pick<ServerSpec, "device">,
  adding: Promise<T>,
): Promise<T> {
  try {
    return await adding;
  } catch (error) {
    const { errno, operation } = toFailure(error);
    if (errno !== "EEXIST" || operation !== "ADD_DEV") throw error;
    using control = await Control.open();
    const heldBy = await holders(control, id);
    throw heldBy ? takenError(errno, operation, id, heldBy) : error;
  }
}

/**
 * A service manager starts a server that died with the same words again: is the device that they
 * name waiting for a server, and was it added with the same, it is taken over, with the files that it
 * was made of.
 */
export async function waitingDevice(
  spec: ServerSpec,
): Promise<Pick<ServerSpec, "recover" | "files">> {
  const { id } = spec.device;
  if (id < 0 || !spec.recovery) return {};
  using control = await Control.open();
  let known;
  try {
    const { state, targetFlags } = await control.getDeviceInfo(id);
    known = state === UBLK_S_DEV_DEAD ? undefined : readState(id, targetFlags);
  } catch (error) {
    if (isNoneOfOurs(error)) return {};
    throw error;
  }
  if (!known || (await charDeviceOpeners(control.dialect, id)).length > 0) return {};
  // What the device itself has, the driver knows; and what was not said may have had another
  // default in the executable that added it.
  const said = (one: unknown) => ({
    ...JSON.parse(JSON.stringify(one)),
    device: undefined,
    files: undefined,
  });
  if (isDeepStrictEqual(said(known.spec), said(spec))) {
    const files = filesOf(known.spec as ServerSpec).map((file) => {
      const { typed } = spec.files?.find(({ path }) => path === file.path) ?? {};
      return typed === undefined ? file : { ...file, typed };
    });
    return { recover: id, files };
  }
  throw new UblkError({
    errno: "EEXIST",
    operation: "add",
    device: id,
    hint: "it waits for a server, and was added with other options: ubd recover -n ID serves it " +
      "with those, ubd del --force ID deletes it",
  });
}

export function toSpec(
  target: string | undefined,
  files: readonly string[],
  options: AddOptions,
): ServerSpec {
  if (options.type !== undefined && target !== undefined) {
    throw new UsageError(`Name the target once: "${target}", or -t ${options.type}`);
  }
  const named = options.type ?? target;
  const isHttp = named !== undefined && isUrl(named);
  const name = isHttp ? "http" : named;
  if (name === undefined) {
    throw new UsageError(`Which target? ubd add ${TARGET_NAMES.join(" ... or ubd add ")} ...`);
  }
  if (!TARGET_NAMES.includes(name) && !isModule(name) && existsSync(name)) {
    throw new UsageError(`"${name}" is neither target nor module: ubd add loop ${name}`);
  }
  // "module" is a module's name in specs only.
  const defined = isModule(name) || isDefined(name) && name !== MODULE_TARGET;
  if (!defined) findTarget(name);
  if (files.length > 0 && options.file !== undefined) {
    throw new UsageError(`Name the file once: "${files[0]}", or -f ${options.file}`);
  }
  const paths = options.file === undefined ? files : [options.file];
  refuseOptionsOfOthers(name, defined, { ...options, ...(paths[0] && { file: paths[0] }) });
  const device = {
    id: options.number,
    queues: options.queues,
    depth: options.depth,
    ...(options.threads !== undefined && { threads: options.threads }),
    ioBytesMax: options.max_io_buf_bytes ?? options.maxIoSize,
    compInTask: options.uring_comp ?? false,
    noPartScan: !options.partscan,
    memory: {
      memoryAlignBytes: options.memoryAlign,
      segmentsMax: options.segments,
      segmentBytesMax: options.segmentSize,
      segmentBoundaryBytes: options.segmentBoundary,
    },
    zeroCopy: options.zeroCopy ?? (options.z ? "on" as const : "auto" as const),
    userCopy: (options.userCopy || options.user_copy || options.usercopy) ?? false,
    batch: (options.batch || options.batchIo) ?? false,
    needGetData: options.needGetData ?? options.need_get_data ?? false,
  };
  checkOptions(device);
  checkMemoryLimits(device.memory);
  for (const name of ["supervise", "watch"] as const) {
    if (options[name] && options.foreground) {
      throw new UsageError(`--${name} is for servers in the background: leave out --foreground`);
    }
  }
  if (options.watch && (!isModule(name) || options.supervise)) {
    throw new UsageError("--watch is for a module such as ./x.ts, and without --supervise");
  }
  if (options.watch && device.batch) {
    throw new UsageError("--watch is without --batch: the driver fails requests in an upgrade");
  }
  const lasting = {
    ...toRecovery(options),
    ...(options.rootStorage && { rootStorage: true }),
    ...(options.unprivileged && { unprivileged: true }),
    ...(options.mlock && { lockMemory: true }),
    ...(options.startTimeout !== undefined && { startTimeoutS: options.startTimeout }),
  };
  if (name === "memory" && lasting.recovery) {
    throw new UsageError("--recovery: what memory holds is gone with its server");
  }
  if (lasting.unprivileged && lasting.recovery) {
    throw new UsageError("--unprivileged: the driver gives such devices no recovery");
  }
  const opt = isHttp ? collectOption(`url=${named}`, options.opt) : options.opt;
  const own = { ...options, ...(opt && { opt }) };
  const several = name === "concat" || name === "stripe";
  if (!several && paths.length > 1) throw new UsageError(`Target ${name} takes one file`);
  if (defined) return { device, ...lasting, ...toDefinedTarget(name, paths[0], own) };
  const backings = paths.map(backingFile);
  return {
    device,
    ...lasting,
    target: toTarget(name, backings.map(({ path }) => path), own),
    ...(backings.length > 0 && { files: backings }),
  };
}

/** The target's part of the spec. */
function toTarget(
  name: string,
  files: readonly string[],
  options: AddOptions,
): ServerSpec["target"] {
  const common = {
    ...(options.size !== undefined && { sizeBytes: options.size }),
    ...(options.blockSize !== undefined && { blockBytes: options.blockSize }),
  };
  if (name === "null") return { name, options: common };
  if (files.length === 0) throw new UsageError(`Which file? ubd add ${name} FILE`);
  const access = {
    ...common,
    readOnly: options.ro ?? false,
    buffered: (options.buffered || options.buffered_io) ?? false,
    force: options.force ?? false,
  };
  if (name !== "loop") {
    const chunk = options.chunk !== undefined && { chunkBytes: options.chunk };
    return { name, options: { ...access, files, ...chunk } };
  }
  const offsetBytes = options.offset ?? (options.o ?? 0) * SECTOR_BYTES;
  if (offsetBytes < 0) throw new UsageError(`Offset ${offsetBytes}: it must not be negative`);
  return { name, options: { ...access, file: files[0], offsetBytes } };
}

/**
 * Of a target written with defineTarget: it declares what it takes, and says so. What files those of
 * a module name is known once it is loaded.
 */
function toDefinedTarget(
  name: string,
  file: string | undefined,
  { opt = {}, size, blockSize }: AddOptions,
): Pick<ServerSpec, "target" | "files"> {
  const also = Object.entries({ file, size, blockSize }).filter(([, value]) => value !== undefined);
  const twice = also.find(([key]) => Object.hasOwn(opt, key));
  if (twice) throw new UsageError(`--opt ${twice[0]}: it is given twice`);
  const given: Record<string, unknown> = { ...opt, ...Object.fromEntries(also) };
  const directory = process.cwd(); // The server's is another one.
  if (isModule(name)) {
    const options = { options: given, directory, file: resolve(name) };
    return { target: { name: MODULE_TARGET, options } };
  }
  const files = Object.entries(declaredOptions(name)).flatMap(([option, { type }]) => {
    const typed = given[option];
    if ((type !== "file" && type !== "path") || typeof typed !== "string") return [];
    const backing = backingFile(typed);
    given[option] = backing.path;
    return [{ ...backing, ...(type === "path" && { optional: true }) }];
  });
  const target = { name, options: { options: given, directory } };
  return { target, ...(files.length > 0 && { files }) };
}

/** Our option, or the switches of `ublk`, of which reissue and fail each imply recovery. */
function toRecovery(options: AddOptions): Pick<ServerSpec, "recovery" | "supervise" | "watch"> {
  const { user_recovery: wait, user_recovery_reissue: reissue, user_recovery_fail_io: fail } =
    options;
  if (reissue && fail) throw new UsageError("-i 1 and -e 1 exclude each other");
  const recovery = options.recovery ??
    (reissue ? "reissue" : fail ? "fail" : wait ? "wait" : undefined);
  if (options.supervise) return { recovery: recovery ?? "reissue", supervise: true };
  if (options.watch) return { recovery: recovery ?? "reissue", watch: true };
  return recovery ? { recovery } : {};
}

export async function show(live: Live, { json }: { json?: boolean }): Promise<void> {
  using control = await Control.open();
  const facts = await describeDevice(control, live.id);
  if (json) {
    printJson({ ...facts, notes: live.notes });
    return;
  }
  print(dumpDevice(facts));
  const notes = [formatSize(facts.sizeBytes), facts.readOnly ? "read-only" : "", ...live.notes];
  tell(`${live.path} is live: ${notes.filter(Boolean).join(", ")}`);
}
