// The one place that names the libraries; both are here as their makers published them.

import { Component, createRef, h, render } from "./preact-10.29.8.js";
import htm from "./htm-3.1.1.js";

const html = htm.bind(h);

export { Component, createRef, html, render };
