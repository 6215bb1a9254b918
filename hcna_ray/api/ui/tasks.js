// Queues and lists of tasks.

import { ask } from "./c1.js";
import { Component, html } from "./lib.js";
import { Act, AskThenAct, Badge, Status, Table, Unknown, When } from "./parts.js";
import { act, known, refresh, state } from "./state.js";
import { sentence } from "./words.js";

export const LIVE = "tasks?status=scheduled,queued,running&limit=20";
const PAGE = 50;

const STATES = ["scheduled", "queued", "running", "completed", "failed", "cancelled", "expired"];
/** Of the states of a task those that a queue is shown with. */
const SHOWN = ["scheduled", "queued", "running", "completed", "failed"];

export function Queues() {
  const status = known("status")?.value;
  if (!status) return html`<${Unknown} path="status" />`;
  if (!status.store_readable) {
    return html`<p class="empty">Which tasks there are is not known now: C1 cannot read the task
      store.</p>`;
  }
  const names = [...new Set([...Object.keys(status.queues), ...status.paused])].sort();
  const acts = names.some((name) => state.rights.queue(name));
  return html`
    <${Table} caption="Tasks in each queue, by state"
      look="counts"
      head=${[
        { label: "Queue" },
        ...SHOWN.map((one) => ({ label: one[0].toUpperCase() + one.slice(1), number: true })),
        { label: "State" },
        ...(acts ? [{ label: "Action", kind: "act" }] : []),
      ]}
      rows=${names.map((name) => ({
        key: name,
        cells: [
          name,
          ...SHOWN.map((one) => status.queues[name]?.[one] || 0),
          status.paused.includes(name) ? html`<${Badge} mark="wait">paused<//>` : "open",
          ...(acts
            ? [html`<${QueueAct} name=${name} paused=${status.paused.includes(name)} />`]
            : []),
        ],
      }))}
      empty="No task has been submitted yet." />
  `;
}

function QueueAct({ name, paused }) {
  if (!state.rights.queue(name)) return null;
  const what = paused ? "resume" : "pause";
  const path = `admin/queues/${encodeURIComponent(name)}/${what}`;
  const done = () =>
    paused
      ? `Tasks from the queue ${name} are started again.`
      : `Nothing more is started from the queue ${name}; tasks are still accepted into it.`;
  return html`<${Act} name=${`${what} ${name}`} quiet
    onClick=${() => act(`${what} ${name}`, () => ask("POST", path), done)}
    >${paused ? "Resume" : "Pause"}<span class="unseen"> queue ${name}</span><//>`;
}

const link = (task) => html`<a href=${`#/tasks/${task.task_id}`}>${task.task_id}</a>`;

/** Why a task is where it is, in a sentence. */
function words(task) {
  if (task.pending_reason) return sentence(task.pending_reason.message);
  if (task.error) {
    return sentence([task.error.kind, task.error.message].filter(Boolean).join(": "));
  }
  if (task.progress && task.status === "running") {
    const { percent, message } = task.progress;
    return [percent === null ? "" : `${Math.round(percent)} %`, message].filter(Boolean).join(": ");
  }
  if (task.result?.processed_by) return `By ${task.result.processed_by}.`;
  return null;
}

export function TaskTable({ tasks, caption, empty }) {
  return html`
    <${Table} caption=${caption} empty=${empty}
      head=${[
        { label: "Task", kind: "id" },
        { label: "Type", kind: "name" },
        { label: "Status" },
        { label: "Queue", kind: "name" },
        { label: "Accepted" },
        { label: "Note", kind: "note" },
      ]}
      rows=${tasks.map((task) => ({
        key: task.task_id,
        cells: [
          link(task),
          task.task_type,
          html`<${Status} of=${task.status} />`,
          task.queue,
          html`<${When} at=${task.accepted_at} relative />`,
          words(task),
        ],
      }))} />
  `;
}

export function LiveTasks() {
  const tasks = known(LIVE)?.value;
  if (!tasks) return html`<${Unknown} path=${LIVE} />`;
  return html`
    <${TaskTable} tasks=${tasks.tasks} caption="Tasks that wait or run, newest first"
      empty="Nothing waits and nothing runs." />
    ${tasks.next_cursor && html`
      <p class="more"><a href="#/tasks?status=scheduled,queued,running">All that wait or run</a></p>`}
  `;
}

// -- lists with a filter, in pages ----------------------------------------------------------------

/** Return the path that a list asks C1 for. */
export function listPath(route, more = {}) {
  const query = new URLSearchParams({ ...more, limit: PAGE });
  for (const name of ["status", "task_type", "queue", "worker", "cursor"]) {
    const value = route.query.get(name);
    if (value && !query.has(name)) query.set(name, value);
  }
  return `tasks?${query}`;
}

function go(route, changes) {
  const query = new URLSearchParams(route.query);
  query.delete("cursor");
  for (const [name, value] of Object.entries(changes)) {
    if (value) query.set(name, value);
    else query.delete(name);
  }
  const text = query.toString();
  location.hash = `#/${route.name}${text ? `?${text}` : ""}`;
  refresh();
}

