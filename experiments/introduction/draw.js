"use strict";
/* Data, state, sliders and plots: what every figure shares. Nothing here computes a result. */

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = document.querySelector("svg").namespaceURI;
const range = (n) => Array.from({ length: n }, (_, i) => i);

/* The numbers of a packed array: two bytes times a scale, or the upper three of a float32. */
function decode(packed) {
  if (packed.values) return packed.values;
  const raw = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  if (packed.scale) {
    packed.values = Float64Array.from(new Int16Array(raw.buffer), (x) => x * packed.scale);
  } else {
    const whole = new Uint8Array((raw.length / 3) * 4);
    raw.forEach((byte, i) => { whole[Math.floor(i / 3) * 4 + 1 + (i % 3)] = byte; });
    packed.values = new Float32Array(whole.buffer);
  }
  return packed.values;
}

/* The entry at leading indices: a number, or a flat slice of the axes that are left. */
function lookup(packed, ...index) {
  const values = decode(packed);
  const size = packed.shape.slice(index.length).reduce((a, b) => a * b, 1);
  const offset = index.reduce((sum, i, axis) => sum * packed.shape[axis] + i, 0) * size;
  return index.length === packed.shape.length ? values[offset] : values.subarray(offset, offset + size);
}

const pairs = (flat) => range(flat.length / 2).map((i) => [flat[2 * i], flat[2 * i + 1]]);

function format(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e4 || size < 1e-3 ? x.toExponential(1) : size >= 100 ? x.toFixed(0) : x.toPrecision(3);
  return text.replace("-", "−").replace("e+", "e");
}
const coordinate = (x) => x.toFixed(1).replace("-", "−").replace(/^−0\.0$/, "0.0");

const NAMES = {
  maml: "MAML", fomaml: "first-order", reptile: "Reptile ÷ αT", imaml: "iMAML", exact: "exact",
  maml_recomputed: "MAML, steps recomputed", none: "fresh",
};
const TAGS = { maml: "M", fomaml: "F", reptile: "R", imaml: "i", exact: "" };

/* Choices are indices into the computed values; figures redraw when one of theirs changes. */
const P = data.plane;
const axis = range(P.side).map((i) => -P.extent + (2 * P.extent * i) / (P.side - 1));
const CHOICES = {
  rate: ["inner rate α", P.rates], steps: ["inner steps T", P.steps],
  strength: ["spring λ (iMAML)", P.strengths],
  column: ["θ₁", axis, coordinate], row: ["θ₂", axis, coordinate],
  start: ["start", range(P.starts_side ** 2).map((i) => i + 1)],
  innerRate: ["inner rate α", data.inner.rates], innerSteps: ["inner steps T", data.inner.steps],
  innerStrength: ["spring λ", P.strengths],
  condition: ["condition number", data.solver.conditions],
  descentSteps: ["inner steps", data.solver.steps],
  cgSteps: ["CG steps", range(data.solver.error.shape[2]).map((i) => i + 1)],
  fitSteps: ["inner steps", range(data.sinusoid.losses.shape[2])],
  costSteps: ["inner steps", data.costs.steps],
};
const middle = (values, part) => Math.round((values.length - 1) * part);
const state = { objective: "unrolled", innerStart: 0 };
for (const [name, [, values]] of Object.entries(CHOICES)) state[name] = middle(values, 0.5);
Object.assign(state, {
  column: middle(axis, 0.7), row: middle(axis, 0.25), start: 0,
  innerRate: middle(data.inner.rates, 0.3), innerSteps: middle(data.inner.steps, 0.6),
  cgSteps: middle(CHOICES.cgSteps[1], 0.25), fitSteps: middle(CHOICES.fitSteps[1], 0.5),
});
const chosen = (name) => CHOICES[name][1][state[name]];

const figures = [];
function figure(names, draw) { figures.push({ names, draw }); }
function set(changes) {
  const moved = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  Object.assign(state, changes);
  moved.forEach(showSliders);
  figures.filter((f) => f.names.some((name) => moved.includes(name))).forEach((f) => f.draw());
  showCalls();
}

