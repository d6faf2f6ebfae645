// SPDX-License-Identifier: MIT
/**
 * The http target's functions against a web server of the test's own, which can be slow, go away,
 * cut answers short and redirect. What answers say is in http_answers_test.ts, without sockets.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo, Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { gzipSync } from "node:zlib";
import { type BlockDevice, parseOptions, toDefinition } from "../../core/define_target.ts";
import { UblkError, UsageError } from "../../core/error.ts";
import { httpTarget } from "../../targets/http.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
const BLOCK = 64 * KIB;

/** An answer other than the image's range: true when the request was dealt with. */
type Behaviour = (request: IncomingMessage, response: ServerResponse) => boolean | void;

class ImageServer {
  image = randomBytes(4 * MIB);
  etag: string | undefined = '"one"';
  lastModified: string | undefined;
  behave: Behaviour = () => {};
  /** Of each GET that asked for data: first and last byte. */
  readonly ranges: [number, number][] = [];
  open = 0;
  openMax = 0;
  #server!: Server;
  readonly #sockets = new Set<Socket>();
  #port = 0;

  async start(): Promise<this> {
    this.#server = createServer((request, response) => this.#answer(request, response));
    this.#server.on("connection", (socket: Socket) => {
      this.#sockets.add(socket);
      socket.on("close", () => this.#sockets.delete(socket));
      socket.on("error", () => {});
    });
    await new Promise<void>((resolve) => this.#server.listen(this.#port, "127.0.0.1", resolve));
    this.#port = (this.#server.address() as AddressInfo).port;
    return this;
  }

  /** Drops all connections and listens no more. */
  async stop(): Promise<void> {
    const closed = new Promise((resolve) => this.#server.close(resolve));
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }

  [Symbol.asyncDispose] = () => this.stop();

  url(path = "/disk.img"): string {
    return `http://127.0.0.1:${this.#port}${path}`;
  }

  /** Other data and another ETag; the size stays. */
  replace(): void {
    this.image = randomBytes(this.image.length);
    this.etag &&= `"${Math.random()}"`;
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? "");
    if (match?.[2] !== "0") this.ranges.push([Number(match?.[1]), Number(match?.[2])]);
    this.openMax = Math.max(this.openMax, ++this.open);
    response.on("close", () => this.open--);
    if (!this.behave(request, response)) this.serve(request, response);
  }

  /** As a good server does. */
  serve({ headers }: IncomingMessage, response: ServerResponse): void {
    const match = /^bytes=(\d+)-(\d+)$/.exec(headers.range ?? "");
    const condition = headers["if-range"];
    const about = {
      ...(this.etag && { etag: this.etag }),
      ...(this.lastModified && { "last-modified": this.lastModified }),
    };
    if (!match || condition && condition !== this.etag) {
      response.writeHead(200, { ...about, "content-length": this.image.length });
      return void response.end(this.image);
    }
    const part = this.image.subarray(Number(match[1]), Number(match[2]) + 1);
    if (part.length === 0) {
      return void response.writeHead(416, { "content-range": `bytes */${this.image.length}` })
        .end();
    }
    const end = Number(match[1]) + part.length - 1;
    response.writeHead(206, {
      ...about,
      "content-length": part.length,
      "content-range": `bytes ${match[1]}-${end}/${this.image.length}`,
    });
    response.end(part);
  }
}

interface Opened {
  device: BlockDevice;
  log: string[];
  stop: AbortController;
  read(offset: number, length: number): Promise<Buffer>;
  [Symbol.asyncDispose](): Promise<void>;
}

async function open(url: string, options: Record<string, unknown> = {}): Promise<Opened> {
  const definition = toDefinition(httpTarget, "http");
  const values = parseOptions(definition, { url, ...options }, "/");
  const log: string[] = [];
  const device = await definition.open(values as never, undefined, (text) => log.push(text));
  const stop = new AbortController();
  return {
    device,
    log,
    stop,
    async read(offset, length) {
      const buffer = new Uint8Array(length);
      await device.read({ offset, length, buffer, signal: stop.signal });
      return Buffer.from(buffer.buffer);
    },
    [Symbol.asyncDispose]: async () => await device.close?.(),
  };
}

