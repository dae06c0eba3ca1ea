/* Figures a, f and g: the game, the sinusoids and the costs; then everything is set going. */

function makeGame() {
  const G = data.game;
  const ways = G.probabilities[0].length;
  const score = { you: 0, model: 0, played: 0 };
  let round = 0;
  let open = true;
  const tile = (box, row, column) => {
    box.style.backgroundImage = `url(${G.sprite})`;
    box.style.backgroundSize = `${100 * (ways + 1)}% ${100 * G.answers.length}%`;
    const share = (i, count) => (count > 1 ? (100 * i) / (count - 1) : 0);
    box.style.backgroundPosition = `${share(column, ways + 1)}% ${share(row, G.answers.length)}%`;
  };
  byId("game-query").setAttribute("aria-label", "The query character");
  const buttons = range(ways).map((i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = `<div class="tile"></div>${i + 1}<div class="bar"><i></i></div>`;
    button.setAttribute("aria-label", `Support character ${i + 1}`);
    button.addEventListener("click", () => answer(i));
    byId("game-choices").append(button);
    return button;
  });
  function answer(guess) {
    if (!open) return;
    open = false;
    const chances = G.probabilities[round];
    const model = chances.indexOf(Math.max(...chances));
    const right = G.answers[round];
    score.played += 1;
    score.you += guess === right;
    score.model += model === right;
    buttons.forEach((button, i) => {
      button.classList.toggle("right", i === right);
      button.classList.toggle("wrong", i === guess && guess !== right);
      button.querySelector("i").style.width = `${100 * chances[i]}%`;
    });
    const chance = `${(100 * chances[model]).toFixed(0)}%`;
    byId("game-verdict").textContent =
      `${guess === right ? "Yes" : `No, it is ${right + 1}`}. ` +
      `The model says ${model + 1}, with probability ${chance}${model === right ? "" : ", and is wrong"}.`;
    byId("game-score").textContent = `You ${score.you}, model ${score.model}, of ${score.played}`;
  }
  function show() {
    open = true;
    tile(byId("game-query"), round, ways);
    buttons.forEach((button, i) => {
      tile(button.querySelector(".tile"), round, i);
      button.classList.remove("right", "wrong");
      button.querySelector("i").style.width = "0";
    });
    byId("game-verdict").textContent = "Which one is it?";
  }
  byId("game-next").addEventListener("click", () => {
    round = (round + 1) % G.answers.length;
    show();
  });
  byId("game-accuracy").textContent =
    `On ${G.test_tasks} such tasks of five queries a class it is right in ${(100 * G.accuracy).toFixed(1)} ± ` +
    `${(100 * G.ci95).toFixed(1)}% (95% interval over tasks).`;
  show();
}

function makeSinusoid() {
  const S = data.sinusoid;
  const kinds = ["none", "maml", "imaml"];
  const names = { none: "fresh", maml: "MAML", imaml: "iMAML" };
  const dashes = { none: "2 6", maml: "", imaml: "10 5" };
  const plot = new Plot("sinusoid-plot", { x: [-5, 5], y: [-6, 6], pad: [28, 14, 44, 40] });
  plot.axes([-4, -2, 0, 2, 4], [-6, -4, -2, 0, 2, 4, 6], "x", "", (t) =>
    String(t).replace("-", "−"),
  );
  plot.legend(names, dashes);
  const knobs = S.points.map((x, k) => {
    const knob = handle(plot, `Support point at x = ${x}; arrow keys move it`, S.levels);
    draggable(
      plot,
      knob,
      (_, y) => set({ [`level${k}`]: nearest(S.levels, y) }),
      (dx, dy) => set({ [`level${k}`]: clamp(state[`level${k}`] + dx + dy, S.levels.length) }),
    );
    return knob;
  });
  byId("level-count").textContent = S.levels.length;
  byId("input-count").textContent = S.inputs.length;
  const chosenSet = () =>
    S.points.reduce((sum, _, k) => sum * S.levels.length + state[`level${k}`], 0);
  return () => {
    plot.clear();
    const index = chosenSet();
    kinds.forEach((kind, i) => {
      const curve = lookup(S.fits, i, index, state.fitSteps);
      plot.line(
        [...curve].map((y, n) => [S.inputs[n], y]),
        kind,
        { "stroke-dasharray": dashes[kind] },
      );
    });
    knobs.forEach((knob, k) => {
      const y = S.levels[state[`level${k}`]];
      knob.setAttribute("transform", `translate(${plot.x(S.points[k])},${plot.y(y)})`);
      knob.setAttribute("aria-valuetext", String(y));
      knob.setAttribute("aria-valuenow", y);
    });
    readOut(
      "sinusoid-report",
      `Mean squared error on the three points after ${state.fitSteps} steps: ` +
      kinds
        .map((kind, i) => `${names[kind]} ${format(lookup(S.losses, i, index, state.fitSteps))}`)
        .join(", ") +
      ".",
    );
  };
}

