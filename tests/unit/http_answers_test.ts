// SPDX-License-Identifier: MIT
/** What the http target makes of each answer of a server, with a played web and a played clock. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { randomBytes } from "node:crypto";
import { test } from "node:test";
import type { BlockDevice } from "../../core/define_target.ts";
import { UblkError } from "../../core/error.ts";
import { openImage } from "../../targets/http.ts";
import {
  about,
  type Asked,
  goodAnswer,
  partOf,
  type PlayedImage,
  PlayedWeb,
  streamOf,
} from "../fuzz/played_web.ts";

const KIB = 1024;
const BLOCK = 64 * KIB;
const SIZE = 40 * BLOCK;
const TIMEOUT_S = 60;
const URL = "https://host/disk.img";

const bytesOf = (size: number) => new Uint8Array(randomBytes(size));
const image: PlayedImage = { bytes: bytesOf(SIZE), etag: '"one"' };
const other: PlayedImage = { bytes: bytesOf(SIZE), etag: '"two"' };
const shorter: PlayedImage = { bytes: image.bytes.slice(0, SIZE - BLOCK), etag: '"three"' };

const answer = (status: number, headers: Record<string, string> = {}, body?: BodyInit) =>
  new Response(body ?? null, { status, headers });

interface Scene {
  web: PlayedWeb;
  device: BlockDevice;
  log: string[];
  /** Reads, and checks each byte against an image. */
  reads(offset: number, length: number, of?: PlayedImage): Promise<void>;
  fails(offset: number, errno: string, text: RegExp): Promise<void>;
  /** A read that nobody waits for yet. */
  begin(offset: number, length: number): Promise<Buffer>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** A device on what the good server has. */
async function scene(
  on: PlayedImage = image,
  { url = URL, timeout = TIMEOUT_S }: { url?: string; timeout?: number } = {},
): Promise<Scene> {
  const web = new PlayedWeb((asked) => goodAnswer(on, asked));
  const log: string[] = [];
  const options = { url, cache: undefined, readahead: 0, timeout, etag: undefined };
  const device = await web.run(openImage(options, (text) => log.push(text), web));
  const { signal } = new AbortController();
  const begin = async (offset: number, length: number) => {
    const buffer = new Uint8Array(length);
    await device.read({ offset, length, buffer, signal });
    return Buffer.from(buffer.buffer);
  };
  return {
    web,
    device,
    log,
    begin,
    async reads(offset, length, of = on) {
      const data = await web.run(begin(offset, length));
      assert.ok(data.equals(of.bytes.subarray(offset, offset + length)), `at ${offset}`);
    },
    async fails(offset, errno, text) {
      const began = web.now();
      await assert.rejects(web.run(begin(offset, 4096)), (error) => {
        assert.ok(error instanceof UblkError, `${error}`);
        assert.match(error.message, text);
        assert.strictEqual(error.errno, errno, error.message);
        return true;
      });
      assert.ok(web.now() - began <= timeout * 1000 + 1, `${web.now() - began} ms`);
    },
    [Symbol.asyncDispose]: async () => {
      await web.run(Promise.resolve(device.close!()));
      assert.strictEqual(web.open, 0, "no answer is left open");
    },
  };
}

