// SPDX-License-Identifier: MIT
/** `ubd list`, `ubd info` and `ubd features`: what the driver and the state files say. @module */

import process from "node:process";
import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { Process } from "../core/proc.ts";
import { readState } from "../core/state.ts";
import type { TargetFacts } from "../core/target.ts";
import { oneLine } from "../core/text.ts";
import { filesOf, tellLostNames } from "./backing_files.ts";
import {
  deletedDevices,
  describeAll,
  describeDevice,
  describeParams,
  type DeviceFacts,
  dumpDevice,
  dumpFeatures,
  featureNames,
  knownParams,
  whenFree,
} from "./describe.ts";
import { reportFailure, toFailure } from "./exit.ts";
import { print, printJson, tell } from "./output.ts";
import { forsaken } from "./quiescing.ts";
import { formatSize, oneDeviceId, parseDeviceId } from "./size.ts";
import { specOf } from "./spec.ts";
import { formatTable } from "./table.ts";

interface ListOptions {
  number?: number;
  long?: boolean;
  verbose?: boolean;
  json?: boolean;
}

export function defineList(program: Command): void {
  program.command("list")
    .summary("show all devices, or one")
    .description(
      "Shows all devices, or one, as the driver sees them: as a table at a terminal, as lines of " +
        "their own to a pipe or a file.",
    )
    .argument("[device]", "only this one: id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .option("-l, --long", "the lines also at a terminal")
    .option("-v, --verbose", "everything, as indented JSON")
    .action(list);

  program.command("info")
    .description("Shows one device in words.")
    .summary("show one device in words")
    .argument("[device]", "id, or path such as /dev/ublkb0", parseDeviceId)
    .option("-n, --number <id>", "device id", parseDeviceId)
    .action(info);

  program.command("features")
    .description("Shows what the running kernel's driver can do.")
    .summary("show what the driver can do")
    .action(features);
}

async function list(
  device: number | undefined,
  { number: option, long, verbose, json }: ListOptions,
): Promise<void> {
  const isAll = device === undefined && option === undefined;
  const number = isAll ? undefined : oneDeviceId("list", device, option);
  using control = await Control.open();
  control.apart = true;
  let failed: unknown;
  const onFailure = (error: unknown) => {
    if (failed !== undefined) reportFailure(toFailure(failed), false);
    failed = error;
  };
  const devices = number === undefined
    ? await describeAll(control, onFailure)
    : [await describeDevice(control, number)];
  if (json) printJson(devices);
  else if (verbose) await listVerbosely(control, devices);
  else if (long || !process.stdout.isTTY) print(devices.map(dumpDevice).join(""));
  else if (devices.length > 0) print(formatTable(rowsOf(devices), process.stdout.columns || 80));
  else if (failed === undefined) tell("no devices");
  for (const { id, heldBy } of devices) {
    if (heldBy) tell(`device ${id} is deleted; ${whenFree(heldBy)}`);
  }
  for (const { id, heldBy } of number === undefined ? await deletedDevices(control) : []) {
    tell(`device ${id} is deleted; ${whenFree(heldBy)}`);
  }
  if (failed !== undefined) throw failed;
}

/** What a person wants to know first. */
function rowsOf(devices: readonly DeviceFacts[]): string[][] {
  return [
    ["DEVICE", "SIZE", "STATE", "SERVER", "TARGET", "WHAT"],
    ...devices.map((facts) => [
      facts.path,
      formatSize(facts.sizeBytes),
      isStopped(facts) ? `${facts.state}, stopped` : facts.state,
      facts.pid > 0 ? `${facts.pid}` : "none",
      `${facts.target.name ?? "not of ubd"}`,
      `${backingOf(facts.target)}${facts.readOnly ? " (read-only)" : ""}`.trim(),
    ]),
  ];
}

/** The file, module or address that a device is made of. */
function backingOf(target: TargetFacts): string {
  const { backing_file: file, backing_files: files, module, url } = target;
  return Array.isArray(files) ? files.join(" ") : `${file ?? module ?? url ?? ""}`;
}

function isStopped({ pid }: DeviceFacts): boolean {
  return pid > 0 && Process.find(pid)?.isStopped === true;
}

async function listVerbosely(control: Control, devices: readonly DeviceFacts[]): Promise<void> {
  for (const facts of devices) {
    const params = control.dialect.hasParams ? await control.getParams(facts.id) : {};
    const { queueThreads: _, target, ...device } = facts;
    const queues: Record<number, unknown> = {};
    for (const [qid, [first, ...rest]] of Map.groupBy(facts.queueThreads, ({ qid }) => qid)) {
      const others = rest.map(({ tid, affinity }) => ({ tid, affinity }));
      queues[qid] = { ...first, ...(others.length > 0 && { others }) };
    }
    printJson({ dev_info: device, params, queues, target }, 4);
  }
}

/** Where it is not one for each queue. */
function wordsOfThreads({ queueThreads, queues }: DeviceFacts): string {
  const threads = new Set(queueThreads.map(({ tid }) => tid)).size;
  return threads === 0 || threads === queues
    ? ""
    : `, served by ${threads} thread${threads === 1 ? "" : "s"}`;
}

async function info(device: number | undefined, { number, json }: ListOptions): Promise<void> {
  const id = oneDeviceId("info", device, number);
  using control = await Control.open();
  control.apart = true;
  const facts = await describeDevice(control, id);
  const known = await knownParams(control, id);
  const params = known && describeParams(known);
  if (json) {
    printJson({ ...facts, ...(params && { params }) });
    return;
  }
  const { targetFlags } = await control.getDeviceInfo(id);
  const state = readState(id, targetFlags);
  const ours = state !== undefined;
  const stopped = isStopped(facts) ? ", which is stopped (kill -CONT lets it go on)" : "";
  const served = facts.pid > 0 ? `process ${facts.pid}${stopped}` : "nobody";
  const lines: [string, string][] = [
    ["device", `${facts.path} (${facts.block === "0:0" ? "not there" : facts.block})`],
    ["state", facts.state],
    ...(facts.quiescing === undefined ? [] : [
      ["quiescing", `process ${facts.quiescing} makes its server let go: new requests wait`] as [
        string,
        string,
      ],
    ]),
    ...(facts.forsaken ? [["quiescing", forsaken(id)] as [string, string]] : []),
    ...(facts.heldBy === undefined
      ? []
      : [["deleted", whenFree(facts.heldBy)] as [string, string]]),
    ["size", `${formatSize(facts.sizeBytes)} (${facts.sizeBytes} bytes)`],
    ["block", `${facts.blockBytes} bytes${facts.readOnly ? ", read-only" : ""}`],
    [
      "queues",
      `${facts.queues} of depth ${facts.depth}, up to ${formatSize(facts.maxIoBytes)}` +
      wordsOfThreads(facts),
    ],
    ...(params ? wordsOf(params) : []),
    ["served by", ours ? served : `${served}, not of ubd`],
    ...(facts.supervisor === undefined
      ? []
      : [["supervised by", `process ${facts.supervisor}`] as [string, string]]),
    ["features", facts.features.join(" ") || "none"],
    // As in ublk's dump, which has no unit.
    ...Object.entries(facts.target).map(([key, value]): [string, string] => [
      key,
      `${value}${key === "offset" ? " sectors" : ""}`,
    ]),
  ];
  for (const [name, value] of lines) print(`${name.padEnd(14)}${oneLine(value)}\n`);
  const told = state && specOf(state);
  if (told && "spec" in told) tellLostNames(control.shim, filesOf(told.spec), facts.path);
}

function wordsOf(params: ReturnType<typeof describeParams>): [string, string][] {
  const { discard, zoned, segments, integrity } = params;
  const optional: [string, string | false | undefined][] = [
    [
      "discard",
      discard && `in ${formatSize(discard.granularityBytes)}, up to ` +
        `${formatSize(discard.discardBytesMax)}; zeroes up to ` +
        formatSize(discard.writeZeroesBytesMax),
    ],
    ["zones", zoned && `${zoned.openZonesMax} open, ${zoned.activeZonesMax} active at most`],
    [
      "segments",
      segments && `${segments.max} of up to ${formatSize(segments.bytesMax)}, none across a ` +
        `multiple of ${formatSize(segments.boundaryBytes)}`,
    ],
    ["integrity", integrity && `${integrity.metadataBytes} bytes for each block`],
  ];
  return [
    [
      "best I/O",
      `${formatSize(params.ioOptBytes)}, at least ${formatSize(params.ioMinBytes)}, physical ` +
      `block ${formatSize(params.physicalBlockBytes)}, memory aligned to ` +
      `${params.memoryAlignBytes} bytes`,
    ],
    ["attributes", params.attributes.join(", ") || "none"],
    ...optional.filter((line): line is [string, string] => typeof line[1] === "string"),
  ];
}

async function features({ json }: ListOptions): Promise<void> {
  using control = await Control.open();
  if (control.features === undefined) {
    throw new UblkError({
      errno: "EOPNOTSUPP",
      operation: "GET_FEATURES",
      hint: "drivers before that of Linux 6.5 cannot say what they can do",
    });
  }
  if (json) {
    const hex = `0x${control.features.toString(16)}`;
    printJson({ features: hex, names: featureNames(control.features) });
  } else {
    print(dumpFeatures(control.features));
  }
}
