// The performance of the chosen portfolio: figures of its daily returns, and a table of months.

import { byId, element, figure, number, replace, row } from "./dom.js";
import { change, count, day, month, monthNames, percent, signedPercent } from "./format.js";

const STRONG = 0.1; // a month with this return, or more, has the strongest colour

/** Shows an answer of `performance`; null hides it. */
export function showPerformance(found) {
  byId("performance").hidden = found === null;
  if (found === null) return;
  const { figures, problem } = found;
  byId("performance-state").textContent = figures === null
    ? `No returns: ${problem}.`
    : `${count(found.closes)} daily closes from ${day(found.first)} to ${day(found.last)}, measured by ${found.measure}. `
      + `Deposits and withdrawals (${change(found.net_deposits)} in all) are no returns. 365 days a year, risk-free rate 0 %.`;
  byId("returns").hidden = figures === null;
  if (figures === null) return;
  replace(byId("figures"), ...summary(figures));
  replace(byId("month-names"), element("th", { scope: "col" }, "Year"),
    ...[...monthNames(), "All"].map((name) => element("th", { scope: "col", class: "number" }, name)));
  replace(byId("month-returns"), ...years(figures));
}

function summary(figures) {
  const drawdown = figures.deepest_drawdown;
  const best = (one) => [signedPercent(one.total_return), one.date ? day(one.date) : month(one.month)];
  return [
    figure("Total return", signedPercent(figures.total_return), ""),
    figure("Annual return", signedPercent(figures.annual_return), figures.annual_return === null ? "from 30 days on" : "compounded"),
    figure("Volatility", percent(figures.volatility), "a year"),
    figure("Sharpe ratio", ratio(figures.sharpe_ratio), "return per volatility"),
    figure("Sortino ratio", ratio(figures.sortino_ratio), "return per volatility of losses"),
    figure("Calmar ratio", ratio(figures.calmar_ratio), "annual return per deepest drawdown"),
    figure("Deepest drawdown", drawdown === null ? "none" : percent(drawdown.share), drawdown === null ? ""
      : `from ${day(drawdown.peak)} to ${day(drawdown.trough)}, ${drawdown.recovered === null ? "not recovered yet" : `recovered on ${day(drawdown.recovered)}`}`),
    figure("Longest below a peak", figures.longest_under_water_days === 1 ? "1 day" : `${count(figures.longest_under_water_days)} days`, ""),
    figure("Best day", ...best(figures.best_day)),
    figure("Worst day", ...best(figures.worst_day)),
    figure("Best month", ...best(figures.best_month)),
    figure("Worst month", ...best(figures.worst_month)),
    figure("Winning days", percent(figures.winning_days), "of the days with a change"),
  ];
}

const ratio = (value) => (value === null ? "–" : value.toFixed(2));

/** Returns a row for each year, newest first: the return of each month and of the year, coloured by sign and size. */
function years({ months, years: whole }) {
  const by = new Map(months.map((one) => [one.month, one.total_return]));
  return [...whole].reverse().map(({ year, total_return: all }) => row(
    element("th", { scope: "row" }, String(year)),
    ...Array.from({ length: 12 }, (_, index) => cell(by.get(`${year}-${String(index + 1).padStart(2, "0")}`))),
    number(signedPercent(all, 1))));
}

function cell(value) {
  if (value === undefined) return number("");
  const strength = Math.min(4, Math.ceil((4 * Math.abs(value)) / STRONG));
  return element("td", { class: `number heat ${value < 0 ? "loss" : "gain"}-${strength}` }, signedPercent(value, 1));
}
