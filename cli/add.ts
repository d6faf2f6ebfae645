// SPDX-License-Identifier: MIT
/** `ubd add`: makes a device from a target and serves it. @module */

import { resolve } from "node:path";
import process from "node:process";
import { Control } from "../core/control.ts";
import { checkOptions, DEPTH_DEFAULT, IO_BYTES_DEFAULT, QUEUES_DEFAULT } from "../core/device.ts";
import { describeOptions } from "../core/define_target.ts";
import { UsageError } from "../core/error.ts";
import { SECTOR_BYTES } from "../core/queue.ts";
import { ZERO_COPY_WISHES, type ZeroCopyWish } from "../core/zero_copy.ts";
import { NULL_SIZE_DEFAULT } from "../targets/null.ts";
import { findDefinition, findTarget, isDefined, TARGET_NAMES } from "../targets/mod.ts";
import { isModule, isUrl, MODULE_TARGET } from "../targets/module.ts";
import { type Command, Option } from "commander";
import { describeDevice, dumpDevice } from "./describe.ts";
import { type Live, type RecoveryMode, serve, type ServerSpec, startServer } from "./server.ts";
import { formatSize, parseInteger, parseSize } from "./size.ts";
import { notify } from "./systemd.ts";

export interface AddOptions {
  type?: string;
  file?: string;
  number: number;
  queues: number;
  depth: number;
  maxIoSize: number;
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
  /** Of a target written with defineTarget, by name. */
  opt?: Record<string, string>;
  foreground?: boolean;
  mlock?: boolean;
  unprivileged?: boolean;
  recovery?: RecoveryMode;
  supervise?: boolean;
  partscan: boolean;
  rootStorage?: boolean;
  zeroCopy?: ZeroCopyWish;
  /** Zero copy is insisted on. */
  z?: boolean;
  uring_comp?: boolean;
  need_get_data?: boolean;
  user_recovery?: boolean;
  user_recovery_reissue?: boolean;
  user_recovery_fail_io?: boolean;
  json?: boolean;
}

const DEVICE = "Device:";
const TARGET = "Target:";

/** Options that only loop understands, by the name they have in AddOptions. */
const LOOP_ONLY = ["file", "ro", "buffered", "buffered_io", "offset", "o", "force"];

