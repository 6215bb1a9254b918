// What the page knows, and how it stays true: it asks again and again, at once when told of news.

import { Refused, Unreachable, ask, follow, key, now } from "./c1.js";
import { rights } from "./words.js";

// Pauses in milliseconds. With events the page asks when something happens, and now and then.
const PAUSE = 2000;
const PAUSE_WITH_EVENTS = 3000;
const PAUSE_MAX = 10_000;
// After news it asks at once; while there is more and more of it, not more often than this.
const NEWS = 100;
const BETWEEN_NEWS = 1000;
const FOLLOW_AGAIN = 5000;
// What a field of a request can hold, and C1 looks at: nothing else is a key.
const KEY_LIKE = /^[!-~]{1,512}$/;

/** Everything that is shown. Views read it; only this module and actions change it. */
export const state = {
  /** Whose key it is; null before sign-in. */
  who: null,
  rights: null,
  signing: false,
  /** Why the last sign-in failed, or ended. */
  signInProblem: "",
  /** Whether there is a key although C1 has not said yet whose it is: it is asked again. */
  keyKept: false,
  /** Whether C1 answers, and when it last did. */
  contact: { ok: true, at: 0 },
  /**
   * What C1 has said, by path: `{value, at, missing, refusal}`. `missing` is an answer, that there
   * is nothing for this key; `refusal` is none: why what is known is not newer. `at` is 0, and both
   * others null, while C1 has not answered.
   */
  known: new Map(),
  /** What came of the last action: `{good, text}`. */
  notice: null,
  /** Actions that are under way. */
  busy: new Set(),
  /** Whether events are followed. */
  live: false,
};

let redraw = () => {};
let wanted = () => [];
let timer = 0;
let tries = 0;
let round = null;
let notBefore = 0;
let lookedAt = 0;
let session = null;

/** Say how to draw, and which paths the view in front needs besides the usual ones. */
export function begin({ draw, needs }) {
  redraw = draw;
  wanted = needs;
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) hush();
    else {
      if (state.who !== null) listen();
      refresh();
    }
  });
  // Ages grow although nothing else happens.
  setInterval(() => {
    if (!document.hidden && state.who) redraw();
  }, 1000);
  if (key.get() !== null) signIn(key.get());
}

/** Return what C1 has said at a path, or undefined: `{value, at, missing, refusal}`. */
export const known = (path) => state.known.get(path);

/**
 * Why what is in front is not newer, although C1 answers: `[{code, text, at}]`, each code once;
 * `at` is the instant of the oldest that is shown because of it, 0 if nothing is.
 */
export function refusals() {
  const found = new Map();
  for (const { at, refusal } of state.known.values()) {
    if (!refusal) continue;
    // Of the same trouble C1 may say something else at each path, as where its log tells of it.
    const code = refusal.code || String(refusal.status);
    const one = found.get(code) || { code, text: inWords(refusal), at: 0 };
    if (at && (!one.at || at < one.at)) one.at = at;
    found.set(code, one);
  }
  return [...found.values()];
}

/** Say something to those who listen instead of looking. */
export function say(text) {
  document.getElementById("spoken").textContent = text;
}

/** Sign in with a key. If C1 does not say whether it is one, it is kept, and C1 asked again. */
export async function signIn(said) {
  clearTimeout(timer);
  tries = notBefore = 0;
  Object.assign(state, { signing: true, signInProblem: "", keyKept: false });
  redraw();
  if (KEY_LIKE.test(said)) {
    key.set(said);
    await askWho();
  } else {
    signOut("the key is not valid");
  }
}

async function askWho() {
  const mine = {};
  session = mine;
  try {
    const who = await ask("GET", "whoami");
    if (mine !== session) return; // It is about a key that is no longer here.
    state.rights = rights(who);
    state.who = who;
    state.contact = { ok: true, at: now() };
    tries = notBefore = 0;
    if (!document.hidden) listen();
    refresh();
    say(`Signed in as ${who.owner}, role ${who.role}.`);
  } catch (error) {
    if (mine !== session) return;
    const refused = error instanceof Refused;
    if (refused && error.status === 401) {
      signOut(error.message);
      return;
    }
    const why = refused ? inWords(error) : "C1 does not answer.";
    state.signInProblem = `${why} Your key is kept, and C1 is asked again by itself.`;
    state.keyKept = true;
    tries += 1;
    holdBack(refused ? [error] : []);
    soon();
  }
  state.signing = false;
  redraw();
}

export function signOut(why = "") {
  key.forget();
  session = null;
  hush();
  clearTimeout(timer);
  tries = notBefore = 0;
  Object.assign(state, {
    who: null,
    rights: null,
    signing: false,
    keyKept: false,
    signInProblem: why,
    notice: null,
  });
  state.known.clear();
  state.busy.clear();
  redraw();
}

// -- asking again and again -----------------------------------------------------------------------

/** Ask for everything in front as soon as may be. */
export function refresh() {
  clearTimeout(timer);
  const wait = Math.max(0, notBefore - Date.now());
  timer = setTimeout(look, wait);
}

