// The archives section: the months, the archives of a month, and the signals of an archive or of a search.

import { byId, element, number, replace, row } from "./dom.js";
import { count, moment, month as named, portfolio } from "./format.js";
import { get } from "./server.js";

const COLUMNS = [["market_question", "Market"], ["action", "Action"], ["amount", "Amount"], ["target_price", "Target"],
  ["confidence", "Confidence"], ["reason", "Reason"]];
const LONGEST = 26; // characters in one line of a column; ±12.8 digits have 22
const NUMERIC = new Set(["amount", "target_price", "confidence"]);

export class Archives {
  #months = [];
  #month = null;
  #archive = null; // { id, archived_at } when its signals are shown
  #reading = null;
  #unanswered = false; // the last click could not be answered

  /** `failed(error)` is called if data cannot be read after a click. */
  constructor(failed) {
    this.failed = failed;
    byId("search").addEventListener("submit", (event) => { event.preventDefault(); this.#show(); });
    byId("wanted").addEventListener("search", () => this.#show());
  }

  /** Reads the months and the listing again. If that fails, throws Unreadable and leaves the page unchanged. */
  async refresh() {
    this.#months = await get("months");
    byId("archives-state").hidden = this.#months.length > 0;
    byId("archive-browser").hidden = this.#months.length === 0;
    if (!this.#months.length) {
      replace(byId("archives-state"), "No signals are archived yet. A controller archives them with archive_current_signals(). To archive a file, run ",
        element("code", {}, "trading-history archive FILE"), ".");
    } else {
      this.#month ??= this.#months[0].month;
      this.#listMonths();
      // An opened archive, a search and a listing with older pages stay as they are. The first page of a month is read again.
      const listing = byId("listing");
      const grows = !this.#archive && !byId("wanted").value && !listing.dataset.more;
      if (this.#unanswered || grows || !listing.hasChildNodes()) await this.#read();
    }
    byId("archives").setAttribute("aria-busy", "false");
  }

  #listMonths() {
    replace(byId("months"), ...this.#months.map(({ month, archives }) => element("li", {}, element("button", {
      type: "button", id: `month-${month}`, "aria-pressed": String(month === this.#month),
      click: () => { this.#month = month; this.#archive = null; this.#listMonths(); this.#show(); },
    }, element("span", {}, named(month)), element("span", { class: "count" }, count(archives))))));
  }

  async #show(more = undefined) {
    try {
      await this.#read(more);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#unanswered = true;
      this.failed(error);
    }
  }

  async #read(more) {
    this.#reading?.abort();
    const { signal } = (this.#reading = new AbortController());
    const wanted = byId("wanted").value.trim();
    const where = this.#archive ? `the archive of ${moment(this.#archive.archived_at)}` : named(this.#month);
    byId("search-label").textContent = `Search the signals of ${where}`;
    if (this.#archive) {
      const found = await get(`archives/${this.#archive.id}`, { q: wanted, number: more?.number }, signal);
      this.#listSignals(found, more, wanted);
    } else if (wanted) {
      this.#listSignals(await get("signals", { month: this.#month, q: wanted, ...more }, signal), more, wanted);
    } else {
      this.#listArchives(await get("archives", { month: this.#month, ...more }, signal), more);
    }
    this.#trail();
    this.#unanswered = false;
  }

  #trail() {
    const back = element("button", {
      type: "button", class: "link", id: "back", click: () => { this.#archive = null; this.#show(); },
    }, `All archives of ${named(this.#month)}`);
    replace(byId("trail"), ...(this.#archive ? [back, ` › ${moment(this.#archive.archived_at)}`] : [named(this.#month)]));
  }

  #listArchives({ archives, more }, appended) {
    const rows = archives.map((one) => row(
      element("td", {}, element("button", {
        type: "button", class: "link", id: `archive-${one.id}`, click: () => { this.#archive = one; this.#show(); },
      }, moment(one.archived_at))),
      number(portfolio(one.portfolio)), number(count(one.signals_count))));
    const last = archives.at(-1);
    this.#table(["Archived at", "Portfolio", "Signals"], rows, Boolean(appended), "Archives",
      more ? { before_at: last.archived_at, before_id: last.id } : null, "Show older archives");
  }

  #listSignals({ signals, after }, appended, wanted) {
    const single = this.#archive !== null;
    const rows = signals.map((one) => signalRow(one, single));
    const titles = [...(single ? ["No."] : ["Archived at"]), ...COLUMNS.map(([, title]) => title)];
    this.#table(titles, rows, Boolean(appended), "Signals", after, wanted && !single ? "Continue the search" : "Show more signals");
    if (!rows.length && !appended) {
      byId("listing").prepend(element("p", { class: "empty" }, after ? "No signal found so far." : `No signal contains “${wanted}”.`));
    }
  }

  #table(titles, rows, append, label, more, moreText) {
    const listing = byId("listing");
    const table = element("table", {}, element("thead", {}, element("tr", {},
      ...titles.map((title) => element("th", { scope: "col", class: numericTitle(title) }, title)))), element("tbody"));
    if (!append) {
      replace(listing, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table));
      delete listing.dataset.more;
    } else {
      listing.dataset.more = "1";
    }
    listing.querySelector("tbody").append(...rows);
    listing.querySelector("#more")?.remove();
    if (more) listing.append(element("button", { type: "button", id: "more", click: () => this.#show(more) }, moreText));
  }
}

const numericTitle = (title) =>
  (["Portfolio", "Signals", "Amount", "Target", "Confidence"].includes(title) ? "number" : null);

/** Row of a signal. Its button opens a second row with all fields of the signal. */
function signalRow({ archived_at: at, number: position, fields }, single) {
  const cells = COLUMNS.map(([key]) => {
    const text = fields[key] ?? (key === "market_question" ? fields.market_id : null) ?? "–";
    if (NUMERIC.has(key)) return number(text.length <= LONGEST ? text : `${text.slice(0, 8)}… (${count(text.length)} characters)`);
    return element("td", { class: key === "action" && text.length <= LONGEST ? null : "text" }, text);
  });
  const toggle = element("button", {
    type: "button", class: "link toggle", "aria-expanded": "false", title: "all fields",
    "aria-label": `All fields of signal ${position} of ${moment(at)}`,
    click: () => {
      const open = toggle.getAttribute("aria-expanded") === "true";
      toggle.setAttribute("aria-expanded", String(!open));
      if (open) made.nextSibling.remove();
      else made.after(fieldsRow(fields, cells.length + 1));
    },
  }, single ? count(position) : moment(at));
  const made = row(element("td", {}, toggle), ...cells);
  return made;
}

function fieldsRow(fields, columns) {
  const list = element("dl", {}, ...Object.entries(fields).flatMap(([name, text]) =>
    [element("dt", {}, name), element("dd", {}, text ?? "–")]));
  return element("tr", { class: "fields" }, element("td", { colspan: columns }, list));
}
