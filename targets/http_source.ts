// SPDX-License-Identifier: MIT
/**
 * An image on a web server: ranges of it, all of one and the same version, however often the
 * server fails in between.
 *
 * Each answer must name the version that was there at the beginning: a strong ETag, else whatever
 * ETag and Last-Modified there are, and the same size. Once one does not, nothing is read any more.
 * @module
 */

import { clearTimeout, setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { UblkError, UsageError } from "../core/error.ts";

/** How long a server may be silent before it is asked again. */
const SILENCE_MS = 30_000;

const BACK_OFF_MIN_MS = 100;
const BACK_OFF_MAX_MS = 3000;

/** GETs at a time. */
const CONNECTIONS = 8;

/** Which version of an image this is. */
export interface ImageVersion {
  readonly url: string;
  /** What it is told by: a strong ETag, or what there is of ETag and Last-Modified. */
  readonly validator: string;
  readonly bytes: number;
}

/** What may be tried again. */
class Retry extends Error {
  readonly afterMs: number;
  constructor(why: string, afterMs = 0) {
    super(why);
    this.afterMs = afterMs;
  }
}

/** Takes what came; the next piece waits until it has. */
export type Sink = (piece: Uint8Array) => void | Promise<void>;

export class ImageSource implements ImageVersion {
  readonly url: string;
  readonly validator: string;
  readonly bytes: number;
  readonly #log: (text: string) => void;
  readonly #stop = new AbortController();
  /** Where the image was last: behind the redirects. */
  #place: string;
  #changed: UblkError | undefined;
  #active = 0;
  readonly #waiting: (() => void)[] = [];

  private constructor(version: ImageVersion, place: string, log: (text: string) => void) {
    this.url = version.url;
    this.validator = version.validator;
    this.bytes = version.bytes;
    this.#place = place;
    this.#log = log;
  }

  /**
   * Asks for the first byte, once.
   *
   * @throws {UsageError} the URL is none. @throws {UblkError} there is no image that can be served.
   */
  static async open(text: string, log: (text: string) => void): Promise<ImageSource> {
    const url = URL.parse(text);
    if (!url || !["http:", "https:"].includes(url.protocol)) {
      throw new UsageError(`Option "url" is "${text}": say https://HOST/PATH or http://HOST/PATH`);
    }
    url.hash = "";
    const operation = `open ${shown(url.href)}`;
    let response;
    try {
      response = await get(url.href, { range: "bytes=0-0" }, AbortSignal.timeout(SILENCE_MS));
      response.body?.cancel().catch(() => {});
    } catch (error) {
      throw new UblkError({ operation, ...whyNoAnswer(error) });
    }
    const refused = whyRefused(url.href, response);
    if (refused) throw new UblkError({ operation, ...refused });
    const { total } = contentRange(response)!;
    if (shown(response.url) !== shown(url.href)) {
      log(`${shown(url.href)} is redirected to ${shown(response.url)}`);
    }
    const version = { url: url.href, validator: validatorOf(response), bytes: total! };
    return new ImageSource(version, response.url, log);
  }

  /** Ends all that is being read. */
  readonly stop = (): void => this.#stop.abort();

  /** @throws {UblkError} EIO: the image was replaced. */
  check(): void {
    if (this.#changed) throw this.#changed;
  }

  /**
   * Reads bytes `start` to `end`, which `sink` gets in order and exactly once.
   *
   * @param deadline in performance.now(): when to give up.
   * @throws {UblkError} EIO: replaced, or refused; ETIMEDOUT: the deadline. An error with the code
   * EIO: stopped.
   */
  async read(start: number, end: number, deadline: number, sink: Sink): Promise<void> {
    let at = start;
    let failures = 0;
    for (;;) {
      const before = at;
      let why: Retry;
      try {
        await this.#connected(async () => {
          this.#goOn(deadline);
          await this.#get(at, end, deadline, async (piece) => {
            await sink(piece);
            at += piece.length;
          });
        });
        return;
      } catch (error) {
        if (!(error instanceof Retry)) throw error;
        why = error;
        this.#place = this.url; // The way may lead elsewhere by now.
      }
      failures = at > before ? 1 : failures + 1;
      const backOff = Math.min(BACK_OFF_MAX_MS, BACK_OFF_MIN_MS * 2 ** (failures - 1));
      const pause = Math.max(why.afterMs, backOff * (0.75 + Math.random() / 2));
      if (performance.now() + pause > deadline) throw this.#gaveUp(why.message);
      if (failures > 1) this.#log(`${shown(this.url)}: ${why.message}; trying again`);
      await sleep(pause, undefined, { signal: this.#stop.signal }).catch(() => {});
    }
  }

  /** @throws when there is no point in asking. */
  #goOn(deadline: number): void {
    this.check();
    if (this.#stop.signal.aborted) {
      throw Object.assign(new Error("the device stops"), { code: "EIO" });
    }
    if (performance.now() > deadline) throw this.#gaveUp("too much to do");
  }

  #gaveUp(why: string): UblkError {
    return this.#failure("ETIMEDOUT", `${why}; gave up: the option timeout says when`);
  }

  #failure(errno: string, hint: string): UblkError {
    return new UblkError({ errno, operation: `read ${shown(this.url)}`, hint });
  }

  /** Runs `work` when there is a connection left. */
  async #connected(work: () => Promise<void>): Promise<void> {
    if (this.#active < CONNECTIONS) this.#active++;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    try {
      await work();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#active--;
    }
  }

  /** One GET. @throws {Retry} when the same may work another time. */
  async #get(start: number, end: number, deadline: number, sink: Sink): Promise<void> {
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    this.#stop.signal.addEventListener("abort", abort);
    const silence = Math.min(SILENCE_MS, deadline - performance.now());
    let timer = setTimeout(abort, silence);
    let body: ReadableStreamDefaultReader<Uint8Array> | undefined;
    /** What the server does is awaited here, and what it fails in may be tried again. */
    const answered = async <T>(promise: Promise<T>): Promise<T> => {
      try {
        return await promise;
      } catch (error) {
        this.#goOn(Infinity);
        throw new Retry(attempt.signal.aborted ? "it is silent" : whyNoAnswer(error).hint);
      } finally {
        clearTimeout(timer);
      }
    };
    try {
      const strong = this.validator.startsWith('"');
      const place = this.#place;
      const response = await answered(get(place, {
        range: `bytes=${start}-${end - 1}`,
        ...(strong && { "if-range": this.validator }),
      }, attempt.signal));
      body = response.body?.getReader();
      this.#checkAnswer(place, response, start, end);
      this.#place = response.url;
      for (let at = start; at < end;) {
        timer = setTimeout(abort, silence);
        const { value } = await answered(body!.read());
        if (!value) throw new Retry("an answer was cut short");
        if (value.length > end - at) throw this.#failure("EIO", "it sends more than it announces");
        this.check();
        await sink(value);
        at += value.length;
        if (at < end && performance.now() > deadline) throw this.#gaveUp("it is slow");
      }
      // The connection is used again only when the end of the answer was seen.
      await Promise.race([body!.read(), sleep(BACK_OFF_MIN_MS)]).catch(() => {});
    } finally {
      clearTimeout(timer);
      this.#stop.signal.removeEventListener("abort", abort);
      body?.cancel().catch(() => {});
    }
  }

  /** @throws when it is not the asked bytes of this version. */
  #checkAnswer(place: string, response: Response, start: number, end: number): void {
    const { status } = response;
    if (status >= 500 || [408, 425, 429].includes(status)) {
      throw new Retry(`it answered ${status}`, retryAfterMs(response));
    }
    // The place behind a redirect may have been for a while only.
    if (place !== this.url && status >= 400 && ![412, 416].includes(status)) {
      throw new Retry(`it answered ${status} behind the redirect`);
    }
    if (status === 200) throw this.#change("the whole image instead of a range");
    if (status === 412 || status === 416) throw this.#change(`${status}`);
    const refused = whyRefused(this.url, response);
    if (refused) throw this.#failure("EIO", refused.hint);
    const { first, last, total } = contentRange(response)!;
    if (total !== this.bytes) throw this.#change(`a size of ${total} bytes, not ${this.bytes}`);
    const validator = validatorOf(response);
    if (validator !== this.validator) {
      throw this.#change(`${validator || "no ETag"}, not ${this.validator}`);
    }
    if (first !== start || last !== end - 1) throw this.#failure("EIO", "it sends other ranges");
  }

  /** From now on there is nothing to be read. */
  #change(what: string): UblkError {
    const hint = `the image was replaced, the server answers ${what}; all I/O fails from now on: ` +
      "delete the device and add it again";
    return this.#changed ??= this.#failure("EIO", hint);
  }
}

