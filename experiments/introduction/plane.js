/* Figures b, c and d: arrows, curves and runs on the plane of two parameters. */

const KINDS = ["maml", "fomaml", "reptile", "imaml"];
const fineSide = 2 * P.side - 1;
const square = { x: [-P.extent, P.extent], y: [-P.extent, P.extent], pad: [6, 6, 26, 34] };

function planePlot(id) {
  const plot = new Plot(id, square);
  plot.axes([-2, -1, 0, 1, 2], [-2, -1, 0, 1, 2], "", "", (t) => String(t).replace("-", "−"));
  plot.contours = element(plot.under, "g", { "clip-path": `url(#${id}-clip)` });
  element(plot.under, "rect", { class: "frame", ...plot.frame });
  return plot;
}

/* Contours at fixed quantiles of the values, darker where the loss is low. */
function drawContours(plot, values) {
  const sorted = Float64Array.from(values).sort();
  const shares = [0.01, 0.03, 0.07, 0.12, 0.19, 0.28, 0.38, 0.49, 0.6, 0.71, 0.81, 0.9, 0.96];
  plot.contours.replaceChildren();
  shares.forEach((share, i) => {
    const level = sorted[Math.floor(share * (sorted.length - 1))];
    const place = ([c, r]) => {
      const at = (k) => -P.extent + (2 * P.extent * k) / (fineSide - 1);
      return `${plot.x(at(c)).toFixed(1)},${plot.y(at(r)).toFixed(1)}`;
    };
    const d = contour(values, fineSide, level)
      .map(([a, b]) => `M${place(a)}L${place(b)}`)
      .join("");
    element(plot.contours, "path", {
      class: "contour",
      d,
      "stroke-opacity": (0.95 - 0.055 * i).toFixed(2),
    });
  });
}

function drawTaskMinima(plot) {
  pairs(lookup(P.support_centres)).forEach((point, i) => {
    const query = pairs(lookup(P.query_centres))[i];
    plot.line([point, query], "inner-path");
    plot.dot(point, "dot", 4.5);
    plot.dot(query, "ring", 4.5);
    plot.text(plot.x(point[0]) + 9, plot.y(point[1]) - 8, `task ${i + 1}`, "tick");
  });
}

/* The arrows at the chosen θ, and the gradient that they are judged by. */
function arrowsAt() {
  const [a, t, s, r, c] = [state.rate, state.steps, state.strength, state.row, state.column];
  const found = {};
  for (const kind of KINDS) {
    found[kind] = kind === "imaml" ? lookup(P.imaml, a, t, s, r, c) : lookup(P[kind], a, t, r, c);
  }
  const unrolled = state.objective === "unrolled";
  found.exact = unrolled ? lookup(P.exact_unrolled, a, t, r, c) : lookup(P.exact_implicit, s, r, c);
  return found;
}
function compare([x, y], [u, v]) {
  const [length, reference] = [Math.hypot(x, y), Math.hypot(u, v)];
  const angle = (Math.abs(Math.atan2(u * y - v * x, u * x + v * y)) * 180) / Math.PI;
  return { length, angle, ratio: length / reference - 1 };
}
const percent = (x) =>
  Math.abs(x) < 5e-4
    ? "0.0%"
    : Math.abs(x) > 99
      ? `×${format(x + 1)}`
      : `${x > 0 ? "+" : "−"}${(100 * Math.abs(x)).toFixed(Math.abs(x) < 1 ? 1 : 0)}%`;

function contourLoss() {
  return state.objective === "unrolled"
    ? lookup(P.unrolled_loss, state.rate, state.steps)
    : lookup(P.implicit_loss, state.strength);
}

function makeLandscape() {
  const plot = planePlot("landscape-plot");
  const knob = handle(plot, "Meta-parameters θ₁, θ₂; arrow keys move them", axis);
  draggable(
    plot,
    knob,
    (x, y) => set({ column: nearest(axis, x), row: nearest(axis, y) }),
    (dx, dy) =>
      set({ column: clamp(state.column + dx, P.side), row: clamp(state.row + dy, P.side) }),
  );
  return () => {
    const theta = [chosen("column"), chosen("row")];
    const [r, c] = [state.row, state.column];
    plot.clear();
    drawContours(plot, contourLoss());
    drawTaskMinima(plot);
    const tasks = P.support_centres.shape[0];
    const unrolled = state.objective === "unrolled";
    for (const i of range(tasks)) {
      const stops = unrolled
        ? range(state.steps + 1).map((t) => pairs(lookup(P.ends, state.rate, t, r, c))[i])
        : [pairs(lookup(P.minima, state.strength, r, c))[i]];
      plot.line([theta, ...stops], "inner-path");
      plot.dot(stops[stops.length - 1], "dot", 2.5);
    }
    const arrows = arrowsAt();
    for (const kind of [...KINDS, "exact"]) {
      plot.arrow(theta, [-arrows[kind][0], -arrows[kind][1]], kind);
    }
    knob.setAttribute("transform", `translate(${plot.x(theta[0])},${plot.y(theta[1])})`);
    knob.setAttribute("aria-valuenow", theta[0]);
    knob.setAttribute("aria-valuetext", theta.map(coordinate).join(", "));
    const rows = KINDS.map((kind) => {
      const off = compare(arrows[kind], arrows.exact);
      return [
        kind,
        `${TAGS[kind]}  ${NAMES[kind]}`,
        format(off.length),
        `${off.angle.toFixed(1)}°`,
        percent(off.ratio),
      ];
    });
    rows.push(["exact", "exact (dotted)", format(Math.hypot(...arrows.exact)), "", ""]);
    fillTable("landscape-table", rows);
    const loss = lookup(
      unrolled ? P.unrolled_loss : P.implicit_loss,
      ...(unrolled ? [state.rate, state.steps] : [state.strength]),
      2 * r,
      2 * c,
    );
    const at = [state.rate, state.steps, state.strength, r, c];
    readOut(
      "landscape-report",
      `Loss at θ ${format(loss)}. iMAML reports an inner residual of ` +
      `${format(lookup(P.inner_residual, ...at))} and a smallest curvature of ` +
      `${format(lookup(P.min_curvature, ...at))} (worst of the tasks).`,
    );
  };
}

