// Formats numbers and times in the browser's locale. Amounts arrive as exact text and stay exact.

const amounts = new Intl.NumberFormat(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 8 });
const signed = new Intl.NumberFormat(undefined, {
  minimumFractionDigits: 2, maximumFractionDigits: 8, signDisplay: "exceptZero",
});
const counts = new Intl.NumberFormat();
const percents = new Intl.NumberFormat(undefined, { style: "percent", minimumFractionDigits: 2, maximumFractionDigits: 2 });
const moments = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const days = new Intl.DateTimeFormat(undefined, { weekday: "short", year: "numeric", month: "short", day: "numeric" });
const months = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "long" });

export const amount = (text) => amounts.format(text);
export const change = (text) => (text === null ? "–" : signed.format(text));
export const count = (value) => counts.format(value);
export const percent = (value) => (value === null ? "–" : percents.format(value));
export const moment = (iso) => moments.format(new Date(iso));
export const time = (date) => clock.format(date);
export const zone = () => Intl.DateTimeFormat().resolvedOptions().timeZone;

/** Returns noon of a date in the browser's zone. A calendar date has no zone: it is the same day everywhere. */
export function localNoon(date) {
  const [year, month, day] = date.split("-").map(Number);
  return new Date(year, month - 1, day, 12);
}
export const day = (date) => days.format(localNoon(date));
export const month = (name) => months.format(localNoon(`${name}-15`));
export const portfolio = (name) => (name === "none" ? "without a number" : name);

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}
