// The three charts, drawn by uPlot, with a common range and a common cursor.
/* global uPlot */

import { byId, element } from "./dom.js";
import { amount, change, day, moment, percent } from "./format.js";

const HEIGHTS = { value: 280, drawdown: 150, daily: 170 };
const SYNC = "trading-history";
const FONT = "12px system-ui, sans-serif";
const MIN_AXIS_WIDTH = 74;
const AXIS_ROOM = 22; // for the ticks, and between them and the labels

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const ticks = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 2 });
const short = new Intl.NumberFormat(undefined, { maximumFractionDigits: 2 });

const DAY = 86400;
const labels = {
  month: new Intl.DateTimeFormat(undefined, { month: "short" }),
  day: new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" }),
  minute: new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" }),
  second: new Intl.DateTimeFormat(undefined, { timeStyle: "medium" }),
  year: new Intl.DateTimeFormat(undefined, { year: "numeric" }),
};

/** Returns the labels of the x axis in the browser's locale. A second line has the year or the day where it changes. */
export function instants(_, splits, axis, space, step) {
  const [fine, coarse] = step >= 28 * DAY ? ["month", "year"] : step >= DAY ? ["day", "year"]
    : step >= 60 ? ["minute", "day"] : ["second", "day"];
  let before = "";
  return splits.map((seconds) => {
    const at = new Date(seconds * 1000), below = labels[coarse].format(at);
    const label = labels[fine].format(at) + (below === before ? "" : `\n${below}`);
    before = below;
    return label;
  });
}

export class Charts {
  #view = [0, 1];
  #plots = {};
  #data = { value: [[], [], [], []], drawdown: [[], []], daily: [[], [], [], [], []] };
  #rows = []; // the index of the point at each x of the curves; null inside a gap
  #curve = null;
  #daily = null;
  #parts = false;
  #axisWidth = MIN_AXIS_WIDTH; // the same for all charts, so that a time has the same x position in each

