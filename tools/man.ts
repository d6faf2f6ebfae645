// SPDX-License-Identifier: MIT
/**
 * Writes docs/man/, a page for each verb, from what `ubd help --json` says: the definitions that
 * `--help` is made of too. `npm run check` fails while a page is stale.
 *
 *   bun tools/man.ts
 * @module
 */

import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const ROOT = join(import.meta.dirname!, "..");
const PAGES = join(ROOT, "docs", "man");

interface Verb {
  name: string;
  summary: string;
  usage: string;
  description: string;
  options: { flags: string; description: string; group: string }[];
  exitCodes: { code: number | string; meaning: string }[];
  commands: Verb[];
}

/** @returns each page by its file's name, formatted as the rest of the documentation. */
function manPages(): Map<string, string> {
  const help = execFileSync("bun", ["cli/main.ts", "help", "--json"], {
    cwd: ROOT,
    encoding: "utf8",
  });
  const { commands } = JSON.parse(help) as Verb;
  const directory = mkdtempSync(join(tmpdir(), "ubd-man-"));
  try {
    for (const verb of commands) {
      writeFileSync(join(directory, `ubd-${verb.name}.md`), page(verb, commands));
    }
    const config = ["--config", join(ROOT, "deno.json")];
    execFileSync("deno", ["fmt", "--quiet", ...config, directory], { stdio: "pipe" });
    return pagesIn(directory);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

function page(verb: Verb, all: Verb[]): string {
  const groups = new Set(verb.options.map(({ group }) => group));
  const others = all.filter(({ name }) => name !== verb.name)
    .map(({ name }) => `[ubd-${name}](ubd-${name}.md)`);
  return [
    "<!-- Written by tools/man.ts from the definitions of --help. Do not edit. -->",
    `# ubd-${verb.name}`,
    `\`ubd ${verb.name}\`: ${verb.summary}.`,
    "## Synopsis",
    `\`\`\`\n${verb.usage}\n\`\`\``,
    "## Description",
    ...verb.description.split("\n\n").map(paragraph),
    "## Options",
    ...[...groups].flatMap((group) => [
      ...(groups.size > 1 ? [`### ${group.replace(":", "")}`] : []),
      table(
        ["option", "meaning"],
        verb.options.filter((option) => option.group === group)
          .map(({ flags, description }) => [`\`${flags}\``, cell(description)]),
      ),
    ]),
    "## Exit codes",
    table(["code", "meaning"], verb.exitCodes.map(({ code, meaning }) => [`${code}`, meaning])),
    "## See also",
    `${others.join(", ")}; [the README](../../README.md).`,
  ].join("\n\n");
}

/** Help indents commands by two columns. */
function paragraph(text: string): string {
  if (!text.startsWith("  ")) return text;
  return `\`\`\`sh\n${text.replaceAll(/^ {2}/gm, "")}\n\`\`\``;
}

function table(head: string[], rows: string[][]): string {
  return [head, head.map(() => "---"), ...rows].map((row) => `| ${row.join(" | ")} |`).join("\n");
}

/** A table's cell must not end at a bar, nor take <words> for tags. */
function cell(text: string): string {
  return text.replaceAll("|", "\\|").replaceAll("<", "\\<");
}

function pagesIn(directory: string): Map<string, string> {
  return new Map(
    readdirSync(directory).map((name) => [name, readFileSync(join(directory, name), "utf8")]),
  );
}

/** @returns names of pages that are not as they would be written now, or should not be there. */
export function staleManPages(): string[] {
  const fresh = manPages();
  const found = pagesIn(PAGES);
  const names = [...new Set([...fresh.keys(), ...found.keys()])];
  return names.filter((name) => fresh.get(name) !== found.get(name));
}

if (import.meta.main) {
  const pages = manPages();
  rmSync(PAGES, { recursive: true, force: true });
  mkdirSync(PAGES, { recursive: true });
  for (const [name, text] of pages) writeFileSync(join(PAGES, name), text);
}
