// SPDX-License-Identifier: MIT
/**
 * A web and a clock for the http target, without sockets or waiting: an answer is what the test says,
 * and time passes when nothing else is left to do.
 * @module
 */

import { setImmediate } from "node:timers";
import type { Surroundings } from "../../targets/http_source.ts";

/** One GET, as the server sees it. */
export interface Asked {
  url: string;
  /** The range's first byte, and the one after its last. */
  first: number;
  end: number;
  headers: Record<string, string>;
}

interface Timer {
  at: number;
  call: () => void;
}

export class PlayedWeb implements Surroundings {
  /** Undefined: it never answers. What it throws, the connection fails with. */
  answer: (asked: Asked) => Response | undefined | Promise<Response | undefined>;
  readonly asked: Asked[] = [];
  /** Answers that were neither read to their end nor given up. */
  open = 0;
  #now = 0;
  readonly #timers = new Set<Timer>();

  constructor(answer: PlayedWeb["answer"]) {
    this.answer = answer;
  }

  async fetch(url: string, init: RequestInit): Promise<Response> {
    const headers = init.headers as Record<string, string>;
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(headers.range!)!.map(Number);
    const asked = { url, first: first!, end: last! + 1, headers };
    this.asked.push(asked);
    const { signal } = init;
    const aborted = new Promise<never>((_, reject) => {
      const abort = () => reject(new DOMException("aborted", "AbortError"));
      if (signal!.aborted) abort();
      else signal!.addEventListener("abort", abort);
    });
    aborted.catch(() => {});
    this.open++;
    try {
      const never = new Promise<never>(() => {});
      const response = await Promise.race([
        Promise.resolve(this.answer(asked)).then((answer) => answer ?? never),
        aborted,
      ]);
      return this.#watched(response, aborted);
    } catch (error) {
      this.open--;
      throw error;
    }
  }

  /** The same answer, whose body ends when nobody wants it. */
  #watched(response: Response, aborted: Promise<never>): Response {
    const reader = response.body?.getReader();
    let isOpen = true;
    const ended = () => {
      if (isOpen) this.open--;
      isOpen = false;
    };
    aborted.catch(ended);
    if (!reader) ended();
    const body = reader && new ReadableStream({
      async pull(controller) {
        const { value } = await Promise.race([reader.read(), aborted]);
        if (value) return controller.enqueue(value);
        ended();
        controller.close();
      },
      cancel: ended,
    });
    return new Response(body ?? null, { status: response.status, headers: response.headers });
  }

  now(): number {
    return this.#now;
  }

  after(ms: number, call: () => void): () => void {
    const timer = { at: this.#now + Math.max(0, ms), call };
    this.#timers.add(timer);
    return () => this.#timers.delete(timer);
  }

  sleep(ms: number): Promise<void> {
    return new Promise((resolve) => this.after(ms, resolve));
  }

  /** Lets time pass until the promise is settled. @throws nothing will ever settle it. */
  async run<T>(promise: Promise<T>): Promise<T> {
    let isSettled = false;
    const settled = () => isSettled = true;
    promise.then(settled, settled);
    for (let idle = 0;;) {
      await new Promise<void>((resolve) => setImmediate(resolve));
      if (isSettled) return await promise;
      const next = [...this.#timers].reduce<Timer | undefined>(
        (first, timer) => !first || timer.at < first.at ? timer : first,
        undefined,
      );
      idle = next ? 0 : idle + 1;
      if (idle > 100) throw new Error("nothing will ever happen");
      if (!next) continue;
      this.#timers.delete(next);
      this.#now = next.at;
      next.call();
    }
  }
}

/** An image as a good server has it. */
export interface PlayedImage {
  bytes: Uint8Array<ArrayBuffer>;
  etag?: string;
  lastModified?: string;
}

/** What the headers of each answer about an image say. */
export function about({ etag, lastModified }: PlayedImage): Record<string, string> {
  return {
    ...(etag !== undefined && { etag }),
    ...(lastModified !== undefined && { "last-modified": lastModified }),
  };
}

/** A 206 of these bytes, or what is changed about it. */
export function partOf(
  image: PlayedImage,
  first: number,
  end: number,
  headers: Record<string, string> = {},
  body: BodyInit | null = streamOf(image.bytes.subarray(first, end)),
): Response {
  const range = `bytes ${first}-${end - 1}/${image.bytes.length}`;
  const all = { ...about(image), "content-range": range, ...headers };
  return new Response(body, { status: 206, headers: all });
}

/** As a good server answers. */
export function goodAnswer(image: PlayedImage, { first, end }: Asked): Response {
  const size = image.bytes.length;
  return first < size
    ? partOf(image, first, Math.min(end, size))
    : new Response(null, { status: 416, headers: { "content-range": `bytes */${size}` } });
}

const PIECE_BYTES = 48 * 1024;

/** Bytes in pieces; then the end, or what `then` does. */
export function streamOf(
  bytes: Uint8Array<ArrayBuffer>,
  then: (controller: ReadableStreamDefaultController) => void | Promise<void> = (end) =>
    end.close(),
): ReadableStream<Uint8Array<ArrayBuffer>> {
  let at = 0;
  return new ReadableStream({
    pull(controller) {
      if (at >= bytes.length) return then(controller);
      controller.enqueue(bytes.slice(at, at += PIECE_BYTES));
    },
  });
}