function scratch() {
  const directory = mkdtempSync(join(tmpdir(), "ubd-http-"));
  return { directory, [Symbol.dispose]: () => rmSync(directory, { recursive: true }) };
}

const failing = (errno: string, text: RegExp) => (error: unknown) => {
  assert.ok(error instanceof UblkError, `${error}`);
  assert.strictEqual(error.errno, errno, error.message);
  assert.match(error.message, text);
  return true;
};

test("http serves every byte, and zeroes behind an end inside a sector", async () => {
  await using server = await new ImageServer().start();
  server.image = randomBytes(MIB + 1001);
  await using image = await open(server.url());
  const { device } = image;
  assert.strictEqual(device.size, MIB + 1024);
  assert.strictEqual(device.write, undefined);
  const whole = Buffer.concat([server.image, Buffer.alloc(23)]);
  const extents = [[0, 512], [BLOCK - 512, 1024], [3 * BLOCK, 5 * BLOCK], [MIB, 1024], [512, MIB]];
  for (const [offset, length] of extents as [number, number][]) {
    const data = await image.read(offset, length);
    assert.ok(data.equals(whole.subarray(offset, offset + length)), `${offset} ${length}`);
  }
  const all = Array.from({ length: 64 }, async (_, nth) => {
    const offset = Math.floor(nth * 7919 % (MIB / 512)) * 512;
    assert.ok((await image.read(offset, 1024)).equals(whole.subarray(offset, offset + 1024)));
  });
  await Promise.all(all);
});

