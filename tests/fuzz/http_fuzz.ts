// SPDX-License-Identifier: MIT
/** The http target against a server that tells every lie there is, in any order, at any speed. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import type { BlockDevice } from "../../core/define_target.ts";
import { UblkError } from "../../core/error.ts";
import { openImage } from "../../targets/http.ts";
import type { Fuzzer } from "./fuzzer.ts";
import {
  about,
  type Asked,
  goodAnswer,
  partOf,
  type PlayedImage,
  PlayedWeb,
  streamOf,
} from "./played_web.ts";

const BLOCK = 64 * 1024;
const SECTOR = 512;
const URL_OF_IMAGE = "https://us:er@host/disk.img";
const BASIC = `Basic ${Buffer.from("us:er").toString("base64")}`;

/** Two versions of an image, without two equal blocks, as the same seed makes them. */
const [ONE, TWO] = [1, 2].map((seed) => {
  const words = new Uint32Array(26 * BLOCK / 4 + 100);
  let state = seed;
  for (let at = 0; at < words.length; at++) {
    state = (state + 0x6d2b79f5) | 0;
    words[at] = Math.imul(state ^ state >>> 15, 1 | state);
  }
  return new Uint8Array(words.buffer);
}) as [Uint8Array<ArrayBuffer>, Uint8Array<ArrayBuffer>];

interface Played {
  web: PlayedWeb;
  /** What is served, and what somebody has put in its place for a while. */
  image: PlayedImage;
  other: PlayedImage;
}

type Lie = (asked: Asked, played: Played, amount: number) => Response | undefined;

const status = (code: number, headers: Record<string, string> = {}): Lie => () =>
  new Response(code === 304 ? null : "<html>sorry", { status: code, headers });
const redirect = (location: string): Lie => status(302, { location });
const whole = (of: "image" | "other"): Lie => (_, played) =>
  new Response(streamOf(played[of].bytes), {
    status: 200,
    headers: { ...about(played[of]), "content-length": `${played[of].bytes.length}` },
  });
/** A good answer with other headers. */
const saying =
  (headers: (asked: Asked, size: number) => Record<string, string>): Lie => (asked, { image }) =>
    partOf(image, asked.first, asked.end, headers(asked, image.bytes.length));
/** The other version's bytes, which say what is changed about it. */
const another = (change: (other: PlayedImage) => PlayedImage): Lie => (asked, { other }) =>
  goodAnswer(change(other), asked);

