// SPDX-License-Identifier: MIT
/**
 * Installs the npm dependencies when package-lock.json changed since the last time. Plain
 * JavaScript, because it runs under the machine's own Node.js, before Bun and Deno are there.
 */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";

const stampFile = "node_modules/.ubd-lock";
const lock = createHash("sha256").update(readFileSync("package-lock.json")).digest("hex");

function installed() {
  try {
    return readFileSync(stampFile, "utf8") === lock;
  } catch {
    return false;
  }
}

if (!installed()) {
  console.error("ubd: installing npm dependencies ...");
  // Not `npm ci`: it wants every platform's optional packages in the lock file, and registries
  // exist that lack some of Deno's. Versions are exact in package.json.
  execFileSync("npm", ["install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error"], {
    stdio: ["ignore", "ignore", "inherit"],
  });
  writeFileSync(stampFile, lock);
}