test("http: each thing that cannot be served is refused when it is added, with a reason", async () => {
  await using server = await new ImageServer().start();
  const status = (code: number, headers = {}): Behaviour => (_, response) => {
    response.writeHead(code, headers).end();
    return true;
  };
  const ok = { etag: '"one"', "content-range": "bytes 0-0/4096" };
  const one = (headers: Record<string, string>): Behaviour => (_, response) => {
    response.writeHead(206, headers).end(gzipSync("x"));
    return true;
  };
  const rows: [Behaviour, string, RegExp][] = [
    [status(404), "ENOENT", /answered 404: check the URL/],
    [status(410), "ENOENT", /answered 410/],
    [status(401), "EACCES", /answered 401: put the credentials into the URL/],
    [status(403), "EACCES", /answered 403/],
    [status(503), "EIO", /answered 503: try again later/],
    [status(416), "EINVAL", /the image is empty/],
    [status(204), "EIO", /answered 204/],
    [status(200, { "content-length": 4 * MIB, etag: '"one"' }), "EOPNOTSUPP", /sends no ranges/],
    [status(200, { "content-type": "text/html; charset=utf-8" }), "EPROTO", /sends a web page/],
    [status(302, { location: "/disk.img" }), "ELOOP", /redirected for ever/],
    [one({ ...ok, "content-encoding": "gzip" }), "EOPNOTSUPP", /sends it as gzip/],
    [one({ ...ok, "content-range": "bytes 0-0/*" }), "EPROTO", /does not tell the size/],
    [one({ "content-range": "bytes 0-0/4096" }), "EOPNOTSUPP", /neither ETag nor Last-Modified/],
  ];
  for (const [behaviour, errno, text] of rows) {
    server.behave = behaviour;
    await assert.rejects(open(server.url()), failing(errno, text));
  }
  server.behave = () => {};
  const redirect = (request: IncomingMessage, response: ServerResponse) => {
    if (request.url === "/plain") return status(416)(request, response);
    return status(302, { location: "/plain" })(request, response);
  };
  server.behave = redirect;
  await assert.rejects(open(server.url()), failing("EINVAL", /the image is empty/));
  const tls = server.url().replace("http:", "https:");
  await assert.rejects(open(tls), failing("EPROTO", /does not speak TLS/));
  await server.stop();
  await assert.rejects(open(server.url()), failing("ECONNREFUSED", /no server listens there/));
  await assert.rejects(
    open("http://no-such-host.invalid/x"),
    failing("EHOSTUNREACH", /no such host/),
  );
  await server.start();
  for (const url of ["disk.img", "ftp://host/x", "https://"]) {
    await assert.rejects(
      open(url),
      (error) => error instanceof UsageError && /url/.test(`${error}`),
    );
  }
  server.behave = () => {};
  await assert.rejects(open(server.url(), { timeout: 0 }), UsageError);
  await assert.rejects(open(server.url(), { etag: '"two"' }), /the image's is "one"/);
  await (await open(server.url(), { etag: '"one"' })).device.close?.();
});

const noOpenssl = spawnSync("openssl", ["version"]).status !== 0 && "needs openssl";

test("http refuses a certificate that nobody vouches for", { skip: noOpenssl }, async () => {
  using scene = scratch();
  const [key, cert] = [join(scene.directory, "key"), join(scene.directory, "cert")];
  const request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout";
  assert.strictEqual(spawnSync("openssl", [...request.split(" "), key, "-out", cert]).status, 0);
  const server = createTlsServer({ key: readFileSync(key), cert: readFileSync(cert) });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = `https://localhost:${(server.address() as AddressInfo).port}/`;
  await assert.rejects(open(url), failing("EPROTO", /is not trusted.*NODE_EXTRA_CA_CERTS/));
  server.close();
});

test("http follows redirects, says so, and asks again when their place is gone", async () => {
  await using server = await new ImageServer().start();
  let place = "/a?secret";
  server.behave = (request, response) => {
    if (request.url === "/disk.img") response.writeHead(302, { location: place }).end();
    else if (request.url !== place) response.writeHead(403).end();
    else return false;
    return true;
  };
  await using image = await open(server.url());
  const said = [`${server.url()} is redirected to ${server.url("/a")}`];
  assert.deepStrictEqual(image.log, said, "without what may be a secret");
  place = "/b";
  await Promise.all(Array.from({ length: 8 }, async (_, nth) => {
    const at = nth * 4 * BLOCK;
    assert.ok((await image.read(at, 512)).equals(server.image.subarray(at, at + 512)));
  }));
});

test("http goes on where an answer was cut short", async () => {
  await using server = await new ImageServer().start();
  await using image = await open(server.url(), { readahead: 0 });
  let cuts = 0;
  server.behave = (request, response) => {
    const [, first, last] = /=(\d+)-(\d+)/.exec(request.headers.range!)!.map(Number);
    if (cuts++ >= 5) return false;
    const part = server.image.subarray(first!, first! + 10_000);
    response.writeHead(206, {
      etag: server.etag,
      "content-length": last! - first! + 1,
      "content-range": `bytes ${first}-${last}/${server.image.length}`,
    });
    response.write(part, () => setTimeout(() => response.destroy(), 20));
    return true;
  };
  assert.ok((await image.read(0, 2 * BLOCK)).equals(server.image.subarray(0, 2 * BLOCK)));
  assert.strictEqual(server.ranges.length, 6);
  const starts = server.ranges.map(([first]) => first);
  assert.deepStrictEqual(starts, [...starts].sort((one, two) => one - two));
  assert.ok(starts.at(-1)! > 0, "not from the beginning each time");
});

test("http: while the server is down or busy, reads wait, and go on", async () => {
  await using server = await new ImageServer().start();
  await using image = await open(server.url("/disk.img?secret"));
  await image.read(0, 512);
  await server.stop();
  let settled = 0;
  const reads = Array.from({ length: 8 }, async (_, nth) => {
    const data = await image.read(MIB + nth * 2 * BLOCK, 4096);
    settled++;
    return data;
  });
  await sleep(600);
  assert.strictEqual(settled, 0);
  let busy = 0;
  server.behave = (_, response) => {
    if (busy++ >= 6) return false;
    response.writeHead([429, 503, 500][busy % 3]!, { "retry-after": "0" }).end();
    return true;
  };
  await server.start();
  for (const [nth, read] of reads.entries()) {
    const offset = MIB + nth * 2 * BLOCK;
    assert.ok((await read).equals(server.image.subarray(offset, offset + 4096)));
  }
  assert.ok(busy > 6);
  assert.doesNotMatch(image.log.join("\n"), /secret/);
  assert.match(image.log.join("\n"), /no server listens there.*; trying again/);
});

test("http: a read that waits for another's block has a timeout of its own", async () => {
  await using server = await new ImageServer().start();
  await using image = await open(server.url(), { timeout: 2 });
  server.behave = () => true;
  const first = image.read(0, 4096);
  await sleep(500);
  const second = image.read(0, 4096);
  await assert.rejects(first, failing("ETIMEDOUT", /gave up/));
  server.behave = () => {};
  assert.ok((await second).equals(server.image.subarray(0, 4096)));
});

test("http gives up after its timeout, and not for ever", async () => {
  await using server = await new ImageServer().start();
  await using image = await open(server.url(), { timeout: 0.4 });
  await server.stop();
  await assert.rejects(image.read(0, 4096), failing("ETIMEDOUT", /gave up: the option timeout/));
  await server.start();
  server.behave = (_, response) => {
    response.writeHead(503, { "retry-after": "60" }).end();
    return true;
  };
  await assert.rejects(image.read(0, 4096), failing("EIO", /answered 503.*gave up/));
  server.behave = () => true;
  await assert.rejects(image.read(0, 4096), failing("ETIMEDOUT", /gave up/));
  server.behave = () => {};
  assert.ok((await image.read(0, 4096)).equals(server.image.subarray(0, 4096)));
  assert.ok(image.device.timeoutMs! > 400);
});

test("http fetches a block once, however many want it, over few connections", async () => {
  await using server = await new ImageServer().start();
  await using image = await open(server.url(), { readahead: 0 });
  const same = Array.from({ length: 16 }, (_, nth) => image.read(nth * 4096, 4096));
  await Promise.all(same);
  assert.deepStrictEqual(server.ranges, [[0, BLOCK - 1]]);
  server.behave = (request, response) => {
    setTimeout(() => server.serve(request, response), 5);
    return true;
  };
  server.openMax = 0;
  const far = Array.from({ length: 63 }, (_, nth) => image.read((nth + 1) * BLOCK, 512));
  await Promise.all(far);
  assert.strictEqual(server.ranges.length, 64);
  assert.ok(server.openMax > 1 && server.openMax <= 8, `${server.openMax} at a time`);
});

test("http reads ahead for who reads on, and only then", async () => {
  await using server = await new ImageServer().start();
  const bytesAsked = () => server.ranges.reduce((sum, [first, last]) => sum + last - first + 1, 0);
  await using random = await open(server.url());
  for (const offset of [3 * MIB, 0, MIB, 2 * MIB]) await random.read(offset, 4096);
  assert.strictEqual(bytesAsked(), 4 * BLOCK);
  server.ranges.length = 0;
  await using image = await open(server.url());
  for (let at = 0; at < server.image.length; at += 32 * KIB) {
    const data = await image.read(at, 32 * KIB);
    assert.ok(data.equals(server.image.subarray(at, at + 32 * KIB)), `at ${at}`);
  }
  assert.strictEqual(bytesAsked(), server.image.length, "each byte once");
  assert.ok(server.ranges.length < 16, `${server.ranges.length} GETs`);

  server.ranges.length = 0;
  await using early = await open(server.url(), { readahead: 8 * BLOCK });
  for (let block = 0; block < 8; block++) await early.read(block * BLOCK, BLOCK);
  for (let tries = 0; bytesAsked() <= 10 * BLOCK && tries < 400; tries++) await sleep(5);
  assert.ok(bytesAsked() > 10 * BLOCK, "before what was read ahead is used up");
});

test("http: when the device stops, reads end", async () => {
  await using server = await new ImageServer().start();
  await using image = await open(server.url());
  server.behave = () => true;
  const reads = Array.from(
    { length: 32 },
    (_, nth) => assert.rejects(image.read(nth * 2 * BLOCK, 512), { code: "EIO" }),
  );
  await sleep(50);
  image.stop.abort();
  await Promise.all(reads);
  await assert.rejects(image.read(0, 512), { code: "EIO" });
});
