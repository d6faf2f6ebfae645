// SPDX-License-Identifier: MIT
/**
 * What a guest boots from: a Debian kernel with its modules and initrd, and a root file system.
 *
 * Called by vm.ts; everything is built once and kept in the cache. The images hold nothing of the
 * checkout, which the guest mounts from the host; only a change of this file or of guest/initrd.sh
 * builds them anew.
 */
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { basename, join } from "node:path";
import { cached } from "./cache.ts";
import {
  acquireSettings,
  ensureHostPackages,
  fetchPackages,
  newestPackage,
  retryWithFreshIndex,
  sourceLine,
  unpackPackages,
} from "./debian.ts";
import { run } from "./run.ts";

const INITRD_SCRIPT = join(import.meta.dirname!, "guest/initrd.sh");

interface KernelSource {
  suite: string;
  pattern: RegExp;
  packages: (release: string) => string[];
  /** What the driver is built from, where Debian's kernel comes without it. */
  driverPackages?: (release: string) => string[];
}

/**
 * The kernels a guest can boot: `newest` is Debian unstable's, `6.12` is Debian 13's, `6.1` is
 * Debian 12's.
 */
export const KERNELS = {
  "newest": {
    suite: "sid",
    pattern: /linux-binary-[0-9.]+\+[a-z0-9]+-amd64/,
    // Unstable ships the kernel and its modules apart.
    packages: (release: string) => [`linux-binary-${release}`, `linux-modules-${release}`],
  },
  "6.12": {
    suite: "trixie",
    pattern: /linux-image-6\.12\.[0-9.]+\+[a-z0-9]+-amd64/,
    packages: (release: string) => [`linux-image-${release}`],
  },
  "6.1": {
    suite: "bookworm",
    pattern: /linux-image-6\.1\.0-[0-9]+-amd64/,
    packages: (release: string) => [`linux-image-${release}`],
    driverPackages: (release: string) => [
      ...["linux-source-6.1", "linux-kbuild-6.1", `linux-headers-${release}`],
      `linux-headers-${release.replace("amd64", "common")}`,
    ],
  },
} as const satisfies Record<string, KernelSource>;

export type KernelName = keyof typeof KERNELS;

/** Drivers outside of this list serve hardware that no guest has. */
const DRIVERS = ["block", "char", "dax", "md", "nvme", "scsi", "virtio"];

/**
 * What the initrd needs to reach the root file system and the host's directories. Some of it is
 * built into some kernels: virtio_pci is a module in 6.1 only.
 */
const INITRD_MODULES = ["virtio_pci", "virtio_blk", "ext4", "9p", "9pnet_virtio"];

/** In the root file system besides Debian's essential packages. */
const ROOT_PACKAGES = [
  ...["udev", "kmod", "mount", "util-linux", "fdisk", "gdisk", "procps", "psmisc", "lsof"],
  ...["iproute2", "strace", "fio", "e2fsprogs", "xfsprogs", "dosfstools", "nginx"],
];

/** The cache key of images: what they are built from, and the way, which this file is. */
function imageKey(...contents: string[]): string {
  return [...contents, readFileSync(import.meta.filename!), readFileSync(INITRD_SCRIPT)].join("\n");
}

/** A directory with `vmlinux`, `initrd` and `modules.img`, an ext4 image for /lib/modules. */
export async function kernelImages(kernel: KernelName): Promise<string> {
  const { suite, pattern, packages, driverPackages }: KernelSource = KERNELS[kernel];
  return await retryWithFreshIndex({ suite }, async () => {
    const { name, version } = await newestPackage({ suite, pattern });
    const release = name.replace(/^linux-[a-z]+-/, "");
    return await cached(`kernel-${kernel}`, imageKey(name, version), async (directory) => {
      const unpacked = join(directory, "unpacked");
      await unpackPackages({ suite, packages: packages(release) }, unpacked);
      const modules = await gatherModules(unpacked, release, directory);
      if (driverPackages) {
        await unpackPackages({ suite, packages: driverPackages(release) }, unpacked);
        await buildDriver(unpacked, release, modules);
      }
      await run("depmod", ["-b", join(directory, "root"), release]);
      await makeInitrd(directory, release);
      await makeExt4(join(directory, "modules.img"), { content: join(modules, "..") });
      for (const leftover of [unpacked, join(directory, "root")]) {
        rmSync(leftover, { recursive: true });
      }
    });
  });
}