/** A URL as it may be shown: without passwords and signatures. */
export function shown(href: string): string {
  const { origin, pathname } = new URL(href);
  return `${origin}${pathname}`;
}

function get(url: string, headers: Record<string, string>, signal: AbortSignal) {
  const all = { ...headers, "accept-encoding": "identity" };
  return fetch(url, { headers: all, signal, redirect: "follow", cache: "no-store" });
}

/** Empty when nothing tells one version from another. */
function validatorOf({ headers }: Response): string {
  const etag = headers.get("etag") ?? "";
  if (etag.startsWith('"')) return etag;
  return [etag, headers.get("last-modified") ?? ""].filter(Boolean).join(" ");
}

function contentRange({ headers }: Response) {
  const match = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(headers.get("content-range") ?? "");
  return match && { first: Number(match[1]), last: Number(match[2]), total: Number(match[3]) };
}

/** What keeps an answer from being a part of an image; undefined: nothing. */
function whyRefused(
  asked: string,
  response: Response,
): { errno: string; hint: string } | undefined {
  const { status, headers } = response;
  const no = (errno: string, hint: string) => ({ errno, hint });
  switch (status) {
    case 206:
      break;
    case 200:
      return no(
        "EOPNOTSUPP",
        "the server sends no ranges: use another, such as nginx; or download the image, for loop",
      );
    case 401:
    case 403:
      return no(
        "EACCES",
        `the server answered ${status}: put the credentials into the URL, ` +
          "https://USER:PASSWORD@HOST/PATH",
      );
    case 404:
    case 410:
      return no("ENOENT", `the server answered ${status}: check the URL`);
    case 416:
      return no("EINVAL", "the server answered 416: the image is empty");
    default:
      return no("EIO", `the server answered ${status}${status >= 500 ? ": try again later" : ""}`);
  }
  if (asked.startsWith("https:") && !response.url.startsWith("https:")) {
    return no("EPROTO", `it is redirected from https to ${shown(response.url)}: name that URL`);
  }
  const encoding = headers.get("content-encoding") ?? "identity";
  if (encoding !== "identity") {
    return no("EOPNOTSUPP", `the server sends it as ${encoding}: switch that off for images`);
  }
  if (!contentRange(response)) {
    const range = headers.get("content-range");
    return no("EPROTO", `the server's Content-Range is "${range}", which does not tell the size`);
  }
  if (!validatorOf(response)) {
    return no(
      "EOPNOTSUPP",
      "the server sends neither ETag nor Last-Modified, so a replaced image would go unnoticed",
    );
  }
  return undefined;
}

/** Bun and Deno each have their own words for it. */
function whyNoAnswer(error: unknown): { errno: string; hint: string } {
  const { code, message, name, cause } = error as Error & { code?: unknown };
  const text = [code, message, (cause as Error | undefined)?.message].filter(Boolean).join(": ");
  // Not all of it: there may be a URL with secrets in it, and port numbers that make it seem new.
  const detail = typeof code === "string" ? code : text.split(": ").at(-1)!;
  if (name === "TimeoutError") {
    return { errno: "ETIMEDOUT", hint: `no answer in ${SILENCE_MS / 1000} s` };
  }
  if (/redirect/i.test(text)) {
    return { errno: "ELOOP", hint: "it is redirected for ever: name the URL that has the image" };
  }
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

function retryAfterMs({ headers }: Response): number {
  const text = headers.get("retry-after");
  if (text === null) return 0;
  const ms = /^\d+$/.test(text) ? Number(text) * 1000 : Date.parse(text) - Date.now();
  return ms > 0 ? ms : 0;
}
