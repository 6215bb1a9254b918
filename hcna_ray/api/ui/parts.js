// Small parts that every view is made of.

import { now } from "./c1.js";
import { Component, createRef, html } from "./lib.js";
import { known, state } from "./state.js";
import { ago, clockTime, sentence } from "./words.js";

const SIGNS = { good: "✓", bad: "✕", wait: "…", run: "▶", off: "–" };

/** A word with a sign and a colour; the word alone says it all. */
export const Badge = ({ mark, children }) => html`
  <span class=${`badge ${mark}`}><span aria-hidden="true">${SIGNS[mark]} </span>${children}</span>
`;

const MARK_OF = {
  scheduled: "wait",
  queued: "wait",
  running: "run",
  completed: "good",
  failed: "bad",
  cancelled: "off",
  expired: "off",
};

export const Status = ({ of }) => html`<${Badge} mark=${MARK_OF[of] || "off"}>${of}<//>`;

/** An instant; how long ago it was is said beside it. */
export function When({ at, relative = false }) {
  if (!at) return html`<span aria-hidden="true">–</span><span class="unseen">not known</span>`;
  const passed = now() - Date.parse(at);
  const words = relative && passed >= 0 ? ago(passed) : clockTime(at, now());
  return html`<time datetime=${at} title=${at}>${words}</time>`;
}

/** A button that is out of action while what it does is under way. */
export function Act({ name, onClick, children, quiet = false, danger = false, disabled = false }) {
  const busy = state.busy.has(name);
  const kind = `${quiet ? "quiet" : ""} ${danger ? "danger" : ""}`;
  return html`
    <button type="button" class=${kind} data-act=${name} aria-disabled=${busy || disabled}
      onClick=${() => !busy && !disabled && onClick()}>${children}${busy ? " …" : ""}</button>
  `;
}

/** What stands where nothing is known of a path: that C1 is asked, or why it does not tell. */
export function Unknown({ path }) {
  const answer = known(path);
  const why = answer?.refusal || answer?.missing;
  return html`<p class="empty">${why ? sentence(why.message) : "Asking C1 …"}</p>`;
}

const classOf = (column, cell) => {
  if (!column.number) return column.kind || "";
  return cell === 0 ? "number zero" : "number";
};

/**
 * A table, which on a narrow screen becomes a list of cards. The roles are said besides: a browser
 * forgets them when rows are laid out otherwise.
 *
 * head: `[{label, number, kind}]`; rows: `[{key, cells}]`, the first cell naming its row.
 */
export function Table({ caption, head, rows, empty, look = "" }) {
  if (rows.length === 0) return html`<p class="empty">${empty}</p>`;
  return html`
    <table role="table" class=${look}>
      <caption class="unseen">${caption}</caption>
      <thead role="rowgroup"><tr role="row">
        ${head.map((column) => html`
          <th role="columnheader" scope="col" class=${classOf(column)}>${column.label}</th>`)}
      </tr></thead>
      <tbody role="rowgroup">
        ${rows.map((row) => html`
          <tr role="row" key=${row.key} data-row=${row.key}>
            ${row.cells.map((cell, place) => html`
              <${place ? "td" : "th"} role=${place ? "cell" : "rowheader"}
                scope=${place ? undefined : "row"} data-label=${head[place].label}
                class=${classOf(head[place], cell)}>${cell}<//>`)}
          </tr>`)}
      </tbody>
    </table>
  `;
}

/** How full something is. */
export function Gauge({ label, value, max, text }) {
  const filled = max > 0 ? Math.min(1, Math.max(0, value / max)) : 0;
  return html`
    <div class="gauge">
      <span>${label}</span>
      <meter min="0" max="1" value=${filled} aria-label=${`${label}: ${text}`}></meter>
      <span class="number">${text}</span>
    </div>
  `;
}

/** JSON for reading. */
export const Json = ({ of, label }) => html`
  <pre tabindex="0" role="region" aria-label=${label}>${JSON.stringify(of, null, 2)}</pre>
`;

/** A question before something that is not undone easily; the browser keeps the focus inside. */
export class Ask extends Component {
  constructor() {
    super();
    this.dialog = createRef();
  }

  componentDidMount() {
    this.dialog.current.showModal();
  }

  render({ title, children, yes, danger, onYes, onClose }) {
    const answer = (event) => {
      event.preventDefault();
      const given = new FormData(event.target);
      this.dialog.current.close();
      onYes(given);
    };
    return html`
      <dialog ref=${this.dialog} aria-labelledby="ask-title" onClose=${onClose}>
        <form onSubmit=${answer}>
          <h2 id="ask-title">${title}</h2>
          ${children}
          <div class="answers">
            <button type="submit" class=${danger ? "danger" : ""}>${yes}</button>
            <button type="button" class="quiet" onClick=${() => this.dialog.current.close()}
              >Leave it</button>
          </div>
        </form>
      </dialog>
    `;
  }
}

/** A button that asks first. */
export class AskThenAct extends Component {
  render({ name, label, children, disabled, danger, quiet, ...ask }, { asking }) {
    const close = () => this.setState({ asking: false });
    return html`
      <${Act} name=${name} disabled=${disabled} danger=${danger} quiet=${quiet || danger}
        onClick=${() => this.setState({ asking: true })}>${label}<//>
      ${asking && html`<${Ask} ...${ask} danger=${danger} onClose=${close}>${children}<//>`}
    `;
  }
}
