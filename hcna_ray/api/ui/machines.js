// The machines: M1 decides, C1 is what others see, W1 and the others run what there is to run.

import { ask, now } from "./c1.js";
import { html } from "./lib.js";
import { Act, AskThenAct, Badge, Gauge, Unknown, When } from "./parts.js";
import { act, known, state } from "./state.js";
import { ago, bytes, shortName, workerInWords } from "./words.js";

/** How long ago something was said, and since then nothing was heard. */
const ageOf = (answer, saidMs = 0) => saidMs + (answer ? Math.max(0, now() - answer.at) : 0);

// The last that M1 itself said: it is shown, with its age, while M1 does not answer.
let lastM1 = null;

export function Machines() {
  const status = known("status");
  const workers = known("workers");
  if (!status?.value) return html`<${Unknown} path="status" />`;
  const moderator = status.value.moderator;
  if (moderator !== null) lastM1 = { value: moderator, at: status.at };
  return html`
    <ul class="machines">
      <${Moderator} status=${status} last=${lastM1} />
      <${Composite} status=${status} />
      ${workers?.value?.workers.map((worker) => html`
        <${Worker} key=${worker.name} worker=${worker} answer=${workers}
          untold=${workers.refusal || !workers.value.moderator_connected} />`)}
      ${workers?.value?.workers.length === 0 && html`
        <li class="machine w"><div class="top"><h3><span class="name">W1</span></h3></div>
          <p>No worker has joined. On another machine: <code>hcna join CODE</code>; on this one
          <code>hcna up</code> starts one.</p></li>`}
      ${!workers?.value && html`<li class="machine w"><${Unknown} path="workers" /></li>`}
    </ul>
  `;
}

/** Words for what was so once, and may be otherwise by now. */
const OLD = new Set(["unreachable", "not known", "waits"]);

/** A machine: what it is, how it is (`mark`, `word` and a text), what it does, what can be done. */
const Card = ({ kind, name, role, mark, word, text, id, children, acts }) => html`
  <li class=${`machine ${kind} ${OLD.has(word) ? "old" : ""}`}
    data-machine=${name}>
    <div class="top">
      <h3><span class="name">${name}</span> <span class="role">${role}</span></h3>
      <${Badge} mark=${mark}>${word}<//>
    </div>
    ${text && html`<p class="said">${text}</p>`}
    ${children}
    <div class="foot"><span class="node">${id}</span>${acts}</div>
  </li>
`;

const reached = { mark: "good", word: "answers" };
const unreachable = (text) => ({ mark: "bad", word: "unreachable", text });

function moderatorInWords(status, last) {
  const text = last ? `last known ${ago(ageOf(last))}` : "nothing is known of it yet";
  if (!state.contact.ok) return unreachable(text);
  if (status.refusal) return { mark: "bad", word: "not known", text };
  if (status.value.moderator !== null) return reached;
  if (!status.value.moderator_waits_for_store) return unreachable(text);
  return { mark: "bad", word: "waits", text: `for its task store; ${text}` };
}

function Moderator({ status, last }) {
  const how = moderatorInWords(status, last);
  const it = last?.value;
  return html`
    <${Card} kind="m" name=${it ? shortName(it.node_id) : "M1"} role="decides" ...${how}
      id=${it?.node_id}>
      ${it && html`
        <dl class="facts">
          <div><dt>Open tasks</dt><dd>${it.open_tasks}</dd></div>
          <div><dt>Running</dt><dd>${it.live_attempts}</dd></div>
          <div><dt>Workers online</dt><dd>${it.workers_online} of ${it.workers}</dd></div>
          <div><dt>Started</dt><dd><${When} at=${it.started_at} relative /></dd></div>
        </dl>`}
    <//>
  `;
}

function Composite({ status }) {
  const it = status.value;
  const { in_progress: inside, budget } = it.requests.read;
  const how = state.contact.ok ? reached : unreachable(`last known ${ago(ageOf(state.contact))}`);
  return html`
    <${Card} kind="c" name=${shortName(it.node_id)} role="this API" ...${how} id=${it.node_id}>
      <${Gauge} label="Reads" value=${inside} max=${budget} text=${`${inside} of ${budget}`} />
      <dl class="facts">
        <div><dt>Version</dt><dd>${it.versions["hcna-ray"]}</dd></div>
        <div><dt>Started</dt><dd><${When} at=${it.started_at} relative /></dd></div>
      </dl>
    <//>
  `;
}

