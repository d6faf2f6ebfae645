// SPDX-License-Identifier: MIT
/**
 * What a web server's answer is: bytes of an image, and of which version; the proof that the image
 * was replaced; or neither, whatever it is: an error, a login page, what a proxy made of it.
 *
 * Only two answers prove that it was replaced: a 206 with another ETag, Last-Modified or complete
 * length, and a 416 with another complete length. Whoever sends those knows the image and its
 * ranges. A missing ETag is no other one, and a 200 is sent by login pages too.
 * @module
 */

/** The longest beginning of an answer that is thrown away to get at what follows. */
export const SKIP_BYTES_MAX = 1024 ** 2;

/** Why something cannot be served. */
export interface Refusal {
  readonly errno: string;
  readonly hint: string;
}

/** What one version is told from another by; empty: the server does not say. */
export interface Validators {
  readonly etag: string;
  readonly lastModified: string;
}

/** Which bytes an answer carries, `end` excluded; undefined: it does not say. */
interface Part {
  readonly first: number;
  readonly end: number | undefined;
  /** Bytes of the whole image. */
  readonly total: number | undefined;
}

/** What an answer is to somebody who knows the version that is wanted. */
export type Verdict =
  | { is: "part"; first: number; end: number }
  | { is: "replaced"; what: string }
  | { is: "useless"; what: string };

/** In one text, as users see it. Empty: there are none. */
export function shownValidators({ etag, lastModified }: Validators): string {
  return isStrong(etag) ? etag : [etag, lastModified].filter(Boolean).join(" ");
}

/** What the first answer says about the image. The range asked for was that of its first byte. */
export function imageOf(response: Response): Refusal | Validators & { bytes: number } {
  const { status, headers } = response;
  const part = partOf(response);
  if ("errno" in part) return part;
  const { first, total } = part;
  const type = headers.get("content-type") ?? "";
  if (status === 200 && /^text\/html\b/i.test(type)) {
    return { errno: "EPROTO", hint: "the server sends a web page: check the URL" };
  }
  if (status === 200 && (total === undefined || total > SKIP_BYTES_MAX)) {
    return {
      errno: "EOPNOTSUPP",
      hint:
        "the server sends no ranges: use another, such as nginx; or download the image, for loop",
    };
  }
  if (total === undefined) {
    const hint = `the server's Content-Range is "${headers.get("content-range")}", which does ` +
      "not tell the size";
    return { errno: "EPROTO", hint };
  }
  if (total === 0) return { errno: "EINVAL", hint: "the image is empty" };
  if (first !== 0) return { errno: "EPROTO", hint: "the server sends another range than asked" };
  const validators = validatorsOf(headers);
  if (!shownValidators(validators)) {
    return {
      errno: "EOPNOTSUPP",
      hint:
        "the server sends neither ETag nor Last-Modified, so a replaced image would go unnoticed",
    };
  }
  return { ...validators, bytes: total };
}

/** @param start the byte that is needed first. */
export function judge(
  response: Response,
  known: Validators & { readonly bytes: number },
  start: number,
): Verdict {
  const { status, headers } = response;
  const emptied = status === 416 && /^bytes\s+\*\/(\d+)$/i.exec(headers.get("content-range") ?? "");
  if (emptied && Number(emptied[1]) !== known.bytes) {
    return { is: "replaced", what: `a size of ${emptied[1]} bytes, not ${known.bytes}` };
  }
  const part = partOf(response);
  if ("errno" in part) return { is: "useless", what: part.hint };
  const seen = validatorsOf(headers);
  const version = compare(known, seen);
  const isOtherSize = part.total !== undefined && part.total !== known.bytes;
  if (status === 206 && isOtherSize) {
    return { is: "replaced", what: `a size of ${part.total} bytes, not ${known.bytes}` };
  }
  if (status === 206 && version === "other") {
    return { is: "replaced", what: `${shownValidators(seen)}, not ${shownValidators(known)}` };
  }
  const saysAll = part.total !== undefined || isStrong(known.etag);
  if (version !== "same" || isOtherSize || !saysAll) {
    return { is: "useless", what: `it answered ${status}, but not of this version` };
  }
  const { first, end = known.bytes } = part;
  if (first > start || end <= start || start - first > SKIP_BYTES_MAX) {
    const what = status === 200 ? "the whole image, not a range" : "another range than asked";
    return { is: "useless", what: `it sends ${what}` };
  }
  return { is: "part", first, end };
}

