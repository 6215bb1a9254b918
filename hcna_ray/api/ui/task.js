// One task: its whole story, what it was given and what came of it; and a new one.

import { ask, now, onceOnly, parse } from "./c1.js";
import { Component, html } from "./lib.js";
import { Act, AskThenAct, Json, Status, Unknown, When } from "./parts.js";
import { act, known, say, state } from "./state.js";
import { replay } from "./tasks.js";
import { ENDED, story } from "./words.js";

const pathOf = (id) => `tasks/${encodeURIComponent(id)}`;
const taskPath = (id) => `${pathOf(id)}?payload=true`;
const historyPath = (id) => `${pathOf(id)}/events?follow=false`;

export const taskNeeds = (id) => [taskPath(id), historyPath(id)];

export class Task extends Component {
  componentDidUpdate() {
    // Whoever listens is told once of every change of state.
    const status = known(taskPath(this.props.id))?.value?.status;
    if (status && this.told && status !== this.told) say(`The task is ${status}.`);
    this.told = status || this.told;
  }

  render({ id }) {
    const answer = known(taskPath(id));
    if (answer?.missing) {
      return html`<p class="empty" role="alert">${
        answer.missing.status === 404
          ? `There is no task ${id}, or it is not yours to see.`
          : answer.missing.message}</p>`;
    }
    if (!answer?.value) return html`<${Unknown} path=${taskPath(id)} />`;
    const task = answer.value;
    return html`
      <div class="summary">
        <p><${Status} of=${task.status} /> <span>${task.task_type} in queue ${
          task.queue}, accepted <${When} at=${task.accepted_at} relative /></span></p>
        ${state.rights.work && html`<${TaskActs} task=${task} />`}
      </div>
      ${task.outline && html`<p class="hint">You see an outline of this task: it is somebody
        else's.</p>`}
      <div class="halves">
        <section><h2>What happened</h2><${Story} task=${task} /></section>
        <section>
          <h2>Details</h2><${Details} task=${task} />
          ${task.result !== null && html`
            <h2>Result</h2><${Json} of=${task.result} label="Result" />`}
          ${task.payload && html`<h2>Payload</h2><${Json} of=${task.payload} label="Payload" />`}
          ${task.metadata && html`
            <h2>Metadata</h2><${Json} of=${task.metadata} label="Metadata" />`}
        </section>
      </div>
    `;
  }
}

function Details({ task }) {
  const facts = [
    ["Type", task.task_type],
    ["Queue", task.queue],
    ["Priority", `${task.priority} of 9`],
    ["Failures", task.failures],
    ["Losses", task.losses],
    ["Batch", task.batch_id],
    ["Not before", task.run_at && html`<${When} at=${task.run_at} />`],
    ["Not started after", task.expires_at && html`<${When} at=${task.expires_at} />`],
    ["Trace", task.traceparent],
  ];
  return html`
    <dl class="facts">
      ${facts.filter(([, value]) => value !== null).map(([label, value]) => html`
        <div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}
    </dl>
  `;
}

function TaskActs({ task }) {
  const id = task.task_id;
  const cancel = (given) =>
    act(
      `cancel ${id}`,
      () =>
        ask("POST", `${pathOf(id)}/cancel`, { body: { reason: given.get("reason") } }),
      ({ status }) => (ENDED.has(status) ? "The task is cancelled." : "The task is being stopped."),
    );
  if (task.status === "failed") {
    return html`<${Act} name=${`replay ${id}`} onClick=${() => replay(task)}>Replay<//>`;
  }
  if (ENDED.has(task.status) || task.cancel_requested) return null;
  return html`
    <${AskThenAct} name=${`cancel ${id}`} label="Cancel" title="Cancel this task?" danger
      yes="Cancel the task" onYes=${cancel}>
      <p>If it runs, its process is stopped.</p>
      <label>Why <input name="reason" maxlength="500" /></label>
    <//>
  `;
}

const SAID = { good: "", bad: "Trouble: ", wait: "Waiting: ", run: "", off: "" };

function Story({ task }) {
  const history = known(historyPath(task.task_id));
  if (history?.missing) return html`<p class="empty" role="alert">${history.missing.message}</p>`;
  if (!history?.value) return html`<${Unknown} path=${historyPath(task.task_id)} />`;
  const workers = known("workers");
  const heardMs = (name) => {
    const found = workers?.value?.workers.find((one) => one.name === name);
    return found && found.last_seen_age_s * 1000 + Math.max(0, now() - workers.at);
  };
  return html`
    <ol class="story">
      ${story(task, history.value, heardMs).map((one, place) => html`
        <li key=${place} class=${`${one.mark} ${one.going ? "going" : ""}`}
          aria-current=${one.going ? "step" : undefined}>
          <div class="title"><span class="unseen">${SAID[one.mark]}</span
            ><strong>${one.title}</strong>
            ${one.at && html` <${When} at=${one.at} />`}</div>
          ${one.text && html`<p>${one.text}</p>`}
          ${one.beat && html`<p class="beat">${one.beat}</p>`}
          ${one.percent !== undefined && one.percent !== null && html`
            <progress max="100" value=${one.percent} aria-label="Progress"></progress>`}
          ${one.why && html`<p class="why">${one.why}</p>`}
          ${one.fix && html`<p class="fix"><span>What helps:</span> ${
            one.fix.map((piece) => html`<${Piece} ...${piece} />`)}</p>`}
          ${one.code && html`<p class="code">Code <code>${one.code}</code></p>`}
          ${one.tasks && html`<p>It waits for ${one.tasks.slice(0, 20).map((id) => html`
            <a key=${id} href=${`#/tasks/${id}`}>${id}</a> `)}${
            one.tasks.length > 20 ? `and ${one.tasks.length - 20} more` : ""}</p>`}
          ${one.detail && html`<details><summary>Traceback</summary>
            <pre tabindex="0" role="region" aria-label="Traceback">${one.detail}</pre></details>`}
          ${one.after && html`<p>${one.after}</p>`}
        </li>`)}
    </ol>
  `;
}

/** A piece of a next step; a command leads to what does the same on the page, if anything does. */
function Piece({ text, command, href, act: name }) {
  if (!command) return text;
  const written = html`<code>${command}</code>`;
  if (href) return html`<a href=${href}>${written}</a>`;
  if (!name || !state.rights.work) return written;
  const toButton = (event) => {
    event.preventDefault();
    document.querySelector(`button[data-act="${CSS.escape(name)}"]`)?.focus();
  };
  return html`<a href=${location.hash} onClick=${toButton}>${written}</a>`;
}

// -- a new one ------------------------------------------------------------------------------------

/** What is in the form survives a look elsewhere. */
const form = { type: "echo", payload: '{\n  "message": "hello"\n}', queue: "default", priority: 5 };

export class Submit extends Component {
  constructor() {
    super();
    // Sent again after no answer, it is still the same task.
    this.once = onceOnly();
  }

  render(_, { problem }) {
    const status = known("status")?.value;
    if (!status) return html`<${Unknown} path="status" />`;
    const types = status.task_types.filter(state.rights.type);
    const workers = known("workers")?.value?.workers || [];
    const change = (name) => (event) => {
      form[name] = event.target.value;
      this.once = onceOnly();
    };
    return html`
      <form class="sheet" onSubmit=${(event) => this.send(event)}>
        <label>Type
          <select name="task_type" onChange=${change("type")}>
            ${types.map((one) => html`
              <option key=${one} value=${one} selected=${one === form.type}>${one}</option>`)}
          </select></label>
        <div>
          <label>Payload, a JSON object
            <textarea name="payload" rows="6" spellcheck="false" onInput=${change("payload")}
              aria-invalid=${Boolean(problem)} aria-describedby="payload-problem"
              value=${form.payload}></textarea></label>
          <p id="payload-problem" class="problem" role="alert">${problem}</p>
        </div>
        <div class="beside">
          <label>Queue
            <input name="queue" required maxlength="64" value=${form.queue}
              onInput=${change("queue")} /></label>
          <label>Priority, 9 first
            <input name="priority" type="number" min="0" max="9" required value=${form.priority}
              onInput=${change("priority")} /></label>
          <label>Worker
            <select name="worker" onChange=${change("worker")}>
              <option value="">any</option>
              ${workers.map((one) => html`
                <option key=${one.name} value=${one.name} selected=${one.name === form.worker}
                  >${one.name}</option>`)}
            </select></label>
        </div>
        <div><button type="submit" data-act="submit"
          aria-disabled=${state.busy.has("submit")}>Submit</button></div>
      </form>
    `;
  }

  async send(event) {
    event.preventDefault();
    const given = new FormData(event.target);
    let payload;
    try {
      payload = parse(given.get("payload"));
      if (payload === null || typeof payload !== "object" || Array.isArray(payload)) {
        throw new SyntaxError("it must be an object, in braces");
      }
    } catch (error) {
      this.setState({ problem: `The payload is not a JSON object: ${error.message}` });
      event.target.elements.payload.focus();
      return;
    }
    this.setState({ problem: "" });
    const body = {
      task_type: given.get("task_type"),
      payload,
      queue: given.get("queue"),
      priority: Number(given.get("priority")),
    };
    if (given.get("worker")) body.requires = { worker: given.get("worker") };
    const answer = await act(
      "submit",
      () => ask("POST", "tasks", { body, headers: { "Idempotency-Key": this.once } }),
      ({ task_id: id }) => `Accepted as ${id}.`,
    );
    if (answer !== null) {
      this.once = onceOnly();
      location.hash = `#/tasks/${answer.task_id}`;
    }
  }
}