function makeSliders() {
  document.querySelectorAll(".slider").forEach((box, i) => {
    const name = box.dataset.state;
    const [title, values] = CHOICES[name];
    box.innerHTML = `<label for="s${i}">${title}</label><output for="s${i}"></output>
      <input type="range" id="s${i}" min="0" max="${values.length - 1}" step="1">`;
    box.querySelector("input").addEventListener("input", (event) => set({ [name]: +event.target.value }));
  });
  Object.keys(CHOICES).forEach(showSliders);
  document.querySelectorAll("input[type=radio]").forEach((radio) => {
    radio.checked = String(state[radio.name]) === radio.value;
    radio.addEventListener("change", () => {
      set({ [radio.name]: radio.name === "innerStart" ? +radio.value : radio.value });
    });
  });
}
function showSliders(name) {
  document.querySelectorAll(`.slider[data-state="${name}"]`).forEach((box) => {
    const show = CHOICES[name][2] || String;
    const text = show(chosen(name));
    box.querySelector("input").value = state[name];
    box.querySelector("input").setAttribute("aria-valuetext", text);
    box.querySelector("output").textContent = text;
  });
}

/* The library's call beside each figure, with the values chosen, the seed and the version. */
const SETTINGS = {
  filters: data.game.filters, meta_steps: data.game.meta_steps, fitRate: data.sinusoid.rate,
  fitStrength: data.sinusoid.strength, fitMetaSteps: data.sinusoid.meta_steps,
};
function showCalls() {
  document.querySelectorAll(".call").forEach((code) => {
    const call = code.dataset.call.replace(/\s+/g, " ").trim();
    const filled = call.replace(/\{(\w+)\}/g, (_, name) => SETTINGS[name] ?? chosen(name));
    code.textContent = `${filled} · seed ${data.seed} · imaml_jax ${data.versions.imaml_jax}`;
  });
}

function element(parent, name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  parent.append(made);
  return made;
}