function soon() {
  clearTimeout(timer);
  let pause = state.live ? PAUSE_WITH_EVENTS : PAUSE;
  if (tries) pause = Math.min(PAUSE_MAX, 1000 * 2 ** (tries - 1));
  timer = setTimeout(look, Math.max(pause, notBefore - Date.now()));
}

/** Ask nothing before C1 wants to be asked again. */
function holdBack(refused) {
  const later = Math.max(0, ...refused.map((error) => error.retryAfterS));
  notBefore = later ? Date.now() + Math.min(later, 60) * 1000 : 0;
}

async function look() {
  if (document.hidden) return; // It looks when it is seen again.
  if (state.who === null) {
    if (state.keyKept) await askWho();
    return;
  }
  if (round !== null) {
    // What is asked now may be too old for whoever asked for this look.
    await round;
    if (state.who === null) return;
  }
  round = lookNow().finally(() => {
    round = null;
  });
  await round;
  soon();
}

async function lookNow() {
  const mine = session;
  lookedAt = Date.now();
  const paths = new Set(["status", "workers", ...wanted()]);
  const found = await Promise.allSettled([...paths].map((path) => ask("GET", path)));
  if (mine !== session || state.who === null) return;
  const bad = found.filter((one) => one.status === "rejected").map((one) => one.reason);
  const refused = bad.filter((error) => error instanceof Refused);
  const out = refused.find((error) => error.status === 401);
  if (out) {
    signOut(`You have been signed out: ${out.message}.`);
    return;
  }
  const at = now();
  const before = refusals();
  [...paths].forEach((path, place) => {
    const one = found[place];
    if (one.status === "fulfilled") {
      state.known.set(path, { value: one.value, at, missing: null });
    } else if (one.reason instanceof Refused) {
      const { status } = one.reason;
      const answered = status < 500 && status !== 429;
      const last = state.known.get(path) || { value: null, at: 0, missing: null };
      state.known.set(
        path,
        answered
          ? { value: null, at, missing: one.reason }
          : { ...last, refusal: one.reason },
      );
    }
  });
  for (const path of state.known.keys()) {
    if (!paths.has(path)) state.known.delete(path);
  }
  const silent = bad.some((error) => error instanceof Unreachable);
  holdBack(refused);
  const [reason] = refusals();
  if (reason && !before.length) say(`${reason.text} What is refused is shown as last known.`);
  if (!reason && before.length) say("C1 gives what it is asked for again.");
  if (silent && state.contact.ok) say("C1 does not answer. What is shown is what was last known.");
  if (!silent && !state.contact.ok) say("C1 answers again.");
  if (silent) {
    tries += 1;
    state.contact.ok = false;
  } else {
    tries = 0;
    state.contact = { ok: true, at };
  }
  redraw();
}

// -- events -------------------------------------------------------------------------------------

// A browser holds few connections to one place, so a page that nobody looks at lets go of its own.
let listening = null;

function hush() {
  listening?.abort();
  listening = null;
  state.live = false;
}

/** Follow what happens. What was missed meanwhile is asked for whenever the stream opens. */
async function listen() {
  hush();
  const mine = new AbortController();
  listening = mine;
  let news = 0;
  while (listening === mine) {
    try {
      await follow("events", {
        signal: mine.signal,
        onOpen: () => {
          state.live = true;
          refresh();
        },
        onNews: () => {
          if (news) return;
          const pause = Math.max(NEWS, lookedAt + BETWEEN_NEWS - Date.now());
          news = setTimeout(() => {
            news = 0;
            if (listening === mine) refresh();
          }, pause);
        },
      });
    } catch {
      // Cut off, or C1 has no room for one more: asking again and again does meanwhile.
    }
    if (listening !== mine) return;
    state.live = false;
    refresh();
    await new Promise((go) => setTimeout(go, FOLLOW_AGAIN));
  }
}

// -- doing something ------------------------------------------------------------------------------

/**
 * Do something and show what came of it. `done` turns the answer into a sentence.
 * Returns the answer, or null when it was refused.
 */
export async function act(name, request, done) {
  if (state.busy.has(name)) return null;
  state.busy.add(name);
  state.notice = null;
  redraw();
  try {
    const answer = await request();
    notify(true, done(answer));
    return answer;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      signOut(`You have been signed out: ${error.message}.`);
    } else {
      notify(false, inWords(error));
    }
    return null;
  } finally {
    state.busy.delete(name);
    refresh();
    redraw();
  }
}

function notify(good, text) {
  state.notice = { good, text };
}

export function dismiss() {
  state.notice = null;
  redraw();
}

function inWords(error) {
  if (error instanceof Unreachable) {
    return "C1 did not answer: it may have been done, or not. Look before you do it again.";
  }
  if (!(error instanceof Refused)) throw error;
  const fields = error.fields.map((one) => `${one.field} ${one.message}`).join("; ");
  const helps = error.fix ? ` What helps: ${error.fix}.` : "";
  const code = error.code ? ` Code ${error.code}.` : "";
  return `Refused: ${error.message}${fields ? ` (${fields})` : ""}.${helps}${code}`;
}