/** Puts the kernel at `directory`/vmlinux, and the modules worth keeping below `directory`/root. */
async function gatherModules(
  unpacked: string,
  release: string,
  directory: string,
): Promise<string> {
  const found = [join(unpacked, "usr/lib/modules"), join(unpacked, "lib/modules")]
    .map((it) => join(it, release)).find(existsSync);
  if (!found) throw new Error(`The packages of kernel ${release} hold no modules`);
  const kernel = [join(unpacked, `boot/vmlinuz-${release}`), join(found, "vmlinuz")]
    .find(existsSync);
  if (!kernel) throw new Error(`The packages of kernel ${release} hold no kernel`);
  await decompressKernel(kernel, join(directory, "vmlinux"));

  const drivers = join(found, "kernel/drivers");
  const useless = readdirSync(drivers).filter((it) => !DRIVERS.includes(it));
  for (const path of [...useless.map((it) => join(drivers, it)), join(found, "kernel/sound")]) {
    rmSync(path, { recursive: true, force: true });
  }
  // An emulated processor takes long to decompress what the host does in a moment, once.
  await run("sh", [
    "-c",
    `find "$1" -name '*.ko.xz' -print0 | xargs -0 -r -P 0 -n 100 xz -d`,
    "sh",
    found,
  ]);
  const modules = join(directory, "root/lib/modules", release);
  mkdirSync(join(modules, ".."), { recursive: true });
  renameSync(found, modules);
  return modules;
}

/** Compiles ublk_drv, out of the kernel's source and against its headers, into `modules`. */
async function buildDriver(unpacked: string, release: string, modules: string): Promise<void> {
  await ensureHostPackages(["gcc", "make", "libc6-dev"]);
  const sources = join(unpacked, "usr/src");
  const headers = join(sources, `linux-headers-${release}`);
  const makefile = join(headers, "Makefile");
  writeFileSync(makefile, readFileSync(makefile, "utf8").replaceAll("/usr/src/", `${sources}/`));

  const name = "linux-source-6.1";
  const driver = "drivers/block/ublk_drv.c";
  const directory = join(unpacked, "driver");
  mkdirSync(directory);
  await run("tar", [
    ...["-xJf", join(sources, `${name}.tar.xz`), "-C", directory, "--strip-components=3"],
    `${name}/${driver}`,
  ]);
  writeFileSync(join(directory, "Makefile"), "obj-m := ublk_drv.o\n");
  // The compiler is the host's, not the one by which the kernel was built.
  await run("make", ["-s", "-C", headers, `M=${directory}`, "CC=gcc", "modules"]);
  await run("strip", ["--strip-debug", join(directory, "ublk_drv.ko")]);
  cpSync(join(directory, "ublk_drv.ko"), join(modules, "kernel/drivers/block/ublk_drv.ko"));
}

/**
 * Takes the ELF kernel out of a bzImage: QEMU starts it directly, and an emulated processor is
 * spared a second of decompressing it at every boot.
 *
 * Source: Documentation/arch/x86/boot.rst in Linux.
 */
async function decompressKernel(bzImage: string, path: string): Promise<void> {
  const image = readFileSync(bzImage);
  const setupSectors = image.readUInt8(0x1f1);
  const start = (setupSectors + 1) * 512 + image.readUInt32LE(0x248);
  // The payload ends with its decompressed size, which is not part of the compressed stream.
  const payload = image.subarray(start, start + image.readUInt32LE(0x24c) - 4);
  const isZstd = payload.readUInt32LE(0) === 0xfd2fb528;
  const compressed = `${path}.${isZstd ? "zst" : "xz"}`;
  writeFileSync(compressed, payload);
  await run(isZstd ? "zstd" : "xz", ["-d", ...(isZstd ? ["-q", "--rm"] : []), compressed]);
}