/** Answers that are no proof of another version, and what is said of them. */
const USELESS: [string, (asked: Asked) => Response | undefined, RegExp][] = [
  ["a 200 of all", () => answer(200, { ...about(image) }, streamOf(image.bytes)), /whole image/],
  [
    "a login page",
    () => answer(200, { "content-type": "text/html", "content-length": "5" }, "<html"),
    /answered 200, but not of this version/,
  ],
  [
    "a login page with an ETag",
    () => answer(200, { etag: '"login"', "content-length": "5" }, "<html"),
    /answered 200, but not of this version/,
  ],
  ["a 404", () => answer(404), /answered 404/],
  ["a 403", () => answer(403), /answered 403/],
  ["a 407", () => answer(407), /answered 407/],
  ["a 412", () => answer(412), /answered 412/],
  ["a 416", () => answer(416), /answered 416/],
  [
    "a 416 of the same size",
    () => answer(416, { "content-range": `bytes */${SIZE}` }),
    /answered 416/,
  ],
  ["a 304", () => answer(304), /answered 304/],
  ["a 429", () => answer(429), /answered 429/],
  ["a 502", () => answer(502), /answered 502/],
  ["a 511", () => answer(511, {}, "log in"), /answered 511/],
  ["no Content-Range", () => answer(206, about(image), "x"), /Content-Range is ""/],
  [
    "multipart/byteranges",
    ({ first, end }) => partOf(image, first, end, { "content-type": "multipart/byteranges" }),
    /of several/,
  ],
  [
    "gzip",
    ({ first, end }) => partOf(image, first, end, { "content-encoding": "gzip" }),
    /sends it as gzip/,
  ],
  ["an earlier range", () => partOf(image, 0, BLOCK), /another range/],
  ["a later range", ({ first, end }) => partOf(image, first + 512, end), /another range/],
  [
    "a length that is none of the range",
    ({ first, end }) => partOf(image, first, end, { "content-length": "5" }),
    /sends 5 bytes as Content-Range/,
  ],
  [
    "a backward range",
    ({ first }) => partOf(image, first, first, { "content-range": `bytes 5-4/${SIZE}` }),
    /Content-Range bytes 5-4/,
  ],
  [
    "no ETag",
    ({ first, end }) => partOf({ bytes: other.bytes }, first, end),
    /not of this version/,
  ],
  [
    "a weak ETag",
    ({ first, end }) => partOf({ bytes: other.bytes, etag: 'W/"one"' }, first, end),
    /not of this version/,
  ],
  ["a redirect to nowhere", () => answer(302), /redirected to nowhere/],
  ["a redirect without end", () => answer(302, { location: URL }), /redirected for ever/],
  [
    "a redirect to http",
    () => answer(307, { location: "http://host/disk.img" }),
    /redirected from https to http:\/\/host/,
  ],
  ["a redirect to ftp", () => answer(301, { location: "ftp://host/x" }), /redirected to ftp:/],
];

for (const [name, lie, text] of USELESS) {
  test(`http: ${name} is no other version: it waits, gives up, and goes on`, async () => {
    await using all = await scene();
    const at = 30 * BLOCK;
    let lies = 3;
    all.web.answer = (asked) => lies-- > 0 ? lie(asked) : goodAnswer(image, asked);
    await all.reads(at, 4096);
    all.web.answer = lie;
    await all.fails(at + BLOCK, "EIO", text);
    await all.reads(at, 4096);
    all.web.answer = (asked) => goodAnswer(image, asked);
    await all.reads(at + BLOCK, 4096);
    assert.match(all.log.join("\n"), /trying again\n.*it answers again/s);
  });
}

const SILENT: [string, (asked: Asked) => Response | undefined][] = [
  ["never answers", () => undefined],
  [
    "stalls in the body",
    ({ first, end }) =>
      partOf(
        image,
        first,
        end,
        {},
        streamOf(image.bytes.slice(first, first + 512), () => {
          return new Promise(() => {});
        }),
      ),
  ],
  ["cannot be reached", () => {
    throw Object.assign(new Error("connect"), { code: "ECONNREFUSED" });
  }],
];

for (const [name, lie] of SILENT) {
  test(`http: a server that ${name} is waited for, up to the timeout`, async () => {
    await using all = await scene();
    all.web.answer = lie;
    await all.fails(BLOCK, "ETIMEDOUT", /gave up: the option timeout/);
    const waits = all.begin(2 * BLOCK, 4096);
    await all.web.run(all.web.sleep(TIMEOUT_S * 500));
    all.web.answer = (asked) => goodAnswer(image, asked);
    const data = await all.web.run(waits);
    assert.ok(data.equals(image.bytes.subarray(2 * BLOCK, 2 * BLOCK + 4096)));
  });
}

test("http: an answer that comes drop by drop holds no connection, and others go on", async () => {
  await using all = await scene();
  const drops = ({ first, end }: Asked) =>
    partOf(
      image,
      first,
      end,
      {},
      streamOf(image.bytes.slice(first, first + 1), async (controller) => {
        await all.web.sleep(10_000);
        controller.enqueue(new Uint8Array([image.bytes[first + 1]!]));
      }),
    );
  let slow = 0;
  all.web.answer = (asked) => {
    if (asked.first % (2 * BLOCK) === 0) return goodAnswer(image, asked);
    slow++;
    return drops(asked);
  };
  const stuck = Array.from({ length: 12 }, (_, nth) => all.begin((2 * nth + 1) * BLOCK, 512));
  const ends = Promise.allSettled(stuck);
  await all.reads(0, 512);
  assert.ok(all.web.now() < 31_000, `after ${all.web.now()} ms`);
  assert.ok((await all.web.run(ends)).every(({ status }) => status === "rejected"));
  assert.ok(slow >= 12, "each was asked for");
});

