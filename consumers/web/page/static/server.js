// Requests to the page's data endpoints.

const TIMEOUT_MS = 15000;
const base = new URL("../", import.meta.url);
const TOKEN_KEY = `trading-history-token ${base.pathname}`; // other servers under paths of the same host have other tokens
const CARRIED = /^[\x20-\x7e]+$/; // fetch rejects a header with other characters
let token = read();

function read() {
  try {
    return sessionStorage.getItem(TOKEN_KEY);
  } catch {
    return null; // the browser may forbid storage: then the token lasts until the page is closed
  }
}

export function useToken(value) {
  token = value;
  try {
    sessionStorage.setItem(TOKEN_KEY, value);
  } catch {
    // As above.
  }
}

/** Failed read: a message for the user, and the HTTP status if there was an answer. */
export class Unreadable extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Returns the JSON at a path under /page/. Parameters that are null or undefined are omitted. Throws Unreadable or AbortError. */
export async function get(path, values = {}, signal = undefined) {
  const url = new URL(path, base);
  for (const [key, value] of Object.entries(values)) {
    if (value !== null && value !== undefined) url.searchParams.set(key, value);
  }
  if (token && !CARRIED.test(token)) throw new Unreadable("wrong token: it contains characters that are not allowed in a token", 401);
  const limit = AbortSignal.timeout(TIMEOUT_MS);
  let response;
  try {
    response = await fetch(url, {
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: signal ? AbortSignal.any([signal, limit]) : limit,
    });
    if (response.ok) return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    const late = error.name === "TimeoutError";
    throw new Unreadable(late ? "the server does not answer" : "the server cannot be reached");
  }
  const refused = response.status === 401 && token;
  throw new Unreadable(refused ? "wrong token" : await reason(response), response.status);
}

async function reason(response) {
  try {
    const { detail } = await response.json();
    if (typeof detail === "string") return detail;
  } catch {
    // The answer is not from our server, maybe from a proxy: show its status only.
  }
  return `the server answers ${response.status}`;
}
