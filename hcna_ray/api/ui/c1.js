// Asks C1. The key lives in this tab's sessionStorage and leaves it in a header, never otherwise.

const KEY = "hcna.key";
// The page is at <C1>/ui, whatever stands before that.
const C1 = new URL(".", document.baseURI);
const PATIENCE_MS = 10_000;
// In an event stream C1 says something every 15 s.
const SILENCE_MS = 40_000;

/** C1 has said no, and why (RFC 9457 problem details). */
export class Refused extends Error {
  constructor(status, problem, retryAfterS) {
    super(problem.detail || problem.title || `C1 answered ${status}`);
    this.status = status;
    this.code = problem.code || "";
    this.fix = problem.fix || "";
    this.fields = problem.errors || [];
    this.retryAfterS = retryAfterS;
  }
}

/** C1 did not answer: nobody knows more than that. */
export class Unreachable extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

// How far C1's clock is ahead of the browser's, as its answers date themselves.
let aheadMs = 0;

/** The instant by C1's clock, in milliseconds. */
export const now = () => Date.now() + aheadMs;

function setClock(reply) {
  const date = Date.parse(reply.headers.get("date") || "");
  // It counts in whole seconds: less than two is no difference.
  aheadMs = Number.isNaN(date) || Math.abs(date - Date.now()) < 2000 ? 0 : date - Date.now();
}

function send(method, path, { body, headers, signal }) {
  const said = key.get();
  return fetch(new URL(path, C1), {
    method,
    headers: {
      ...(said === null ? {} : { Authorization: `Bearer ${said}` }),
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...headers,
    },
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
    signal,
  });
}

// An integer that a double cannot hold is kept as it was written.
function exact(_, value, context) {
  const rounded = Number.isInteger(value) && !Number.isSafeInteger(value);
  return rounded && context?.source && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
}

/** Read JSON text, integers to their last digit. Throws `SyntaxError`. */
export const parse = (text) => JSON.parse(text, exact);

const EVENTS = "text/event-stream";
const isEvents = (reply) => (reply.headers.get("content-type") || "").startsWith(EVENTS);

/** Return what takes in pieces of an event stream and hands each message to `onMessage`. */
function reader(onMessage) {
  let rest = "";
  let message = {};
  return (piece) => {
    const lines = (rest + piece).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (message.data !== undefined) onMessage(message);
        message = {};
        continue;
      }
      const [, name, text = ""] = /^([^:]*)(?:: ?(.*))?$/.exec(line);
      if (name === "data") {
        message.data = message.data === undefined ? text : `${message.data}\n${text}`;
      }
      if (name === "event") message.event = text;
    }
  };
}

/** Return JSON, or of an event stream that ends the list of what is told in it. */
async function read(reply) {
  const text = await reply.text();
  try {
    if (!isEvents(reply)) return parse(text);
    const told = [];
    reader(({ event, data }) => event === undefined && told.push(parse(data)))(text);
    return told;
  } catch {
    return {};
  }
}

/** Ask, and return the answer. Throws `Refused` or `Unreachable`. */
export async function ask(method, path, { body, headers = {} } = {}) {
  let reply;
  let answer;
  try {
    reply = await send(method, path, { body, headers, signal: AbortSignal.timeout(PATIENCE_MS) });
    answer = await read(reply);
  } catch (error) {
    throw new Unreachable(String(error));
  }
  setClock(reply);
  if (reply.ok) return answer;
  if (reply.status >= 502 && !answer.code) {
    // What stands before C1 has answered in its place.
    throw new Unreachable(`answered ${reply.status}`);
  }
  throw new Refused(reply.status, answer, Number(reply.headers.get("retry-after")) || 0);
}

/**
 * Follow an event stream until it ends, or nothing came for so long that it must be dead.
 * `onOpen` is called once, `onNews` at every message.
 */
export async function follow(path, { onOpen, onNews, signal }) {
  const dead = new AbortController();
  const reply = await send("GET", path, {
    headers: { Accept: EVENTS },
    signal: AbortSignal.any([signal, dead.signal]),
  });
  if (!reply.ok || !isEvents(reply)) throw new Unreachable(`no events: ${reply.status}`);
  onOpen();
  const take = reader(onNews);
  const pieces = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const silent = setTimeout(() => dead.abort(), SILENCE_MS);
    const { value, done } = await pieces.read().finally(() => clearTimeout(silent));
    if (done) return;
    take(value);
  }
}

/** Return a name for a request, so that sending it twice does it once. */
export function onceOnly() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
