// SPDX-License-Identifier: MIT
/** `ubd list`, `ubd info` and `ubd features`: what the driver and the state files say. @module */

import type { Command } from "commander";
import { Control } from "../core/control.ts";
import { UblkError } from "../core/error.ts";
import { readState } from "../core/state.ts";
import { oneLine } from "../core/text.ts";
import {
  describeAll,
  describeDevice,
  describeParams,
  dumpDevice,
  dumpFeatures,
  featureNames,
  knownParams,
} from "./describe.ts";
import { print, printJson } from "./output.ts";
import { formatSize, parseDeviceId } from "./size.ts";

interface ListOptions {
  number?: number;
  verbose?: boolean;
  json?: boolean;
}

export function defineList(program: Command): void {
  program.command("list")
    .summary("show all devices, or one")
    .description("Shows all devices, or one, as the driver sees them.")
    .option("-n, --number <id>", "only this device", parseDeviceId)
    .option("-v, --verbose", "everything, as indented JSON")
    .action(list);

  program.command("info")
    .description("Shows one device in words.")
    .summary("show one device in words")
    .argument("<device>", "id, or path such as /dev/ublkb0", parseDeviceId)
    .action(info);

  program.command("features")
    .description("Shows what the running kernel's driver can do.")
    .summary("show what the driver can do")
    .action(features);
}

async function list({ number, verbose, json }: ListOptions): Promise<void> {
  using control = await Control.open();
  const devices = number === undefined
    ? await describeAll(control)
    : [await describeDevice(control, number)];
  if (json) {
    printJson(devices);
    return;
  }
  for (const facts of devices) {
    if (!verbose) {
      print(dumpDevice(facts));
      continue;
    }
    const params = control.dialect.hasParams ? await control.getParams(facts.id) : {};
    const { queueThreads: _, target, ...device } = facts;
    const queues = Object.fromEntries(facts.queueThreads.map((queue) => [queue.qid, queue]));
    printJson({ dev_info: device, params, queues, target }, 4);
  }
}

async function info(id: number, { json }: ListOptions): Promise<void> {
  using control = await Control.open();
  const facts = await describeDevice(control, id);
  const known = await knownParams(control, id);
  const params = known && describeParams(known);
  if (json) {
    printJson({ ...facts, ...(params && { params }) });
    return;
  }
  const { targetFlags } = await control.getDeviceInfo(id);
  const ours = readState(id, targetFlags) !== undefined;
  const served = facts.pid > 0 ? `process ${facts.pid}` : "nobody";
  const lines: [string, string][] = [
    ["device", `${facts.path} (${facts.block === "0:0" ? "not there" : facts.block})`],
    ["state", facts.state],
    ["size", `${formatSize(facts.sizeBytes)} (${facts.sizeBytes} bytes)`],
    ["block", `${facts.blockBytes} bytes${facts.readOnly ? ", read-only" : ""}`],
    ["queues", `${facts.queues} of depth ${facts.depth}, up to ${formatSize(facts.maxIoBytes)}`],
    ...(params ? wordsOf(params) : []),
    ["served by", ours ? served : `${served}, not of ubd`],
    ...(facts.supervisor === undefined
      ? []
      : [["supervised by", `process ${facts.supervisor}`] as [string, string]]),
    ["features", facts.features.join(" ") || "none"],
    ...Object.entries(facts.target).map(([key, value]): [string, string] => [key, String(value)]),
  ];
  for (const [name, value] of lines) print(`${name.padEnd(14)}${oneLine(value)}\n`);
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