/** `--offset 2048` means sectors to `ublk` and bytes to `losetup`: a unit must say which. */
function parseOffset(text: string): number {
  if (/^\d+$/.test(text) && text !== "0") {
    throw new UsageError(
      `Offset "${text}": say ${text}s for sectors (what ublk means) or ${text}B for bytes`,
    );
  }
  return parseSize(text, "Offset");
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

function collectOption(text: string, collected: Record<string, string> = {}) {
  const [, name, value] = /^([^=]+)=(.*)$/s.exec(text) ?? [];
  if (name === undefined) throw new UsageError(`--opt ${text}: say --opt NAME=VALUE`);
  if (Object.hasOwn(collected, name)) throw new UsageError(`--opt ${name}: it is given twice`);
  return { ...collected, [name]: value! };
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
        "  ubd add ./my_target.ts    a target of your own; with --help: its options\n\n" +
        "Prints the device on standard output once it is LIVE.",
    )
    .argument("[target]", `${TARGET_NAMES.join(", ")} or a module such as ./x.ts`)
    .argument("[file]", "loop: the file or block device")
    .action(add);
  defineDeviceOptions(command)
    .addOption(
      new Option("--supervise", "start the server again when it dies; implies --recovery")
        .helpGroup(DEVICE),
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
      option("-q, --queues <count>", "hardware queues, a thread each", DEVICE)
        .default(QUEUES_DEFAULT).argParser(integer("Number of queues")),
    )
    .addOption(
      option("-d, --depth <count>", "requests in flight for each queue", DEVICE)
        .default(DEPTH_DEFAULT).argParser(integer("Queue depth")),
    )
    .addOption(
      option("--max-io-size <size>", "largest request", DEVICE)
        .default(IO_BYTES_DEFAULT, formatSize(IO_BYTES_DEFAULT)).argParser(size("Largest I/O")),
    )
    .addOption(
      option("--recovery [mode]", "outlive the server: wait, reissue or fail (ubd recover)", DEVICE)
        .preset("reissue").argParser(parseRecovery),
    )
    .addOption(option("--no-partscan", "do not look for partitions", DEVICE))
    .addOption(option("--root-storage", "systemd lets the server live through shutdown", DEVICE))
    .addOption(
      option("--unprivileged", "a device of your own, without root (ubd udev install)", DEVICE),
    )
    .addOption(
      option("--mlock", "keep the server out of swap: about 200 MiB of memory for good", DEVICE),
    )
    .addOption(
      option("--zero-copy <mode>", "auto: where kernel and target allow; on, reg, off", DEVICE)
        .argParser(parseZeroCopy),
    )
    .addOption(option("-z", "the same as --zero-copy=on", DEVICE).conflicts("zeroCopy"))
    .addOption(option("-t, --type <target>", `the target: ${TARGET_NAMES.join(", ")}`, TARGET))
    .addOption(option("-f, --file <path>", "loop: the file or block device", TARGET))
    .addOption(
      option(
        "--size <size>",
        `size of the device; null: ${formatSize(NULL_SIZE_DEFAULT)}, loop: up to the file's end`,
        TARGET,
      ).argParser(size("Size")),
    )
    .addOption(
      option("--block-size <size>", "logical block: 512, 1K, 2K or 4K; files: 512", TARGET)
        .argParser(size("Block size")),
    )
    .addOption(
      option("--offset <size>", "loop: where the device starts, with a unit", TARGET)
        .argParser(parseOffset),
    )
    .addOption(
      option("-o <sectors>", "loop: the same in sectors of 512 bytes", TARGET)
        .argParser(integer("Offset in sectors")).conflicts("offset"),
    )
    .addOption(option("--ro", "loop: read-only; the file is never written", TARGET))
    .addOption(option("--buffered", "loop: through the page cache, not direct I/O", TARGET))
    .addOption(option("--force", "loop: though the file is locked or in use", TARGET))
    .addOption(
      option(
        "--opt <name=value>",
        "an option of http or a target of your own; may be repeated",
        TARGET,
      )
        .argParser(collectOption),
    )
    .addOption(new Option("--buffered_io").hideHelp())
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
  const named = args.find((arg) => isModule(arg) || isDefined(arg) || isUrl(arg));
  if (named === undefined) return "";
  const name = isUrl(named) ? "http" : named;
  const definition = isModule(name)
    ? await findDefinition(MODULE_TARGET, resolve(name))
    : await findDefinition(name, "");
  const lines = describeOptions(definition);
  return `\nOptions of ${name}:\n${lines.join("\n") || "  none"}`;
}

async function add(
  target: string | undefined,
  file: string | undefined,
  options: AddOptions,
): Promise<void> {
  const spec = toSpec(target, file, options);
  if (options.foreground) {
    const log = (text: string) => process.stderr.write(`ubd: ${text}\n`);
    let shown: Promise<void> | undefined;
    const onLive = (live: Live) => {
      notify(`READY=1\nSTATUS=${live.path} is live`);
      shown = show(live, options);
    };
    await serve(spec, { daemon: false, log, onAdded: () => {}, onLive });
    await shown;
  } else {
    await show(await startServer(spec), options);
  }
}

