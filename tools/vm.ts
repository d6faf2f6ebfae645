// SPDX-License-Identifier: MIT
/**
 * Boots a guest that has the ublk driver and runs a command in it: `npm run vm -- 'command'`.
 *
 * Called by hand and by the device tests; takes its kernel and root from vm_images.ts. The guest
 * (guest/init.sh) sees the checkout at /ubd, read-only and live, 8 GiB of empty ext4 at /scratch,
 * and the tool `ubd` in its PATH. Invariants:
 * - one guest per call, and nothing survives it but what the command left in /results;
 * - QEMU never outlives this process, however that ends.
 *
 * Emulation works everywhere; KVM is used where a probe has shown that it runs this kernel.
 */
import { Buffer } from "node:buffer";
import { spawn, spawnSync } from "node:child_process";
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { release } from "node:os";
import { basename, join, resolve } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { cached, cacheDir, processIdentity, processLives } from "./cache.ts";
import { ensureHostPackages } from "./debian.ts";
import { kernelImages, type KernelName, KERNELS, makeExt4, rootImage } from "./vm_images.ts";

const CHECKOUT = join(import.meta.dirname!, "..");
const SCRATCH_MIB = 8192;

/** A guest gets this long to boot, and to end after the command's own time; it may be emulated. */
const BOOT_TIMEOUT_S = 120;

const HOST_PACKAGES = [
  ...["qemu-system-x86", "debian-archive-keyring", "mmdebstrap", "e2fsprogs", "kmod"],
  ...["util-linux", "xz-utils", "zstd"],
];

/** What `ubd` in the guest's PATH runs. */
export const UBD_COMMANDS = {
  binary: "/ubd/dist/ubd",
  bun: "bun /ubd/cli/main.ts",
  deno: "deno run -A -q --cached-only --config /ubd/deno.json /ubd/cli/main.ts",
} as const;

/** What {@link runInGuest} boots and runs. */
export interface GuestOptions {
  /** Run by bash in /scratch; an interactive shell on this terminal when absent. */
  command?: string;
  /** `newest` unless given. */
  kernel?: KernelName;
  /** `binary` when dist/ubd exists, else `bun`, unless given. */
  ubd?: keyof typeof UBD_COMMANDS;
  /** 4096 unless given. */
  memoryMiB?: number;
  /** 2 unless given. */
  cpus?: number;
  /** How long the command may take; 600 unless given. */
  timeoutS?: number;
  /** Host directory that is /results in the guest; made if absent. */
  resultsDir?: string;
  /**
   * The guest's clock counts instructions, a nanosecond each: what a load costs there is the same
   * every time, whatever else the host does. All processors take turns in one thread.
   */
  instructionClock?: boolean;
  /** Host directory for the disk behind /scratch; one for temporary files unless given. */
  scratchDirectory?: string;
  /** Whether ublk_drv is loaded before the command; true unless given. */
  driver?: boolean;
  /** Added to the command's environment. */
  env?: Record<string, string>;
  /** Called with each piece of the command's stdout and stderr as it appears. */
  onOutput?: (chunk: Uint8Array) => void;
  /** Copies the serial console to stderr, from the first message of the kernel. */
  verbose?: boolean;
}

/** How a guest ended. */
export interface GuestResult {
  /** `exited`: the command ended by itself. `crashed`: the guest died or never ran it. */
  outcome: "exited" | "timeout" | "crashed";
  /** The command's exit status; 124 after a timeout and 125 after a crash. */
  exitCode: number;
  /** All that the command wrote to stdout and stderr. */
  output: string;
  /** The kernel's log; after a crash, what reached the serial console of it. */
  dmesg: string;
  /** From the start of QEMU to its end. */
  seconds: number;
}

/**
 * Boots a guest, runs `command` in it and ends it.
 *
 * @throws {Error} when the guest cannot be prepared or QEMU cannot be started; what goes wrong
 * in the guest is told by the result.
 */