const LIES: Record<string, Lie> = {
  good: (asked, { image }) => goodAnswer(image, asked),
  replaced: another((other) => other),
  "replaced, without an ETag": another(({ bytes }) => ({ bytes })),
  "replaced, with a date": another(({ bytes }) => ({ bytes, lastModified: "now" })),
  "replaced, with the same text in a weak ETag": (asked, { image, other }) =>
    // Of an image that has nothing stronger, nobody could tell.
    image.etag?.startsWith('"')
      ? goodAnswer({ bytes: other.bytes, etag: `W/${image.etag}` }, asked)
      : goodAnswer({ bytes: other.bytes, etag: '"two"' }, asked),
  "200 of the image": whole("image"),
  "200 of another": whole("other"),
  "200 without a length": (_, { image }) =>
    new Response(streamOf(image.bytes), { status: 200, headers: about(image) }),
  login: status(200, { "content-type": "text/html", "content-length": "11", etag: '"login"' }),
  "204": () => new Response(null, { status: 204 }),
  "304": () => new Response(null, { status: 304 }),
  "400": status(400),
  "401": status(401),
  "403": status(403),
  "404": status(404),
  "412": status(412),
  "416": status(416),
  "416 of the image": (asked, { image }) =>
    status(416, { "content-range": `bytes */${image.bytes.length}` })(asked, {} as Played, 0),
  "416 of another": status(416, { "content-range": "bytes */0" }),
  "502": status(502),
  "503 with Retry-After": (asked, played, amount) =>
    status(503, { "retry-after": `${amount % 100}` })(asked, played, amount),
  "511": status(511),
  "redirect elsewhere": redirect("https://elsewhere/disk.img"),
  "redirect to http": redirect("http://host/disk.img"),
  "redirect to ftp": redirect("ftp://host/disk.img"),
  "redirect to nowhere": status(307),
  "redirect in a circle": redirect("https://host/disk.img"),
  silence: () => undefined,
  unreachable: () => {
    throw Object.assign(new Error("no"), { code: "ECONNRESET" });
  },
  "no Content-Range": (_, { image }) =>
    new Response(streamOf(image.bytes), { status: 206, headers: about(image) }),
  multipart: saying(() => ({ "content-type": "multipart/byteranges; boundary=x" })),
  gzip: saying(() => ({ "content-encoding": "gzip" })),
  "another length": saying(({ first, end }) => ({ "content-length": `${end - first + 1}` })),
  "a backward range": saying((_, size) => ({ "content-range": `bytes 9-8/${size}` })),
  "a range of others": saying(() => ({ "content-range": "lines 1-2/3" })),
  "Bytes, and no size": saying(({ first, end }) => ({
    "content-range": `Bytes ${first}-${end - 1}/*`,
  })),
  "another range": ({ first, end }, { image }, amount) => {
    const size = image.bytes.length;
    const from = (first + amount * SECTOR) % size;
    return partOf(image, from, Math.min(size, from + end - first));
  },
  "more than asked": ({ first, end }, { image }, amount) =>
    partOf(image, Math.max(0, first - amount), Math.min(image.bytes.length, end + amount)),
  "less than asked": ({ first, end }, { image }, amount) =>
    partOf(image, first, Math.min(end, first + 1 + amount * 99)),
  "more than announced": ({ first, end }, { image }) =>
    partOf(
      image,
      first,
      end,
      {},
      streamOf(image.bytes.slice(first, end), (controller) => {
        controller.enqueue(new Uint8Array(BLOCK).fill(0xee)); // For ever.
      }),
    ),
  "cut short": ({ first, end }, { image }, amount) =>
    partOf(image, first, end, {}, streamOf(image.bytes.slice(first, first + amount * 99))),
  "broken off": ({ first, end }, { image }, amount) =>
    partOf(
      image,
      first,
      end,
      {},
      streamOf(image.bytes.slice(first, first + amount * 99), () => {
        throw new TypeError("terminated");
      }),
    ),
  stalled: ({ first, end }, { image }, amount) =>
    partOf(
      image,
      first,
      end,
      {},
      streamOf(image.bytes.slice(first, first + amount * 99), () => new Promise(() => {})),
    ),
  "drop by drop": ({ first, end }, { image, web }, amount) => {
    let at = first;
    return partOf(
      image,
      first,
      end,
      {},
      streamOf(new Uint8Array(), async (controller) => {
        await web.sleep(1 + amount * 40);
        controller.enqueue(image.bytes.slice(at, ++at));
      }),
    );
  },
};

const VALIDATORS: Partial<PlayedImage>[] = [
  { etag: '"one"' },
  { etag: '"one"', lastModified: "then" },
  { etag: 'W/"one"', lastModified: "then" },
  { lastModified: "then" },
];

interface Read {
  offset: number;
  length: number;
  /** Milliseconds after the one before. */
  pause: number;
}

interface Plan {
  bytes: number;
  validators: number;
  timeout: number;
  readahead: number;
  lies: { lie: string; amount: number; delay: number }[];
  reads: Read[];
}

const plans: fc.Arbitrary<Plan> = fc.record({
  bytes: fc.oneof(fc.integer({ min: 1, max: 3 * BLOCK }), fc.integer({ min: 1, max: ONE.length })),
  validators: fc.nat(VALIDATORS.length - 1),
  timeout: fc.constantFrom(0.05, 1, 10, 100, 300),
  readahead: fc.constantFrom(0, 2 * BLOCK, 16 * BLOCK),
  lies: fc.array(
    fc.record({
      lie: fc.constantFrom(...Object.keys(LIES)),
      amount: fc.nat(1000),
      delay: fc.constantFrom(0, 0, 0, 1, 100, 5000, 40_000),
    }),
    { maxLength: 40 },
  ),
  reads: fc.array(
    fc.record({
      offset: fc.nat(ONE.length),
      length: fc.integer({ min: 1, max: 1024 }).map((sectors) => sectors * SECTOR),
      pause: fc.constantFrom(0, 0, 1, 100, 10_000),
    }),
    { minLength: 1, maxLength: 12 },
  ),
});