export function toSpec(
  target: string | undefined,
  file: string | undefined,
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
  const defined = isModule(name) || isDefined(name);
  if (!defined) findTarget(name);
  if (file !== undefined && options.file !== undefined) {
    throw new UsageError(`Name the file once: "${file}", or -f ${options.file}`);
  }
  const device = {
    id: options.number,
    queues: options.queues,
    depth: options.depth,
    ioBytesMax: options.max_io_buf_bytes ?? options.maxIoSize,
    compInTask: options.uring_comp ?? false,
    noPartScan: !options.partscan,
    zeroCopy: options.zeroCopy ?? (options.z ? "on" as const : "auto" as const),
  };
  checkOptions(device);
  if (options.need_get_data) {
    throw new UsageError("-g 1: ubd does not support NEED_GET_DATA yet; leave it out");
  }
  if (options.supervise && options.foreground) {
    throw new UsageError("--supervise is for servers in the background: leave out --foreground");
  }
  const lasting = {
    ...toRecovery(options),
    ...(options.rootStorage && { rootStorage: true }),
    ...(options.unprivileged && { unprivileged: true }),
    ...(options.mlock && { lockMemory: true }),
  };
  if (lasting.unprivileged && lasting.recovery) {
    throw new UsageError("--unprivileged: the driver gives such devices no recovery");
  }
  const common = {
    ...(options.size !== undefined && { sizeBytes: options.size }),
    ...(options.blockSize !== undefined && { blockBytes: options.blockSize }),
  };
  const path = file ?? options.file;
  if (defined) {
    const given = LOOP_ONLY.find((key) => options[key as keyof AddOptions] !== undefined);
    if (given !== undefined || path !== undefined || Object.keys(common).length > 0) {
      throw new UsageError(
        `Target ${name} takes its own options only: --opt NAME=VALUE; ubd add ${name} --help`,
      );
    }
    const file = isModule(name) ? { file: resolve(name) } : {};
    const opt = isHttp ? collectOption(`url=${named}`, options.opt) : options.opt;
    const own = { ...file, options: opt ?? {}, directory: process.cwd() };
    const target = { name: isModule(name) ? MODULE_TARGET : name, options: own };
    return { device, ...lasting, target };
  }
  if (options.opt) throw new UsageError(`Target ${name} takes no --opt`);
  if (name !== "loop") {
    const given = LOOP_ONLY.find((key) => options[key as keyof AddOptions] !== undefined);
    if (given !== undefined || path !== undefined) {
      const what = given === undefined || given === "file"
        ? "no file"
        : `no ${given === "o" ? "-o" : `--${given}`}`;
      throw new UsageError(`Target ${name} takes ${what}: that is for loop`);
    }
    return { device, ...lasting, target: { name, options: common } };
  }
  if (path === undefined) throw new UsageError("Which file? ubd add loop FILE");
  const offsetBytes = options.offset ?? (options.o ?? 0) * SECTOR_BYTES;
  if (offsetBytes < 0) throw new UsageError(`Offset ${offsetBytes}: it must not be negative`);
  return {
    device,
    ...lasting,
    target: {
      name,
      options: {
        ...common,
        // The server's working directory is another one.
        file: resolve(path),
        offsetBytes,
        readOnly: options.ro ?? false,
        buffered: (options.buffered || options.buffered_io) ?? false,
        force: options.force ?? false,
      },
    },
  };
}

/** Our option, or the switches of `ublk`, of which reissue and fail each imply recovery. */
function toRecovery(options: AddOptions): Pick<ServerSpec, "recovery" | "supervise"> {
  const { user_recovery: wait, user_recovery_reissue: reissue, user_recovery_fail_io: fail } =
    options;
  if (reissue && fail) throw new UsageError("-i 1 and -e 1 exclude each other");
  const recovery = options.recovery ??
    (reissue ? "reissue" : fail ? "fail" : wait ? "wait" : undefined);
  if (options.supervise) return { recovery: recovery ?? "reissue", supervise: true };
  return recovery ? { recovery } : {};
}

export async function show(live: Live, { json }: { json?: boolean }): Promise<void> {
  using control = await Control.open();
  const facts = await describeDevice(control, live.id);
  if (json) {
    console.log(JSON.stringify({ ...facts, notes: live.notes }));
    return;
  }
  process.stdout.write(dumpDevice(facts));
  const notes = [formatSize(facts.sizeBytes), facts.readOnly ? "read-only" : "", ...live.notes];
  process.stderr.write(`ubd: ${live.path} is live: ${notes.filter(Boolean).join(", ")}\n`);
}