export async function runInGuest(options: GuestOptions): Promise<GuestResult> {
  const { kernel = "newest", timeoutS = 600 } = options;
  await ensureHostPackages(HOST_PACKAGES);
  const [images, root] = await Promise.all([kernelImages(kernel), rootImage()]);
  const acceleration = options.instructionClock
    ? ["-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=0,sleep=off,align=off"]
    : await probeAcceleration(kernel, images);

  const directory = makeRunDirectory();
  const scratch = options.scratchDirectory
    ? join(options.scratchDirectory, `${basename(directory)}.img`)
    : join(directory, "scratch.img");
  const cleanUp = () => {
    for (const path of [directory, scratch]) rmSync(path, { recursive: true, force: true });
  };
  process.once("exit", cleanUp);
  try {
    await makeExt4(scratch, { freeMiB: SCRATCH_MIB });
    writeFileSync(join(directory, "host/env"), guestEnvironment(options, timeoutS));
    writeFileSync(join(directory, "host/command"), options.command ?? "");
    if (options.resultsDir) mkdirSync(options.resultsDir, { recursive: true });

    const args = [
      ...baseArguments(images, acceleration),
      ...["-m", `${options.memoryMiB ?? 4096}`, "-smp", `${options.cpus ?? 2}`],
      ...["-append", kernelCommandLine(options.verbose ?? false, acceleration)],
      ...["-chardev", `file,id=console,path=${directory}/console`, "-serial", "chardev:console"],
      ...disk(root, "snapshot=on"),
      ...disk(join(images, "modules.img"), "read-only=on"),
      ...disk(scratch, "cache=unsafe,discard=unmap"),
      ...share("ubd", CHECKOUT, "readonly=on"),
      ...share("host", join(directory, "host")),
      ...(options.resultsDir ? share("results", resolve(options.resultsDir)) : []),
      // QEMU's own stdin and stdout are the command's channel, apart from the kernel's console.
      ...["-chardev", "stdio,id=command,signal=off", "-device", "virtio-serial-pci"],
      ...[
        "-device",
        `${options.command ? "virtserialport,name=ubd" : "virtconsole"},chardev=command`,
      ],
    ];
    const boot = () => runQemu(args, directory, timeoutS, options);
    let run = await boot();
    // Under emulation one processor may run code that another is patching: now and then a kernel
    // dies of that as it boots ("Oops: int3"), before anything of ours has run.
    for (let more = 3; more > 0 && !existsSync(join(directory, "host/started")); more--) {
      process.stderr.write("vm: the guest died as it booted; once more\n");
      run = await boot();
    }
    return { ...readOutcome(directory), ...run };
  } finally {
    process.removeListener("exit", cleanUp);
    cleanUp();
  }
}

/** A new directory for one guest; takes the chance to remove those whose process was killed. */
function makeRunDirectory(): string {
  const runs = join(cacheDir(), "run");
  mkdirSync(runs, { recursive: true });
  for (const entry of readdirSync(runs)) {
    const owner = entry.split("-").slice(0, 2).join("-");
    if (!processLives(owner)) rmSync(join(runs, entry), { recursive: true, force: true });
  }
  const directory = mkdtempSync(join(runs, `${processIdentity(process.pid)}-`));
  mkdirSync(join(directory, "host"));
  return directory;
}

/** What guest/init.sh reads: its own settings and the command's environment. */
function guestEnvironment(options: GuestOptions, timeoutS: number): string {
  const ubd = options.ubd ?? (existsSync(join(CHECKOUT, "dist/ubd")) ? "binary" : "bun");
  const { columns = 80, rows = 24 } = process.stdout;
  const variables: Record<string, string> = {
    UBD_COMMAND: UBD_COMMANDS[ubd],
    UBD_MODULES: options.driver === false ? "" : "ublk_drv",
    UBD_RESULTS: options.resultsDir ? "yes" : "",
    UBD_SHELL: options.command ? "" : `columns ${columns} rows ${rows}`,
    UBD_TIMEOUT: `${timeoutS}`,
    TERM: process.env.TERM ?? "dumb",
    LANG: "C.UTF-8",
    ...options.env,
  };
  const quote = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;
  return Object.entries(variables).map(([name, value]) => `export ${name}=${quote(value)}\n`)
    .join("");
}

const EMULATION = ["-accel", "tcg,thread=multi,tb-size=512"];

/**
 * A guest's clock is this machine's. Measured by a guest that boots while others keep the processors
 * busy, it was up to 70 times too fast, and every time limit with it. Known where the processor's
 * frequency is not varied: /proc/cpuinfo shows the clock's then.
 */
