/* Figure e: the inner problem of implicit MAML, and its two errors. */

const RESIDUAL_LIMIT = 0.001; // of both: here the gradient is then right to a per cent

function makeInner() {
  const plot = planePlot("inner-plot");
  const E = data.inner;
  return () => {
    const [i, s, a, t] = [state.innerStart, state.innerStrength, state.innerRate, state.innerSteps];
    const theta = E.starts[i];
    plot.clear();
    drawContours(plot, lookup(P.task_losses, E.task));
    const solutions = P.strengths.map((_, k) => [...lookup(E.minimum, i, k)]);
    const minimum = pairs(lookup(P.support_centres))[E.task];
    plot.line([minimum, ...solutions, theta], "inner-path", {
      "stroke-dasharray": "1 5",
      "stroke-linecap": "round",
    });
    solutions.forEach((point, k) => plot.dot(point, k === s ? "dot" : "ring", k === s ? 6 : 4));
    plot.dot(minimum, "dot", 3);
    const path = pairs(lookup(E.paths, i, s, a)).slice(0, chosen("innerSteps") + 1);
    plot.line(path, "imaml", { "stroke-width": 1.6 });
    const dots = element(plot.layer, "g", { class: "imaml" });
    path.forEach((point) => dots.append(plot.dot(point, "mark", 3.2)));
    const found = lookup(E.grads, i, s, a, t);
    const exact = lookup(E.exact, i, s);
    plot.arrow(theta, [-found[0], -found[1]], "imaml");
    plot.arrow(theta, [-exact[0], -exact[1]], "exact");
    plot.dot(theta, "knob", 8);
    plot.text(plot.x(theta[0]) + 12, plot.y(theta[1]) + 16, "θ", "tag");
    const [x, y] = solutions[s];
    plot.text(plot.x(x) + 10, plot.y(y) - 9, "φ*", "tag");

    const residual = lookup(E.inner_residual, i, s, a, t);
    const solve = lookup(E.solve_residual, i, s, a, t);
    const curvature = lookup(E.min_curvature, i, s, a, t);
    const limit = lookup(E.rate_limit, i, s);
    const off = compare(found, exact);
    fillTable("inner-table", [
      ["limit", "rate limit 2/(λ<sub>max</sub>+λ) at φ*", format(limit)],
      ["inner_residual", "inner residual, reported", format(residual)],
      ["solve_residual", "solve residual, reported", format(solve)],
      ["min_curvature", "smallest curvature, reported", format(curvature)],
      ["angle", "true error, angle", off.length > 0 ? `${off.angle.toFixed(1)}°` : "no direction"],
      ["length", "true error, length", percent(off.ratio)],
    ]);
    const rate = chosen("innerRate");
    readOut(
      "inner-status",
      curvature <= 0
        ? "Not to be trusted: the curvature that the solver met is not positive, so it stopped. " +
          "This point is no minimum; take more steps, or a stronger spring."
        : rate > limit && residual > RESIDUAL_LIMIT
          ? "Not to be trusted: the rate is past the limit and the inner residual does not fall. " +
            "Lower the rate."
          : residual > RESIDUAL_LIMIT
            ? `Not there yet: the inner residual is above ${RESIDUAL_LIMIT}. Take more steps.`
            : solve > RESIDUAL_LIMIT
              ? `Not there yet: the solve residual is above ${RESIDUAL_LIMIT}. Take more CG steps.`
              : "The reports are in order: stationary, solved, a minimum. " +
                "What error is left comes from the inner residual.",
    );
  };
}

function makeSolver() {
  const E = data.solver;
  const most = E.error.shape[2];
  const plot = new Plot("solver-plot", {
    x: [1, most],
    y: [1e-8, 10],
    logY: true,
    pad: [52, 20, 44, 62],
  });
  const names = { imaml: "error", maml: "inner residual", reptile: "solve residual" };
  const dashes = { imaml: "", maml: "9 5", reptile: "2 5" };
  const powers = [-8, -6, -4, -2, 0];
  plot.axes(
    [1, 5, 10, 15, 20].filter((k) => k <= most),
    powers.map((p) => 10 ** p),
    "CG steps",
    "relative size",
    (v) => (Number.isInteger(v) ? String(v) : `1e${Math.round(Math.log10(v))}`.replace("-", "−")),
  );
  plot.legend(names, dashes);
  return () => {
    const [c, t, k] = [state.condition, state.descentSteps, state.cgSteps];
    const points = (values) => [...values].map((y, i) => [i + 1, Math.max(y, 1e-8)]);
    plot.clear();
    plot.cursor(k + 1);
    const residual = lookup(E.inner_residual, c, t);
    plot.line(points(range(most).map(() => residual)), "maml", { "stroke-dasharray": dashes.maml });
    plot.line(points(lookup(E.solve_residual, c, t)), "reptile", {
      "stroke-dasharray": dashes.reptile,
    });
    plot.line(points(lookup(E.error, c, t)), "imaml");
    readOut(
      "solver-report",
      `After ${chosen("descentSteps")} inner and ${k + 1} CG steps: error ${format(lookup(E.error, c, t, k))}; ` +
      `reported inner residual ${format(residual)}, solve residual ${format(lookup(E.solve_residual, c, t, k))}.`,
    );
  };
}
