// The page: who is signed in, what is in front, and where the focus is.

import { now } from "./c1.js";
import { Component, createRef, html, render } from "./lib.js";
import { Machines } from "./machines.js";
import { begin, dismiss, known, refresh, refusals, signIn, signOut, state } from "./state.js";
import { Submit, Task, taskNeeds } from "./task.js";
import { Failed, LIVE, LiveTasks, Queues, Tasks, failedPath, listPath } from "./tasks.js";
import { ago } from "./words.js";

// -- where we are ---------------------------------------------------------------------------------

function routeOf(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [name, id] = path.split("/").map(decodeURIComponent);
  const found = { name: name || "overview", id, query: new URLSearchParams(query) };
  if (found.name === "tasks" && id) found.name = "task";
  return found;
}

let route = routeOf(location.hash);

const VIEWS = {
  overview: {
    title: () => "Overview",
    needs: () => [LIVE],
    view: () => html`
      <h2>Machines</h2><${Machines} />
      <h2>Queues</h2><${Queues} />
      <h2>Waiting and running</h2><${LiveTasks} />`,
  },
  tasks: {
    title: () => "Tasks",
    needs: () => [listPath(route)],
    view: () => html`<${Tasks} route=${route} />`,
  },
  task: {
    title: () => `Task ${route.id}`,
    heading: () => html`Task <code>${route.id}</code>`,
    needs: () => taskNeeds(route.id),
    view: () => html`<${Task} id=${route.id} key=${route.id} />`,
  },
  failed: {
    title: () => "Failed tasks",
    needs: () => [failedPath(route)],
    view: () => html`<${Failed} route=${route} />`,
  },
  submit: {
    title: () => "Submit a task",
    needs: () => [],
    view: () =>
      state.rights.work
        ? html`<${Submit} />`
        : html`<p class="empty">This key watches: it submits nothing.</p>`,
  },
};

const inFront = () => VIEWS[route.name] || null;

// -- what is on the page --------------------------------------------------------------------------

class SignIn extends Component {
  componentDidUpdate(before) {
    const { problem, kept } = this.props;
    // Where C1 is asked again by itself nothing is to be typed, and the focus stays where it is.
    if (problem && !kept && problem !== before.problem) document.getElementById("key").focus();
  }

  render({ problem, kept, busy }) {
    const send = (event) => {
      event.preventDefault();
      const said = new FormData(event.target).get("key").trim();
      if (said) signIn(said);
    };
    const forget = () => {
      signOut();
      document.getElementById("key").focus();
    };
    return html`
      <main class="sign-in">
        <h1><img src="ui/icon.svg" alt="" width="32" height="32" />hcna</h1>
        <form class="sheet" onSubmit=${send}>
          <div>
            <label>API key
              <input id="key" name="key" type="password" required autocomplete="off"
                aria-describedby="key-hint key-problem" aria-invalid=${Boolean(problem && !kept)} /></label>
            <p id="key-problem" class="problem" role="alert">${problem}</p>
          </div>
          <p id="key-hint" class="hint">On M1 <code>hcna env</code> prints yours
            and <code>hcna keys create</code> makes others. It stays in this tab until you sign out
            or close it.</p>
          <button type="submit" aria-disabled=${busy}
            >${busy ? "Signing in …" : "Sign in"}</button>
          ${kept && html`<button type="button" class="quiet" onClick=${forget}
            >Forget the key</button>`}
        </form>
      </main>
    `;
  }
}

function Banner() {
  const status = known("status")?.value;
  if (!state.contact.ok) {
    const last = state.contact.at ? `, last known ${ago(now() - state.contact.at)}` : "";
    return html`<p class="banner bad">C1 is unreachable${last}. It is asked again by itself.</p>`;
  }
  return html`
    ${status?.moderator === null && (status.moderator_waits_for_store
      ? html`<p class="banner bad">M1 waits for its task store: nothing is started now, and nothing
          can be changed. It tries the store again by itself.</p>`
      : html`<p class="banner bad">M1 does not answer: nothing is started now, and nothing can be
          changed. What was accepted is on disk. It is started again by itself.</p>`)}
    ${status?.store_readable === false && html`
      <p class="banner bad">C1 cannot read the task store: which tasks there are is not known now.
      It tries again by itself.</p>`}
  `;
}