const hostTscKhz = existsSync("/sys/devices/system/cpu/cpu0/cpufreq")
  ? undefined
  : /^cpu MHz\s*:\s*(\d+)\.(\d{3})/m.exec(readFileSync("/proc/cpuinfo", "utf8"))?.slice(1)
    .join("").replace(/^0+/, "");

function kernelCommandLine(verbose: boolean, acceleration: readonly string[]): string {
  // A panic reboots at once, which `-no-reboot` turns into the end of QEMU.
  // The rest saves time, and a warning about clocks that tick unevenly under emulation.
  const settings = "console=ttyS0 panic=-1 mitigations=off cryptomgr.notests tsc=reliable" +
    (acceleration === EMULATION && hostTscKhz ? ` tsc_early_khz=${hostTscKhz}` : "");
  return verbose ? settings : `${settings} quiet`;
}

function baseArguments(images: string, acceleration: string[]): string[] {
  return [
    ...["-nodefaults", "-display", "none", "-no-reboot", "-nic", "none", "-cpu", "max"],
    ...acceleration,
    ...["-kernel", join(images, "vmlinux"), "-initrd", join(images, "initrd")],
  ];
}

function disk(path: string, settings: string): string[] {
  return ["-drive", `if=virtio,format=raw,file=${path},${settings}`];
}

function share(tag: string, path: string, settings = "readonly=off"): string[] {
  return [
    ...["-fsdev", `local,id=${tag},path=${path},security_model=none,multidevs=remap,${settings}`],
    ...["-device", `virtio-9p-pci,fsdev=${tag},mount_tag=${tag}`],
  ];
}

/** QEMU's arguments for KVM where it works with this kernel, else for emulation. */
async function probeAcceleration(kernel: KernelName, images: string): Promise<string[]> {
  const kvm = ["-accel", "kvm"];
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
  } catch {
    return EMULATION;
  }
  // Some hosts offer a /dev/kvm on which a stock kernel never gets anywhere.
  const verdict = await cached(`acceleration-${kernel}`, `${release()} ${images}`, (path) => {
    const probe = spawnSync("qemu-system-x86_64", [
      ...baseArguments(images, kvm),
      ...["-m", "512", "-serial", "stdio", "-append", `${kernelCommandLine(false, kvm)} ubd.probe`],
    ], { stdio: ["ignore", "pipe", "ignore"], timeout: 10_000, killSignal: "SIGKILL" });
    writeFileSync(path, probe.stdout?.includes("ubd: alive") ? "kvm" : "tcg");
  });
  return readFileSync(verdict, "utf8") === "kvm" ? kvm : EMULATION;
}

/** Runs QEMU until the guest ends it, or kills it when the guest no longer keeps time itself. */
function runQemu(
  args: string[],
  directory: string,
  timeoutS: number,
  { command, onOutput, verbose }: GuestOptions,
): Promise<{ output: string; seconds: number }> {
  return new Promise((resolve, reject) => {
    const startMs = Date.now();
    // Even when this process is killed, the kernel takes QEMU with it.
    const child = spawn("setpriv", ["--pdeathsig", "KILL", "qemu-system-x86_64", ...args], {
      // An end of input would disconnect the command's channel, so its stdin stays open, unused.
      stdio: command ? "pipe" : "inherit",
      env: { ...process.env, TMPDIR: directory },
    });
    writeFileSync(join(directory, "console"), "");
    const follower = verbose &&
      spawn("tail", ["-f", join(directory, "console")], { stdio: ["ignore", 2, 2] });
    const kill = () => child.kill("SIGKILL");
    process.once("exit", kill);
    const bootTimer = setTimeout(() => {
      if (!existsSync(join(directory, "host/started"))) kill();
    }, BOOT_TIMEOUT_S * 1000);
    const timer = command && setTimeout(kill, (timeoutS + 2 * BOOT_TIMEOUT_S) * 1000);

    const chunks: Uint8Array[] = [];
    const complaints: Uint8Array[] = [];
    child.stdout?.on("data", (chunk: Uint8Array) => {
      chunks.push(chunk);
      onOutput?.(chunk);
    });
    child.stderr?.on("data", (chunk: Uint8Array) => complaints.push(chunk));
    child.on("error", reject);
    child.on("close", (code) => {
      clearTimeout(bootTimer);
      if (timer) clearTimeout(timer);
      process.removeListener("exit", kill);
      if (follower) follower.kill();
      if (code) return reject(new Error(`QEMU failed: ${Buffer.concat(complaints).toString()}`));
      const output = Buffer.concat(chunks).toString();
      resolve({ output, seconds: (Date.now() - startMs) / 1000 });
    });
  });
}

