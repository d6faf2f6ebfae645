// SPDX-License-Identifier: MIT
/**
 * The command line: verbs, errors, exit codes.
 * @module
 */

import { release } from "node:os";
import process from "node:process";
import { Command, CommanderError, Help } from "commander";
import { UsageError } from "../core/error.ts";
import { onStateFault } from "../core/state.ts";
import { VERSION } from "../core/version.ts";
import { runtime } from "../ffi/mod.ts";
import { defineAdd, targetHelp } from "./add.ts";
import { defineDel, defineStop } from "./del.ts";
import { defineDoctor } from "./doctor.ts";
import { EXIT, EXIT_MEANINGS, reportFailure, toFailure, VERB_EXIT_MEANINGS } from "./exit.ts";
import { defineGc } from "./gc.ts";
import { defineList } from "./list.ts";
import { print, printJson, tell } from "./output.ts";
import { defineLog } from "./log.ts";
import { defineQuiesce, defineUpgrade } from "./quiesce.ts";
import { defineRecover } from "./recover.ts";
import { defineResize } from "./resize.ts";
import { defineSetAffinity } from "./set_affinity.ts";
import { commandOf, defineRun } from "./run.ts";
import { defineUdev } from "./udev.ts";

/** @param json help is JSON, too. @param targetHelp of the target that the words name. */
export function defineProgram(json = false, targetHelp = ""): Command {
  const text = (help: string) => () => json ? "" : help;
  const program = new Command("ubd")
    .description("Linux block devices served from TypeScript (ublk)")
    .helpCommand(false)
    .enablePositionalOptions() // `list -v` is not `-v`
    .exitOverride()
    .configureOutput({ writeOut: print, outputError: () => {} }) // reportFailure prints it
    .configureHelp({
      formatHelp: (command, helper) =>
        json
          ? `${JSON.stringify(describe(command, targetHelp))}\n`
          : Help.prototype.formatHelp.call(helper, command, helper),
    })
    .showSuggestionAfterError();
  defineAdd(program);
  defineRun(program);
  defineDel(program);
  defineStop(program);
  defineResize(program);
  defineRecover(program);
  defineQuiesce(program);
  defineUpgrade(program);
  defineGc(program);
  defineSetAffinity(program);
  defineList(program);
  defineLog(program);
  defineDoctor(program);
  defineUdev(program);
  program.command("version")
    .summary("show versions")
    .description("Shows the versions of ubd, its runtime and the kernel.")
    .action(version);
  program.command("help")
    .summary("show help")
    .description("Shows help, for all verbs or for one.")
    .argument("[verb...]", "what to explain")
    .option("-t, --type <target>", "the same as: help add")
    .action(([verb]: string[], { type }: { type?: string }) =>
      help(program, type === undefined ? verb : "add")
    );
  program.option("-v, --version", "show versions");
  program.action((_, command: Command) => {
    if (command.args.length > 0) unknownVerb(program, command.args[0]!);
    if (command.opts().version) return version({});
    help(program);
    process.exitCode = EXIT.USAGE;
  });
  program.allowExcessArguments(true);
  for (const command of program.commands) {
    command.option("--json", "print JSON on standard output");
    const own = VERB_EXIT_MEANINGS[command.name()];
    if (own) {
      const exits = `\nExit codes, besides those of ubd help:\n${codes(own)}`;
      command.addHelpText("after", text(exits));
    }
    if (targetHelp && command.name() === "add") command.addHelpText("after", text(targetHelp));
  }
  const sizes = "\nSizes: bytes, or 64K, 64M, 64G (x 1024), 64MB (x 1000), 64s (sectors)\n\n";
  program.addHelpText("after", text(`${sizes}Exit codes:\n${codes(EXIT_MEANINGS)}`));
  for (const command of [program, ...program.commands]) refuseTwice(command);
  return program;
}

