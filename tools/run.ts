// SPDX-License-Identifier: MIT
/**
 * Runs one host program for the tools: silent when it succeeds, its last words when it fails.
 *
 * Called by everything in tools/ that shells out; calls nothing of the project.
 */
import { spawn } from "node:child_process";
import { Buffer } from "node:buffer";
import process from "node:process";

/** How {@link run} starts a program. */
export interface RunOptions {
  cwd?: string;
  /** Added to the caller's environment. */
  env?: Record<string, string>;
  /** Written to the program's stdin, which is empty otherwise. */
  input?: string;
}

/**
 * Runs `command` without a shell and returns what it wrote to stdout.
 *
 * @throws {Error} when it cannot be started or exits with a status other than 0; the message
 * carries the last 20 lines of what it printed.
 */
export function run(command: string, args: string[], options: RunOptions = {}): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: options.cwd,
      // apt and debconf must neither translate what is parsed here nor ask questions.
      env: { ...process.env, LC_ALL: "C.UTF-8", DEBIAN_FRONTEND: "noninteractive", ...options.env },
    });
    const stdout: Uint8Array[] = [];
    const printed: Uint8Array[] = [];
    child.stdout.on("data", (chunk: Uint8Array) => {
      stdout.push(chunk);
      printed.push(chunk);
    });
    child.stderr.on("data", (chunk: Uint8Array) => printed.push(chunk));
    // A program that ends without reading its input is judged by its exit status alone.
    child.stdin.on("error", () => {});
    child.stdin.end(options.input ?? "");
    child.on("error", (cause) => reject(new Error(`Cannot run ${command}`, { cause })));
    child.on("close", (code, signal) => {
      if (code === 0) return resolve(Buffer.concat(stdout).toString());
      const tail = Buffer.concat(printed).toString().trimEnd().split("\n").slice(-20).join("\n");
      reject(new Error(`${command} ${args.join(" ")} failed (${signal ?? code}):\n${tail}`));
    });
  });
}