/** Task types and queues there are, for choosing. */
function choices() {
  const status = known("status")?.value;
  return {
    types: status?.task_types || [],
    queues: status ? Object.keys(status.queues).sort() : [],
    workers: (known("workers")?.value?.workers || []).map((one) => one.name),
  };
}

export function Choice({ label, name, value, options, onChange, any = "any" }) {
  const all = value && !options.includes(value) ? [...options, value] : options;
  return html`
    <label>${label}
      <select name=${name} onChange=${(event) => onChange(event.target.value)}>
        <option value="" selected=${!value}>${any}</option>
        ${all.map((one) => html`<option value=${one} selected=${one === value}>${one}</option>`)}
      </select>
    </label>
  `;
}

function Filters({ route, names }) {
  const { types, queues, workers } = choices();
  const options = { status: STATES, task_type: types, queue: queues, worker: workers };
  const labels = { status: "Status", task_type: "Type", queue: "Queue", worker: "Worker" };
  return html`
    <div class="filters" role="group" aria-label="Show only">
      ${names.map((name) => html`
        <${Choice} key=${name} label=${labels[name]} name=${name} options=${options[name]}
          value=${route.query.get(name) || ""}
          onChange=${(value) => go(route, { [name]: value })} />`)}
    </div>
  `;
}

function Pages({ route, next }) {
  const cursor = route.query.get("cursor");
  if (!cursor && !next) return null;
  return html`
    <nav class="pages" aria-label="Pages">
      ${cursor && html`<button type="button" class="quiet" onClick=${() => go(route, {})}
        >Newest</button>`}
      ${next && html`<button type="button" class="quiet"
        onClick=${() => go(route, { cursor: next })}>Older</button>`}
    </nav>
  `;
}

function refusedList(answer) {
  return html`<p class="empty" role="alert">${answer.missing.message}</p>`;
}

export function Tasks({ route }) {
  const answer = known(listPath(route));
  const names = ["status", "task_type", "queue", "worker"];
  const some = names.some((name) => route.query.get(name));
  return html`
    <${Filters} route=${route} names=${names} />
    ${answer?.missing
      ? refusedList(answer)
      : answer?.value
        ? html`<${TaskTable} tasks=${answer.value.tasks} caption="Tasks, newest first"
            empty=${some ? "There is no such task." : "No task has been submitted yet."} />
            <${Pages} route=${route} next=${answer.value.next_cursor} />`
        : html`<${Unknown} path=${listPath(route)} />`}
  `;
}

// -- failed ---------------------------------------------------------------------------------------

export const failedPath = (route) => listPath(route, { status: "failed" });

export function replay(task) {
  const id = task.task_id;
  return act(
    `replay ${id}`,
    () => ask("POST", `tasks/${encodeURIComponent(id)}/retry`),
    () => `${id} runs again.`,
  );
}

function replayAll(route) {
  const filter = {};
  for (const name of ["task_type", "queue"]) {
    if (route.query.get(name)) filter[name] = route.query.get(name);
  }
  return act(
    "replay all",
    () => ask("POST", "tasks/retry", { body: { filter, limit: 1000 } }),
    ({ retried, more }) =>
      `${retried.length} task${retried.length === 1 ? "" : "s"} run${
        retried.length === 1 ? "s" : ""} again${more ? "; there are more" : ""}.`,
  );
}

export class Failed extends Component {
  render({ route }) {
    const answer = known(failedPath(route));
    if (answer?.missing) return refusedList(answer);
    if (!answer?.value) return html`<${Unknown} path=${failedPath(route)} />`;
    const { tasks, next_cursor: next } = answer.value;
    const acts = state.rights.work;
    const filtered = route.query.get("task_type") || route.query.get("queue");
    return html`
      <${Filters} route=${route} names=${["task_type", "queue"]} />
      ${acts && tasks.length > 0 && html`
        <div class="acts">
          <${AskThenAct} name="replay all" label=${filtered ? "Replay these" : "Replay all"}
            title=${filtered ? "Replay all that fit?" : "Replay all that failed?"} yes="Replay"
            onYes=${() => replayAll(route)}>
            <p>Each begins anew, with all its attempts. At most 1000 at once.</p>
          <//>
        </div>`}
      <${Table} caption="Failed tasks, newest first"
        empty="Nothing has failed."
        head=${[
          { label: "Task", kind: "id" },
          { label: "Type", kind: "name" },
          { label: "Why", kind: "note" },
          { label: "Attempts", number: true },
          { label: "Failed" },
          ...(acts ? [{ label: "Action", kind: "act" }] : []),
        ]}
        rows=${tasks.map((task) => ({
          key: task.task_id,
          cells: [
            link(task),
            task.task_type,
            words(task),
            task.error?.attempts ?? "",
            html`<${When} at=${task.finished_at} relative />`,
            ...(acts
              ? [html`<${Act} name=${`replay ${task.task_id}`} quiet onClick=${() => replay(task)}
                  >Replay<span class="unseen"> ${task.task_id}</span><//>`]
              : []),
          ],
        }))} />
      <${Pages} route=${route} next=${next} />
    `;
  }
}
