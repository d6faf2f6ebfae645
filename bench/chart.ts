// SPDX-License-Identifier: MIT
/**
 * Draws a `Report` as SVG: for each case a bar for each contender, as long as its throughput
 * against the yardstick's, with the range over the repeats as a line across its end.
 */
import type { Report } from "./plan.ts";
import { distinct, pick, type Ratio, ratio } from "./statistics.ts";
import { yardstickOf } from "./table.ts";

const WIDTH = 900;
const LABEL = 150;
const VALUE = 70;
const BAR = 14;
const GAP = 5;
const TITLE = 34;

/** A bar longer than this many yardsticks is cut off, or the others could not be told apart. */
const RATIO_MAX = 3;

const escape = (text: string) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const number = (value: number) => value.toFixed(1);

function colour(name: string, yardstick: string): string {
  if (name === yardstick) return "#8a8f98";
  return /^(ubd|executable|Bun|Deno)/.test(name) ? "#2f6fde" : "#c3c7ce";
}

function text(x: number, y: number, content: string, more = ""): string {
  return `  <text x="${number(x)}" y="${number(y)}"${more}>${escape(content)}</text>\n`;
}

function line(x1: number, y1: number, x2: number, y2: number, more: string): string {
  const [a, b, c, d] = [x1, y1, x2, y2].map(number);
  return `  <line x1="${a}" y1="${b}" x2="${c}" y2="${d}" ${more} />\n`;
}

function bar(y: number, name: string, found: Ratio, yardstick: string): string {
  const x = (value: number) =>
    LABEL + Math.min(value, RATIO_MAX) / RATIO_MAX * (WIDTH - LABEL - VALUE);
  const middle = y + BAR / 2;
  const size = `width="${number(x(found.median) - LABEL)}" height="${BAR}"`;
  const value = `${found.median.toFixed(2)}${found.median > RATIO_MAX ? " →" : ""}`;
  return text(LABEL - 8, middle + 4, name, ` text-anchor="end"`) +
    `  <rect x="${LABEL}" y="${number(y)}" ${size} fill="${colour(name, yardstick)}" />\n` +
    line(x(found.min), middle, x(found.max), middle, `stroke="#1c1e21" stroke-width="1.5"`) +
    text(WIDTH - VALUE + 8, middle + 4, value);
}

export function drawReport(report: Report): string {
  let y = 10;
  let content = "";
  for (const group of distinct(report.measurements.map((it) => it.group))) {
    const yardstick = yardstickOf(group);
    const loads = report.measurements.filter((it) => it.group === group).map((it) => it.case);
    for (const load of distinct(loads)) {
      const here = pick(report.measurements, group, load);
      const of = (name: string) => here.filter((it) => it.name === name);
      const bars = distinct(here.map(({ name }) => name)).flatMap((name) => {
        const found = ratio(of(name), of(yardstick), (it) => it.iops);
        return found ? [{ name, found }] : [];
      });
      if (bars.length < 2) continue;
      const title = `${group}: ${load} (1 = ${yardstick})`;
      content += text(8, y + 20, title, ` font-weight="bold"`);
      y += TITLE;
      const one = LABEL + (WIDTH - LABEL - VALUE) / RATIO_MAX;
      const height = bars.length * (BAR + GAP);
      for (const { name, found } of bars) {
        content += bar(y, name, found, yardstick);
        y += BAR + GAP;
      }
      content += line(one, y - height - 3, one, y, `stroke="#d0342c" stroke-dasharray="3 3"`);
      y += 8;
    }
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${number(y)}" ` +
    `font-family="sans-serif" font-size="12" fill="#1c1e21">\n` +
    `  <rect width="${WIDTH}" height="${number(y)}" fill="#ffffff" />\n${content}</svg>\n`;
}