/* A plot with linear or logarithmic axes; `clear` empties the layer that is drawn anew. */
class Plot {
  constructor(id, { x, y, logX = false, logY = false, pad = [10, 14, 30, 46] }) {
    this.svg = byId(id);
    const [, , width, height] = this.svg.getAttribute("viewBox").split(" ").map(Number);
    [this.top, this.right, this.bottom, this.left] = pad;
    Object.assign(this, { width, height, domainX: x, domainY: y, logX, logY });
    this.under = element(this.svg, "g", { "aria-hidden": "true" });
    this.layer = element(this.svg, "g", { "clip-path": `url(#${id}-clip)` });
    this.frame = { x: this.left, y: this.top, width: width - this.left - this.right,
      height: height - this.top - this.bottom };
    element(element(this.svg, "clipPath", { id: `${id}-clip` }), "rect", this.frame);
    this.words = element(this.svg, "g");
    this.over = element(this.svg, "g");
    this.arrows = element(this.svg, "g", { "pointer-events": "none" });
  }
  static place(value, [low, high], log) {
    const f = log ? Math.log10 : (v) => v;
    return (f(Math.max(value, log ? 1e-300 : -1e300)) - f(low)) / (f(high) - f(low));
  }
  x(value) { return this.left + Plot.place(value, this.domainX, this.logX) * (this.width - this.left - this.right); }
  y(value) {
    const share = Math.max(-9, Math.min(9, Plot.place(value, this.domainY, this.logY)));
    return this.height - this.bottom - share * (this.height - this.top - this.bottom);
  }
  clear() {
    this.layer.replaceChildren();
    this.words.replaceChildren();
    this.arrows.replaceChildren();
  }
  axes(ticksX, ticksY, titleX, titleY, show = String) {
    this.under.replaceChildren();
    const [left, base] = [this.left, this.height - this.bottom];
    for (const t of ticksX) {
      const x = this.x(t);
      element(this.under, "line", { class: "grid", x1: x, x2: x, y1: this.top, y2: base });
      element(this.under, "text", { class: "tick", x, y: base + 18, "text-anchor": "middle" }, show(t));
    }
    for (const t of ticksY) {
      const y = this.y(t);
      element(this.under, "line", { class: "grid", x1: left, x2: this.width - this.right, y1: y, y2: y });
      element(this.under, "text", { class: "tick", x: left - 8, y: y + 4, "text-anchor": "end" }, show(t));
    }
    const end = { "text-anchor": "end", class: "label", x: this.width - this.right };
    element(this.under, "text", { ...end, y: base + 36 }, titleX);
    element(this.under, "text", { class: "label", x: left, y: this.top - 10 }, titleY);
  }
  line(points, kind, extra = {}) {
    const d = points.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`);
    return element(this.layer, "path", { class: `line ${kind}`, d: d.join(""), ...extra });
  }
  dot([x, y], kind, r = 4, extra = {}) {
    return element(this.layer, "circle", { class: kind, cx: this.x(x), cy: this.y(y), r, ...extra });
  }
  text(x, y, content, kind = "label", extra = {}) {
    return element(this.words, "text", { class: kind, x, y, ...extra }, content);
  }
  /* An arrow of the plane from a point along a vector; what leaves the plot is cut and marked. */
  arrow([x, y], [u, v], kind) {
    const [x0, y0, dx, dy] = [this.x(x), this.y(y), this.x(x + u) - this.x(x), this.y(y) - this.y(y + v)];
    const length = Math.hypot(dx, dy);
    if (!(length > 0.5)) return;
    const most = 1.2 * (this.width - this.left);
    const share = Math.min(1, most / length);
    const [ex, ey] = [dx / length, -dy / length];
    const [x1, y1] = [x0 + dx * share, y0 - dy * share];
    const size = Math.min(11, 0.6 * length);
    const group = element(this.arrows, "g", { class: kind });
    element(group, "line", { class: `arrow ${kind}`, x1: x0, y1: y0, x2: x1 - ex * size * 0.7,
      y2: y1 - ey * size * 0.7 });
    const wing = (side) => `${x1 - size * (ex + side * 0.45 * ey)},${y1 - size * (ey - side * 0.45 * ex)}`;
    element(group, "polygon", { class: "head", points: `${x1},${y1} ${wing(1)} ${wing(-1)}` });
    const at = { class: "tag", x: x1 + 11 * ex, y: y1 + 11 * ey + 4, "text-anchor": "middle" };
    element(group, "text", at, (TAGS[kind] ?? "") + (share < 1 ? "✂" : ""));
  }
  /* Names of lines above the plot, each beside a sample. */
  legend(names, dashes) {
    const step = Math.min(150, (this.width - this.left) / Object.keys(names).length);
    Object.entries(names).forEach(([kind, name], i) => {
      const group = element(this.under, "g", { class: kind });
      const x = this.left + 4 + i * step;
      element(group, "line", { class: "line", x1: x, x2: x + 28, y1: 8, y2: 8, "stroke-dasharray": dashes[kind] });
      element(group, "text", { class: "tag", x: x + 35, y: 12.5 }, name);
    });
  }
}

/* Lines through a square grid of values at one level, straight inside each cell. */
function contour(values, side, level) {
  const segments = [];
  const between = (a, b) => (level - a) / (b - a);
  for (let r = 0; r + 1 < side; r++) {
    for (let c = 0; c + 1 < side; c++) {
      const [a, b] = [values[r * side + c], values[r * side + c + 1]];
      const [d, e] = [values[(r + 1) * side + c], values[(r + 1) * side + c + 1]];
      const cuts = [];
      if (a < level !== b < level) cuts.push([c + between(a, b), r]);
      if (b < level !== e < level) cuts.push([c + 1, r + between(b, e)]);
      if (d < level !== e < level) cuts.push([c + between(d, e), r + 1]);
      if (a < level !== d < level) cuts.push([c, r + between(a, d)]);
      for (let k = 0; k + 1 < cuts.length; k += 2) segments.push([cuts[k], cuts[k + 1]]);
    }
  }
  return segments;
}

/* Every pointer and arrow-key movement of a handle, as a position on the plot. */
function draggable(plot, handle, moved, nudged) {
  const at = (event) => {
    const box = plot.svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * plot.width;
    const py = ((event.clientY - box.top) / box.height) * plot.height;
    const across = (px - plot.left) / (plot.width - plot.left - plot.right);
    const up = (plot.height - plot.bottom - py) / (plot.height - plot.top - plot.bottom);
    const mix = ([low, high], share) => low + share * (high - low);
    moved(mix(plot.domainX, across), mix(plot.domainY, up));
  };
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    at(event);
  });
  handle.addEventListener("pointermove", (event) => {
    if (handle.hasPointerCapture(event.pointerId)) at(event);
  });
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  handle.addEventListener("keydown", (event) => {
    if (!steps[event.key]) return;
    event.preventDefault();
    nudged(...steps[event.key]);
  });
}
const nearest = (values, x) => values.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(values[best] - x) ? i : best), 0);
const clamp = (i, count) => Math.max(0, Math.min(count - 1, i));

function handle(plot, label) {
  const made = element(plot.over, "g", { class: "handle", tabindex: 0, role: "slider",
    "aria-label": label, "aria-valuemin": plot.domainY[0], "aria-valuemax": plot.domainY[1] });
  element(made, "circle", { class: "halo", r: 22 });
  element(made, "circle", { class: "knob", r: 8 });
  return made;
}

function fillTable(id, rows) {
  byId(id).querySelector("tbody").innerHTML = rows
    .map(([kind, title, ...cells]) =>
      `<tr data-row="${kind}"><td class="${kind}">${title}</td>${cells.map((c) => `<td>${c}</td>`).join("")}</tr>`)
    .join("");
}
