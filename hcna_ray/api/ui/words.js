// What C1 says, in words for people. Pure functions: no clock, no page.

export const ENDED = new Set(["completed", "failed", "cancelled", "expired"]);

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** How long, to the two largest units: "340 ms", "12 s", "3 min 5 s", "2 d 4 h". */
export function duration(ms) {
  if (ms < 0) return "0 s";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${(Math.floor(ms / 100) / 10).toFixed(1)} s`;
  const s = Math.floor(ms / 1000);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

/** How long ago, without a flicker of tenths. */
export function ago(ms) {
  if (ms < 1000) return "just now";
  return `${duration(Math.floor(ms / 1000) * 1000).replace(".0 ", " ")} ago`;
}

/** A size with a unit that fits. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  let left = count;
  while (left >= 1024 && place < units.length - 1) {
    left /= 1024;
    place += 1;
  }
  return `${left.toFixed(place && left < 10 ? 1 : 0)} ${units[place]}`;
}

/** A local time; with its date unless that is today's. */
export function clockTime(iso, nowMs) {
  const at = new Date(iso);
  const time = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return at.toDateString() === new Date(nowMs).toDateString()
    ? time
    : `${at.toLocaleDateString()} ${time}`;
}

/** The short name of a node: HCNA-M1--prod--home--v1.0 is M1. */
export const shortName = (nodeId) =>
  (/^[A-Za-z0-9]+-([A-Z]\d+)(--|$)/.exec(nodeId) || [null, nodeId])[1];

/**
 * What is known of a worker: `{mark, word, text}`, the mark one of good, wait, bad, off.
 *
 * ageMs is how old the last sign of it is, untold whether anybody who would know answers.
 */
export function workerInWords(worker, ageMs, untold) {
  if (untold) {
    return { mark: "bad", word: "not known", text: `last known ${ago(ageMs)}` };
  }
  if (worker.trouble) return { mark: "bad", word: "in trouble", text: worker.trouble };
  switch (worker.state) {
    case "online":
      return { mark: "good", word: "online", text: `heartbeat ${ago(ageMs)}` };
    case "suspect":
      return { mark: "bad", word: "unreachable", text: `last known ${ago(ageMs)}` };
    case "asleep":
      return {
        mark: "bad",
        word: "unreachable",
        text: `last known ${ago(ageMs)}; asleep: what it ran is with others, it is expected back`,
      };
    case "gone":
      return { mark: "off", word: "gone", text: `last known ${ago(ageMs)}` };
    case "draining":
      return { mark: "wait", word: "draining", text: "finishes what it runs, gets nothing new" };
    case "cordoned":
      return { mark: "off", word: "out of service", text: "gets nothing new" };
    default:
      return { mark: "off", word: worker.state, text: "" };
  }
}

const errorIn = (error) => [error?.type, error?.message].filter(Boolean).join(": ");

const ran = (attempt) =>
  attempt?.ended_at && attempt.outcome !== "lost"
    ? ` after ${duration(Date.parse(attempt.ended_at) - Date.parse(attempt.started_at))}`
    : "";

const ON_FAILED_LIST = "It is on the list of failed tasks, and can be replayed.";

// A line of a task's history, by its kind: `[mark, title, text, more]`. The attempt that it is about
// is at hand once it was started.
const LINES = {
  accepted: (line, task) => {
    const queue = line.queue ?? task.queue;
    const text = `It is on disk, in queue ${queue} with priority ${task.priority}.`;
    return ["good", "Accepted", text, task.depends_on.length ? { tasks: task.depends_on } : {}];
  },
  queued: (line, _, attempt) => ["wait", attempt ? "Queued again" : "Queued", ""],
  granted: (line) => [
    "run",
    `Sent to ${line.worker}`,
    `Attempt ${line.attempt}, fencing token ${line.generation}.${line.attempt}.`,
  ],
  started: (line) => ["run", `Started on ${line.worker}`, ""],
  returned: (line) => ["wait", `Given back by ${line.worker}`, "It had not been started."],
  retry_scheduled: (line, _, attempt) => [
    "bad",
    `${attempt?.outcome === "timed_out" ? "Ran too long" : "Failed"} on ${line.worker}${
      ran(attempt)}`,
    sentence(errorIn(attempt?.error) || line.detail || "Something went wrong"),
    { detail: attempt?.error?.traceback || "", after: "It is tried again." },
  ],
  lost: (line) => ["bad", `Lost on ${line.worker}`, line.detail ? sentence(line.detail) : ""],
  unpinned: (line) => [
    "wait",
    "Free to run elsewhere",
    line.detail ? `It no longer waits for ${line.detail}.` : "",
  ],
  cancel_requested: (line) => ["wait", "Asked to stop", line.detail ? sentence(line.detail) : ""],
  replayed: () => ["wait", "Replayed", "Queued anew, with all its attempts."],
  completed: (line, _, attempt) => ["good", `Completed on ${line.worker}${ran(attempt)}`, ""],
  failed: (line, task, attempt) => [
    "bad",
    line.worker ? `Failed on ${line.worker}${ran(attempt)}` : "Failed",
    sentence(errorIn(attempt?.error) || line.detail || task.error?.kind || "Something went wrong"),
    { detail: attempt?.error?.traceback || "" },
  ],
  cancelled: (line) => ["off", "Cancelled", line.detail ? sentence(line.detail) : ""],
  expired: (line) => ["off", "Expired", line.detail ? sentence(line.detail) : ""],
};

/** Codes of `why` that say no more than the step itself. */
const PLAIN = new Set(["running", "completed"]);

/** Where a task stands: `{why, code, fix}` of its latest step, or nothing where that says it all. */
function standing(task) {
  const { code, message, fix } = task.why;
  if (PLAIN.has(code)) return {};
  // An outline has the words of the reference, which are Markdown.
  const why = sentence(task.outline ? message.replaceAll("`", "") : message);
  return { why, code, fix: fix && fix !== "wait" ? pieces(fix, task.task_id) : null };
}

