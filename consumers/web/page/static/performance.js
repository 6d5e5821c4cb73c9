// The performance section: the figures of the whole history and the months as a heat map.

import { byId, element, replace, row } from "./dom.js";
import { day, month as named, percent } from "./format.js";

const STEPS = [0.005, 0.02, 0.05, 0.1]; // returns from which a month has the next stronger color
const MONTHS = [...Array(12).keys()];
const short = new Intl.DateTimeFormat(undefined, { month: "short" });
const ratios = new Intl.NumberFormat(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const ratio = (value) => (value === null ? "–" : ratios.format(value));

/** Shows the answer of /page/performance, or nothing for null. */
export function showPerformance(found) {
  const { figures, problem, measure } = found ?? { figures: null, problem: null };
  byId("performance").hidden = !found;
  byId("performance-figures").hidden = !figures;
  if (!found) return;
  byId("performance-note").textContent = figures
    ? `Of the whole history, ${day(found.first)} to ${day(found.last)}, from daily closes of ${measure}; deposits and withdrawals are no `
      + "return. The risk-free rate is 0 and a year has 365 days. A ratio needs returns that differ; – means that there is none."
    : `No figures: ${problem}.`;
  if (!figures) {
    replace(byId("performance-list"));
    replace(byId("heat"));
    return;
  }
  const deepest = figures.deepest_drawdown;
  const one = (best, name) => [percent(best.total_return), name(best.date ?? best.month)];
  replace(byId("performance-list"), ...[
    ["Total return", percent(figures.total_return)], ["Annual return", percent(figures.annual_return)],
    ["Volatility of a year", percent(figures.volatility)], ["Sharpe ratio", ratio(figures.sharpe_ratio)],
    ["Sortino ratio", ratio(figures.sortino_ratio)], ["Calmar ratio", ratio(figures.calmar_ratio)],
    ["Deepest drawdown", percent(deepest?.share ?? null), deepest ? dates(deepest) : ""],
    ["Longest time under water", `${figures.longest_under_water_days} ${figures.longest_under_water_days === 1 ? "day" : "days"}`],
    ["Best day", ...one(figures.best_day, day)], ["Worst day", ...one(figures.worst_day, day)],
    ["Best month", ...one(figures.best_month, named)], ["Worst month", ...one(figures.worst_month, named)],
    ["Winning days", percent(figures.winning_days)],
  ].map(([name, value, note = ""]) => element("div", {}, element("dt", {}, name),
    element("dd", {}, element("strong", {}, value), element("span", {}, note)))));
  replace(byId("heat"), heatMap(
    figures.months.map((each) => ({ month: each.month, return: each.total_return })),
    new Map(figures.years.map((each) => [String(each.year), each.total_return]))));
}

const dates = ({ peak, trough, recovered }) =>
  `peak ${day(peak)}, lowest ${day(trough)}, ${recovered ? `recovered ${day(recovered)}` : "not recovered yet"}`;

/** Returns a table with a row per year and a column per month, from [{ month: "2026-01", return: 0.0123 }, …]. */
export function heatMap(months, years = new Map()) {
  const returns = new Map(months.map((one) => [one.month, one.return]));
  const rows = [...new Set([...months.map(({ month }) => month.slice(0, 4)), ...years.keys()])].sort();
  const title = (text) => element("th", { scope: "col", class: "number" }, text);
  return element("table", { class: "heat" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Year"),
      ...MONTHS.map((number) => title(short.format(new Date(2026, number, 15)))), title("Whole year"))),
    element("tbody", {}, ...rows.map((year) => row(element("th", { scope: "row" }, year),
      ...MONTHS.map((number) => cell(returns.get(`${year}-${String(number + 1).padStart(2, "0")}`))), cell(years.get(year))))));
}

// The figure has its sign, so nobody needs the color.
function cell(value) {
  if (value === undefined || value === null) return element("td", { class: "number" });
  const strength = STEPS.filter((step) => Math.abs(value) >= step - 1e-9).length; // 0.02 may arrive as 0.01999…
  const kind = value > 0 ? "gain" : value < 0 ? "fall" : "";
  return element("td", { class: `number ${kind && `${kind} heat-${strength}`}`.trim() }, `${value > 0 ? "+" : ""}${percent(value)}`);
}