function makeCurves() {
  const last = P.curves.shape[3] - 1;
  const plot = new Plot("curves-plot", { x: [0, last], y: [0, 1], pad: [28, 70, 44, 46] });
  return () => {
    const curves = P.rates.map((_, a) => lookup(P.curves, a, state.row, state.column));
    const top = Math.max(...curves.map((curve) => Math.max(...curve)));
    const unit = [0.1, 0.2, 0.5, 1, 2].find((u) => top / u <= 5) || 5;
    plot.domainY = [0, Math.ceil(top / unit) * unit];
    const ticks = range(Math.round(plot.domainY[1] / unit) + 1).map((i) => +(i * unit).toFixed(1));
    plot.axes(
      range(last / 4 + 1).map((i) => 4 * i),
      ticks,
      "inner steps",
      "query loss",
    );
    plot.clear();
    plot.cursor(chosen("steps"));
    const dashes = ["", "9 5", "2 5"];
    const labels = curves
      .map((curve, a) => ({ a, y: plot.y(curve[last]) }))
      .sort((p, q) => p.y - q.y);
    let free = plot.height - plot.bottom - 4;
    labels.reverse().forEach((label) => {
      label.y = Math.min(label.y, free);
      free = label.y - 17;
    });
    const kinds = ["maml", "imaml", "maml_recomputed"];
    curves.forEach((curve, a) => {
      plot.line(
        [...curve].map((y, t) => [t, y]),
        kinds[a % 3],
        { "stroke-dasharray": dashes[a % 3] },
      );
      element(plot.layer, "g", { class: kinds[a % 3] }).append(
        plot.dot([chosen("steps"), curve[chosen("steps")]], "mark", 5),
      );
    });
    labels.forEach(({ a, y }) => plot.text(plot.width - plot.right + 8, y + 4, `α ${P.rates[a]}`));
    readOut(
      "curves-report",
      `θ = (${coordinate(chosen("column"))}, ${coordinate(chosen("row"))}), ` +
      `after ${chosen("steps")} steps: ` +
      curves.map((curve, a) => `${format(curve[chosen("steps")])} at α ${P.rates[a]}`).join(", ") +
      ".",
    );
  };
}

function pathOf(kind) {
  const index = [
    state.rate,
    state.steps,
    ...(kind === "imaml" ? [state.strength] : []),
    state.start,
  ];
  return {
    path: pairs(lookup(data.runs.paths[kind], ...index)),
    loss: lookup(data.runs.losses[kind], ...index),
  };
}

function makeRuns() {
  const plot = planePlot("runs-plot");
  const first = (i) => pairs(lookup(data.runs.paths.maml, 0, 0, i))[0];
  const starts = range(P.starts_side ** 2).map((i) => {
    const [x, y] = first(i);
    const spot = element(plot.over, "g", {
      style: "cursor:pointer",
      transform: `translate(${plot.x(x)},${plot.y(y)})`,
    });
    element(spot, "circle", { r: 16, fill: "transparent" });
    spot.addEventListener("click", () => set({ start: i }));
    return element(spot, "circle", { class: "ring", r: 5 });
  });
  return () => {
    plot.clear();
    drawContours(plot, lookup(P.unrolled_loss, state.rate, state.steps));
    drawTaskMinima(plot);
    starts.forEach((ring, i) => ring.setAttribute("class", i === state.start ? "knob" : "ring"));
    const rows = KINDS.map((kind) => {
      const { path, loss } = pathOf(kind);
      plot.line(path, kind);
      const group = element(plot.layer, "g", { class: kind });
      path.forEach((point, i) =>
        group.append(plot.dot(point, "mark", i === path.length - 1 ? 6 : 2.6)),
      );
      const [x, y] = path[path.length - 1];
      const away = Math.max(Math.abs(x), Math.abs(y)) > P.extent ? " ↗" : "";
      element(plot.words, "g", { class: kind }).append(
        plot.text(plot.x(x) + 10, plot.y(y) - 8, TAGS[kind], "tag"),
      );
      return [
        kind,
        `${TAGS[kind]}  ${NAMES[kind]}`,
        `${coordinate(x)}, ${coordinate(y)}${away}`,
        format(loss),
      ];
    });
    fillTable("runs-table", rows);
  };
}