/** What C1 refuses to tell just now. It is said once to those who listen, without a growing age. */
const Refusals = () =>
  refusals().map(({ code, text, at }) => html`
    <p key=${code} class="banner bad refusal">${text} ${at
      ? `What is refused is shown as last known ${ago(now() - at)}.`
      : "Nothing is known of it yet."} C1 is asked again by itself.</p>`);

function Notice() {
  if (!state.notice) return null;
  const { good, text } = state.notice;
  return html`
    <div class=${`notice ${good ? "good" : "bad"}`}>
      <span>${text}</span>
      <button type="button" class="quiet" onClick=${dismiss}>Dismiss</button>
    </div>
  `;
}

function Nav() {
  const failed = Object.values(known("status")?.value?.queues || {})
    .map((one) => one.failed || 0)
    .reduce((sum, one) => sum + one, 0);
  const links = [
    ["overview", "#/", "Overview"],
    ["tasks", "#/tasks", "Tasks"],
    ["failed", "#/failed", `Failed${failed ? ` (${failed})` : ""}`],
    ...(state.rights.work ? [["submit", "#/submit", "Submit"]] : []),
  ];
  const current = route.name === "task" ? "tasks" : route.name;
  return html`
    <nav aria-label="Views"><ul>
      ${links.map(([name, href, label]) => html`
        <li key=${name}><a href=${href} aria-current=${current === name ? "page" : undefined}
          >${label}</a></li>`)}
    </ul></nav>
  `;
}

class App extends Component {
  constructor() {
    super();
    this.title = createRef();
  }

  componentDidUpdate() {
    const front = state.who === null ? null : route;
    if (this.shown === front) return;
    this.shown = front;
    // Another view: whoever listens, or uses the keyboard, begins at its heading.
    if (this.title.current) {
      this.title.current.focus();
      window.scrollTo(0, 0);
    }
  }

  render() {
    const found = inFront();
    const title = state.who === null ? "Sign in" : found ? found.title() : "Nothing here";
    document.title = `${title} – hcna`;
    if (state.who === null) {
      return html`<${SignIn} problem=${state.signInProblem} kept=${state.keyKept}
        busy=${state.signing} />`;
    }
    const { owner, role } = state.who;
    return html`
      <a class="skip" href="#main" onClick=${(event) => {
        event.preventDefault();
        this.title.current.focus();
      }}>Skip to the content</a>
      <header>
        <a class="brand" href="#/" aria-label="hcna, overview">
          <img src="ui/icon.svg" alt="" width="24" height="24" /> hcna</a>
        <${Nav} />
        <p class="who"><span>${owner}, ${role}</span>
          <button type="button" class="quiet" onClick=${() => signOut()}>Sign out</button></p>
      </header>
      <div role="status"><${Banner} /></div>
      <div><${Refusals} /></div>
      <div role=${state.notice && !state.notice.good ? "alert" : "status"}><${Notice} /></div>
      <main id="main" class=${state.contact.ok ? "" : "stale"}>
        <h1 ref=${this.title} tabindex="-1">${found?.heading ? found.heading() : title}</h1>
        ${found ? found.view() : html`<p class="empty">There is no such view.</p>`}
      </main>
      <footer><p>${state.live ? "Told of changes as they happen." : "Asks every two seconds."}
        ${" "}<a href="docs">HTTP API</a></p></footer>
    `;
  }
}

const draw = () => render(html`<${App} tick=${now()} />`, document.getElementById("page"));

window.addEventListener("hashchange", () => {
  route = routeOf(location.hash);
  draw();
  if (state.who !== null) refresh();
});

begin({ draw, needs: () => inFront()?.needs() || [] });
draw();
