"use strict";
/* The data, what is chosen, and its sliders. Nothing on the page computes a result. */

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
    raw.forEach((byte, i) => {
      whole[Math.floor(i / 3) * 4 + 1 + (i % 3)] = byte;
    });
    packed.values = new Float32Array(whole.buffer);
  }
  return packed.values;
}

/* The entry at leading indices: a number, or a flat slice of the axes that are left. */
function lookup(packed, ...index) {
  const values = decode(packed);
  const size = packed.shape.slice(index.length).reduce((a, b) => a * b, 1);
  const offset = index.reduce((sum, i, axis) => sum * packed.shape[axis] + i, 0) * size;
  return index.length === packed.shape.length
    ? values[offset]
    : values.subarray(offset, offset + size);
}

const pairs = (flat) => range(flat.length / 2).map((i) => [flat[2 * i], flat[2 * i + 1]]);

function format(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text =
    size >= 1e4 || size < 1e-3 ? x.toExponential(1) : size >= 100 ? x.toFixed(0) : x.toPrecision(3);
  return text.replace("-", "−").replace("e+", "e");
}
const coordinate = (x) =>
  x
    .toFixed(1)
    .replace("-", "−")
    .replace(/^−0\.0$/, "0.0");

const NAMES = {
  maml: "MAML",
  fomaml: "first-order",
  reptile: "Reptile ÷ αT",
  imaml: "iMAML",
  exact: "exact",
  maml_recomputed: "MAML, steps recomputed",
  none: "fresh",
};
const TAGS = { maml: "M", fomaml: "F", reptile: "R", imaml: "i", exact: "" };

/* Choices are indices into the computed values; figures redraw when one of theirs changes. */
const P = data.plane;
const axis = range(P.side).map((i) => -P.extent + (2 * P.extent * i) / (P.side - 1));
const CHOICES = {
  rate: ["inner rate α", P.rates],
  steps: ["inner steps T", P.steps],
  strength: ["spring λ (iMAML)", P.strengths],
  column: ["θ₁", axis, coordinate],
  row: ["θ₂", axis, coordinate],
  start: ["start", range(P.starts_side ** 2).map((i) => i + 1)],
  innerRate: ["inner rate α", data.inner.rates],
  innerSteps: ["inner steps T", data.inner.steps],
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
  column: middle(axis, 0.7),
  row: middle(axis, 0.25),
  start: 0,
  innerRate: middle(data.inner.rates, 0.3),
  innerSteps: middle(data.inner.steps, 0.6),
  cgSteps: middle(CHOICES.cgSteps[1], 0.25),
  fitSteps: middle(CHOICES.fitSteps[1], 0.5),
});
const chosen = (name) => CHOICES[name][1][state[name]];

const figures = [];
function figure(names, draw) {
  figures.push({ names, draw });
}
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
    box
      .querySelector("input")
      .addEventListener("input", (event) => set({ [name]: +event.target.value }));
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
  filters: data.game.filters,
  meta_steps: data.game.meta_steps,
  fitRate: data.sinusoid.rate,
  fitStrength: data.sinusoid.strength,
  fitMetaSteps: data.sinusoid.meta_steps,
};
function showCalls() {
  document.querySelectorAll(".call").forEach((code) => {
    const call = code.dataset.call.replace(/\s+/g, " ").trim();
    const filled = call.replace(/\{(\w+)\}/g, (_, name) => SETTINGS[name] ?? chosen(name));
    code.textContent = `${filled} · seed ${data.seed} · imaml_jax ${data.versions.imaml_jax}`;
  });
}
