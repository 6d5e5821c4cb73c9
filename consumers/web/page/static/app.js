// Asks every 3 s whether rows have changed, shows them, and reports when they cannot be read.

import { Archives } from "./archives.js";
import { Curves } from "./curves.js";
import { byId } from "./dom.js";
import { time, zone } from "./format.js";
import { databaseFailed, healthIsOld, showHealth } from "./health.js";
import { get, Unreadable, useToken } from "./server.js";

const ROWS_MS = 3000;
const HEALTH_MS = 10000;
// After each request the page waits for at least ten times its duration, so that a page takes at most a tenth of the database's time.
const REST = 10;

const seen = { snapshots: null, archives: null };
// If a click could not be answered, the next successful read answers it.
const curves = new Curves((error) => { seen.snapshots = null; stale(error); });
const archives = new Archives((error) => { seen.archives = null; stale(error); });
let readAt = null;

async function rows() {
  const newest = await get("newest");
  if (newest.snapshots !== seen.snapshots) {
    await curves.refresh();
    seen.snapshots = newest.snapshots;
  }
  if (newest.archives !== seen.archives) {
    await archives.refresh();
    seen.archives = newest.archives;
  }
  fresh();
}

function fresh() {
  readAt = new Date();
  if (byId("live").dataset.state === "stale") wakeHealth();
  say("live", "Live");
  byId("live").title = "";
  byId("banner").hidden = true;
}

function stale(error) {
  if (!(error instanceof Unreadable)) throw error;
  const since = readAt ? `The data shown was read at ${time(readAt)}` : "No data was read yet";
  if (error.status === 503) databaseFailed(error.message);
  else healthIsOld(new Date());
  for (const id of ["curves-state", "archives-state"]) {
    if (byId(id).textContent === "Loading…") byId(id).textContent = "No data was read yet.";
  }
  say("stale", readAt ? `Not up to date since ${time(readAt)}` : "Waiting for data");
  const banner = byId("banner");
  const text = `${error.message.replace(/\.$/, "")}. ${since}; the page keeps trying.`;
  if (banner.textContent !== text) banner.textContent = text; // a screen reader announces it once, not at each try
  banner.hidden = false;
  byId("token-form").hidden = error.status !== 401;
}

function say(state, text) {
  const live = byId("live");
  live.dataset.state = state;
  if (live.textContent !== text) live.textContent = text;
}

/** Runs `work` repeatedly while the page is visible. Returns a function that runs it at once. */
function repeat(work, failed, pause) {
  let timer = null;
  let running = false;
  const run = async () => {
    clearTimeout(timer);
    if (running || document.hidden) return;
    running = true;
    const start = performance.now();
    try {
      await work();
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
    } finally {
      running = false;
      timer = setTimeout(run, Math.max(pause, REST * (performance.now() - start)));
    }
  };
  document.addEventListener("visibilitychange", run);
  run();
  return run;
}

byId("zone").textContent = `Times in ${zone()}`;
const wakeRows = repeat(rows, stale, ROWS_MS);
const wakeHealth = repeat(
  async () => {
    showHealth(await get("health"));
    healthIsOld(null);
  },
  (error) => {
    if (!(error instanceof Unreadable)) throw error;
    healthIsOld(new Date());
  },
  HEALTH_MS,
);
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(byId("token").value);
  byId("token-form").hidden = true;
  wakeRows();
  wakeHealth();
});
