// SPDX-License-Identifier: MIT
/**
 * Debian packages for the tools: installed on the host, or unpacked into the cache from any suite
 * and architecture.
 *
 * Foreign packages come through an apt state of their own per suite and architecture (`AptState`),
 * so neither the host's sources nor its dpkg database are touched. The mirror is the host's own.
 * Invariants:
 * - everything downloaded is checked by apt against the archive keys of the host;
 * - indexes are refreshed at most once a day, and an unreachable mirror is no error while an older
 *   index and the packages it names are in the cache.
 */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { cached, cacheDir, withLock } from "./cache.ts";
import { run } from "./run.ts";

const KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg";
const INDEX_AGE_MAX_MS = 24 * 60 * 60 * 1000;
const APT_PATIENCE_S = 300;

/** A Debian release and architecture, for example `sid` and `arm64`. */
export interface Release {
  suite: string;
  /** Debian's name of the architecture; `amd64` unless given. */
  arch?: string;
}

/** A package name with its version. */
export interface PackageVersion {
  name: string;
  version: string;
}

/**
 * Installs those of `names` that the host lacks.
 *
 * @throws {Error} with the command to type when this user may not install packages.
 */
export async function ensureHostPackages(names: string[]): Promise<void> {
  // Guests that start together find the same packages missing.
  await withLock("host-packages", async () => {
    const missing = await missingOf(names);
    if (missing.length > 0) await install(missing);
  });
}

async function missingOf(names: string[]): Promise<string[]> {
  const known = await run("dpkg-query", ["-W", "-f", "${db:Status-Abbrev}${Package}\n", "*"]);
  const installed = new Set(
    known.split("\n").filter((line) => line.startsWith("ii")).map((line) => line.slice(3).trim()),
  );
  return names.filter((name) => !installed.has(name));
}

async function install(names: string[]): Promise<void> {
  const command = ["install", "-y", "--no-install-recommends", ...names];
  // Others on this machine may be installing, too.
  const patiently = ["-o", `DPkg::Lock::Timeout=${APT_PATIENCE_S}`];
  const isRoot = process.getuid?.() === 0;
  const asRoot = (args: string[]) =>
    isRoot
      ? run("apt-get", [...patiently, ...args])
      : run("sudo", ["-n", "apt-get", ...patiently, ...args]);
  process.stderr.write(`ubd: installing ${names.join(" ")}\n`);
  try {
    // A host's index is often missing or stale; refresh it only when that shows.
    await asRoot(command).catch(async () => {
      await asRoot(["update"]);
      await asRoot(command);
    });
  } catch (cause) {
    throw new Error(`Missing host packages; run: sudo apt-get ${command.join(" ")}`, { cause });
  }
}

/** The address of the Debian mirror that the host itself installs from. */
export async function mirror(): Promise<string> {
  const targets = await run("apt-get", [
    "indextargets",
    "--format",
    "$(RELEASE) $(COMPONENT) $(REPO_URI)",
    "Created-By: Packages",
  ]);
  const codename = (await run("sh", ["-c", ". /etc/os-release; echo $VERSION_CODENAME"])).trim();
  const suites = new Set([codename, "stable", "testing", "sid", "unstable"]);
  for (const line of targets.split("\n")) {
    const [suite, component, uri] = line.split(" ");
    if (suite && suites.has(suite) && component === "main" && uri) return uri;
  }
  throw new Error("Cannot find a Debian mirror in the host's apt sources");
}

/**
 * Settings for an apt that knows nothing of the host but how to reach the network: its proxies
 * stay, its hooks do not run. A mirror that lags behind is accepted, for it is still signed.
 */
export async function acquireSettings(): Promise<string> {
  const host = await run("apt-config", ["dump", "Acquire"]);
  return `${host}
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
Acquire::Retries "3";
`;
}

/** One line of sources.list for `suite`, bound to the archive keys of the host. */
export async function sourceLine(suite: string): Promise<string> {
  return `deb [signed-by=${KEYRING}] ${await mirror()} ${suite} main`;
}

interface AptState {
  /** Environment that makes apt programs use this state. */
  env: { APT_CONFIG: string };
  /** Downloads the index now. */
  refresh(): Promise<void>;
}