test("http: one slow answer holds up nobody else", async () => {
  await using all = await scene();
  all.web.answer = (asked) => asked.first === BLOCK ? undefined : goodAnswer(image, asked);
  const stuck = all.begin(BLOCK, 512).catch(() => {});
  await all.reads(2 * BLOCK, 30 * BLOCK);
  assert.strictEqual(all.web.now(), 0);
  await all.web.run(stuck);
});

test("http: a read waits for another's block no longer than it can", async () => {
  await using all = await scene();
  all.web.answer = () => undefined;
  const early = all.begin(0, BLOCK + 512); // First of another block, which comes in the end.
  early.catch(() => {});
  await all.web.run(all.web.sleep(1000));
  all.web.answer = () => undefined;
  const late = all.begin(BLOCK, 512);
  late.catch(() => {});
  await assert.rejects(all.web.run(early), { errno: "ETIMEDOUT" });
  assert.ok(all.web.now() <= TIMEOUT_S * 1000 + 1, `${all.web.now()} ms`);
  await assert.rejects(all.web.run(late), { errno: "ETIMEDOUT" });
  assert.ok(all.web.now() <= TIMEOUT_S * 1000 + 1001, `${all.web.now()} ms`);
});

test("http: who waits for another's block is told what that one has met", async () => {
  await using all = await scene();
  all.web.answer = async () => {
    await all.web.sleep(700);
    return answer(404);
  };
  const reads = [0, 1, 2].map((nth) => all.begin(nth * 512, 512));
  for (const read of reads) read.catch(() => {});
  for (const read of reads) {
    await assert.rejects(all.web.run(read), { errno: "EIO", message: /answered 404/ });
  }
});

test("http: Retry-After is kept to, and a read still gets another try", async () => {
  await using all = await scene();
  const after = (seconds: string) => () => answer(503, { "retry-after": seconds });
  const times: number[] = [];
  const timed = (lie: () => Response, lies: number) => (asked: Asked) => {
    times.push(all.web.now());
    return lies-- > 0 ? lie() : goodAnswer(image, asked);
  };
  all.web.answer = timed(after("20"), 1);
  await all.reads(0, 512);
  assert.ok(times[1]! - times[0]! >= 20_000, `${times}`);
  all.web.answer = timed(after("86400"), 1);
  await all.reads(BLOCK, 512);
  assert.ok(times[3]! - times[2]! <= TIMEOUT_S * 1000, `${times}`);
  times.length = 0;
  all.web.answer = timed(() => answer(503), 6);
  await all.reads(2 * BLOCK, 512);
  const pauses = times.slice(1).map((time, nth) => time - times[nth]!);
  assert.ok(pauses[0]! < 200 && pauses.at(-1)! > 2000, `growing: ${pauses}`);
});

/** Right answers in a form of their own. */
const RIGHT: [string, (asked: Asked) => Response][] = [
  [
    "Bytes for bytes",
    ({ first, end }) =>
      partOf(image, first, end, { "content-range": `Bytes ${first}-${end - 1}/${SIZE}` }),
  ],
  [
    "no size, but the strong ETag",
    ({ first, end }) =>
      partOf(image, first, end, { "content-range": `bytes ${first}-${end - 1}/*` }),
  ],
  [
    "Identity as its encoding",
    ({ first, end }) => partOf(image, first, end, { "content-encoding": "Identity" }),
  ],
  ["less than asked", ({ first, end }) => partOf(image, first, Math.min(end, first + 20_000))],
  ["more than asked", ({ first, end }) => partOf(image, Math.max(0, first - 999), end + 999)],
  [
    "more than announced",
    ({ first, end }) =>
      partOf(
        image,
        first,
        end,
        {},
        streamOf(image.bytes.slice(first), (controller) => {
          controller.enqueue(new Uint8Array(BLOCK)); // For ever.
        }),
      ),
  ],
];