const COMMAND = new RegExp(
  "hcna task retry task-\\w+|hcna task cancel task-\\w+|hcna task task-\\w+|hcna why task-\\w+" +
    "|hcna queues resume \\S+|hcna (?:workers(?: uncordon [\\w-]+)?|status|up|down)",
  "g",
);

// What a command does on the page: a button of this view, by what it does, or another view.
const ON_PAGE = [
  [/^hcna task retry task-/, (id) => ({ act: `replay ${id}` })],
  [/^hcna task cancel task-/, (id) => ({ act: `cancel ${id}` })],
  [/^hcna (workers|status|queues)/, () => ({ href: "#/" })],
];

/**
 * A next step in pieces, so that commands stand out: `[{text} | {command, act, href}]`, with `act`
 * or `href` where the page itself can do what the command does.
 */
function pieces(fix, id) {
  const found = [];
  let from = 0;
  for (const { 0: command, index } of fix.matchAll(COMMAND)) {
    if (index > from) found.push({ text: fix.slice(from, index) });
    const place = ON_PAGE.find(([pattern]) => pattern.test(command));
    found.push({ command, ...place?.[1](id) });
    from = index + command.length;
  }
  found.push({ text: `${fix.slice(from)}.` });
  if (found[0].text) found[0].text = found[0].text.charAt(0).toUpperCase() + found[0].text.slice(1);
  return found;
}

/** Steps of a story that are shown; of a longer one the middle is left out. */
const STEPS = 200;
const STEPS_AT_FIRST = 20;

/**
 * The whole story of a task, oldest first:
 * `[{at, mark, title, text, after, why, code, fix, detail, tasks, going, beat, percent}]`.
 *
 * lines is its history as C1 tells it; heardMs tells for a worker's name how long ago it was heard
 * of, or undefined.
 */
export function story(task, lines, heardMs) {
  const told = [];
  const tell = (at, mark, title, text = "", more = {}) =>
    told.push({ at, mark, title, text, ...more });
  const attempts = new Map();
  for (const one of task.attempts || []) attempts.set(`${one.generation}.${one.attempt}`, one);
  let attempt;
  for (const line of lines) {
    if (line.attempt !== null) attempt = attempts.get(`${line.generation}.${line.attempt}`);
    const say = LINES[line.kind];
    const [mark, title, text, more] = say
      ? say(line, task, attempt)
      : ["off", sentence(line.kind.replaceAll("_", " ")).slice(0, -1), line.detail || ""];
    tell(line.at, mark, title, text, more);
    if (line.kind === "lost" && line.status === "queued") {
      tell(line.at, "wait", "Requeued", "A loss is not counted as a failure.");
    }
    if (line.kind === "replayed") attempt = undefined;
  }
  if (ENDED.has(task.status)) {
    const end = told.at(-1);
    if (end) {
      const took = Date.parse(task.finished_at) - Date.parse(task.accepted_at);
      const hint = task.status === "failed" ? `${ON_FAILED_LIST} ` : "";
      end.after = `${hint}${duration(took)} from accepted to ${task.status}.`;
      const stands = standing(task);
      // It tells the same error again, and after how many attempts.
      if (stands.why) Object.assign(end, stands, { text: "" });
    }
  } else if (task.status === "running") {
    const worker = task.attempts?.at(-1)?.worker;
    const heard = worker === undefined ? undefined : heardMs(worker);
    const { percent = null, message = "" } = task.progress || {};
    const far = [percent === null ? "" : `${Math.round(percent)} %`, message].filter(Boolean);
    tell(null, "run", worker ? `Runs on ${worker}` : "Runs", far.join(": "), {
      ...standing(task),
      going: true,
      beat: heard === undefined ? "" : `Heartbeat of ${worker} ${ago(heard)}.`,
      percent,
    });
  } else {
    tell(null, "wait", "Waits", "", { ...standing(task), going: true });
  }
  if (told.length <= STEPS) return told;
  const left = told.length - STEPS;
  return [
    ...told.slice(0, STEPS_AT_FIRST),
    { at: null, mark: "off", title: `${plural(left, "more step")} in between`, text: "" },
    ...told.slice(STEPS_AT_FIRST + left),
  ];
}

/** A text as a sentence. */
export function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}

// -- who may do what ------------------------------------------------------------------------------

const ROLES = ["viewer", "submitter", "operator", "admin"];

const among = (name, patterns) =>
  patterns.length === 0 ||
  patterns.some((one) => (one.endsWith("*") ? name.startsWith(one.slice(0, -1)) : name === one));

/** What a key may do. C1 decides anew at every request: this only says which buttons are shown. */
export function rights(who) {
  const rank = ROLES.indexOf(who.role);
  const scoped = who.task_types.length > 0 || who.queues.length > 0;
  return {
    work: rank >= 1,
    queue: (name) => rank >= 2 && who.task_types.length === 0 && among(name, who.queues),
    machines: rank >= 2 && !scoped,
    type: (name) => among(name, who.task_types),
  };
}