function readOutcome(directory: string): Pick<GuestResult, "outcome" | "exitCode" | "dmesg"> {
  const read = (name: string) =>
    existsSync(join(directory, name)) ? readFileSync(join(directory, name), "utf8") : "";
  const status = read("host/status").trim();
  const dmesg = read("host/dmesg") || read("console");
  if (status === "timeout") return { outcome: "timeout", exitCode: 124, dmesg };
  if (status === "") return { outcome: "crashed", exitCode: 125, dmesg };
  return { outcome: "exited", exitCode: Number(status), dmesg };
}

const USAGE = `Usage: vm [options] [command]

Boots a guest with the ublk driver, runs the command in it and exits with its status.
Without a command: an interactive shell.

  --kernel NAME      ${Object.keys(KERNELS).join(" or ")} (default: newest)
  --ubd HOW          what \`ubd\` runs: ${Object.keys(UBD_COMMANDS).join(", ")}
                     (default: binary if dist/ubd exists, else bun)
  --cpus N           processors (default: 2)
  --memory MIB       memory (default: 4096)
  --timeout SECONDS  how long the command may take (default: 600)
  --results DIR      host directory that is /results in the guest
  --no-driver        do not load ublk_drv
  --verbose          show the kernel's console on stderr
  --help             show this text

Exit status: the command's, 124 after a timeout, 125 when the guest crashed, 2 for bad usage.
`;

function parseCommandLine(args: string[]): GuestOptions {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      "kernel": { type: "string", default: "newest" },
      "ubd": { type: "string" },
      "cpus": { type: "string", default: "2" },
      "memory": { type: "string", default: "4096" },
      "timeout": { type: "string", default: "600" },
      "results": { type: "string" },
      "shell": { type: "boolean", default: false },
      "no-driver": { type: "boolean", default: false },
      "verbose": { type: "boolean", default: false },
      "help": { type: "boolean", default: false },
    },
  });
  if (values.help) {
    process.stdout.write(USAGE);
    process.exit(0);
  }
  const oneOf = <T extends object>(option: string, value: string, choices: T) => {
    if (Object.hasOwn(choices, value)) return value as keyof T;
    throw new RangeError(`--${option} must be ${Object.keys(choices).join(", ")}, not ${value}`);
  };
  const count = (option: string, value: string) => {
    if (/^[1-9]\d*$/.test(value)) return Number(value);
    throw new RangeError(`--${option} must be a whole number above 0, not ${value}`);
  };
  const command = values.shell ? "" : positionals.join(" ").trim();
  return {
    ...(command && { command }),
    kernel: oneOf("kernel", values.kernel, KERNELS),
    ...(values.ubd && { ubd: oneOf("ubd", values.ubd, UBD_COMMANDS) }),
    cpus: count("cpus", values.cpus),
    memoryMiB: count("memory", values.memory),
    timeoutS: count("timeout", values.timeout),
    ...(values.results && { resultsDir: values.results }),
    driver: !values["no-driver"],
    verbose: values.verbose,
  };
}

async function main(): Promise<number> {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => process.exit(130));
  }
  let options: GuestOptions;
  try {
    options = parseCommandLine(process.argv.slice(2));
  } catch (error) {
    process.stderr.write(`vm: ${(error as Error).message}\n\n${USAGE}`);
    return 2;
  }
  const onOutput = (chunk: Uint8Array) => process.stdout.write(chunk);
  const { outcome, exitCode, dmesg, seconds } = await runInGuest({ ...options, onOutput });
  if (outcome !== "exited") {
    const tail = dmesg.trimEnd().split("\n").slice(-40).join("\n");
    const what = outcome === "timeout"
      ? `stopped after ${options.timeoutS} s`
      : `the guest crashed after ${seconds.toFixed(1)} s`;
    process.stderr.write(`${tail}\nvm: ${what}; above, the last of the kernel's log\n`);
  }
  return exitCode;
}

if (import.meta.main) {
  main().then((code) => process.exitCode = code, (error: Error) => {
    process.stderr.write(`vm: ${error.message}\n`);
    process.exitCode = 1;
  });
}
