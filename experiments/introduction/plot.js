/* Plots, contours, handles and tables: what every figure draws with. */

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
    this.frame = {
      x: this.left,
      y: this.top,
      width: width - this.left - this.right,
      height: height - this.top - this.bottom,
    };
    element(element(this.svg, "clipPath", { id: `${id}-clip` }), "rect", this.frame);
    this.words = element(this.svg, "g");
    this.over = element(this.svg, "g");
    this.arrows = element(this.svg, "g", { "pointer-events": "none" });
  }
  static place(value, [low, high], log) {
    const f = log ? Math.log10 : (v) => v;
    return (f(Math.max(value, log ? 1e-300 : -1e300)) - f(low)) / (f(high) - f(low));
  }
  x(value) {
    return (
      this.left + Plot.place(value, this.domainX, this.logX) * (this.width - this.left - this.right)
    );
  }
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
      element(
        this.under,
        "text",
        { class: "tick", x, y: base + 18, "text-anchor": "middle" },
        show(t),
      );
    }
    for (const t of ticksY) {
      const y = this.y(t);
      element(this.under, "line", {
        class: "grid",
        x1: left,
        x2: this.width - this.right,
        y1: y,
        y2: y,
      });
      element(
        this.under,
        "text",
        { class: "tick", x: left - 8, y: y + 4, "text-anchor": "end" },
        show(t),
      );
    }
    const end = { "text-anchor": "end", class: "label", x: this.width - this.right };
    element(this.under, "text", { ...end, y: base + 36 }, titleX);
    element(this.under, "text", { class: "label", x: left, y: this.top - 10 }, titleY);
  }
  cursor(value) {
    const x = this.x(value);
    const [y1, y2] = [this.top, this.height - this.bottom];
    return element(this.layer, "line", { class: "cursor", x1: x, x2: x, y1, y2 });
  }
  line(points, kind, extra = {}) {
    const d = points.map(
      ([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`,
    );
    return element(this.layer, "path", { class: `line ${kind}`, d: d.join(""), ...extra });
  }
  dot([x, y], kind, r = 4, extra = {}) {
    return element(this.layer, "circle", {
      class: kind,
      cx: this.x(x),
      cy: this.y(y),
      r,
      ...extra,
    });
  }
  text(x, y, content, kind = "label", extra = {}) {
    return element(this.words, "text", { class: kind, x, y, ...extra }, content);
  }
  /* An arrow of the plane from a point along a vector; what would leave the plot is cut at its edge and marked. */
  arrow([x, y], [u, v], kind) {
    const [x0, y0, dx, dy] = [
      this.x(x),
      this.y(y),
      this.x(x + u) - this.x(x),
      this.y(y) - this.y(y + v),
    ];
    const length = Math.hypot(dx, dy);
    if (!(length > 0.5)) return;
    const room = (from, way, low, size) =>
      way ? (way > 0 ? low + size - from : from - low) / Math.abs(way) : 1;
    const { x: left, y: top, width, height } = this.frame;
    const share = Math.min(1, room(x0, dx, left, width), room(y0, -dy, top, height));
    const [ex, ey] = [dx / length, -dy / length];
    const [x1, y1] = [x0 + dx * share, y0 - dy * share];
    const size = Math.min(11, 0.6 * length);
    const group = element(this.arrows, "g", { class: kind });
    element(group, "line", {
      class: `arrow ${kind}`,
      x1: x0,
      y1: y0,
      x2: x1 - ex * size * 0.7,
      y2: y1 - ey * size * 0.7,
    });
    const wing = (side) =>
      `${x1 - size * (ex + side * 0.45 * ey)},${y1 - size * (ey - side * 0.45 * ex)}`;
    element(group, "polygon", { class: "head", points: `${x1},${y1} ${wing(1)} ${wing(-1)}` });
    const at = { class: "tag", x: x1 + 11 * ex, y: y1 + 11 * ey + 4, "text-anchor": "middle" };
    element(group, "text", at, (TAGS[kind] ?? "") + (share < 1 ? "✂" : ""));
  }
  /* Names of lines above the plot, each beside a sample. */
  legend(names, dashes) {
    const step = Math.min(190, (this.width - this.left) / Object.keys(names).length);
    Object.entries(names).forEach(([kind, name], i) => {
      const group = element(this.under, "g", { class: kind });
      const x = this.left + 4 + i * step;
      element(group, "line", {
        class: "line",
        x1: x,
        x2: x + 28,
        y1: 8,
        y2: 8,
        "stroke-dasharray": dashes[kind],
      });
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

/* Every pointer and key movement of a handle, as a position on the plot. */
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
  const steps = {
    ArrowLeft: [-1, 0],
    ArrowRight: [1, 0],
    ArrowUp: [0, 1],
    ArrowDown: [0, -1],
    PageUp: [0, 5],
    PageDown: [0, -5],
    Home: [-Infinity, 0],
    End: [Infinity, 0],
  };
  handle.addEventListener("keydown", (event) => {
    if (!steps[event.key]) return;
    event.preventDefault();
    nudged(...steps[event.key]);
  });
}
const nearest = (values, x) =>
  values.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(values[best] - x) ? i : best), 0);
const clamp = (i, count) => Math.max(0, Math.min(count - 1, i));

/* What is dragged among these values, from the lowest to the highest. */
function handle(plot, label, values) {
  const made = element(plot.over, "g", {
    class: "handle",
    tabindex: 0,
    role: "slider",
    "aria-label": label,
    "aria-valuemin": values[0],
    "aria-valuemax": values[values.length - 1],
  });
  element(made, "circle", { class: "halo", r: 22 });
  element(made, "circle", { class: "knob", r: 8 });
  return made;
}

function fillTable(id, rows) {
  byId(id).querySelector("tbody").innerHTML = rows
    .map(
      ([kind, title, ...cells]) =>
        `<tr data-row="${kind}"><th scope="row" class="${kind}">${title}</th>${cells.map((c) => `<td>${c}</td>`).join("")}</tr>`,
    )
    .join("");
}

/* A read-out is shown at once, and spoken when it has stood still in the figure that is in use. */
let speaking;
function readOut(id, text) {
  byId(id).textContent = text;
  if (!byId(id).closest("figure").contains(document.activeElement)) return;
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    byId("spoken").textContent = text;
  }, 600);
}