async function check(plan: Plan, canary: boolean): Promise<void> {
  const image = { bytes: ONE.slice(0, plan.bytes), ...VALIDATORS[plan.validators] };
  const other = { bytes: TWO.slice(0, plan.bytes), etag: '"two"', lastModified: "now" };
  const web = new PlayedWeb((asked) => goodAnswer(image, asked));
  const { timeout, readahead } = plan;
  const options = { url: URL_OF_IMAGE, cache: undefined, readahead, timeout, etag: undefined };
  const device = await web.run(openImage(options, () => {}, web));

  const lies = plan.lies.values();
  const answer = async (asked: Asked): Promise<Response | undefined> => {
    const { protocol, host } = new URL(asked.url);
    assert.strictEqual(protocol, "https:", "nothing is asked for in the open");
    assert.strictEqual(asked.headers.authorization, host === "host" ? BASIC : undefined);
    const { value } = lies.next();
    // What was somewhere else for a while is not there any more.
    if (!value) return host === "host" ? goodAnswer(image, asked) : status(404)(asked, played, 0);
    if (value.delay > 0) await web.sleep(value.delay);
    // The canary: a server that gives one version's bytes out as another's.
    if (canary && value.lie === "replaced") {
      return goodAnswer({ ...image, bytes: other.bytes }, asked);
    }
    return LIES[value.lie]!(asked, played, value.amount);
  };
  const played: Played = { web, image, other };
  web.answer = answer;

  const reads: Promise<void>[] = [];
  for (const read of plan.reads) {
    reads.push(checkRead(device, played, read, timeout * 1000, false));
    reads.at(-1)!.catch(() => {});
    if (read.pause > 0) await web.run(web.sleep(read.pause));
  }
  for (const read of reads) await web.run(read);

  // The server is well again, and so is the device.
  while (!lies.next().done);
  await web.run(web.sleep(1001));
  for (let offset = 0; offset < device.size; offset += 8 * BLOCK) {
    const all = { offset, length: 8 * BLOCK, pause: 0 };
    await web.run(checkRead(device, played, all, timeout * 1000, true));
  }
  await web.run(Promise.resolve(device.close!()));
  await web.run(web.sleep(200_000));
  assert.strictEqual(web.open, 0, "no answer is left open");
}

/** Right bytes, or EIO (ETIMEDOUT when nobody answered), before its time is over. */
async function checkRead(
  device: BlockDevice,
  { web, image }: Played,
  read: Read,
  timeoutMs: number,
  isWell: boolean,
): Promise<void> {
  const offset = Math.floor(read.offset % device.size / SECTOR) * SECTOR;
  const length = Math.min(read.length, device.size - offset);
  const buffer = new Uint8Array(length);
  const expected = Buffer.alloc(length);
  expected.set(image.bytes.subarray(offset, offset + length));
  const began = web.now();
  const { signal } = new AbortController();
  try {
    await device.read({ offset, length, buffer, signal });
  } catch (error) {
    assert.ok(error instanceof UblkError, `${(error as Error).stack}`);
    assert.ok(["EIO", "ETIMEDOUT"].includes(error.errno), error.message);
    assert.ok(!isWell, error.message);
    buffer.set(expected);
  }
  assert.ok(expected.equals(buffer), `wrong bytes at ${offset}, of ${length}`);
  assert.ok(web.now() - began <= timeoutMs + 1, `it took ${web.now() - began} ms`);
}

const fuzzer: Fuzzer = {
  about: "http reads right bytes or EIO, in time, and goes on when the server is well again",
  property: (canary) => fc.asyncProperty(plans, (plan) => check(plan, canary)),
};

export default fuzzer;