function makeCosts() {
  const C = data.costs;
  const kinds = ["maml", "maml_recomputed", "fomaml", "reptile", "imaml"];
  const last = C.steps[C.steps.length - 1];
  const panels = [
    ["memory-plot", "bytes", 1 / 1024, "memory, KiB"],
    ["time-plot", "seconds", 1e3, "time, ms"],
  ];
  const plots = panels.map(([id, field, scale, title]) => {
    const top = 1.08 * scale * Math.max(...kinds.flatMap((kind) => C[kind][field]));
    const unit = 10 ** Math.floor(Math.log10(top));
    const step = [1, 2, 5].map((m) => (m * unit) / 2).find((u) => top / u <= 6) || unit * 5;
    const plot = new Plot(id, { x: [0, 1.03 * last], y: [0, top], pad: [28, 12, 44, 52] });
    const ticks = range(Math.floor(top / step) + 1).map((i) => +(i * step).toPrecision(3));
    plot.axes([0, ...C.steps], ticks, "inner steps", title);
    return plot;
  });
  const dashes = {
    maml: "",
    maml_recomputed: "9 5",
    fomaml: "2 5",
    reptile: "12 4 2 4",
    imaml: "",
  };
  return () => {
    panels.forEach(([, field, scale], p) => {
      const plot = plots[p];
      plot.clear();
      plot.cursor(chosen("costSteps"));
      for (const kind of kinds) {
        plot.line(
          C.steps.map((t, i) => [t, scale * C[kind][field][i]]),
          kind,
          { "stroke-dasharray": dashes[kind] },
        );
        const group = element(plot.layer, "g", { class: kind });
        C.steps.forEach((t, i) =>
          group.append(plot.dot([t, scale * C[kind][field][i]], "mark", 3.5)),
        );
      }
    });
    const line = (
      kind,
    ) => `<svg viewBox="0 0 34 10" style="display:inline-block;width:34px;margin-right:8px"
      aria-hidden="true"><g class="${kind}"><line class="line" x1="2" x2="32" y1="6" y2="6"
      stroke-dasharray="${dashes[kind]}"/></g></svg>`;
    const i = state.costSteps;
    fillTable(
      "costs-table",
      kinds.map((kind) => [
        kind,
        line(kind) + NAMES[kind].replace(" ÷ αT", ""),
        format(C[kind].bytes[i] / 1024),
        format(1e3 * C[kind].seconds[i]),
      ]),
    );
  };
}

/* Called from the top: state first, then each figure, then the words around them. */
data.sinusoid.points.forEach((_, k) => {
  state[`level${k}`] = [1, 3, 0][k % 3];
});
makeSliders();
makeGame();
figure(["objective", "rate", "steps", "strength", "row", "column"], makeLandscape());
figure(["steps", "row", "column"], makeCurves());
figure(["start", "rate", "steps", "strength"], makeRuns());
figure(["innerStart", "innerRate", "innerSteps", "innerStrength"], makeInner());
figure(["condition", "descentSteps", "cgSteps"], makeSolver());
figure(["fitSteps", ...data.sinusoid.points.map((_, k) => `level${k}`)], makeSinusoid());
figure(["costSteps"], makeCosts());
figures.forEach((each) => each.draw());
showCalls();

byId("byline").textContent =
  `Every arrow, contour and curve was computed by imaml_jax ${data.versions.imaml_jax} ` +
  `(seed ${data.seed}); the page looks them up. Drag what is blue, or use the arrow keys.`;
byId("meta-steps").textContent = P.meta_steps;
byId("reach").textContent = P.reach;
byId("outer-rate").textContent = P.outer_rate;
byId("record-every").textContent = P.record_every;
byId("machine").textContent = `${data.machine} (${data.device})`;
byId("command").textContent = data.command;
byId("date").textContent = data.date;
byId("versions").textContent = `imaml_jax ${data.versions.imaml_jax}, JAX ${data.versions.jax}`;
