// SPDX-License-Identifier: MIT
/** The http target against nginx, which is stopped and whose image is replaced under the device. */

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { deviceTest, type Job, scaled, type Scene, servers, sleep, until } from "./helpers.ts";

const PORT = 8093;
const SITE = `http://127.0.0.1:${PORT}`;
const URL = `${SITE}/disk.img`;

const OPTIONS = {
  anyKernel: true,
  skip: existsSync("/usr/sbin/nginx") ? false : "needs nginx",
} as const;

class Site {
  readonly #scene: Scene;
  #job!: Job;

  constructor(scene: Scene) {
    this.#scene = scene;
    mkdirSync(join(scene.directory, "www"));
    this.login(false);
    writeFileSync(
      join(scene.directory, "nginx.conf"),
      `daemon off; user root; worker_processes 1;
       pid ${scene.directory}/pid; error_log ${scene.directory}/error.log;
       events {}
       http {
         log_format ranges '$status $http_range';
         access_log ${scene.directory}/access.log ranges;
         default_type application/octet-stream;
         server {
           listen 127.0.0.1:${PORT}; root ${scene.directory}/www;
           location /whole { alias ${scene.directory}/www/; max_ranges 0; }
           location /moved { return 302 /disk.img; }
           location /ever { return 302 /ever; }
           location /secret { return 403; }
           location /login/disk.img { include ${scene.directory}/login.conf; }
           location /slow/ { alias ${scene.directory}/www/; limit_rate 2m; }
         }
       }\n`,
    );
  }

