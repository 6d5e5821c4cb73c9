// The pipeline section: tiles with its state, and the newest rejections.

import { byId, element, replace, row } from "./dom.js";
import { count, duration, moment } from "./format.js";

let shown = null;

/** Shows the answer of GET health. */
export function showHealth(answer) {
  shown = answer;
  const { database, redis, outbox, dashboard_url: dashboard } = answer;
  replace(byId("tiles"), databaseTile(database), ...queueTiles(redis, dashboard), failedTile(database), outboxTile(outbox));
  byId("tiles").setAttribute("aria-busy", "false");
  if (!database.error) showRejections(database.rejections);
}

/** Shows an error of another request to the database: it is newer than the last answer of GET health. */
export function databaseFailed(error) {
  if (shown && !shown.database.error) showHealth({ ...shown, database: { error } });
}

/** Marks the tiles as outdated; null marks them as current. */
export function healthIsOld(since) {
  byId("tiles").classList.toggle("old", since !== null);
}

function tile(state, name, value, note) {
  return element("li", { class: `tile ${state}` },
    element("span", { class: "name" }, name), element("strong", {}, value), element("span", { class: "tile-note" }, note));
}

function databaseTile(database) {
  if (database.error) return tile("bad", "Database", "not readable", database.error);
  const stored = database.last_stored;
  return stored
    ? tile("good", "Database", "readable", `last snapshot stored ${moment(stored.stored_at)}, ${duration(Math.max(stored.seconds, 0))} after it was taken`)
    : tile("good", "Database", "readable", "no snapshot yet");
}

function queueTiles(redis, dashboard) {
  if (redis === null) return [tile("plain", "Queue", "unknown", "REDIS_URL is not set here"), unknownWorkers()];
  if (redis.error) return [tile("bad", "Queue", "not readable", redis.error), unknownWorkers()];
  const { queued, reserved, oldest_age_seconds: waited, workers, state } = redis;
  if (state === "unknown") return [tile("bad", "Queue", "not readable", "run trading-history doctor"), unknownWorkers()];
  const lag = waited === null ? "no job is waiting" : `the oldest has waited for ${duration(waited)}`;
  const queue = tile(state === "ok" ? "good" : "bad", "Queue", `${count(queued)} waiting`, `${lag}; ${count(reserved)} reserved`);
  if (dashboard) queue.append(element("a", { href: dashboard, rel: "noreferrer" }, "RQ Dashboard"));
  return [queue, tile(workers ? "good" : "bad", "Workers", count(workers), workers ? "alive" : "no worker runs: start trading-history worker")];
}

const unknownWorkers = () => tile("plain", "Workers", "unknown", "");

function failedTile(database) {
  if (database.error) return tile("plain", "Rejected", "unknown", "");
  const { count: many } = database.rejections;
  return tile(many ? "bad" : "good", "Rejected", many >= 1000 ? `${count(1000)} or more` : count(many),
    many ? "see below, or run trading-history failed list" : "no event was rejected");
}

function outboxTile(outbox) {
  if (outbox === null) return tile("plain", "Outbox", "none", "on this machine");
  if (outbox.error) return tile("bad", "Outbox", "not readable", outbox.error);
  const { pending, sent, oldest_unacknowledged_seconds: age, state } = outbox;
  const note = age === null ? "every event is stored or rejected" : `${count(sent)} sent, not acknowledged; the oldest is ${duration(age)} old`;
  return tile(state === "ok" ? "good" : "bad", "Outbox", `${count(pending)} pending`, note);
}

function showRejections({ newest, count: many }) {
  byId("failed").hidden = many === 0;
  byId("failed-title").textContent = newest.length < many ? `The newest ${newest.length} rejections` : "Rejections";
  replace(byId("failed-rows"), ...newest.map(({ created_at: at, job_id: job, reason }) =>
    row(moment(at), element("td", {}, element("code", {}, job)), reason)));
}