/** What other tools call it. */
const SYNONYMS: Record<string, string> = {
  ...{ create: "add", attach: "add", start: "add", new: "add" },
  ...{ rm: "del", remove: "del", destroy: "del", detach: "del", stop: "del" },
  ...{ ls: "list", ps: "list", status: "info", show: "info", logs: "log", check: "doctor" },
};

function unknownVerb(program: Command, verb: string): never {
  const same = Object.hasOwn(SYNONYMS, verb) ? SYNONYMS[verb] : undefined;
  if (same !== undefined) {
    return program.error(`unknown command '${verb}'\n(Did you mean ${same}?)`);
  }
  // It looks for a similar one; its types do not have it.
  program.args = [verb];
  return (program as unknown as { unknownCommand(): never }).unknownCommand();
}

/** Of two values, which one is meant? The last would win, and `del -n 0 -n 1` delete one. */
function refuseTwice(command: Command): void {
  for (const option of command.options) {
    const collects = option.attributeName() === "opt"; // It refuses the same name twice.
    if (collects || !(option.required || option.optional)) continue;
    let given = false;
    command.on(`option:${option.name()}`, () => {
      if (given) throw new UsageError(`${option.long ?? option.short}: it is given twice`);
      given = true;
    });
  }
}

function codes(meanings: readonly (readonly [number | string, string])[]): string {
  return meanings.map(([code, meaning]) => `  ${String(code).padEnd(4)}${meaning}`).join("\n");
}

function version({ json }: { json?: boolean }): void {
  const facts = { version: VERSION, runtime, kernel: release() };
  if (json) printJson(facts);
  else print(`ubd ${VERSION} (${runtime}, Linux ${facts.kernel})\n`);
}

function help(program: Command, verb?: string): void {
  const command = verb === undefined ? program : program.commands.find((c) => c.name() === verb);
  if (!command) unknownVerb(program, verb!);
  command.outputHelp();
}

function describe(command: Command, targetHelp = ""): unknown {
  const texts = command.createHelp();
  return {
    name: command.name(),
    summary: command.summary() || command.description(),
    usage: texts.commandUsage(command),
    description: command.description(),
    arguments: command.registeredArguments.map((argument) => argument.name()),
    options: texts.visibleOptions(command).map((option) => ({
      flags: option.flags,
      description: texts.optionDescription(option),
      group: option.helpGroupHeading ?? "Options:",
    })),
    ...(targetHelp && { target: targetHelp.trim() }),
    exitCodes: [
      ...new Map([...EXIT_MEANINGS, ...VERB_EXIT_MEANINGS[command.name()] ?? []]),
    ].map(([code, meaning]) => ({ code, meaning })),
    commands: command.commands.map((one) => describe(one)),
  };
}

/** `ubd add ./x.ts --help` shows what only the module knows. */
async function explainTarget([verb, ...rest]: readonly string[]): Promise<string> {
  const asked = rest.includes("--help") || rest.includes("-h");
  return asked && verb === "add" ? await targetHelp(rest) : "";
}

/**
 * Does what the command line says.
 *
 * @param alter for tests: changes the program before it reads the line.
 * @returns the exit code.
 */
export async function runProgram(alter?: (program: Command) => void): Promise<number> {
  const own = process.argv.slice(0, process.argv.length - commandOf(process.argv).length);
  const json = own.includes("--json");
  onStateFault(tell);
  try {
    const program = defineProgram(json, await explainTarget(process.argv.slice(2)));
    alter?.(program);
    await program.parseAsync();
    return Number(process.exitCode ?? EXIT.OK);
  } catch (error) {
    if (error instanceof CommanderError) {
      if (error.exitCode === 0) return EXIT.OK;
      const message = error.message.replace(/^error: /, "");
      reportFailure({ message: `${message}\nTry: ubd help`, exitCode: EXIT.USAGE }, json);
      return EXIT.USAGE;
    }
    const failure = toFailure(error);
    reportFailure(failure, json);
    return failure.exitCode;
  }
}
