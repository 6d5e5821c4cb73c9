// The page's side of its data endpoints.

const TIMEOUT_MS = 15000;
const base = new URL("../", import.meta.url);
const TOKEN_KEY = "trading-history-token";
const CARRIED = /^[\x20-\x7e]+$/; // fetch throws at any other
let token = read();

function read() {
  try {
    return sessionStorage.getItem(TOKEN_KEY);
  } catch {
    return null; // storage may be forbidden: then the token lasts as long as the page
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

/** A failure to read: a message for a person, and the HTTP status if there was one. */
export class Unreadable extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The JSON at a path below /page/. `values` that are null or undefined are left out. Throws Unreadable, or AbortError. */
export async function get(path, values = {}, signal = undefined) {
  const url = new URL(path, base);
  for (const [key, value] of Object.entries(values)) {
    if (value !== null && value !== undefined) url.searchParams.set(key, value);
  }
  if (token && !CARRIED.test(token)) throw new Unreadable("wrong token: it has characters that no token has", 401);
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
    // Whatever came is not from our server: its status must do.
  }
  return `the server answers ${response.status}`;
}