  /** Calls `zoomed(from, to)` with seconds since the epoch, and `reset()` to show the whole range. */
  constructor({ zoomed, reset }) {
    this.zoomed = zoomed;
    this.reset = reset;
    document.addEventListener("themechange", () => this.#build());
    new ResizeObserver(() => this.#resize()).observe(byId("value-chart"));
    for (const name of Object.keys(HEIGHTS)) {
      byId(`${name}-chart`).addEventListener("keydown", (event) => this.#key(event, name));
      byId(`${name}-chart`).addEventListener("pointermove", () => this.#speak(null));
    }
  }

  get view() {
    return this.#view;
  }

  /** The canvas of a chart, undefined if it is not drawn. */
  canvas(name) {
    return this.#plots[name]?.ctx.canvas;
  }

  /** The number of buckets to ask for: one per two pixels. */
  get buckets() {
    return Math.min(Math.max(Math.round(byId("value-chart").clientWidth / 2), 100), 1000);
  }

  /** Shows a range at once, with the data that is loaded; `show` may bring finer data later. */
  look(from, to) {
    this.#view = [from, Math.max(to, from + 1)];
    for (const plot of Object.values(this.#plots)) plot.setScale("x", { min: this.#view[0], max: this.#view[1] });
  }

  show(curve, daily, parts) {
    this.#curve = curve;
    this.#daily = daily;
    this.#lay(curve, daily);
    this.#axisWidth = axisWidth(this.#data.value.slice(1, parts ? 4 : 2).flat(), this.#data.daily.slice(1).flat());
    if (!this.#plots.value || parts !== this.#parts) {
      this.#parts = parts;
      this.#build();
    } else {
      for (const [name, plot] of Object.entries(this.#plots)) plot.setData(this.#data[name]);
    }
    this.#read();
  }

  #lay(curve, daily) {
    const x = [], value = [], balance = [], invested = [], drawdown = [];
    const gaps = new Set(curve.after_gap);
    this.#rows = [];
    curve.at.forEach((at, number) => {
      const seconds = Date.parse(at) / 1000;
      if (gaps.has(number)) {
        // An x without values in the middle of the gap interrupts the line.
        for (const list of [value, balance, invested, drawdown, this.#rows]) list.push(null);
        x.push((x.at(-1) + seconds) / 2);
      }
      x.push(seconds);
      value.push(Number(curve.worth[number]));
      balance.push(Number(curve.balance[number]));
      invested.push(Number(curve.total_invested[number]));
      drawdown.push(curve.drawdown[number]);
      this.#rows.push(number);
    });
    const noons = daily.at;
    const changes = daily.change.map((text) => (text === null ? null : Number(text)));
    const those = (wanted) => changes.map((one, at) => (one !== null && wanted(one, daily.days[at] > 1) ? one : null));
    this.#data = {
      value: [x, value, balance, invested],
      drawdown: [x, drawdown],
      daily: [
        noons,
        those((one, over) => one >= 0 && !over), those((one, over) => one < 0 && !over),
        those((one, over) => one >= 0 && over), those((one, over) => one < 0 && over),
      ],
    };
  }

  #build() {
    if (!this.#curve || typeof uPlot === "undefined") return;
    for (const plot of Object.values(this.#plots)) plot.destroy();
    const line = (name, show = true) => ({ stroke: color(name), width: 1.5, show, points: { size: 5, fill: color(name) } });
    const bars = uPlot.paths.bars({ size: [0.8, 60] });
    const bar = (name) => ({ fill: color(name), stroke: color(name), width: 0, paths: bars, points: { show: false } });
    const hollow = (name) => ({ ...bar(name), fill: color(`${name}-area`), width: 1 }); // a change over several days
    this.#plots = {
      value: this.#plot("value", [{}, line("value"), line("balance", this.#parts), line("invested", this.#parts)], {}),
      drawdown: this.#plot(
        "drawdown", [{}, { ...line("loss"), fill: color("loss-area") }],
        { range: (_, min) => [Math.min(min ?? 0, -0.001) * 1.05, 0] }, (value) => ticks.format(value)),
      daily: this.#plot("daily", [{}, bar("profit"), bar("loss"), hollow("profit"), hollow("loss")], { range: around0 }),
    };
  }

  #plot(name, series, y, written = (value) => short.format(value)) {
    const text = color("muted"), grid = { stroke: color("grid"), width: 1 }, font = FONT;
    const options = {
      width: byId(`${name}-chart`).clientWidth,
      height: HEIGHTS[name],
      legend: { show: false },
      padding: [8, 28, 0, 0],
      cursor: {
        sync: { key: SYNC, scales: ["x", null] },
        drag: { x: true, y: false, setScale: false, dist: 5 },
        points: { size: 7 },
        y: false,
        bind: { dblclick: () => () => { this.reset(); return null; } },
      },
      scales: { x: { range: () => this.#view }, y },
      axes: [
        { stroke: text, grid, ticks: grid, font, space: 80, values: instants },
        { stroke: text, grid, ticks: grid, font, size: () => this.#axisWidth, values: (_, values) => values.map(written) },
      ],
      series,
      hooks: {
        setSelect: [(plot) => this.#selected(plot)],
        setCursor: [() => this.#read()],
      },
    };
    return new uPlot(options, this.#data[name], byId(`${name}-chart`));
  }

  #selected(plot) {
    const { left, width } = plot.select;
    if (width < 5) return;
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.zoomed(plot.posToVal(left, "x"), plot.posToVal(left + width, "x"));
  }

  #resize() {
    for (const [name, plot] of Object.entries(this.#plots)) {
      const width = byId(`${name}-chart`).clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: HEIGHTS[name] });
    }
  }

  /** Writes the values at the cursor, or the newest values of the range. */
  #read() {
    if (!this.#curve) return;
    const { value: plot, daily: bars } = this.#plots;
    const point = this.#pointAt(plot?.cursor.idx ?? this.#newest(this.#data.value[0]));
    byId("value-readout").replaceChildren(...(point === null ? ["no snapshots in this range"] : this.#readout(point)));
    byId("drawdown-readout").textContent = point === null ? "–" : percent(this.#curve.drawdown[point]);
    const at = bars?.cursor.idx ?? this.#newest(this.#data.daily[0]);
    byId("daily-readout").textContent = at === null || at === undefined ? "no closes in this range" : this.#dayReadout(at);
  }

  #readout(point) {
    const curve = this.#curve;
    const parts = this.#parts
      ? [" · ", colored("balance", curve.balance[point]), " · ", colored("invested", curve.total_invested[point])] : [];
    return [amount(curve.worth[point]), ...parts, ` · ${moment(curve.at[point])}`];
  }

  #dayReadout(at) {
    const { date, change: changes, days } = this.#daily;
    const over = days[at] > 1 ? ` over ${days[at]} days` : "";
    return `${changes[at] === null ? "first day" : change(changes[at])}${over} · ${day(date[at])}`;
  }

  #newest(xs) {
    const at = xs.findLastIndex((x) => x <= this.#view[1]);
    return at >= 0 && xs[at] >= this.#view[0] ? at : null;
  }

  #pointAt(index) {
    return index === null || index === undefined ? null : this.#rows[index] ?? null;
  }

  #key(event, name) {
    const plot = this.#plots[name];
    if (!plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const [from, to] = this.#view;
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move !== undefined) this.#step(plot, name, move);
    else if (event.key === "+" || event.key === "=") this.zoomed(...scaled(from, to, 0.5));
    else if (event.key === "-") this.zoomed(...scaled(from, to, 2));
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }

  #step(plot, name, move) {
    const xs = this.#data[name][0];
    const shown = [...xs.keys()].filter((index) =>
      xs[index] >= this.#view[0] && xs[index] <= this.#view[1] && (name === "daily" || this.#rows[index] !== null));
    if (!shown.length) return;
    const here = shown.indexOf(plot.cursor.idx ?? shown.at(-1));
    const next = shown[Math.min(Math.max((here < 0 ? shown.length - 1 : here) + move, 0), shown.length - 1)];
    this.#speak(name);
    plot.setCursor({ left: plot.valToPos(xs[next], "x"), top: 10 });
  }

  // A screen reader announces the values of the chart in which the user moves by keyboard, and none for a mouse.
  #speak(name) {
    for (const other of Object.keys(HEIGHTS)) {
      byId(`${other}-readout`).setAttribute("aria-live", other === name ? "polite" : "off");
    }
  }
}

/** Returns the width in pixels that the longest label of an axis needs for any of these lists of values. */
function axisWidth(...lists) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = FONT;
  const widths = lists.flatMap((values) => {
    const [low, high] = values.reduce(([least, most], one) =>
      (one === null ? [least, most] : [Math.min(least, one), Math.max(most, one)]), [Infinity, -Infinity]);
    if (low > high) return [];
    const room = (high - low || Math.abs(high)) * 0.2; // uPlot's axes extend a little beyond the values
    const digits = { maximumFractionDigits: high - low < 20 ? 2 : 0, minimumFractionDigits: high - low < 20 ? 2 : 0 };
    return [low - room, high + room].map((one) =>
      context.measureText(new Intl.NumberFormat(undefined, digits).format(one)).width);
  });
  return Math.ceil(Math.max(MIN_AXIS_WIDTH, ...widths.map((width) => width + AXIS_ROOM)));
}

function colored(name, text) {
  return element("span", { class: name }, `${name} ${amount(text)}`);
}

/** Returns the range with the same middle that is `factor` times as wide. */
export function scaled(from, to, factor) {
  const middle = (from + to) / 2, half = ((to - from) / 2) * factor;
  return [middle - half, middle + half];
}

function around0(_, min, max) {
  const low = Math.min(min ?? 0, 0), high = Math.max(max ?? 0, 0);
  const room = (high - low || 1) * 0.08;
  return [low && low - room, high && high + room];
}
