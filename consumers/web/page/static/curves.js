// The portfolio section: choice of portfolio and range, the figures, and the table of days.

import { Charts, scaled } from "./charts.js";
import { Comparison } from "./compare.js";
import { byId, element, number, replace, row } from "./dom.js";
import { saveCsv, savePng } from "./downloads.js";
import { amount, change, count, day, localNoon, moment, percent, portfolio as named } from "./format.js";
import { showPerformance } from "./performance.js";
import { get, Unreadable } from "./server.js";

const DAY = 86400;
const RANGES = [["1D", DAY, "one day"], ["1W", 7 * DAY, "one week"], ["1M", 30 * DAY, "30 days"],
  ["3M", 91 * DAY, "three months"], ["1Y", 365 * DAY, "one year"], ["All", null, "everything"]];
const DAYS_AT_ONCE = 60;
const LATEST = Date.parse("9998-12-31T00:00:00Z") / 1000; // the server accepts no later time
const NOTHING = { at: [], worth: [], balance: [], total_invested: [], drawdown: [], after_gap: [], snapshots: 0, closes_only: false };
const NO_DAYS = { date: [], at: [], close: [], change: [], days: [] };
// Measure -> its name in the list, in titles, and what it is.
const MEASURES = {
  value: ["Value (as recorded)", "value", "Value is total_value as it was recorded."],
  equity: ["Equity", "equity", "Equity is balance + invested + profit/loss."],
  profit_loss: ["Profit/loss", "profit/loss", "Profit/loss is total_profit_loss as it was recorded; deposits do not change it."],
};

export class Curves {
  #portfolios = [];
  #chosen = null;
  #measure = null; // null: the portfolio's default
  #others = []; // the portfolios to compare with
  #range = { last: null }; // { last: seconds before the newest snapshot, null for all }, or { from, to }
  #reading = null;
  #loaded = { portfolio: null, curve: NOTHING }; // the last answer
  #daily = null;
  #compared = null; // { key, answers } of the last comparison
  #performed = null; // portfolio and measure of the performance that is shown
  #shownDays = DAYS_AT_ONCE;