async function openAptState({ suite, arch = "amd64" }: Release): Promise<AptState> {
  await ensureHostPackages(["debian-archive-keyring"]);
  const name = `apt-${suite}-${arch}`;
  const directory = join(cacheDir(), name);
  const file = (entry: string) => join(directory, entry);
  const env = { APT_CONFIG: file("apt.conf") };
  const refresh = () =>
    withLock(name, async () => {
      await run("apt-get", ["update"], { env });
      writeFileSync(file("refreshed"), "");
    });

  if (!existsSync(file("refreshed"))) {
    mkdirSync(file("state/lists/partial"), { recursive: true });
    mkdirSync(file("cache/archives/partial"), { recursive: true });
    writeFileSync(file("status"), "");
    writeFileSync(file("sources.list"), `${await sourceLine(suite)}\n`);
    writeFileSync(
      file("apt.conf"),
      `${await acquireSettings()}
Dir::State "${file("state")}";
Dir::State::status "${file("status")}";
Dir::Cache "${file("cache")}";
Dir::Etc::sourcelist "${file("sources.list")}";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "${arch}";
APT::Architectures "${arch}";
APT::Sandbox::User "root";
`,
    );
    await refresh();
  } else if (Date.now() - statSync(file("refreshed")).mtimeMs > INDEX_AGE_MAX_MS) {
    await refresh().catch((error: Error) => {
      process.stderr.write(`ubd: using the old package index of ${suite}: ${error.message}\n`);
      const soon = new Date(Date.now() - INDEX_AGE_MAX_MS + 10 * 60 * 1000);
      utimesSync(file("refreshed"), soon, soon);
    });
  }
  return { env, refresh };
}

/** Runs `action`, and once more with a fresh index when it fails: versions roll on the mirror. */
export async function retryWithFreshIndex<T>(
  release: Release,
  action: () => Promise<T>,
): Promise<T> {
  try {
    return await action();
  } catch (first) {
    const state = await openAptState(release);
    await state.refresh().catch(() => {
      throw first;
    });
    return await action();
  }
}

/** The versions that `release` offers of `names`, in no particular order. */
async function versions(release: Release, names: string[]): Promise<PackageVersion[]> {
  const { env } = await openAptState(release);
  const lines = (await run("apt-cache", ["madison", ...names], { env })).trim().split("\n");
  return lines.filter((line) => line.includes("|") && !line.endsWith("Sources")).map((line) => {
    const [name = "", version = ""] = line.split("|").map((field) => field.trim());
    return { name, version };
  });
}

/**
 * The package with the highest version among those whose whole name matches `pattern`.
 *
 * @throws {Error} when there is none.
 */
export async function newestPackage(
  { pattern, ...release }: Release & { pattern: RegExp },
): Promise<PackageVersion> {
  const { env } = await openAptState(release);
  const whole = new RegExp(`^(?:${pattern.source})$`, pattern.flags);
  const names = (await run("apt-cache", ["pkgnames"], { env })).split("\n");
  const matching = names.filter((name) => whole.test(name));
  let newest: PackageVersion | undefined;
  for (const candidate of matching.length > 0 ? await versions(release, matching) : []) {
    const isNewer = !newest || await run("dpkg", [
      "--compare-versions",
      candidate.version,
      "gt",
      newest.version,
    ]).then(() => true, () => false);
    if (isNewer) newest = candidate;
  }
  if (!newest) throw new Error(`No package of ${release.suite} matches ${pattern}`);
  return newest;
}

/** Downloads `packages` and unpacks them into `directory`, without their dependencies. */
export async function unpackPackages(
  { packages, ...release }: Release & { packages: string[] },
  directory: string,
): Promise<void> {
  const { env } = await openAptState(release);
  mkdirSync(directory, { recursive: true });
  const downloads = mkdtempSync(join(cacheDir(), ".download-"));
  try {
    await run("apt-get", ["download", ...packages], { cwd: downloads, env });
    for (const file of readdirSync(downloads)) {
      await run("dpkg", ["-x", join(downloads, file), directory]);
    }
  } finally {
    rmSync(downloads, { recursive: true, force: true });
  }
}

/**
 * A directory with the unpacked content of exactly `packages`, kept in the cache until the
 * release offers other versions.
 */
export async function fetchPackages(
  { packages, ...release }: Release & { packages: string[] },
): Promise<string> {
  const { suite, arch = "amd64" } = release;
  return await retryWithFreshIndex(release, async () => {
    const key = (await versions(release, packages)).map((it) => `${it.name} ${it.version}`).sort();
    return await cached(
      `debian-${suite}-${arch}-${packages.join("+")}`,
      key.join("\n"),
      (path) => unpackPackages({ ...release, packages }, path),
    );
  });
}