for (const [name, lie] of RIGHT) {
  test(`http: an answer may say ${name}`, async () => {
    await using all = await scene();
    all.web.answer = lie;
    for (const at of [0, 3 * BLOCK, 30 * BLOCK]) await all.reads(at, 2 * BLOCK);
    assert.ok(all.web.asked.length < 30, `${all.web.asked.length} GETs`);
  });
}

test("http: the whole image may be sent instead of its beginning, or of a small one", async () => {
  const whole = (of: PlayedImage) => () =>
    answer(200, { ...about(of), "content-length": `${of.bytes.length}` }, streamOf(of.bytes));
  await using all = await scene();
  all.web.answer = whole(image);
  await all.reads(0, 4 * BLOCK);
  await all.reads(9 * BLOCK, BLOCK);
  await all.fails(17 * BLOCK, "EIO", /the whole image, not a range/);
  assert.strictEqual(all.web.open, 0, "what nobody needs is not fetched");

  const small: PlayedImage = { bytes: bytesOf(5 * BLOCK + 512), lastModified: "then" };
  const web = new PlayedWeb(whole(small));
  const options = { url: URL, cache: undefined, readahead: 0, timeout: 9, etag: undefined };
  const device = await web.run(openImage(options, () => {}, web));
  const buffer = new Uint8Array(device.size);
  const { signal } = new AbortController();
  const everything = { offset: 0, length: device.size, buffer, signal };
  // It may be of any size.
  web.answer = () => answer(200, { "last-modified": "then" }, streamOf(small.bytes));
  await assert.rejects(web.run(Promise.resolve(device.read(everything))), /not of this version/);
  web.answer = whole(small);
  await web.run(Promise.resolve(device.read(everything)));
  assert.ok(Buffer.from(small.bytes).equals(buffer));
  await device.close!();
});

const dated = (etag: string | undefined, lastModified: string | undefined) => ({
  bytes: image.bytes,
  ...(etag !== undefined && { etag }),
  ...(lastModified !== undefined && { lastModified }),
});
const REPLACED: [string, PlayedImage, PlayedImage][] = [
  ["another ETag", image, other],
  ["a weak ETag with another text", image, dated('W/"two"', undefined)],
  ["another size", image, { bytes: shorter.bytes, etag: '"one"' }],
  ["another weak ETag", dated('W/"one"', "then"), dated('W/"two"', "then")],
  ["another Last-Modified", dated('W/"one"', "then"), dated('W/"one"', "now")],
  ["another Last-Modified, without an ETag", dated(undefined, "then"), dated(undefined, "now")],
];

for (const [name, before, after] of REPLACED) {
  test(`http: a 206 with ${name} proves it replaced: EIO, until the old one is back`, async () => {
    await using all = await scene(before);
    await all.reads(0, 4096);
    all.web.answer = (asked) => goodAnswer(after, asked);
    const began = all.web.now();
    await all.fails(2 * BLOCK, "EIO", /the image was replaced.*add it again/);
    const asked = all.web.asked.length;
    for (let nth = 0; nth < 9; nth++) await all.fails(3 * BLOCK, "EIO", /the image was replaced/);
    assert.strictEqual(all.web.asked.length, asked, "the server is not asked each time");
    assert.strictEqual(all.web.now(), began, "at once");
    await all.reads(0, 4096);
    all.web.answer = (again) => goodAnswer(before, again);
    await all.web.run(all.web.sleep(1001));
    await all.reads(2 * BLOCK, 4096);
  });
}

test("http: a 416 with another size proves it replaced", async () => {
  await using all = await scene();
  all.web.answer = (asked) => goodAnswer(shorter, asked);
  await all.fails(SIZE - BLOCK, "EIO", new RegExp(`replaced.*${SIZE - BLOCK} bytes, not ${SIZE}`));
  assert.strictEqual(all.web.now(), 0);
});

test("http: a weak ETag and Last-Modified are compared, also with a strong one", async () => {
  await using all = await scene(dated('W/"one"', "then"));
  all.web.answer = (asked) => goodAnswer(dated('"one"', "then"), asked);
  await all.reads(0, 4096);
  for (const less of [dated('W/"one"', undefined), dated(undefined, "then")]) {
    all.web.answer = (asked) => goodAnswer(less, asked);
    await all.fails(BLOCK, "EIO", /not of this version/);
  }
  all.web.answer = ({ first, end }) =>
    partOf(dated('W/"one"', "then"), first, end, {
      "content-range": `bytes ${first}-${end - 1}/*`,
    });
  await all.fails(BLOCK, "EIO", /not of this version/);
});

