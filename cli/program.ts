// SPDX-License-Identifier: MIT
/**
 * The command line: verbs, errors, exit codes.
 * @module
 */

import { release } from "node:os";
import process from "node:process";
import { Command, CommanderError } from "commander";
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

function defineProgram(): Command {
  const program = new Command("ubd")
    .description("Linux block devices served from TypeScript (ublk)")
    .helpCommand(false)
    .enablePositionalOptions() // `list -v` is not `-v`
    .exitOverride()
    .configureOutput({ writeOut: print, outputError: () => {} }) // reportFailure prints it
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
    .action(([verb]: string[], options: { json?: boolean; type?: string }) =>
      help(program, options.type === undefined ? verb : "add", options)
    );
  program.option("-v, --version", "show versions");
  program.action((_, command: Command) => {
    if (command.args.length > 0) unknownVerb(program, command.args[0]!);
    if (command.opts().version) return version({});
    help(program, undefined, {});
    process.exitCode = EXIT.USAGE;
  });
  program.allowExcessArguments(true);
  for (const command of program.commands) {
    command.option("--json", "print JSON on standard output");
    const own = VERB_EXIT_MEANINGS[command.name()];
    if (own) {
      command.addHelpText("after", `\nExit codes, besides those of ubd help:\n${codes(own)}`);
    }
  }
  program.addHelpText(
    "after",
    `\nSizes: bytes, or 64K, 64M, 64G (x 1024), 64MB (x 1000), 64s (sectors)\n\n` +
      `Exit codes:\n${codes(EXIT_MEANINGS)}`,
  );
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

function codes(meanings: readonly (readonly [number | string, string])[]): string {
  return meanings.map(([code, meaning]) => `  ${String(code).padEnd(4)}${meaning}`).join("\n");
}

function version({ json }: { json?: boolean }): void {
  const facts = { version: VERSION, runtime, kernel: release() };
  if (json) printJson(facts);
  else print(`ubd ${VERSION} (${runtime}, Linux ${facts.kernel})\n`);
}

function help(program: Command, verb: string | undefined, { json }: { json?: boolean }): void {
  const command = verb === undefined ? program : program.commands.find((c) => c.name() === verb);
  if (!command) unknownVerb(program, verb!);
  if (!json) return command.outputHelp();
  const texts = program.createHelp();
  const describe = (one: Command): unknown => ({
    name: one.name(),
    summary: one.summary() || one.description(),
    usage: texts.commandUsage(one),
    description: one.description(),
    arguments: one.registeredArguments.map((argument) => argument.name()),
    options: texts.visibleOptions(one).map((option) => ({
      flags: option.flags,
      description: texts.optionDescription(option),
      group: option.helpGroupHeading ?? "Options:",
    })),
    exitCodes: [
      ...new Map([...EXIT_MEANINGS, ...VERB_EXIT_MEANINGS[one.name()] ?? []]),
    ].map(([code, meaning]) => ({ code, meaning })),
    commands: one.commands.map(describe),
  });
  printJson(describe(command));
}

/** `ubd add ./x.ts --help` shows what only the module knows. */
async function explainTarget(program: Command): Promise<void> {
  const [verb, ...rest] = process.argv.slice(2);
  const asked = rest.includes("--help") || rest.includes("-h");
  const add = program.commands.find((command) => command.name() === verb);
  if (asked && add?.name() === "add") add.addHelpText("after", await targetHelp(rest));
}

/** Does what the command line says. @returns the exit code. */
export async function runProgram(): Promise<number> {
  const own = process.argv.slice(0, process.argv.length - commandOf(process.argv).length);
  const json = own.includes("--json");
  onStateFault(tell);
  try {
    const program = defineProgram();
    await explainTarget(program);
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