async function makeInitrd(directory: string, release: string): Promise<void> {
  const busybox = await fetchPackages({ suite: "trixie", packages: ["busybox-static"] });
  const initrd = join(directory, "root/initrd");
  for (const mountPoint of ["bin", "dev", "proc", "root"]) {
    mkdirSync(join(initrd, mountPoint), { recursive: true });
  }
  cpSync(join(busybox, "usr/bin/busybox"), join(initrd, "bin/busybox"));
  cpSync(INITRD_SCRIPT, join(initrd, "init"));
  chmodSync(join(initrd, "init"), 0o755);

  const order: string[] = [];
  const root = join(directory, "root");
  const files = readdirSync(join(root, "lib/modules", release), { recursive: true });
  const names = files.map((file) => basename(`${file}`).replace(/\.ko(\.\w+)?$/, ""));
  const loadable = INITRD_MODULES.filter((name) => names.includes(name));
  const base = ["-d", root, "-S", release];
  const insmods = await run("modprobe", [...base, "--show-depends", "-a", ...loadable]);
  for (const line of insmods.split("\n")) {
    const path = line.match(/^insmod (\S+)/)?.[1];
    if (!path) continue;
    if (order.includes(basename(path))) continue;
    order.push(basename(path));
    cpSync(path, join(initrd, basename(path)));
  }
  writeFileSync(join(initrd, "modules"), `${order.join("\n")}\n`);
  // Not compressed: unpacking would cost an emulated guest more than reading does.
  const archive = `find . | bin/busybox cpio -o -H newc > "$1"`;
  await run("sh", ["-c", archive, "sh", join(directory, "initrd")], { cwd: initrd });
}

/** The root file system of the guest, an ext4 image. Rebuilt when a month has begun. */
export async function rootImage(): Promise<string> {
  const month = new Date().toISOString().slice(0, 7);
  const built = await cached("root", imageKey(month), async (directory) => {
    const root = join(directory, "root");
    const settings = join(directory, "apt.conf");
    mkdirSync(directory);
    writeFileSync(settings, await acquireSettings());
    await run("mmdebstrap", [
      "--variant=essential",
      `--include=${ROOT_PACKAGES.join(",")}`,
      `--aptopt=${settings}`,
      "--aptopt=APT::Install-Recommends false",
      "--dpkgopt=force-unsafe-io",
      ...["doc", "info", "locale", "man"].map((it) => `--dpkgopt=path-exclude=/usr/share/${it}/*`),
      "sid",
      root,
      await sourceLine("sid"),
    ]);
    const mountPoints = ["usr/lib/modules", "ubd", "scratch", "results"];
    for (const it of mountPoints) mkdirSync(join(root, it), { recursive: true });
    await makeExt4(join(directory, "root.img"), { content: root, freeMiB: 1024 });
    for (const it of [root, settings]) rmSync(it, { recursive: true });
  });
  return join(built, "root.img");
}

/**
 * Makes a sparse ext4 image at `path`, without a journal: no guest's writes outlive it.
 *
 * @param content directory to fill it with; empty unless given
 * @param freeMiB space beyond the content
 */
export async function makeExt4(
  path: string,
  { content, freeMiB = 8 }: { content?: string; freeMiB?: number },
): Promise<void> {
  const usedKiB = content ? Number.parseInt(await run("du", ["-sk", content])) : 0;
  const sizeMiB = Math.ceil(usedKiB * 1.1 / 1024) + freeMiB;
  await run("mkfs.ext4", [
    ...["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1"],
    ...(content ? ["-d", content] : []),
    path,
    `${sizeMiB}M`,
  ]);
}
