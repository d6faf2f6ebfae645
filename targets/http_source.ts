// SPDX-License-Identifier: MIT
/**
 * An image on a web server: ranges of it, all of one and the same version, however often the
 * server fails in between.
 *
 * targets/http_answer.ts judges each answer by itself. Bytes come only from one that names the
 * version of the beginning. One that proves that another is there now fails what is read, until the
 * first is back; after any other, the server is asked again, for as long as who reads can wait.
 * @module
 */

import { Buffer } from "node:buffer";
import { clearTimeout, setTimeout } from "node:timers";
import { UblkError, UsageError } from "../core/error.ts";
import { imageOf, judge, shownValidators, type Validators } from "./http_answer.ts";

/** How long a server may bring nothing, or next to nothing, before it is asked again. */
const SILENCE_MS = 30_000;

/** Less than this is next to nothing. */
const WORTH_BYTES = 16 * 1024;

const BACK_OFF_MIN_MS = 100;
const BACK_OFF_MAX_MS = 3000;

/** How long nobody asks again once another version was seen. */
const REPLACED_MS = 1000;

/** GETs at a time. */
const CONNECTIONS = 8;

const REDIRECTS_MAX = 10;

/** The network and the clock; a test has its own. */
export interface Surroundings {
  fetch(url: string, init: RequestInit): Promise<Response>;
  /** Milliseconds. */
  now(): number;
  /** Calls back after `ms`, unless what it returns is called before. */
  after(ms: number, call: () => void): () => void;
}

const REAL: Surroundings = {
  fetch: (url, init) => fetch(url, init),
  now: () => performance.now(),
  after(ms, call) {
    const timer = setTimeout(call, Math.max(0, ms));
    return () => clearTimeout(timer);
  },
};

/** Which version of an image this is. */
export interface ImageVersion {
  /** Without credentials. */
  readonly url: string;
  /** What it is told by: a strong ETag, or what there is of ETag and Last-Modified. */
  readonly validator: string;
  readonly bytes: number;
}

/** What may go better another time. */
class Trouble extends Error {
  /**
   * @param errno of a device that cannot be opened for it.
   * @param isAnswer the server has said something.
   */
  constructor(
    readonly errno: string,
    hint: string,
    readonly isAnswer: boolean,
    readonly afterMs = 0,
  ) {
    super(hint);
  }
}

/** Who reads cannot wait any longer. */
export class GaveUp extends UblkError {}

/** Takes what came; the next piece waits until it has. */
export type Sink = (piece: Uint8Array) => void | Promise<void>;

export class ImageSource implements ImageVersion {
  readonly url: string;
  readonly validator: string;
  readonly bytes: number;
  readonly #version: Validators & { readonly bytes: number };
  readonly #log: (text: string) => void;
  readonly #around: Surroundings;
  readonly #stop = new AbortController();
  /** With credentials, if there are any. */
  readonly #href: string;
  /** Where the image was last: behind the redirects. */
  #place: string;
  /** Another version was seen: nobody asks until then. */
  #replaced: { error: UblkError; until: number } | undefined;
  /** What anybody's read has last met. */
  #last: Trouble | undefined;
  /** What the log has last said about the server. */
  #trouble: string | undefined;
  #active = 0;
  readonly #waiting = new Set<() => void>();

  private constructor(
    href: string,
    place: string,
    version: Validators & { readonly bytes: number },
    log: (text: string) => void,
    around: Surroundings,
  ) {
    this.url = bare(href);
    this.validator = shownValidators(version);
    this.bytes = version.bytes;
    this.#version = version;
    this.#href = href;
    this.#place = place;
    this.#log = log;
    this.#around = around;
  }

  /**
   * Asks for the first byte, once.
   *
   * @throws {UsageError} the URL is none. @throws {UblkError} there is no image that can be served.
   */
  static async open(
    text: string,
    log: (text: string) => void,
    around: Surroundings = REAL,
  ): Promise<ImageSource> {
    const url = URL.parse(text);
    if (!url || !["http:", "https:"].includes(url.protocol)) {
      throw new UsageError(`Option "url" is "${text}": say https://HOST/PATH or http://HOST/PATH`);
    }
    url.hash = "";
    const { href } = url;
    const operation = `open ${shown(href)}`;
    const attempt = new Attempt(around, around.now() + SILENCE_MS);
    try {
      const { response, place } = await attempt.ask(href, href, "bytes=0-0");
      const image = imageOf(response);
      if ("errno" in image) throw new UblkError({ operation, ...image });
      if (shown(place) !== shown(href)) {
        log(`${shown(href)} is redirected to ${shown(place)}`);
      }
      return new ImageSource(href, place, image, log, around);
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      throw new UblkError({ operation, errno: error.errno, hint: error.message });
    } finally {
      attempt.end();
    }
  }

