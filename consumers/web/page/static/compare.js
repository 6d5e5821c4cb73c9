// Several portfolios in one chart: daily closes, rebased to 100 on the first day that all of them have in the range.
/* global uPlot */

import { instants } from "./charts.js";
import { byId, element, replace } from "./dom.js";
import { saveCsv, savePng } from "./downloads.js";
import { day, localNoon, portfolio as named } from "./format.js";

const COLORS = ["value", "balance", "invested", "profit", "loss"];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const figures = new Intl.NumberFormat(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const title = ({ portfolio, measure }) => `Portfolio ${named(portfolio)} (${measure})`;

/** Returns { first, dates, lines, problem }: `lines` has one list of figures per portfolio, with null for missing days. */
export function rebased(answers, from, to) {
  const within = (date) => { const at = localNoon(date) / 1000; return at >= from - 43200 && at <= to + 43200; };
  const closes = answers.map((one) => new Map(one.date.map((date, index) => [date, one.close[index]]).filter(([date]) => within(date))));
  const first = [...closes[0].keys()].find((date) => closes.every((each) => each.has(date)));
  if (first === undefined) return { dates: [], lines: [], problem: "These portfolios have no day in common in this range." };
  const based = answers.map((one, index) => ({ one, each: closes[index], base: Number(closes[index].get(first)) }));
  const kept = based.filter(({ base }) => base > 0), without = based.filter(({ base }) => !(base > 0));
  const dates = [...new Set(kept.flatMap(({ each }) => [...each.keys()]))].filter((date) => date >= first).sort();
  const lines = kept.map(({ one, each, base }) => ({
    ...one, figures: dates.map((date) => (each.has(date) ? (Number(each.get(date)) / base) * 100 : null)),
  }));
  const problem = without.map(({ one }) => `${title(one)} is left out: it was worth 0 or less on ${day(first)}, so it cannot be rebased.`).join(" ");
  return { first, dates, lines, problem };
}

export class Comparison {
  #plot = null;
  #shown = null;
  #range = [0, 1];

  constructor() {
    document.addEventListener("themechange", () => this.#draw());
    new ResizeObserver(() => {
      const width = byId("compare-chart").clientWidth;
      if (this.#plot && width && width !== this.#plot.width) this.#plot.setSize({ width, height: 280 });
    }).observe(byId("compare-chart"));
    byId("compare-csv").addEventListener("click", () => saveCsv("portfolios-compared", ["date", ...this.#shown.lines.map((one) =>
      `portfolio ${one.portfolio} ${one.measure}`)], this.#shown.dates.map((date, at) => [date, ...this.#shown.lines.map((one) => one.figures[at])])));
    byId("compare-png").addEventListener("click", () => savePng("portfolios-compared", this.#plot.ctx.canvas,
      byId("compare-title").textContent, this.#shown.lines.map((one, at) => [title(one), color(COLORS[at % COLORS.length])])));
  }

  /** Shows daily answers, each with its `portfolio`; `problem` is a text to show instead, null for none. */
  show(answers, from, to, problem = null) {
    byId("compare").hidden = answers.length < 2 && !problem;
    this.#range = [from, to];
    this.#shown = problem || answers.length < 2 ? { dates: [], lines: [], problem } : rebased(answers, from, to);
    byId("compare-note").textContent = [this.#shown.first && `100 is the close of ${day(this.#shown.first)}, the first day that all of them `
      + "have in this range. Deposits and withdrawals count as change here.", this.#shown.problem].filter(Boolean).join(" ");
    replace(byId("compare-legend"), ...this.#shown.lines.map((one, at) => element("li", { class: `line-${at % COLORS.length}` },
      `${title(one)}: ${figures.format(one.figures.findLast((figure) => figure !== null))}`)));
    for (const id of ["compare-csv", "compare-png"]) byId(id).disabled = !this.#shown.lines.length;
    this.#draw();
  }

  #draw() {
    this.#plot?.destroy();
    this.#plot = null;
    byId("compare-chart").hidden = !this.#shown?.lines.length;
    if (typeof uPlot === "undefined" || !this.#shown?.lines.length) return;
    const { dates, lines } = this.#shown;
    const axis = { stroke: color("muted"), grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid"), width: 1 }, font: "12px system-ui, sans-serif" };
    this.#plot = new uPlot({
      width: byId("compare-chart").clientWidth, height: 280, legend: { show: false }, padding: [8, 28, 0, 0],
      cursor: { show: false }, scales: { x: { range: () => this.#range } },
      axes: [{ ...axis, space: 80, incrs: [1, 2, 7, 14, 28, 56, 91, 182, 365].map((days) => days * 86400), values: instants },
        { ...axis, size: 74 }],
      series: [{}, ...lines.map((_, at) => ({ stroke: color(COLORS[at % COLORS.length]), width: 2, spanGaps: true,
        dash: at >= COLORS.length ? [6, 4] : undefined, points: { size: 5 } }))],
    }, [dates.map((date) => localNoon(date) / 1000), ...lines.map((one) => one.figures)], byId("compare-chart"));
  }
}