function Worker({ worker, answer, untold }) {
  const age = ageOf(answer, worker.last_seen_age_s * 1000);
  const how = workerInWords(worker, age, untold || !state.contact.ok);
  const load = worker.telemetry.payload || {};
  const { cpu = 0, mem_gb: memory = 0, gpu = 0 } = worker.resources;
  const taken = Math.max(0, cpu - (worker.free.cpu ?? cpu));
  return html`
    <${Card} kind="w" name=${worker.name} role="runs tasks" ...${how} id=${worker.node_id}
      acts=${state.rights.machines && html`<${WorkerActs} worker=${worker} />`}>
      <div class="gauges">
      ${load.cpu_percent !== undefined && html`
        <${Gauge} label="CPU" value=${load.cpu_percent} max=${100}
          text=${`${Math.round(load.cpu_percent)} %`} />`}
      ${load.memory_percent !== undefined && html`
        <${Gauge} label="Memory" value=${load.memory_percent} max=${100}
          text=${`${Math.round(load.memory_percent)} %`} />`}
      ${cpu > 0 && !untold && html`
        <${Gauge} label="Reserved" value=${taken} max=${cpu} text=${`${taken} of ${cpu} CPU`} />`}
      </div>
      <dl class="facts">
        ${!untold && html`<div><dt>Running</dt><dd>${worker.running.length}</dd></div>`}
        ${memory > 0 && html`<div><dt>Has</dt><dd>${cpu} CPU, ${Math.round(memory)} GB${
          gpu ? `, ${gpu} GPU` : ""}</dd></div>`}
        ${load.disk_free_bytes !== undefined && html`
          <div><dt>Disk free</dt><dd>${bytes(load.disk_free_bytes)}</dd></div>`}
        ${worker.draining_until && html`
          <div><dt>Until</dt><dd><${When} at=${worker.draining_until} /></dd></div>`}
        ${Math.abs(worker.clock_ahead_s) >= 1 && html`
          <div><dt>Clock</dt><dd>${worker.clock_ahead_s} s ahead of M1</dd></div>`}
      </dl>
      ${worker.running.length > 0 && html`
        <ul class="runs">${worker.running.slice(0, 5).map((one) => html`
          <li key=${one.task_id}><a href=${`#/tasks/${one.task_id}`}>${one.task_type}</a>
            <span>started <${When} at=${one.started_at} relative /></span></li>`)}
        ${worker.running.length > 5 && html`<li>and ${worker.running.length - 5} more</li>`}
        </ul>`}
    <//>
  `;
}

function WorkerActs({ worker }) {
  const name = worker.name;
  const path = (what) => `workers/${encodeURIComponent(name)}/${what}`;
  const away = worker.state === "gone" || worker.state === "asleep";
  const out = worker.state === "draining" || worker.state === "cordoned";
  const back = () =>
    act(`uncordon ${name}`, () => ask("POST", path("uncordon")), () => `${name} gets work again.`);
  const drain = (given) => {
    const deadline = Number(given.get("deadline_s"));
    act(
      `drain ${name}`,
      () => ask("POST", path("drain"), { body: { deadline_s: deadline } }),
      () => `${name} is being drained.`,
    );
  };
  if (out) {
    return html`<${Act} name=${`uncordon ${name}`} onClick=${back}>Give ${name} work again<//>`;
  }
  if (away) return null;
  return html`
    <${AskThenAct} name=${`drain ${name}`} label=${`Drain ${name}`} title=${`Drain ${name}?`} quiet
      yes=${`Drain ${name}`} onYes=${drain}>
      <p>It gets nothing new and finishes what it runs. What still runs after the deadline is
      stopped, and queued for other workers.</p>
      <label>Deadline in seconds
        <input name="deadline_s" type="number" min="0" max="86400" defaultValue="600"
          required /></label>
    <//>
  `;
}