  async start(): Promise<void> {
    this.#job = this.#scene.start(["nginx", "-c", join(this.#scene.directory, "nginx.conf")]);
    const answers = () => fetch(`${SITE}/nothing`).then(() => true, () => false);
    assert.ok(await until(answers), this.#job.output());
  }

  /** What is at /login/disk.img: a page, or the image. */
  login(isNeeded: boolean): void {
    const page = "default_type text/html; return 200 '<html>log in';";
    const image = `alias ${this.#scene.directory}/www/disk.img;`;
    writeFileSync(join(this.#scene.directory, "login.conf"), isNeeded ? page : image);
  }

  /** Reads its configuration again. */
  async reload(isPage: boolean): Promise<void> {
    await this.#scene.sh(`nginx -c ${this.#scene.directory}/nginx.conf -s reload`);
    const type = isPage ? "text/html" : "application/octet-stream";
    assert.ok(
      await until(async () => {
        const { headers } = await fetch(`${SITE}/login/disk.img`, { method: "HEAD" });
        return headers.get("content-type") === type;
      }),
    );
  }

  async stop(): Promise<void> {
    this.#job.kill("SIGKILL");
    await this.#job.ended;
  }

  /** Requests for data so far. */
  get ranges(): string[] {
    const lines = readFileSync(join(this.#scene.directory, "access.log"), "utf8").split("\n");
    return lines.filter((line) => line.startsWith("206 ") && !line.endsWith("=0-0"));
  }
}

/** A started site with an ext4 image of random files, whose checksums are in `sums`. */
async function siteWithImage(scene: Scene): Promise<Site> {
  await scene.sh(
    `mkdir -p content/deep/er
     for n in $(seq 12); do head -c $((n * 150000)) /dev/urandom > content/deep/er/$n; done
     (cd content; find . -type f | sort | xargs sha256sum) > sums
     truncate -s 24M new.img; mkfs.ext4 -q -F -d content new.img`,
  );
  const site = new Site(scene);
  await scene.sh("mv new.img www/disk.img; touch -d 2001-01-01 www/disk.img");
  await site.start();
  return site;
}

const dropCaches = (scene: Scene) => scene.sh("echo 3 > /proc/sys/vm/drop_caches");

deviceTest(
  "http: all files of an ext4 image are right, and reading waits while nginx is away",
  { ...OPTIONS, everywhere: "deno" },
  async (scene) => {
    const site = await siteWithImage(scene);
    const device = await scene.add(`${SITE}/slow/disk.img`);
    assert.match(device.stderr, /24 MiB, read-only/);
    const point = await scene.mount("point", "-o ro", device.path);
    await dropCaches(scene);
    const sums = scene.start(["sha256sum", "-c", join(scene.directory, "sums")], { cwd: point });
    let ended = false;
    sums.ended.finally(() => ended = true);
    await site.stop();
    await sleep(scaled(3000, 10_000));
    assert.ok(!ended, sums.output());
    await site.start();
    const { code, stdout, stderr } = await sums.ended;
    assert.equal(code, 0, stdout + stderr);
    assert.equal(stdout.match(/: OK$/gm)?.length, 12);
    assert.match(scene.kernelLines().join("\n"), /slow\/disk\.img: .*; trying again/);
    await scene.sh(`umount ${point}; cmp ${device.path} www/disk.img`);
    await scene.del(device);
    await site.stop();
  },
);

deviceTest("http: a replaced image is EIO, clearly, and never mixed", OPTIONS, async (scene) => {
  const site = await siteWithImage(scene);
  const device = await scene.add(URL);
  const point = await scene.mount("point", "-o ro", device.path);
  await scene.sh(`cp www/disk.img old.img; head -c 24M /dev/urandom > new.img
    cat ${point}/deep/er/1 > /dev/null; mv new.img www/disk.img`);
  await dropCaches(scene);
  const { stdout } = await scene.run(["sha256sum", "-c", join(scene.directory, "sums")], {
    cwd: point,
  });
  assert.doesNotMatch(stdout, /: FAILED$/m, "what can be read is of the old image");
  assert.match(stdout, /12: FAILED open or read/);
  const said = scene.kernelLines().filter((line) => line.includes("ubd["));
  assert.ok(said.length >= 1 && said.length < 5, said.join("\n"));
  assert.match(said[0]!, /Cannot read .*\/disk\.img: EIO.*the image was replaced.*add it again/);
  assert.doesNotMatch(said[0]!, / \| /, "without a stack");
  await scene.sh("mv old.img www/disk.img; touch -d 2001-01-01 www/disk.img");
  // Unmounted: ext4 changes its journal's superblock in the device's page cache, also read-only.
  await scene.sh(`umount ${point}`);
  await dropCaches(scene);
  await sleep(1100); // So long the server is not asked.
  await scene.sh(`cmp ${device.path} www/disk.img`); // The old one is back.
  await scene.del(device);
  await site.stop();
});

deviceTest("http: a login page is no image, and none that was replaced", OPTIONS, async (scene) => {
  const site = await siteWithImage(scene);
  const device = await scene.add(`${SITE}/login/disk.img`, "--opt", "timeout=5");
  site.login(true);
  await site.reload(true);
  const read = () =>
    scene.run(["dd", `if=${device.path}`, "of=/dev/null", "bs=1M", "iflag=direct"]);
  const failed = await read();
  assert.match(failed.stderr, /Input\/output error/);
  const said = scene.kernelLines().join("\n");
  assert.match(said, /login\/disk\.img: it answered 200, but not of this version; trying again/);
  assert.doesNotMatch(said, /replaced/);
  site.login(false);
  await site.reload(false);
  assert.ok(await until(async () => (await read()).code === 0, 60_000));
  await scene.sh(`cmp ${device.path} www/disk.img`);
  await scene.del(device);
  await site.stop();
});

deviceTest("http: what cannot be served is an error of add", OPTIONS, async (scene) => {
  const site = await siteWithImage(scene);
  const rows: [string, number, RegExp][] = [
    [`${SITE}/missing.img`, 1, /ENOENT.*answered 404: check the URL/],
    [`${SITE}/whole/disk.img`, 1, /sends no ranges/],
    [`${SITE}/ever`, 1, /redirected for ever/],
    [`${SITE}/secret`, 5, /EACCES.*answered 403/],
    ["http://127.0.0.1:8094/x", 1, /ECONNREFUSED.*no server listens there/],
    ["http://", 2, /say https:\/\/HOST\/PATH/],
  ];
  for (const [url, code, text] of rows) {
    const failed = await scene.ubd("add", url);
    assert.match(failed.stderr, text);
    assert.equal(failed.code, code, failed.stderr);
    assert.equal(failed.stdout, "");
  }
  const device = await scene.add("http", "--opt", `url=${SITE}/moved`);
  assert.match(scene.kernelLines().join("\n"), /moved is redirected to .*\/disk\.img/);
  await scene.sh(`cmp ${device.path} www/disk.img`);
  await scene.del(device);
  await site.stop();
});

deviceTest(
  "http: the cache file outlives a killed server, and spares the web server",
  OPTIONS,
  async (scene) => {
    const site = await siteWithImage(scene);
    const add = () => scene.add(URL, "--opt", "cache=cache.img", "--recovery");
    let device = await add();
    const compare = scene.start(["cmp", device.path, "www/disk.img"]);
    await until(() => site.ranges.length >= 8);
    process.kill(device.pid, "SIGKILL");
    await until(() => !servers().includes(device.pid));
    const { code, stdout, stderr } = await scene.ubd("recover", `${device.id}`);
    assert.equal(code, 0, stderr);
    device = scene.adopt(stdout);
    assert.equal((await compare.ended).code, 0, "nothing that was not there was in the cache");
    await scene.del(device);
    // What the killed server had read in its last second may be forgotten, though the kernel knows.
    device = await add();
    await scene.sh(`cmp ${device.path} www/disk.img`);
    await scene.del(device);
    const before = site.ranges.length;
    device = await add();
    await scene.sh(`cmp ${device.path} www/disk.img; cmp cache.img www/disk.img`);
    assert.equal(site.ranges.length, before, "all of it came from the cache");
    await scene.del(device);

    await scene.sh("touch www/disk.img");
    const other = await scene.ubd("add", URL, "--opt", "cache=cache.img");
    assert.equal(other.code, 2, other.stderr);
    assert.match(other.stderr, /another version of this one: delete it and .*cache\.img\.map/);
    await site.stop();
  },
);

deviceTest("http: a device is deleted also while its server is away", OPTIONS, async (scene) => {
  const site = await siteWithImage(scene);
  const device = await scene.add(URL);
  await site.stop();
  const read = scene.start([
    ...["dd", `if=${device.path}`, "of=/dev/null", "iflag=direct", "bs=4k", "skip=4096", "count=1"],
  ]);
  const waits = () => scene.kernelLines().some((line) => line.includes("trying again"));
  assert.ok(await until(waits));
  await scene.delForced(device);
  assert.notEqual((await read.ended).code, 0);
});