  /** Ends all that is being read. */
  readonly stop = (): void => this.#stop.abort();

  /** When `ms` from now are over, for `read` and `within`. */
  deadline(ms: number): number {
    return this.#around.now() + ms;
  }

  isOver(deadline: number): boolean {
    return this.#around.now() >= deadline;
  }

  /**
   * Reads bytes `start` to `end`, which `sink` gets in order and exactly once.
   *
   * @throws {GaveUp} the deadline: EIO, the server's answers were of no use; ETIMEDOUT, there were
   * none. @throws {UblkError} EIO: replaced. An error with the code EIO: stopped.
   */
  async read(start: number, end: number, deadline: number, sink: Sink): Promise<void> {
    let at = start;
    let failures = 0;
    // Who begins at the end of the time, after another has given up, learns nothing more.
    const isLate = deadline - this.#around.now() < BACK_OFF_MIN_MS;
    let trouble: Trouble | undefined;
    while (at < end) {
      const before = at;
      const place = this.#place;
      try {
        await this.#connected(deadline, trouble, async () => {
          await this.#get(at, end, deadline, async (piece) => {
            await sink(piece);
            at += piece.length;
          });
        });
        this.#isWell();
        if (at - before >= WORTH_BYTES) continue;
        trouble = new Trouble("EIO", "it sends less than asked", true);
      } catch (error) {
        if (!(error instanceof Trouble)) throw error;
        // At the end of the time, what went before says more than a silence that was cut short.
        const isCut = deadline - this.#around.now() < BACK_OFF_MIN_MS;
        trouble = isCut && (trouble ?? (isLate ? this.#last : undefined)) || error;
        this.#last = trouble;
        this.#place = this.#href;
        if (place !== this.#href) continue; // The way may lead elsewhere by now.
      }
      if (at >= end) return;
      failures = at > before ? 1 : failures + 1;
      const left = deadline - this.#around.now();
      if (left < BACK_OFF_MIN_MS) throw this.#gaveUp(trouble);
      if (failures > 1) this.#isTroubled(trouble.message);
      const backOff = Math.min(BACK_OFF_MAX_MS, BACK_OFF_MIN_MS * 2 ** (failures - 1));
      const pause = Math.max(trouble.afterMs, backOff * (0.75 + Math.random() / 2));
      // However long the server wants to be left alone, there is time for another try.
      await this.#sleep(Math.min(pause, left * 0.9));
    }
  }

  /** Another's promise, for as long as who waits for it can. @throws {GaveUp} ETIMEDOUT. */
  async within<T>(promise: Promise<T>, deadline: number): Promise<T> {
    let cancel = () => {};
    const late = new Promise<never>((_, reject) => {
      const left = deadline - this.#around.now();
      cancel = this.#around.after(left, () => reject(this.#gaveUp()));
    });
    try {
      return await Promise.race([promise, late]);
    } finally {
      cancel();
    }
  }

  #sleep(ms: number): Promise<void> {
    const { signal } = this.#stop;
    if (signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const done = () => {
        cancel();
        signal.removeEventListener("abort", done);
        resolve();
      };
      const cancel = this.#around.after(ms, done);
      signal.addEventListener("abort", done);
    });
  }

  /** @throws when there is no point in asking. */
  #goOn(deadline: number, trouble: Trouble | undefined): void {
    if (this.#stop.signal.aborted) throw stopped();
    if (this.#replaced && this.#around.now() < this.#replaced.until) throw this.#replaced.error;
    if (this.#around.now() > deadline) throw this.#gaveUp(trouble);
  }

  #gaveUp(trouble = this.#last): GaveUp {
    const hint = `${trouble?.message ?? "it is slow"}; gave up: the option timeout says when`;
    return new GaveUp(this.#failure(trouble?.isAnswer ? "EIO" : "ETIMEDOUT", hint));
  }

  #failure(errno: string, hint: string) {
    return { errno, operation: `read ${shown(this.url)}`, hint };
  }

  #isTroubled(what: string): void {
    if (what !== this.#trouble) this.#log(`${shown(this.url)}: ${what}; trying again`);
    this.#trouble = what;
  }

  #isWell(): void {
    this.#replaced = undefined;
    this.#last = undefined;
    if (this.#trouble !== undefined) this.#log(`${shown(this.url)}: it answers again`);
    this.#trouble = undefined;
  }

  /** Runs `work` when there is a connection left. */
  async #connected(
    deadline: number,
    trouble: Trouble | undefined,
    work: () => Promise<void>,
  ): Promise<void> {
    if (this.#active < CONNECTIONS) this.#active++;
    else {
      await new Promise<void>((resolve, reject) => {
        const wake = () => {
          cancel();
          resolve();
        };
        const cancel = this.#around.after(deadline - this.#around.now(), () => {
          this.#waiting.delete(wake);
          reject(this.#gaveUp(trouble));
        });
        this.#waiting.add(wake);
      });
    }
    try {
      this.#goOn(deadline, trouble);
      await work();
    } finally {
      this.#disconnected();
    }
  }

  #disconnected(): void {
    const [next] = this.#waiting;
    if (!next) return void this.#active--;
    this.#waiting.delete(next);
    next();
  }

  /** One GET, which may bring less. @throws {Trouble} when the same may work another time. */
  async #get(start: number, end: number, deadline: number, sink: Sink): Promise<void> {
    const attempt = new Attempt(this.#around, deadline, this.#stop.signal);
    try {
      const range = `bytes=${start}-${end - 1}`;
      const { response, place } = await attempt.ask(this.#href, this.#place, range);
      const verdict = judge(response, this.#version, start);
      if (verdict.is === "replaced") throw this.#isReplaced(verdict.what);
      if (verdict.is !== "part") {
        throw new Trouble("EIO", verdict.what, true, this.#retryAfterMs(response));
      }
      this.#place = place;
      const body = response.body!.getReader();
      const stop = Math.min(end, verdict.end);
      let skip = start - verdict.first;
      for (let at = start; at < stop;) {
        const { value } = await attempt.answered(body.read());
        if (!value) throw new Trouble("EIO", "an answer was cut short", true);
        attempt.brought(value.length);
        const piece = value.subarray(skip, skip + stop - at);
        skip = Math.max(0, skip - value.length);
        if (piece.length > 0) await sink(piece);
        at += piece.length;
        if (at < stop && this.#around.now() > deadline) throw this.#gaveUp();
      }
      // The connection is used again only when the end of the answer was seen.
      if (stop === verdict.end) {
        const over = body.read().then(({ done }) => done, () => false);
        if (await Promise.race([over, this.#sleep(BACK_OFF_MIN_MS)])) attempt.isOver = true;
      }
    } finally {
      attempt.end();
    }
  }

  #isReplaced(what: string): UblkError {
    const hint =
      `the image was replaced, the server has ${what}; until the old one is back, what ` +
      "is not kept here cannot be read: delete the device and add it again";
    const error = new UblkError(this.#failure("EIO", hint));
    this.#replaced = { error, until: this.#around.now() + REPLACED_MS };
    return error;
  }

  #retryAfterMs({ headers }: Response): number {
    const text = headers.get("retry-after");
    if (text === null) return 0;
    const ms = /^\d+$/.test(text) ? Number(text) * 1000 : Date.parse(text) - Date.now();
    return ms > 0 ? ms : 0;
  }
}

/** What is asked once, until it is answered, or it is silent, or who asks cannot wait any longer. */
class Attempt {
  readonly #around: Surroundings;
  readonly #deadline: number;
  readonly #stop: AbortSignal | undefined;
  readonly #controller = new AbortController();
  readonly #aborted: Promise<never>;
  /** How long there may be nothing. */
  #patienceMs = SILENCE_MS;
  #brought = 0;
  /** All of the answer was seen. */
  isOver = false;

  constructor(around: Surroundings, deadline: number, stop?: AbortSignal) {
    this.#around = around;
    this.#deadline = deadline;
    this.#stop = stop;
    stop?.addEventListener("abort", this.#abort);
    if (stop?.aborted) this.#abort();
    const { promise, reject } = Promise.withResolvers<never>();
    promise.catch(() => {}); // Nobody may be waiting.
    this.#aborted = promise;
    this.#controller.signal.addEventListener("abort", () => reject(new Error("aborted")));
  }

  readonly #abort = () => this.#controller.abort();

  /**
   * Asks for a range of what is at `place`, and follows redirects: never from https to http, and
   * with the credentials of `href` only where that leads to.
   *
   * @returns the answer, and where it was given. @throws {Trouble} there is none.
   */
  async ask(
    href: string,
    place: string,
    range: string,
  ): Promise<{ response: Response; place: string }> {
    for (let hops = 0;; hops++) {
      const credentials = credentialsOf(place) ?? (
        new URL(place).origin === new URL(href).origin ? credentialsOf(href) : undefined
      );
      const response = await this.answered(this.#around.fetch(bare(place), {
        headers: {
          range,
          "accept-encoding": "identity",
          ...(credentials && { authorization: credentials }),
        },
        signal: this.#controller.signal,
        redirect: "manual",
        cache: "no-store",
      }));
      if (![301, 302, 303, 307, 308].includes(response.status)) return { response, place };
      response.body?.cancel().catch(() => {});
      place = redirected(place, response);
      if (hops === REDIRECTS_MAX) {
        const hint = "it is redirected for ever: name the URL that has the image";
        throw new Trouble("ELOOP", hint, true);
      }
    }
  }

  /** What the server does is awaited here. @throws {Trouble} it failed, or did not come. */
  async answered<T>(promise: Promise<T>): Promise<T> {
    const began = this.#around.now();
    const ms = Math.min(this.#patienceMs, this.#deadline - began);
    const cancel = this.#around.after(ms, this.#abort);
    try {
      return await Promise.race([promise, this.#aborted]);
    } catch (error) {
      if (this.#stop?.aborted) throw stopped();
      if (this.#controller.signal.aborted) {
        promise.catch(() => {});
        throw new Trouble("ETIMEDOUT", "it is silent", false);
      }
      const { errno, hint } = whyNoAnswer(error);
      throw new Trouble(errno, hint, false);
    } finally {
      cancel();
      this.#patienceMs -= this.#around.now() - began;
    }
  }

  /** Bytes came: one that sends drop by drop is silent too. */
  brought(bytes: number): void {
    this.#brought += bytes;
    if (this.#brought < WORTH_BYTES) return;
    this.#brought = 0;
    this.#patienceMs = SILENCE_MS;
  }

  /** Nothing more is wanted: closes the connection, unless all of the answer was seen. */
  end(): void {
    this.#stop?.removeEventListener("abort", this.#abort);
    if (!this.isOver) this.#abort();
  }
}

/** A URL as it may be shown: without passwords and signatures. */
export function shown(href: string): string {
  const { origin, pathname } = new URL(href);
  return `${origin}${pathname}`;
}

/** Without credentials. */
function bare(href: string): string {
  const url = new URL(href);
  url.username = "";
  url.password = "";
  return url.href;
}

function credentialsOf(href: string): string | undefined {
  const { username, password } = new URL(href);
  if (!username && !password) return undefined;
  const text = `${decode(username)}:${decode(password)}`;
  return `Basic ${Buffer.from(text).toString("base64")}`;
}

/** A sign that is no escape stands for itself. */
function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** @returns where it leads. @throws {Trouble} nowhere, or where nobody should go. */
function redirected(place: string, { headers }: Response): string {
  const url = URL.parse(headers.get("location") ?? "", place);
  if (!headers.get("location") || !url) {
    throw new Trouble("EPROTO", "it is redirected to nowhere", true);
  }
  if (!["http:", "https:"].includes(url.protocol)) {
    throw new Trouble(
      "EPROTO",
      `it is redirected to ${url.protocol}, which is no web server`,
      true,
    );
  }
  if (place.startsWith("https:") && url.protocol === "http:") {
    const hint = `it is redirected from https to ${shown(url.href)}: name that URL`;
    throw new Trouble("EPROTO", hint, true);
  }
  url.hash = "";
  return url.href;
}

function stopped(): Error {
  return Object.assign(new Error("the device stops"), { code: "EIO" });
}

/** Bun and Deno each have their own words for it. */
function whyNoAnswer(error: unknown): { errno: string; hint: string } {
  const { code, message, cause } = error as Error & { code?: unknown };
  const text = [code, message, (cause as Error | undefined)?.message].filter(Boolean).join(": ");
  // Not all of it: there may be a URL with secrets in it, and port numbers that make it seem new.
  const detail = typeof code === "string" ? code : text.split(": ").at(-1)!;
  if (/ENOTFOUND|EAI_|dns error/i.test(text)) {
    return { errno: "EHOSTUNREACH", hint: "there is no such host: check its name, and the DNS" };
  }
  if (/ECONNREFUSED|refused/i.test(text)) {
    return { errno: "ECONNREFUSED", hint: "no server listens there: check host and port" };
  }
  if (/cert/i.test(text)) {
    return {
      errno: "EPROTO",
      hint:
        `the server's certificate is not trusted, ${detail}: for an authority of your own set ` +
        "NODE_EXTRA_CA_CERTS=FILE, under Deno DENO_CERT=FILE",
    };
  }
  if (/EPROTO|TLS|InvalidContentType/i.test(text)) {
    return { errno: "EPROTO", hint: "the server does not speak TLS there: is it http://?" };
  }
  return { errno: "EIO", hint: `the connection failed: ${detail}` };
}