  /** `failed(error)` is called if data cannot be read after a click. */
  constructor(failed) {
    this.failed = failed;
    this.charts = new Charts({
      zoomed: (from, to) => this.#look({ from, to }),
      reset: () => this.#look({ last: null }),
    });
    byId("portfolio").addEventListener("change", (event) => this.#choose(event.target.value));
    byId("parts").addEventListener("change", () => this.#reread());
    byId("measure").addEventListener("change", (event) => this.#measureBy(event.target.value));
    replace(byId("measure"), ...Object.entries(MEASURES).map(([name, [text]]) => element("option", { value: name }, text)));
    this.comparison = new Comparison();
    this.#follow();
    addEventListener("popstate", () => { this.#follow(); if (this.#portfolios.length) { this.#offer(); this.#look(this.#range, false); } });
    byId("charts").addEventListener("click", (event) => { if (event.target.dataset.save) this.#save(...event.target.dataset.save.split("-")); });
    byId("steps").addEventListener("click", (event) => this.#step(event.target.dataset.step));
    byId("more-days").addEventListener("click", () => { this.#shownDays *= 4; this.#listDays(); });
    replace(byId("ranges"), ...RANGES.map(([text, last, label]) => element("button", {
      type: "button", id: `range-${text}`, "aria-label": label, click: () => this.#look({ last }),
    }, text)));
  }

  /** Reads the section's data again. If that fails, throws Unreadable and leaves the page unchanged. */
  async refresh() {
    const portfolios = await get("portfolios");
    this.#compared = this.#performed = null;
    this.#portfolios = portfolios;
    this.#offer();
    byId("curves-state").hidden = portfolios.length > 0;
    byId("charts").hidden = portfolios.length === 0;
    if (portfolios.length) await this.#read();
    else {
      showPerformance(null);
      replace(byId("curves-state"), ...nothingYet());
    }
    byId("curves").setAttribute("aria-busy", "false");
  }

  #offer() {
    const select = byId("portfolio");
    const names = this.#portfolios.map(({ portfolio }) => portfolio);
    const unknown = this.#chosen !== null && names.length && !names.includes(this.#chosen) ? this.#chosen : null;
    if (unknown !== null) byId("portfolio-note").textContent = `Portfolio ${named(unknown)} has no snapshots. Portfolio ${named(names[0])} is shown.`;
    if (!names.includes(this.#chosen)) this.#chosen = names[0] ?? null;
    const offered = [...select.options].map(({ value }) => value);
    if (offered.join() !== names.join()) {
      replace(select, ...names.map((name) => element("option", { value: name }, named(name))));
    }
    select.value = this.#chosen ?? "";
    select.disabled = names.length < 2;
    select.hidden = names.length === 0;
    this.#others = this.#others.filter((name) => names.includes(name) && name !== this.#chosen);
    const others = names.filter((name) => name !== this.#chosen);
    byId("others").hidden = others.length === 0;
    replace(byId("others"), element("legend", {}, "Compare with portfolio"), ...others.map((name) => element("label", {},
      element("input", { type: "checkbox", id: `other-${name}`, checked: this.#others.includes(name), change: (event) => {
        this.#others = event.target.checked ? [...this.#others, name] : this.#others.filter((one) => one !== name);
        this.#address();
        this.#reread();
      } }), ` ${named(name)}`)));
  }

  get #extent() {
    const { first_at, last_at } = this.#portfolios.find(({ portfolio }) => portfolio === this.#chosen);
    return [Date.parse(first_at) / 1000, Date.parse(last_at) / 1000];
  }

  #span() {
    const [first, last] = this.#extent;
    if (this.#range.from !== undefined) return [this.#range.from, this.#range.to];
    return [this.#range.last === null ? first : last - this.#range.last, last];
  }

  async #measureBy(name) {
    this.#measure = name;
    this.#address();
    await this.#reread();
  }

  /** Writes portfolios, measure and range into the page's address, which can be shared. */
  #address() {
    const address = new URL(location.href), values = address.searchParams;
    for (const name of ["portfolio", "measure", "range", "since", "until"]) values.delete(name);
    for (const name of [this.#chosen, ...this.#others]) values.append("portfolio", name);
    if (this.#measure) values.set("measure", this.#measure);
    if (this.#range.from !== undefined) {
      values.set("since", new Date(this.#range.from * 1000).toISOString());
      values.set("until", new Date(this.#range.to * 1000).toISOString());
    } else if (this.#range.last !== null) {
      values.set("range", RANGES.find(([, last]) => last === this.#range.last)[0]);
    }
    if (address.href !== location.href) history.pushState(null, "", address);
  }

  /** Takes portfolios, measure and range from the address. What it does not know, it ignores. */
  #follow() {
    const address = new URLSearchParams(location.search);
    [this.#chosen = null, ...this.#others] = new Set(address.getAll("portfolio"));
    this.#measure = Object.hasOwn(MEASURES, address.get("measure")) ? address.get("measure") : null;
    const named = RANGES.find(([text]) => text === address.get("range"));
    const [from, to] = ["since", "until"].map((name) => Date.parse(address.get(name)) / 1000);
    this.#range = from >= 0 && from < to && to < LATEST ? { from, to } : { last: named ? named[1] : null };
  }

  #save(chart, format) {
    const name = `portfolio-${this.#chosen}-${chart}`, { curve } = this.#loaded;
    if (format === "png") {
      const canvas = this.charts.canvas(chart);
      const title = { value: byId("value-title").textContent, drawdown: "Drawdown", daily: byId("daily-title").textContent }[chart];
      const legend = chart === "value" && byId("parts").checked
        ? [[title, "value"], ["balance", "balance"], ["invested", "invested"]].map(([text, color]) =>
          [text, getComputedStyle(document.documentElement).getPropertyValue(`--${color}`).trim()]) : [];
      if (canvas) savePng(name, canvas, `${title}, portfolio ${named(this.#chosen)}`, legend);
      return;
    }
    const [from, to] = this.charts.view, within = (at) => at >= from - 0.001 && at <= to + 0.001;
    if (chart === "daily") {
      const { date, at, close, change: changes, days } = this.#daily;
      saveCsv(name, ["date", "close", "change", "days"], [...date.keys()].filter((index) => within(at[index]))
        .map((index) => [date[index], close[index], changes[index], days[index]]));
      return;
    }
    const parts = byId("parts").checked ? ["balance", "total_invested"] : [];
    const columns = chart === "drawdown" ? ["drawdown"] : ["worth", ...parts];
    saveCsv(name, ["at", ...columns.map((column) => (column === "worth" ? curve.measure : column))],
      [...curve.at.keys()].filter((index) => within(Date.parse(curve.at[index]) / 1000))
        .map((index) => [curve.at[index], ...columns.map((column) => curve[column][index])]));
  }

  async #choose(name) {
    this.#chosen = name;
    byId("portfolio-note").textContent = "";
    this.#measure = null;
    this.#offer();
    this.#shownDays = DAYS_AT_ONCE;
    await this.#look({ last: null });
  }

  #step(step) {
    if (!step) return;
    const [from, to] = this.#span(), half = (to - from) / 2;
    const moves = { in: scaled(from, to, 0.5), out: scaled(from, to, 2), earlier: [from - half, to - half], later: [from + half, to + half] };
    const [nextFrom, nextTo] = moves[step];
    this.#look({ from: nextFrom, to: nextTo });
  }

  async #look(range, write = true) {
    const [first, last] = this.#extent;
    const room = Math.max(last - first, DAY);
    if (range.from !== undefined) {
      // The middle stays within the snapshots; the range is one second at least, twice the history at most.
      const middle = Math.min(Math.max((range.from + range.to) / 2, first), last);
      const half = Math.min(Math.max((range.to - range.from) / 2, 0.5), room);
      range = { from: Math.max(middle - half, 0), to: middle + half };
    }
    this.#range = range;
    if (write) this.#address();
    this.charts.look(...this.#span());
    if (this.#covered) this.#summarizeLoaded();
    await this.#reread();
  }

  async #reread() {
    try {
      await this.#read();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error instanceof Unreadable) this.#showLoaded();
      this.failed(error);
    }
  }

  /** After a failed read, shows only the loaded data of the chosen portfolio and range. */
  #showLoaded() {
    if (this.#loaded.portfolio !== this.#chosen) {
      this.#loaded = { portfolio: null, curve: NOTHING };
      this.#daily = NO_DAYS;
      this.#performed = null;
      showPerformance(null);
      this.comparison.show([], 0, 1);
      this.charts.show(NOTHING, NO_DAYS, byId("parts").checked);
      this.#listDays();
    }
    this.#summarizeLoaded();
  }

  /** Whether the loaded curve covers the whole range. */
  get #covered() {
    const { portfolio, curve } = this.#loaded;
    const [from, to] = this.#span();
    return portfolio === this.#chosen && Date.parse(curve.since) / 1000 <= from + 0.001 && Date.parse(curve.until) / 1000 >= to - 0.001;
  }

  #summarizeLoaded() {
    this.#summarize(this.#covered ? this.#loaded.curve : NOTHING, ...this.#span());
    byId("drawn").textContent = this.#covered ? "Finer data of this range was not read yet." : "This range was not read yet.";
  }

  async #read() {
    this.#reading?.abort();
    const reading = (this.#reading = new AbortController());
    const [from, to] = this.#span();
    const parts = byId("parts").checked;
    const whole = this.#range.from === undefined && this.#range.last === null;
    this.#mark();
    const key = `${this.#chosen} ${this.#measure}`, compared = [this.#chosen, ...this.#others];
    const worth = this.#measure === "profit_loss" ? null : this.#measure;
    const [curve, daily, performance, closes] = await Promise.all([
      get("curve", {
        portfolio: this.#chosen, measure: this.#measure, buckets: this.charts.buckets, parts: parts || null,
        since: whole ? null : new Date(from * 1000).toISOString(), until: whole ? null : new Date(to * 1000).toISOString(),
      }, reading.signal),
      get("daily", { portfolio: this.#chosen, measure: this.#measure }, reading.signal),
      this.#performed === key ? null : get("performance", { portfolio: this.#chosen, measure: worth }, reading.signal),
      this.#closes(compared, reading.signal),
    ]);
    daily.at = daily.date.map((date) => localNoon(date).getTime() / 1000);
    this.#daily = daily;
    this.#loaded = { portfolio: this.#chosen, curve };
    // The whole range has half a day more on either side, for the bars of the first and the last day.
    this.charts.look(whole ? Math.min(from, daily.at[0] - DAY / 2) : from, whole ? Math.max(to, daily.at.at(-1) + DAY / 2) : to);
    this.charts.show(curve, daily, parts);
    if (performance) showPerformance(performance);
    this.#performed = key;
    this.comparison.show(closes, ...this.charts.view, this.#others.length && this.#measure === "profit_loss"
      ? "Profit/loss cannot be rebased to 100, because it begins at 0. Choose value or equity to compare portfolios." : null);
    this.#name(curve);
    this.#summarize(curve, from, to);
    this.#listDays();
    if (typeof uPlot === "undefined") throw new Unreadable("the chart library was not loaded: run pip install '.[api]' on the server; the table below shows the same days");
  }

  /** Returns the daily closes of the portfolios to compare, none for a measure that cannot be compared. */
  async #closes(portfolios, signal) {
    if (portfolios.length < 2 || this.#measure === "profit_loss") return [];
    const key = `${portfolios} ${this.#measure}`;
    if (this.#compared?.key !== key) {
      const answers = await Promise.all(portfolios.map((portfolio) => get("daily", { portfolio, measure: this.#measure }, signal)));
      this.#compared = { key, answers: answers.map((one, index) => ({ ...one, portfolio: portfolios[index] })) };
    }
    return this.#compared.answers;
  }

  #name({ measure, default_measure: usual }) {
    const [, name, meaning] = MEASURES[measure];
    byId("measure").value = measure;
    byId("value-title").textContent = name[0].toUpperCase() + name.slice(1);
    byId("daily-title").textContent = `Daily change in ${name}`;
    const reason = usual === "equity"
      ? " Equity is this portfolio's default, because its recorded values leave out the money that is invested."
      : "";
    byId("measure-note").textContent = meaning + reason;
  }

  #mark() {
    for (const [text, last] of RANGES) {
      const pressed = this.#range.from === undefined && this.#range.last === last;
      byId(`range-${text}`).setAttribute("aria-pressed", String(pressed));
    }
  }

  #summarize(curve, from, to) {
    const inside = curve.at.map((_, index) => index)
      .filter((index) => { const at = Date.parse(curve.at[index]) / 1000; return at >= from - 0.001 && at <= to + 0.001; });
    const by = (key, better) => inside.reduce((best, index) =>
      (best === null || better(Number(curve[key][index]), Number(curve[key][best])) ? index : best), null);
    const lower = (a, b) => a < b, higher = (a, b) => a > b;
    const last = inside.at(-1) ?? null, low = by("worth", lower), high = by("worth", higher);
    const deep = inside.some((index) => curve.drawdown[index] !== null) ? by("drawdown", lower) : null;
    const values = (index) => (index === null ? "–" : amount(curve.worth[index]));
    const at = (index) => (index === null ? "" : moment(curve.at[index]));
    replace(byId("summary"),
      figure("Last", values(last), at(last)), figure("Highest", values(high), at(high)), figure("Lowest", values(low), at(low)),
      figure("Deepest drawdown", deep === null ? "–" : percent(curve.drawdown[deep]), at(deep)));
    byId("drawdown-note").textContent = drawdownDates(curve, inside, deep);
    byId("drawn").textContent = curve.closes_only
      ? "Too many snapshots to read at once: the charts show daily closes and their drawdown. Zoom in to see every snapshot."
      : `${count(curve.snapshots)} ${curve.snapshots === 1 ? "snapshot" : "snapshots"} in this range, ${inside.length < curve.snapshots
        ? `${count(inside.length)} drawn: the first, last, lowest, highest and deepest drawdown of every two pixels`
        : "all drawn"}.`;
  }

  #listDays() {
    const { date, close, change: changes, days } = this.#daily;
    const newest = [...date.keys()].reverse().slice(0, this.#shownDays);
    replace(byId("day-rows"), ...newest.map((index) =>
      row(day(date[index]), number(amount(close[index])), number(change(changes[index])), number(days[index] === null ? "–" : count(days[index])))));
    byId("more-days").hidden = newest.length === date.length;
  }
}

function figure(name, value, note) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, element("strong", {}, value), element("span", {}, note)));
}

/** Returns when the deepest drawdown among the points `inside` began, was deepest and ended, in words. */
function drawdownDates(curve, inside, deep) {
  const what = "Drawdown is what was lost since the highest worth until then, deposits included.";
  if (deep === null) return "";
  if (Number(curve.drawdown[deep]) === 0) return `${what} There is none in this range.`;
  const worth = (index) => Number(curve.worth[index]);
  const peak = inside.filter((index) => index < deep && Number(curve.drawdown[index]) === 0)
    .reduce((best, index) => (best === null || worth(index) >= worth(best) ? index : best), null);
  const high = worth(deep) / (1 + Number(curve.drawdown[deep]));
  const back = inside.find((index) => index > deep && (peak === null ? Number(curve.drawdown[index]) === 0 || worth(index) >= high : worth(index) >= worth(peak)));
  return `${what} The deepest one here: ${peak === null ? "peak before this range" : `peak ${moment(curve.at[peak])}`}, lowest ${moment(curve.at[deep])}, ${
    back === undefined ? "not recovered in this range" : `recovered ${moment(curve.at[back])}`}.`;
}

function nothingYet() {
  const command = (text) => element("code", {}, text);
  return ["No snapshot is stored yet. A controller records one with create_daily_portfolio_snapshot(). To record a file, run ",
    command("trading-history snapshot FILE"), " while ", command("trading-history worker"), " runs. New snapshots appear here without a reload."];
}