test("http never mixes two versions in one block", async () => {
  await using all = await scene();
  let cuts = 0;
  all.web.answer = ({ first, end }) => {
    if (cuts++ > 0) return goodAnswer(other, { first, end } as Asked);
    return partOf(image, first, end, {}, streamOf(image.bytes.slice(first, first + 20_000)));
  };
  await all.fails(0, "EIO", /replaced/);
  all.web.answer = (asked) => goodAnswer(image, asked);
  await all.web.run(all.web.sleep(1001));
  await all.reads(0, 2 * BLOCK);
});

test("http: credentials go where the URL leads, and not to where it is redirected", async () => {
  const url = "https://us%40er:p%3Ass@host/disk.img";
  const basic = `Basic ${Buffer.from("us@er:p:ss").toString("base64")}`;
  const web = new PlayedWeb((asked) => {
    const { pathname, host } = new globalThis.URL(asked.url);
    assert.strictEqual(asked.headers.authorization, host === "host" ? basic : undefined);
    assert.ok(!asked.url.includes("us%40er"), asked.url);
    if (pathname === "/disk.img") return answer(302, { location: "/here" });
    if (pathname === "/here") return answer(302, { location: "https://cdn/there?secret#x" });
    return goodAnswer(image, asked);
  });
  const log: string[] = [];
  const options = { url, cache: undefined, readahead: 0, timeout: 9, etag: undefined };
  const device = await web.run(openImage(options, (text) => log.push(text), web));
  assert.deepStrictEqual(log, ["https://host/disk.img is redirected to https://cdn/there"]);
  const buffer = new Uint8Array(512);
  const { signal } = new AbortController();
  await web.run(Promise.resolve(device.read({ offset: 0, length: 512, buffer, signal })));
  assert.deepStrictEqual(web.asked.map((asked) => new globalThis.URL(asked.url).pathname), [
    ...["/disk.img", "/here", "/there"],
    "/there",
  ]);
  // The way is asked for again, when its end is of no use.
  web.answer = (asked) => {
    if (asked.url === "https://host/disk.img") return answer(302, { location: "https://new/" });
    return asked.url === "https://new/" ? goodAnswer(image, asked) : answer(403);
  };
  const far = { offset: 9 * BLOCK, length: 512, buffer, signal };
  await web.run(Promise.resolve(device.read(far)));
  assert.strictEqual(web.now(), 0, "at once");
  await device.close!();
});

test("http: a redirect that cannot be followed is refused when the device is added", async () => {
  for (const [name, lie, text] of USELESS.filter(([name]) => name.includes("redirect"))) {
    const web = new PlayedWeb(lie);
    const options = { url: URL, cache: undefined, readahead: 0, timeout: 9, etag: undefined };
    await assert.rejects(web.run(openImage(options, () => {}, web)), text, name);
    assert.ok(web.asked.every(({ url }) => url === URL), "and nobody is asked there");
    assert.ok(web.asked.length <= 11);
  }
  const web = new PlayedWeb(() => undefined);
  const options = { url: URL, cache: undefined, readahead: 0, timeout: 9, etag: undefined };
  await assert.rejects(web.run(openImage(options, () => {}, web)), { errno: "ETIMEDOUT" });
  assert.strictEqual(web.now(), 30_000);
});

test("http: when the device stops, what waits for anything ends", async () => {
  await using all = await scene();
  all.web.answer = () => answer(503, { "retry-after": "50" });
  const waiting = [0, 1, 2].map((block) => all.begin(block * BLOCK, 512));
  for (const read of waiting) read.catch(() => {});
  await all.web.run(all.web.sleep(10));
  all.web.answer = () => undefined;
  const asking = Array.from({ length: 20 }, (_, nth) => all.begin((nth + 9) * BLOCK, 512));
  for (const read of asking) read.catch(() => {});
  await all.web.run(all.web.sleep(10));
  await all.web.run(Promise.resolve(all.device.close!()));
  for (const read of [...waiting, ...asking]) {
    await assert.rejects(all.web.run(read), { code: "EIO" });
  }
  assert.ok(all.web.now() < 30, `${all.web.now()} ms`);
});