function partOf({ status, headers }: Response): Part | Refusal {
  if (status !== 200 && status !== 206) return whyNoPart(status);
  const encoding = headers.get("content-encoding") ?? "identity";
  if (!/^identity$/i.test(encoding)) {
    return {
      errno: "EOPNOTSUPP",
      hint: `the server sends it as ${encoding}: switch that off for images`,
    };
  }
  const length = lengthOf(headers);
  if (status === 200) return { first: 0, end: length, total: length };
  // Of several ranges nobody has asked for.
  const isMultipart = /^multipart\//i.test(headers.get("content-type") ?? "");
  const range = headers.get("content-range") ?? "";
  const match = /^bytes\s+(\d+)-(\d+)\/(\d+|\*)$/i.exec(range);
  if (!match || isMultipart) {
    const hint = `the server's Content-Range is "${range}"${isMultipart ? " of several" : ""}`;
    return { errno: "EPROTO", hint };
  }
  const [first, end] = [Number(match[1]), Number(match[2]) + 1];
  const total = match[3] === "*" ? undefined : Number(match[3]);
  const isPossible = first < end && end <= (total ?? Number.MAX_SAFE_INTEGER) &&
    (total ?? 0) <= Number.MAX_SAFE_INTEGER;
  if (!isPossible || length !== undefined && length !== end - first) {
    return { errno: "EPROTO", hint: `the server sends ${length} bytes as Content-Range ${range}` };
  }
  return { first, end, total };
}

function whyNoPart(status: number): Refusal {
  switch (status) {
    case 401:
    case 403:
      return {
        errno: "EACCES",
        hint: `the server answered ${status}: put the credentials into the URL, ` +
          "https://USER:PASSWORD@HOST/PATH",
      };
    case 404:
    case 410:
      return { errno: "ENOENT", hint: `the server answered ${status}: check the URL` };
    case 416:
      return { errno: "EINVAL", hint: "the server answered 416: the image is empty" };
    default: {
      const later = status >= 500 || status === 429 ? ": try again later" : "";
      return { errno: "EIO", hint: `the server answered ${status}${later}` };
    }
  }
}

function lengthOf(headers: Headers): number | undefined {
  const text = headers.get("content-length") ?? "";
  return /^\d+$/.test(text) ? Number(text) : undefined;
}

function validatorsOf(headers: Headers): Validators {
  return {
    etag: headers.get("etag") ?? "",
    lastModified: headers.get("last-modified") ?? "",
  };
}

function isStrong(etag: string): boolean {
  return /^"[^"]*"$/.test(etag);
}

/**
 * A strong ETag is equal to itself only, and nothing else need be. A weak one, W/"...", says of
 * another with the same text no more than that it may be the same.
 */
function compare(known: Validators, seen: Validators): "same" | "other" | "unknown" {
  const differ = (one: string, two: string) => one !== "" && two !== "" && one !== two;
  const text = (etag: string) => etag.replace(/^W\//, "");
  if (differ(text(known.etag), text(seen.etag))) return "other";
  if (isStrong(known.etag)) return seen.etag === known.etag ? "same" : "unknown";
  if (differ(known.lastModified, seen.lastModified)) return "other";
  const isThere = (name: keyof Validators) => known[name] === "" || seen[name] !== "";
  return isThere("etag") && isThere("lastModified") ? "same" : "unknown";
}
